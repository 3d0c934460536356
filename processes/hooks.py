"""Gunicorn's hooks and its logger, as `gunicorn.conf.py` names them."""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
from typing import Any, cast

from gunicorn.glogging import Logger

import app
from processes import boot, early, options
from processes.handshake import give_time
from processes.loading import refuse_start
from processes.master import Master
from serving.errors import StartupError, errors_about, exit_on_startup_error
from serving.output import finish_output, reopen_output
from serving.web.service import Service

MAX_FILES = 65_536  # open files of a worker, where the hard limit allows as many
GC_THRESHOLD = 10_000  # new objects before garbage is looked for: more than requests in flight have


class GunicornLogger(Logger):
    """Gunicorn's logger without its handlers: `configure_logging` has put ours in their place."""

    def setup(self, cfg: Any) -> None:
        self.cfg = cfg
        self.loglevel = logging.root.level
        self._access_log_enabled = False


def on_starting(server: Any) -> None:
    """Make the arbiter a `Master` that listens, unless gunicorn's options or its addresses are refused."""
    service = cast(Service[app.Settings], app.current_service())
    try:
        final, given = options.final_options(server.cfg), options.read_options()
        options.check_options(final, given)
        options.check_app(server.app.app_uri, final, given, service.settings)
        Master.take_over(server, service, boot.proof_s)
        server.open_listeners()
    except StartupError as error:
        if server.pidfile is not None:
            server.pidfile.unlink()
        refuse_start(error)
    if server.cfg.daemon:
        reopen_output()


def when_ready(server: Master) -> None:
    server.reload_.is_asked = server.reload_.is_asked or bool(early.hups)
    server.service.settings.note_left_alone()
    server.announce()


def post_fork(server: Master, worker: Any) -> None:
    """Prepare a worker. A signal that came while it was forked, as `Master.spawn_worker` tells, ends it here."""
    gc.freeze()  # or the collector would write to all that is shared with the master
    worker.handshake, worker.service = server.handshake, server.service
    server.reload_.drop_previous()
    allow_files()
    give_time(worker.tmp, server.start_timeout_s)
    for number in worker.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, worker.SIGNALS)


def allow_files() -> None:
    """Let this process have as many files open as it may; a soft limit of 1024, the usual one, is as many clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def post_worker_init(worker: Any) -> None:
    """Answer the first rows in a worker, and keep the garbage collector from what it has loaded."""
    with exit_on_startup_error(), errors_about(worker.service.settings.artifact_subject):
        worker.service.model.warm_up()
    boot.freeze()
    gc.set_threshold(GC_THRESHOLD)


def worker_exit(server: Master, worker: Any) -> None:
    """End a worker in which a call is still made: Python would wait for its thread."""
    if worker.service.queue.called_at is not None:
        finish_output()
        os._exit(0)

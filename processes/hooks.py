"""Gunicorn's hooks and its logger, as `gunicorn.conf.py` names them."""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
from typing import Any, ClassVar, cast

import structlog
from gunicorn.glogging import Logger

import app
from processes import boot, early, options
from processes.handshake import give_time
from processes.loading import refuse_start
from processes.master import Master
from serving.errors import StartupError, errors_about, exit_on_startup_error
from serving.output import finish_output, reopen_output
from serving.web.service import Service

log = structlog.get_logger()

MAX_FILES = 65_536  # open files of a worker, where the hard limit allows as many
GC_THRESHOLD = 10_000  # new objects before garbage is looked for: more than requests in flight have


class GunicornLogger(Logger):
    """Gunicorn's logger without its handlers: `configure_logging` has put ours in their place.

    What it informs of is routine, and told shorter by our own events, so it goes to `debug`.
    """

    # Of workers by their numbers, until `child_exit` tells it: by which signal they were ended, and who gave no sign of
    # life for too long.
    signals: ClassVar[dict[int, str]] = {}
    late: ClassVar[set[int]] = set()

    def setup(self, cfg: Any) -> None:
        self.cfg = cfg
        self.loglevel = logging.root.level
        self._access_log_enabled = False

    def info(self, msg: str, *args: Any, **kwargs: Any) -> None:
        if not self._is_noted(msg, args):
            self.debug(msg, *args, **kwargs)

    def warning(self, msg: str, *args: Any, **kwargs: Any) -> None:
        if not self._is_noted(msg, args):
            super().warning(msg, *args, **kwargs)

    def error(self, msg: str, *args: Any, **kwargs: Any) -> None:
        if not self._is_noted(msg, args):
            super().error(msg, *args, **kwargs)

    def critical(self, msg: str, *args: Any, **kwargs: Any) -> None:
        if msg.startswith("WORKER TIMEOUT"):  # says `Arbiter.murder_workers`
            self.late.add(args[0])
        super().critical(msg, *args, **kwargs)

    def _is_noted(self, msg: str, args: tuple[Any, ...]) -> bool:
        """Note what ended a worker, if that is what `Arbiter.reap_workers` says."""
        is_end = msg.startswith("Worker (pid:%s) was sent %s!")
        if is_end:
            self.signals[args[0]] = args[1]
        return is_end


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


def pre_fork(server: Master, worker: Any) -> None:
    """Note when a worker's start must be over. It does not do that itself: it may hang at its first step, and the time
    of a new file, by another clock, is never over."""
    give_time(worker.tmp, server.start_timeout_s)


def post_fork(server: Master, worker: Any) -> None:
    """Prepare a worker. A signal that came while it was forked, as `Master.spawn_worker` tells, ends it here."""
    gc.freeze()  # or the collector would write to all that is shared with the master
    worker.handshake, worker.service = server.handshake, server.service
    server.reload_.drop_previous()
    allow_files()
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
    """Answer the first rows in a worker, and keep the garbage collector from what it has loaded.

    Ctrl-C, which a terminal sends to each process, is left to the master: it tells the workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # uvicorn's server sets a handler later: `DrainingServer.handle_exit`
    with exit_on_startup_error(), errors_about(worker.service.settings.artifact_subject):
        worker.service.model.warm_up()
    boot.freeze()
    gc.set_threshold(GC_THRESHOLD)


def child_exit(server: Master, worker: Any) -> None:
    """Log in the master that a signal ended a worker which should have gone on, or took too long to end."""
    name, is_late = GunicornLogger.signals.pop(worker.pid, None), worker.pid in GunicornLogger.late
    GunicornLogger.late.discard(worker.pid)
    is_replaced = not (server.is_stopping or worker.pid in server.retired)
    if name is not None and (is_replaced or name not in ("SIGTERM", "SIGINT", "SIGQUIT")):
        of_others = name == "SIGKILL" and is_replaced and not is_late
        hint = {"hint": "perhaps out of memory"} if of_others else {}
        log.error("worker_replaced" if is_replaced else "worker_killed", worker=worker.pid, signal=name, **hint)


def worker_exit(server: Master, worker: Any) -> None:
    """End a worker in which a call is still made: Python would wait for its thread."""
    if worker.service.queue.called_at is not None:
        finish_output()
        os._exit(0)

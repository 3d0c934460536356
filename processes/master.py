"""The master: it starts, watches, retires and ends workers, and reloads."""

from __future__ import annotations

import signal
import time
from typing import Any

import structlog
from gunicorn import systemd
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from gunicorn.workers.base import Worker

import app
from processes.handshake import BOOTING, DRAINING, READY, Handshake, read_stage
from processes.listeners import close, listen_at_all, urls_of
from processes.reload import MAX_WAIT_S, Reload, start_timeout_s
from processes.trial import Trial
from processes.worker import SupervisedWorker
from serving import VERSION
from serving.errors import STARTUP_STATUS, listed, reason_of
from serving.output import flush_output
from serving.web.service import Service

log = structlog.get_logger()

MANY_WORKERS = 4  # for each core: more only take memory, since one answers many requests at a time


class Master(Arbiter):
    """Gunicorn's arbiter, with a reload that is a transaction.

    Gunicorn has no setting for the class of its arbiter, so the object is given it: see `take_over`.
    """

    LISTENERS: list[Any]
    service: Service[app.Settings]  # of the workers that are forked from now on
    handshake: Handshake  # with the workers that are forked from now on
    retired: dict[int, float]  # workers that shall end, with the time by which they must have
    reload_: Reload
    start_timeout_s: float  # that a worker may take to start, before `server.timeout` counts
    is_stopping: bool
    has_served: bool  # all workers were ready once
    n_failed: int  # times in a row that a worker did not start
    spawn_after: float  # by the monotonic clock

    @classmethod
    def take_over(cls, arbiter: Any, service: Service[app.Settings], proof_s: float) -> None:
        """Make an arbiter one of this class, with a service whose proof took so many seconds."""
        arbiter.__class__ = cls
        arbiter.service = service
        arbiter.handshake = Handshake()
        arbiter.retired = {}
        arbiter.reload_ = Reload(arbiter)
        arbiter.start_timeout_s = start_timeout_s(proof_s)
        arbiter.is_stopping = arbiter.has_served = False
        arbiter.n_failed = 0
        arbiter.spawn_after = 0.0

    def open_listeners(self) -> None:
        """Listen, before gunicorn would, which tries a taken port again and again. Raises `SettingsError`.

        Those that systemd or an old master hand over are gunicorn's to take.
        """
        if not (systemd.listen_fds(unset_environment=False) or self.master_pid or self.cfg.reuse_port):
            self.LISTENERS = listen_at_all(self.cfg, self.log, self.service.settings.place("server", "bind"))

    def use(self, service: Service[app.Settings]) -> None:
        """Fork workers of a service from now on."""
        app.set_current_service(service)
        self.service = service

    def announce(self) -> None:
        """Log what is served, and how cores are shared: workers times threads never exceed them, but for workers that
        are more than the cores."""
        settings = self.service.settings
        named = {"framework": settings.framework, "worker_class": settings.worker_class}
        log.info("serving", version=VERSION, bind=urls_of(self.LISTENERS, self.cfg), **named, **self.service.identity)
        log.info("core_budget", cores=settings.cores, workers=settings.workers, threads=settings.threads)
        if settings.workers > MANY_WORKERS * settings.cores:
            log.warning("many_workers", cores=settings.cores, workers=settings.workers)
        self.service.model.note_python()

    def handle_hup(self) -> None:
        """Ask for a reload. One under way is given up for it: at once, or after its load, which cannot be stopped."""
        self.reload_.is_asked = True

    def handle_int(self) -> None:
        """Stop as at TERM. At a second Ctrl-C gunicorn hurries."""
        raise StopIteration

    def manage_workers(self) -> None:
        """Go on with a reload; replace workers that ended, retire those that are too many, kill those that linger."""
        flush_output()
        self.reload_.go_on()
        self.retired = {pid: end for pid, end in self.retired.items() if pid in self.WORKERS}
        for pid in self.WORKERS.keys() - self.retired.keys():
            if self.stage_of(pid) == DRAINING:  # of its own accord
                self.retired[pid] = time.monotonic() + self.cfg.graceful_timeout
        for pid, end in self.retired.items():
            if time.monotonic() > end:
                self.kill_worker(pid, signal.SIGKILL)
        if self.reload_.previous is not None or self.reload_.is_loading:
            return
        serving = sorted(self.WORKERS.keys() - self.retired.keys(), key=lambda pid: self.WORKERS[pid].age)
        if len(serving) >= self.num_workers and all(self.stage_of(pid) == READY for pid in serving):
            self.n_failed, self.has_served = 0, True
        if time.monotonic() >= self.spawn_after:
            self._spawn(self.num_workers - len(serving))
        for pid in serving[: max(0, len(serving) - self.num_workers)]:
            self.retire(pid)

    def spawn_worker(self) -> int:
        """Fork a worker. Signals to it wait until it has its own handlers.

        Before that, a signal would go to the master's handlers, which queue it where nobody reads it, or be forgotten
        by Python (`PyOS_AfterFork_Child`); the service would wait `graceful_timeout` for the worker.
        """
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, Worker.SIGNALS)
        try:
            return int(super().spawn_worker())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _spawn(self, count: int) -> None:
        try:
            for _ in range(count):
                self.spawn_worker()
        except (OSError, RuntimeError) as error:  # no process more, or no file for signs of life
            if not self.has_served and not self.WORKERS:
                raise HaltServer(reason_of(error), STARTUP_STATUS) from error
            self._hold_off(reason_of(error))

    def _hold_off(self, reason: str) -> None:
        """Start workers later, and after each failure later still."""
        self.n_failed += 1
        wait_s = min(2.0**self.n_failed, MAX_WAIT_S)
        self.spawn_after = time.monotonic() + wait_s
        log.error("worker_not_started", reason=reason, retry_in_s=wait_s)

    def retire(self, pid: int) -> None:
        """Tell a worker to end, within `graceful_timeout`."""
        if pid in self.WORKERS:
            self.retired[pid] = time.monotonic() + self.cfg.graceful_timeout
            self.kill_worker(pid, signal.SIGTERM)

    def stage_of(self, pid: int) -> int:
        """Return the stage of a worker; READY for one of gunicorn's or uvicorn's own classes, which tell nothing."""
        worker = self.WORKERS.get(pid)
        if isinstance(worker, SupervisedWorker):
            return read_stage(worker.tmp)
        return BOOTING if worker is None else READY

    def reap_workers(self) -> None:
        """Bury workers that have ended. Once all have served, one that cannot start does not end the service."""
        if Trial.running is not None:
            Trial.running.has_ended()  # or its status would be lost
        booting = [pid for pid in self.WORKERS if self.stage_of(pid) == BOOTING]
        while True:
            try:
                super().reap_workers()
                break
            except HaltServer:
                if not self.has_served and not self.is_stopping:
                    raise
        failed = [pid for pid in booting if pid not in self.WORKERS and pid not in self.retired]
        if failed and self.reload_.previous is None and not self.is_stopping:
            self._hold_off(f"{listed(failed)} ended before it was ready")

    def halt(self, reason: Any = None, exit_status: int = 0) -> None:
        """End the service, and this process."""
        try:
            super().halt(reason, exit_status)
        finally:
            if exit_status == 0:
                log.info("stopped")

    def stop(self, graceful: bool = True) -> None:
        """End the workers.

        Tell them through shared memory that the service stops, and whether another process keeps the listeners open: an
        old or new master after USR2, or systemd.
        """
        if not self.is_stopping:
            log.info("stopping", workers=len(self.WORKERS))
        self.is_stopping = True
        self.reload_.stop()
        are_shared = self.systemd or self.reexec_pid or self.master_pid
        self.handshake.stop_service()
        self.handshake.drop(not are_shared for _ in self.LISTENERS)
        for listener in self.LISTENERS:
            listener.close() if are_shared else close([listener])
        self.LISTENERS = []
        super().stop(graceful)

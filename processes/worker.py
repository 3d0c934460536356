"""What both workers share: how the master learns that one is ready, and what one that shall end has to do."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import structlog
from gunicorn.workers.base import Worker

import app
from processes.handshake import BOOTING, DRAINING, READY, Handshake, tell_stage
from processes.listeners import drop_new_connections
from serving.output import flush_output
from serving.web.service import STOPPING, Service

log = structlog.get_logger()

DRAIN_S = 1.0  # seconds for which idle connections stay open after the order to end
SETTLE_S = 0.1  # seconds in which a connection that was begun comes to be accepted
MARGIN_S = 0.5  # seconds before the master kills what has not ended
POLL_S = 0.05
TICK_S = 0.1  # seconds between two signs of life
ACCEPTS_PER_S, MAX_ACCEPTS = 2000, 100  # by which a busy worker makes up for turns that it had not


class SupervisedWorker(Worker):
    """A worker of our `Master`. `handshake` and `service` are what the master had when it forked the worker."""

    handshake: Handshake
    service: Service[app.Settings]
    alive: bool
    stage = BOOTING

    def notify(self) -> None:
        """Update the heartbeat; the first time, when the worker listens, tell the master that it is ready."""
        flush_output()
        self.tmp.notify()
        if self.stage == BOOTING:
            self._tell(READY)

    def _tell(self, stage: int) -> None:
        self.stage = stage
        tell_stage(self.tmp, stage)
        with contextlib.suppress(OSError):  # another user's; it looks each second anyway
            os.kill(self.ppid, signal.SIGCHLD)  # wakes the master, which then reads the stages

    def must_end(self) -> bool:
        """Return whether this worker has lost its master, or makes a call that does not end."""
        queue = self.service.queue
        if queue.is_stuck():
            log.critical("prediction_stuck", after_s=queue.stuck_s)
            return True
        return self.is_orphan

    @property
    def is_orphan(self) -> bool:
        return bool(os.getppid() != self.ppid)

    def begin_drain(self) -> tuple[float, float]:
        """Tell that this worker ends.

        Return the time by which it must have, before the master kills it, and the seconds for which clients may come
        back.
        """
        if self.handshake.is_stopping or self.is_orphan:
            STOPPING.set()
        log.info("draining", service_ends=STOPPING.is_set())
        if not self.is_orphan:
            self._tell(DRAINING)
        left_s = float(self.cfg.graceful_timeout) - MARGIN_S
        return time.monotonic() + left_s, min(DRAIN_S, left_s / 2)

    def close_listeners(self, servers: Sequence[Any], moment_s: float) -> Iterator[float]:
        """Close the servers of this worker's sockets, and yield the seconds to wait between the steps.

        What the kernel has queued for a dropped listener nobody else will accept, so that is accepted first.
        """
        dropped = [n for n in range(len(servers)) if self.handshake.is_dropped(n)]
        for n, server in enumerate(servers):
            if n not in dropped:
                server.close()
        if dropped:
            yield moment_s
            for n in dropped:
                drop_new_connections(self.sockets[n])
            yield SETTLE_S
            for n in dropped:
                servers[n].close()

"""What master and workers tell each other.

The master tells in shared memory: whether the service stops, and which listeners are dropped. A worker tells its stage
by the length of its heartbeat file, beside the file's time, which is gunicorn's sign of life.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterable
from typing import Any

BOOTING, READY, DRAINING = 0, 1, 2  # stages of a worker


class Handshake:
    """What the master tells the workers that were forked since it was made."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)  # whether the service stops, then a byte for each listener

    def stop_service(self) -> None:
        """Tell that the service stops, and that no other process goes on with it."""
        self._memory[0] = True

    @property
    def is_stopping(self) -> bool:
        return bool(self._memory[0])

    def drop(self, are_dropped: Iterable[bool]) -> None:
        """Tell for each listener whether no process accepts from it any more."""
        for number, is_dropped in enumerate(are_dropped):
            self._memory[number + 1] = is_dropped

    def is_dropped(self, number: int) -> bool:
        return bool(self._memory[number + 1])


def tell_stage(heartbeat: Any, stage: int) -> None:
    """Tell the master, from a worker, what the worker does."""
    os.truncate(heartbeat.fileno(), stage)
    heartbeat.notify()


def read_stage(heartbeat: Any) -> int:
    """Return, in the master, the stage that a worker has told; BOOTING if it has ended, and the file is closed."""
    with contextlib.suppress(ValueError):
        return os.fstat(heartbeat.fileno()).st_size
    return BOOTING


def give_time(heartbeat: Any, seconds: float) -> None:
    """Let the master wait longer for the next sign of life: as if the last one came that much later."""
    latest = time.monotonic() + seconds
    os.utime(heartbeat.fileno(), (latest, latest))

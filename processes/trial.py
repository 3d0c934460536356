"""A call made in a child process, and steps that wait where they yield."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Generator
from typing import Any, ClassVar, NoReturn

import structlog
from gunicorn.arbiter import Arbiter

from serving import errors
from serving.errors import ModelError, StartupError, reason_of
from serving.output import finish_output

log = structlog.get_logger()

PROVEN, REFUSED = "+", "-"
MAX_SAID_BYTES = 32_768  # half of what a pipe holds, so that nobody need read while it is written
PR_SET_PDEATHSIG = 1  # prctl(2): the signal to get when the parent ends
START_POLL_S = 0.005


class Trial:
    """A call made in a child process.

    A crash, memory or threads of the call stay in the child. (Threads started in the master would be missing in forked
    workers, which then hang: gunicorn's issue 1891.) `call` returns a text or raises `StartupError`; `what` is the
    subject of a message about it.
    """

    running: ClassVar[Trial | None] = None  # its status must not be taken for a worker's

    def __init__(self, call: Callable[[], str], what: str) -> None:
        self.what = what
        reading, writing = os.pipe()
        os.set_blocking(reading, False)  # whatever the child started may hold the other end
        self.pid = os.fork()
        if self.pid == 0:
            self._run(call, writing)
        os.close(writing)
        self._pipe = os.fdopen(reading, "rb")
        self._status: int | None = None

    def _run(self, call: Callable[[], str], writing: int) -> NoReturn:
        said = ""  # what is said counts, not the status: a predict may end the process with any
        try:
            for number in (*Arbiter.SIGNALS, signal.SIGCHLD):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, signal.SIG_DFL)
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            said = PROVEN + call()
        except StartupError as error:
            said = f"{REFUSED}{type(error).__name__}: {error}"
        except Exception as error:  # of a user's module, or of what an artifact holds
            log.exception("trial_failed")
            said = f"{REFUSED}StartupError: {reason_of(error)}"
        finally:
            try:
                os.write(writing, said.encode(errors="backslashreplace")[:MAX_SAID_BYTES])
            finally:
                finish_output()
                os._exit(0)  # and wait for no thread

    def has_ended(self) -> bool:
        """Return whether `result` is there."""
        return self._has_ended(os.WNOHANG)

    def _has_ended(self, options: int) -> bool:
        if self._status is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:  # gunicorn's master waits for whatever child it has
                pid, status = self.pid, 0
            self._status = status if pid else None
        return self._status is not None

    def result(self) -> str:
        """Wait, and return what the call returned. Raises `StartupError` with what it raised."""
        self._has_ended(0)
        with self._pipe:
            said = (self._pipe.read() or b"").decode(errors="ignore")
        if said.startswith(PROVEN):
            return said.removeprefix(PROVEN)
        if said.startswith(REFUSED):
            kind, _, text = said.removeprefix(REFUSED).partition(": ")
            raise getattr(errors, kind, StartupError)(text)
        status = os.waitstatus_to_exitcode(self._status or 0)
        raise ModelError(f"{self.what} ended the process that tried it, with status {status}")

    def stop(self) -> None:
        """End the child, if it has not ended."""
        if not self.has_ended():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._has_ended(0)
        self._pipe.close()


def wait_for(task: Any, check: Callable[[], None]) -> Generator[None, None, Any]:
    """Yield until a task has ended, with a check at each turn, and return its result. Raises `StartupError`."""
    while not task.has_ended():
        check()
        yield
    return task.result()


def try_out(call: Callable[[], str], what: str, check: Callable[[], None]) -> Generator[None, None, str]:
    """Make a call in a child process, and yield until it has ended, or must. Raises `StartupError`."""
    trial = Trial(call, what)
    try:
        Trial.running = trial
        result: str = yield from wait_for(trial, check)
        return result
    finally:
        Trial.running = None
        trial.stop()


def finish(steps: Generator[None, None, Any]) -> Any:
    """Take all steps of what waits where it yields, and return what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        time.sleep(START_POLL_S)

"""Standard output and error that lose lines rather than time: no reader, slow or gone, keeps a request waiting."""

from __future__ import annotations

import atexit
import collections
import contextlib
import errno
import functools
import io
import os
import select
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import structlog

log = structlog.get_logger()
MAX_PENDING_BYTES = 262_144  # bytes of lines that wait for a slow reader
LAST_LINES_S = 0.2  # seconds for which the end of a process waits for that reader


class LossyOutput(io.RawIOBase):
    """Standard output or error whose writes never wait and never raise.

    What the reader cannot take yet waits, up to a bound; the rest is lost and counted, and the log says how much once
    lines are taken again. The descriptor is a copy: code of the user's may close the standard one, whose number the
    next connection of a client would get.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._send, self._close = _open_output(fd)
        self._start_anew()
        os.register_at_fork(after_in_child=self._start_anew)
        atexit.register(self.finish)

    def reopen(self) -> None:
        """Write from now on to what the standard descriptor is now, and let go of what it was."""
        self._close()
        self._send, self._close = _open_output(self._fd)

    def _start_anew(self) -> None:
        """Forget what waits, which after a fork is the parent's to write, and a lock that another thread may hold."""
        self._lock = threading.RLock()  # a signal's handler may log in the middle of a line: see `_is_writing`
        self._is_writing = False
        self._pending: collections.deque[bytes] = collections.deque()
        self._pending_bytes = 0
        self._is_begun = False  # the first of them is written in part
        self._is_cut = False  # a line was written in part, and will not be continued
        self._lost = 0  # lines

    def write(self, data: Any) -> int:
        line = bytes(data)
        with self._lock:
            n_bytes = 0 if self._pending or self._lost or self._is_cut or self._is_writing else self._try(line)
            if n_bytes < len(line):
                self._keep(line[n_bytes:], is_begun=n_bytes > 0)
        if n_bytes < len(line):
            self.flush()
        return len(line)

    def _try(self, line: bytes) -> int:
        """Write a line, as most are, beside which none waits, and return how much of it was taken."""
        try:
            return self._send(line)
        except OSError:
            return 0

    def _keep(self, line: bytes, is_begun: bool) -> None:
        if is_begun or self._pending_bytes + len(line) <= MAX_PENDING_BYTES:
            self._pending.append(line)
            self._pending_bytes += len(line)
            self._is_begun = self._is_begun or is_begun
        else:
            self._lost += line.count(b"\n")

    def flush(self) -> None:
        """Write what waits, as far as it is taken."""
        with self._lock:
            lost = self._write_pending()
        if lost:
            log.warning("log_lines_lost", lines=lost)

    def _write_pending(self) -> int:
        """Write lines as far as they are taken, and return how many were lost before, once all that waited are."""
        if self._is_writing:
            return 0
        self._is_writing, is_taken = True, False
        try:
            while self._pending:
                if self._is_cut:
                    self._send(b"\n")
                    self._is_cut = False
                line = self._pending[0]
                n_bytes = self._send(line)
                self._pending[0] = line[n_bytes:]
                self._pending_bytes -= n_bytes
                is_taken, self._is_begun = is_taken or n_bytes > 0, n_bytes < len(line)
                if not self._is_begun:
                    self._pending.popleft()
        except BlockingIOError:  # the reader is slow
            pass
        except OSError:  # there is no reader, or no space
            is_taken, self._is_cut = False, self._is_cut or self._is_begun
            self._lost += sum(line.count(b"\n") for line in self._pending)
            self._pending.clear()
            self._pending_bytes, self._is_begun = 0, False
        finally:
            self._is_writing = False
        lost = self._lost if is_taken and not self._pending else 0
        self._lost -= lost
        return lost

    def finish(self) -> None:
        """Give a slow reader a moment for the last lines."""
        end = time.monotonic() + LAST_LINES_S
        while self._pending and time.monotonic() < end:
            self.flush()
            time.sleep(LAST_LINES_S / 20)

    def close(self) -> None:
        """Stay open: whoever closes `sys.stderr` closes it for the whole process."""
        self.flush()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)


PROTECTED: list[LossyOutput] = []  # what this process writes to standard output and error


def protect_output() -> None:
    """Make standard output and error of this process take every line without waiting or raising; once is enough."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # it is closed, and the next file would get its number
            os.open(os.devnull, os.O_RDWR)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _protect(stream, fd))


def flush_output() -> None:
    """Write the lines that wait for a slow reader, as far as it takes them now."""
    for output in PROTECTED:
        output.flush()


def finish_output() -> None:
    """Write the last lines of a process that ends at once, without what Python does at its end."""
    for output in PROTECTED:
        output.finish()


def reopen_output() -> None:
    """Write to what standard output and error are by now."""
    for output in PROTECTED:
        output.reopen()


def _protect(stream: Any, fd: int) -> io.TextIOWrapper:
    """Return a text stream in the place of one of Python's own, which is None where its descriptor was closed."""
    if stream is None:
        fd = os.open(os.devnull, os.O_WRONLY)
    else:
        with contextlib.suppress(OSError):
            stream.flush()
    output = LossyOutput(fd)
    PROTECTED.append(output)
    encoding = getattr(stream, "encoding", "utf-8")
    return io.TextIOWrapper(cast(Any, output), encoding, errors="backslashreplace", line_buffering=True)


def _open_output(fd: int) -> tuple[Callable[[bytes], int], Callable[[], None]]:
    """Return what writes to a copy of a descriptor, as much as is taken at once, and what closes it.

    Whether a write waits is a flag that all processes share which have inherited the descriptor, so it is not set
    there. Opened anew, a pipe or terminal has a flag of its own. Where that is not allowed, as with a pipe of another
    user's, the kernel is asked not to wait for this one write. Only a terminal of another user's may still wait.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):  # as systemd's journal has it
        journal = socket.socket(fileno=os.dup(fd))
        return lambda data: journal.send(data, socket.MSG_DONTWAIT), journal.close
    own = -1
    write: Callable[[int, bytes], int] = os.write
    if stat.S_ISFIFO(mode) or os.isatty(fd):
        try:
            own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            write = _write_if_taken
    own = os.dup(fd) if own < 0 else own
    return functools.partial(write, own), functools.partial(os.close, own)


def _write_if_taken(fd: int, data: bytes, poll: Callable[[], Any] = select.poll) -> int:
    """Write what is taken now, where the kernel can be asked for that; else no more than a pipe that takes anything
    takes whole. `poll` is not gevent's, which would switch."""
    try:
        return os.pwritev(fd, [data], -1, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
    except (AttributeError, NotImplementedError):  # not Linux
        pass
    poller = poll()
    poller.register(fd, select.POLLOUT)
    if not poller.poll(0):
        raise BlockingIOError
    return os.write(fd, data[: select.PIPE_BUF])

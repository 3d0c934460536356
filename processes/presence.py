"""Whether a client is still there, while its request waits, and has sent more: rows of one that has left need no
prediction."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable

poll = select.poll  # the system's, for gevent puts its own in its place
GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


def has_left(fd: int, may_ask: Callable[[], bool]) -> bool:
    """Return whether the client of a connection has left, as far as the kernel knows.

    One that has closed its sending side may be gone, or still read: TCP tells only once something is sent. So it is
    asked if it may be, by an interim response, which every client of HTTP/1.1 takes, whatever it expects (RFC 9110,
    section 15.2). The kernel of one that is gone answers with a reset.
    """
    events = _events(fd)
    if events & select.POLLRDHUP and not events & GONE and may_ask():
        with contextlib.suppress(OSError):
            os.write(fd, INTERIM)
        events = _events(fd)
    return bool(events & GONE)


def has_input(fd: int) -> bool:
    """Return whether a client has sent what nobody has read, or has ended its sending."""
    return bool(_events(fd, select.POLLIN) & select.POLLIN)


def _events(fd: int, looked_for: int = select.POLLRDHUP) -> int:
    if fd < 0:
        return select.POLLNVAL
    poller = poll()
    poller.register(fd, looked_for)
    return next((events for _, events in poller.poll(0)), 0)

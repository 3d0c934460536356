"""Clients that take nothing of their answer: how that is seen, and how their connection ends.

`gevent_worker.Client` looks at it while it sends, `transport.Sending` for all connections of a uvicorn worker together.
A client that takes a byte within each `server.send_timeout` is slow, and goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import sys
import termios
import time
from typing import Any

import structlog

log = structlog.get_logger()

LOOK_S = 1.0  # seconds between two looks at what is being sent
TCP_INFO_BYTES, TCP_BYTES_ACKED = 128, 120  # of struct tcp_info, and where in it (linux/tcp.h, since Linux 4.1)


class Progress:
    """The number of bytes that a client has taken, and since when it has taken no more."""

    def __init__(self, taken: int, patience_s: float) -> None:
        self.taken, self.since = taken, time.monotonic()
        self.patience_s = patience_s

    def is_stalled(self, taken: int) -> bool:
        """Note how many bytes the client has taken by now. Return whether it has taken none for too long."""
        now = time.monotonic()
        if taken > self.taken:
            self.taken, self.since = taken, now
        return now - self.since >= self.patience_s


def count_unacknowledged(sock: Any) -> int:
    """Return the bytes of a socket's buffer that the other side's kernel has not acknowledged.

    A full buffer may take nothing more for long although the client reads.
    """
    count = bytearray(4)
    with contextlib.suppress(OSError, ValueError):  # no such count for this kind of socket, or it is closed
        fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
    return int.from_bytes(count, sys.byteorder)


def count_acknowledged(sock: Any) -> int | None:
    """Return how many bytes the other side's kernel has taken so far; None where TCP does not say."""
    with contextlib.suppress(OSError, ValueError, TypeError, struct.error):
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        return int(struct.unpack_from("Q", info, TCP_BYTES_ACKED)[0])
    return None


def forget_unsent(sock: Any) -> None:
    """Make the kernel drop what a socket has not sent when it is closed, instead of keeping it for a client that reads
    nothing."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def note_cut_off(after_s: float) -> None:
    log.info("client_cut_off", reason="it took no byte of its answer", after_s=after_s)

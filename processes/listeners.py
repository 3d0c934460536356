"""Sockets that listen: opened and closed at a reload, and dropped without a reset."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterable
from typing import Any

from gunicorn import util
from gunicorn.sock import TCP6Socket, TCPSocket, UnixSocket, close_sockets

SO_ATTACH_FILTER = 26  # asm-generic/socket.h


def has_file(address: Any) -> bool:
    """Return whether the file of a unix socket is there; other addresses have none."""
    return not isinstance(address, str) or os.path.exists(address)


def listen(address: Any, cfg: Any, logger: Any, others: Iterable[Any]) -> Any:
    """Open a listener. Raises `OSError`, `ValueError`.

    One for all interfaces and one for a single one can have the same port only if both say so while they are bound.
    """
    if isinstance(address, int):
        raise ValueError("a file descriptor is taken over at the start only")
    if not isinstance(address, tuple):
        return UnixSocket(address, cfg, logger)
    kind = TCP6Socket if util.is_ipv6(address[0]) else TCPSocket
    sockets = [socket.socket(kind.FAMILY), *(other.sock for other in others if isinstance(other, TCPSocket))]
    try:
        sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for sock in sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sockets[0].bind(address)
        return kind(address, cfg, logger, fd=os.dup(sockets[0].fileno()))
    finally:
        for sock in sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
        sockets[0].close()


def close(listeners: Iterable[Any], kept: Iterable[Any] = ()) -> None:
    """Close listeners, and remove the files of unix sockets, unless those that are kept have the same."""
    addresses = {listener.cfg_addr for listener in kept}
    for listener in listeners:
        with contextlib.suppress(OSError):  # its file is gone
            close_sockets([listener], unlink=listener.cfg_addr not in addresses)


def drop_new_connections(sock: Any) -> None:
    """Make the kernel drop the first packet of each new connection to a listening socket, as if nothing had come.

    A listener that is closed resets the connections that the kernel has queued for it; so first no more may come. The
    program is one of the classic BPF's (linux/filter.h), run on the header of TCP, whose byte 13 has the flags.
    """
    if sock.family == socket.AF_UNIX:
        return
    load_flags, jump_unless_syn, drop, keep = (0x30, 0, 0, 13), (0x45, 0, 1, 2), (6, 0, 0, 0), (6, 0, 0, 0xFFFF)
    code = b"".join(struct.pack("HBBI", *step) for step in (load_flags, jump_unless_syn, drop, keep))
    buffer = ctypes.create_string_buffer(code)
    with contextlib.suppress(OSError):  # where the kernel has none, a few connections may be reset
        program = struct.pack("HL", len(code) // 8, ctypes.addressof(buffer))
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)

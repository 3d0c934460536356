"""Sockets that listen: opened at a start, opened and closed at a reload, and dropped without a reset."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import os
import socket
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gunicorn import util
from gunicorn.sock import TCP6Socket, TCPSocket, UnixSocket, close_sockets

from serving.errors import SettingsError

SO_ATTACH_FILTER = 26  # asm-generic/socket.h


def has_file(address: Any) -> bool:
    """Return whether the file of a unix socket is there; other addresses have none."""
    return not isinstance(address, str) or os.path.exists(address)


def listen_at_all(cfg: Any, logger: Any, where: str, there: Sequence[Any] = ()) -> list[Any]:
    """Return a listener for each address of a configuration: those that are there, and new ones.

    `where` is the place of the addresses. Raises `SettingsError`, and then nothing has changed.
    """
    listeners: list[Any] = []
    try:
        for address in cfg.address:
            is_ipv6_only = _is_beside_ipv4(address, cfg.address)
            fitting = [old for old in there if has_file(address) and _is_at(old, address, is_ipv6_only)]
            listeners.append(
                fitting[0] if fitting else _listen(address, cfg, logger, [*there, *listeners], is_ipv6_only)
            )
            if listeners[-1].getsockname() in [other.getsockname() for other in listeners[:-1]]:
                raise ValueError("it is in the list already")
    except (OSError, ValueError) as error:
        close(listener for listener in listeners if listener not in there)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        problem = f"cannot listen at {_written(address)!r}: {reason}"
        raise SettingsError(f"{where}: {problem}; choose another server.bind") from None
    return listeners


def urls_of(listeners: Sequence[Any], cfg: Any) -> list[str]:
    """Return where a service is reached: by its listeners, or by its configuration where each worker opens its own."""
    scheme = "https" if cfg.is_ssl else "http"
    names = [listener.getsockname() for listener in listeners] or cfg.address
    return [f"unix:{name}" if isinstance(name, str) else f"{scheme}://{_written(name)}" for name in names]


def _written(address: Any) -> str:
    if not isinstance(address, tuple):
        return str(address)
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


def _is_beside_ipv4(address: Any, addresses: Iterable[Any]) -> bool:
    """Return whether an address is IPv6's for all interfaces, and one of IPv4 has its port: then it leaves IPv4 alone.

    Otherwise it takes IPv4 as well, as the system has it.
    """
    ports = [other[1] for other in addresses if isinstance(other, tuple) and not util.is_ipv6(other[0])]
    is_ipv6 = isinstance(address, tuple) and util.is_ipv6(address[0])
    return is_ipv6 and ipaddress.ip_address(address[0]).is_unspecified and address[1] in ports


def _is_at(listener: Any, address: Any, is_ipv6_only: bool) -> bool:
    """Return whether a listener is what an address asks for."""
    there = listener.cfg_addr if isinstance(listener.cfg_addr, str) else listener.cfg_addr[:2]  # IPv6's has four parts
    if there == address and listener.family == socket.AF_INET6 and ipaddress.ip_address(address[0]).is_unspecified:
        return bool(listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)) == is_ipv6_only
    return bool(there == address)


def _listen(address: Any, cfg: Any, logger: Any, others: Iterable[Any], is_ipv6_only: bool) -> Any:
    """Open a listener. Raises `OSError`, `ValueError`."""
    if isinstance(address, int):
        raise ValueError("a file descriptor is no address")
    if not isinstance(address, tuple):
        return _listen_at_file(address, cfg, logger)
    kind = TCP6Socket if util.is_ipv6(address[0]) else TCPSocket
    with socket.socket(kind.FAMILY) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_ipv6_only:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        with _sharing_port(sock, address[1], others):
            sock.bind(address)
            return kind(address, cfg, logger, fd=os.dup(sock.fileno()))


def _listen_at_file(address: str, cfg: Any, logger: Any) -> Any:
    """Open a unix socket as gunicorn does, but not in the place of one that somebody listens at. Raises `OSError`."""
    if os.path.exists(address) and not stat.S_ISSOCK(os.stat(address).st_mode):
        raise OSError(errno.EEXIST, "there is another file")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)  # or it would wait while the other's queue is full, which is EAGAIN
        if sock.connect_ex(address) in (0, errno.EAGAIN):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    with contextlib.suppress(FileNotFoundError):
        os.remove(address)
    with socket.socket(socket.AF_UNIX) as sock:
        mask = os.umask(cfg.umask)
        try:
            sock.bind(address)
        finally:
            os.umask(mask)
        util.chown(address, cfg.uid, cfg.gid)
        return UnixSocket(address, cfg, logger, fd=os.dup(sock.fileno()))


@contextlib.contextmanager
def _sharing_port(sock: socket.socket, port: int, others: Iterable[Any]) -> Iterator[None]:
    """Let a socket be bound to a port that listeners of ours have.

    One for all interfaces and one for a single one can have the same port only if both say so while they are bound.
    """
    sockets = [other.sock for other in others if isinstance(other, TCPSocket) and other.getsockname()[1] == port]
    sockets += [sock] if sockets else []  # or one of another program that says so too would share it
    try:
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield
    finally:
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)


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

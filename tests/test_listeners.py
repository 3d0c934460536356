"""Addresses, opened as at a start and changed as by HUP, without a server."""

import contextlib
import itertools
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gunicorn.config import Config

from processes.listeners import close, listen_at_all, urls_of
from serving.errors import SettingsError
from tests.lib.servers import find_free_port

ANSWERING = {  # addresses of a port, with the loopback addresses at which they are reached
    ("0.0.0.0",): {"127.0.0.1"},
    ("[::]",): {"127.0.0.1", "::1"},
    ("0.0.0.0", "[::]"): {"127.0.0.1", "::1"},
    ("[0:0::0]", "0.0.0.0"): {"127.0.0.1", "::1"},
    ("127.0.0.1",): {"127.0.0.1"},
    ("[::1]", "127.0.0.1"): {"127.0.0.1", "::1"},
    ("127.0.0.1", "[::]"): {"127.0.0.1", "::1"},
    ("127.0.0.1", "0.0.0.0"): {"127.0.0.1"},
    ("[::1]",): {"::1"},
}


def listen(addresses: list[str], there: list[Any] | None = None) -> list[Any]:
    config = Config()
    config.set("bind", addresses)
    return listen_at_all(config, logging.getLogger("test"), "mine.toml: server.bind", there or [])


@contextlib.contextmanager
def closing(listeners: list[Any]) -> Iterator[list[Any]]:
    try:
        yield listeners
    finally:
        close(listeners)


def reached_at(port: int) -> set[str]:
    """Return the loopback addresses at which somebody listens."""
    reached = set()
    for host in ("127.0.0.1", "::1"):
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection((host, port), timeout=5).close()
            reached.add(host)
    return reached


@pytest.mark.parametrize(
    ("before", "after"), [*itertools.product(ANSWERING, repeat=2)], ids=lambda hosts: "+".join(hosts)
)
def test_any_addresses_follow_any_others(free_port: int, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    """A service comes from each set of addresses to each other one by HUP, and can be started with either."""
    first = listen([f"{host}:{free_port}" for host in before])
    assert reached_at(free_port) == ANSWERING[before]
    with closing(listen([f"{host}:{free_port}" for host in after], first)) as second:
        close([listener for listener in first if listener not in second])
        assert reached_at(free_port) == ANSWERING[after]


def test_what_stays_is_not_opened_anew(free_port: int) -> None:
    """A listener whose address stays is the same object; one that shall leave IPv4 alone from now on is another."""
    hosts = [f"127.0.0.1:{free_port}", f"[::1]:{free_port}"]
    with closing(listen(hosts)) as first:
        assert listen(hosts[::-1], first) == first[::-1]
    wildcards = [f"[::]:{free_port}", f"0.0.0.0:{free_port}"]
    with closing(listen(wildcards[:1])) as (whole,), closing(listen(wildcards, [whole])) as both:
        assert whole not in both


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which another program listens that would share it."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        port = find_free_port()
        sock.bind(("127.0.0.1", port))
        sock.listen()
        yield port


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Path]:
    """A unix socket of another program, which accepts nothing, and whose queue is full."""
    place = tmp_path / "busy"
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(socket.socket(socket.AF_UNIX))
        other.bind(str(place))
        other.listen(0)
        status = 0
        while status == 0:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            status = client.connect_ex(str(place))
        yield place


def test_address_that_cannot_be_listened_at_is_one_line(tmp_path: Path, taken: int, busy: Path, free_port: int) -> None:
    """The line has the place, the address and the reason; what was opened before it is closed again."""
    (tmp_path / "file").write_text("")
    reasons = {
        f"127.0.0.1:{taken}": "Address already in use",
        "[2001:db8::1]:0": "Cannot assign requested address",
        f"{'x' * 64}:80": "",  # in the words of the system, which asks no resolver: no label has 64 letters
        f"0.0.0.0:{free_port}": "it is in the list already",
        f"unix:{tmp_path}/none/x.sock": "No such file or directory",
        f"unix:{tmp_path}/file": "there is another file",
        f"unix:{tmp_path}/taken": "Address already in use",
        f"unix:{busy}": "Address already in use",
        f"unix:{tmp_path}/{'x' * 200}": "AF_UNIX path too long",
        "fd://0": "a file descriptor is no address",
    }
    for address, reason in reasons.items():
        with closing(listen([f"unix:{tmp_path}/taken"])), pytest.raises(SettingsError) as caught:
            listen([f"0.0.0.0:{free_port}", f"unix:{tmp_path}/opened", address])
        shown = address.removeprefix("unix:").removeprefix("fd://")
        assert str(caught.value).startswith(f"mine.toml: server.bind: cannot listen at {shown!r}: {reason}")
        assert str(caught.value).endswith("; choose another server.bind")
        assert str(caught.value).count("\n") == 0
        assert (reached_at(free_port), (tmp_path / "opened").exists()) == (set(), False)


def test_file_of_a_dead_service_gives_way(tmp_path: Path) -> None:
    """A unix socket's file at which nobody listens any more, as a kill leaves it, is replaced."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{tmp_path}/x.sock")
    with closing(listen([f"unix:{tmp_path}/x.sock"])), socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/x.sock")
    assert [*tmp_path.iterdir()] == []


def test_addresses_are_told_as_clients_need_them(tmp_path: Path) -> None:
    """IPv6 in brackets, the scheme that is served, and a port that the system chose; of workers' own listeners too."""
    config = Config()
    config.set("bind", ["127.0.0.1:0", "[::1]:0", f"unix:{tmp_path}/x.sock"])
    with closing(listen_at_all(config, logging.getLogger("test"), "mine.toml: server.bind")) as listeners:
        ports = [listener.getsockname()[1] for listener in listeners[:2]]
        at = [f"127.0.0.1:{ports[0]}", f"[::1]:{ports[1]}"]
        assert urls_of(listeners, config) == [*(f"http://{place}" for place in at), f"unix:{tmp_path}/x.sock"]
        config.set("certfile", "both.pem")
        assert urls_of(listeners, config) == [*(f"https://{place}" for place in at), f"unix:{tmp_path}/x.sock"]
    config.set("reuse_port", True)
    assert urls_of([], config) == ["https://127.0.0.1:0", "https://[::1]:0", f"unix:{tmp_path}/x.sock"]

"""Clients that send one request after the other, and count what comes of each."""

import contextlib
import itertools
import re
import socket
import threading
import time
from collections import Counter, defaultdict
from typing import Any, Self

from tests.lib.cases import Case
from tests.lib.servers import Server, wait_until
from tests.lib.sizes import scale

TIMEOUT_S = 20.0
HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r]*\r\n(?:.*\r\n)?content-length: (\d+)\r\n", re.IGNORECASE | re.DOTALL)
CLOSES = re.compile(rb"\r\nconnection: close\r\n", re.IGNORECASE)


def pause_s() -> float:
    """Return how long a client waits between two requests where a test is about losses, and not about speed."""
    return scale(0.01, 0.0)


class Load:
    """So many clients, from `with` to its end. With `keep_alive` each goes on as long as answers let it.

    A failure is all that is no whole answer: a reset, an end without one, a time-out. A connection that is refused is
    one too, unless `until_refused`: then it is the client's end, as the service's end is announced.
    """

    def __init__(
        self,
        server: Server,
        case: Case,
        clients: int = 16,
        keep_alive: bool = True,
        until_refused: bool = False,
        pause_s: float = 0.0,
    ) -> None:
        self.port, self.until_refused, self.keep_alive = server.port, until_refused, keep_alive
        self.raw = case.raw()
        if not keep_alive:
            self.raw = self.raw.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        self.answers: Counter[int] = Counter()
        self.failures: list[str] = []
        self.took_by_status: dict[int, list[float]] = defaultdict(list)
        self.pause_s = pause_s
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    @property
    def took_s(self) -> list[float]:
        return [*itertools.chain(*self.took_by_status.values())]

    @property
    def count(self) -> int:
        return self.answers.total() + len(self.failures)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(2 * TIMEOUT_S)

    def wait_for(self, more: int) -> None:
        """Wait until so many more requests have got what they get, as long as some do: a busy machine takes longer."""
        goal = self.count + more
        had = self.count

        def has_more() -> bool:
            return self.count > had or self.is_over

        while had < goal and not self.is_over:
            wait_until(has_more, f"request {had + 1} of {goal}")
            had = self.count

    @property
    def is_over(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        client: socket.socket | None = None
        while not self._ending.is_set():
            started = time.perf_counter()
            try:
                client = client or self._connect()
                client.sendall(self.raw)
                status, closes = read_status(client)
            except ConnectionRefusedError as error:
                if self.until_refused:
                    return
                self.failures.append(repr(error))
            except OSError as error:
                self.failures.append(f"{error!r} after {time.perf_counter() - started:.3f} s")
                self._close(client)
                client = None
            else:
                self.answers[status] += 1
                self.took_by_status[status].append(time.perf_counter() - started)
                if closes:
                    self._close(client)
                    client = None
            if self.pause_s:
                self._ending.wait(self.pause_s)
        self._close(client)

    def _connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client

    def _close(self, client: socket.socket | None) -> None:
        with contextlib.suppress(OSError):
            if client is not None:
                client.close()


def keeping_and_closing(server: Server, case: Case, **options: Any) -> tuple[Load, Load]:
    """Return clients that keep their connections, and as many that close them after each answer."""
    return Load(server, case, **options), Load(server, case, keep_alive=False, **options)


def read_status(client: socket.socket) -> tuple[int, bool]:
    """Return the status of a whole answer with a Content-Length, and whether it ends the connection.

    It costs less than http.client's reading, so that a load leaves the processor to the server. Raises OSError if the
    answer is cut short or longer than it says.
    """
    answer = client.recv(65_536)
    while (end := answer.find(b"\r\n\r\n")) < 0:
        answer += _receive(client, answer)
    head = HEAD.match(answer, 0, end + 2)
    if head is None:
        raise OSError(f"no answer of HTTP/1.1 with a length: {answer[:100]!r}")
    size = end + 4 + int(head[2])
    while len(answer) < size:
        answer += _receive(client, answer)
    if len(answer) > size:
        raise OSError(f"{len(answer) - size} bytes after the answer: {answer[size:][:100]!r}")
    return int(head[1]), CLOSES.search(answer, 0, end + 4) is not None


def _receive(client: socket.socket, answer: bytes) -> bytes:
    if more := client.recv(65_536):
        return more
    raise ConnectionResetError(f"the connection ended after {len(answer)} bytes of an answer")

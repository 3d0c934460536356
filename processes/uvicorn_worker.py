"""uvicorn's worker with gunicorn's time-outs, which it does not pass on by itself, and a drain at its end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
import sys
import time
from typing import Any, ClassVar

import uvicorn_worker
from gunicorn.arbiter import Arbiter
from uvicorn.server import Server

from processes.uvicorn_protocol import Connections, Protocol
from processes.worker import ACCEPTS_PER_S, MAX_ACCEPTS, POLL_S, TICK_S, SupervisedWorker


class DrainingServer(Server):
    """uvicorn's server, which ends without a reset."""

    def __init__(self, worker: UvicornWorker) -> None:
        super().__init__(worker.config)
        self.worker = worker
        self.connecting: set[asyncio.Task[None]] = set()
        settings, loop = worker.service.settings, asyncio.get_running_loop()
        self.shared = Connections(worker.cfg, settings, loop, self.accept_more)
        self.config.http = functools.partial(Protocol, self.shared)  # type: ignore[assignment]

    async def startup(self, sockets: Any = None) -> None:
        self.sockets = sockets
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """End by a drain. Ctrl-C at a terminal is left to the master, as `hooks.post_worker_init` has it until uvicorn
        puts its own handler there."""
        if sig != signal.SIGINT:
            super().handle_exit(sig, frame)

    def accept_more(self, since: float) -> None:
        """Accept as many as a loop would have that is not busy.

        Uvloop accepts one in each turn, and with a thousand busy connections a turn is long.
        """
        count = min(MAX_ACCEPTS, int((time.monotonic() - since) * ACCEPTS_PER_S))
        for sock in self.sockets:
            with contextlib.suppress(OSError):  # none waits, or the listener is closed
                for _ in range(count):
                    client, _ = sock.accept()
                    task = asyncio.create_task(self.connect(client))
                    self.connecting.add(task)
                    task.add_done_callback(self.connecting.discard)

    async def connect(self, client: socket.socket) -> None:
        make = functools.partial(
            Protocol, self.shared, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        client.setblocking(False)
        with contextlib.suppress(OSError):  # no TLS, or the client has left
            await self.shared.loop.connect_accepted_socket(make, client, ssl=self.config.ssl)

    async def on_tick(self, counter: int) -> bool:
        self.worker.notify()
        return await super().on_tick(counter) or self.worker.must_end()

    async def shutdown(self, sockets: Any = None) -> None:
        """End without a reset: what is under way is answered, with `Connection: close`, and so is what comes on
        open connections for a moment, before those that are idle are closed."""
        end, moment_s = self.worker.begin_drain()
        signs_of_life = asyncio.create_task(self._give_signs_of_life())
        self.shared.are_draining = True
        connections: Any = self.server_state.connections
        for connection in connections:
            connection.drain()
        for wait_s in self.worker.close_listeners(self.servers, moment_s):
            await asyncio.sleep(wait_s)
        idle_end = time.monotonic() + moment_s
        is_tls = self.config.is_ssl  # of which uvicorn learns only when the handshake is over
        while (connections or is_tls) and time.monotonic() < min(idle_end, end):  # noqa: ASYNC110 — no event
            await asyncio.sleep(POLL_S)
        for connection in [*connections] if is_tls else ():
            connection.end_tls(end - time.monotonic())
        self.config.timeout_graceful_shutdown = max(POLL_S, end - time.monotonic())  # type: ignore[assignment]
        await super().shutdown()
        signs_of_life.cancel()

    async def _give_signs_of_life(self) -> None:
        while True:
            self.worker.notify()
            await asyncio.sleep(TICK_S)


class UvicornWorker(SupervisedWorker, uvicorn_worker.UvicornWorker):
    """Runs an ASGI app."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        "loop": "uvloop",
        "http": "httptools",  # until there is a loop: see `DrainingServer`
        "ws": "none",
        "server_header": False,  # nobody's business
        "callback_notify": None,  # more than a second may pass between its calls
    }

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        server = DrainingServer(self)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGQUIT, server.handle_exit, signal.SIGTERM, None)
        await server.serve(sockets=[listener.sock for listener in self.sockets])
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

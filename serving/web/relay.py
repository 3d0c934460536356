"""A stream behind WSGI that an event loop answers: a2wsgi would need all of its body first, and all of its answer."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from typing import Any

from serving.errors import ServingError
from serving.web.asgi import ASGIEndpoint
from serving.web.messages import Request, Response
from serving.web.wsgi import run_now


class Relay:
    """Carries a body to the loop, and the answer back, piece by piece, in the thread of the request.

    It is what a WSGI server iterates over and closes.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, endpoint: ASGIEndpoint, request: Request) -> None:
        self._loop, self._endpoint, self._request = loop, endpoint, request
        self._read, request.read_some = request.read_some or request.read, self._ask_for_piece
        request.read = self._ask_for_piece
        # What the loop wants of this thread: to read bytes, to begin the answer, to send a piece, or None to end.
        self._wishes: queue.SimpleQueue[tuple[Any, asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._sending: asyncio.Future[Any] | None = None  # done as soon as the last piece is sent

    def answer(self, start_response: Any) -> Relay:
        """Begin, and return what gives the pieces of the answer."""
        self._start_response = start_response
        self._answering = asyncio.run_coroutine_threadsafe(self._respond(), self._loop)
        return self

    def __iter__(self) -> Relay:
        return self

    def __next__(self) -> bytes:
        if self._sending is not None:
            self._fulfil(self._sending, None)
            self._sending = None
        while (wish := self._wishes.get()) is not None:
            wanted, done = wish
            if isinstance(wanted, bytes):
                self._sending = done
                return wanted
            if isinstance(wanted, Response):
                self._start_response(wanted.status_line, wanted.headers)
                self._fulfil(done, None)
            else:
                self._fulfil(done, self._read_now(wanted))
        self._answering.result()
        raise StopIteration

    def close(self) -> None:
        """End it, whether all was sent or not."""
        self._answering.cancel()

    def _read_now(self, size: int) -> bytes | ServingError:
        try:
            return run_now(self._read(size))
        except ServingError as error:
            return error

    def _fulfil(self, done: asyncio.Future[Any], result: Any) -> None:
        def finish() -> None:
            if not done.done():
                done.set_result(result)

        self._loop.call_soon_threadsafe(finish)

    # In the loop

    async def _respond(self) -> None:
        try:
            self._request.batcher = self._endpoint.batcher
            response = await self._endpoint.service.respond(self._request)
            rest = response.rest
            async with contextlib.nullcontext() if rest is None else contextlib.aclosing(rest):
                await self._wish(response)
                for piece in response.pieces:
                    await self._wish(piece)
                if rest is not None:
                    async for piece in rest:
                        await self._wish(piece)
        finally:
            self._wishes.put(None)

    async def _wish(self, wanted: Response | bytes | int) -> Any:
        done = self._loop.create_future()
        self._wishes.put((wanted, done))
        return await done

    async def _ask_for_piece(self, size: int) -> bytes:
        read: bytes | ServingError = await self._wish(size)
        if isinstance(read, ServingError):
            raise read
        return read

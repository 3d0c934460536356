"""The service behind ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import string
import urllib.parse
from typing import Any

from serving.errors import BodyCutShort, Unauthorized
from serving.predictor.batcher import LoopBatcher
from serving.web.messages import LINGER_S, Request, Response, Rest
from serving.web.prefix import below
from serving.web.service import VISIT, Service, Visit

# In a scope: the error by which a body ended before its end, and what tells whether the client has left.
CUT_SHORT, CLIENT_HAS_LEFT = "serving.cut_short", "serving.client_has_left"
MUST_BE_WHOLE = "serving.must_be_whole"  # in a scope: what is behind it collects the answer
TIME_PIECE = "serving.time_piece"  # in a scope: what is told whether the next piece of the body has to come in time


async def receive_unless_cut(scope: Any, receive: Any) -> Any:
    """Report a truncated body to the app as a disconnect. The client may still be reading, so it can be answered."""
    message = await receive()
    return {"type": "http.disconnect"} if CUT_SHORT in scope else message


class ASGIEndpoint:
    """The service as an ASGI endpoint; a class, because Starlette would wrap a function."""

    def __init__(self, service: Service[Any]) -> None:
        self.service = service
        self._batcher: LoopBatcher | None = None

    @property
    def batcher(self) -> LoopBatcher:
        """The batcher of the running loop; in tests an app may see several, one after the other."""
        loop, batcher = asyncio.get_running_loop(), self._batcher
        if batcher is None or batcher.loop is not loop:
            batcher = self._batcher = LoopBatcher(self.service.queue, loop)
        return batcher

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = asgi_request(scope, receive, self.batcher)
        await self.respond(request, receive, send, visit=scope.get(VISIT))

    async def respond(
        self,
        request: Request,
        receive: Any,
        send: Any,
        refused: Unauthorized | None = None,
        visit: Visit | None = None,
    ) -> None:
        response = await self.service.respond(request, refused, visit)
        *pieces, last = [b""] if request.method == "HEAD" else response.pieces
        if response.rest is not None:
            await self._send_all(response, response.rest, send)
            last = b""
        else:
            await send(response.start_message)
            for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        if response.lingers:
            await send({"type": "http.response.body", "body": last, "more_body": True})
            await linger(receive)
            last = b""
        await send({"type": "http.response.body", "body": last})

    async def _send_all(self, response: Response, rest: Rest, send: Any) -> None:
        """Send all of an answer that is made while it is sent, but its end."""
        async with contextlib.aclosing(rest):
            await send(response.start_message)
            for piece in response.pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            async for piece in rest:
                await send({"type": "http.response.body", "body": piece, "more_body": True})


def asgi_request(scope: Any, receive: Any, batcher: LoopBatcher) -> Request:
    """Make a `Request` of an ASGI scope."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    if len(headers) < len(scope["headers"]):
        values: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            values.setdefault(name, []).append(value)
        headers = {name: b",".join(several) for name, several in values.items()}

    def header(name: str) -> str | None:
        value = headers.get(name.encode())
        return value.strip(b" \t").decode("latin-1") if value else None

    more, is_cut = True, False

    async def read(size: int) -> bytes:
        nonlocal more, is_cut
        piece = b""
        while more and size and not piece:
            message: dict[str, Any] = {"type": "http.disconnect"} if is_cut else await receive()
            piece = message.get("body", b"")
            is_cut = CUT_SHORT in scope or message["type"] == "http.disconnect"
            if is_cut and not piece:  # what came before the cut is read first
                raise scope.get(CUT_SHORT, BodyCutShort)()
            more = is_cut or message.get("more_body", False)
        return piece

    path, root_path = scope["path"], scope.get("root_path", "")
    if root_path:
        path, root_path = below(path, root_path), root_path.rstrip("/")
    query = urllib.parse.quote(scope["query_string"], safe=string.punctuation) if scope["query_string"] else ""
    may_stream = scope.get("http_version") != "1.0" and not scope.get(MUST_BE_WHOLE)
    time_piece, client_has_left = scope.get(TIME_PIECE), scope.get(CLIENT_HAS_LEFT)
    method = scope["method"]
    return Request(method, path, query, header, read, batcher, client_has_left, time_piece, may_stream, root_path)


async def linger(receive: Any) -> None:
    """Discard what the client still sends, for a moment: closing on unread bytes would reset the connection, and the
    client might lose the answer (RFC 9112, section 9.6)."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            message = await receive()
            while message.get("more_body"):
                message = await receive()

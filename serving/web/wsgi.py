"""The service behind WSGI, where whatever is awaited blocks instead."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from serving.errors import BodyCutShort, Unauthorized
from serving.predictor.batcher import ThreadBatcher
from serving.web.messages import Request, Response, Rest
from serving.web.service import Service, Visit

T = TypeVar("T")


class WSGIEndpoint:
    """The service as what answers a WSGI app's requests."""

    def __init__(self, service: Service[Any]) -> None:
        self.service = service
        self.batcher = ThreadBatcher(service.queue)

    def respond(
        self,
        request: Request,
        start_response: Any,
        refused: Unauthorized | None = None,
        visit: Visit | None = None,
    ) -> Iterable[bytes]:
        response = run_now(self.service.respond(request, refused, visit))
        start_response(response.status_line, response.headers)
        return [] if request.method == "HEAD" else pieces_of(response)


def pieces_of(response: Response) -> Iterable[bytes]:
    """Return the body of an answer, to be sent piece by piece."""
    return response.pieces if response.rest is None else Pieces(response.pieces, response.rest)


class Pieces:
    """The pieces of an answer, of which the last ones are made when they are asked for. The server closes it."""

    def __init__(self, pieces: Iterable[bytes], rest: Rest) -> None:
        self._pieces, self._rest = iter(pieces), rest

    def __iter__(self) -> Pieces:
        return self

    def __next__(self) -> bytes:
        for piece in self._pieces:
            return piece
        try:
            return run_now(anext(self._rest))
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        """End it, whether all was sent or not."""
        run_now(self._rest.aclose())


def wsgi_request(environ: dict[str, Any], batcher: ThreadBatcher) -> Request:
    """Make a `Request` of a WSGI environ."""

    def header(name: str) -> str | None:
        key = name.upper().replace("-", "_")
        return environ.get(key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}") or None

    stream = environ["wsgi.input"]
    has_end = environ.get("wsgi.input_terminated") or "CONTENT_LENGTH" in environ

    async def read(size: int) -> bytes:
        return _read(stream.read, size) if has_end else b""

    async def read_some(size: int) -> bytes:
        return _read(getattr(stream, "read1", stream.read), size) if has_end else b""

    path, root_path = environ["PATH_INFO"] or "/", environ.get("SCRIPT_NAME", "")
    if root_path:
        root_path = root_path.encode("latin-1").decode(errors="replace").rstrip("/")
    path = path.encode("latin-1").decode(errors="replace")
    method, query = environ["REQUEST_METHOD"], environ.get("QUERY_STRING", "")
    may_stream = environ.get("SERVER_PROTOCOL") != "HTTP/1.0"
    time_piece, has_left = getattr(stream, "time_piece", None), find_client_has_left(environ)
    return Request(method, path, query, header, read, batcher, has_left, time_piece, may_stream, root_path, read_some)


def _read(read: Callable[[int], bytes], size: int) -> bytes:
    try:
        return read(size)
    except _stream_errors():
        raise BodyCutShort from None


def find_client_has_left(environ: dict[str, Any]) -> Callable[[], bool] | None:
    """Return what tells whether the client has left, where our worker's socket can."""
    return getattr(environ.get("gunicorn.socket"), "has_left", None)


def _stream_errors() -> tuple[type[Exception], ...]:
    """Return what a server's stream raises for a body that is cut short or malformed."""
    gunicorn = sys.modules.get("gunicorn.http.errors")
    return (OSError, gunicorn.ParseException) if gunicorn else (OSError,)


def run_now(awaited: Awaitable[T]) -> T:
    """Return the result of what never waits: under WSGI, what it awaits blocks instead."""
    coroutine: Any = awaited
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise RuntimeError("a coroutine waited where nothing can wake it")

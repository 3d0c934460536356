"""The service behind WSGI, where whatever is awaited blocks instead."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from serving.errors import BodyCutShort, Unauthorized
from serving.predictor.batcher import ThreadBatcher
from serving.web.messages import Request
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
    ) -> list[bytes]:
        response = run_now(self.service.respond(request, refused, visit))
        start_response(response.status_line, response.headers)
        return [] if request.method == "HEAD" else response.pieces


def wsgi_request(environ: dict[str, Any], batcher: ThreadBatcher) -> Request:
    """Make a `Request` of a WSGI environ."""

    def header(name: str) -> str | None:
        key = name.upper().replace("-", "_")
        return environ.get(key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}") or None

    stream = environ["wsgi.input"]
    has_end = environ.get("wsgi.input_terminated") or "CONTENT_LENGTH" in environ

    async def read(size: int) -> bytes:
        try:
            return stream.read(size) if has_end else b""
        except _stream_errors():
            raise BodyCutShort from None

    path, root_path = environ["PATH_INFO"] or "/", environ.get("SCRIPT_NAME", "")
    if root_path:
        root_path = root_path.encode("latin-1").decode(errors="replace").rstrip("/")
    path = path.encode("latin-1").decode(errors="replace")
    query, has_left = environ.get("QUERY_STRING", ""), find_client_has_left(environ)
    return Request(environ["REQUEST_METHOD"], path, query, header, read, batcher, has_left, root_path=root_path)


def find_client_has_left(environ: dict[str, Any]) -> Callable[[], bool] | None:
    """Return what tells whether the client has left, where our worker's socket can."""
    return getattr(environ.get("gunicorn.socket"), "has_left", None)


def _stream_errors() -> tuple[type[Exception], ...]:
    """Return what a server's stream raises for a body that is cut short or malformed."""
    gunicorn = sys.modules.get("gunicorn.http.errors")
    return (OSError, gunicorn.ParseException) if gunicorn else (OSError,)


def run_now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits: under WSGI, what it awaits blocks instead."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    coroutine.close()
    raise RuntimeError("a coroutine waited where nothing can wake it")

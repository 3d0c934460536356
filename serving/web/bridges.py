"""Flask behind ASGI, and FastAPI behind WSGI.

a2wsgi carries a framework over to the other interface. Left to itself it loses chunked bodies, spins on a body that is
cut short, abandons the task of a client that left, and runs no lifespan. So the body is read in front of it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import io
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import structlog

from serving.errors import InternalError, ServingError, Unauthorized
from serving.web.added import AddedToFastAPI, AddedToFlask
from serving.web.asgi import CLIENT_HAS_LEFT, MUST_BE_WHOLE, ASGIEndpoint, asgi_request, linger
from serving.web.messages import Request, make_request_id, write_detail
from serving.web.prefix import below, put_environ_below, put_scope_below
from serving.web.relay import Relay
from serving.web.service import Service
from serving.web.wsgi import WSGIEndpoint, find_client_has_left, run_now, wsgi_request

if TYPE_CHECKING:
    import fastapi
    import flask

log = structlog.get_logger()


@dataclass(frozen=True)
class Binding:
    """A service behind a framework's app.

    An app that `is_bare` has nothing of a user's that could read a body. `answers_alone` tells of a path and a method
    whether the service may answer alone: the framework has nothing to do for it.
    """

    service: Service[Any]
    is_bare: Callable[[], bool]
    added: AddedToFlask | AddedToFastAPI
    answers_alone: Callable[[str, str], bool]

    def lacks_key(self, request: Request) -> bool:
        """Return whether a request with a body is refused for want of a key, so that the body is not to be read."""
        if not request.announces_body:
            return False
        as_ours = isinstance(self.service.judge_head(request), Unauthorized)
        as_added = self.service.refusal(request) is not None
        return (as_ours or as_added) and (as_added if self.added.has(request) else as_ours)


def as_asgi(app: Any) -> Any:
    """Return the app that `create_app` built as an ASGI app."""
    return FlaskOverASGI(app) if hasattr(app, "wsgi_app") else app


def as_wsgi(app: Any) -> Any:
    """Return the app that `create_app` built as a WSGI app."""
    return app if hasattr(app, "wsgi_app") else FastAPIOverWSGI(app)


def send_and_close(receive: Any, send: Any) -> Any:
    """Return a `send` with whose answer the connection ends, since a body that was announced was not read."""

    async def send_last(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
        elif not message.get("more_body"):
            await send({**message, "more_body": True})
            await linger(receive)
            message = {"type": "http.response.body", "body": b""}
        await send(message)

    return send_last


def start_and_close(start_response: Any) -> Any:
    """Return a `start_response` with whose answer the connection ends, as `send_and_close` does."""

    def start_last(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        return start_response(status, [*headers, ("Connection", "close")], exc_info)

    return start_last


class FlaskOverASGI:
    """A Flask app behind ASGI: it runs in a2wsgi's threads, of which waiting predictions would leave none for health;
    so what needs no Flask is answered in the loop."""

    def __init__(self, app: flask.Flask) -> None:
        from a2wsgi import WSGIMiddleware

        self.binding: Binding = app.extensions["serving"]
        self.service = self.binding.service
        self.endpoint = ASGIEndpoint(self.service)
        self.bridge: Any = WSGIMiddleware(app)  # type: ignore[arg-type]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.bridge(scope, receive, send)
            return
        if self.service.root_path:
            put_scope_below(scope, self.service.root_path)
        request = asgi_request(scope, receive, self.endpoint.batcher)
        if self.binding.answers_alone(request.path, request.method) or self.service.is_preflight(request):
            await self.endpoint.respond(request, receive, send)
            return
        if self.binding.lacks_key(request):
            request.body, send = b"", send_and_close(receive, send)
        body = await request.read_body(self.service.settings.limits.max_body_bytes, keeps=not self.binding.is_bare())
        if isinstance(body, ServingError):
            await self.endpoint.respond(request, receive, send)
            return
        # As gunicorn does it: white space ends with the field; names with "_", which WSGI takes for "-", are left out.
        framing = (b"content-length", b"transfer-encoding")
        kept = [pair for pair in scope["headers"] if pair[0] not in framing and b"_" not in pair[0]]
        headers = [(name, value.strip(b" \t")) for name, value in kept]
        headers.append((b"content-length", b"%d" % len(body)))

        async def receive_body() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        # a2wsgi would cut a root path off whatever begins with its letters.
        root_path = scope.get("root_path", "") if request.path != scope["path"] else ""
        changed = {"headers": headers, "query_string": request.query.encode(), "root_path": root_path}
        await self.bridge({**scope, **changed}, receive_body, send)


class FastAPIOverWSGI:
    """A FastAPI app behind WSGI: it runs in one event loop, in a thread that starts with the first request.

    Nothing starts before that, for a thread does not live on in the workers forked from its process. `start` is for
    a server that wants the app's start-up events before the first request, `stop` for one that says when it ends.
    """

    def __init__(self, app: fastapi.FastAPI) -> None:
        self.app = app
        self.binding: Binding = app.state.serving
        self.service = self.binding.service
        self._bridge: Any = None
        self._end: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._endpoint = WSGIEndpoint(self.service)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        self.start()
        if self.service.root_path:
            put_environ_below(environ, self.service.root_path)
        request = wsgi_request(environ, self._endpoint.batcher)
        if self.service.streams(request) and self.binding.answers_alone(request.path, request.method):
            return Relay(self._loop, cast(ASGIEndpoint, self.binding.added.endpoint), request).answer(start_response)
        if self.binding.lacks_key(request):
            request.body, start_response = b"", start_and_close(start_response)
        keeps = not self.binding.is_bare() or self.service.takes_body(request)
        body = run_now(request.read_body(self.service.settings.limits.max_body_bytes, keeps))
        if isinstance(body, ServingError):
            return self._endpoint.respond(request, start_response)
        changed = {
            "PATH_INFO": request.path.encode().decode("latin-1"),
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": io.BytesIO(body),
        }
        environ = {key: value for key, value in environ.items() if key != "HTTP_TRANSFER_ENCODING"} | changed
        return list(self._bridge(environ, start_response))  # whole, or a client that leaves would strand its task

    def start(self) -> None:
        """Start the loop and run the app's start-up events, once. Raises what they raise."""
        with self._lock:
            if self._bridge is None:
                self._bridge = self._start()

    def stop(self) -> None:
        """Run the app's shut-down events, once. Raises what they raise."""
        with self._lock:
            end, self._end = self._end, lambda: None
        end()

    def _start(self) -> Any:
        from a2wsgi import ASGIMiddleware

        self._loop = loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="asgi", daemon=True).start()
        started: concurrent.futures.Future[Any] = concurrent.futures.Future()
        stopping = asyncio.Event()
        lifespan: concurrent.futures.Future[Any] = asyncio.run_coroutine_threadsafe(self._live(started, stopping), loop)
        concurrent.futures.wait([started, lifespan], return_when=concurrent.futures.FIRST_COMPLETED)
        if lifespan.done():
            lifespan.result()

        def end() -> None:
            loop.call_soon_threadsafe(stopping.set)
            lifespan.result()

        self._end = end
        # Where the server does not call it. Not by `atexit`, which comes after `concurrent.futures.thread` has ended
        # its threads in the same way as here: an event could not use them.
        threading._register_atexit(self.stop)  # type: ignore[attr-defined]
        return ASGIMiddleware(functools.partial(self._asgi, started.result()), loop=loop)

    async def _live(self, started: concurrent.futures.Future[Any], stopping: asyncio.Event) -> None:
        async with self.app.router.lifespan_context(self.app) as state:
            started.set_result(state or {})
            await stopping.wait()

    async def _asgi(self, state: Mapping[str, Any], scope: Any, receive: Any, send: Any) -> None:
        """Run the app, and see to it that an answer comes: without one a2wsgi would wait for ever."""
        last: dict[str, Any] = {}
        request_id = make_request_id()

        async def note(message: Any) -> None:
            nonlocal last
            last = message
            await send(message)

        try:
            has_left = find_client_has_left(scope["wsgi_environ"])
            await self.app(
                {**scope, "state": dict(state), CLIENT_HAS_LEFT: has_left, MUST_BE_WHOLE: True}, receive, note
            )
        except BaseException:  # of a route that a user added; SystemExit would end the loop
            path = below(scope["path"], scope["root_path"])
            log.exception("request_failed", method=scope["method"], path=path, request_id=request_id)
        if not last:
            response = write_detail(InternalError("internal error"))
            response.request_id = request_id
            await send(response.start_message)
            await send({"type": "http.response.body", "body": b"".join(response.pieces)})
        elif last["type"] == "http.response.start" or last.get("more_body"):
            raise RuntimeError("the answer ended early")

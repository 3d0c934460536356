"""What a user adds to a framework's app: it needs a key as the service does, gets our request id, and is logged.

The two classes have the same verbs: `answers` tells of a request that the framework has looked at whether it goes to
what a user has added, and `has` tells it before; `paths` are those to suggest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from serving.errors import Unauthorized
from serving.web.asgi import ASGIEndpoint, asgi_request
from serving.web.messages import Request
from serving.web.prefix import put_environ_below
from serving.web.service import VISIT, Visit
from serving.web.wsgi import WSGIEndpoint, wsgi_request

if TYPE_CHECKING:
    import fastapi
    import flask

POLICY_VIOLATION = 1008  # code of a WebSocket's end (RFC 6455, section 7.4.1)


class AddedToFlask:
    """The rules and mounted apps of a Flask that are not the service's."""

    def __init__(self, app: flask.Flask, endpoint: WSGIEndpoint, view: Any) -> None:
        self.app, self.endpoint, self.service = app, endpoint, endpoint.service
        self.view = view  # of the service's own rules
        self.first = app.wsgi_app  # what is called first, unless a user puts something around it

    def call(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Answer as Flask does, but a browser's question for leave first, and what a user has put around it only with a
        key."""
        if self.service.root_path:
            put_environ_below(environ, self.service.root_path)
        if self.service.cors is not None and environ["REQUEST_METHOD"] == "OPTIONS":
            request = wsgi_request(environ, self.endpoint.batcher)
            if self.service.is_preflight(request):
                return self.endpoint.respond(request, start_response)
        if self.app.wsgi_app is self.first:
            return self.first(environ, start_response)
        request = wsgi_request(environ, self.endpoint.batcher)
        if refused := self.refusal_in_front(request, environ["PATH_INFO"]):
            return self.endpoint.respond(request, start_response, refused)
        return visit_wsgi(Visit(self.service, request), self.app.wsgi_app, environ, start_response)

    def refusal_in_front(self, request: Request, path_info: str) -> Unauthorized | None:
        """Return why a request does not get to what a user has put around Flask, if it does not.

        Nobody can tell what that does with a path, so each path needs a key in front of it, but open ones.
        """
        goes_to_flask = self._goes_to_flask(path_info)
        if goes_to_flask or (goes_to_flask is None and request.method == "OPTIONS" and self._has_rule(request.path)):
            return None
        return self.service.refusal(request, may_be_ours=goes_to_flask is None)

    def _goes_to_flask(self, path_info: str) -> bool | None:
        """Return whether a path goes to Flask or to an app that is mounted beside it, or None if nobody can tell.

        It can be told where nothing stands around Flask but werkzeug's `DispatcherMiddleware`.
        """
        from werkzeug.middleware.dispatcher import DispatcherMiddleware

        around: Any = self.app.wsgi_app
        while type(around) is DispatcherMiddleware:
            if any(f"{path_info}/".startswith(f"{mount}/") for mount in around.mounts):
                return False
            around = around.app
        return True if around is self.first else None

    def _has_rule(self, path: str) -> bool:
        """Return whether a path is the service's, or one for which Flask has a rule of any method."""
        from werkzeug.exceptions import HTTPException

        try:
            self.app.url_map.bind("localhost").match(path, "OPTIONS")
        except HTTPException as error:
            return path == "*" or error.code == 405
        return True

    def refusal(self, request: flask.Request) -> Unauthorized | None:
        """Return why a request that Flask has looked at does not get to a rule of the user's, if it does not."""
        refused = self.service.refusal(wsgi_request(request.environ, self.endpoint.batcher))
        return refused if refused and self.answers(request) else None

    def has(self, request: Request) -> bool:
        """Return whether a request goes to a route of the user's, before Flask has looked at it."""
        goes_to_flask = self._goes_to_flask(request.path.encode().decode("latin-1"))
        if not goes_to_flask:
            return goes_to_flask is False or request.path not in self.service.routes
        from werkzeug.exceptions import HTTPException

        try:
            rule, _ = self.app.url_map.bind("localhost").match(request.path, request.method, return_rule=True)
        except HTTPException as error:
            return self._is_refused_by(error, request.path)
        return self.app.view_functions.get(rule.endpoint) is not self.view

    def answers(self, request: flask.Request) -> bool:
        """Return whether a request that Flask has looked at goes to a rule of the user's.

        A rule for OPTIONS alone, and what Flask and its extensions answer to it by themselves, needs no key: browsers
        send none before a request to another origin.
        """
        if request.routing_exception is not None:
            return self._is_refused_by(request.routing_exception, request.path)
        rule: Any = request.url_rule
        view = self.app.view_functions.get(rule.endpoint)
        if request.method == "OPTIONS":
            asked_for = getattr(view, "required_methods", ())
            if rule.provide_automatic_options or rule.methods <= {"OPTIONS"} or "OPTIONS" in asked_for:
                return False
        return view is not self.view

    def _is_refused_by(self, error: Exception, path: str) -> bool:
        """Return whether a rule of the user's redirects a request, or has its path but not its method."""
        code = getattr(error, "code", None) or 0
        return 300 <= code < 400 or (code == 405 and path not in self.service.routes)

    def paths(self) -> Iterator[str]:
        """Yield the paths of the user's rules that have no variables."""
        for rule in self.app.url_map.iter_rules():
            if not rule.arguments and self.app.view_functions.get(rule.endpoint) is not self.view:
                yield rule.rule


class AddedToFastAPI:
    """The routes of a FastAPI that are not the service's."""

    def __init__(self, app: fastapi.FastAPI, endpoint: ASGIEndpoint) -> None:
        self.router: Any = app.router
        self.endpoint = endpoint  # of the service's own routes
        self.default = app.router.default  # what answers where no route does
        self.inner: Any = app.router.middleware_stack

    async def guard(self, scope: Any, receive: Any, send: Any) -> None:
        """Give a request to the router, but for a route of the user's only with a key."""
        if scope["type"] == "lifespan":
            await self.inner(scope, receive, send)
            return
        request = asgi_request({"method": "GET", **scope}, receive, self.endpoint.batcher)
        refused = self.endpoint.service.refusal(request)
        if refused is None or not self.answers(scope):
            await self.inner(scope, receive, send)
        elif scope["type"] == "http":
            await self.endpoint.respond(request, receive, send, refused, scope.get(VISIT))
        else:
            await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": ""})

    def has(self, request: Request) -> bool:
        """Return whether a request goes to a route of the user's, before FastAPI has looked at it."""
        headers = [(b"host", (request.header("host") or "").encode("latin-1"))]
        scope = {"type": "http", "method": request.method, "path": request.path, "root_path": "", "headers": headers}
        return self.answers(scope)

    def answers(self, scope: Any) -> bool:
        """Return whether a request goes to a route of the user's, one for OPTIONS alone excepted, as with Flask."""
        route = self._find(scope)
        if route is None and self.router.redirect_slashes:
            path = scope["path"]
            route = self._find({**scope, "path": path.rstrip("/") if path.endswith("/") else f"{path}/"})
        if route is None:
            is_found = self._is_low_priority(scope)
            return is_found or self.router.default is not self.default
        is_for_options = scope.get("method") == "OPTIONS" and getattr(route, "methods", None) == {"OPTIONS"}
        return getattr(route, "endpoint", None) is not self.endpoint and not is_for_options

    def _find(self, scope: Any) -> Any:
        """Return the route that the router would take: the first that has path and method, or the path alone."""
        found: Any = None
        for route in self.router.routes:
            match, _ = route.matches(scope)
            if match.name == "FULL":
                found = route
                break
            if match.name == "PARTIAL" and found is None:
                found = route
        while hasattr(found, "effective_route_contexts"):  # an included router: on to its own route
            _, _, found, _ = found._match(scope)
        return found

    def _is_low_priority(self, scope: Any) -> bool:
        """Return whether one of FastAPI's own kind of routes for files, which it asks last, has a path."""
        match, *_ = self.router._match_low_priority(scope)
        return bool(match.name != "NONE")

    def paths(self) -> Iterator[str]:
        """Yield the paths of the user's routes that have no variables."""
        for route in self.router.routes:
            is_router = hasattr(route, "effective_route_contexts")
            for one in route.effective_route_contexts() if is_router else [route]:
                one = getattr(one, "starlette_route", None) or one
                path, endpoint = getattr(one, "path", ""), getattr(one, "endpoint", None)
                if endpoint not in (None, self.endpoint) and "{" not in path:
                    yield path


async def visit_asgi(visit: Visit, app: Any, scope: Any, receive: Any, send: Any) -> None:
    """Run an ASGI app that may answer by itself, not by the service."""

    async def send_noted(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ())]
            if visit.note(message["status"]) and not any(name.lower() == b"x-request-id" for name, _ in headers):
                headers.append((b"x-request-id", visit.request_id.encode()))
            if cors is not None:
                texts = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
                added = cors.add_to(texts, visit.request)
                headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in added]
            message = {**message, "headers": headers}
        await send(message)

    cors = visit.service.cors
    scope[VISIT] = visit
    with visit:
        await app(scope, receive, send_noted)


def visit_wsgi(visit: Visit, app: Any, environ: Any, start_response: Any) -> Any:
    """Run a WSGI app that may answer by itself, not by the service."""

    def start_noted(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        if visit.note(int(status[:3])) and not any(name.lower() == "x-request-id" for name, _ in headers):
            headers = [*headers, ("X-Request-ID", visit.request_id)]
        if cors is not None:
            headers = cors.add_to(headers, visit.request)
        return start_response(status, headers, exc_info)

    cors = visit.service.cors
    environ[VISIT] = visit
    with visit:
        return app(environ, start_noted)

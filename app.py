"""Serve one scikit-learn predictor over HTTP, through Flask or FastAPI, as `settings.toml` says.

This file decides: which settings there are, which operations are offered, how Flask and how FastAPI present them, and
how all of it becomes an app. How each part works stands in `serving/`; how gunicorn runs it stands in `processes/`.

The path of a request, the same under both frameworks:

1. the framework's route, or a shortcut in front of its router, makes a `Request` of it; what a user has added is
   answered by the framework, if `AddedToFlask` or `AddedToFastAPI` has seen its key;
2. `Service.respond` gives it an id, finds its `Operation`, and reads its body up to the limit;
3. the operation's endpoint, such as `predict_body` in `serving/web/endpoints.py`, turns bytes into rows by the
   `Contract` (`read_rows`), and calls `Service.predict` with them as a `Job`;
4. a batcher (`LoopBatcher` or `ThreadBatcher`) keeps it waiting, `BatchQueue.take` chooses the jobs that share a call,
   and `BatchQueue.call` calls `Model.predict_rows`: `Arrays.of_rows` makes X of them, and `Predictor.ask` calls the
   estimator's `predict_proba`, and `predict` where the probabilities do not decide, or a graph in its place. (A body
   over 64 kB becomes X by `LongBody`, and goes to `Model.predict`.)
5. the endpoint writes the `Response`, which observers are shown and which goes back byte for byte the same.

Run it with `gunicorn -c gunicorn.conf.py`, or while developing with `flask --app app run --debug` or
`uvicorn app:app --reload`; `python app.py` prints the settings in force. `app:app` is the framework's own object,
`app:asgi` and `app:wsgi` are the same service behind either interface.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field, PrivateAttr

from serving import VERSION
from serving.cores import count_cores
from serving.environment import settings_file
from serving.errors import (
    Key,
    SettingsError,
    StartupError,
    Unauthorized,
    errors_about,
    exit_on_startup_error,
)
from serving.logs import LoggingSettings, configure_logging, telling_versions
from serving.output import protect_output
from serving.platforms import RoutesSettings, with_platform
from serving.predictor.artifact import ModelSettings
from serving.predictor.calls import BatchingSettings
from serving.predictor.features import FeatureSettings
from serving.predictor.golden import golden_path
from serving.predictor.model import Model, Report, load_model
from serving.predictor.proof import Proof, prove
from serving.server import MAX_WORKERS, ServerSettings
from serving.settings import PROJECT, OtherNames, SettingsFile, print_settings, read_settings
from serving.watch import exit_or_wait, is_reloaded, look_at, touch_after_change
from serving.web import clouds, documentation, endpoints, oip
from serving.web.added import AddedToFastAPI, AddedToFlask, visit_asgi, visit_wsgi
from serving.web.asgi import ASGIEndpoint, asgi_request, receive_unless_cut
from serving.web.bridges import Binding, as_asgi, as_wsgi
from serving.web.documentation import DocsSettings, document_of
from serving.web.operation import Operation
from serving.web.prefix import below, put_scope_below
from serving.web.service import (
    VISIT,
    AccessLog,
    AuthSettings,
    LimitSettings,
    Observer,
    Service,
    Visit,
)
from serving.web.wsgi import WSGIEndpoint, pieces_of, run_now, wsgi_request

if TYPE_CHECKING:
    import fastapi
    import flask

__all__ = ["Settings", "as_asgi", "as_wsgi", "create_app", "load_settings"]

CONCURRENCY = "WEB_CONCURRENCY"  # the variable with a platform's number of workers
GUNICORN_OPTIONS = "gunicorn's options"  # the source of a value

# Settings: a table for each part, owned by the part -------------------------------------------------------------------


class Settings(SettingsFile):
    """Every choice of the service, read once at the start by `load_settings`."""

    other_names: ClassVar[OtherNames] = {
        "server": ("gunicorn", "uvicorn"),
        "logging": ("log",),
        "features": ("inputs", "columns"),
    }

    framework: Literal["flask", "fastapi"] = "fastapi"
    server: ServerSettings = ServerSettings()
    model: ModelSettings = ModelSettings()
    features: dict[str, FeatureSettings] = Field(default_factory=dict)
    batching: BatchingSettings = BatchingSettings()
    limits: LimitSettings = LimitSettings()
    logging: LoggingSettings = LoggingSettings()
    auth: AuthSettings = AuthSettings()
    routes: RoutesSettings = RoutesSettings()
    docs: DocsSettings = DocsSettings()

    _file: Path = PrivateAttr(default=PROJECT / "settings.toml")

    def cure(self, key: Key) -> str:
        """Return what to do about features that do not fit the model, for the end of a message."""
        source = self.source(*key)
        if key[0] != "features" or not self.source("model", "path").startswith("environment"):
            return ""
        if source.startswith("environment"):
            return "; a name with capitals goes into SERVING_FEATURES, as JSON" if "FEATURES__" in source else ""
        return f"; SERVING_FEATURES='{{}}' leaves out [features] of {source}"

    def note_left_alone(self) -> None:
        """Log which variables look like ours, but are Kubernetes', and which routes of a platform are there anyway."""
        super().note_left_alone()
        clouds.note_routes(self, operations(self))

    @property
    def model_path(self) -> Path:
        """The artifact's place."""
        return self.folder / self.model.path

    @property
    def artifact_subject(self) -> str:
        """The subject of a message about the artifact, such as `has no predict()`."""
        return f"{self.place('model', 'path')} is {str(self.model_path)!r}, which"

    @property
    def worker_class(self) -> Literal["uvicorn", "gevent"]:
        """The worker that `server.worker_class` means: by default the one of the framework's own interface."""
        if self.server.worker_class == "auto":
            return "uvicorn" if self.framework == "fastapi" else "gevent"
        return self.server.worker_class

    @functools.cached_property
    def cores(self) -> int:
        """The number of cores that affinity and quotas leave to this process."""
        return count_cores()

    @property
    def workers(self) -> int:
        """The number of workers that `server.workers` means: by default one for each core."""
        return self.cores if self.server.workers == "auto" else self.server.workers

    @property
    def threads(self) -> int:
        """The number of threads of OpenMP and BLAS in a worker: its share of the cores."""
        return max(1, self.cores // self.workers)


def load_settings(
    path: str | os.PathLike[str] | None = None, options: Mapping[str, Any] = MappingProxyType({})
) -> Settings:
    """Return the settings: gunicorn's `options` over the environment over the file over defaults.

    `path` is the file; without it `SERVING_SETTINGS`, and without that the `settings.toml` beside this module. Raises
    `SettingsError` with every mistake: place, value seen, what is allowed.
    """
    settings = read_settings(Settings, find_settings(path))
    for name, feature in settings.features.items():
        feature._is_variable = settings.source("features", name, "example").startswith("environment")
    if settings.server.workers == "auto" and "workers" not in options and (number := os.environ.get(CONCURRENCY)):
        # Platforms set it. Gunicorn too takes it for the number of workers that nobody has set.
        if not re.fullmatch("[1-9][0-9]{0,5}", number) or int(number) > MAX_WORKERS:
            rule = f"it should be a number of workers, {MAX_WORKERS} at most"
            raise SettingsError(f"environment: {CONCURRENCY} is {number!r}; {rule}")
        settings = settings.with_value(("server", "workers"), int(number), f"environment: {CONCURRENCY}")
    for name in ServerSettings.model_fields.keys() & options.keys() - {"worker_class"}:
        # A path of an option starts from the working directory, one of the settings from their file.
        value = str(Path(options[name]).absolute()) if name in ("certfile", "keyfile") else options[name]
        settings = settings.with_value(("server", name), value, GUNICORN_OPTIONS)
    if "loglevel" in options:
        settings = settings.with_value(("logging", "level"), options["loglevel"], GUNICORN_OPTIONS)
    settings = with_platform(settings)
    _refuse_own_paths(settings)
    _refuse_root_path(settings)
    return settings


def find_settings(path: str | os.PathLike[str] | None = None) -> Path:
    """Return the settings file: a path, or what `SERVING_SETTINGS` names, or the one beside this module."""
    return Path(path or settings_file() or PROJECT / "settings.toml").absolute()


def read_gunicorn_options(with_command_line: bool = False) -> dict[str, Any]:
    """Return gunicorn's options of GUNICORN_CMD_ARGS, and over them those of this process's command line if asked.

    Raises `SettingsError` for a variable that gunicorn cannot read.
    """
    variable = CONCURRENCY
    try:
        from gunicorn.config import Config  # here, for other servers do without gunicorn; it reads WEB_CONCURRENCY

        config, variable = Config(), "GUNICORN_CMD_ARGS"
        lines = [config.get_cmd_args_from_env(), *([None] if with_command_line else [])]
    except ValueError as error:
        raise SettingsError(f"environment: {variable} is {os.environ[variable]!r}: {error}") from None
    given: dict[str, Any] = {}
    for words in lines:
        parsed = vars(config.parser().parse_known_args(words)[0])
        given |= {name: value for name, value in parsed.items() if value is not None}
    return given | {"wsgi_app": next(iter(given["args"]), None)}


# The table of operations ----------------------------------------------------------------------------------------------

DIALECTS = (endpoints, oip, documentation, clouds)  # each gives rows of the table


def operations(settings: Settings) -> Iterator[Operation]:
    """Yield the table from which routes, answers and the OpenAPI document are made."""
    table = [operation for dialect in DIALECTS for operation in dialect.operations(settings)]
    yield from table
    yield from clouds.operations_of_routes(settings, table)


def _refuse_own_paths(settings: Settings) -> None:
    """Raise `SettingsError` if a path that is to be open is the service's own."""
    for operation in operations(settings):
        if operation.only_for is None and operation.path in settings.auth.open_paths:
            cure = "set auth.open_docs" if operation.access == "docs" else "list paths that you have added"
            place = settings.place("auth", "open_paths")
            raise SettingsError(f"{place} has {operation.path!r}, which is the service's own; {cure}")


def _refuse_root_path(settings: Settings) -> None:
    """Raise `SettingsError` if a path begins with the root path, which would be left out of it as a proxy's."""
    root_path = settings.server.root_path
    for path in settings.auth.open_paths if root_path else ():
        if below(path, root_path) != path:
            place = settings.place("auth", "open_paths")
            raise SettingsError(f"{place} has {path!r}; leave out {root_path!r}, which is server.root_path")
    for operation in operations(settings) if root_path else ():
        if below(operation.path, root_path) != operation.path:
            problem = f"is {root_path!r}, with which the service's own {operation.path!r} begins"
            raise SettingsError(f"{settings.place('server', 'root_path')} {problem}; use another path")


def observers(settings: Settings) -> Iterator[Observer]:
    """Yield the observers of each exchange."""
    if settings.logging.access:
        yield AccessLog()


# The two frameworks: routes, what no route matches, the shortcut, what a user has added -------------------------------


def build_flask(service: Service[Any]) -> flask.Flask:
    """Return a Flask with a route for each path of the service, which also answers what no route matches."""
    endpoint = WSGIEndpoint(service)
    app, view = _make_flask(endpoint)
    inner = app.wsgi_app
    for path, name in service.names.items():
        methods = [*service.routes[path]]
        app.add_url_rule(path, name, view, methods=methods, provide_automatic_options=False)

    def is_ours(path: str, method: str) -> bool:
        is_known = method in service.routes.get(path, ()) or method == "HEAD"
        return is_known and app.view_functions.get(service.names.get(path, "")) is view

    def answers_alone(path: str, method: str) -> bool:
        return app.wsgi_app is hot_first and is_ours(path, method) and not _has_hooks(app)

    def hot_first(environ: Any, start_response: Any) -> Any:
        visit = None if app.wsgi_app is hot_first else environ.get(VISIT)  # of what is around it
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if method in service.hot.get(path, ()) and is_ours(path, method) and not _has_hooks(app):
            return endpoint.respond(wsgi_request(environ, endpoint.batcher), start_response, visit=visit)
        if visit is not None:
            return inner(environ, start_response)
        visit = Visit(service, wsgi_request(environ, endpoint.batcher))
        return visit_wsgi(visit, inner, environ, start_response)

    app.wsgi_app = hot_first  # type: ignore[method-assign]
    before = _count_parts(app)

    def is_bare() -> bool:
        return app.wsgi_app is hot_first and {*app.view_functions.values()} == {view} and _count_parts(app) == before

    added = AddedToFlask(app, endpoint, view)
    service.added_paths = added.paths
    app.extensions["serving"] = Binding(service, is_bare, added, answers_alone)
    return app


def _make_flask(endpoint: WSGIEndpoint) -> tuple[flask.Flask, Callable[..., flask.Response]]:
    """Return a Flask that asks for a key before what a user adds, and the view of the service's own routes."""
    import flask
    from werkzeug.datastructures import Headers
    from werkzeug.exceptions import HTTPException

    class App(flask.Flask):
        def __call__(self, environ: Any, start_response: Any) -> Any:
            return self.extensions["serving"].added.call(environ, start_response)

        def dispatch_request(self, *args: Any) -> Any:
            refused = self.extensions["serving"].added.refusal(flask.request)
            return view(refused) if refused else super().dispatch_request(*args)

    def view(refused: Unauthorized | None = None) -> flask.Response:
        request = wsgi_request(flask.request.environ, endpoint.batcher)
        response = run_now(endpoint.service.respond(request, refused, flask.request.environ.get(VISIT)))
        answer = flask.Response(pieces_of(response), response.status_line)
        answer.headers = Headers(response.headers)
        return answer

    def unmatched(error: Any) -> Any:  # OPTIONS too, unless a user has a route for it
        is_users = error.code == 405 and flask.request.path not in endpoint.service.routes
        return view() if flask.request.routing_exception and not is_users else error

    app = App(__name__, static_folder=None)
    app.url_map.merge_slashes = False
    app.config["APPLICATION_ROOT"] = endpoint.service.root_path or "/"
    app.register_error_handler(HTTPException, unmatched)
    return app, view


def _count_parts(app: flask.Flask) -> tuple[int, int, bool]:
    """Return how many rules and handlers of errors a Flask has, and whether it has hooks: a user adds to these."""
    n_handlers = sum(len(kinds) for codes in app.error_handler_spec.values() for kinds in codes.values())
    return len([*app.url_map.iter_rules()]), n_handlers, _has_hooks(app)


def _has_hooks(app: flask.Flask) -> bool:
    """Return whether a user has given a Flask something to do for each request."""
    from flask import Request, signals

    hooks = (app.before_request_funcs, app.after_request_funcs, app.teardown_request_funcs)
    more = (app.url_value_preprocessors, app.teardown_appcontext_funcs)
    of_request = (signals.request_started, signals.request_finished, signals.request_tearing_down)
    of_context = (signals.appcontext_pushed, signals.appcontext_popped, signals.appcontext_tearing_down)
    listened = any(signal.receivers for signal in (*of_request, *of_context))
    return any(hooks) or any(more) or listened or app.request_class is not Request


def build_fastapi(service: Service[Any]) -> fastapi.FastAPI:
    """Return a FastAPI with a route for each path of the service, which also answers what no route matches."""
    from starlette.routing import Route

    endpoint = ASGIEndpoint(service)
    app = _make_fastapi(endpoint)
    not_found = app.router.default

    async def unmatched(scope: Any, receive: Any, send: Any) -> None:
        await (endpoint if scope["type"] == "http" else not_found)(scope, receive, send)

    for path, name in service.names.items():
        route = Route(path, endpoint, methods=[*service.routes[path]], name=name)
        route.handle = endpoint.__call__  # type: ignore[method-assign]  # also for methods that no route has
        app.router.routes.append(route)
    app.router.default = unmatched
    before = len(app.routes), len(app.exception_handlers)

    def is_bare() -> bool:
        is_more = _has_middleware(app) or app.router.default is not unmatched
        return not is_more and (len(app.routes), len(app.exception_handlers)) == before

    added = AddedToFastAPI(app, endpoint)
    app.router.middleware_stack = added.guard
    service.added_paths = added.paths
    app.state.serving = Binding(service, is_bare, added, functools.partial(_answers_alone, app, service))
    app.openapi = lambda: document_of(service)  # type: ignore[method-assign]
    return app


def _make_fastapi(endpoint: ASGIEndpoint) -> fastapi.FastAPI:
    """Return a FastAPI without routes that answers hot operations before its router, which takes longer."""
    import fastapi

    service = endpoint.service

    class App(fastapi.FastAPI):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if service.root_path:
                put_scope_below(scope, service.root_path)
            if scope["type"] != "http":
                await super().__call__(scope, receive, send)
                return
            request = asgi_request(scope, receive, endpoint.batcher)
            if _answers_alone(self, service, request.path, request.method) or service.is_preflight(request):
                await endpoint.respond(request, receive, send)
            else:
                receive = functools.partial(receive_unless_cut, scope, receive)
                await visit_asgi(Visit(service, request), super().__call__, scope, receive, send)

    app = App(title=service.settings.model.name, openapi_url=None, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False
    return app


def _answers_alone(app: fastapi.FastAPI, service: Service[Any], path: str, method: str) -> bool:
    """Return whether the service answers in front of a FastAPI's router, which has nothing to do for it."""
    return method in service.hot.get(path, ()) and not _has_middleware(app)


def _has_middleware(app: fastapi.FastAPI) -> bool:
    """Return whether a user has put something around a FastAPI's routes."""
    return bool(app.user_middleware) or "build_middleware_stack" in vars(app)


FRAMEWORKS: dict[str, Callable[[Service[Any]], Any]] = {"flask": build_flask, "fastapi": build_fastapi}


# The factory ----------------------------------------------------------------------------------------------------------

_current: list[Service[Settings]] = []  # the service of this process, once there is one


def current_service() -> Service[Settings] | None:
    """Return the service of this process: gunicorn's workers get that of their master."""
    return _current[0] if _current else None


def set_current_service(service: Service[Settings]) -> None:
    """Make a service that of this process, and log as it says."""
    configure_logging(service.settings.logging)
    _current[:] = [service]


def load(settings: Settings, report: Report = lambda doing: None) -> Model:
    """Load the model that the settings describe, without predicting. `report` is told what is done and may take long.

    Raises `StartupError`, which names the place of what is wrong.
    """
    with telling_versions(), errors_about(settings.artifact_subject), settings.locate():
        return load_model(settings.model, settings.features, settings.folder, settings.threads, report)


def prove_here(settings: Settings, model: Model) -> Proof:
    """Prove a model in this process. Raises `ModelError`."""
    with errors_about(settings.artifact_subject):
        return prove(model)


def make_service(settings: Settings, model: Model | None = None, proof: Proof | None = None) -> Service[Settings]:
    """Return the service that the settings describe, of a model that is loaded and proven here, unless one is given.

    Raises `StartupError`.
    """
    model = model or load(settings)
    service = Service(settings, model, proof or prove_here(settings, model), operations(settings), observers(settings))
    if proof is None:
        service.model.warm_up()
    return service


def create_app(settings: Settings | None = None) -> flask.Flask | fastapi.FastAPI:
    """Return the app of the framework that the settings name: a `Flask` or a `FastAPI`, to extend as either is.

    Without settings it is the app of this process's service, which is made the first time. Raises `StartupError`.
    """
    if settings is not None:
        configure_logging(settings.logging)
    service = start_service() if settings is None else make_service(settings)
    app: flask.Flask | fastapi.FastAPI = FRAMEWORKS[service.settings.framework](service)
    return app


def start_service() -> Service[Settings]:
    """Return the service of this process, which is made the first time. Raises `StartupError`."""
    service = current_service()
    if service is None:
        protect_output()
        seen = look_at(files_to_watch()) if is_reloaded() else {}
        settings = load_settings()
        configure_logging(settings.logging)
        settings.note_left_alone()
        service = make_service(settings)
        set_current_service(service)
        service.model.note_python()
        if seen:
            touch_after_change(seen, PROJECT / "app.py")
    return service


def files_to_watch() -> list[Path]:
    """Return the files, other than sources, on which the service depends."""
    files: list[Path] = []
    with contextlib.suppress(StartupError):
        files.append(find_settings())
        model = load_settings().model_path
        files += [model, golden_path(model)]
    return files


# What servers ask this module for -------------------------------------------------------------------------------------

COMMANDS = {  # the framework whose apps a command runs, and what to do about the other
    "flask": ("flask", "set SERVING_FRAMEWORK=flask, or run `uvicorn app:app`"),
    "uvicorn": ("fastapi", "set SERVING_FRAMEWORK=fastapi, or run `uvicorn app:asgi`"),
}


def native_app() -> flask.Flask | fastapi.FastAPI:
    """Return the app that a server asks for; a mistake in the settings ends the process."""
    with exit_or_wait(files_to_watch, PROJECT):
        return create_app()


def app_for_command() -> flask.Flask | fastapi.FastAPI:
    """Return the app as it is, unless the command that asks for it runs only the other framework's apps."""
    script = Path(sys.argv[0])
    command = script.parent.name if script.stem == "__main__" else script.stem
    with exit_or_wait(files_to_watch, PROJECT):
        service = current_service()
        settings = service.settings if service else load_settings()
        needed, cure = COMMANDS.get(command, (settings.framework, ""))
        if settings.framework != needed:
            place = settings.place("framework")
            raise SettingsError(f"{place} is {settings.framework!r}, but `{command}` takes {needed!r}; {cure}")
    return cast("flask.Flask | fastapi.FastAPI", served("native"))


@functools.cache
def served(name: str) -> Any:
    """Return one of `SERVED`, made when it is first asked for."""
    return SERVED[name]()


SERVED: dict[str, Callable[[], Any]] = {  # what makes each attribute that a server may ask this module for
    "native": native_app,
    "app": app_for_command,
    "asgi": lambda: as_asgi(served("native")),
    "wsgi": lambda: as_wsgi(served("native")),
}


def __getattr__(name: str) -> Any:
    """Return `app`, `asgi` or `wsgi`, which nobody makes before: importing this module does nothing."""
    if name not in SERVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return served(name)


if __name__ == "__main__":
    with exit_on_startup_error():
        settings = load_settings(options=read_gunicorn_options())
        print(f"# version {VERSION}")
        print_settings(settings)

"""The app in this process, without a server: settings for it, and requests by its own interface."""

import asyncio
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import app
from serving.predictor.model import make_model
from serving.predictor.predictor import Predictor
from serving.predictor.proof import Proof
from serving.web.service import Service
from tests.lib.artifacts import save
from tests.lib.cases import Case
from tests.lib.clients import Answer
from tests.lib.servers import PROJECT


def make_settings(**changes: Any) -> app.Settings:
    """Return the shipped settings with some sections' keys, or all of [features], changed."""
    settings = app.load_settings(PROJECT / "settings.toml")
    values = settings.model_dump()
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) and key != "features" else value
    return app.Settings.model_validate(values)


def answers_of(predictor: Predictor, X: Any) -> list[dict[str, Any]]:
    """Return what a predictor says of each row of X."""
    return [json.loads(answer) for answer in predictor.predict(X).render()]


def make_service(settings: app.Settings, estimator: Any) -> Service[app.Settings]:
    """Return the service of an estimator that was not saved, and of which nothing is proven."""
    model = make_model(estimator, Path("model.joblib"), settings.features)
    return app.make_service(settings, dataclasses.replace(model, n_threads=settings.threads), Proof())


def serve_estimator(path: Path, estimator: Any, **changes: Any) -> Any:
    """Save an estimator, and build the app around it from the shipped settings with changes."""
    model = save(estimator, path) | changes.pop("model", {})
    return app.create_app(make_settings(model=model, **({"features": {}} | changes)))


def call(native: Any, case: Case) -> Answer:
    """Send a case to an app object by its own interface, without a server."""
    return call_wsgi(native, case) if hasattr(native, "wsgi_app") else asyncio.run(call_asgi(native, case))


async def call_asgi(asgi: Any, case: Case, root_path: str = "", send_instead: Any = None) -> Answer:
    path, _, query = case.target.partition("?")
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": case.body, "more_body": case.cut},
        {"type": "http.disconnect"},
    ]
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": case.method,
        "scheme": "http",
        "path": root_path + unquote(path),
        "raw_path": (root_path + path).encode(),
        "query_string": query.encode(),
        "root_path": root_path,
        "headers": [(name.lower().encode(), value.lstrip().encode()) for name, value in case.fields()],
        "server": ("test", 80),
        "client": ("test", 1),
    }

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await asgi(scope, receive, send_instead or send)
    headers = [(name.decode(), value.decode()) for name, value in sent[0]["headers"]]
    return Answer.of(sent[0]["status"], headers, b"".join(message["body"] for message in sent[1:]))


def environ_of(case: Case) -> dict[str, Any]:
    """Return the WSGI environ of a case."""
    path, _, query = case.target.partition("?")
    names = {"content-type": "CONTENT_TYPE", "content-length": "CONTENT_LENGTH"}
    environ: dict[str, Any] = {
        "REQUEST_METHOD": case.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote(path).encode().decode("latin-1"),
        "QUERY_STRING": query,
        "SERVER_NAME": "test",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": CutStream(case.body) if case.cut and case.chunked else io.BytesIO(case.body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": False,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,
    }
    for name, value in case.fields():
        key = names.get(name.lower(), f"HTTP_{name.upper().replace('-', '_')}")
        value = value.strip(" \t").encode().decode("latin-1")
        environ[key] = f"{environ[key]},{value}" if key in environ else value
    return environ


def call_wsgi(wsgi: Any, case: Case) -> Answer:
    started: list[Any] = []
    chunks = wsgi(environ_of(case), lambda status, headers, exc_info=None: started.append((status, headers)))
    status, headers = started[0]
    return Answer.of(int(status[:3]), headers, b"".join(chunks))


class CutStream(io.BytesIO):
    """A chunked body whose last chunk never came, as a WSGI server shows it."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(size) or self._ended()

    read1 = read

    def _ended(self) -> bytes:
        raise OSError("the connection ended inside a chunk")


def forbid_router(native: Any) -> None:
    """Make an app fail where it asks its framework's router."""

    def fail(*args: Any) -> None:
        raise AssertionError("the router was asked")

    if hasattr(native, "wsgi_app"):
        native.full_dispatch_request = fail
        native.config.update(PROPAGATE_EXCEPTIONS=True)
    else:
        native.router.middleware_stack = fail

"""Real servers as processes on ephemeral ports, and the same requests without them."""

import asyncio
import contextlib
import hashlib
import http.client
import io
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import joblib
import pytest
import skops.io
from cases import Case
from skl2onnx import to_onnx
from skl2onnx.common.data_types import DoubleTensorType
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier

import app

PROJECT = Path(app.__file__).parent
BIN = Path(sys.executable).parent
COMBINATIONS = [(framework, worker) for framework in ("fastapi", "flask") for worker in ("uvicorn", "gevent")]
LISTENING = re.compile(r"https?://(?:127\.0\.0\.1|0\.0\.0\.0):(\d+)")
ROW = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}
MADE_ID = re.compile(r"^[0-9a-f]{32}$")
WAIT_S = 30.0
SETTINGS = """
framework = "{}"
[server]
worker_class = "{}"
workers = 2
bind = "127.0.0.1:0"
[model]
path = "iris.skops"
name = "iris"
[logging]
access = false
"""


@dataclass(frozen=True)
class Answer:
    """What came back, reduced to what must be the same everywhere."""

    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def of(cls, status: int, headers: Any, body: bytes) -> "Answer":
        compared = ("content-type", "content-length", "allow", "www-authenticate", "x-request-id")
        kept = {name.lower(): MADE_ID.sub("made", value) for name, value in headers if name.lower() in compared}
        closes = any(name.lower() == "connection" and value == "close" for name, value in headers)
        body = re.sub(rb'(?<="settings_sha256":")[0-9a-f]{64}', b"0" * 64, body)  # which names the framework too
        return cls(status, kept | ({"connection": "close"} if closes else {}), body)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Poll until the condition holds, and give what it gave."""
    deadline = time.monotonic() + WAIT_S
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {WAIT_S} s for {what}")
        threading.Event().wait(0.01)
    return result


class Server:
    """A command that serves, started in a process group of its own; `port` is the one that it printed."""

    def __init__(
        self,
        command: list[str],
        log: Path,
        cwd: Path,
        port: int | None,
        tls: ssl.SSLContext | None = None,
        stderr: Any = None,
        **environment: str,
    ) -> None:
        self.log, self.tls = log, tls
        env = {key: value for key, value in os.environ.items() if not key.startswith("SERVING_")} | environment
        env["PATH"] = f"{BIN}:{env['PATH']}"
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=env,
                stdout=stream,
                stderr=stderr or stream,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            self.port = port or int(wait_until(self._listening, f"{command} to listen"))
            wait_until(self._answers, f"{command} to answer")
        except BaseException:  # an interrupt too: the process is in a group of its own, and would stay
            self.stop(signal.SIGKILL)
            raise

    def _listening(self) -> str | None:
        assert self.process.poll() is None, f"exited with {self.process.returncode}: {self.text}"
        match = LISTENING.search(self.text)
        return match and match[1]

    def _answers(self) -> bool:
        try:
            return self.get("/ping").status == 200
        except (OSError, http.client.HTTPException):
            return False

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The log so far, a JSON object a line."""
        return [json.loads(line) for line in self.text.splitlines()]

    @property
    def worker_pids(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def wait_for_workers(self, count: int) -> list[int]:
        """Wait until there are so many, and give their process ids."""
        return wait_until(lambda: self.worker_pids if len(self.worker_pids) == count else None, f"{count} workers")

    @property
    def reloads(self) -> list[dict[str, Any]]:
        """The lines with which reloads have ended, well or not."""
        return [line for line in self.lines if line["event"] in ("reloaded", "reload_refused")]

    def reload(self) -> dict[str, Any]:
        """Send HUP, and give the line with which the reload ends."""
        before = len(self.reloads)
        self.process.send_signal(signal.SIGHUP)
        return wait_until(lambda: self.reloads[before:], "the reload to end")[0]

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)
        return self.tls.wrap_socket(client, server_hostname="127.0.0.1") if self.tls else client

    def exchange(self, raw: bytes, method: str = "GET", half_close: bool = False) -> Answer:
        with self.connect() as client:
            with contextlib.suppress(ConnectionError):  # a refusal may come before all is sent
                client.sendall(raw)
            if half_close:
                client.shutdown(socket.SHUT_WR)
            return read_answer(client, method)

    def send(self, case: Case) -> Answer:
        return self.exchange(case.raw(), case.method, case.cut)

    def get(self, target: str, **headers: str) -> Answer:
        return self.send(Case("get", "GET", target, tuple(headers.items()), status=200))

    def post(self, payload: Any, **headers: str) -> Answer:
        return self.send(post_case(payload, **headers))

    def stop(self, sig: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(WAIT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def private_mb(pid: int) -> float:
    """The kernel's figure for what a process has to itself, in MB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.MULTILINE))) / 1000


def post_case(payload: Any, **headers: str) -> Case:
    fields = {"Content-Type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
    return Case("post", "POST", "/predictions", tuple(fields.items()), json.dumps(payload).encode(), 200)


def read_answer(client: socket.socket, method: str = "GET") -> Answer:
    response = http.client.HTTPResponse(client, method=method)
    response.begin()
    return Answer.of(response.status, response.getheaders(), response.read())


def gunicorn_environment(framework: str, worker: str, **environment: str) -> dict[str, str]:
    return {
        "SERVING_FRAMEWORK": framework,
        "SERVING_SERVER__WORKER_CLASS": worker,
        "SERVING_SERVER__WORKERS": "1",
        "SERVING_SERVER__BIND": "127.0.0.1:0",
        **environment,
    }


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Start servers; all are ended with the session."""
    started: list[Server] = []
    logs, numbers = tmp_path_factory.mktemp("servers"), itertools.count()

    def start(
        command: str = "gunicorn -c gunicorn.conf.py", cwd: Path = PROJECT, port: int | None = None, **more: Any
    ) -> Server:
        server = Server(command.split(), logs / f"{next(numbers)}.log", cwd, port, **more)
        started.append(server)
        return server

    yield start
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(Server.stop, started))


@pytest.fixture(scope="session")
def servers(serve: Callable[..., Server]) -> dict[tuple[str, str], Server]:
    """The four combinations of framework and worker, run by gunicorn from the shipped settings."""
    with ThreadPoolExecutor() as pool:
        running = pool.map(lambda pair: serve(**gunicorn_environment(*pair)), COMBINATIONS)
        return dict(zip(COMBINATIONS, running, strict=True))


@pytest.fixture(params=COMBINATIONS, ids="-".join)
def server(request: pytest.FixtureRequest, servers: dict[tuple[str, str], Server]) -> Server:
    return servers[request.param]


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is deployed, for tests that edit it."""
    target = tmp_path_factory.mktemp("project")
    for name in ("app.py", "gunicorn.conf.py", "settings.toml"):
        shutil.copy(PROJECT / name, target / name)
    shutil.copytree(PROJECT / "model", target / "model")
    return target


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SERVING_")]:
        monkeypatch.delenv(name)


@pytest.fixture(params=["fastapi", "flask"])
def framework(request: pytest.FixtureRequest) -> str:
    return request.param


def make_settings(**changes: Any) -> app.Settings:
    """Give the shipped settings with some sections' keys, or all of [features], changed."""
    settings = app.load_settings(PROJECT / "settings.toml")
    values = settings.model_dump()
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) and key != "features" else value
    return app.Settings.model_validate(values)


def save(estimator: Any, path: Path) -> dict[str, str]:
    """Save an estimator as its suffix says, and give the settings of [model] that trust it."""
    if path.suffix == ".skops":
        skops.io.dump(estimator, path)
    elif path.suffix == ".joblib":
        joblib.dump(estimator, path)
    elif path.suffix == ".onnx":
        path.write_bytes(to_graph(estimator))
    else:
        path.write_bytes(pickle.dumps(estimator))
    return {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def to_graph(estimator: Any, floats: Any = DoubleTensorType, **options: Any) -> bytes:
    """Convert an estimator of numbers as its owner would, outside the service."""
    types = [("X", floats([None, estimator.n_features_in_]))]
    options = {"zipmap": False} | options if hasattr(estimator, "classes_") else options
    graph: bytes = to_onnx(estimator, initial_types=types, options={id(estimator): options}).SerializeToString()
    return graph


def deploy(folder: Path, estimator: Any, features: str = "") -> str:
    """Save an estimator as `model.joblib` beside a settings file that serves it, and give that file's path."""
    model = save(estimator, folder / "model.joblib")
    file = folder / "settings.toml"
    file.write_text(f'[model]\npath = "model.joblib"\nsha256 = "{model["sha256"]}"\n[features]\n{features}')
    return str(file)


def run(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the installed ones to its end, in the project."""
    command = f"{BIN}/{command}"
    return subprocess.run(
        command.split(), cwd=PROJECT, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


def answers_of(predictor: app.Predictor, X: Any) -> list[dict[str, Any]]:
    """Give what a predictor says of each row of X."""
    return [json.loads(answer) for answer in predictor.predict(X).render()]


def serve_estimator(path: Path, estimator: Any, **changes: Any) -> Any:
    """Save an estimator, and build the app around it from the shipped settings with changes."""
    model = save(estimator, path) | changes.pop("model", {})
    return app.create_app(make_settings(model=model, **({"features": {}} | changes)))


@pytest.fixture(scope="session")
def forest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model that takes missing values, as the settings of [model] name it."""
    iris = load_iris(as_frame=True)
    estimator = RandomForestClassifier(n_estimators=2).fit(iris.data.set_axis(list(ROW), axis="columns"), iris.target)
    return save(estimator, tmp_path_factory.mktemp("forest") / "model.joblib")


def call(native: Any, case: Case) -> Answer:
    """Send a case to an app object by its own interface, without a server."""
    return call_wsgi(native, case) if hasattr(native, "wsgi_app") else asyncio.run(call_asgi(native, case))


async def call_asgi(asgi: Any, case: Case, root_path: str = "") -> Answer:
    path, _, query = case.target.partition("?")
    messages = [{"type": "http.request", "body": case.body, "more_body": case.cut}, {"type": "http.disconnect"}]
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

    await asgi(scope, receive, send)
    headers = [(name.decode(), value.decode()) for name, value in sent[0]["headers"]]
    return Answer.of(sent[0]["status"], headers, b"".join(message["body"] for message in sent[1:]))


def call_wsgi(wsgi: Any, case: Case) -> Answer:
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
    started: list[Any] = []
    chunks = wsgi(environ, lambda status, headers, exc_info=None: started.append((status, headers)))
    status, headers = started[0]
    return Answer.of(int(status[:3]), headers, b"".join(chunks))


class CutStream(io.BytesIO):
    """A chunked body whose last chunk never came, as a WSGI server shows it."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(size) or self._ended()

    def _ended(self) -> bytes:
        raise OSError("the connection ended inside a chunk")


@pytest.fixture
def free_port() -> int:
    """A port that was free a moment ago, for commands that cannot be asked which they took."""
    return find_free_port()


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A settings file with the shipped model beside it, both to be edited."""
    return lay_out(tmp_path, "fastapi", "auto")


def lay_out(folder: Path, framework: str, worker: str) -> Path:
    """Put the shipped model into a folder, with a settings file for it, and return that file."""
    for name in ("iris.skops", "iris.golden.json"):
        shutil.copy(PROJECT / "model" / name, folder / name)
    file = folder / "settings.toml"
    file.write_text(SETTINGS.format(framework, worker))
    return file


def edit(file: Path, *changes: tuple[str, str]) -> None:
    """Replace each first text, which is there once, by the second."""
    text = file.read_text()
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    file.write_text(text)


def identity(server: Server) -> dict[str, str]:
    """What `/health/ready` says, with the hash of the settings, which `Answer` leaves out."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health/ready") as answer:
        return json.load(answer)


def wait_for_model(server: Server, name: str) -> dict[str, str]:
    """Wait until all workers have the model of that name: those that drain have others for a moment."""
    wait_until(lambda: all(identity(server)["model"] == name for _ in range(10)), f"the model {name}")
    return identity(server)

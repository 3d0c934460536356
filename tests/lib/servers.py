"""Real servers as processes on ephemeral ports."""

import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from tests.lib import prefork
from tests.lib.cases import Case
from tests.lib.clients import Answer, post_case, read_answer
from tests.lib.prefork import BIN
from tests.lib.proc import children_of

PROJECT = Path(__file__).resolve().parents[2]
COMBINATIONS = [(framework, worker) for framework in ("fastapi", "flask") for worker in ("uvicorn", "gevent")]
LISTENING = re.compile(r"https?://127\.0\.0\.1:(\d+)")
WAIT_S = 90.0
END_S = 25.0  # less than server.graceful_timeout, so that an end that is cut short by it fails
CHOICES = (  # variables by which whoever runs the tests, or the bench, may have chosen something for servers
    "SERVING_",
    "FLASK_",
    "GUNICORN_",
    "UVICORN_",
    "WEB_CONCURRENCY",
    "FORWARDED_ALLOW_IPS",
    "AIP_",
    "SAGEMAKER_",
)
GUNICORN = "gunicorn -c gunicorn.conf.py"
SERVE_COMMANDS = [
    ("uvicorn app:app --port 0", "fastapi"),
    ("uvicorn app:asgi --port 0", "fastapi"),
    ("uvicorn app:asgi --port 0", "flask"),
    ("flask --app app run --port 0", "flask"),
    ("gunicorn app:wsgi --bind 127.0.0.1:0 --workers 2 --worker-class gevent", "flask"),
    ("gunicorn app:wsgi --bind 127.0.0.1:0 --workers 2 --worker-class gevent", "fastapi"),
    ("gunicorn app:asgi --bind 127.0.0.1:0 --workers 2 --worker-class uvicorn_worker.UvicornWorker", "fastapi"),
    ("gunicorn app:asgi --bind 127.0.0.1:0 --workers 2 --worker-class uvicorn_worker.UvicornWorker", "flask"),
]


def wait_until(condition: Callable[[], Any], what: str, within_s: float = WAIT_S) -> Any:
    """Poll until the condition holds, and return what it returned."""
    deadline = time.monotonic() + within_s
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {within_s} s for {what}")
        time.sleep(0.01)
    return result


def words_of(command: str | list[str]) -> list[str]:
    """Return the words of a command; a text is split at its blanks."""
    return command.split() if isinstance(command, str) else command


def start(
    command: list[str], cwd: Path, env: dict[str, str], stdout: Any, stderr: Any
) -> subprocess.Popen[bytes] | prefork.Forked:
    """Start a command in a process group of its own."""
    if prefork.takes(command):
        out, err = (stream if isinstance(stream, int) else stream.fileno() for stream in (stdout, stderr))
        return prefork.Forked(command, cwd, env, out, err)
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL, start_new_session=True
    )


class Server:
    """A command that serves, started in a process group of its own; `port` is given, or the one that it printed.

    It starts at once. Its owner then waits for it, perhaps beside others.
    """

    patience_s = WAIT_S  # for its start and each answer
    has_ended = False

    def __init__(
        self,
        command: str | list[str],
        log: Path,
        cwd: Path,
        port: int | None = None,
        tls: ssl.SSLContext | None = None,
        stderr: Any = None,
        **environment: str,
    ) -> None:
        self.command, self.log, self.port, self.tls = words_of(command), log, port or 0, tls
        env = {key: value for key, value in os.environ.items() if not key.startswith(CHOICES)} | environment
        env["PATH"] = f"{BIN}:{env['PATH']}"
        with log.open("wb") as stream:
            self.process = start(self.command, cwd, env, stream, stderr or stream)

    def wait(self) -> Self:
        """Return as soon as it answers. If it ends or takes too long, end it and raise AssertionError."""
        try:
            wait_until(self._is_up, f"{self.command} to answer", self.patience_s)
        except BaseException:  # an interrupt too: the process is in a group of its own, and would stay
            self.stop(signal.SIGKILL)
            raise
        return self

    def _is_up(self) -> bool:
        assert self.process.poll() is None, f"exited with {self.process.returncode}: {self.text}"
        if not self.port and (match := LISTENING.search(self.text)):
            self.port = int(match[1])
        try:
            return bool(self.port) and self.is_answering()
        except (OSError, http.client.HTTPException):
            return False

    def is_answering(self) -> bool:
        """Return whether it answers as it should once it is up."""
        return self.get("/ping").status == 200

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The log so far, a JSON object a line; what is just being written is not there yet."""
        whole, _, _ = self.text.rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    @property
    def worker_pids(self) -> list[int]:
        return children_of(self.process.pid)

    def wait_for_workers(self, count: int) -> list[int]:
        """Wait until there are so many, and return their process ids."""
        pids: list[int] = wait_until(
            lambda: found if len(found := self.worker_pids) == count else None, f"{count} workers"
        )
        return pids

    def replace(self, pid: int, sig: int) -> None:
        """End a worker with a signal, and wait until there are as many without it."""
        count = len(self.worker_pids)
        os.kill(pid, sig)
        wait_until(lambda: pid not in self.worker_pids and len(self.worker_pids) == count, "a new worker")

    @property
    def reloads(self) -> list[dict[str, Any]]:
        """The lines with which reloads have ended, well or not."""
        return [line for line in self.lines if line["event"] in ("reloaded", "reload_refused")]

    def reload(self) -> dict[str, Any]:
        """Send HUP, and return the line with which the reload ends."""
        before = len(self.reloads)
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.reloads[before:], "the reload to end")
        return self.reloads[before]

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=self.patience_s)
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
        """Send a signal that ends it, wait for its end, and return its status."""
        self.process.send_signal(sig)  # unless it has ended
        return self.end()

    def end(self) -> int:
        """Wait for its end, and return its status; whatever it leaves behind is killed."""
        if not self.has_ended:  # or its process group may be another's by now
            try:
                self.process.wait(END_S)
            finally:
                self.has_ended = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


class Starter:
    """Starts servers, with an environment that a call may add to, and ends them all, whatever comes of one."""

    def __init__(self, logs: Path, environment: dict[str, str]) -> None:
        self.logs, self.environment = logs, environment
        self.started: list[Server] = []

    def __call__(
        self,
        command: str | list[str] = GUNICORN,
        cwd: Path = PROJECT,
        port: int | None = None,
        is_shipped: bool = False,
        **more: Any,
    ) -> Server:
        """Start a server, and return it as soon as it answers.

        It gets the environment of all unless it names a model, or `is_shipped`: then it serves what the settings beside
        the configuration say.
        """
        if not is_shipped and not {"SERVING_SETTINGS", "SERVING_MODEL__PATH"} & more.keys():
            more |= self.environment
        server = Server(command, self.logs / f"{uuid.uuid4()}.log", cwd, port, **more)
        self.started.append(server)
        return server.wait()

    def each(self, pairs: list[tuple[str, str]], **environment: Any) -> dict[tuple[str, str], Server]:
        """Start a server for each framework with its worker, at the same time."""
        with ThreadPoolExecutor() as pool:
            variables: list[dict[str, Any]] = [gunicorn_environment(*pair, **environment) for pair in pairs]
            running = pool.map(lambda more: self(**more), variables)
            return dict(zip(pairs, running, strict=True))

    def stop(self) -> None:
        with contextlib.ExitStack() as stack:
            for server in self.started:
                stack.callback(server.stop, signal.SIGKILL)


def gunicorn_environment(framework: str, worker: str, **environment: str) -> dict[str, str]:
    return {
        "SERVING_FRAMEWORK": framework,
        "SERVING_SERVER__WORKER_CLASS": worker,
        "SERVING_SERVER__WORKERS": "1",
        "SERVING_SERVER__BIND": "127.0.0.1:0",
        **environment,
    }


def gunicorn_with(module: str, worker: str) -> str:
    """Return the command that serves a user's module by the interface of a worker."""
    return f"{GUNICORN} {module}:{'asgi' if worker == 'uvicorn' else 'wsgi'}"


def run(command: str | list[str], cwd: Path = PROJECT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the installed ones to its end, and return how it ended and what it printed.

    A test that fails afterwards shows it too.
    """
    words = words_of(command)
    env = os.environ | environment
    if prefork.takes(words):
        done = prefork.run(words, cwd, env, timeout=60)
    else:
        program = [str(BIN / words[0]), *words[1:]]
        done = subprocess.run(program, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    print(words, "ended with", done.returncode, done.stdout, done.stderr, sep="\n")
    return done


def run_gunicorn(options: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run gunicorn with its configuration, which ends it, in the project."""
    return run(f"{GUNICORN} {options}", PROJECT, **environment)


def find_free_port() -> int:
    """Return a port that nobody listens on, and that Linux, unless told otherwise, gives to no client."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def identity(server: Server) -> dict[str, str]:
    """What `/health/ready` says, with the hash of the settings, which `Answer` leaves out."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health/ready", timeout=WAIT_S) as answer:
        told: dict[str, str] = json.load(answer)
    return told


def wait_for_model(server: Server, name: str) -> dict[str, str]:
    """Wait until all workers have the model of that name: those that drain have others for a moment."""
    wait_until(lambda: all(identity(server)["model"] == name for _ in range(10)), f"the model {name}")
    return identity(server)

"""Servers to measure: the estimators that they serve, how they are started, and how they end."""

import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import skops.io
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.neighbors import KNeighborsClassifier

from bench.load import flowers
from bench.references import FEATURES, HELLO

PROJECT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LISTENING = re.compile(r"http://127\.0\.0\.1:(\d+)")
START_S = 120.0  # a thousand trees take their time, beside other servers that start on the same core
NEIGHBOURS = 1_300_000  # of four floats, which the file has twice: by row, and by place in the tree
SPECIES = list(load_iris().target_names)
EACH = flowers()[::50]  # a flower of each species
UVICORN, GEVENT = "uvicorn_worker.UvicornWorker", "gevent"


class BenchError(Exception):
    """What makes a measurement worthless, whatever its figures."""


class DidNotStartError(BenchError):
    """A server that ended, or never answered."""


@dataclass(frozen=True)
class Server:
    """A server that can be started: its command, in a folder, with an environment."""

    label: str
    command: str
    folder: Path
    environment: tuple[tuple[str, str], ...] = ()
    list_path: str = "/predictions"
    is_hello: bool = False
    is_reference: bool = False


class Models:
    """Artifacts in a folder, each made when it is first asked for: iris, forest-100, neighbours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fit = cache(fit)

    def artifact(self, name: str, named: bool = False) -> Path:
        """Give the file of an estimator, with or without features' names.

        Tutorials fit on an array, so textbook endpoints get none: with names, scikit-learn would warn at each call.
        """
        file = self.folder / f"{name}{'-named' if named else ''}.joblib"
        if not file.exists():
            estimator = self.fit(name)
            estimator.feature_names_in_ = np.array(FEATURES, dtype=object)
            if not named:
                del estimator.feature_names_in_
            joblib.dump(estimator, file)
        return file

    def settings(self, name: str) -> dict[str, str]:
        """Give the environment that has the service serve it."""
        artifact = self.artifact(name, named=True)
        digest = hashlib.sha256(artifact.read_bytes()).hexdigest()
        return {"SERVING_MODEL__PATH": str(artifact), "SERVING_MODEL__SHA256": digest}


def fit(name: str) -> Any:
    """Fit an estimator on iris; `iris` is the shipped one."""
    iris = load_iris()
    X, y = iris.data, np.asarray(iris.target_names)[iris.target]
    kind, _, trees = name.partition("-")
    if kind == "iris":
        return skops.io.load(PROJECT / "model/iris.skops")
    if kind == "forest":
        return RandomForestClassifier(int(trees), random_state=0).fit(X, y)
    places = np.resize(np.arange(len(X)), NEIGHBOURS)
    noise = np.random.default_rng(0).normal(scale=0.01, size=(NEIGHBOURS, len(FEATURES)))
    # Brute force would need new memory for each row that it predicts.
    return KNeighborsClassifier(algorithm="kd_tree", leaf_size=5000).fit(X[places] + noise, y[places])


def reference(label: str, app: str, worker_class: str, model: Path | None = None, list_path: str = "") -> Server:
    """Give a reference app under gunicorn, in a folder without a `gunicorn.conf.py`, which gunicorn would read."""
    command = f"gunicorn --no-control-socket --bind 127.0.0.1:0 --worker-class {worker_class} references:{app}()"
    environment = (("MODEL", str(model)),) if model else ()
    return Server(label, command, PROJECT / "bench", environment, list_path, model is None, is_reference=True)


def service(framework: str, what: str = "logistic regression", **environment: str) -> Server:
    """Give the service as an operator starts it, with a worker and without access lines unless told otherwise."""
    values = {
        "SERVING_FRAMEWORK": framework,
        "SERVING_SERVER__BIND": "127.0.0.1:0",
        "SERVING_SERVER__WORKERS": "1",
        "SERVING_LOGGING__ACCESS": "false",
        **environment,
    }
    return Server(f"service, {framework}, {what}", "gunicorn -c gunicorn.conf.py", PROJECT, tuple(values.items()))


class Running:
    """A server as a process group of its own, on the cores that are given, its log in a file."""

    def __init__(self, server: Server, cores: Sequence[int], log: Path) -> None:
        self.server, self.log, self.port = server, log, 0
        env = {name: value for name, value in os.environ.items() if not name.startswith("SERVING_")}
        env |= {"PATH": f"{BIN}:{env['PATH']}", **dict(server.environment)}
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                ["taskset", "--cpu-list", ",".join(map(str, cores)), *server.command.split()],
                cwd=server.folder,
                env=env,
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        """Return as soon as the server answers a row; raises DidNotStartError with the last line of its log."""
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                lines = self.log.read_text().splitlines() or ["no word"]
                raise DidNotStartError(lines[-1].replace("|", "\\|"))
            time.sleep(0.005)

    def _answers(self) -> bool:
        if not self.port and (match := LISTENING.search(self.log.read_text())):
            self.port = int(match[1])
        try:
            return bool(self.port) and self.post("/predictions", EACH[0])[0] != 503
        except (OSError, http.client.HTTPException):
            return False

    def post(self, path: str, payload: Any) -> tuple[int, bytes]:
        """Give status and body of the answer."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_S)
        with contextlib.closing(client):
            client.request("POST", path, json.dumps(payload), {"Content-Type": "application/json"})
            response = client.getresponse()
            return response.status, response.read()

    def path(self, rows: int) -> str:
        """Give where so many rows are sent."""
        return "/predictions" if rows == 1 else self.server.list_path

    def check(self, rows: int) -> None:
        """Raise BenchError unless a flower of each species, alone or in an array, is answered rightly."""
        answers = [self.post(self.path(rows), payload) for payload in (EACH if rows == 1 else [EACH])]
        payloads = [json.loads(body) for status, body in answers if status == 200]
        given = payloads if rows == 1 else [item for payload in payloads for item in payload]
        seen = given if self.server.is_hello else [item.get("prediction") for item in given]
        expected = [json.loads(HELLO)] * len(EACH) if self.server.is_hello else SPECIES
        if seen != expected:
            raise BenchError(f"{self.server.label} answered {answers}, not {expected}")

    @property
    def workers(self) -> list[int]:
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def move(self, cores: Sequence[int]) -> None:
        """Pin each thread to these cores."""
        for pid in (self.process.pid, *self.workers):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), cores)

    def settle(self) -> None:
        """Wait until the workers rest: what wrk left unanswered they still work on, at the cost of who is next."""
        before, used = -2, self._used_ticks()
        while used > before + 1:
            time.sleep(0.05)
            before, used = used, self._used_ticks()

    def _used_ticks(self) -> int:
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.workers]
        return sum(int(fields[11]) + int(fields[12]) for fields in stats)  # proc(5): utime and stime

    def private_mb(self) -> list[float]:
        """Give each worker's private memory."""
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self.workers]
        private = re.compile(r"^Private_(?:Clean|Dirty): +(\d+) kB", re.MULTILINE)
        return [sum(map(int, private.findall(rollup))) / 1024 for rollup in rollups]

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

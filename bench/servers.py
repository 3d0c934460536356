"""Servers to measure: the estimators that they serve, how they are started, and how they end."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

import joblib
import numpy as np
import skops.io
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.neighbors import KNeighborsClassifier

from bench.references import HELLO, IRIS_FEATURES
from bench.wrk import flowers
from tests.lib.clients import post_case
from tests.lib.proc import cpu_ticks
from tests.lib.servers import PROJECT, Server

START_TIMEOUT_S = 120.0  # a thousand trees take their time, beside other servers that start on the same core
NEIGHBOURS = 1_300_000  # of four floats, which the file has twice: by row, and by place in the tree
IRIS_SPECIES = list(load_iris().target_names)
EACH = flowers()[::50]  # a flower of each species
UVICORN, GEVENT = "uvicorn_worker.UvicornWorker", "gevent"


class BenchError(Exception):
    """What makes a measurement worthless, whatever its figures."""


class DidNotStartError(BenchError):
    """A server that ended, or never answered."""


@dataclass(frozen=True)
class Deployment:
    """How a server is started: its command, in a folder, with an environment."""

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
        self.fit = cache(fit_model)

    def artifact(self, name: str, named: bool = False) -> Path:
        """Return the file of an estimator, with or without features' names.

        Tutorials fit on an array, so textbook endpoints get none: with names, scikit-learn would warn at each call.
        """
        file = self.folder / f"{name}{'-named' if named else ''}.joblib"
        if not file.exists():
            estimator = self.fit(name)
            estimator.feature_names_in_ = np.array(IRIS_FEATURES, dtype=object)
            if not named:
                del estimator.feature_names_in_
            joblib.dump(estimator, file)
        return file

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment that has the service serve it."""
        artifact = self.artifact(name, named=True)
        digest = hashlib.sha256(artifact.read_bytes()).hexdigest()
        return {"SERVING_MODEL__PATH": str(artifact), "SERVING_MODEL__SHA256": digest}


def fit_model(name: str) -> Any:
    """Fit an estimator on iris; `iris` is the shipped one."""
    iris = load_iris()
    X, y = iris.data, np.asarray(iris.target_names)[iris.target]
    kind, _, trees = name.partition("-")
    if kind == "iris":
        return skops.io.load(PROJECT / "model/iris.skops")
    if kind == "forest":
        return RandomForestClassifier(int(trees), random_state=0).fit(X, y)
    places = np.resize(np.arange(len(X)), NEIGHBOURS)
    noise = np.random.default_rng(0).normal(scale=0.01, size=(NEIGHBOURS, len(IRIS_FEATURES)))
    # Brute force would need new memory for each row that it predicts.
    return KNeighborsClassifier(algorithm="kd_tree", leaf_size=5000).fit(X[places] + noise, y[places])


def reference(label: str, app: str, worker_class: str, model: Path | None = None, list_path: str = "") -> Deployment:
    """Return a reference app under gunicorn, in a folder without a `gunicorn.conf.py`, which gunicorn would read."""
    command = f"gunicorn --no-control-socket --bind 127.0.0.1:0 --worker-class {worker_class} references:{app}()"
    environment = (("MODEL", str(model)),) if model else ()
    return Deployment(label, command, PROJECT / "bench", environment, list_path, model is None, is_reference=True)


def service(framework: str, what: str = "logistic regression", **environment: str) -> Deployment:
    """Return the service as an operator starts it, with a worker and without access lines unless told otherwise."""
    values = {
        "SERVING_FRAMEWORK": framework,
        "SERVING_SERVER__BIND": "127.0.0.1:0",
        "SERVING_SERVER__WORKERS": "1",
        "SERVING_LOGGING__ACCESS": "false",
        **environment,
    }
    return Deployment(f"service, {framework}, {what}", "gunicorn -c gunicorn.conf.py", PROJECT, tuple(values.items()))


class MeasuredServer(Server):
    """A deployment that is started, on the cores that are given."""

    patience_s = START_TIMEOUT_S

    def __init__(self, deployment: Deployment, cores: Sequence[int], log: Path) -> None:
        self.deployment = deployment
        pinned = ["taskset", "--cpu-list", ",".join(map(str, cores)), *deployment.command.split()]
        environment: dict[str, Any] = dict(deployment.environment)
        super().__init__(pinned, log, deployment.folder, **environment)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> Self:
        """Return as soon as it answers a row; raise DidNotStartError with the last line of its log."""
        try:
            return super().wait()
        except AssertionError as error:
            last_line = (self.text.splitlines() or ["no word"])[-1]
            raise DidNotStartError(last_line.replace("|", "\\|")) from error

    def is_answering(self) -> bool:
        return self.post(EACH[0]).status != 503

    def path(self, rows: int, form: str = "rows") -> str:
        """Return where so many rows are sent."""
        if form not in ("rows", "lines"):
            return "/v2/models/iris/infer"
        return "/predictions" if rows == 1 else self.deployment.list_path

    def verify(self, rows: int) -> None:
        """Raise BenchError unless a flower of each species, alone or in an array, is answered rightly."""
        cases = [replace(post_case(payload), target=self.path(rows)) for payload in (EACH if rows == 1 else [EACH])]
        answers = [self.send(case) for case in cases]
        payloads = [answer.json for answer in answers if answer.status == 200]
        given = payloads if rows == 1 else [item for payload in payloads for item in payload]
        seen = given if self.deployment.is_hello else [item.get("prediction") for item in given]
        expected = [json.loads(HELLO)] * len(EACH) if self.deployment.is_hello else IRIS_SPECIES
        if seen != expected:
            raise BenchError(f"{self.deployment.label} answered {answers}, not {expected}")

    def move(self, cores: Sequence[int]) -> None:
        """Pin each thread to these cores."""
        for pid in (self.process.pid, *self.worker_pids):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), cores)

    def settle(self) -> None:
        """Wait until the workers rest: what wrk left unanswered they still work on, at the cost of who is next."""
        before, used = -2, sum(map(cpu_ticks, self.worker_pids))
        while used > before + 1:
            time.sleep(0.05)
            before, used = used, sum(map(cpu_ticks, self.worker_pids))

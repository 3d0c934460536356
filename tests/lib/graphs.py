"""Data for models in ONNX Runtime, and whether these answer as themselves."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.datasets import load_diabetes, load_iris

import app
from serving.logs import configure_logging
from serving.predictor.golden import Golden
from serving.predictor.onnx_runtime import find_disagreement
from serving.predictor.predictor import Predictor
from serving.web.service import Service
from tests.lib.apps import make_settings
from tests.lib.artifacts import save

X, y = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])[y]
NUMBERS, TARGET = load_diabetes(return_X_y=True)
ROWS = [{f"x{column}": value for column, value in enumerate(row)} for row in X.tolist()]
CAT = {"iterations": 8, "thread_count": 1, "verbose": 0, "allow_writing_files": False}
TABLE = pd.DataFrame({"island": np.where(y, "Dream", "Biscoe"), "mass": X[:, 2] * 1000, "depth": X[:, 3], "year": y})
WIDE = (
    (X.mean(axis=0) + np.random.default_rng(0).normal(0, 2, (400, 4)) * X.std(axis=0)).astype(np.float32).astype(float)
)


def proven(path: Path, estimator: Any, features: Any = None, row: Any = None) -> Service[Any]:
    """Return the service of an estimator in ONNX Runtime, proven with a golden row if there is one."""
    model = save(estimator, path) | {"runtime": "onnx"}
    settings = make_settings(model=model, features=features or {})
    loaded = app.load(settings)
    if row is not None:
        answers = loaded.answer([row], "the golden row")
        loaded = dataclasses.replace(loaded, golden=Golden(versions={}, rows=[row], predictions=answers))
    service = app.make_service(settings, loaded)
    assert service.model.predictor.graph is not None
    return service


def agree(service: Service[Any], X: Any) -> bool:
    """Whether both runtimes answer X alike."""
    assert service.model.predictor.graph is not None
    expected = Predictor(service.model.predictor.estimator).ask(X)
    return find_disagreement(service.model.predictor, X, expected) is None


def prove_graph(path: Path, graph: bytes) -> Service[Any]:
    """Return the service of an .onnx file, proven."""
    path.write_bytes(graph)
    settings = make_settings(model={"path": str(path), "sha256": ""}, features={}, logging={"format": "json"})
    configure_logging(settings.logging)
    return app.make_service(settings)


def make_beside(thresholds: list[tuple[int, float]], X: Any) -> Any:
    """Return rows with a number on each threshold, and on both sides of it."""
    rows: list[Any] = []
    for feature, threshold in thresholds:
        near = np.float32(threshold)
        below, above = (float(np.nextafter(near, np.float32(end))) for end in (-np.inf, np.inf))
        beside = [np.nextafter(threshold, -np.inf), np.nextafter(threshold, np.inf), threshold - 1e-9, threshold + 1e-9]
        for value in (threshold, float(near), below, above, *beside):
            rows.append(X[len(rows) % len(X)].copy())
            rows[-1][feature] = value
    assert len(rows) > 100
    return np.array(rows)

"""Estimators in files, and settings files beside them."""

import functools
import hashlib
import io
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import joblib
import skops.io
from numpy.lib.recfunctions import repack_fields
from skl2onnx import to_onnx
from skl2onnx.common.data_types import DoubleTensorType
from sklearn.tree._tree import Tree

from tests.lib.servers import PROJECT


def save(estimator: Any, path: Path) -> dict[str, str]:
    """Save an estimator as its suffix says, and return the settings of [model] that trust it."""
    if path.suffix == ".skops":
        skops.io.dump(estimator, path)
    elif path.suffix == ".joblib":
        joblib.dump(estimator, path)
    elif path.suffix == ".onnx":
        path.write_bytes(to_graph(estimator))
    else:
        path.write_bytes(pickle.dumps(estimator))
    return {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def variables(model: dict[str, str]) -> dict[str, str]:
    """Return settings of [model] as the environment gives them."""
    return {f"SERVING_MODEL__{key.upper()}": text for key, text in model.items()}


def copy_project(folder: Path) -> None:
    """Put what is deployed into a folder, to be edited there."""
    for name in ("app.py", "gunicorn.conf.py", "settings.toml"):
        shutil.copy(PROJECT / name, folder)
    for name in ("model", "processes", "serving"):
        shutil.copytree(PROJECT / name, folder / name)


def to_graph(estimator: Any, floats: Any = DoubleTensorType, **options: Any) -> bytes:
    """Convert an estimator of numbers as its owner would, outside the service."""
    types = [("X", floats([None, estimator.n_features_in_]))]
    options = {"zipmap": False} | options if hasattr(estimator, "classes_") else options
    graph: bytes = to_onnx(estimator, initial_types=types, options={id(estimator): options}).SerializeToString()
    return graph


def deploy(folder: Path, estimator: Any, features: str = "") -> str:
    """Save an estimator as `model.joblib` beside a settings file that serves it, and return that file's path."""
    model = save(estimator, folder / "model.joblib")
    file = folder / "settings.toml"
    file.write_text(f'[model]\npath = "model.joblib"\nsha256 = "{model["sha256"]}"\n[features]\n{features}')
    return str(file)


def lay_out(folder: Path, framework: str, worker: str) -> Path:
    """Put the shipped model into a folder, with a settings file for it and two workers, and return that file."""
    shutil.copy(PROJECT / "model/iris.golden.json", folder)
    model = save(load_shipped(), folder / "iris.joblib")
    file = folder / "settings.toml"
    file.write_text(
        f"""
framework = "{framework}"
[server]
worker_class = "{worker}"
workers = 2
bind = "127.0.0.1:0"
[model]
path = "iris.joblib"
sha256 = "{model["sha256"]}"
name = "iris"
[logging]
access = false
"""
    )
    return file


@functools.cache
def load_shipped() -> Any:
    """Return the shipped estimator. As .joblib it is loaded a second faster than as .skops."""
    return skops.io.load(PROJECT / "model/iris.skops")


def choose(file: Path, model: dict[str, str]) -> None:
    """Make a settings file name another artifact, with its hash."""
    text = re.sub(r'^path = ".*"$', f'path = "{model["path"]}"', file.read_text(), flags=re.MULTILINE)
    file.write_text(re.sub(r'^sha256 = ".*"$', f'sha256 = "{model["sha256"]}"', text, flags=re.MULTILINE))


def edit(file: Path, *changes: tuple[str, str]) -> None:
    """Replace each first text, which is there once, by the second."""
    text = file.read_text()
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    file.write_text(text)


class Trap:
    """What a pickle can do to the one who loads it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class OldPickler(pickle.Pickler):
    """Writes the nodes of trees as scikit-learn before 1.3 did."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tree):
            return NotImplemented
        make, arguments, state = value.__reduce__()
        return make, arguments, state | {"nodes": without_missing(state["nodes"])}


def without_missing(nodes: Any) -> Any:
    """Return nodes of trees that do not say where missing values go."""
    kept = [name for name in nodes.dtype.names if name != "missing_go_to_left"]
    return repack_fields(nodes[kept])


def pickle_old(estimator: Any, protocol: int = 4) -> bytes:
    """Pickle an estimator with trees as before scikit-learn 1.3, though with the version that runs."""
    stream = io.BytesIO()
    OldPickler(stream, protocol).dump(estimator)
    return stream.getvalue()

"""Modules and libraries that an artifact needs: where they are found, and what is said where they are not."""

import bz2
import gzip
import hashlib
import importlib
import io
import itertools
import lzma
import pickle
import subprocess
import sys
import types
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
import skops.io
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.tree import DecisionTreeClassifier

import app
from serving.errors import ModelError
from serving.predictor.artifact import load_estimator, read_artifact
from tests.lib.apps import call, make_settings
from tests.lib.artifacts import copy_project, deploy, pickle_old, without_missing
from tests.lib.clients import post_case
from tests.lib.servers import PROJECT, Starter, gunicorn_environment, run
from tests.lib.sizes import each_worker, scale

X = np.random.default_rng(0).normal(size=(60, 3))
y = np.where(X[:, 0] > 0, "high", "low")
ROW = {"x0": 9.0, "x1": 0.0, "x2": 0.0}
HERE = sklearn.__version__.encode()
FEATURES = "x0 = {}\nx1 = {}\nx2 = {}\n"
STEP = """
from sklearn.base import BaseEstimator, TransformerMixin


class Step(TransformerMixin, BaseEstimator):
    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return X
"""


def train(folder: Path, name: str) -> str:
    """Save an estimator with a step of a module in a folder, and return the settings file beside it."""
    file = folder.joinpath(*name.split(".")).with_suffix(".py")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(STEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        for end in range(1, name.count(".") + 2):
            patch.setitem(sys.modules, ".".join(name.split(".")[:end]), types.ModuleType(name))
        exec(STEP, vars(sys.modules[name]))
        step = sys.modules[name].Step
        step.__module__ = name
        return deploy(folder, make_pipeline(step(), LogisticRegression()).fit(X, y), FEATURES)


@pytest.fixture(autouse=True)
def _leave_no_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


@pytest.mark.parametrize("name", ["model", "utils", "bench", "steps.text", "model.steps"])
def test_module_beside_the_settings_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, framework: str, name: str
) -> None:
    """No folder of the project shadows a module of the user's, not even one of which something is imported."""
    monkeypatch.setitem(sys.modules, "model", importlib.import_module("model"))  # as in `python -m model.describe`
    monkeypatch.setenv("SERVING_FRAMEWORK", framework)
    file = train(tmp_path, name)
    before = {*sys.modules}
    try:
        native = app.create_app(app.load_settings(file))
        assert call(native, post_case(ROW)).json["prediction"] == "high"
    finally:
        for added in {*sys.modules} - before:
            if added.partition(".")[0] == name.partition(".")[0]:
                del sys.modules[added]


def test_module_beside_the_settings_shadows_none_of_the_service(tmp_path: Path) -> None:
    """A file there has the name of a library that the service imports late, and is not imported."""
    file = train(tmp_path, "utils")
    for name in ("flask", "pandas", "onnx", "model"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    done = run(["python", "-c", "import app; app.create_app(); import flask"], SERVING_SETTINGS=file)
    assert done.returncode == 0, done.stderr


@each_worker()
def test_module_beside_the_settings_is_found_by_gunicorn(
    serve: Starter, tmp_path: Path, combination: tuple[str, str]
) -> None:
    """Workers have it of their master, and a reload finds it too."""
    server = serve(**gunicorn_environment(*combination, SERVING_SETTINGS=train(tmp_path, "model")))
    assert server.post(ROW).json["prediction"] == "high"
    server.reload()
    assert server.post(ROW).json["prediction"] == "high"


@pytest.mark.parametrize(
    ("command", "framework"), [("uvicorn app:app --port 0", "fastapi"), ("flask --app app run --port 0", "flask")]
)
def test_module_beside_the_settings_is_found_by_commands(
    serve: Starter, tmp_path: Path, command: str, framework: str
) -> None:
    """Development servers look for it in the same place."""
    server = serve(command, SERVING_FRAMEWORK=framework, SERVING_SETTINGS=train(tmp_path, "model"))
    assert server.post(ROW).json["prediction"] == "high"


def test_describe_finds_a_module_named_like_its_own_folder(tmp_path: Path) -> None:
    """Beside settings elsewhere it is found as it is when served; in the project's folder the script has to be run."""
    (tmp_path / "project").mkdir()
    copy_project(tmp_path / "project")
    elsewhere = train(tmp_path / "elsewhere", "model")
    for words, file, folder in (
        (["-m", "model.describe"], elsewhere, PROJECT),
        (["model/describe.py"], elsewhere, PROJECT),
        (["model/describe.py"], train(tmp_path / "project", "model"), tmp_path / "project"),
    ):
        path = Path(file).with_name("model.joblib")
        done = run(["python", *words, str(path), "--trust"], cwd=folder, SERVING_SETTINGS=file)
        assert "x2 = {" in done.stdout, done.stderr


def refusal_of(path: Path, data: bytes, trusted_types: Any = ()) -> str:
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        load_estimator(path, read_artifact(path), [*trusted_types], path.parent)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def naming(module: str, name: str = "Step", version: str = "0.21.3") -> bytes:
    """Return a pickle of an instance of a class, as Python 2 and 3 wrote it, with a version of scikit-learn in it."""
    size = len(version).to_bytes(4, "little")
    state = b"}X\x10\0\0\0_sklearn_versionq\x01X" + size + version.encode() + b"s"
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")\x81" + state + b"b."


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("utils", "needs the module 'utils', which is neither installed, nor in the settings file's folder {folder}; "),
        (
            "mine.steps",
            "needs the module 'mine', which is neither installed, nor in the settings file's folder {folder}",
        ),
        ("model", "needs the module 'model', which is neither installed, nor in the settings file's folder {folder}; "),
        (
            "__main__",
            "needs 'Step', which a notebook or a script has defined; move it to a module in the settings file",
        ),
        ("app", "needs 'Step' of the module 'app', but 'app' is the service's own here; give yours another name"),
        ("app.steps", "needs the module 'app.steps', but 'app' is the service's own here; give yours another name"),
        ("serving.steps", "needs the module 'serving.steps', but 'serving' is the service's own here; give yours an"),
        ("processes", "needs 'Step' of the module 'processes', but 'processes' is the service's own here; give yours"),
        (
            "tests",
            "needs 'Step' of the module 'tests', but 'tests' is {project}/tests/__init__.py here, which lacks it; m",
        ),
        ("empty", "needs 'Step' of the module 'empty', but 'empty' is {folder}/empty.py here, which lacks it; modules"),
        ("cut", "needs {folder}/cut.py, which is no Python in line 1: '(' was never closed"),
        ("lacks", "needs the module 'nowhere' for {folder}/lacks.py, line 1, which is neither installed, nor in the"),
        ("nul", "needs a module, which is no Python: source code string cannot contain null bytes"),
        ("fails", "runs code that fails: {folder}/fails.py, line 2: AttributeError: module 'numpy' has no attribute"),
        ("raises", "runs code that fails: {folder}/raises.py, line 3: ValueError: cannot reshape array of size 3"),
    ],
    ids=lambda value: value if " " not in value else "",
)
def test_missing_module_is_told(tmp_path: Path, module: str, message: str) -> None:
    """The line says what is missing, where it was looked for, and what to do; nothing is called damaged."""
    (tmp_path / "empty.py").touch()
    (tmp_path / "cut.py").write_text("(")
    (tmp_path / "nul.py").write_text("\0")
    (tmp_path / "lacks.py").write_text("import nowhere")
    (tmp_path / "fails.py").write_text("import numpy\nnumpy.int")
    (tmp_path / "raises.py").write_text(
        "import numpy\nclass Step:\n    def __setstate__(self, state): numpy.zeros(3).reshape(7)"
    )
    expected = message.format(folder=tmp_path, project=PROJECT)
    assert refusal_of(tmp_path / "m.pkl", naming(module)).startswith(expected)
    for name in ("empty", "raises"):
        sys.modules.pop(name, None)


def test_class_of_a_notebook_is_told_by_describe(tmp_path: Path) -> None:
    """`python -m model.describe`, which is `__main__` itself then, says the same as a server."""
    (tmp_path / "m.pkl").write_bytes(naming("__main__"))
    words = [sys.executable, "-m", "model.describe", str(tmp_path / "m.pkl"), "--trust"]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)
    assert "needs 'Step', which a notebook or a script has defined; move it to a module" in done.stderr


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("sklearn.ensemble.forest", "another scikit-learn (0.21.3), here {sklearn}; save it anew (it needs the module"),
        ("sklearn.externals.joblib.numpy_pickle", "another scikit-learn (0.21.3), here {sklearn}; save it anew"),
        ("sklearn._loss.loss", "another scikit-learn (0.21.3), here {sklearn}; save it anew (it needs 'Step' of"),
        ("numpy._core.other", "another numpy (of an unknown version), here {numpy}; save it anew (it needs the module"),
        ("pandas.core.indexes.numeric", "another pandas (of an unknown version), here {pandas}; save it anew"),
        (
            "lightgbm.sklearn",
            "another lightgbm (of an unknown version), here {lightgbm}; save it anew (it needs 'Step'",
        ),
    ],
)
def test_module_of_another_version_is_told(tmp_path: Path, module: str, message: str) -> None:
    """What a library has renamed or dropped since names the library and both versions, where they can be told."""
    versions = {name: importlib.import_module(name).__version__ for name in ("sklearn", "numpy", "pandas", "lightgbm")}
    expected = f"was made with {message.format(**versions)}"
    assert refusal_of(tmp_path / "m.joblib", naming(module)).startswith(expected)


FOREST = RandomForestClassifier(2, random_state=0).fit(X, y)


COMPRESSED = [bytes, gzip.compress, zlib.compress, bz2.compress, lzma.compress]
EACH = [*itertools.product([2, 3, 4, 5], COMPRESSED)]


def pickle_older(protocol: int = 4) -> bytes:
    """Pickle a forest as scikit-learn 1.2.2 did."""
    return pickle_old(FOREST, protocol).replace(HERE, b"1.2.2")


@pytest.mark.filterwarnings("ignore:Trying to unpickle")
@pytest.mark.parametrize(("protocol", "compress"), scale([*zip([2, 3, 4, 5, 2], COMPRESSED, strict=True)], EACH))
def test_old_tree_names_both_versions(tmp_path: Path, protocol: int, compress: Any) -> None:
    """The nodes of trees have another type since; the version is found without running the pickle."""
    message = refusal_of(tmp_path / "m.joblib", compress(pickle_older(protocol)))
    expected = f"was made with another scikit-learn (1.2.2), here {HERE.decode()}; save it anew"
    assert message == f"{expected} (ValueError: node array from the pickle has an incompatible dtype)"


def test_old_tree_of_no_version_is_told(tmp_path: Path) -> None:
    """Where a file does not say with which scikit-learn it was made, only that it was another one is known."""
    message = refusal_of(tmp_path / "m.pkl", pickle_old(FOREST))
    assert message.startswith("was made with another scikit-learn (of an unknown version), here ")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_old_skops_names_both_versions(tmp_path: Path, compression: int) -> None:
    """A .skops file has the version in its schema, which may be compressed."""
    source = zipfile.ZipFile(io.BytesIO(skops.io.dumps(DecisionTreeClassifier().fit(X, y))))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as target:
        for name in source.namelist():
            part = source.read(name).replace(HERE, b"1.2.2")
            array = np.load(io.BytesIO(part)) if name.endswith(".npy") else None
            with target.open(name, "w") as file:
                if array is not None and array.dtype.names:
                    np.save(file, without_missing(array))
                else:
                    file.write(part)
    message = refusal_of(tmp_path / "m.skops", stream.getvalue(), ["sklearn.tree._tree.Tree"])
    assert message.startswith("was made with another scikit-learn (1.2.2), here ")


@pytest.mark.filterwarnings("ignore:Trying to unpickle")
def test_cut_file_of_another_version_is_damaged(tmp_path: Path) -> None:
    """A file that ends early is called cut short, whichever version made it."""
    data = pickle_older()
    for size in range(100, len(data), len(data) // 20):
        assert "may be cut short or damaged" in refusal_of(tmp_path / "m.pkl", data[:size])


@pytest.mark.filterwarnings("ignore:Trying to unpickle")
def test_failure_of_an_old_estimator_names_both_versions(tmp_path: Path) -> None:
    """What loads, but lacks what this version reads when it predicts, fails with the versions."""
    estimator = LogisticRegression().fit(X, y)
    del estimator.intercept_
    data = pickle.dumps(estimator).replace(HERE, b"1.2.2")
    (tmp_path / "model.pkl").write_bytes(data)
    trust = {"path": str(tmp_path / "model.pkl"), "sha256": hashlib.sha256(data).hexdigest()}
    message = (
        r"fails on its example row.* has no attribute 'intercept_' \(in LogisticRegression\);"
        r" it was made with another scikit-learn \(1.2.2\)"
    )
    with pytest.raises(ModelError, match=message):
        app.create_app(make_settings(model=trust, features={}))

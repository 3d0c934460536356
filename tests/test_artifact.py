"""Which artifacts are loaded, and why others are not."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import tomllib
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import sklearn
import skops.io
from lightgbm import LGBMClassifier
from sklearn.datasets import load_iris
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import SplineTransformer, StandardScaler

import app
import model.describe
from serving.errors import ModelError, SettingsError, StartupError
from serving.predictor.artifact import FORMATS, refuse_old_sklearn
from serving.predictor.skops_file import sort_types
from tests.lib.apps import call, make_settings, serve_estimator
from tests.lib.artifacts import Trap, save
from tests.lib.clients import post_case
from tests.lib.servers import PROJECT

X, y = load_iris(return_X_y=True)


def make_row(values: Any) -> dict[str, float]:
    return {f"x{column}": value for column, value in enumerate(values)}


@pytest.mark.parametrize("suffix", [suffix for suffix in FORMATS if suffix != ".onnx"])
def test_every_format_is_served(tmp_path: Path, suffix: str) -> None:
    """An artifact of each suffix gives the estimator's own answers."""
    estimator = LogisticRegression(max_iter=1000).fit(X, y)
    answer = call(
        serve_estimator(tmp_path / f"model{suffix}", estimator),
        post_case([make_row(row) for row in X[:60].tolist()]),
    )
    assert [prediction["prediction"] for prediction in answer.json] == estimator.predict(X[:60]).tolist()
    probabilities = [list(prediction["probabilities"].values()) for prediction in answer.json]
    assert probabilities == estimator.predict_proba(X[:60]).tolist()


def train_again(hash_seed: str) -> bytes:
    code = "import sys; from model.train import dump, train; sys.stdout.buffer.write(b'bytes:' + dump(train()))"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, check=True)
    return done.stdout.partition(b"bytes:")[2]


def test_shipped_artifact_comes_from_its_script() -> None:
    """Training gives the same bytes every time, and the committed file's model up to a processor's rounding."""
    data = train_again("1")
    assert data == train_again("2")
    again, shipped = skops.io.loads(data), skops.io.load(PROJECT / "model/iris.skops")
    np.testing.assert_allclose(again.coef_, shipped.coef_, rtol=1e-9)
    assert again.get_params() == shipped.get_params()


def test_untrusted_types_are_named(tmp_path: Path) -> None:
    """A .skops file with types that skops does not trust is refused with the setting that would trust them."""
    estimator = RandomForestClassifier(n_estimators=2).fit(X, y)
    path = tmp_path / "model.skops"
    with pytest.raises(ModelError, match=r'set model.trusted_types = \["sklearn.tree._tree.Tree"\]'):
        serve_estimator(path, estimator)
    trusted = serve_estimator(path, estimator, model={"trusted_types": ["sklearn.tree._tree.Tree"]})
    assert call(trusted, post_case(make_row(X[0].tolist()))).json["prediction"] == 0


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        ({"weights": [1, 2]}, ".joblib", r"holds a dict, which has no predict\(\)"),
        (StandardScaler(), ".pickle", r"holds a StandardScaler, which has no predict\(\)"),
        (LogisticRegression(), ".joblib", "holds a LogisticRegression that is not fitted"),
        (LogisticRegression, ".pickle", "holds the class LogisticRegression"),
    ],
    ids=["dict", "transformer", "unfitted", "class"],
)
def test_no_predictor_is_refused(tmp_path: Path, content: Any, suffix: str, message: str) -> None:
    """What is loaded must be a fitted estimator that predicts."""
    with pytest.raises(ModelError, match=message):
        serve_estimator(tmp_path / f"model{suffix}", content)


def refusal_of(path: Path, sha256: str | None = None) -> str:
    """Return the message with which a file is refused, though its hash is trusted."""
    trusted = hashlib.sha256(path.read_bytes()).hexdigest() if sha256 is None else sha256
    with pytest.raises(ModelError) as caught:
        app.create_app(make_settings(model={"path": str(path), "sha256": trusted}, features={}))
    return str(caught.value)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99], ids=str)
def test_truncated_artifact_is_refused(tmp_path: Path, suffix: str, kept: float) -> None:
    """Of a file that is cut short, or empty, the message says that it may be."""
    path = tmp_path / f"model{suffix}"
    save(LogisticRegression(max_iter=1000).fit(X, y), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept < 1 else int(kept)])
    kind = {".pkl": "pickle"}.get(suffix, suffix[1:])
    message = refusal_of(path)
    assert str(path) in message
    assert re.search(f"cannot be loaded as {kind}, and may be cut short or damaged|or part of one|is empty", message)


COMPRESSED = {"zlib": 3, "gzip": ("gzip", 3), "bz2": ("bz2", 3), "lzma": ("lzma", 3), "xz": ("xz", 3)}


@pytest.mark.parametrize(
    ("written", "suffix", "message"),
    [
        (".skops", ".joblib", "is no joblib file but skops; name it .skops"),
        (".skops", ".pkl", "is no pickle file but skops; name it .skops"),
        (".joblib", ".skops", "is no skops file but joblib; name it .joblib"),
        (".joblib", ".pkl", "is no pickle file but joblib; name it .joblib"),
        (".pickle", ".skops", "is no skops file but pickle; name it .pickle"),
        (".onnx", ".joblib", "is no joblib file but onnx; name it .onnx"),
        (".skops", ".onnx", "is no onnx file but skops; name it .skops"),
    ],
)
def test_other_format_is_named(tmp_path: Path, written: str, suffix: str, message: str) -> None:
    """A file of another format than its suffix says is refused with both names, before anything in it runs."""
    save(LogisticRegression(max_iter=1000).fit(X, y), tmp_path / f"model{written}")
    path = (tmp_path / f"model{written}").rename(tmp_path / f"other{suffix}")
    assert message in refusal_of(path)
    assert message in refusal_of(path, sha256="")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\3\4 of something else", "but a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "but a Git LFS pointer, whose file was not fetched"),
        (b"\x89HDF\r\n", "but HDF5"),
        (b"nonsense", "cannot be loaded as"),
    ],
    ids=["zip", "lfs", "hdf5", "text"],
)
def test_foreign_file_is_refused(tmp_path: Path, suffix: str, data: bytes, message: str) -> None:
    """A file that is none of the formats is refused, and named where it is well known."""
    path = tmp_path / f"model{suffix}"
    path.write_bytes(data)
    assert message in refusal_of(path)


@pytest.mark.parametrize("compress", COMPRESSED.values(), ids=COMPRESSED)
def test_compressed_joblib_is_served(tmp_path: Path, compress: Any) -> None:
    """What joblib compressed is a joblib file, and not one of another kind."""
    path = tmp_path / "model.joblib"
    joblib.dump(LogisticRegression(max_iter=1000).fit(X, y), path, compress=compress)
    trust = {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest().upper()}
    native = app.create_app(make_settings(model=trust, features={}))
    assert call(native, post_case(make_row(X[0].tolist()))).json["prediction"] == 0
    path.rename(tmp_path / "model.pkl")
    assert "is no pickle file but joblib; name it .joblib" in refusal_of(tmp_path / "model.pkl")


@pytest.mark.parametrize("suffix", [".joblib", ".pickle", ".pkl"])
def test_code_runs_only_from_trusted_bytes(tmp_path: Path, suffix: str) -> None:
    """Without the hash of these very bytes in the settings, nothing of a pickle is loaded."""
    path, mark = tmp_path / f"model{suffix}", tmp_path / "mark"
    path.write_bytes(pickle.dumps(Trap(os.mkdir, str(mark))))
    assert "runs code when it is loaded; set model.sha256 to the hash of a file that you trust" in refusal_of(path, "")
    message = refusal_of(path, "0" * 64)
    assert f"has the sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}, but" in message
    assert f"model.sha256 is {'0' * 64}: it is not the file that you trusted" in message
    assert not mark.exists()
    assert "holds a NoneType, which has no predict()" in refusal_of(path)
    assert mark.exists()


def test_hash_is_held_to_for_skops_too(tmp_path: Path) -> None:
    """A .skops file goes without a hash, but where there is one it must match."""
    path = tmp_path / "model.skops"
    save(LogisticRegression(max_iter=1000).fit(X, y), path)
    assert "it is not the file that you trusted" in refusal_of(path, "0" * 64)


def test_artifact_is_read_once(tmp_path: Path) -> None:
    """The bytes that are hashed are the bytes that are loaded: they are read once."""
    trust = save(LogisticRegression(max_iter=1000).fit(X, y), tmp_path / "model.pkl")
    opened: list[str] = []
    watched = True

    def note(event: str, arguments: Any) -> None:  # no hook can be taken away
        if watched and event == "open" and str(arguments[0]) == trust["path"] and arguments[1] is None:
            opened.append(arguments[0])

    sys.addaudithook(note)
    try:
        native = app.create_app(make_settings(model=trust, features={}))
    finally:
        watched = False
    assert len(opened) == 1
    assert call(native, post_case(make_row(X[0].tolist()))).status == 200


@pytest.mark.parametrize("name", ["model.pkl", "model.golden.json"])
def test_pipe_and_device_are_refused(tmp_path: Path, name: str) -> None:
    """A pipe, whose reader would wait for a writer, a device without an end, a socket: none of them is read."""
    trust = save(LogisticRegression(max_iter=1000).fit(X, y), tmp_path / "model.pkl")
    place = tmp_path / name
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), bind_socket):
        place.unlink(missing_ok=True)
        make(place)
        with pytest.raises(ModelError, match=r"cannot be read|which is no file"):
            app.create_app(make_settings(model=trust, features={}))


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def test_trust_never_comes_from_beside_the_artifact(tmp_path: Path) -> None:
    """A golden file that brings types to trust is refused, like any other key that it should not have."""
    save(RandomForestClassifier(n_estimators=2).fit(X, y), tmp_path / "model.skops")
    golden = {"versions": {}, "rows": [{}], "predictions": [{}], "trusted_types": ["sklearn.tree._tree.Tree"]}
    (tmp_path / "model.golden.json").write_text(json.dumps(golden))
    assert "holds types that are not trusted" in refusal_of(tmp_path / "model.skops")
    message = refusal_of(shutil.copy(PROJECT / "model/iris.skops", tmp_path / "model.skops"))
    assert "has model.golden.json beside it, in which trusted_types should not be there" in message


@pytest.mark.parametrize(
    ("trap", "message"),
    [
        (Trap(sys.exit, 0), "cannot be loaded as pickle, and may be cut short or damaged: SystemExit: 0"),
        (Trap(int, "x"), "ValueError: invalid literal for int"),
        (b"\x80\x04csys\nThing\n.", "needs 'Thing' of the module 'sys', but 'sys' is part of Python here"),
        (b"\x80\x04cno_such_module\nThing\n.", "needs the module 'no_such_module', which is neither installed, nor in"),
    ],
    ids=["exit", "error", "class", "module"],
)
def test_failure_while_loading_is_told(tmp_path: Path, trap: Any, message: str) -> None:
    """Whatever loading raises, an exit too, ends in one message."""
    path = tmp_path / "model.pkl"
    path.write_bytes(trap if isinstance(trap, bytes) else pickle.dumps(trap))
    assert message in refusal_of(path)


@pytest.mark.parametrize("version", ["1.5.2", "0.24.1", "1.5.dev0"])
def test_old_scikit_learn_is_refused(version: str) -> None:
    """A scikit-learn whose estimators are not read here is one line that says which is the oldest."""
    with pytest.raises(StartupError, match=f"scikit-learn is {version}, but 1.6 is the oldest that is supported"):
        refuse_old_sklearn(version)


@pytest.mark.parametrize("version", ["1.6.0", "1.10.0", "2.0rc1", sklearn.__version__])
def test_newer_scikit_learn_is_not_refused(version: str) -> None:
    """Versions are compared as numbers."""
    refuse_old_sklearn(version)


def craft(path: Path, node: dict[str, Any], **options: Any) -> Path:
    """Write a .skops file by hand, of a node of its schema."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("schema.json", json.dumps(node | {"protocol": 2, "_skops_version": "0.16.0"}))
    return path


def function_node(name: str) -> dict[str, Any]:
    module, _, function = name.rpartition(".")
    return {"__class__": function, "__module__": module, "__loader__": "FunctionNode", "__id__": 1}


@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "builtins.eval", "numpy.load"])
def test_type_that_runs_code_is_never_offered(tmp_path: Path, name: str) -> None:
    """Neither the line of a refusal nor `model.describe` has it ready to be pasted, and a setting cannot trust it."""
    path = craft(tmp_path / "model.skops", function_node(name))
    message = refusal_of(path, "")
    assert f"names '{name}', which runs code or opens files for whoever made it; do not load it" in message
    assert "trusted_types" not in message
    with pytest.raises(ModelError, match="do not load it"):
        model.describe.describe(path, True, None)
    file = tmp_path / "settings.toml"
    file.write_text(f'[model]\ntrusted_types = ["{name}"]\n')
    with pytest.raises(SettingsError, match=f"model.trusted_types is .* it should be without '{name}', which runs"):
        app.load_settings(file)


@pytest.mark.parametrize(
    "name",
    [
        *("numpy.fromfile", "sklearn.utils._testing.check_output", "somebody.Step"),
        *("numpy.memmap", "numpy._core.memmap.memmap", "numpy._core.memmap", "numpy.lib.npyio.NpzFile"),
        *("sklearn.tree._export.export_graphviz", "sklearn.tree.export_graphviz", "sklearn.utils.check_array"),
        *("sklearn.datasets.load_files", "lightgbm.Dataset", "xgboost.DMatrix", "catboost.Pool"),
    ],
)
def test_type_of_which_nothing_is_known_is_named_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """What may open files is told by what it is, not by one of its names: whoever adds it should know it."""
    path = craft(tmp_path / "model.skops", function_node(name))
    assert f"not trusted; add '{name}' to model.trusted_types only if you know what it does" in refusal_of(path, "")
    model.describe.describe(path, False, None)
    printed = capsys.readouterr().out
    assert tomllib.loads(printed)["model"]["trusted_types"] == []
    assert f"# and '{name}', only if you know what it does" in printed


def test_types_of_an_estimator_can_be_pasted(tmp_path: Path) -> None:
    """What scikit-learn and LightGBM keep in estimators is offered, functions of scikit-learn's own too."""
    for estimator in (
        make_pipeline(SelectKBest(f_classif, k=2), HistGradientBoostingClassifier(max_iter=2)),
        LGBMClassifier(n_estimators=2, n_jobs=1, verbosity=-1),
        make_pipeline(SplineTransformer(), KNeighborsClassifier(algorithm="kd_tree")),
    ):
        path = tmp_path / "model.skops"
        save(estimator.fit(X, y), path)
        types = json.loads(refusal_of(path, "").partition("set model.trusted_types = ")[2])
        native = serve_estimator(path, estimator, model={"trusted_types": types})
        assert call(native, post_case(make_row(X[0].tolist()))).json["prediction"] == 0


@pytest.mark.parametrize(
    "name",
    [
        *("sklearn.metrics.pairwise.rbf_kernel", "sklearn.metrics._regression.r2_score", "scipy.special.expit"),
        *("sklearn.feature_selection.f_classif", "sklearn.feature_extraction.text.strip_accents_ascii"),
        *("sklearn.preprocessing.scale", "sklearn.tree._tree.Tree", "lightgbm.sklearn.LGBMRegressor"),
    ],
)
def test_function_that_computes_can_be_pasted(name: str) -> None:
    """Functions that estimators keep are offered."""
    assert sort_types([name]) == ([name], [])


def test_trusted_type_that_does_not_occur_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may be there for an older artifact, so it is a warning."""
    types = ["sklearn.tree._tree.Tree", "sklearn.tree._tree.Trees"]
    forest = RandomForestClassifier(n_estimators=2).fit(X, y)
    serve_estimator(tmp_path / "model.skops", forest, model={"trusted_types": types}, logging={"format": "json"})
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (line["event"], line["level"]) == ("trusted_types_unused", "warning")
    assert line["types"] == ["sklearn.tree._tree.Trees"]


def make_bomb(path: Path, claimed: int) -> None:
    """Write a .skops file of a gigabyte of blanks, whose directory claims another size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("schema.json", "w") as part:
        for _ in range(1024):
            part.write(b" " * (1 << 20))
    data = bytearray(path.read_bytes())
    directory = data.rindex(b"PK\1\2")
    struct.pack_into("<I", data, directory + 24, claimed)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("claimed", "message"),
    [
        (1 << 30, f"unpacks to {1 << 30} bytes, more than {100 * 1_043_760}, which is 100 times its size or 64 MB"),
        (1 << 20, "cannot be loaded as skops, and may be cut short or damaged: BadZipFile: Bad CRC-32"),
    ],
    ids=["honest", "lying"],
)
def test_bomb_is_refused_before_it_unpacks(tmp_path: Path, claimed: int, message: str) -> None:
    """A megabyte that is a gigabyte when it is unpacked takes neither its memory nor its time."""
    path = tmp_path / "model.skops"
    make_bomb(path, claimed)
    tracemalloc.start()
    try:
        assert message in refusal_of(path, "")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("compression", "is_served"), [(zipfile.ZIP_DEFLATED, True), (zipfile.ZIP_BZIP2, False), (zipfile.ZIP_LZMA, False)]
)
def test_compressed_skops(tmp_path: Path, compression: int, is_served: bool) -> None:
    """What skops compressed as zip does is served; of what others compress, nobody can say how far it unpacks."""
    path = tmp_path / "model.skops"
    skops.io.dump(LogisticRegression(max_iter=1000).fit(X, y), path, compression=compression)
    if is_served:
        native = app.create_app(make_settings(model={"path": str(path)}, features={}))
        assert call(native, post_case(make_row(X[0].tolist()))).json["prediction"] == 0
    else:
        assert "is compressed by bzip2 or LZMA; save it with compression=zipfile.ZIP_DEFLATED" in refusal_of(path, "")


@pytest.mark.parametrize("suffix", [".skops", ".joblib"])
@pytest.mark.parametrize("given", ["filename", "file"])
def test_vectorizer_of_files_is_refused(tmp_path: Path, suffix: str, given: str) -> None:
    """Its texts would be names of files that the service opens for clients."""
    (tmp_path / "a.txt").write_text("a fox")
    names = [io.StringIO("a fox") if given == "file" else str(tmp_path / "a.txt") for _ in "ab"]
    union = make_union(TfidfVectorizer(), CountVectorizer(input=given))
    union.transformer_list[1][1].fit(names)
    union.transformer_list[0][1].fit(["a fox"])
    estimator = make_pipeline(union, LogisticRegression().fit([[0, 1], [1, 0]], [0, 1]))
    message = f"has a CountVectorizer with input='{given}', for which clients would name files to open; make it with"
    with pytest.raises(ModelError, match=message):
        serve_estimator(tmp_path / f"model{suffix}", estimator)

"""What the predictor loads, what it refuses, and what it answers."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import estimators
import joblib
import numpy as np
import pytest
import skops.io
from cases import Case
from conftest import PROJECT, ROW, call, make_settings, post_case
from sklearn.datasets import load_diabetes, load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

import app

X, y = load_iris(return_X_y=True)
SAVE = {
    ".skops": skops.io.dump,
    ".joblib": joblib.dump,
    ".pickle": lambda estimator, path: path.write_bytes(pickle.dumps(estimator)),
    ".pkl": lambda estimator, path: path.write_bytes(pickle.dumps(estimator)),
}


def serve_estimator(tmp_path: Path, estimator: Any, suffix: str = ".joblib", **model: Any) -> Any:
    """Save an estimator and build the FastAPI app around it."""
    path = tmp_path / f"model{suffix}"
    SAVE[suffix](estimator, path)
    return app.create_app(make_settings(model={"path": str(path)} | model, features={}))


def make_row(values: Any) -> dict[str, float]:
    return {f"x{column}": value for column, value in enumerate(values)}


@pytest.mark.parametrize("suffix", app.LOADERS)
def test_every_format_is_served(tmp_path: Path, suffix: str) -> None:
    """An artifact of each suffix gives the estimator's own answers."""
    estimator = LogisticRegression(max_iter=1000).fit(X, y)
    answer = call(serve_estimator(tmp_path, estimator, suffix), post_case([make_row(row) for row in X[:60].tolist()]))
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


def test_shipped_model_knows_names_and_species(framework: str) -> None:
    """The features are the four of Fisher's data, in cm, and the classes are the species."""
    service = app.make_service(make_settings(framework=framework))
    assert service.contract.names == ["sepal_length", "sepal_width", "petal_length", "petal_width"]
    assert service.predictor.classes == ["setosa", "versicolor", "virginica"]
    predictions = service.predictor.predict(X)
    accuracy = np.mean(
        [load_iris().target_names[label] == p["prediction"] for label, p in zip(y, predictions, strict=True)]
    )
    assert accuracy > 0.95


def test_regressor_answers_a_number(tmp_path: Path) -> None:
    """Without classes there are no probabilities."""
    X, y = load_diabetes(return_X_y=True)
    estimator = LinearRegression().fit(X, y)
    answer = call(serve_estimator(tmp_path, estimator), post_case(make_row(X[0].tolist())))
    assert answer.json == {"prediction": estimator.predict(X[:1])[0]}


def test_answer_that_is_no_number_is_null(tmp_path: Path) -> None:
    """What JSON cannot say becomes null, so that the answer stays JSON."""
    assert call(serve_estimator(tmp_path, estimators.Undecided()), post_case({"x0": 1})).json == {"prediction": None}


def test_large_numbers_do_not_crash_a_forest(tmp_path: Path) -> None:
    """Trees compute in float32: what is larger is a bad cell."""
    native = serve_estimator(tmp_path, RandomForestClassifier(n_estimators=2).fit(X, y))
    assert call(native, post_case(make_row([3.4e38, -3.4e38, 1e-320, 0]))).status == 200
    assert call(native, post_case(make_row([3.5e38, 0, 0, 0]))).json["detail"][0]["loc"] == ["body", "x0"]


@pytest.mark.parametrize("columns", [[y, y], [y, y == 0]], ids=["alike", "unlike"])
def test_several_outputs_are_refused(tmp_path: Path, columns: list[Any]) -> None:
    """A classifier of several outputs is refused at the start."""
    estimator = RandomForestClassifier(n_estimators=2).fit(X, np.column_stack(columns))
    with pytest.raises(app.ModelError, match="holds a RandomForestClassifier of 2 outputs"):
        serve_estimator(tmp_path, estimator)


def test_classifier_without_probabilities_answers_a_class(tmp_path: Path) -> None:
    """An estimator without predict_proba gives its class alone."""
    answer = call(serve_estimator(tmp_path, LinearSVC().fit(X, y)), post_case(make_row(X[0].tolist())))
    assert answer.json == {"prediction": 0}


def test_named_pipeline_does_not_warn(tmp_path: Path) -> None:
    """An estimator fitted on named columns is asked without names, and says nothing of it: warnings are errors here."""
    frame = load_iris(as_frame=True).data.set_axis(list(ROW), axis="columns")
    estimator = make_pipeline(StandardScaler(), LogisticRegression()).fit(frame, y)
    assert call(serve_estimator(tmp_path, estimator), post_case(ROW)).json["prediction"] == 0


def test_untrusted_types_are_named(tmp_path: Path) -> None:
    """A .skops file with types that skops does not trust is refused with the setting that would trust them."""
    estimator = RandomForestClassifier(n_estimators=2).fit(X, y)
    with pytest.raises(app.ModelError, match=r'set model.trusted_types = \["sklearn.tree._tree.Tree"\]'):
        serve_estimator(tmp_path, estimator, ".skops")
    trusted = serve_estimator(tmp_path, estimator, ".skops", trusted_types=["sklearn.tree._tree.Tree"])
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
    with pytest.raises(app.ModelError, match=message):
        serve_estimator(tmp_path, content, suffix)


@pytest.mark.parametrize("suffix", app.LOADERS)
@pytest.mark.parametrize("data", [b"", b"nonsense", b"PK\3\4 cut"], ids=["empty", "text", "cut"])
def test_damaged_artifact_is_refused(tmp_path: Path, suffix: str, data: bytes) -> None:
    """Bytes that are not of the suffix's format are refused with its name."""
    path = tmp_path / f"model{suffix}"
    path.write_bytes(data)
    kind = {".pkl": "pickle"}.get(suffix, suffix[1:])
    with pytest.raises(app.ModelError, match=f"cannot be loaded as {kind}"):
        app.create_app(make_settings(model={"path": str(path)}))


def test_array_keeps_the_order_of_the_features() -> None:
    """Columns follow the estimator's order, whatever the order of the keys."""
    contract = app.make_service(make_settings()).contract
    rows = contract.parse_payload([dict(reversed(ROW.items())), ROW])
    assert contract.to_array(rows).tolist() == [list(ROW.values())] * 2


FEATURES = {
    "sepal_length": {"ge": 0, "le": 10},
    "sepal_width": {"type": "int"},
    "petal_length": {"type": "bool"},
    "petal_width": {"missing": True},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sepal_length": -1}, "greater than or equal to 0"),
        ({"sepal_length": 11}, "less than or equal to 10"),
        ({"sepal_width": 3.5}, "valid integer"),
        ({"sepal_width": True}, "valid integer"),
        ({"sepal_width": 2**53 + 1}, "less than or equal to 9007199254740992"),
        ({"sepal_width": -(10**400)}, "greater than or equal to -9007199254740992"),
        ({"petal_length": 1}, "valid boolean"),
        ({"sepal_length": None}, "valid number"),
    ],
    ids=str,
)
def test_features_of_settings_are_held_to(framework: str, change: dict[str, Any], message: str) -> None:
    """Types and bounds of [features] refuse what does not fit."""
    settings = make_settings(framework=framework, features=FEATURES)
    good = {"sepal_length": 5.1, "sepal_width": 3, "petal_length": True, "petal_width": None}
    answer = call(app.create_app(settings), post_case(good | change))
    assert answer.status == 422
    assert message in answer.json["detail"][0]["msg"]


def test_answer_to_many_bad_cells_is_bounded() -> None:
    """At most 1000 bad cells are named, in little time, however many there are; what was sent is repeated once."""
    contract = app.make_service(make_settings()).contract
    started = time.process_time()
    payloads = (
        ([{}] * 10_000, 2 * 10**6),
        ({f"a{number}": 1 for number in range(200_000)}, 2 * 10**6),
        ([{"a": "x" * 10**6}], 2 * 10**6),
        ([{f"a{number}": 1 for number in range(120)}] * 9_000, 2 * 10**6),
        ([{"a" * 8_000_000: 1}], 9 * 10**6),
    )
    for payload, most_bytes in payloads:
        with pytest.raises(app.Unprocessable) as caught:
            contract.parse_payload(payload)
        assert len(caught.value.detail) <= 1000
        assert len(app.Response.of(caught.value.detail, 422).body) < most_bytes
    assert time.process_time() - started < 5


def test_missing_value_reaches_the_estimator_as_nan() -> None:
    """A null is NaN in the array where the feature may be missing, and true is 1."""
    contract = app.make_service(make_settings(features=FEATURES)).contract
    rows = contract.parse_payload({"sepal_length": 5, "sepal_width": 3, "petal_length": True, "petal_width": None})
    np.testing.assert_array_equal(contract.to_array(rows), [[5.0, 3.0, 1.0, np.nan]])


def test_names_of_settings_name_a_nameless_model(tmp_path: Path) -> None:
    """An estimator fitted on arrays takes the names of [features], in their order, if they are as many."""
    joblib.dump(LogisticRegression(max_iter=1000).fit(X, y), tmp_path / "model.joblib")
    model = {"path": str(tmp_path / "model.joblib")}
    named = app.Settings(model=model, features={name: {} for name in ROW})
    assert call(app.create_app(named), post_case(ROW)).json["prediction"] == 0
    with pytest.raises(app.SettingsError, match="names 1 features; the model takes 4"):
        app.create_app(app.Settings(model=model, features={"a": {}}))


def test_crash_answers_500_without_internals(tmp_path: Path, framework: str) -> None:
    """What an estimator raises is nobody's business but the log's."""
    joblib.dump(estimators.Failing(), tmp_path / "model.joblib")
    settings = make_settings(framework=framework, model={"path": str(tmp_path / "model.joblib")}, features={})
    answer = call(app.create_app(settings), post_case({"x0": 1.5}))
    assert answer.status == 500
    assert answer.json == {"detail": "internal error; the log has it under this X-Request-ID"}


@pytest.mark.parametrize(
    "header",
    [{"Authorization": "Bearer two"}, {"Authorization": "bearer one"}, {"X_API_Key": "one"}, {"X_API_Key": "clé"}],
)
def test_valid_key_is_let_in(framework: str, header: dict[str, str]) -> None:
    """Either header carries a key, and any key of the list counts."""
    native = app.create_app(make_settings(framework=framework, auth={"api_keys": ["one", "two", "clé"]}))
    assert call(native, post_case(ROW, **header)).status == 200


@pytest.mark.parametrize(
    "header",
    [{}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}, {"X_API_Key": "on"}, {"X_API_Key": "é"}],
)
def test_invalid_key_is_refused(framework: str, header: dict[str, str]) -> None:
    """Without a key of the list there are no predictions, but health answers."""
    native = app.create_app(make_settings(framework=framework, auth={"api_keys": ["one", "two"]}))
    answer = call(native, post_case(ROW, **header))
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert "X-API-Key: KEY" in answer.json["detail"]
    assert call(native, Case("get", "GET", "/health/ready")).status == 200
    assert call(native, Case("get", "GET", "/openapi.json")).status == 401

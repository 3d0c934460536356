"""Code of the user's gets rows in the form in which it takes them, which the proof finds out."""

import json
from pathlib import Path
from typing import Any

import pytest
import sklearn
from sklearn.compose import ColumnTransformer
from sklearn.preprocessing import FunctionTransformer

from model.describe import describe
from serving.predictor.golden import running_versions
from serving.predictor.model import Way
from tests.lib import steps
from tests.lib.apps import call, serve_estimator
from tests.lib.artifacts import deploy
from tests.lib.clients import post_case
from tests.lib.field import DATES, SIZES, TEXTS, step
from tests.lib.servers import PROJECT, Starter, gunicorn_environment
from tests.lib.sizes import each_worker


def way_of(native: Any) -> Way:
    """Return the way in which an app asks its estimator."""
    service = native.state.serving.service if hasattr(native, "state") else native.extensions["serving"].service
    way: Way = service.model.ways[service.proof.way]
    return way


@each_worker()
def test_workers_ask_as_was_proven(serve: Starter, tmp_path: Path, combination: Any) -> None:
    """What the proving child finds out, a DataFrame for a step and pandas between steps, is how workers ask."""
    transformer = ColumnTransformer([("a", "passthrough", ["weight", "size"])], verbose_feature_names_out=False)
    estimator = step(SIZES, steps.Renamed(), transformer, steps.Chosen(), output="pandas")
    file = deploy(tmp_path, estimator, "size = {}\nweight = {}\n")
    server = serve(PYTHONPATH=str(PROJECT), **gunicorn_environment(*combination, SERVING_SETTINGS=file))
    assert [server.post({"size": size, "weight": 1}).json for size in (2, 5)] == [
        {"prediction": 2.0},
        {"prediction": 5.0},
    ]
    assert server.post([{"size": 3, "weight": 0}]).json == [{"prediction": 3.0}]
    server.stop()


@pytest.mark.parametrize(
    ("estimator", "features", "way"),
    [
        (
            lambda: step(DATES, steps.Months()),
            {"when": {"type": "str", "example": "2026-01-01"}, "size": {}},
            Way("frame", "str"),
        ),
        (lambda: step(SIZES, steps.ByName()), {"size": {}, "weight": {}}, Way("frame", "object")),
        (lambda: step(SIZES.to_numpy(), steps.ByPlace()), {"size": {}, "weight": {}}, Way("array", "object")),
        (lambda: step(SIZES, FunctionTransformer()), {}, Way("array", "object")),
    ],
    ids=["texts", "by-name", "by-place", "scikit-learn's"],
)
def test_form_is_the_one_that_works(tmp_path: Path, framework: str, estimator: Any, features: Any, way: Way) -> None:
    """Mixed columns are a DataFrame, numbers an array unless only a DataFrame works."""
    assert (
        way_of(serve_estimator(tmp_path / "model.joblib", estimator(), features=features, framework=framework)) == way
    )


def test_golden_rows_name_and_type_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without settings, golden rows name the columns of a step that does not, and say which of them are texts."""
    estimator = step(TEXTS, steps.Lengths())
    rows = json.loads(TEXTS.head(3).to_json(orient="records"))
    golden = {
        "versions": running_versions(),
        "rows": rows,
        "predictions": [{"prediction": float(len(r["city"]) + r["size"])} for r in rows],
    }
    (tmp_path / "model.golden.json").write_text(json.dumps(golden))
    native = serve_estimator(tmp_path / "model.joblib", estimator)
    assert call(native, post_case({"city": "bbb", "size": 2})).json == {"prediction": 5.0}
    (tmp_path / "model.golden.json").unlink()
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    describe(tmp_path / "model.joblib", trust=True, golden=tmp_path / "rows.json")
    assert json.loads((tmp_path / "model.golden.json").read_text())["predictions"] == golden["predictions"]


def test_setting_of_scikit_learn_is_left_as_it_was(tmp_path: Path) -> None:
    """A model that needs DataFrames between its steps does not make others in this thread use them."""
    transformer = ColumnTransformer([("a", "passthrough", ["weight", "size"])], verbose_feature_names_out=False)
    estimator = step(SIZES, transformer, steps.Chosen(), output="pandas")
    native = serve_estimator(tmp_path / "model.joblib", estimator)
    assert call(native, post_case({"size": 3, "weight": 1})).json == {"prediction": 3.0}
    assert way_of(native).output == "pandas"
    assert sklearn.get_config()["transform_output"] == "default"

"""Code of the user's gets rows in the form in which it takes them, which the proof finds out, and messages say where it
failed."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import sklearn
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from model.describe import describe
from serving.errors import ModelError
from serving.predictor.failures import tell
from serving.predictor.golden import running_versions
from serving.predictor.inputs import Form
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


FAILURES = {
    "value": (
        steps.stop_at_zero,
        r"fails on its example row, of which 'x0' is made up; give examples in \[features\], or golden rows: "
        r"ValueError: a size should be more than nothing \(in stop_at_zero, .*steps\.py:\d+\)$",
    ),
    "code": (
        steps.recur_at_zero,
        r"has code that fails on its example row: RecursionError: .* \(in recur_at_zero, .*steps\.py:\d+\); "
        r"'x0' is taken for a number, and other types go into \[features\]$",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_message_says_what_failed_and_where(tmp_path: Path, name: str) -> None:
    """A row is blamed for its values only, and the line of the user's code is named."""
    function, message = FAILURES[name]
    estimator = make_pipeline(FunctionTransformer(function), LogisticRegression())
    estimator.fit(np.arange(1.0, 9.0).reshape(-1, 1), [0, 1] * 4)
    with pytest.raises(ModelError, match=message):
        serve_estimator(tmp_path / "model.joblib", estimator)


def test_message_names_the_estimator_that_failed(tmp_path: Path) -> None:
    """Where no code of the user's is involved, the innermost estimator is named, and no row is blamed."""
    estimator = RandomForestClassifier(n_estimators=2).fit(np.arange(8.0).reshape(-1, 1), [0, 1] * 4)
    del estimator.estimators_[0].tree_
    message = r"has code that fails on its example row: AttributeError: .*'tree_' \(in DecisionTreeClassifier\)$"
    with pytest.raises(ModelError, match=message):
        serve_estimator(tmp_path / "model.joblib", estimator)


def test_message_tells_the_same_failure_once(tmp_path: Path) -> None:
    """What fails alike given a DataFrame and given an array is told once."""
    estimator = make_pipeline(steps.Unfinished(), LogisticRegression().fit([[0], [1]], [0, 1]))
    features = {"city": {"type": "str"}, "size": {"example": 1}}
    with pytest.raises(
        ModelError, match=r"has code that fails on its example row: .* \(in Unfinished\.transform, [^()]*\)$"
    ):
        serve_estimator(tmp_path / "model.joblib", estimator, features=features)


@pytest.mark.parametrize("name", ["serving_utils.py", "serving/steps.py"])
def test_module_beside_the_service_is_the_users(name: str) -> None:
    """A file whose name only begins like the service's folder is none of the service."""
    scope: dict[str, Any] = {}
    exec(compile("def step():\n    raise ValueError('no')", str(PROJECT / name), "exec"), scope)
    with pytest.raises(ValueError, match="no") as caught:
        scope["step"]()
    is_ours = name.startswith("serving/")
    assert ("step, " in tell(caught.value)) is not is_ours


def test_way_is_named_as_in_a_sentence() -> None:
    """Each form has its article."""
    names = [str(Way(form, "object")) for form in get_args(Form)]
    assert names == ["an array", "a DataFrame", "a list of texts"]

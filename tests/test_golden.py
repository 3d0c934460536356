"""The golden rows beside an artifact: reproduced at the start, or refused; and `model.describe`, which writes them."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder
from sklearn.tree import DecisionTreeClassifier

import app
import model.describe
from serving.errors import ModelError
from serving.predictor.golden import is_close, running_versions, sizes_of
from tests.lib import estimators, steps
from tests.lib.apps import call, make_settings, serve_estimator
from tests.lib.artifacts import Trap, deploy, save
from tests.lib.clients import ROW, post_case
from tests.lib.pipelines import PENGUINS, fitted, rows_of
from tests.lib.servers import GUNICORN, PROJECT, Starter, gunicorn_environment, run_gunicorn
from tests.lib.sizes import each_combination

SHIPPED = json.loads((PROJECT / "model/iris.golden.json").read_text())
GOLDEN = SHIPPED | {"versions": running_versions()}


@pytest.fixture
def iris(tmp_path: Path) -> Path:
    """A copy of the shipped artifact and its golden rows, as if these had been made here."""
    shutil.copy(PROJECT / "model/iris.skops", tmp_path)
    write(tmp_path / "iris.golden.json", GOLDEN)
    return tmp_path / "iris.skops"


def start(artifact: Path, changes: dict[str, Any], **model: Any) -> Any:
    """Start the app with some parts of the golden file changed."""
    (artifact.parent / "iris.golden.json").write_text(json.dumps(GOLDEN | changes))
    return app.create_app(make_settings(model={"path": str(artifact)} | model))


def test_shipped_golden_rows_are_the_models_own() -> None:
    """The shipped file has rows of each species, what the model says of them, and the pinned versions."""
    service = app.make_service(make_settings())
    answers = service.model.answer(GOLDEN["rows"], "golden rows")
    assert len(GOLDEN["rows"]) == 15
    assert {prediction["prediction"] for prediction in GOLDEN["predictions"]} == {"setosa", "versicolor", "virginica"}
    assert all(map(is_close, answers, GOLDEN["predictions"]))
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (PROJECT / "requirements.txt").read_text(), re.MULTILINE))
    assert {name: SHIPPED["versions"][name] for name in ("numpy", "scikit-learn")}.items() <= pinned.items()


def test_golden_rows_are_reproduced_up_to_rounding(iris: Path) -> None:
    """The last digits of a float are the processor's, so they may differ."""
    rounded = json.loads(json.dumps(GOLDEN["predictions"]), parse_float=lambda text: float(f"{float(text):.8g}"))
    assert call(start(iris, {"predictions": rounded}), post_case(ROW)).status == 200


def changed(index: int, **change: Any) -> list[Any]:
    """Return the golden predictions with one changed, and a later one too."""
    return [
        prediction | change if row in (index, 13) else prediction
        for row, prediction in enumerate(GOLDEN["predictions"])
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictions": changed(3, prediction="virginica")}, r'answers row 3 with {"prediction": "setosa", .*}, not'),
        ({"predictions": changed(7, probabilities={"setosa": 1.0})}, "answers row 7 with"),
        ({"predictions": changed(0, probabilities={"setosa": 0.97, "versicolor": 0.03, "virginica": 0})}, "row 0 with"),
        ({"predictions": GOLDEN["predictions"][1:]}, "which should have as many predictions as rows"),
        ({"rows": [{"sepal_length": 1}] * 15}, "row 0 has the features 'sepal_length'; it should have"),
        (
            {"rows": [ROW] * 14 + [ROW | {"sepal_length": "1"}]},
            r"has iris.golden.json beside it, of which row 14 does not fit: 'sepal_length': Input should be",
        ),
        ({"rows": [ROW, ROW | {"sepal_width": None}] + [ROW] * 13}, "row 1 does not fit: 'sepal_width': Input should"),
        ({"rows": []}, "in which rows should have at least 1 item"),
        ({"versions": 3}, "in which versions should be a table of keys"),
        ({"more": 3}, "in which more should not be there"),
    ],
    ids=["class", "keys", "number", "fewer", "row", "cell", "null", "empty", "versions", "unknown"],
)
def test_other_answer_is_refused(iris: Path, changes: dict[str, Any], message: str) -> None:
    """The first row that differs is named; a file that is not what it should be is refused with the place."""
    with pytest.raises(ModelError, match=message) as caught:
        start(iris, changes)
    assert f"model.path is '{iris}', which" in str(caught.value)
    assert "iris.golden.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{nonsense", '{"rows": NaN}'])
def test_unreadable_golden_rows_are_refused(iris: Path, text: str) -> None:
    """Golden rows that are no JSON object end the start."""
    (iris.parent / "iris.golden.json").write_text(text)
    with pytest.raises(ModelError, match=r"has iris.golden.json beside it, (in )?which .*should be"):
        app.create_app(make_settings(model={"path": str(iris)}))


@pytest.mark.parametrize("name", ["numpy", "scikit-learn"])
@pytest.mark.parametrize("python", ["2.7", running_versions()["python"]], ids=["other-python", "same-python"])
def test_other_versions_are_a_warning(iris: Path, capsys: pytest.CaptureFixture[str], name: str, python: str) -> None:
    """Golden rows of another numpy or scikit-learn are told in the log, and refused with `model.strict_versions`."""
    versions = GOLDEN["versions"] | {name: "1.0.0", "python": python}
    assert call(start(iris, {"versions": versions}), post_case(ROW)).status == 200
    warning, *_ = map(json.loads, capsys.readouterr().err.splitlines())
    assert (warning["event"], warning["level"]) == ("versions_differ", "warning")
    assert (warning["golden"], warning["running"]) == (versions, running_versions())
    with pytest.raises(ModelError, match=r"was made with .*'1.0.0'.*, but .* run here, and .*strict_versions is true"):
        start(iris, {"versions": versions}, strict_versions=True)


@pytest.mark.parametrize("command", [GUNICORN, "uvicorn app:app --port 0", "flask --app app run --port 0"])
def test_another_python_is_no_warning(serve: Starter, iris: Path, command: str) -> None:
    """Answers do not depend on Python's version: golden rows of another are one line at info, whatever is strict."""
    versions = GOLDEN["versions"] | {"python": "2.7"}
    write(iris.parent / "iris.golden.json", GOLDEN | {"versions": versions})
    framework = "flask" if "flask" in command else "fastapi"
    environment = {"SERVING_MODEL__PATH": str(iris), "SERVING_MODEL__STRICT_VERSIONS": "true"}
    server = serve(command, **gunicorn_environment(framework, "auto", **environment))
    server.stop(signal.SIGTERM)
    lines = [json.loads(line) for line in server.text.splitlines() if line.startswith("{")]
    (line,) = (line for line in lines if line["event"] == "python_differs")
    assert (line["level"], line["golden"], line["running"]) == ("info", "2.7", running_versions()["python"])
    assert {line["level"] for line in lines} == {"info"}


def test_check_says_nothing_of_another_python(iris: Path) -> None:
    """`--check-config` has nothing to say where only Python is another."""
    versions = GOLDEN["versions"] | {"python": "2.7"}
    write(iris.parent / "iris.golden.json", GOLDEN | {"versions": versions})
    done = run_gunicorn("--check-config", SERVING_MODEL__PATH=str(iris))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_golden_rows_that_were_not_fetched_are_missed(iris: Path) -> None:
    """A link to nowhere, as tools that keep large files elsewhere leave it, is not the same as no golden rows."""
    golden = iris.parent / "iris.golden.json"
    golden.unlink()
    golden.symlink_to("nowhere")
    with pytest.raises(ModelError, match=r"has iris.golden.json beside it, which is no file, or a link to none"):
        app.create_app(make_settings(model={"path": str(iris)}))


def test_strict_versions_need_golden_rows(iris: Path) -> None:
    """Without golden rows there is nothing to compare, so `model.strict_versions` refuses."""
    (iris.parent / "iris.golden.json").unlink()
    with pytest.raises(ModelError, match=r"has no iris.golden.json beside it, and so no versions to compare"):
        app.create_app(make_settings(model={"path": str(iris), "strict_versions": True}))


def test_same_versions_are_no_news(iris: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the versions of the golden rows `model.strict_versions` lets the service start, and nothing is logged."""
    start(iris, {"versions": running_versions()}, strict_versions=True)
    assert capsys.readouterr().err == ""


def test_example_is_tried_where_there_are_no_golden_rows(tmp_path: Path) -> None:
    """A model that fails on an example is not served; if the row was made up, the message says that."""
    X, y = load_iris(return_X_y=True)
    estimator = make_pipeline(FunctionTransformer(steps.stop_at_zero), DecisionTreeClassifier()).fit(X, y)
    features = {name: {"example": 0.0} for name in ROW}
    with pytest.raises(ModelError, match="fails on its example row: ValueError"):
        serve_estimator(tmp_path / "model.joblib", estimator, features=features)
    with pytest.raises(ModelError, match="of which 'x0', 'x1', 'x2', 'x3' are made up; give examples in"):
        serve_estimator(tmp_path / "model.joblib", estimator)


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"features": {"a": {}, "b": {"ge": 5}}}, {"a": 1.5, "b": 6}),
        ({"features": {"x0": {"type": "int", "le": 0}}}, {"x0": 0, "x1": 6}),
        ({"features": {"b": {"choices": [9]}, "a": {"le": 0}}}, {"b": 9, "a": 0}),
        ({"model": {"outputs": ["up", "down"]}}, {"x0": 1.5, "x1": 6}),
    ],
    ids=["renamed", "narrowed", "chosen", "outputs"],
)
def test_golden_rows_outlive_the_settings(tmp_path: Path, changes: dict[str, Any], row: dict[str, float]) -> None:
    """What the settings rename or narrow later is no matter: the rows are the estimator's own."""
    estimator = LinearRegression().fit(np.eye(2), [[1, 2], [3, 4]])
    save(estimator, tmp_path / "model.joblib")
    rows = write(tmp_path / "rows.json", [{"x1": 2, "x0": 1.5}, {"x0": 3.5, "x1": 4}])
    describe(tmp_path / "model.joblib", "--trust", "--golden", rows)
    native = serve_estimator(tmp_path / "model.joblib", estimator, **changes)
    assert call(native, post_case(row)).status == 200


@pytest.mark.parametrize("cell", [None, "1", True])
@pytest.mark.parametrize("features", [{}, {"a": {"ge": 5}, "b": {"ge": 5}}], ids=["plain", "narrowed"])
def test_golden_row_that_no_request_may_be_is_refused(tmp_path: Path, cell: Any, features: dict[str, Any]) -> None:
    """What the estimator does not take is no golden row, whatever it answers to that, and whatever the settings say."""
    estimator = LogisticRegression().fit(pd.DataFrame({"a": [0.0, 1.0], "b": [1.0, 0.0]}), [0, 1])
    rows = [{"a": 1.0, "b": 0.0}, {"a": 1.0, "b": cell}]
    predictions = [{"prediction": 1, "probabilities": {"0": None, "1": None}}] * 2
    write(tmp_path / "model.golden.json", {"versions": running_versions(), "rows": rows, "predictions": predictions})
    message = r"has model.golden.json beside it, of which row 1 does not fit: 'b': Input should be a valid number$"
    with pytest.raises(ModelError, match=message):
        serve_estimator(tmp_path / "model.joblib", estimator, features=features)


def test_golden_rows_go_by_name(tmp_path: Path) -> None:
    """A golden row in another order of its keys is the same row, for a nameless estimator too."""
    estimator = LinearRegression().fit(np.eye(2), [1, 2])
    golden = {"versions": running_versions(), "rows": [{"x1": 2, "x0": 1.5}]}
    golden["predictions"] = [{"prediction": estimator.predict([[1.5, 2]])[0]}]
    write(tmp_path / "model.golden.json", golden)
    assert call(serve_estimator(tmp_path / "model.joblib", estimator), post_case({"x0": 1, "x1": 2})).status == 200


@pytest.mark.parametrize(
    ("answer", "golden", "scale", "same"),
    [
        (1e-10, 9e-10, 1e-10, False),
        (1e-17, 0.0, 1.0, True),
        (1.0, True, 1.0, False),
        (True, 1, 1.0, False),
        (1.0, 1, 1.0, True),
        (None, None, 1.0, True),
        (1.0, int("9" * 400), 1.0, False),
        ([1.0, 2.0], [1.0], 1.0, False),
        ({"a": 1.0}, {"b": 1.0}, 1.0, False),
        (1000.0001, 1000.0, 1000.0, True),
        (1000.01, 1000.0, 1000.0, False),
    ],
)
def test_answers_agree_up_to_rounding(answer: Any, golden: Any, scale: float, same: bool) -> None:
    """Numbers are the same to a millionth, or where they are nothing beside the others; kinds and names exactly."""
    assert is_close(answer, golden, scale) is same


@pytest.mark.parametrize("second", [0.11, 0.1])
def test_outputs_of_other_sizes_are_held_to_their_own(tmp_path: Path, second: float) -> None:
    """An output near 0 is not hidden by a larger one, of which a rounding is more than all of it."""
    estimator = LinearRegression().fit(np.eye(2), [[1e9, 0.1], [2e9, 0.2]])
    rows = [{"x0": 1.0, "x1": 0.0}, {"x0": 0.0, "x1": 1.0}]
    predictions = [{"prediction": {"y0": 1e9, "y1": second}}, {"prediction": {"y0": 2e9, "y1": 0.2}}]
    golden = {"versions": running_versions(), "rows": rows, "predictions": predictions}
    write(tmp_path / "model.golden.json", golden)
    if second == 0.1:
        assert call(serve_estimator(tmp_path / "model.joblib", estimator), post_case(rows[0])).status == 200
    else:
        with pytest.raises(ModelError, match=r"answers row 0 with .*0\.1\d*}}, not .*0\.11}}"):
            serve_estimator(tmp_path / "model.joblib", estimator)


def test_number_near_zero_is_held_to_those_of_other_rows() -> None:
    """Sizes are of all answers, place by place; probabilities are parts of 1."""
    answers = [
        {"prediction": {"a": 1e-17, "b": 5.0}, "decision": [2.0, -1e3], "probabilities": {"x": 1e-20}},
        {"prediction": {"a": -8.0, "b": None}, "decision": [1.0, 3.0], "probabilities": {"x": 1e-21}},
    ]
    sizes = {"prediction": {"a": 8.0, "b": 5.0}, "decision": [2.0, 1e3], "probabilities": 1.0}
    assert sizes_of(answers) == sizes
    assert is_close(answers[0] | {"prediction": {"a": 0.0, "b": 5.0}}, answers[0], sizes)
    assert not is_close(answers[0] | {"prediction": {"a": 1e-7, "b": 5.0}}, answers[0], sizes)


@each_combination()
def test_gunicorn_refuses_before_it_listens(iris: Path, combination: tuple[str, str]) -> None:
    """Golden rows that are not reproduced end gunicorn with one line and status 4, and it never listens."""
    golden = GOLDEN | {"predictions": changed(3, prediction="virginica")}
    (iris.parent / "iris.golden.json").write_text(json.dumps(golden))
    environment = gunicorn_environment(*combination, SERVING_MODEL__PATH=str(iris))
    done = run_gunicorn(**environment)
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("ModelError: environment: SERVING_MODEL__PATH is ")
    assert "answers row 3 with" in done.stderr


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("exit", "which fails on its example row: RuntimeError: it raised SystemExit: 0"),
        ("end", "which ended the process that tried it, with status 0"),
        ("signal", "which ended the process that tried it, with status -11"),
    ],
)
def test_model_that_ends_its_process_is_refused(tmp_path: Path, how: str, message: str) -> None:
    """A predict that exits, with status 0 too, or crashes the interpreter is refused before gunicorn listens."""
    file = deploy(tmp_path, estimators.Deadly(how), "a = { example = 1.5 }")
    environment = gunicorn_environment("fastapi", "uvicorn", SERVING_SETTINGS=file)
    done = run_gunicorn(PYTHONPATH=str(PROJECT), **environment)
    assert (done.returncode, len(done.stderr.splitlines())) == (4, 1)
    assert message in done.stderr


@each_combination()
def test_proving_leaves_no_threads_to_the_workers(serve: Starter, tmp_path: Path, combination: tuple[str, str]) -> None:
    """An estimator that computes in parallel is tried in a child of its own, so that forked workers can use it too."""
    X, y = load_iris(return_X_y=True)
    estimator = HistGradientBoostingClassifier(max_iter=20).fit(X, y)
    file = deploy(tmp_path, estimator)
    rows = [{f"x{column}": value for column, value in enumerate(row)} for row in X.tolist()]
    describe(tmp_path / "model.joblib", "--trust", "--golden", write(tmp_path / "rows.json", rows[:20]))
    server = serve(**gunicorn_environment(*combination, SERVING_SETTINGS=file))
    answers = server.post(rows * 10).json
    assert [answer["prediction"] for answer in answers[:150]] == estimator.predict(X).tolist()


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@dataclass(frozen=True)
class Printed:
    stdout: str
    stderr: str


def describe(*words: Any, status: int = 0, **environment: str) -> Printed:
    """Run what `python -m model.describe` runs, with variables of the environment."""
    stdout, stderr, ended = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        contextlib.chdir(PROJECT),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            model.describe.main([*map(str, words)])
        except SystemExit as end:
            ended = int(end.code or 0)
    assert ended == status, stderr.getvalue()
    return Printed(stdout.getvalue(), stderr.getvalue())


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("boosting", ".skops"), ("native-categories", ".joblib"), ("several-outputs", ".pickle"), ("numbers", ".pkl")],
)
def test_description_is_ready_to_paste(tmp_path: Path, name: str, suffix: str) -> None:
    """What is printed with `--trust` is the whole of a settings file that serves the artifact, wherever it stands."""
    path = tmp_path / f"model{suffix}"
    estimator, table = fitted(name)
    save(estimator, path)
    printed = describe(path, "--trust").stdout
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    settings = app.load_settings(Path(write(elsewhere / "settings.toml", printed)))
    assert tomllib.loads(printed)["features"].keys() == set(table)
    assert call(app.create_app(settings), post_case(rows_of(table))).status == 200
    beside = describe(path, "--trust", SERVING_SETTINGS=write(tmp_path / "settings.toml", printed)).stdout
    assert tomllib.loads(beside)["model"]["path"] == path.name


def test_description_shows_what_the_estimator_says(tmp_path: Path) -> None:
    """Types, choices, null and examples are printed; those of golden rows before the estimator's own."""
    path = tmp_path / "penguins.joblib"
    save(fitted("boosting")[0], path)
    features = tomllib.loads(describe(path, "--trust").stdout)["features"]
    island = {"type": "str", "choices": ["Biscoe", "Dream", "Torgersen"], "missing": True, "example": "Biscoe"}
    assert features["island"] == island
    assert features["bill_length_mm"] == {"type": "float", "missing": True, "example": 43.92}
    rows = write(tmp_path / "rows.json", rows_of(PENGUINS)[:4])
    features = tomllib.loads(describe(path, "--trust", "--golden", rows).stdout)["features"]
    assert (features["island"]["example"], features["bill_length_mm"]["example"]) == ("Torgersen", 39.1)
    write(tmp_path / "penguins.golden.json", "broken")
    describe(path, "--trust", "--golden", rows)
    golden = json.loads((tmp_path / "penguins.golden.json").read_text())
    assert golden["rows"] == rows_of(PENGUINS)[:4]
    assert [prediction["prediction"] for prediction in golden["predictions"]] == ["Adelie"] * 4


def described(tmp_path: Path, estimator: Any, rows: Any = None) -> tuple[dict[str, Any], str]:
    """Return the features that are printed for an estimator, and all that is printed."""
    path = tmp_path / "model.joblib"
    save(estimator, path)
    golden = [] if rows is None else ["--golden", write(tmp_path / "rows.json", rows)]
    printed = describe(path, "--trust", *golden).stdout
    return tomllib.loads(printed)["features"], printed


def test_golden_rows_say_what_the_estimator_does_not(tmp_path: Path, framework: str) -> None:
    """Types that only code of the user's knows are those of the golden rows: whole numbers reach it as such."""
    table = pd.DataFrame({"rank": [1, 2, 3, 1], "alone": [True, False, True, True], "age": [1.5, np.nan, 3, 4]})
    expected = (estimator := estimators.worded().fit(table, [0, 1, 0, 1])).predict_proba(table)
    rows = json.loads(table.to_json(orient="records"))
    features, _ = described(tmp_path, estimator, rows)
    assert {name: (feature["type"], feature.get("missing")) for name, feature in features.items()} == {
        "rank": ("int", None),
        "alone": ("bool", None),
        "age": ("float", True),
    }
    answers = call(
        serve_estimator(tmp_path / "model.joblib", estimator, framework=framework, features=features), post_case(rows)
    ).json
    np.testing.assert_allclose([[*answer["probabilities"].values()] for answer in answers], expected)


def test_golden_rows_say_what_is_a_boolean(tmp_path: Path) -> None:
    """A column of booleans, which is of numbers to the estimator, is a bool where golden rows have true or false; a
    golden row may then have 1 for true."""
    table = pd.DataFrame({"smoker": [True, False, True, False], "age": [30, 40, 50, 60]})
    estimator = LogisticRegression().fit(table, [1, 0, 1, 0])
    rows = json.loads(table.to_json(orient="records"))
    features, _ = described(tmp_path, estimator, rows)
    assert {name: feature["type"] for name, feature in features.items()} == {"smoker": "bool", "age": "float"}
    golden = json.loads((tmp_path / "model.golden.json").read_text())
    write(tmp_path / "model.golden.json", golden | {"rows": [row | {"smoker": int(row["smoker"])} for row in rows]})
    native = serve_estimator(tmp_path / "model.joblib", estimator, features=features)
    assert call(native, post_case(rows)).json == golden["predictions"]


def test_golden_rows_that_contradict_the_settings_are_refused(tmp_path: Path) -> None:
    """Rows of strings for a feature that the settings bound as a number end in one line."""
    table = pd.DataFrame({"rank": ["1", "2", "3", "1"]})
    file = deploy(tmp_path, estimators.worded().fit(table, [0, 1, 0, 1]), "rank = { ge = 0 }")
    rows = write(tmp_path / "rows.json", [{"rank": "1"}])
    done = describe(tmp_path / "model.joblib", "--trust", "--golden", rows, status=4, SERVING_SETTINGS=file)
    assert "SettingsError: settings.toml: features.rank does not fit the model: it should have no bounds" in done.stderr


def test_guess_is_marked(tmp_path: Path) -> None:
    """Where neither estimator nor rows say of what type a feature is, the printed one is marked."""
    table = pd.DataFrame({"rank": [1, 2, 3, 1]})
    features, printed = described(tmp_path, estimators.worded().fit(table, [0, 1, 0, 1]))
    assert features == {"rank": {"type": "float"}}
    assert 'rank = { type = "float" }  # of what type the estimator does not say' in printed


def test_golden_rows_may_have_what_is_dropped(tmp_path: Path) -> None:
    """Columns that the estimator drops may stand in the rows; they are left out of what is written."""
    transformer = make_column_transformer((OneHotEncoder(), ["island"]))
    estimator = make_pipeline(transformer, LogisticRegression()).fit(PENGUINS, np.arange(len(PENGUINS)) % 2)
    features, _ = described(tmp_path, estimator, rows_of(PENGUINS)[:3])
    assert list(features) == ["island"]
    assert json.loads((tmp_path / "model.golden.json").read_text())["rows"] == [{"island": "Torgersen"}] * 3


def test_golden_rows_may_leave_out_what_is_missing(tmp_path: Path) -> None:
    """A row without a value that may be missing is taken as one with null, when rows are made golden and at a start."""
    rows = [{"x0": 1.5}, {"x1": 2.5, "x0": None}, {"x0": 3.0, "x1": 0.5}]
    estimator = make_pipeline(SimpleImputer(), LinearRegression()).fit([[1.0, 2.0], [2.0, 1.0], [5.0, 3.0]], [1, 2, 3])
    described(tmp_path, estimator, rows)
    golden = json.loads((tmp_path / "model.golden.json").read_text())
    assert golden["rows"] == [{"x0": None, "x1": None} | row for row in rows]
    write(tmp_path / "model.golden.json", golden | {"rows": rows})
    native = serve_estimator(tmp_path / "model.joblib", estimator)
    assert call(native, post_case(rows)).json == golden["predictions"]


def test_features_of_a_model_that_has_changed_are_left_out(tmp_path: Path) -> None:
    """After training with other features into the same file, what is printed is the new model's."""
    file = deploy(tmp_path, LinearRegression().fit(PENGUINS[["year"]], range(len(PENGUINS))), "age = {}")
    printed = describe(tmp_path / "model.joblib", "--trust", SERVING_SETTINGS=file).stdout
    assert "# Left out, for the artifact has changed:\n# settings.toml: features.age is not about a feature" in printed
    assert list(tomllib.loads(printed)["features"]) == ["year"]


@pytest.mark.parametrize("suffix", [".joblib", ".pickle", ".pkl"])
def test_description_runs_nothing_without_trust(tmp_path: Path, suffix: str) -> None:
    """Without `--trust` no code of a pickle runs: its hash is printed, and why its features are not."""
    path, mark = tmp_path / f"model{suffix}", tmp_path / "mark"
    save(Trap(os.mkdir, str(mark)), path)
    printed = describe(path).stdout
    assert not mark.exists()
    assert tomllib.loads(printed)["model"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "# If you trust it, add --trust." in printed
    assert "holds a NoneType" in describe(path, "--trust", status=4).stderr


def test_description_names_types_without_loading(tmp_path: Path) -> None:
    """The types to trust in a .skops file are printed without loading it; one that needs none is read at once."""
    path = tmp_path / "model.skops"
    save(RandomForestClassifier(n_estimators=2).fit(*load_iris(return_X_y=True)), path)
    printed = describe(path).stdout
    assert tomllib.loads(printed)["model"]["trusted_types"] == ["sklearn.tree._tree.Tree"]
    assert "add --trust" in printed
    rows = write(tmp_path / "rows.json", [{}])
    assert "can answer golden rows only with --trust" in describe(path, "--golden", rows, status=4).stderr
    assert set(tomllib.loads(describe("model/iris.skops").stdout)["features"]) == set(ROW)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model/iris.skop"], "'model/iris.skop' has the suffix '.skop'; use one of '.skops', '.joblib'"),
        (["model/iriss.skops"], "'model/iriss.skops' does not exist; did you mean 'iris.skops'?"),
        (["model/iris.skops", "--golden", "no.json"], "golden rows of no.json, which cannot be read: No such file"),
        (["model/iris.skops", "--golden", "README.md"], "golden rows of README.md: the body is not JSON"),
        (["model/iris.skops", "--golden", "model/iris.golden.json"], "which should be a JSON array of objects"),
    ],
    ids=["suffix", "missing", "no-rows", "no-json", "no-array"],
)
def test_mistake_is_one_line(arguments: list[str], message: str) -> None:
    """A wrong path or wrong rows end in one line that says what is wrong."""
    stderr = describe(*arguments, status=4).stderr
    assert message in stderr
    assert len(stderr.splitlines()) == 1


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Golden rows are held to the contract, and nothing is written."""
    path = tmp_path / "model.joblib"
    save(LogisticRegression(max_iter=1000).fit(*load_iris(return_X_y=True)), path)
    rows = write(tmp_path / "rows.json", [{"x0": 1, "x1": 1, "x2": 1, "x3": 1}, {"x0": 1}])
    assert (
        "does not take golden row [1, 'x1']: Field required"
        in describe(path, "--trust", "--golden", rows, status=4).stderr
    )
    assert not (tmp_path / "model.golden.json").exists()


def test_description_keeps_the_features_of_the_settings_in_force(tmp_path: Path) -> None:
    """For the artifact that the settings are about, the names, bounds and units given there are printed too."""
    features = "width = { unit = 'cm', ge = 0 }\nheight = {}"
    file = deploy(tmp_path, LinearRegression().fit(np.eye(2), [1, 2]), features)
    done = describe(tmp_path / "model.joblib", "--trust", SERVING_SETTINGS=file)
    printed = tomllib.loads(done.stdout)
    assert printed["model"]["path"] == "model.joblib"
    assert printed["features"] == {"width": {"type": "float", "ge": 0.0, "unit": "cm"}, "height": {"type": "float"}}

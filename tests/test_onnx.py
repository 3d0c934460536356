"""ONNX Runtime in scikit-learn's place: the same answers, or none."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
from conftest import (
    COMBINATIONS,
    PROJECT,
    Server,
    answers_of,
    call,
    gunicorn_environment,
    make_settings,
    post_case,
    save,
    serve_estimator,
    to_graph,
)
from skl2onnx.common.data_types import FloatTensorType
from sklearn.cluster import KMeans
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_diabetes, load_iris
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeClassifier
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC
from sklearn.tree import DecisionTreeClassifier

import app
from model.describe import main

X, y = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])[y]
GAPS = np.where(np.arange(X.size).reshape(X.shape) % 7, X, np.nan)
NUMBERS, TARGET = load_diabetes(return_X_y=True)
ROWS = [{f"x{column}": value for column, value in enumerate(row)} for row in X.tolist()]
ONNX = {"model": {"runtime": "onnx"}}


def prove(path: Path, estimator: Any, features: Any = None, row: Any = None) -> app.Service:
    """Give the service of an estimator in ONNX Runtime, proven with a golden row if there is one."""
    model = save(estimator, path) | {"runtime": "onnx"}
    service = app.make_service(make_settings(model=model, features=features or {}))
    if row is not None:
        answers = service.answer([row], "the golden row")
        service.golden = app.Golden(versions={}, rows=[row], predictions=answers)
    service.prove()
    assert service.predictor.onnx is not None
    return service


def agree(service: app.Service, X: Any) -> bool:
    """Whether both runtimes answer X alike."""
    assert service.predictor.onnx is not None
    return app.find_disagreement(service.predictor.onnx, service.predictor, X, service.predictor.ask(X)) is None


@pytest.mark.parametrize("labels", [NAMES, y, y - 1, y == 1], ids=["str", "int", "negative", "bool"])
@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(max_iter=1000),
        make_pipeline(StandardScaler(), LogisticRegression()),
        GridSearchCV(LogisticRegression(max_iter=1000), {"C": [1, 2]}),
        RandomForestClassifier(n_estimators=10, random_state=0),
        make_pipeline(StandardScaler(), RandomForestClassifier(n_estimators=10, random_state=0)),
        ExtraTreesClassifier(n_estimators=10, random_state=0),
        GradientBoostingClassifier(n_estimators=5),
        HistGradientBoostingClassifier(max_iter=5),
        BaggingClassifier(n_estimators=5, random_state=0),
        DecisionTreeClassifier(random_state=0),
        SVC(),
        LinearSVC(),
        RidgeClassifier(),
        KNeighborsClassifier(1),
        MLPClassifier(max_iter=3000, alpha=1, random_state=0),
        GaussianNB(),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_classifier_answers_as_in_sklearn(tmp_path: Path, estimator: Any, labels: Any) -> None:
    """The labels are the estimator's own in type too, and the other numbers are within 1e-5."""
    service = prove(tmp_path / "model.joblib", estimator.fit(X, labels), row=ROWS[0])
    assert agree(service, X)
    predictions = [answer["prediction"] for answer in answers_of(service.predictor, X)]
    assert predictions == estimator.predict(X).tolist()
    assert {type(label) for label in predictions} == {type(label) for label in labels.tolist()}


@pytest.mark.parametrize(
    "estimator",
    [
        LinearRegression(),
        RandomForestRegressor(n_estimators=10, random_state=0),
        GradientBoostingRegressor(n_estimators=5),
        HistGradientBoostingRegressor(max_iter=5),
        SVR(),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_regressor_answers_as_in_sklearn(tmp_path: Path, estimator: Any) -> None:
    """A number is the same to 1e-5 of the largest."""
    service = prove(tmp_path / "model.joblib", estimator.fit(NUMBERS, TARGET))
    assert agree(service, NUMBERS)
    assert isinstance(answers_of(service.predictor, NUMBERS)[0]["prediction"], float)


@pytest.mark.parametrize(
    ("estimator", "target"),
    [
        (AdaBoostClassifier(n_estimators=5), NAMES),
        (RandomForestRegressor(n_estimators=5, random_state=0), X[:, :2]),
        (LinearRegression(), X[:, :2]),
        (MLPRegressor(max_iter=3000, alpha=1, random_state=0), X[:, :2]),
        (MultiOutputClassifier(LogisticRegression(max_iter=1000)), np.column_stack([NAMES, NAMES == "setosa"])),
        (KMeans(3, n_init=1), None),
        (GaussianMixture(3, random_state=0), None),
        (IsolationForest(n_estimators=10, random_state=0), None),
    ],
    ids=["boosting", "forest", "linear", "network", "labels", "clusters", "mixture", "outliers"],
)
def test_other_answers_are_as_in_sklearn(tmp_path: Path, estimator: Any, target: Any) -> None:
    """Several outputs, clusters and outliers have the names and the form that they have in scikit-learn."""
    service = prove(tmp_path / "model.joblib", estimator.fit(X, target), row=ROWS[0])
    assert agree(service, X)
    answers, expected = answers_of(service.predictor, X), answers_of(app.Predictor(estimator), X)
    assert all(map(app.agrees, answers, expected, [1.0] * len(X), [app.OF_FLOAT32] * len(X)))


@pytest.mark.parametrize(
    "estimator",
    [
        HistGradientBoostingClassifier(max_iter=5),
        make_pipeline(SimpleImputer(), LogisticRegression(max_iter=1000)),
        make_pipeline(SimpleImputer(), RandomForestClassifier(n_estimators=5, random_state=0)),
    ],
    ids=["boosting", "linear", "forest"],
)
def test_missing_values_are_answered_as_in_sklearn(tmp_path: Path, estimator: Any) -> None:
    """Where null is allowed, it has the same effect."""
    service = prove(tmp_path / "model.joblib", estimator.fit(GAPS, NAMES), row=ROWS[0])
    assert set(service.contract.nullable) == set(ROWS[0])
    assert agree(service, GAPS)


TABLE = pd.DataFrame({"island": np.where(y, "Dream", "Biscoe"), "mass": X[:, 2] * 1000, "depth": X[:, 3], "year": y})


@pytest.mark.parametrize(
    "last",
    [LogisticRegression(), RandomForestClassifier(n_estimators=10, random_state=0), HistGradientBoostingClassifier()],
)
@pytest.mark.parametrize("encoder", [OneHotEncoder(), OrdinalEncoder(), OneHotEncoder(handle_unknown="ignore")])
def test_table_is_answered_as_in_sklearn(tmp_path: Path, encoder: Any, last: Any) -> None:
    """Strings and numbers go in as the columns of a DataFrame, of which some are dropped."""
    columns = make_column_transformer((encoder, ["island", "year"]), (StandardScaler(), ["mass"]))
    estimator = make_pipeline(columns, last).fit(TABLE, NAMES)
    service = prove(tmp_path / "model.joblib", estimator, row={"island": "Dream", "mass": 4700.0, "year": 1})
    assert service.contract.form == "frame"
    assert agree(service, TABLE)


def thresholds_of(estimator: Any) -> list[tuple[int, float]]:
    if hasattr(estimator, "_predictors"):
        nodes = np.concatenate([tree.nodes for trees in estimator._predictors for tree in trees])
        nodes = nodes[nodes["is_leaf"] == 0]
        return list(zip(nodes["feature_idx"].tolist(), nodes["num_threshold"].tolist(), strict=True))
    trees = [tree.tree_ for tree in np.ravel(estimator.estimators_)]
    pairs = [pair for tree in trees for pair in zip(tree.feature.tolist(), tree.threshold.tolist(), strict=True)]
    return [(feature, threshold) for feature, threshold in pairs if feature >= 0]


@pytest.mark.parametrize(
    "estimator",
    [
        RandomForestClassifier(n_estimators=10, random_state=0),
        ExtraTreesClassifier(n_estimators=10, random_state=0),
        GradientBoostingClassifier(n_estimators=10, random_state=0),
        HistGradientBoostingClassifier(max_iter=10),
        HistGradientBoostingRegressor(max_iter=10),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_rows_beside_a_threshold_go_the_same_way(tmp_path: Path, estimator: Any) -> None:
    """A number on a threshold of a tree, or next to it in float32 or float64, is on the same side in both runtimes."""
    service = prove(tmp_path / "model.joblib", estimator.fit(X, y), row=ROWS[0])
    rows = []
    for feature, threshold in thresholds_of(estimator):
        near = np.float32(threshold)
        below, above = (float(np.nextafter(near, np.float32(end))) for end in (-np.inf, np.inf))
        beside = [np.nextafter(threshold, -np.inf), np.nextafter(threshold, np.inf), threshold - 1e-9, threshold + 1e-9]
        for value in (threshold, float(near), below, above, *beside):
            rows.append(X[len(rows) % len(X)].copy())
            rows[-1][feature] = value
    assert len(rows) > 100
    assert agree(service, np.array(rows))


@pytest.mark.parametrize("framework", app.FRAMEWORKS)
@pytest.mark.parametrize("estimator", [LogisticRegression(max_iter=1000), RandomForestClassifier(10, random_state=0)])
def test_shape_of_answers_does_not_depend_on_the_number_of_rows(tmp_path: Path, framework: str, estimator: Any) -> None:
    """One row, or many, are answered alike, under each framework."""
    native = serve_estimator(tmp_path / "model.joblib", estimator.fit(X, NAMES), framework=framework, **ONNX)
    many = call(native, post_case(ROWS)).json
    assert app.agrees([call(native, post_case(row)).json for row in ROWS[::30]], many[::30])
    assert [answer["prediction"] for answer in many] == estimator.predict(X).tolist()
    assert max(max(answer["probabilities"].values()) for answer in many) <= 1


def test_shipped_model_runs_in_onnx() -> None:
    """The shipped model reproduces its golden rows, which are exact enough for both runtimes."""
    answers = [
        call(app.create_app(make_settings(model={"runtime": "onnx"}, framework=name)), post_case(GOLDEN))
        for name in app.FRAMEWORKS
    ]
    assert answers[0] == answers[1]
    assert app.agrees(answers[0].json, json.loads((PROJECT / "model/iris.golden.json").read_text())["predictions"])


GOLDEN = json.loads((PROJECT / "model/iris.golden.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (DummyClassifier().fit(X, y), "cannot be converted to ONNX: with float64 inputs, MissingShapeCalculator"),
        (make_pipeline(TfidfVectorizer(), GaussianNB()), "takes texts, which are not run in ONNX Runtime"),
    ],
    ids=["unknown", "texts"],
)
def test_what_cannot_be_converted_is_refused(tmp_path: Path, estimator: Any, message: str) -> None:
    """An estimator that skl2onnx does not know ends the start, with its reason and what to do."""
    if hasattr(estimator, "steps"):
        estimator = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(["a fox", "the bird"], [0, 1])
    with pytest.raises(app.ModelError, match=message) as caught:
        serve_estimator(tmp_path / "model.joblib", estimator, **ONNX)
    assert str(caught.value).endswith('set model.runtime = "sklearn"')
    assert "\n" not in str(caught.value)


def test_disagreement_is_refused_with_the_row(tmp_path: Path) -> None:
    """A forest that learnt where missing values go is converted by skl2onnx without that, and so is not served."""
    forest = RandomForestClassifier(n_estimators=5, random_state=0).fit(GAPS, NAMES)
    features = {name: {"missing": True, "example": value} for name, value in ROWS[0].items()}
    expected = r'answers row \{"x0": .*null.*\} with \[.*\], scikit-learn with \[.*\]; set model.runtime = "sklearn"$'
    with pytest.raises(app.ModelError, match=expected):
        serve_estimator(tmp_path / "model.joblib", forest, features=features, **ONNX)


@pytest.mark.parametrize(
    "estimator",
    [
        KNeighborsClassifier().fit(X, y),
        RandomForestClassifier(n_estimators=5, random_state=0).fit(X, np.column_stack([y, y == 1])),
        MLPClassifier(max_iter=3000, alpha=1, random_state=0).fit(X, np.column_stack([y > 0, y > 1])),
    ],
    ids=["neighbours", "classes", "multilabel"],
)
def test_disagreement_is_found_where_it_is_rare(tmp_path: Path, estimator: Any) -> None:
    """Neighbours equally far, and thresholds that skl2onnx rounds the wrong way, are among the rows compared."""
    features = {name: {"example": value} for name, value in ROWS[0].items()}
    with pytest.raises(app.ModelError, match="does not agree with scikit-learn in ONNX Runtime"):
        serve_estimator(tmp_path / "model.joblib", estimator, features=features, **ONNX)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "skl2onnx"])
def test_missing_package_is_named(package: str) -> None:
    """Without its packages nothing fails but what asks for them, and then the message names the file to install."""
    code = f"import sys; sys.modules[{package!r}] = None; import app; app.create_app()"
    settings = {"SERVING_MODEL__RUNTIME": "onnx"}
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=settings, capture_output=True, text=True)
    assert f"needs {package} to run in ONNX Runtime" in done.stderr
    assert "pip install -r requirements-onnx.txt" in done.stderr
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env={}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_packages_are_imported_only_when_asked_for() -> None:
    """The other runtime does not pay for them."""
    code = "import sys, app; app.create_app(); print(sorted({'onnx', 'onnxruntime', 'skl2onnx'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env={}, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def serve_graph(path: Path, graph: bytes, **changes: Any) -> Any:
    path.write_bytes(graph)
    return app.create_app(make_settings(model={"path": str(path), "sha256": ""}, features={}, **changes))


@pytest.mark.parametrize("runtime", ["sklearn", "onnx"])
@pytest.mark.parametrize(
    "estimator",
    [LogisticRegression(max_iter=1000), GaussianNB(), MLPClassifier(max_iter=3000, alpha=1, random_state=0)],
    ids=lambda estimator: type(estimator).__name__,
)
def test_graph_is_served(tmp_path: Path, estimator: Any, runtime: str) -> None:
    """An .onnx file needs no hash, gives the classes that are in it, and the same bytes under both frameworks."""
    graph = to_graph(estimator.fit(X, NAMES))
    answers = [
        call(serve_graph(tmp_path / "model.onnx", graph, framework=name), post_case(ROWS)) for name in app.FRAMEWORKS
    ]
    assert answers[0] == answers[1]
    assert [answer["prediction"] for answer in answers[0].json] == estimator.predict(X).tolist()
    assert list(answers[0].json[0]["probabilities"]) == estimator.classes_.tolist()


def test_graph_of_a_regressor_is_served(tmp_path: Path) -> None:
    """What has one output has a prediction only."""
    estimator = LinearRegression().fit(X[:, :3], X[:, 3])
    native = serve_graph(tmp_path / "model.onnx", to_graph(estimator))
    (prediction,) = call(native, post_case({"x0": 1, "x1": 2, "x2": 3})).json.values()
    assert prediction == pytest.approx(estimator.predict([[1, 2, 3]])[0])


@pytest.mark.parametrize("change", ["zipmap", "external", "rank"])
def test_graph_that_cannot_be_served_is_refused(tmp_path: Path, change: str) -> None:
    """The message says what is wrong with a graph, and what would be right."""
    estimator = LogisticRegression(max_iter=1000).fit(X, y)
    graph = onnx.load_model_from_string(to_graph(estimator, FloatTensorType, zipmap=change == "zipmap"))
    messages = {
        "zipmap": "convert it with options={'zipmap': False}",
        "external": "keeps numbers in other files, which no hash covers; save it whole",
        "rank": "it should take rows of tensor",
    }
    if change == "external":
        tensor = onnx.numpy_helper.from_array(np.zeros(3), "weights")
        onnx.external_data_helper.set_external_data(tensor, "weights.bin")
        graph.graph.initializer.append(tensor)
    if change == "rank":
        del graph.graph.input[0].type.tensor_type.shape.dim[1]
    with pytest.raises(app.ModelError, match=messages[change]):
        serve_graph(tmp_path / "model.onnx", graph.SerializeToString())


def test_graph_reproduces_its_golden_rows(tmp_path: Path) -> None:
    """Golden rows are all that a graph without its estimator can be compared with; other answers end the start."""
    path = tmp_path / "model.onnx"
    golden = {"versions": app.running_versions(), "rows": ROWS[:1], "predictions": [{"prediction": 2}]}
    (tmp_path / "model.golden.json").write_text(json.dumps(golden))
    with pytest.raises(app.ModelError, match="answers row 0 with"):
        serve_graph(path, to_graph(LogisticRegression(max_iter=1000).fit(X, y)))


def test_graph_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`model.describe` needs no trust for an .onnx file, and makes golden rows of it."""
    (tmp_path / "model.onnx").write_bytes(to_graph(LogisticRegression(max_iter=1000).fit(X, y)))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:2]))
    main([str(tmp_path / "model.onnx"), "--golden", str(tmp_path / "rows.json")])
    assert 'x3 = { type = "float", example = 0.2 }' in capsys.readouterr().out
    golden = json.loads((tmp_path / "model.golden.json").read_text())
    assert [answer["prediction"] for answer in golden["predictions"]] == [0, 0]


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_session_of_the_master_answers_in_a_worker(serve: Callable[..., Server], combination: tuple[str, str]) -> None:
    """What gunicorn's master loaded is used after the fork, and started no thread for which a worker would wait."""
    server = serve(**gunicorn_environment(*combination, SERVING_MODEL__RUNTIME="onnx"))
    assert server.post(GOLDEN).json[0]["prediction"] == "setosa"
    assert server.stop() == 0

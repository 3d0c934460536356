"""ONNX Runtime in scikit-learn's place: the same answers, or none."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from catboost import CatBoostClassifier
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.compose import TransformedTargetRegressor, make_column_transformer
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
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
    StackingClassifier,
    VotingClassifier,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import (
    BayesianRidge,
    LinearRegression,
    LogisticRegression,
    Perceptron,
    RidgeClassifier,
    SGDClassifier,
    SGDOneClassSVM,
)
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, LocalOutlierFactor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC, OneClassSVM
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

import app
from model.describe import main
from serving.errors import ModelError
from serving.predictor.golden import TOLERANCE_OF_FLOAT32, Tolerance, is_close, running_versions, sizes_of
from serving.predictor.onnx_runtime import find_disagreement
from serving.predictor.predictor import Predictor
from tests.lib.apps import answers_of, call, make_settings, serve_estimator
from tests.lib.artifacts import to_graph
from tests.lib.clients import post_case
from tests.lib.graphs import (
    CAT,
    NAMES,
    NUMBERS,
    ROWS,
    TABLE,
    TARGET,
    WIDE,
    X,
    agree,
    make_beside,
    prove_graph,
    proven,
    y,
)
from tests.lib.servers import PROJECT, Starter, gunicorn_environment, run
from tests.lib.sizes import each_combination, each_worker

GAPS = np.where(np.arange(X.size).reshape(X.shape) % 7, X, np.nan)
ONNX = {"model": {"runtime": "onnx"}}


@pytest.mark.in_turn
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
    service = proven(tmp_path / "model.joblib", estimator.fit(X, labels), row=ROWS[0])
    assert agree(service, X)
    predictions = [answer["prediction"] for answer in answers_of(service.model.predictor, X)]
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
    service = proven(tmp_path / "model.joblib", estimator.fit(NUMBERS, TARGET))
    assert agree(service, NUMBERS)
    assert isinstance(answers_of(service.model.predictor, NUMBERS)[0]["prediction"], float)


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
    service = proven(tmp_path / "model.joblib", estimator.fit(X, target), row=ROWS[0])
    assert agree(service, X)
    answers, expected = answers_of(service.model.predictor, X), answers_of(Predictor(estimator), X)
    assert all(map(is_close, answers, expected, [1.0] * len(X), [TOLERANCE_OF_FLOAT32] * len(X)))


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
    service = proven(tmp_path / "model.joblib", estimator.fit(GAPS, NAMES), row=ROWS[0])
    assert set(service.model.contract.nullable) == set(ROWS[0])
    assert agree(service, GAPS)


@pytest.mark.parametrize(
    "last",
    [LogisticRegression(), RandomForestClassifier(n_estimators=10, random_state=0), HistGradientBoostingClassifier()],
)
@pytest.mark.parametrize("encoder", [OneHotEncoder(), OrdinalEncoder(), OneHotEncoder(handle_unknown="ignore")])
def test_table_is_answered_as_in_sklearn(tmp_path: Path, encoder: Any, last: Any) -> None:
    """Strings and numbers go in as the columns of a DataFrame, of which some are dropped."""
    columns = make_column_transformer((encoder, ["island", "year"]), (StandardScaler(), ["mass"]))
    estimator = make_pipeline(columns, last).fit(TABLE, NAMES)
    service = proven(tmp_path / "model.joblib", estimator, row={"island": "Dream", "mass": 4700.0, "year": 1})
    assert service.model.arrays.form == "frame"
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
    service = proven(tmp_path / "model.joblib", estimator.fit(X, y), row=ROWS[0])
    assert agree(service, make_beside(thresholds_of(estimator), X))


@pytest.mark.parametrize("framework", app.FRAMEWORKS)
@pytest.mark.parametrize("estimator", [LogisticRegression(max_iter=1000), RandomForestClassifier(10, random_state=0)])
def test_shape_of_answers_does_not_depend_on_the_number_of_rows(tmp_path: Path, framework: str, estimator: Any) -> None:
    """One row, or many, are answered alike, under each framework."""
    native = serve_estimator(tmp_path / "model.joblib", estimator.fit(X, NAMES), framework=framework, **ONNX)
    many = call(native, post_case(ROWS)).json
    assert is_close([call(native, post_case(row)).json for row in ROWS[::30]], many[::30])
    assert [answer["prediction"] for answer in many] == estimator.predict(X).tolist()
    assert max(max(answer["probabilities"].values()) for answer in many) <= 1


def test_shipped_model_runs_in_onnx() -> None:
    """The shipped model reproduces its golden rows, which are exact enough for both runtimes."""
    answers = [
        call(app.create_app(make_settings(model={"runtime": "onnx"}, framework=name)), post_case(GOLDEN))
        for name in app.FRAMEWORKS
    ]
    assert answers[0] == answers[1]
    assert is_close(answers[0].json, json.loads((PROJECT / "model/iris.golden.json").read_text())["predictions"])


GOLDEN = json.loads((PROJECT / "model/iris.golden.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (DummyClassifier().fit(X, y), "converted to ONNX: skl2onnx has no converter for DummyClassifier; set"),
        (
            TransformedTargetRegressor(LinearRegression(), func=np.log1p, inverse_func=np.expm1).fit(NUMBERS, TARGET),
            "converted to ONNX: skl2onnx has no converter for TransformedTargetRegressor; set",
        ),
        (
            CatBoostClassifier(**CAT, cat_features=[0]).fit([["a", 1.0], ["b", 2.0]] * 9, [0, 1] * 9),
            "converted to ONNX: it takes categories as text, which trees do not in ONNX Runtime; set",
        ),
        (make_pipeline(TfidfVectorizer(), GaussianNB()), "takes texts, which are not run in ONNX Runtime"),
    ],
    ids=["unknown", "target", "categories", "texts"],
)
def test_what_cannot_be_converted_is_refused(tmp_path: Path, estimator: Any, message: str) -> None:
    """An estimator that skl2onnx does not know ends the start, with its reason and what to do."""
    if hasattr(estimator, "steps"):
        estimator = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(["a fox", "the bird"], [0, 1])
    with pytest.raises(ModelError, match=message) as caught:
        serve_estimator(tmp_path / "model.joblib", estimator, **ONNX)
    assert str(caught.value).endswith('set model.runtime = "sklearn"')
    assert "\n" not in str(caught.value)


def test_disagreement_is_refused_with_the_row(tmp_path: Path) -> None:
    """A forest that learnt where missing values go is converted by skl2onnx without that, and so is not served."""
    forest = RandomForestClassifier(n_estimators=5, random_state=0).fit(GAPS, NAMES)
    features = {name: {"missing": True, "example": value} for name, value in ROWS[0].items()}
    expected = r'answers row \{"x0": .*null.*\} with \[.*\], scikit-learn with \[.*\]; set model.runtime = "sklearn"$'
    with pytest.raises(ModelError, match=expected):
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
    with pytest.raises(ModelError, match="does not agree with scikit-learn in ONNX Runtime"):
        serve_estimator(tmp_path / "model.joblib", estimator, features=features, **ONNX)


@pytest.mark.parametrize("voting", ["soft", "hard"])
def test_votes_are_counted_as_in_sklearn(tmp_path: Path, voting: Any) -> None:
    """What `transform` would do with them, which skl2onnx does not, is no obstacle."""
    voters = [("r", LogisticRegression(max_iter=1000)), ("n", GaussianNB()), ("t", DecisionTreeClassifier())]
    estimator = make_pipeline(StandardScaler(), VotingClassifier(voters, voting=voting)).fit(X, NAMES)
    service = proven(tmp_path / "model.joblib", estimator, row=ROWS[0])
    assert agree(service, X)
    assert service.model.predictor.estimator.steps[-1][1].flatten_transform is True


@pytest.mark.parametrize("row", [None, {"x0": 0.0, "x1": 0.0}], ids=["example", "golden"])
@pytest.mark.parametrize("kind", ["outliers", "regressor", "decision"])
def test_number_near_zero_is_no_disagreement(tmp_path: Path, kind: str, row: Any) -> None:
    """Rounding is relative to the numbers of all rows, so one row near 0 does not end the start."""
    points = np.random.default_rng(1).normal(size=(200, 2))
    if kind == "outliers":
        estimator = OneClassSVM(gamma=0.5).fit(points)
        shift = -estimator.decision_function([[0.0, 0.0]]) - 3.8e-5
        estimator.intercept_ = estimator._intercept_ = estimator.intercept_ + shift
        estimator.offset_ = -estimator.intercept_
    elif kind == "regressor":
        estimator = SVR(gamma=0.5).fit(points, points @ [20, 50])
        shift = -estimator.predict([[0.0, 0.0]]) - 3.8e-5
        estimator.intercept_ = estimator._intercept_ = estimator.intercept_ + shift
    else:
        estimator = SVC(gamma=0.5).fit(points, points[:, 0] > 0)
        shift = -estimator.decision_function([[0.0, 0.0]]) - 3.8e-5
        estimator.intercept_ = estimator.intercept_ + shift
        estimator._intercept_ = -estimator.intercept_
    service = proven(tmp_path / "model.joblib", estimator, row=row)
    assert agree(service, points)


@pytest.mark.parametrize(
    "right",
    [LinearRegression().fit(X, X[:, :3]), RidgeClassifier().fit(X, np.arange(len(X)) % 3)],
    ids=["predictions", "decision scores"],
)
def test_disagreement_in_an_output_is_not_hidden_by_a_larger_one(right: Any) -> None:
    """Each output has a size of its own."""
    right.coef_ = right.coef_ * [[1e9], [1.0], [1.0]]
    wrong = copy.deepcopy(right)
    wrong.coef_ = right.coef_ * [[1.0], [1.1], [1.0]]
    assert find_disagreement(Predictor(right), X, Predictor(right).ask(X)) is None
    assert find_disagreement(Predictor(wrong), X, Predictor(right).ask(X)) is not None


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "skl2onnx"])
def test_missing_package_is_named(quick_model: dict[str, str], package: str) -> None:
    """Without its packages nothing fails but what asks for them, and then the message names the file to install."""
    code = f"import sys; sys.modules[{package!r}] = None; import app; app.create_app()"
    done = run(["python", "-c", code], SERVING_MODEL__RUNTIME="onnx", **quick_model)
    assert f"needs {package} to run in ONNX Runtime" in done.stderr
    assert "pip install -r requirements-onnx.txt" in done.stderr
    done = run(["python", "-c", code], **quick_model)
    assert done.returncode == 0, done.stderr


def test_packages_are_imported_only_when_asked_for() -> None:
    """The other runtime does not pay for them."""
    code = "import sys, app; app.create_app(); print(sorted({'onnx', 'onnxruntime', 'skl2onnx'} & {*sys.modules}))"
    done = run(["python", "-c", code])
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


@pytest.mark.parametrize("change", ["external", "rank"])
def test_graph_that_cannot_be_served_is_refused(tmp_path: Path, change: str) -> None:
    """The message says what is wrong with a graph, and what would be right."""
    estimator = LogisticRegression(max_iter=1000).fit(X, y)
    graph = onnx.load_model_from_string(to_graph(estimator, FloatTensorType))
    messages = {
        "external": "keeps numbers in other files, which no hash covers; save it whole",
        "rank": "it should take rows of tensor",
    }
    if change == "external":
        tensor = onnx.numpy_helper.from_array(np.zeros(3), "weights")
        onnx.external_data_helper.set_external_data(tensor, "weights.bin")
        graph.graph.initializer.append(tensor)
    if change == "rank":
        del graph.graph.input[0].type.tensor_type.shape.dim[1]
    with pytest.raises(ModelError, match=messages[change]):
        serve_graph(tmp_path / "model.onnx", graph.SerializeToString())


def test_graph_reproduces_its_golden_rows(tmp_path: Path) -> None:
    """Golden rows are all that a graph without its estimator can be compared with; other answers end the start."""
    path = tmp_path / "model.onnx"
    golden = {"versions": running_versions(), "rows": ROWS[:1], "predictions": [{"prediction": 2}]}
    (tmp_path / "model.golden.json").write_text(json.dumps(golden))
    with pytest.raises(ModelError, match="answers row 0 with"):
        serve_graph(path, to_graph(LogisticRegression(max_iter=1000).fit(X, y)))


def test_graph_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`model.describe` needs no trust for an .onnx file, and makes golden rows of it."""
    (tmp_path / "model.onnx").write_bytes(to_graph(LogisticRegression(max_iter=1000).fit(X, y)))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:2]))
    main([str(tmp_path / "model.onnx"), "--golden", str(tmp_path / "rows.json")])
    assert 'x3 = { type = "float", example = 0.2 }' in capsys.readouterr().out
    golden = json.loads((tmp_path / "model.golden.json").read_text())
    assert [answer["prediction"] for answer in golden["predictions"]] == [0, 0]


def export(estimator: Any, types: Any = None, **options: Any) -> bytes:
    """Convert an estimator of four features as its owner would, with the options of its converter."""
    types = types or [("X", FloatTensorType([None, 4]))]
    options = {id(estimator): options} if options else {}
    graph: bytes = to_onnx(estimator, initial_types=types, options=options, target_opset=OPSETS).SerializeToString()
    return graph


OPSETS = {"": 18, "ai.onnx.ml": 3}
BOTH = np.where(y > 0, "yes", "no")
VOTERS = [("a", LogisticRegression(max_iter=1000)), ("b", GaussianNB()), ("c", DecisionTreeClassifier(random_state=0))]


@pytest.mark.filterwarnings("ignore:.*prob:FutureWarning")
@pytest.mark.parametrize(
    ("estimator", "target", "options"),
    [
        (LogisticRegression(max_iter=1000), NAMES, {"zipmap": "columns"}),
        (LogisticRegression(max_iter=1000), y - 1, {"zipmap": "columns"}),
        (LogisticRegression(max_iter=1000), BOTH, {"zipmap": "columns"}),
        (SVC(probability=True, random_state=0), NAMES, {"zipmap": "columns"}),
        (LogisticRegression(max_iter=1000), NAMES, {"zipmap": True}),
        (RandomForestClassifier(n_estimators=10, random_state=0), y + 5, {"zipmap": True}),
        (GridSearchCV(LogisticRegression(max_iter=1000), {"C": [1, 2]}), BOTH, {"zipmap": True}),
        (SVC(probability=True, random_state=0), NAMES, {"zipmap": False}),
        (OneVsRestClassifier(LogisticRegression()), NAMES, {"zipmap": False}),
        (CalibratedClassifierCV(LinearSVC()), NAMES, {"zipmap": False}),
        (AdaBoostClassifier(n_estimators=5, random_state=0), BOTH, {"zipmap": False}),
        (QuadraticDiscriminantAnalysis(), NAMES, {"zipmap": False}),
        (StackingClassifier(VOTERS), NAMES, {"zipmap": False}),
        (VotingClassifier(VOTERS, voting="hard", flatten_transform=False), NAMES, {"zipmap": False}),
        (VotingClassifier(VOTERS, voting="soft", flatten_transform=False), NAMES, {"zipmap": True}),
        (RandomForestClassifier(5, random_state=0), NAMES, {"zipmap": False, "decision_leaf": True}),
        (LogisticRegression(max_iter=1000), NAMES, {"zipmap": False, "output_class_labels": True}),
        (SGDClassifier(random_state=0), NAMES, {"zipmap": False}),
        (SGDClassifier(random_state=0), BOTH, {"zipmap": False}),
        (Perceptron(), y > 0, {"zipmap": False}),
        (RidgeClassifier(), BOTH, {"zipmap": False}),
        (LinearSVC(), NAMES, {}),
        (LinearSVC(), BOTH, {}),
        (SVC(), NAMES, {"zipmap": False}),
        (SVC(), BOTH, {"zipmap": False, "raw_scores": True}),
        (IsolationForest(n_estimators=10, random_state=0), None, {}),
        (IsolationForest(n_estimators=10, random_state=0), None, {"score_samples": True}),
        (OneClassSVM(nu=0.3), None, {}),
        (SGDOneClassSVM(random_state=0), None, {}),
        (LocalOutlierFactor(novelty=True), None, {"score_samples": True}),
        (KMeans(3, n_init=1, random_state=0), None, {}),
        (MiniBatchKMeans(1, random_state=0), None, {}),
        (GaussianMixture(3, random_state=0), None, {"score_samples": True}),
        (GaussianProcessRegressor(alpha=0.1), X[:, 0] + X[:, 1], {"return_std": True}),
        (BayesianRidge(), X[:, 0] + X[:, 1], {"return_std": True}),
        (RandomForestRegressor(5, random_state=0), X[:, :2], {"decision_path": True, "decision_leaf": True}),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "fit") else "",
)
def test_file_of_each_kind_is_answered_as_in_sklearn(
    tmp_path: Path, estimator: Any, target: Any, options: dict[str, Any]
) -> None:
    """What an export gives has the name and the numbers that it has in scikit-learn, in far rows too, or no name."""
    estimator.fit(X, target)
    answers = answers_of(prove_graph(tmp_path / "model.onnx", export(estimator, **options)).model.predictor, WIDE)
    expected = answers_of(Predictor(estimator), WIDE)
    if target is not None and target.dtype == bool:  # which ONNX has as integers
        expected = [answer | {"prediction": int(answer["prediction"])} for answer in expected]
    scale = sizes_of(expected)
    pairs = zip(answers, expected, strict=True)
    wrong = [pair for pair in pairs if not is_close(*pair, scale, Tolerance(1e-4, 1e-5))]
    assert not wrong, wrong[0]


@pytest.mark.filterwarnings("ignore")  # of what converters do
@pytest.mark.parametrize("labels", [NAMES, BOTH, y + 5], ids=["three", "two", "int"])
@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(max_iter=1000),
        GradientBoostingClassifier(n_estimators=5),
        HistGradientBoostingClassifier(max_iter=5),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_raw_scores_are_decisions(tmp_path: Path, estimator: Any, labels: Any) -> None:
    """An export with raw_scores has the numbers of decision_function, and no probabilities."""
    graph = export(estimator.fit(X, labels), zipmap=False, raw_scores=True)
    answers = answers_of(prove_graph(tmp_path / "model.onnx", graph).model.predictor, WIDE)
    given = [answer["decision"] for answer in answers]
    given = [[*row.values()] if isinstance(row, dict) else row for row in given]
    assert np.allclose(given, estimator.decision_function(WIDE), rtol=1e-4, atol=1e-4)
    assert {frozenset(answer) for answer in answers} == {frozenset({"prediction", "decision"})}


def test_outputs_that_no_answer_has_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log says once what a file gives and an answer does not have."""
    prove_graph(tmp_path / "model.onnx", export(KMeans(3, n_init=1).fit(X)))
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert line["event"] == "onnx_outputs_left_out"
    assert (line["served"], line["left_out"]) == (["label"], ["scores"])


def make_graph(nodes: list[Any], outputs: dict[str, Any], width: int = 3, rows: Any = None, **constants: Any) -> bytes:
    """Make a graph by hand: `outputs` are types by name, with a shape or without, and `constants` are initializers."""
    infos = [
        onnx.helper.make_tensor_value_info(name, *given)
        if isinstance(given, tuple)
        else onnx.helper.make_tensor_value_info(name, given, None)
        for name, given in outputs.items()
    ]
    X = onnx.helper.make_tensor_value_info("X", FLOAT, [rows, width])
    tensors = [onnx.numpy_helper.from_array(np.array(value), name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "made", [X], infos, tensors)
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("ai.onnx.ml", 3)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


FLOAT, DOUBLE, INT, STRING = (getattr(onnx.TensorProto, name) for name in ("FLOAT", "DOUBLE", "INT64", "STRING"))
node = onnx.helper.make_node
SOFTMAX = node("Softmax", ["X"], ["p"], axis=1)
HIGHEST = node("ArgMax", ["X"], ["at"], axis=1, keepdims=0)
OF_CLASSES = node("ArrayFeatureExtractor", ["names", "at"], ["found"], domain="ai.onnx.ml")
LABEL = [HIGHEST, OF_CLASSES, node("Flatten", ["found"], ["label"], axis=1)]
CLASSES = {"names": ["b", "c", "a"]}
SWAP = node("Gather", ["p", "swapped"], ["q"], axis=1)
MADE_ROWS = np.random.default_rng(0).normal(0, 2, (50, 3)).astype(np.float32).astype(np.float64)


def shares_of(X: Any) -> Any:
    return np.exp(X) / np.exp(X).sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("nodes", "outputs", "score"),
    [
        ([SOFTMAX, *LABEL], {"p": FLOAT, "label": STRING}, "probabilities"),
        ([SOFTMAX, *LABEL], {"p": (FLOAT, [None, 3]), "found": (STRING, [1, None])}, "probabilities"),
        ([SOFTMAX, *LABEL], {"q7": FLOAT, "label": STRING, "probabilities": FLOAT}, "probabilities"),
        ([SOFTMAX, *LABEL], {"c": FLOAT, "a": FLOAT, "label": STRING, "b": FLOAT}, "probabilities"),
        (LABEL, {"label": STRING, "logits": FLOAT}, "decision"),
        (LABEL, {"label": STRING}, None),
    ],
    ids=["swapped", "flat", "three", "columns", "decision", "label"],
)
def test_outputs_are_told_apart_in_any_order(tmp_path: Path, nodes: Any, outputs: Any, score: str | None) -> None:
    """Names, types and operators say what an output is, and neither its place nor its shape have to."""
    more = {
        "q7": [node("Mul", ["X", "X"], ["q7"]), node("Identity", ["p"], ["probabilities"])],
        "a": [node("Split", ["p"], ["b", "c", "a"], axis=1, num_outputs=3)],
        "logits": [node("Gemm", ["X", "one"], ["logits"])],
    }
    nodes = [*nodes, *next((made for name, made in more.items() if name in outputs), [])]
    constants = CLASSES | ({"one": np.eye(3, dtype=np.float32)} if "logits" in outputs else {})
    service = prove_graph(tmp_path / "model.onnx", make_graph(nodes, outputs, **constants))
    values = {"probabilities": shares_of(MADE_ROWS), "decision": MADE_ROWS}.get(score or "", [])
    answers = answers_of(service.model.predictor, MADE_ROWS)
    assert [answer.pop("prediction") for answer in answers] == [CLASSES["names"][at] for at in MADE_ROWS.argmax(axis=1)]
    assert all([*answer] == [score] for answer in answers if score)
    given = [[answer[score][name] for name in CLASSES["names"]] for answer in answers if score]
    assert np.allclose(given, values, atol=1e-6)


@pytest.mark.parametrize(
    ("nodes", "outputs", "message"),
    [
        ([SOFTMAX], {"p": FLOAT}, "gives 'p', which has scores of classes, and no prediction; keep the output of l"),
        ([node("Sigmoid", ["X"], ["p"])], {"p": FLOAT}, "gives 'p', which has scores of classes, and no prediction"),
        ([node("Abs", ["X"], ["probabilities"])], {"probabilities": FLOAT}, "which has scores of classes"),
        (
            [node("Abs", ["X"], ["low"]), node("Neg", ["X"], ["high"])],
            {"low": FLOAT, "high": FLOAT},
            "gives 'low', 'high', and its graph does not say which is the prediction; name the prediction 'label'",
        ),
        (
            [SOFTMAX, *LABEL, node("Neg", ["X"], ["other"])],
            {"label": STRING, "p": FLOAT, "other": FLOAT},
            "gives 'p', 'other', and its graph does not say which has the scores of classes; name one of them 'prob",
        ),
        ([SOFTMAX, *LABEL, SWAP], {"label": STRING, "q": FLOAT}, "gives 'q', such as .* are no probabilities"),
        ([*LABEL, node("Sigmoid", ["X"], ["p"])], {"label": STRING, "p": FLOAT}, "are no probabilities, nor known dec"),
        ([*LABEL, node("LogSoftmax", ["X"], ["p"])], {"label": STRING, "p": FLOAT}, "are no probabilities, nor known"),
        (
            [*LABEL, node("Exp", ["X"], ["p"])],
            {"label": STRING, "p": FLOAT},
            "are no probabilities, nor known",
        ),
        (
            [*LABEL, node("Mul", ["X", "nan"], ["p"])],
            {"label": STRING, "p": FLOAT},
            "gives no number as 'p' for any row; leave it out",
        ),
        (
            [*LABEL, node("Concat", ["X", "X"], ["p"], axis=1)],
            {"label": STRING, "p": FLOAT},
            "gives 6 columns as 'p', for 3 classes; leave it out",
        ),
        (
            [node("ReduceSum", ["X", "one"], ["s"]), node("Greater", ["s", "half"], ["label"])],
            {"label": onnx.TensorProto.BOOL, "s": FLOAT},
            "gives 's', and its graph does not say of which classes; leave it out",
        ),
        (
            [
                node("ReduceSum", ["X", "one"], ["scores"]),
                node("Less", ["scores", "half"], ["is"]),
                node("Where", ["is", "pos", "neg"], ["label"]),
            ],
            {"label": INT, "scores": FLOAT},
            "gives 'scores', which is not below 0 for outliers, whose label is -1; leave it out",
        ),
        ([node("Identity", ["half"], ["variable"])], {"variable": FLOAT}, "of which none is a prediction that depends"),
        ([], {"half": FLOAT}, "gives 'half', of which none is a prediction that depends on its inputs"),
        (
            [node("Unsqueeze", ["X", "one"], ["u"]), node("Expand", ["u", "cube"], ["variable"])],
            {"variable": FLOAT},
            r"gives an output of shape \(1, 2, 3\) for 1 rows",
        ),
        (
            [node("SequenceConstruct", ["X", "X"], ["variable"])],
            {},
            r"gives 'variable' as seq\(tensor\(float\)\), not as a tensor",
        ),
    ],
    ids=[
        *("softmax", "sigmoid", "probabilities", "numbers", "scores", "permuted", "unshared", "logarithm", "positive"),
        *("nan", "wide", "truth", "sign", "constant", "initializer", "cube", "sequence"),
    ],
)
def test_output_that_cannot_be_told_is_refused(tmp_path: Path, nodes: Any, outputs: Any, message: str) -> None:
    """One line says which output it is, why, and what to do; nothing is guessed."""
    used = {name for item in nodes for name in item.input} | {*outputs}
    known = {
        **CLASSES,
        "swapped": np.array([1, 0, 2]),
        "one": np.array([1]),
        "half": np.array([0.5], np.float32),
        "nan": np.array([np.nan], np.float32),
        "cube": np.array([1, 2, 1]),
        "neg": np.array([-1]),
        "pos": np.array([1]),
    }
    graph = make_graph(nodes, outputs, **{name: value for name, value in known.items() if name in used})
    if not outputs:
        model = onnx.load_model_from_string(graph)
        inner = onnx.helper.make_tensor_type_proto(FLOAT, None)
        model.graph.output.append(onnx.helper.make_value_info("variable", onnx.helper.make_sequence_type_proto(inner)))
        graph = model.SerializeToString()
    with pytest.raises(ModelError, match=message) as caught:
        prove_graph(tmp_path / "model.onnx", graph)
    assert "\n" not in str(caught.value)


def test_label_that_is_no_class_is_refused(tmp_path: Path) -> None:
    """skl2onnx gives the position of the class for one-versus-one classifiers, which only maps of the scores show."""
    estimator = OneVsOneClassifier(LogisticRegression(max_iter=1000)).fit(X, y + 5)
    with pytest.raises(ModelError, match=r"gives . as 'output_label', with the classes 5, 6, 7; it was not c"):
        prove_graph(tmp_path / "model.onnx", export(estimator))
    with pytest.raises(ModelError, match="nor known decisions; it was not converted as it should be; serve the est"):
        prove_graph(tmp_path / "model.onnx", export(estimator, zipmap=False))


@pytest.mark.parametrize("label", ["a", 4])
def test_trees_of_a_single_class_are_refused(tmp_path: Path, label: Any) -> None:
    """ONNX Runtime would give 1 for them, or end the process."""
    forest = RandomForestClassifier(2).fit(X, [label] * len(X))
    with pytest.raises(ModelError, match="has trees of a single class, which ONNX Runtime does not answer"):
        prove_graph(tmp_path / "model.onnx", export(forest, zipmap=False))
    with pytest.raises(ModelError, match=r"cannot be converted to ONNX: .* has trees of a single class"):
        serve_estimator(tmp_path / "model.joblib", forest, **ONNX)


@pytest.mark.parametrize("outputs", [{"label": INT}, {"label": INT, "probabilities": FLOAT}], ids=["label", "both"])
def test_label_of_trees_that_is_no_class_is_refused(tmp_path: Path, outputs: Any) -> None:
    """ONNX Runtime gives 0 in place of -1 for trees with weights for both classes, as CatBoost makes them."""
    trees = node(
        "TreeEnsembleClassifier",
        ["X"],
        ["label", "probabilities"],
        domain="ai.onnx.ml",
        classlabels_int64s=[-1, 1],
        post_transform="LOGISTIC",
        class_ids=[0, 1, 0, 1],
        class_nodeids=[1, 1, 2, 2],
        class_treeids=[0, 0, 0, 0],
        class_weights=[0.8, -0.8, -0.7, 0.7],
        nodes_nodeids=[0, 1, 2],
        nodes_treeids=[0, 0, 0],
        nodes_featureids=[0, 0, 0],
        nodes_values=[0.0, 0.0, 0.0],
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
        nodes_truenodeids=[1, 0, 0],
        nodes_falsenodeids=[2, 0, 0],
    )
    with pytest.raises(ModelError, match="gives 0 as 'label', with the classes -1, 1; it was not converted as it"):
        prove_graph(tmp_path / "model.onnx", make_graph([trees], outputs))


@pytest.mark.filterwarnings("ignore:.*prob:FutureWarning")
def test_decisions_against_the_labels_are_refused(tmp_path: Path) -> None:
    """Of a support vector machine of two classes skl2onnx turns the sign, unless it is asked for raw scores."""
    with pytest.raises(ModelError, match=r"convert a support vector machine with options=\{'raw_scores': True\}"):
        prove_graph(tmp_path / "model.onnx", export(SVC().fit(X, BOTH), zipmap=False))


def test_trees_without_one_of_the_outputs_are_refused(tmp_path: Path) -> None:
    """Some converters put the trees of all outputs into the first, and leave the others 0."""
    model = onnx.load_model_from_string(export(DecisionTreeRegressor().fit(X, X[:, :2])))
    (trees,) = (item for item in model.graph.node if item.op_type == "TreeEnsembleRegressor")
    (targets,) = (item for item in trees.attribute if item.name == "target_ids")
    targets.ints[:] = [0] * len(targets.ints)
    with pytest.raises(ModelError, match="has trees for 1 of its 2 outputs; convert a model for each output"):
        prove_graph(tmp_path / "model.onnx", model.SerializeToString())


@pytest.mark.parametrize("labels", [NAMES, y, BOTH], ids=["str", "int", "two"])
def test_file_of_trees_alone_is_served(tmp_path: Path, labels: Any) -> None:
    """CatBoost gives a classifier of trees with a ZipMap, and operators of no other domain."""
    estimator = GradientBoostingClassifier(n_estimators=5).fit(X, labels)
    model = onnx.load_model_from_string(export(estimator, zipmap=False))
    (trees,) = (item for item in model.graph.node if item.op_type == "TreeEnsembleClassifier")
    kind = "classlabels_strings" if labels.dtype.kind == "U" else "classlabels_int64s"
    zipped = node("ZipMap", [trees.output[1]], ["maps"], domain="ai.onnx.ml", **{kind: estimator.classes_.tolist()})
    scores = onnx.helper.make_tensor_type_proto(FLOAT, None)
    maps = onnx.helper.make_map_type_proto(STRING if labels.dtype.kind == "U" else INT, scores)
    outputs = [model.graph.output[0], onnx.helper.make_value_info("maps", onnx.helper.make_sequence_type_proto(maps))]
    graph = onnx.helper.make_graph([trees, zipped], "trees", model.graph.input, outputs)
    opsets = [onnx.helper.make_opsetid("ai.onnx.ml", 2)]
    data = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=3).SerializeToString()
    answers = answers_of(prove_graph(tmp_path / "model.onnx", data).model.predictor, WIDE)
    expected = answers_of(Predictor(estimator), WIDE)
    assert all(map(is_close, answers, expected, [1.0] * len(WIDE), [TOLERANCE_OF_FLOAT32] * len(WIDE)))


ONE_ROW = [("X", FloatTensorType([1, 4]))]


@pytest.mark.parametrize("framework", app.FRAMEWORKS)
@pytest.mark.parametrize("options", [{"zipmap": False}, {}, {"zipmap": "columns"}], ids=["tensor", "maps", "columns"])
def test_graph_for_one_row_is_asked_row_by_row(tmp_path: Path, framework: str, options: Any) -> None:
    """Arrays, several requests at once, golden rows and `model.describe` get for each row what it gets alone."""
    estimator = LogisticRegression(max_iter=1000).fit(X, NAMES)
    path = tmp_path / "model.onnx"
    path.write_bytes(export(estimator, ONE_ROW, **options))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[::30]))
    main([str(path), "--golden", str(tmp_path / "rows.json")])
    native = serve_graph(path, path.read_bytes(), framework=framework)
    many = call(native, post_case(ROWS)).json
    assert [call(native, post_case(row)).json for row in ROWS[::30]] == many[::30]
    assert json.loads((tmp_path / "model.golden.json").read_text())["predictions"] == many[::30]
    expected = answers_of(Predictor(estimator), X)
    assert all(map(is_close, many, expected, [1.0] * len(X), [TOLERANCE_OF_FLOAT32] * len(X)))


def test_requests_of_a_graph_for_one_row_share_calls(tmp_path: Path) -> None:
    """Its answers do not depend on other rows, so that nothing warns of it."""
    service = prove_graph(tmp_path / "model.onnx", export(LogisticRegression(max_iter=1000).fit(X, NAMES), ONE_ROW))
    assert service.queue.can_share


@pytest.mark.parametrize("rows", [(1, 1), (None, 1), (1, None)])
def test_graph_with_an_input_for_one_row_is_asked_row_by_row(tmp_path: Path, rows: Any) -> None:
    """One input whose first dimension is 1 is enough, whichever it is."""
    estimator = LogisticRegression().fit(X[:, :2], NAMES)
    model = onnx.load_model_from_string(export(estimator, [("X", FloatTensorType([1, 2]))], zipmap=False))
    del model.graph.input[:]
    for name, size in zip("ab", rows, strict=True):
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, FLOAT, [size, 1]))
    model.graph.node.insert(0, node("Concat", ["a", "b"], ["X"], axis=1))
    service = prove_graph(tmp_path / "model.onnx", model.SerializeToString())
    answers = service.model.answer([{"a": a, "b": b} for a, b in X[:, :2].tolist()], "rows")
    assert [answer["prediction"] for answer in answers] == estimator.predict(X[:, :2]).tolist()


@pytest.mark.parametrize("change", ["reshape", "transpose", "sum"])
def test_graph_that_answers_no_two_rows_is_asked_row_by_row(tmp_path: Path, change: str) -> None:
    """What is inside may be for one row, or mix rows, where the input does not show it."""
    nodes = {
        "reshape": [node("Reshape", ["p", "shape"], ["probabilities"])],
        "transpose": [node("Transpose", ["p"], ["probabilities"])],
        "sum": [
            node("ReduceSum", ["p"], ["all"]),
            node("Div", ["p", "all"], ["probabilities"]),
        ],
    }[change]
    shape = {"shape": np.array([1, 3])} if change == "reshape" else {}
    graph = make_graph([SOFTMAX, *nodes, *LABEL], {"label": STRING, "probabilities": FLOAT}, **shape, **CLASSES)
    service = prove_graph(tmp_path / "model.onnx", graph)
    rows = [{f"x{column}": value for column, value in enumerate(row)} for row in MADE_ROWS.tolist()]
    given = [[*answer["probabilities"].values()] for answer in service.model.answer(rows, "rows")]
    assert np.allclose(given, shares_of(MADE_ROWS), atol=1e-6)


def test_probabilities_that_float32_lost_are_null(tmp_path: Path) -> None:
    """Where all probabilities of a row are too small for a graph's numbers, none is given as 0."""
    estimator = OneVsRestClassifier(LogisticRegression(max_iter=1000)).fit(X, NAMES)
    service = prove_graph(tmp_path / "model.onnx", export(estimator, zipmap=False))
    far = np.array([[1000, 100, 0, -100], *X.tolist()])
    first, *others = ([*answer["probabilities"].values()] for answer in answers_of(service.model.predictor, far))
    assert first == [None] * 3
    assert all(sum(numbers) == pytest.approx(1) for numbers in others)


def test_graph_for_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    """Neither one row nor any number can be asked of it."""
    graph = make_graph([SOFTMAX, *LABEL], {"label": STRING, "p": FLOAT}, rows=5, **CLASSES)
    expected = r"takes 'X' as 5 rows at a time; convert it for any number of rows, as of shape \[None, 3\]"
    with pytest.raises(ModelError, match=expected):
        prove_graph(tmp_path / "model.onnx", graph)


def test_golden_rows_are_answered_under_the_right_names(tmp_path: Path) -> None:
    """Golden rows that scikit-learn answered are reproduced by its exports of a detector and of decisions."""
    for estimator in (IsolationForest(n_estimators=10, random_state=0), LinearSVC()):
        rows, path = ROWS[::10], tmp_path / "model.onnx"
        answers = answers_of(Predictor(estimator.fit(X, NAMES)), X[::10])
        golden = {"versions": running_versions(), "rows": rows, "predictions": answers}
        path.with_suffix(".golden.json").write_text(json.dumps(golden))
        native = serve_graph(path, export(estimator))
        assert is_close(call(native, post_case(rows)).json, answers, 10.0, TOLERANCE_OF_FLOAT32)


@each_combination()
def test_file_is_served_by_each_worker(serve: Starter, tmp_path: Path, combination: tuple[str, str]) -> None:
    """Columns of classes, and a graph for one row, are answered alike by real servers, and as in scikit-learn."""
    estimator = LogisticRegression(max_iter=1000).fit(X, NAMES)
    path = tmp_path / "model.onnx"
    path.write_bytes(export(estimator, ONE_ROW, zipmap="columns"))
    settings = tmp_path / "settings.toml"
    settings.write_text('[model]\npath = "model.onnx"\n[features]\n')
    server = serve(**gunicorn_environment(*combination, SERVING_SETTINGS=str(settings)))
    answers = server.post(ROWS).json
    with ThreadPoolExecutor(8) as pool:
        assert [answer.json for answer in pool.map(server.post, ROWS)] == answers
    expected = answers_of(Predictor(estimator), X)
    assert all(map(is_close, answers, expected, [1.0] * len(X), [TOLERANCE_OF_FLOAT32] * len(X)))
    assert "onnx_outputs_left_out" not in server.text


@each_worker()
def test_session_of_the_master_answers_in_a_worker(serve: Starter, combination: tuple[str, str]) -> None:
    """What gunicorn's master loaded is used after the fork, and started no thread for which a worker would wait."""
    server = serve(**gunicorn_environment(*combination, SERVING_MODEL__RUNTIME="onnx"))
    assert server.post(GOLDEN).json[0]["prediction"] == "setosa"
    assert server.stop() == 0

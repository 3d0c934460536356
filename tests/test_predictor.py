"""What the predictor answers, for every kind of estimator."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from jsonschema import Draft202012Validator
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.cross_decomposition import PLSRegression
from sklearn.datasets import load_diabetes, load_iris
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    IsolationForest,
    RandomForestClassifier,
)
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeClassifier
from sklearn.mixture import GaussianMixture
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import ClassifierChain, MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC, OneClassSVM
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

import app
from serving.errors import ModelError
from serving.predictor.predictor import Predictor
from tests.lib import estimators
from tests.lib.apps import answers_of, call, make_settings, serve_estimator
from tests.lib.cases import Case
from tests.lib.clients import ROW, post_case

X, y = load_iris(return_X_y=True)


def make_row(values: Any) -> dict[str, float]:
    return {f"x{column}": value for column, value in enumerate(values)}


def test_shipped_model_knows_names_and_species(framework: str) -> None:
    """The features are the four of Fisher's data, in cm, and the classes are the species."""
    service = app.make_service(make_settings(framework=framework))
    assert service.model.contract.names == ["sepal_length", "sepal_width", "petal_length", "petal_width"]
    assert service.model.predictor.classes == ["setosa", "versicolor", "virginica"]
    predictions = answers_of(service.model.predictor, X)
    accuracy = np.mean(
        [load_iris().target_names[label] == p["prediction"] for label, p in zip(y, predictions, strict=True)]
    )
    assert accuracy > 0.95


def test_regressor_answers_a_number(tmp_path: Path) -> None:
    """Without classes there are no probabilities."""
    X, y = load_diabetes(return_X_y=True)
    estimator = LinearRegression().fit(X, y)
    answer = call(serve_estimator(tmp_path / "model.joblib", estimator), post_case(make_row(X[0].tolist())))
    assert answer.json == {"prediction": estimator.predict(X[:1])[0]}


def test_named_pipeline_does_not_warn(tmp_path: Path) -> None:
    """An estimator fitted on named columns is asked without names, and says nothing of it: warnings are errors here."""
    frame = load_iris(as_frame=True).data.set_axis(list(ROW), axis="columns")
    estimator = make_pipeline(StandardScaler(), LogisticRegression()).fit(frame, y)
    assert call(serve_estimator(tmp_path / "model.joblib", estimator), post_case(ROW)).json["prediction"] == 0


def test_crash_answers_500_without_internals(tmp_path: Path, framework: str) -> None:
    """What an estimator raises is nobody's business but the log's."""
    native = serve_estimator(tmp_path / "model.joblib", estimators.Failing(), framework=framework)
    answer = call(native, post_case({"x0": 1.5}))
    assert answer.status == 500
    assert answer.json == {"detail": "internal error; the log has it under this X-Request-ID"}


def answer_of(estimator: Any, X: Any, **model: Any) -> dict[str, Any]:
    """Return what the predictor says of the first row."""
    return answers_of(Predictor(estimator, **model), X)[0]


LABELS = np.array(["few", "many"])[(y > 0).astype(int)]
INDICATOR = np.column_stack([y == 0, y > 0]).astype(int)
SEVERAL = np.column_stack([load_iris().target_names[y], LABELS])


@pytest.mark.parametrize("estimator", [LinearSVC(), RidgeClassifier()], ids=lambda estimator: type(estimator).__name__)
def test_decision_stands_in_for_probabilities(estimator: Any) -> None:
    """Where there are no probabilities the decision values are given: one for two classes, else one for each class."""
    binary, several = estimator.fit(X, LABELS), clone(estimator).fit(X, y)
    assert answer_of(binary, X) == {"prediction": "few", "decision": binary.decision_function(X)[0]}
    decision = dict(zip("012", several.decision_function(X)[0], strict=True))
    assert answer_of(several, X) == {"prediction": 0, "decision": decision}


def test_decision_by_pairs_of_classes_is_a_list() -> None:
    """One-vs-one decision values are of no class alone, though there be as many of them."""
    estimator = SVC(decision_function_shape="ovo").fit(X, y)
    assert answer_of(estimator, X)["decision"] == estimator.decision_function(X)[0].tolist()


@pytest.mark.parametrize(
    "estimator",
    [
        RandomForestClassifier(n_estimators=3),
        OneVsRestClassifier(LogisticRegression()),
        KNeighborsClassifier(),
        MultiOutputClassifier(LogisticRegression()),
        ClassifierChain(LogisticRegression()),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_multilabel_has_a_probability_for_each_label(estimator: Any) -> None:
    """Every multilabel classifier answers alike: for each label whether it is there, and how likely."""
    estimator.fit(X, INDICATOR)
    score = estimator.predict_proba(X[:1])
    likely = [label[0, 1] for label in score] if isinstance(score, list) else score[0].tolist()
    answer = answer_of(estimator, X, outputs=["setosa", "other"])
    assert answer["prediction"] == {"setosa": 1, "other": 0}
    assert answer["probabilities"] == pytest.approx(dict(zip(["setosa", "other"], likely, strict=True)))


def test_label_that_was_never_seen_is_impossible() -> None:
    """A label that is 0 in all of the training data has the probability 0."""
    estimator = RandomForestClassifier(n_estimators=2).fit(X, INDICATOR * [1, 0])
    assert answer_of(estimator, X) == {"prediction": {"y0": 1, "y1": 0}, "probabilities": {"y0": 1.0, "y1": 0.0}}


def test_several_classes_are_answered_by_output() -> None:
    """A multi-output classifier gives each output's class and the probabilities of its classes."""
    estimator = DecisionTreeClassifier().fit(X, SEVERAL)
    certain = {"setosa": 1.0, "versicolor": 0.0, "virginica": 0.0}
    answer = {"y0": certain, "y1": {"few": 1.0, "many": 0.0}}
    assert answer_of(estimator, X) == {"prediction": {"y0": "setosa", "y1": "few"}, "probabilities": answer}


@pytest.mark.parametrize(
    ("estimator", "columns", "expected"),
    [
        (LinearRegression(), 1, None),
        (LinearRegression(), 2, {"y0", "y1"}),
        (PLSRegression(), 1, None),
        (DecisionTreeRegressor(), 3, {"y0", "y1", "y2"}),
    ],
)
def test_regressor_answers_each_output(estimator: Any, columns: int, expected: set[str] | None) -> None:
    """Several numbers are named; a single one, in a column of its own too, is plain."""
    estimator.fit(X, X[:, :columns] * 2)
    prediction = answer_of(estimator, X)["prediction"]
    given = np.ravel(list(prediction.values()) if isinstance(prediction, dict) else prediction)
    assert (set(prediction) if isinstance(prediction, dict) else None) == expected
    assert given.tolist() == np.ravel(estimator.predict(X)[0]).tolist()


@pytest.mark.parametrize(
    "estimator", [IsolationForest(n_estimators=5), OneClassSVM(), LocalOutlierFactor(novelty=True)]
)
def test_outlier_detector_answers_label_and_score(estimator: Any) -> None:
    """1 is an inlier, -1 an outlier, and the score is below 0 for outliers."""
    estimator.fit(X)
    far = np.full((1, 4), 99.0)
    assert answer_of(estimator, far) == {"prediction": -1, "score": estimator.decision_function(far)[0]}
    assert answer_of(estimator, far)["score"] < 0


def test_clusters_are_answered_with_what_there_is() -> None:
    """A clusterer gives the number of the cluster, a mixture the probability of each of its components too."""
    clusters, mixture = KMeans(2, n_init=1).fit(X), GaussianMixture(2, random_state=0).fit(X)
    assert answer_of(clusters, X) == {"prediction": clusters.predict(X)[0]}
    probabilities = dict(zip("01", mixture.predict_proba(X)[0], strict=True))
    assert answer_of(mixture, X) == {"prediction": mixture.predict(X)[0], "probabilities": probabilities}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.array([np.nan]), None),
        (np.array([np.inf]), None),
        (np.array([1], dtype=np.int8), 1),
        (np.array([True]), True),
        (np.array([0.5], dtype=np.float32), 0.5),
        (np.array([np.float64(0.5)], dtype=object), 0.5),
        (np.array([np.str_("a")], dtype=object), "a"),
        (np.array([b"a"]), "a"),
        (np.array(["2026-11-24"], dtype="datetime64[ns]"), "2026-11-24T00:00:00"),
        (pd.Series([1], dtype="Int64"), 1),
        (pd.Series([pd.NA], dtype="Int64"), None),
        (pd.Series(["a"], dtype="category"), "a"),
        (pd.Series([pd.Timestamp("2026-11-24")]), "2026-11-24T00:00:00"),
        (pd.Series([pd.NaT]), None),
        (pd.Series([pd.Period("2026-11")]), "2026-11"),
        (pd.DataFrame({"a": [1.5], "b": [np.nan]}), {"y0": 1.5, "y1": None}),
        (csr_array([[0, 1]]), {"y0": 0, "y1": 1}),
        ([1], 1),
    ],
)
def test_answer_is_plain_json(tmp_path: Path, given: Any, expected: Any) -> None:
    """Whatever type an estimator answers with, numpy's or pandas', it is plain JSON, and null where it is no number."""
    native = serve_estimator(tmp_path / "model.joblib", estimators.Fixed(given))
    assert call(native, post_case({"x0": 1})).json == {"prediction": expected}
    schema = call(native, Case("get", "GET", "/openapi.json")).json["components"]["schemas"]["Prediction"]
    Draft202012Validator(schema).validate({"prediction": expected})


@pytest.mark.parametrize(
    ("labels", "keys"),
    [
        ([False, True], ["false", "true"]),
        ([0, 1], ["0", "1"]),
        ([0.5, 1.5], ["0.5", "1.5"]),
        ([b"a", b"b"], ["a", "b"]),
        (
            np.array(["2026-01-01", "2026-01-02"], dtype="datetime64[us]"),
            ["2026-01-01T00:00:00", "2026-01-02T00:00:00"],
        ),
    ],
    ids=["bool", "int", "float", "bytes", "date"],
)
def test_probabilities_have_the_classes_as_the_prediction_has_them(
    tmp_path: Path, labels: Any, keys: list[str]
) -> None:
    """The key of a class is what a prediction of it is, as text."""
    estimator = DummyClassifier().fit(X[:2], np.asarray(labels))
    answer = call(serve_estimator(tmp_path / "model.joblib", estimator), post_case(make_row(X[0].tolist()))).json
    assert list(answer["probabilities"]) == keys
    assert json.dumps(answer["prediction"]).strip('"') in keys


def test_outputs_of_settings_must_be_as_many(tmp_path: Path) -> None:
    """Names for more or fewer outputs than there are end the start."""
    with pytest.raises(ModelError, match="has a single output, which goes without a name"):
        serve_estimator(tmp_path / "model.joblib", LinearRegression().fit(X, y), model={"outputs": ["a"]})
    for outputs in (["a"], ["a", "b", "c"]):
        with pytest.raises(ModelError, match=f"has 2 outputs, but model.outputs names {len(outputs)}"):
            serve_estimator(tmp_path / "model.joblib", LinearRegression().fit(X, X[:, :2]), model={"outputs": outputs})


@pytest.mark.parametrize(
    "estimator",
    [
        RandomForestClassifier(n_estimators=2).fit(X, SEVERAL),
        RandomForestClassifier(n_estimators=2).fit(X, INDICATOR),
        LinearSVC().fit(X, y),
        LinearRegression().fit(X, X[:, :2]),
        IsolationForest(n_estimators=2).fit(X),
        GaussianMixture(2).fit(X),
    ],
    ids=["several", "multilabel", "decision", "numbers", "outlier", "mixture"],
)
def test_document_describes_the_answer(tmp_path: Path, framework: str, estimator: Any) -> None:
    """The schema of the answer has every name in it, and the answers of every row fit it."""
    native = serve_estimator(tmp_path / "model.joblib", estimator, framework=framework)
    schema = call(native, Case("get", "GET", "/openapi.json")).json["components"]["schemas"]["Prediction"]
    for answer in call(native, post_case([make_row(row) for row in X.tolist()])).json:
        Draft202012Validator(schema).validate(answer)
        assert list(schema["properties"]) == list(answer)
        for name, value in answer.items():
            assert not isinstance(value, dict) or schema["properties"][name]["required"] == list(value)


@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(),
        make_pipeline(StandardScaler(), LogisticRegression()),
        GaussianNB(),
        LinearDiscriminantAnalysis(),
        GradientBoostingClassifier(n_estimators=3),
        HistGradientBoostingClassifier(max_iter=3),
        RandomForestClassifier(n_estimators=4),
        CalibratedClassifierCV(LinearSVC()),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_class_of_the_highest_probability_is_the_prediction(estimator: Any) -> None:
    """Asked once, for probabilities, the estimator means what it says when asked for its predictions, in ties too."""
    ends = np.tile([[-1.1], [-0.9], [0.9], [1.1]], (10, 1))
    rows = np.vstack([ends, np.linspace(-1, 1, 41)[:, np.newaxis], [[0.0], [1e-17], [-1e-17]]])
    estimator.fit(ends, ends[:, 0] > 0)
    predictions = [answer["prediction"] for answer in answers_of(Predictor(estimator), rows)]
    assert predictions == estimator.predict(rows).tolist()

"""Every estimator of scikit-learn's that predicts is served as it is, in two formats, by both frameworks."""

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import skops.io
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.datasets import load_diabetes, load_iris
from sklearn.experimental import enable_halving_search_cv  # noqa: F401  # without it they are not listed
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import euclidean_distances, linear_kernel
from sklearn.naive_bayes import CategoricalNB
from sklearn.utils import get_tags
from sklearn.utils._test_common.instance_generator import _construct_instances
from sklearn.utils.discovery import all_estimators

import app
from tests.lib.apps import call, make_settings
from tests.lib.artifacts import save
from tests.lib.cases import Case
from tests.lib.clients import post_case
from tests.lib.sizes import scale

# FrozenEstimator takes its methods from the estimator inside, so its class has none.
ESTIMATORS = {name: kind for name, kind in all_estimators() if hasattr(kind, "predict") or kind is FrozenEstimator}
EXCEPTIONS: dict[str, str] = {  # class: why one of the formats does not serve it, in the words of what refuses it
    "RadiusNeighborsClassifier": "give examples in",  # a row that is made up has no neighbours
    "Birch": "Objects of type Birch are not supported yet",  # it is on skops's list of what it cannot save
}
FRAMEWORKS = {".joblib": "flask", ".skops": "fastapi"}
IN_TURN = np.arange(150).reshape(3, 50).T.ravel()[:75]  # of each species one, for halving looks at a few rows only
FLOWERS, SPECIES = (values[IN_TURN] for values in load_iris(return_X_y=True))
PATIENTS, PROGRESS = (values[:80] for values in load_diabetes(return_X_y=True))
NAMES = load_iris().target_names
LABELS = np.column_stack([SPECIES == 0, SPECIES == 1, FLOWERS[:, 0] > 5.8]).astype(int)


def construct(name: str) -> Iterator[Any]:
    """Return scikit-learn's own test instances of a class, made to predict, and alike each time."""
    kind, wanted = ESTIMATORS[name], {"random_state": 0, "novelty": True}
    frozen = [FrozenEstimator(LogisticRegression(max_iter=1000).fit(FLOWERS, SPECIES))]
    for estimator in frozen if kind is FrozenEstimator else _construct_instances(kind):
        estimator.set_params(**{key: wanted[key] for key in wanted.keys() & estimator.get_params(deep=False)})
        yield estimator


def make_rows(estimator: Any) -> Any:
    """Return rows of the kind that the estimator's tags ask for."""
    tags = get_tags(estimator).input_tags
    X = PATIENTS if is_regressor(estimator) else FLOWERS
    if tags.pairwise:
        return euclidean_distances(X) if tags.positive_only else linear_kernel(X)
    if not tags.two_d_array:
        return X[:, 2:3]
    # CategoricalNB has that tag from scikit-learn 1.7 on.
    return X.astype(int) if tags.categorical or isinstance(estimator, CategoricalNB) else X


def make_targets(estimator: Any) -> list[tuple[Any, bool]]:
    """Return targets of every kind, each with whether the estimator's tags say that it takes it."""
    tags = get_tags(estimator)
    one, several = tags.target_tags.single_output, tags.target_tags.multi_output
    if is_regressor(estimator):
        return [(PROGRESS, one), (np.column_stack([PROGRESS, PROGRESS**0.5]), several)]
    if not is_classifier(estimator):
        return [(None, True)]
    three = one and tags.classifier_tags.multi_class
    singles = [
        (SPECIES % 2, one),
        (NAMES[SPECIES % 2], False),
        (SPECIES, three),
        (NAMES.astype(object)[SPECIES], three),
    ]
    outputs = np.column_stack([SPECIES, np.digitize(FLOWERS[:, 1], [2.8, 3.2])])
    return [*singles, (LABELS, several or tags.classifier_tags.multi_label), (outputs, False)]


def fit_all(name: str) -> Iterator[tuple[Any, Any]]:
    """Yield each instance of a class as fitted on each target that it takes, with its rows.

    One that refuses a target is left out, unless its tags say that it takes it.
    """
    for blank in construct(name):
        X = make_rows(blank)
        for y, claimed in make_targets(blank):
            estimator = clone(blank)
            try:
                with warnings.catch_warnings(action="ignore"):
                    ask_scores(estimator.fit(X, y), X)  # ClassifierChain fits what it has no probabilities for
            except Exception:  # an estimator refuses a target as it likes
                if claimed:
                    raise
            else:
                yield estimator, X


def expect(estimator: Any, X: Any) -> list[dict[str, Any]]:
    """Return what the estimator itself says of each row, by the path of each value in the answer."""
    y = np.reshape(estimator.predict(X), (len(X), -1))
    several = y.shape[1] > 1
    columns = {f"prediction.y{output}" if several else "prediction": y[:, output] for output in range(y.shape[1])}
    kind, scores = ask_scores(estimator, X)
    if isinstance(scores, list):
        columns |= expect_by_output(estimator.classes_, scores)
    elif scores is not None and scores.ndim == 1:
        columns[kind] = scores
    elif scores is not None:
        numbers = range(scores.shape[1])
        names = [f"y{output}" for output in numbers] if several else getattr(estimator, "classes_", numbers)
        columns |= {f"{kind}.{name}": scores[:, column] for name, column in zip(names, numbers, strict=True)}
    values = np.column_stack([column.astype(object) for column in columns.values()])
    return [dict(zip(columns, row, strict=True)) for row in values.tolist()]


def ask_scores(estimator: Any, X: Any) -> tuple[str, Any]:
    """Ask for what there is beside the prediction, and name it."""
    if get_tags(estimator).estimator_type == "outlier_detector":
        return "score", estimator.decision_function(X)
    if hasattr(estimator, "predict_proba"):
        return "probabilities", estimator.predict_proba(X)
    return "decision", estimator.decision_function(X) if hasattr(estimator, "decision_function") else None


def expect_by_output(classes: list[Any], scores: list[Any]) -> dict[str, Any]:
    """Return the probability that each label is there, or where outputs have more classes those of each."""
    if all(set(labels) == {0, 1} for labels in classes):
        return {f"probabilities.y{output}": columns[:, 1] for output, columns in enumerate(scores)}
    return {
        f"probabilities.y{output}.{label}": columns[:, column]
        for output, columns in enumerate(scores)
        for column, label in enumerate(classes[output])
    }


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Return the values in an answer by their paths."""
    if not isinstance(value, dict):
        return {path: value}
    inner = [flatten(item, f"{path}.{name}" if path else name) for name, item in value.items()]
    return {name: item for items in inner for name, item in items.items()}


def is_same(found: Any, expected: Any) -> bool:
    """Whether a value of JSON is what the estimator said: labels exactly, numbers but for rounding."""
    if isinstance(expected, float):
        return isinstance(found, float) and math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12)
    return type(found) is type(expected) and found == expected


def serve(path: Path, estimator: Any) -> Any:
    """Save an estimator in the format of the path's suffix, and build the app around it."""
    model: dict[str, Any] = save(estimator, path)
    if path.suffix == ".skops":
        model["trusted_types"] = skops.io.get_untrusted_types(data=path.read_bytes())
    return app.create_app(make_settings(framework=FRAMEWORKS[path.suffix], model=model, features={}))


def check_served(path: Path, estimator: Any, X: Any) -> None:
    """Compare the answers to all rows and to one with the estimator's own, and with the document."""
    with warnings.catch_warnings(action="ignore"):
        expected = [*expect(estimator, X), *expect(estimator, X[:1])]
    native = serve(path, estimator)
    rows = [{f"x{column}": value for column, value in enumerate(row)} for row in X.tolist()]
    cases = [post_case(rows), post_case(rows[0]), Case("get", "GET", "/openapi.json")]
    many, one, document = (call(native, case) for case in cases)
    assert (many.status, one.status, document.status) == (200, 200, 200)
    schema = jsonschema.Draft202012Validator(document.json["components"]["schemas"]["Prediction"])
    for answer, wanted in zip([*many.json, one.json], expected, strict=True):
        found = flatten(answer)
        assert list(found) == list(wanted)
        assert all(map(is_same, found.values(), wanted.values())), (found, wanted)
        schema.validate(answer)


@pytest.mark.filterwarnings("ignore:Class PassiveAggressive:FutureWarning")  # whenever one is made or loaded
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimator_is_served_as_it_is(tmp_path: Path, name: str) -> None:
    """What is served answers in both formats as the estimator that was saved; an exception fails for its reason.

    But for the first instance of a class, each takes one format, in turn; in a full run, both.
    """
    fitted = list(fit_all(name))
    assert fitted
    refused = pytest.raises(Exception, match=EXCEPTIONS[name]) if name in EXCEPTIONS else contextlib.nullcontext()
    with refused:
        for number, (estimator, X) in enumerate(fitted):
            in_turn = [[*FRAMEWORKS][number % 2]]
            for suffix in FRAMEWORKS if number == 0 else scale(in_turn, [*FRAMEWORKS]):
                check_served(tmp_path / f"model{suffix}", estimator, X)


def test_estimators_are_nearly_all_served() -> None:
    """At most 3 % of the estimators, which are a hundred at least, are exceptions."""
    assert EXCEPTIONS.keys() <= ESTIMATORS.keys()
    assert len(ESTIMATORS) >= 100
    assert len(EXCEPTIONS) <= 0.03 * len(ESTIMATORS)

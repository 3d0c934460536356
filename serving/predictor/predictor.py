"""From X to answers, and to their JSON. An estimator is prepared once, and its predictor never changes."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import sklearn.utils
import threadpoolctl  # type: ignore[import-untyped]
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from serving.errors import ModelError, listed, reason_of
from serving.predictor.arrays import Arrays
from serving.predictor.contract import Rows
from serving.predictor.inputs import Array, Inputs, find_parts, is_opaque, type_of
from serving.predictor.predictions import Answer, Predictions, Template, as_key, leaves_of


def prepare(estimator: Any, arrays: Arrays, outputs: Sequence[str] = ()) -> Predictor:
    """Return the predictor of a fitted estimator, which is changed to take rows as `arrays` makes them.

    `outputs` names the outputs of an estimator that has several, which else are y0, y1, …
    """
    for part in find_parts(estimator):
        if getattr(part, "n_jobs", None) is not None or _takes_all_cores(part):
            part.n_jobs = 1  # the cores are the workers'
    if arrays.contract.inputs.names is not None and arrays.form != "frame":
        strip_feature_names(estimator)
    predictor = Predictor(estimator, outputs, assume_finite=arrays.are_numbers and _keeps_numbers(estimator))
    return predictor.with_graph(estimator.open) if isinstance(estimator, GraphFile) else predictor


def strip_feature_names(estimator: Any) -> None:
    """Make an estimator take X without names, of which scikit-learn would warn at each call."""
    for part in find_parts(estimator):
        vars(part).pop("feature_names_in_", None)
        if positions := vars(part).get("_transformer_to_input_indices"):  # a ColumnTransformer selects by name
            part.transformers_ = [(name, branch, positions[name]) for name, branch, _ in part.transformers_]


def _keeps_numbers(estimator: Any) -> bool:
    """Return whether no part of an estimator could make NaN or infinity of numbers before another one checks them."""
    return not any(hasattr(part, "transform") or is_opaque(part) for part in find_parts(estimator))


class Graph(Protocol):
    """What answers X in an estimator's place."""

    how: str  # the way in which it was made

    def __call__(self, X: Any) -> tuple[Any, Any]:
        """Return predictions and scores as the estimator would."""


class GraphFile:
    """A graph that came as a file, in an estimator's place.

    `inputs` are its features, and `score` is what its scores are, if it has any.
    """

    inputs: Inputs
    score: str | None = None

    def open(self, predictor: Predictor, takes_one: bool = False) -> Graph:
        """Return what answers for a predictor; `takes_one` row at a time, or many."""
        raise NotImplementedError

    def judge(self, predictor: Predictor, arrays: Arrays, known: Rows) -> tuple[str | None, bool]:
        """Return what its scores are, and whether it takes one row at a time. Raises `ModelError`."""
        raise NotImplementedError


class Predictor:
    """A fitted estimator that answers rows, as `prepare` makes it. Nothing changes it.

    `assume_finite` tells scikit-learn not to look for NaN and infinity in X.
    """

    graph: Graph | None = None  # what answers in the estimator's place

    def __init__(self, estimator: Any, outputs: Sequence[str] = (), assume_finite: bool = False) -> None:
        self.estimator = estimator
        self.outputs = list(outputs)
        by_output = _find_classes(estimator)
        self.classes = by_output[0] if len(by_output) == 1 else None
        self.classes_by_output = by_output if len(by_output) > 1 else []
        self.score, self.method = self._find_score()
        self._decides_by_pair = self.score == "decision" and _decides_by_pair(estimator)
        is_plain = type_of(self.classes or ()) is not None and not any(
            "\0" in str(label) for label in self.classes or ()
        )
        self._labels = np.array(self.classes, dtype=None if is_plain else object)  # numpy's texts lose a last NUL
        self._keys = [as_key(label) for label in self.classes or []]
        self._tie = _find_tie(estimator) if self.score == "probabilities" and self.classes is not None else None
        self._assume_finite = assume_finite
        self._output = "default"  # what transformers hand on
        self._templates: dict[int, Template] = {}  # of an answer's JSON, by the number of its values

    def with_graph(self, make: Callable[[Predictor], Graph], score: str | None = None) -> Predictor:
        """Return a predictor that answers by a graph, which is made for it.

        `score` is what the graph's scores are, where only its values say it. Raises `ModelError`.
        """
        other = copy.copy(self)
        other._templates = {}
        other.score = score or self.score
        other.graph = make(other)
        return other

    def with_output(self, container: str) -> Predictor:
        """Return a predictor whose transformers hand on a "pandas" or "polars" DataFrame, or by "default" arrays."""
        other = copy.copy(self)
        other._output = container
        return other

    def _find_score(self) -> tuple[str | None, str]:
        """Return the name of the estimator's scores, and the method that gives them."""
        if isinstance(self.estimator, GraphFile):
            return self.estimator.score, ""
        if kind_of(self.estimator) == "outlier_detector":
            scores = {"score": "decision_function"}
        else:
            scores = {"probabilities": "predict_proba", "decision": "decision_function"}
        found = ((name, method) for name, method in scores.items() if hasattr(self.estimator, method))
        return next(found, (None, ""))

    def predict(self, X: Any) -> Predictions:
        """Return the answers to the rows of X, n_samples of them, in their order.

        Raises `ModelError` when the settings name another number of outputs than there are.
        """
        with _contained():
            y, scores = self.ask(X)
        y = as_array(y)
        answer: Answer = {"prediction": self._name_outputs(y)}
        if self.score is not None:
            answer[self.score] = self._name_scores(scores, several=y.ndim == 2)
        columns = [*leaves_of(answer)]
        lengths = {*map(len, columns)}
        if lengths != {len(X)}:
            raise ModelError(f"gives {listed([*lengths])} answers to {len(X)} rows")
        # The same columns are named alike in each call.
        if len(columns) not in self._templates:
            self._templates[len(columns)] = Template.of(answer)
        return Predictions(self._templates[len(columns)], columns)

    def ask(self, X: Any) -> tuple[Any, Any]:
        """Return what the estimator, or a graph in its place, predicts for X, and its scores, or None without any."""
        if self.graph is not None:
            return self.graph(X)
        if self._assume_finite:
            before = sklearn.get_config()["assume_finite"]
            sklearn.set_config(assume_finite=True)  # of this thread, in a fraction of the time of `config_context`
            try:
                return self._ask(X)
            finally:
                sklearn.set_config(assume_finite=before)
        if self._output == "default":
            return self._ask(X)
        with sklearn.config_context(transform_output=self._output):
            return self._ask(X)

    def _ask(self, X: Any) -> tuple[Any, Any]:
        scores: Any = getattr(self.estimator, self.method)(X) if self.score else None
        labels = None if self._tie is None else _likeliest(scores, self._tie)
        return self.estimator.predict(X) if labels is None else self._labels[labels], scores

    def _name_outputs(self, y: Array) -> Answer:
        """Return y, of shape (n_samples,) or (n_samples, n_outputs), with the names of several outputs."""
        n_outputs = y.shape[1] if y.ndim == 2 else 1
        if self.outputs and y.ndim == 1:
            raise ModelError("has a single output, which goes without a name; set model.outputs = []")
        if self.outputs and len(self.outputs) != n_outputs:
            raise ModelError(f"has {n_outputs} outputs, but model.outputs names {len(self.outputs)}")
        return _name_columns_of(y, self.outputs or [f"y{output}" for output in range(n_outputs)])

    def _name_scores(self, scores: Any, several: bool) -> Answer:
        """Return what `predict_proba` or `decision_function` returned, with the names of outputs or classes."""
        if isinstance(scores, list) and len(scores) == len(self.classes_by_output):
            return self._name_outputs_scores([as_array(output, squeeze=False) for output in scores])
        scores = scores[0] if isinstance(scores, list) else scores
        scores = as_array(scores, squeeze=several or self.score != "probabilities")
        if several:
            return self._name_outputs(scores)
        if scores.ndim == 2 and (len(self._keys or scores.T) != scores.shape[1] or self._decides_by_pair):
            return list(scores.T)
        return _name_columns_of(scores, self._keys or [str(column) for column in range(scores.shape[-1])])

    def _name_outputs_scores(self, scores: list[Array]) -> Answer:
        """Return the scores of each output: for a label that applies or not its probability, else one a class."""
        is_multilabel = all(set(labels) <= {0, 1} for labels in self.classes_by_output)
        tree: dict[str, Answer] = {}
        for output, (columns, labels) in enumerate(zip(scores, self.classes_by_output, strict=True)):
            name = self.outputs[output] if self.outputs else f"y{output}"
            if is_multilabel:
                tree[name] = columns[:, labels.index(1)] if 1 in labels else np.zeros(len(columns))
            else:
                tree[name] = _name_columns_of(columns, [as_key(label) for label in labels])
        return tree


LIKELIEST: dict[str, float] = {
    # Classifiers whose `predict` gives the class of the highest probability, by the names in scikit-learn 1.9: some by
    # that very comparison, the others by one of what probabilities are made of, so that rounding may decide those that
    # are nearer to each other than this.
    "BaseDecisionTree": 0.0,
    "ForestClassifier": 0.0,
    "BaggingClassifier": 0.0,
    "CalibratedClassifierCV": 0.0,
    "LogisticRegression": 1e-9,
    "LinearDiscriminantAnalysis": 1e-9,
    "QuadraticDiscriminantAnalysis": 1e-9,
    "GradientBoostingClassifier": 1e-9,
    "HistGradientBoostingClassifier": 1e-9,
    "_BaseNB": 1e-9,
}


def _find_tie(estimator: Any) -> float | None:
    """Return the difference below which two probabilities are a tie. None: `predict` does not use probabilities."""
    if not type(estimator).__module__.startswith("sklearn."):
        return None
    inner = estimator.steps[-1][1] if hasattr(estimator, "steps") else getattr(estimator, "best_estimator_", None)
    if inner is not None:
        return _find_tie(inner)
    own = [kind.__name__ for kind in type(estimator).__mro__]
    return next((LIKELIEST[name] for name in own if name in LIKELIEST), None)


def _likeliest(scores: Any, tie: float) -> Any:
    """Return the column with the highest score of each row, (n_samples,); None if in one of them two are a tie."""
    likeliest = scores.argmax(axis=1)
    if tie:
        highest = scores[np.arange(len(scores)), likeliest]
        if np.count_nonzero(scores >= highest[:, None] - tie) != len(scores):
            return None
    return likeliest


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Make a plain error of what would end the process, the task or the iteration in which an estimator runs."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            raise
        raise RuntimeError(f"it raised {reason_of(error)}") from error


_limited = threading.local()


def limit_threads(n_threads: int) -> None:
    """Limit the threads of OpenMP and BLAS. OpenMP counts them for each thread that calls it, so each must ask."""
    if getattr(_limited, "n_threads", None) != n_threads:
        threadpoolctl.threadpool_limits(n_threads)
        _limited.n_threads = n_threads


def _takes_all_cores(part: Any) -> bool:
    """Whether an `n_jobs` of None, which is 1 to scikit-learn, is every core: to LightGBM and XGBoost."""
    return hasattr(part, "n_jobs") and not type(part).__module__.startswith("sklearn.")


def kind_of(estimator: Any) -> str | None:
    """Return the kind of an estimator as scikit-learn names it: "classifier", "regressor", "clusterer", …"""
    return sklearn.utils.get_tags(estimator).estimator_type if isinstance(estimator, BaseEstimator) else None


def _find_classes(estimator: Any) -> list[list[Any]]:
    """Return the classes of each output; none of an estimator that is no classifier."""
    classes = getattr(estimator, "classes_", None)
    if classes is None:
        return []
    several = isinstance(classes, list) and all(np.ndim(labels) == 1 for labels in classes)
    return [as_array(labels).tolist() for labels in (classes if several else [classes])]


def _decides_by_pair(estimator: Any) -> bool:
    """Whether decision values are those of a support vector machine for each pair of its classes."""
    if hasattr(estimator, "steps"):
        return _decides_by_pair(estimator.steps[-1][1])
    inner = [getattr(estimator, name) for name in ("best_estimator_", "estimator_") if hasattr(estimator, name)]
    return _decides_by_pair(inner[0]) if inner else getattr(estimator, "decision_function_shape", "ovr") == "ovo"


def refuse_no_predictor(estimator: Any) -> None:
    if isinstance(estimator, type):
        raise ModelError(f"holds the class {estimator.__name__}; fit an instance of it, then save that")
    kind = type(estimator).__name__
    if not callable(getattr(estimator, "predict", None)):
        raise ModelError(f"holds a {kind}, which has no predict(); save a fitted estimator that has")
    try:
        check_is_fitted(estimator)
    except NotFittedError:
        if hasattr(estimator, "__sklearn_tags__"):  # without which scikit-learn 1.6 takes anything for not fitted
            raise ModelError(f"holds a {kind} that is not fitted; fit it, then save it") from None
    except (TypeError, AttributeError):
        pass  # something that predicts without having been fitted by scikit-learn's rules


def as_array(values: Any, squeeze: bool = True) -> Array:
    """Return what an estimator returned, pandas and sparse too, as an array whose `tolist` JSON can say."""
    array = np.asarray(values.toarray() if hasattr(values, "toarray") else values)
    if array.dtype.kind == "M":
        array = array.astype("datetime64[us]")  # in nanoseconds tolist gives integers
    if array.dtype.kind == "O":
        plain = np.empty(array.shape, dtype=object)
        for index, item in np.ndenumerate(array):
            plain[index] = item if type(item) is str else _as_plain(item)
        array = plain
    return array[:, 0] if squeeze and array.ndim == 2 and array.shape[1] == 1 else array


def _as_plain(item: Any) -> Any:
    pandas = sys.modules.get("pandas")  # without which there are no missing values of its own
    if pandas is not None and pandas.isna(item) is True:
        return None
    return item.item() if isinstance(item, np.generic) else item


def _name_columns_of(array: Array, names: Sequence[str]) -> Answer:
    return array if array.ndim == 1 else dict(zip(names, array.T, strict=True))

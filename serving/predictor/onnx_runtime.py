"""The same estimator in ONNX Runtime, where it answers as in scikit-learn. Imported only where it runs."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from serving.errors import ModelError, reason_of, shorten
from serving.predictor.arrays import Arrays
from serving.predictor.predictor import GraphFile, Predictor, as_array
from serving.predictor.samples import N_VARIED, find_thresholds, find_training_rows, make_up_rows
from serving.settings import toml_value

USE_SKLEARN = 'set model.runtime = "sklearn"'

ONNX_TYPES: dict[str, tuple[str, Any]] = {  # an input's type in ONNX: the feature's type, and numpy's
    "tensor(double)": ("float", np.float64),
    "tensor(float)": ("float", np.float32),
    "tensor(int64)": ("int", np.int64),
    "tensor(bool)": ("bool", np.bool_),
    "tensor(string)": ("str", object),
}

SHARES_TOLERANCE = 1e-3  # distance from 1 of a sum of float32 probabilities of many classes or trees
TOLERANCE = 1e-5  # distance of numbers that agree, and of scores of tied classes


def import_onnx(name: str, requirements: str = "requirements-onnx.txt") -> Any:
    """Import one of the packages that only ONNX needs. Raises `ModelError`.

    From 1.29 on ONNX Runtime starts a thread when it is imported, which reports to its makers, and for which a worker
    that is forked later waits without end when it exits.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        what = f"needs {package} to run in ONNX Runtime, which fails to import ({error})"
        raise ModelError(f"{what}; pip install -r {requirements}") from None


def open_session(graph: bytes) -> Any:
    """Open a graph in ONNX Runtime, without any thread: one made in gunicorn's master then answers in its workers."""
    onnxruntime = import_onnx("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # fatal: what goes wrong is raised too
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class OnnxModel:
    """An ONNX graph in a predictor's service: called with X, it gives y and scores as the estimator would.

    `how` says which inputs it takes; one that `takes_one` row is asked row by row. Raises `ModelError` when it lacks an
    output.
    """

    def __init__(self, session: Any, predictor: Predictor, how: str = "", takes_one: bool = False) -> None:
        outputs = getattr(predictor.estimator, "outputs", None)  # of a file, in whatever order they are
        outputs = outputs or [output.name for output in session.get_outputs()][: 1 if predictor.score is None else 2]
        if predictor.score is not None and len(outputs) < 2:
            raise ModelError(f"has no {predictor.score} in its graph")
        self.how = how
        self._run = session.run
        self._outputs = outputs
        self._inputs = [(item.name, ONNX_TYPES[item.type][1]) for item in session.get_inputs()]
        self._takes_one = takes_one
        self._is_file = isinstance(predictor.estimator, GraphFile)
        classes = None if self._is_file else getattr(predictor.estimator, "classes_", None)
        self._by_output = [len(labels) for labels in predictor.classes_by_output]
        self._labels = (
            None
            if classes is None or len(classes) == 0
            else np.asarray(classes[0] if self._by_output else classes).dtype
        )
        self._is_pair = predictor.score == "decision" and len(predictor.classes or ()) == 2
        self._is_share = predictor.score == "probabilities"

    def __call__(self, X: Any) -> tuple[Any, Any]:
        y, scores = self.ask(X)
        y = y[:, 0] if y.shape[1] == 1 else y
        return self._to_labels(y), None if scores is None else self._to_scores(scores)

    def ask(self, X: Any) -> tuple[Any, Any]:
        """Return predictions and scores as the graph gives them, (n_samples, n) each; scores are None without any.

        A graph that was made for one row is asked row by row.
        """
        if not self._takes_one:
            return self._ask(X)
        answers = [self._ask(X[row : row + 1]) for row in range(len(X))]
        y, scores = zip(*answers, strict=True)
        return np.concatenate(y), None if scores[0] is None else np.concatenate(scores)

    def _ask(self, X: Any) -> tuple[Any, Any]:
        y, *scores = self._run(self._outputs, self._feed(X))
        if self._by_output or not scores:
            return _by_row(y, len(X)), scores[0] if scores else None
        columns = [_by_row(output, len(X)) for output in scores]
        return _by_row(y, len(X)), columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)

    def _feed(self, X: Any) -> dict[str, Any]:
        if len(self._inputs) == 1:
            name, dtype = self._inputs[0]
            return {name: np.asarray(X, dtype)}
        columns = X.T if isinstance(X, np.ndarray) else [column for _, column in X.items()]
        pairs = zip(self._inputs, columns, strict=True)
        return {name: np.asarray(column, dtype).reshape(-1, 1) for (name, dtype), column in pairs}

    def _to_labels(self, y: Any) -> Any:
        """Return predictions in the type of the classes, which ONNX knows as integers or strings only."""
        if self._labels is not None:
            return y.astype(self._labels, copy=False)
        return y.astype(np.float64) if y.dtype == np.float32 else y

    def _to_scores(self, scores: Any) -> Any:
        if self._by_output:
            pairs = zip(scores, self._by_output, strict=True)
            return [np.minimum(output[:, :n_classes], 1.0, dtype=np.float64) for output, n_classes in pairs]
        scores = np.asarray(scores, np.float64)
        if self._is_share:
            scores = np.minimum(scores, 1.0)  # above which the float32 sum over a forest's trees may be
            if self._is_file:  # the only sign there that a row's probabilities underflowed in float32
                scores = np.maximum(scores, 0.0)
                scores[np.abs(scores.sum(axis=1) - 1) > SHARES_TOLERANCE] = np.nan
            return scores
        return scores[:, -1] if scores.shape[1] == (2 if self._is_pair else 1) else scores


def _by_row(values: Any, n_rows: int) -> Any:
    """Return an output with one row for each of X: some operators lay it down. Raises `ModelError` if it has not."""
    if values.ndim == 2 and len(values) == n_rows:
        return values
    if values.size % n_rows or sum(size != 1 for size in values.shape) > (1 if n_rows == 1 else 2):
        raise ModelError(f"gives an output of shape {values.shape} for {n_rows} rows")
    return values.reshape(n_rows, -1)


def choose_graph(graphs: Sequence[Predictor], predictor: Predictor, arrays: Arrays, known: list[dict[str, Any]]) -> int:
    """Return the position of the first graph that answers known rows, and others around them, as the estimator does.

    Raises `ModelError` if none does, with the row.
    """
    reasons = []
    contract = arrays.contract
    with warnings.catch_warnings(action="ignore"):  # a made-up row may well be worth one
        near = [*known, *find_training_rows(predictor.estimator, contract)]
        made_up = near[len(known) :] + make_up_rows(
            near, contract, N_VARIED, find_thresholds(predictor.estimator, contract)
        )
        rows = [*known, *keep_answered(made_up, predictor, arrays)]
        inputs = [arrays.of_rows(some) for some in (rows, rows[:1])]  # one row goes its own way in some operators
        cases = [(X, predictor.ask(X)) for X in inputs]
        scales = scales_of(predictor, *cases[0][1])  # of all rows, for one alone may have numbers near 0
        for position, graph in enumerate(graphs):
            way = graph.graph.how if graph.graph else ""
            try:
                found = next(filter(None, (find_disagreement(graph, *case, scales) for case in cases)), None)
            except Exception as error:  # what ONNX Runtime raises has no bounds
                reasons.append(f"with {way} it fails: {reason_of(error)}")
                continue
            if found is None:
                return position
            index, how = found
            reasons.append(f"with {way} it answers row {toml_value(rows[index])} {how}")
    raise ModelError(f"does not agree with scikit-learn in ONNX Runtime: {'; '.join(reasons)}; {USE_SKLEARN}")


def keep_answered(rows: list[dict[str, Any]], predictor: Predictor, arrays: Arrays) -> list[dict[str, Any]]:
    """Leave out the rows for which the estimator fails, as a step of it may for a number that it cannot take."""
    try:
        predictor.ask(arrays.of_rows(rows))
    except Exception:  # what an estimator raises has no bounds
        halves = (rows[: len(rows) // 2], rows[len(rows) // 2 :]) if len(rows) > 1 else ()
        return [row for half in halves for row in keep_answered(half, predictor, arrays)]
    return rows


def scales_of(predictor: Predictor, y: Any, scores: Any) -> tuple[Any, Any]:
    """Return the sizes of predictions and of scores, to which the tolerance of each is relative."""
    is_share = scores is None or predictor.score == "probabilities"
    return scale_of(as_array(y)), 1.0 if is_share else scale_of(scores)


def scale_of(values: Any) -> Any:
    """Return the size of the largest number in each column, as outputs differ in size, or 1 if they are none."""
    if values.dtype.kind not in "fiu":
        return 1.0
    return np.where(np.isfinite(values), np.abs(values), 0.0).max(axis=0, initial=0.0)


def find_disagreement(
    predictor: Predictor, X: Any, expected: tuple[Any, Any], scales: tuple[Any, Any] | None = None
) -> tuple[int, str] | None:
    """Return the first row of X that is not answered as expected, classes exactly and numbers to 1e-5, and how.

    A row to which the estimator itself gives two classes alike may get either: rounding decides between them, which in
    scikit-learn too depends on the order of its sums. Golden rows are held to their class all the same, by `is_close`.
    """
    y, scores = as_array(expected[0]), expected[1]
    y_scale, score_scale = scales or scales_of(predictor, y, scores)
    given, given_scores = predictor.ask(X)
    if given.shape != y.shape:
        return 0, f"in the shape {given.shape}, scikit-learn in {y.shape}"
    differ = differs(given, y, y_scale)
    if scores is not None:
        is_tied = _are_tied(scores, max(1.0, np.max(score_scale)))
        differ = (differ & ~is_tied) | differs(given_scores, scores, score_scale)
    if not differ.any():
        return None
    index = int(differ.argmax())
    ours, theirs = _show(given, given_scores, index), _show(y, scores, index)
    return index, f"with {ours}, scikit-learn with {theirs}"


def differs(given: Any, expected: Any, scale: Any) -> Any:
    """Return which rows differ by more than the tolerance, which is relative to `scale`, one or one for each column."""
    if isinstance(expected, list):
        pairs = zip(given, expected, strict=True)
        return np.logical_or.reduce([differs(*pair, scale) for pair in pairs])
    if np.shape(given) != np.shape(expected):
        return np.ones(len(expected), bool)
    differ = np.asarray(given != expected)
    if expected.dtype.kind == "f":
        differ = ~np.isclose(given, expected, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True)
    return differ.reshape(len(expected), -1).any(axis=1)


def _are_tied(scores: Any, scale: float) -> Any:
    """Return in which rows the two highest scores, or the only one and 0, are alike."""
    if isinstance(scores, list):
        return np.logical_or.reduce([_are_tied(output, scale) for output in scores])
    if scores.ndim == 1 or scores.shape[1] == 1:
        return np.abs(scores).reshape(-1) <= TOLERANCE * scale
    highest = np.sort(scores, axis=1)
    return highest[:, -1] - highest[:, -2] <= TOLERANCE * scale


def _show(y: Any, scores: Any, index: int) -> str:
    """Write the answer to a row for a message."""
    answer = as_array(y)[index : index + 1].tolist()
    if isinstance(scores, list):
        answer += [output[index].tolist() for output in scores]
    elif scores is not None:
        answer += scores[index : index + 1].tolist()
    return repr(shorten(answer))


def refuse_trees(graph: Any) -> None:
    """Raise `ModelError` for trees to which ONNX Runtime gives wrong answers, or for which it ends the process."""
    for node in graph.node:
        values = {attribute.name: attribute for attribute in node.attribute}
        labels = read_labels(node) if node.op_type == "TreeEnsembleClassifier" else None
        if labels is not None and len(labels) == 1:
            raise ModelError(
                "has trees of a single class, which ONNX Runtime does not answer; serve the estimator itself"
            )
        n_outputs = values["n_targets"].i if node.op_type == "TreeEnsembleRegressor" and "n_targets" in values else 1
        if n_outputs > 1 and len(found := {*values["target_ids"].ints}) != n_outputs:  # the others would always be 0
            raise ModelError(f"has trees for {len(found)} of its {n_outputs} outputs; convert a model for each output")


def read_labels(node: Any) -> Any:
    """Return the classes that are an attribute of a node, or None."""
    for attribute in node.attribute:
        if attribute.name.startswith("classlabels_") and (attribute.ints or attribute.strings):
            return as_classes(list(attribute.ints) or [label.decode() for label in attribute.strings])
    return None


def as_classes(labels: list[Any]) -> Any:
    return np.array(labels, object if isinstance(labels[0], str) else None)  # numpy's texts lose a last NUL

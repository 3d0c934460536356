"""A graph that came as an .onnx file in an estimator's place: its features, its prediction, and what its scores are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import structlog

from serving.errors import ModelError, listed, shorten
from serving.predictor.arrays import Arrays
from serving.predictor.contract import Rows
from serving.predictor.inputs import Column, Inputs
from serving.predictor.onnx_graph import OnnxGraph
from serving.predictor.onnx_runtime import (
    ONNX_TYPES,
    SHARES_TOLERANCE,
    TOLERANCE,
    OnnxModel,
    differs,
    import_onnx,
    keep_answered,
    open_session,
    read_labels,
    refuse_trees,
    scale_of,
)
from serving.predictor.predictions import as_key
from serving.predictor.predictor import Graph, GraphFile, Predictor
from serving.predictor.samples import MAX_COMPARED, N_VARIED, make_up_rows

log = structlog.get_logger()
SAVE_ITSELF = "it was not converted as it should be; serve the estimator itself"
LEAVE_OUT = "leave it out, as skl2onnx.helpers.onnx_helper.select_model_inputs_outputs does"


class OnnxArtifact(GraphFile):
    """An ONNX graph that came in an estimator's place. `outputs` names its prediction, and the scores that go with it:
    one output, or one for each class."""

    is_raw = False  # its scores of classes are sums of weights, of which nothing has made probabilities
    is_sure = False  # of which class each score is: its name says so, or one operator gives both labels and scores

    def __init__(self, session: Any, outputs: list[str], classes: Any = None) -> None:
        self.session = session
        self.inputs = _read_graph_inputs(session)
        self.takes_one = any(item.shape[0] == 1 for item in session.get_inputs())  # row, and no more
        self.outputs = outputs
        if classes is not None:
            self.classes_ = classes

    def open(self, predictor: Predictor, takes_one: bool = False) -> Graph:
        return OnnxModel(self.session, predictor, takes_one=takes_one or self.takes_one)

    def judge(self, predictor: Predictor, arrays: Arrays, known: Rows) -> tuple[str | None, bool]:
        """Name its scores by their values for known rows and others around them, and find out whether it answers many
        rows at once. Raises `ModelError` where the values fit no name."""
        model = OnnxModel(self.session, predictor, takes_one=self.takes_one)
        with warnings.catch_warnings(action="ignore"):  # a made-up row may well be worth one
            made_up = make_up_rows(known, arrays.contract, N_VARIED)
            X = arrays.of_rows([*known, *keep_answered(made_up, predictor, arrays)])
        takes_one = self.takes_one or not _answers_many(model, X)
        if takes_one != self.takes_one:
            model = OnnxModel(self.session, predictor, takes_one=True)
        y, scores = model.ask(X)
        _refuse_unknown_label(self, y, scores)
        if scores is None:
            return None, takes_one
        named = " and ".join(map(repr, self.outputs[1:]))
        is_number = np.isfinite(scores).all(axis=1) & scores.any(axis=1)  # float32 makes nothing of small ones
        if not is_number.any():
            raise ModelError(f"gives no number as {named} for any row; {LEAVE_OUT}")
        return _name_by_values(self, y[is_number], scores[is_number].astype(np.float64), named), takes_one


class OnnxClassifier(OnnxArtifact):
    """One with scores of classes. Only values say whether they are probabilities: `judge` finds out."""

    score = "probabilities"


class OnnxDetector(OnnxArtifact):
    """One that tells outliers by a score."""

    score = "score"


def open_artifact(data: bytes) -> OnnxArtifact:
    """Open a graph that came as a file. Raises `ModelError`."""
    model = import_onnx("onnx").load_model_from_string(data)
    if any(tensor.data_location == tensor.EXTERNAL for tensor in _find_tensors(model.graph)):
        raise ModelError("keeps numbers in other files, which no hash covers; save it whole")
    refuse_trees(model.graph)
    zipped = _unzip(model)
    session = open_session(model.SerializeToString() if zipped else data)
    return _read_outputs(session, OnnxGraph(model.graph), zipped)


def _unzip(model: Any) -> dict[str, Any]:
    """Make each ZipMap pass on the tensor whose columns it makes maps of, and return the classes of the columns by the
    names of the outputs."""
    onnx = import_onnx("onnx")
    zipped: dict[str, Any] = {}
    names = [output.name for output in model.graph.output]
    for node in (node for node in model.graph.node if node.op_type == "ZipMap" and node.output[0] in names):
        zipped[node.output[0]] = read_labels(node)
        node.op_type, node.domain = "Identity", ""
        del node.attribute[:]
    for output in model.graph.output:
        if output.name in zipped:
            output.type.CopyFrom(onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None))
    if zipped and all(opset.domain for opset in model.opset_import):  # which has no operator yet but those of trees
        model.opset_import.append(onnx.helper.make_opsetid("", 8))
    return zipped


# Names that exporters give to outputs:
LABELS = ("label", "output_label")  # classes, clusters, outliers
NUMBERS = ("variable", "GPmean", "predictions", "prediction")  # what a regressor predicts
SHARES = ("probabilities", "output_probability", "probability")  # scores of classes, of whatever kind
EXTRAS = ("class_labels", "decision_path", "decision_leaf", "score_samples", "GPcovstd", "std")  # what is left out


def _read_outputs(session: Any, graph: OnnxGraph, zipped: Mapping[str, Any]) -> OnnxArtifact:
    """Return the artifact of a graph, with its outputs told by names, types and operators. Raises `ModelError`."""
    given = session.get_outputs()
    types = {item.name: item.type for item in given}
    prediction = _find_prediction(types, graph)
    shape = next(item.shape for item in given if item.name == prediction)
    is_several = len(shape) == 2 and isinstance(shape[1], int) and shape[1] > 1
    is_number = _is_float(types[prediction])
    rest = [name for name, kind in types.items() if name != prediction and name not in EXTRAS and _is_float(kind)]
    node, _ = graph.source(prediction)
    if is_number or is_several or (node is not None and node.op_type == "ArgMin"):  # distances, deviations, …
        rest = []
    rest = [name for name in rest if not graph.is_vote(name)]
    classes = None if is_number or is_several else graph.classes(prediction)
    if rest:
        artifact = _read_scores(session, graph, [prediction, *rest], classes, zipped)
    else:
        artifact = OnnxArtifact(session, [prediction], classes)
    if left_out := [name for name in types if name not in artifact.outputs]:
        log.info("onnx_outputs_left_out", served=artifact.outputs, left_out=left_out)
    return artifact


def _find_prediction(types: Mapping[str, str], graph: OnnxGraph) -> str:
    """Return the name of the output that is the prediction. Raises `ModelError` where nothing tells."""
    known = [name for name in types if name not in EXTRAS and graph.depends(name)]
    if not known:
        raise ModelError(f"gives {listed([*types])}, of which none is a prediction that depends on its inputs")
    labels = [name for name in known if not _is_float(types[name]) and graph.is_label(name)]
    for found in ([name for name in known if name in (*LABELS, *NUMBERS)], labels, known):
        if len(found) == 1:
            break
    else:
        cure = f"name the prediction {listed([LABELS[0], NUMBERS[0]])}, or leave the others out"
        raise ModelError(f"gives {listed(known)}, and its graph does not say which is the prediction; {cure}")
    (name,) = found
    if not types[name].startswith("tensor"):
        hint = "convert it with options={'zipmap': False}"
        raise ModelError(f"gives {name!r} as {types[name]}, not as a tensor; {hint}")
    if name not in NUMBERS and (name in SHARES or (_is_float(types[name]) and graph.is_distribution(name))):
        raise ModelError(
            f"gives {name!r}, which has scores of classes, and no prediction; keep the output of labels too"
        )
    return name


def _is_float(kind: str) -> bool:
    return kind in ("tensor(float)", "tensor(double)", "tensor(float16)")


def _read_scores(
    session: Any, graph: OnnxGraph, outputs: list[str], classes: Any, zipped: Mapping[str, Any]
) -> OnnxArtifact:
    """Return the artifact of a graph with scores; its label is the first of the outputs. Raises `ModelError`."""
    label, *rest = outputs
    if len(rest) == 1 and rest[0] in ("scores", "score") and graph.is_detector(label, rest[0]):
        return OnnxDetector(session, outputs)
    columns = _order_columns(rest, classes)
    scores = columns or _find_scores(rest)
    node, _ = graph.source(label)
    others = zipped.get(scores[0])
    if classes is None and others is None and (node is None or node.op_type != "ArgMax"):
        raise ModelError(f"gives {scores[0]!r}, and its graph does not say of which classes; {LEAVE_OUT}")
    if classes is not None and others is not None and classes.tolist() != others.tolist():
        differ = f"{shorten(others.tolist())!r}, but {label!r} has the classes {shorten(classes.tolist())!r}"
        raise ModelError(f"gives {scores[0]!r} for the classes {differ}; {SAVE_ITSELF}")
    artifact = OnnxClassifier(session, [label, *scores], others if classes is None else classes)
    artifact.is_raw = graph.is_raw(label, scores)
    artifact.is_sure = bool(columns) or graph.source(scores[0])[0] is node
    return artifact


def _find_scores(names: list[str]) -> list[str]:
    """Return the output that has scores of classes, alone in a list. Raises `ModelError` where names do not tell."""
    found = [name for name in names if name in SHARES] or names
    if len(found) > 1:
        cure = f"name one of them {SHARES[0]!r}, or leave the others out"
        raise ModelError(f"gives {listed(found)}, and its graph does not say which has the scores of classes; {cure}")
    return found


def _order_columns(names: list[str], classes: Any) -> list[str]:
    """Return outputs in the order of the classes that they are named after, as skl2onnx does with zipmap="columns";
    none if they are not."""
    if classes is None or len(classes) < 2:
        return []
    ways = ([f"{prefix}{as_key(label)}" for label in classes.tolist()] for prefix in ("", "s", "i"))
    return next((ordered for ordered in ways if set(ordered) == set(names)), [])


def _answers_many(model: OnnxModel, X: Any) -> bool:
    """Whether a graph answers rows together as it answers each alone, in numbers up to rounding."""
    try:
        model.ask(X)
        y, scores = model.ask(X[:MAX_COMPARED])
    except Exception:  # what ONNX Runtime raises has no bounds
        return False
    alone = [model.ask(X[row : row + 1]) for row in range(len(y))]
    if differs(np.concatenate([some for some, _ in alone]), y, scale_of(y)).any():
        return False
    size = 1.0 if scores is None else np.max(scale_of(scores), initial=0.0)  # of all, as they may be probabilities
    return scores is None or not differs(np.concatenate([some for _, some in alone]), scores, size).any()


def _known_classes(artifact: OnnxArtifact, scores: Any) -> list[Any]:
    """Return the classes that a graph names, or without names their positions among the scores."""
    classes = getattr(artifact, "classes_", None)
    return [*range(scores.shape[1])] if classes is None else classes.tolist()


def _refuse_unknown_label(artifact: OnnxArtifact, y: Any, scores: Any) -> None:
    """Raise `ModelError` where a label is none of the classes."""
    if not hasattr(artifact, "classes_") and not isinstance(artifact, OnnxClassifier):
        return
    classes = _known_classes(artifact, scores)
    unknown = {*y.ravel().tolist()} - {*classes}
    if unknown or y.shape[1] > 1:
        given = repr(shorten(unknown.pop() if unknown else y[0].tolist()))
        raise ModelError(f"gives {given} as {artifact.outputs[0]!r}, with the classes {listed(classes)}; {SAVE_ITSELF}")


def _name_by_values(artifact: OnnxArtifact, y: Any, scores: Any, named: str) -> str:
    """Return what scores, (n_samples, n_columns), are called beside the labels y. Raises `ModelError`."""
    labels = y[:, 0].tolist()
    if isinstance(artifact, OnnxDetector):
        is_side = (y == np.sign(scores)) | ((scores == 0) & (np.abs(y) == 1))
        if y.shape[1] == 1 == scores.shape[1] and is_side.all():
            return "score"
        raise ModelError(f"gives {named}, which is not below 0 for outliers, whose label is -1; {LEAVE_OUT}")
    classes = _known_classes(artifact, scores)
    if scores.shape[1] != len(classes) and not (scores.shape[1] == 1 and len(classes) == 2 and artifact.is_raw):
        raise ModelError(f"gives {scores.shape[1]} columns as {named}, for {len(classes)} classes; {LEAVE_OUT}")
    position = np.array([classes.index(label) for label in labels])
    if _are_shares(scores):
        if artifact.is_sure or _is_highest(position, scores) or _is_beyond(position, scores):
            return "probabilities"
    elif artifact.is_raw and _is_decision(position, scores):
        return "decision"
    hint = f"convert a support vector machine with options={{'raw_scores': True}}, else {LEAVE_OUT}"
    if not hasattr(artifact, "classes_"):  # its labels are positions, which need not be the classes
        hint = SAVE_ITSELF
    shown = f"{shorten(scores[0].tolist())!r} where {artifact.outputs[0]!r} is {labels[0]!r}"
    raise ModelError(f"gives {named}, such as {shown}, which are no probabilities, nor known decisions; {hint}")


def _are_shares(scores: Any) -> bool:
    """Whether the scores of each row are shares of 1."""
    is_within = (scores >= -SHARES_TOLERANCE) & (scores <= 1 + SHARES_TOLERANCE)
    return bool(is_within.all() and (np.abs(scores.sum(axis=1) - 1) <= SHARES_TOLERANCE).all())


def _is_beyond(position: Any, scores: Any) -> bool:
    """Whether the second of two classes is the label where its score is beyond some threshold."""
    second = position == 1
    is_both = scores.shape[1] == 2 and second.any() and not second.all()
    return bool(is_both and scores[second, 1].min() >= scores[~second, 1].max() - TOLERANCE)


def _is_decision(position: Any, scores: Any) -> bool:
    """Whether the highest score, or the sign of the only one, decides on the position of each row's label.

    Of two classes the scores are each other's opposite, for an answer has the second one only.
    """
    pair = np.column_stack([-scores, scores]) if scores.shape[1] == 1 else scores
    is_opposite = pair.shape[1] != 2 or np.allclose(pair[:, 0], -pair[:, 1], rtol=TOLERANCE, atol=TOLERANCE)
    return is_opposite and _is_highest(position, pair)


def _is_highest(position: Any, scores: Any) -> bool:
    """Whether the score at the position of each row's label is its highest, up to rounding."""
    highest = scores.max(axis=1)
    return bool(
        (scores[np.arange(len(scores)), position] >= highest - TOLERANCE * np.maximum(1, np.abs(highest))).all()
    )


def _find_tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _find_tensors(inner) if inner.node else ()


def _read_graph_inputs(session: Any) -> Inputs:
    """Read the features off a graph: the columns of its one input, or several inputs of one column each."""
    given = session.get_inputs()
    for item in given:
        if item.type not in ONNX_TYPES or len(item.shape) != 2:
            problem = f"takes {item.name!r} as {item.type} of shape {item.shape}"
            raise ModelError(f"{problem}; it should take rows of {', '.join(ONNX_TYPES)}")
        if isinstance(item.shape[0], int) and item.shape[0] != 1:
            hint = f"convert it for any number of rows, as of shape {[None, *item.shape[1:]]}"
            raise ModelError(f"takes {item.name!r} as {item.shape[0]} rows at a time; {hint}")
    kinds: list[Column | None] = [Column(ONNX_TYPES[item.type][0]) for item in given]
    width = given[0].shape[1]
    if len(given) == 1:
        return Inputs(None, kinds * width if isinstance(width, int) else None, "array")
    return Inputs([item.name for item in given], kinds, "array")

"""The nodes of an ONNX graph: which operator makes an output, and so what the output is."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from serving.predictor.onnx_runtime import as_classes, import_onnx, read_labels

# Operators, by what their output is:
PASSING = {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}  # the input's values
LINEAR = PASSING | {"Add", "Sub", "Sum", "Mul", "Neg", "Concat", "Slice", "Split", "Gather", "ArrayFeatureExtractor"}
COMPARING = {"Sign", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"}
DISTRIBUTING = {"Softmax", "Sigmoid", "LogSoftmax", "Normalizer", "LpNormalization"}  # scores, no prediction


class OnnxGraph:
    """The nodes and constants of a graph, to find the operator that makes an output."""

    def __init__(self, graph: Any) -> None:
        self._makers = {name: node for node in graph.node for name in node.output}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in (node for node in graph.node if node.op_type == "Constant"):
            self._constants[node.output[0]] = next((item.t for item in node.attribute if item.name == "value"), None)

    def constant(self, name: str) -> Any:
        """Return the array of a constant, or None."""
        tensor = self._constants.get(name)
        return None if tensor is None else import_onnx("onnx").numpy_helper.to_array(tensor)

    def source(self, name: str, passing: Iterable[str] = PASSING) -> tuple[Any, str]:
        """Return the node that makes a tensor, and under which name, before operators that pass it on; None for an
        input or a constant."""
        while (node := self._makers.get(name)) is not None and node.op_type in passing:
            name = next((item for item in node.input if item not in self._constants), "")
        return node, name

    def depends(self, name: str) -> bool:
        """Whether a tensor is no constant."""
        node, name = self.source(name)
        return node is not None or (bool(name) and name not in self._constants)

    def sources(self, name: str) -> list[Any]:
        """Return the nodes of which a tensor is a weighted sum; None for an input."""
        found: dict[str, Any] = {}
        names = [name]
        for name in names:  # which grows on the way
            node, name = self.source(name)
            given = [item for item in node.input if item and item not in self._constants] if node is not None else []
            if node is None or node.op_type not in LINEAR or (node.op_type == "Mul" and len(given) > 1):
                found[name] = node
            else:
                names += [item for item in given if item not in names]
        return [*found.values()]

    def classes(self, label: str) -> Any:
        """Return the classes that a label tensor takes its values from, in the order of the scores; None if unknown."""
        node, name = self.source(label)
        if node is None or node.op_type not in ("ArrayFeatureExtractor", "Gather"):
            is_label = node is not None and node.op_type.endswith("Classifier") and name == node.output[0]
            return read_labels(node) if is_label else None
        labels = self.constant(node.input[0])
        known = None if labels is None else [_as_text(label) for label in labels.ravel().tolist()]
        return as_classes(known) if known and len({*known}) == len(known) else None

    def is_label(self, name: str) -> bool:
        """Whether a tensor has the class of each row, or its cluster, by the operator that makes it."""
        node, _ = self.source(name)
        return self.classes(name) is not None or (node is not None and node.op_type in ("ArgMax", "ArgMin"))

    def is_distribution(self, name: str) -> bool:
        """Whether a tensor has scores of classes, by the operator that makes it."""
        node, name = self.source(name)
        is_score = node is not None and node.op_type.endswith("Classifier") and name != node.output[0]
        return is_score or (node is not None and node.op_type in DISTRIBUTING)

    def is_raw(self, label: str, scores: list[str]) -> bool:
        """Whether scores of classes are plain sums of weights, as decisions are."""
        node, _ = self.source(label)
        if node is not None and node.op_type == "SVMClassifier":
            labels = read_labels(node)
            is_by_pair = labels is None or (len(labels) > 2 and any(self.source(name)[0] is node for name in scores))
            return not is_by_pair and not any(item.name == "prob_a" and item.floats for item in node.attribute)
        return all(map(_is_sum, itertools.chain(*map(self.sources, scores))))

    def is_vote(self, scores: str) -> bool:
        """Whether scores of classes count what each of several estimators predicts, as in hard voting."""
        return all(node is not None and node.op_type == "Where" for node in self.sources(scores))

    def is_detector(self, label: str, score: str) -> bool:
        """Whether a label says on which side of a limit a score is."""
        node, _ = self.source(label, PASSING | {"Add", "Mul", "Where", "Not"})
        if node is None or node.op_type not in COMPARING:
            return False
        compared = [item for item in node.input if item not in self._constants]
        return len(compared) == 1 and self.source(compared[0])[1] == self.source(score)[1]


def _as_text(label: Any) -> Any:
    return label.decode() if isinstance(label, bytes) else label


def _is_sum(node: Any) -> bool:
    """Whether a node gives sums of weights."""
    if node is None or node.op_type not in ("MatMul", "Gemm", "LinearClassifier", "TreeEnsembleClassifier"):
        return False
    return all(item.s == b"NONE" for item in node.attribute if item.name == "post_transform")

"""Conversion of an estimator to ONNX, in each way that may be exact. Imported only where it runs."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from serving.errors import ModelError, reason_of
from serving.predictor.arrays import Arrays
from serving.predictor.features import FeatureSettings
from serving.predictor.inputs import find_parts
from serving.predictor.onnx_boosting import register_converters
from serving.predictor.onnx_runtime import USE_SKLEARN, OnnxModel, import_onnx, open_session, refuse_trees
from serving.predictor.predictor import Predictor

OPSETS = {"": 21, "ai.onnx.ml": 3}  # newest versions that each converter of skl2onnx 1.20 keeps to


def convert_to_onnx(predictor: Predictor, arrays: Arrays) -> list[Predictor]:
    """Return a predictor for each way to convert an estimator that ONNX Runtime can run, the most exact first.

    Raises `ModelError` if there is none.
    """
    if arrays.form == "texts":  # which ONNX Runtime splits into words by rules of its own, seen in few texts only
        raise ModelError(f"takes texts, which are not run in ONNX Runtime; {USE_SKLEARN}")
    for name in ("onnx", "onnxruntime", "skl2onnx"):
        import_onnx(name)
    register_converters(predictor.estimator)
    graphs: list[Predictor] = []
    reasons: dict[str, str] = {}
    for how, float_type, estimator in _ways_to_convert(predictor.estimator):
        try:
            with warnings.catch_warnings(action="ignore"), _votes_apart(predictor.estimator):  # deprecations
                graph = _convert(estimator, predictor, arrays, float_type)
            graphs.append(predictor.with_graph(functools.partial(OnnxModel, open_session(graph), how=how)))
        except (Exception, SystemExit) as error:  # what converters and ONNX Runtime raise has no bounds
            reasons[how] = _why_not(error)
    if not graphs:
        several = "; ".join(f"with {how}, {reason}" for how, reason in reasons.items())
        reason = several if len({*reasons.values()}) > 1 else next(iter(reasons.values()))
        raise ModelError(f"cannot be converted to ONNX: {reason}; {USE_SKLEARN}")
    return graphs


def _why_not(error: BaseException) -> str:
    """Return why a conversion fails, in one line."""
    if isinstance(error, ModelError):
        return f"it {error}"
    if type(error).__name__ not in ("MissingShapeCalculator", "MissingConverter"):
        return reason_of(error)
    kind = re.search(r"type '<class '([\w.]+)'>'", str(error))
    return f"skl2onnx has no converter for {kind[1].rpartition('.')[2] if kind else 'a part of it'}"


@contextlib.contextmanager
def _votes_apart(estimator: Any) -> Iterator[None]:
    """Have voting classifiers flatten nothing meanwhile, which skl2onnx cannot, and which only `transform` does."""
    voting = [part for part in find_parts(estimator) if getattr(part, "flatten_transform", False)]
    for part in voting:
        part.flatten_transform = False
    try:
        yield
    finally:
        for part in voting:
            part.flatten_transform = True


def _ways_to_convert(estimator: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield the ways to convert an estimator, most exact first: a name, the type of floats, and what to convert.

    Trees in scikit-learn round X to float32. skl2onnx rounds their thresholds so that every float32 value takes the
    same branch. A float64 input could take another one, so the steps before the trees end with a cast to float32.
    The trees of histogram boosting do not round X: with float32 inputs, rows could take other branches.
    """
    estimator = getattr(estimator, "best_estimator_", estimator)  # what a search hands everything to
    parts = list(find_parts(estimator))
    if not any(hasattr(part, "tree_") for part in parts):
        yield "float64 inputs", "DoubleTensorType", estimator
    elif steps := getattr(estimator, "steps", ()):
        cast = import_onnx("skl2onnx.sklapi").CastTransformer(dtype=np.float32)
        rounded = type(estimator)([*steps[:-1], ("cast", cast), steps[-1]])
        yield "float64 inputs and a last step in float32", "DoubleTensorType", rounded
    if not any(hasattr(part, "_predictors") for part in parts):
        yield "float32 inputs", "FloatTensorType", estimator


def _input_types(arrays: Arrays, float_type: str) -> list[tuple[str, Any]]:
    """Return names and types of inputs: one tensor of all features, or one for each where they are not alike."""
    types = import_onnx("skl2onnx.common.data_types")
    features = arrays.contract.features
    names = {
        name: _tensor_type(features[name], float_type) if name in features else float_type for name in arrays.order
    }
    kinds = {*names.values()}
    if arrays.form == "frame" or len(kinds) > 1:
        return [(name, getattr(types, kind)([None, 1])) for name, kind in names.items()]
    return [("X", getattr(types, kinds.pop())([None, len(names)]))]


def _tensor_type(feature: FeatureSettings, float_type: str) -> str:
    if feature.type == "str":
        return "StringTensorType"
    return "Int64TensorType" if feature.type == "int" and feature.choices is not None else float_type


def _convert(estimator: Any, predictor: Predictor, arrays: Arrays, float_type: str) -> bytes:
    """Convert an estimator with skl2onnx."""
    last = estimator.steps[-1][1] if hasattr(estimator, "steps") else estimator
    wanted = {"zipmap": False} | ({"raw_scores": True} if predictor.score == "decision" else {})
    options = {key: value for key, value in wanted.items() if key in _known_options(last)}
    model = import_onnx("skl2onnx").to_onnx(
        estimator,
        initial_types=_input_types(arrays, float_type),
        options={id(last): options},
        target_opset=OPSETS,
    )
    refuse_trees(model.graph)
    if hasattr(last, "_predictors") and float_type == "DoubleTensorType":
        _widen_thresholds(model, last)
    graph: bytes = model.SerializeToString()
    return graph


def _known_options(estimator: Any) -> Iterable[str]:
    """Return the options of a converter, which refuses all others."""
    names = import_onnx("skl2onnx._supported_operators").sklearn_operator_name_map
    converter = import_onnx("skl2onnx.common._registration")._converter_pool.get(names.get(type(estimator)))
    return (converter and converter.get_allowed_options()) or ()


def _widen_thresholds(model: Any, boosting: Any) -> None:
    """Put float64 thresholds in the place of skl2onnx's float32 ones: histogram boosting does not round X."""
    onnx = import_onnx("onnx")
    trees = [tree.nodes for trees in boosting._predictors for tree in trees]
    thresholds = np.concatenate([np.where(nodes["is_leaf"], 0.0, nodes["num_threshold"]) for nodes in trees])
    (node,) = (node for node in model.graph.node if node.op_type.startswith("TreeEnsemble"))
    for attribute in list(node.attribute):
        if attribute.type == onnx.AttributeProto.FLOATS:
            is_threshold = attribute.name == "nodes_values"
            values = thresholds if is_threshold else np.array(attribute.floats, np.float64)
            tensor = onnx.numpy_helper.from_array(values)
            node.attribute.remove(attribute)
            node.attribute.append(onnx.helper.make_attribute(f"{attribute.name}_as_tensor", tensor))
    for opset in model.opset_import:
        if opset.domain == node.domain:
            opset.version = OPSETS[node.domain]  # the first that has such tensors
    for output in model.graph.output:  # which are float32 all the same
        if output.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE:
            output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT

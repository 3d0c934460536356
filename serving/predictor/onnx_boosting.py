"""Converters for trees of LightGBM, XGBoost and CatBoost, which skl2onnx then uses wherever such a part is.

Trees of LightGBM compare in float64, those of the others round X to float32. So each gets X in its own type, wherever
in an estimator it is, and gives its answers in the type that those around it have.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from serving.errors import ModelError
from serving.predictor.inputs import find_parts
from serving.predictor.onnx_runtime import import_onnx
from serving.predictor.predictor import kind_of

REQUIREMENTS = "requirements-onnx-boosting.txt"
Converter = Callable[[Any, Any, Any], None]  # of a scope, an operator and a container of skl2onnx


def register_converters(estimator: Any) -> None:
    """Make the types that are in an estimator known to skl2onnx. Raises `ModelError` where a package is missing."""
    for part in find_parts(estimator):
        kind = type(part)
        library = kind.__module__.partition(".")[0]
        if library in CONVERTERS and hasattr(part, "predict"):
            _register(part, kind, library)


def _register(part: Any, kind: type, library: str) -> None:
    options: dict[str, list[Any]] = {}
    if kind_of(part) == "classifier" or hasattr(part, "predict_proba"):
        options = {"zipmap": [True, False, "columns"]}
        known = import_onnx("skl2onnx._supported_operators").sklearn_classifier_list
        if kind not in known:
            known.append(kind)  # those with labels and scores; CatBoost's are no `ClassifierMixin`
    if hasattr(part, "decision_function"):
        options["raw_scores"] = [True, False]
    convert = functools.partial(_convert, CONVERTERS[library](), library == "lightgbm")
    import_onnx("skl2onnx").update_registered_converter(
        kind, f"{library}_{kind.__name__}", _set_types, convert, options=options or None
    )


def _lightgbm() -> Converter:
    module = "onnxmltools.convert.lightgbm.operator_converters.LightGbm"
    convert: Converter = import_onnx(module, REQUIREMENTS).convert_lightgbm
    return convert


def _xgboost() -> Converter:
    module = import_onnx("onnxmltools.convert.xgboost.operator_converters.XGBoost", REQUIREMENTS)

    def convert(scope: Any, operator: Any, container: Any) -> None:
        part = operator.raw_operator = copy.copy(operator.raw_operator)
        part._Booster = part.get_booster().copy()
        part._Booster.feature_names = None  # it knows features by number only
        module.convert_xgboost(scope, operator, container)

    return convert


def _catboost() -> Converter:
    def convert(scope: Any, operator: Any, container: Any) -> None:
        helper = import_onnx("onnx").helper
        model = import_onnx("catboost.utils").convert_to_onnx_object(operator.raw_operator)
        (trees,) = (node for node in model.graph.node if node.op_type.startswith("TreeEnsemble"))
        values = {item.name: helper.get_attribute_value(item) for item in trees.attribute}
        names = operator.input_full_names, operator.output_full_names
        container.add_node(trees.op_type, *names, op_domain=trees.domain, **values)

    return convert


CONVERTERS: dict[str, Callable[[], Converter]] = {"lightgbm": _lightgbm, "xgboost": _xgboost, "catboost": _catboost}


def _set_types(operator: Any) -> None:
    """Set the types of the outputs, which follow from X: labels with scores, or numbers."""
    types = import_onnx("skl2onnx.common.data_types")
    n_rows = operator.inputs[0].type.shape[0]
    numbers = types.DoubleTensorType if _is_double(operator) else types.FloatTensorType
    if len(operator.outputs) == 1:
        operator.outputs[0].type = numbers([n_rows, 1])
        return
    classes = np.asarray(operator.raw_operator.classes_)
    labels = types.StringTensorType if classes.dtype.kind in "OU" else types.Int64TensorType
    operator.outputs[0].type = labels([n_rows])
    operator.outputs[1].type = numbers([n_rows, len(classes)])


def _is_double(operator: Any) -> bool:
    kinds = {type(item.type).__name__ for item in operator.inputs}
    if "StringTensorType" in kinds:
        raise ModelError("takes categories as text, which trees do not in ONNX Runtime")
    return kinds != {"FloatTensorType"}


def _convert(convert: Converter, is_exact: bool, scope: Any, operator: Any, container: Any) -> None:
    """Convert a part with its library's converter, between X and answers of other types."""
    types, floats = import_onnx("skl2onnx.common.data_types"), import_onnx("onnx").TensorProto
    is_double = _is_double(operator)
    columns = [scope.get_unique_variable_name("column") for _ in operator.inputs]
    for item, column in zip(operator.inputs, columns, strict=True):
        to = floats.DOUBLE if is_exact and is_double else floats.FLOAT
        container.add_node("Cast", [item.full_name], [column], to=to)
    X, *names = (scope.get_unique_variable_name(name) for name in ("X", *("answer" for _ in operator.outputs)))
    container.add_node("Concat", columns, [X], axis=1)
    inner = SimpleNamespace(
        raw_operator=operator.raw_operator,
        full_name=operator.full_name,
        inputs=[SimpleNamespace(full_name=X, type=types.FloatTensorType(operator.inputs[0].type.shape))],
        input_full_names=[X],
        outputs=[SimpleNamespace(full_name=name) for name in names],
        output_full_names=names,
    )
    given = container.get_options(operator.raw_operator, {"raw_scores": False}, fail=False) or {}
    convert(scope, inner, TreeContainer(container, is_exact and is_double, bool(given.get("raw_scores"))))
    for name, output in zip(names[:-1], operator.outputs, strict=False):
        container.add_node("Identity", [name], [output.full_name])
    to = floats.DOUBLE if is_double else floats.FLOAT
    container.add_node("Cast", [names[-1]], [operator.outputs[-1].full_name], to=to)


class TreeContainer:
    """A container of nodes in which the numbers of trees keep their float64 values, or their scores are left raw."""

    def __init__(self, container: Any, is_exact: bool, is_raw: bool) -> None:
        self._container, self._is_exact, self._is_raw = container, is_exact, is_raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def add_node(self, op_type: str, *names: Any, **values: Any) -> None:
        """Add a node; one of trees may be changed."""
        if op_type == "TreeEnsembleClassifier" and self._is_raw:
            values["post_transform"] = "NONE"
        if op_type.startswith("TreeEnsemble") and self._is_exact:
            values = {"op_version": 3} | dict(_as_tensor(name, value) for name, value in values.items())
        self._container.add_node(op_type, *names, **values)


def _as_tensor(name: str, value: Any) -> tuple[str, Any]:
    if name not in ("nodes_values", "nodes_hitrates", "class_weights", "target_weights", "base_values"):
        return name, value
    tensor = import_onnx("onnx").numpy_helper.from_array(np.array(value, np.float64), name)
    return f"{name}_as_tensor", tensor

"""What /v2 says of the model, as metadata to its clients and as OpenAPI to others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving import VERSION
from serving.web.messages import JSON
from serving.web.service import Service
from serving.web.tensors import DTYPES

OCTETS = "application/octet-stream"
SERVER = {"name": "serving", "version": VERSION, "extensions": ["binary_tensor_data"]}
DATATYPES = {"float": "FP64", "int": "INT64", "bool": "BOOL", "str": "BYTES"}  # of features, by their types
DATATYPES_OF_JSON = {bool: "BOOL", int: "INT64", str: "BYTES"}  # of outputs; all else is FP64
TEXT, TRUTH = {"type": "string"}, {"type": "boolean"}
PARAMETERS = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
SHAPE = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
DATATYPE = {"type": "string", "enum": [*DTYPES]}
DATA: dict[str, Any] = {"type": "array", "items": {}}


def output_names(service: Service[Any]) -> list[str]:
    """Return the names of the outputs, in their order."""
    return [*service.model.answer_example()]


def describe_model(service: Service[Any]) -> dict[str, Any]:
    """Return the model's metadata ("Model Metadata Response JSON Object")."""
    settings, features = service.settings.model, service.model.contract.features
    inputs = [_tensor(name, DATATYPES[feature.type or "float"], [-1]) for name, feature in features.items()]
    outputs = [_describe_output(service, name) for name in output_names(service)]
    platform = _platform(service.model.path)
    return {
        "name": settings.name,
        "versions": [settings.version],
        "platform": platform,
        "inputs": inputs,
        "outputs": outputs,
    }


def _platform(path: Path) -> str:
    """Return the platform's name, "<project>_<format>" ("Platforms")."""
    suffix = path.suffix.lower().lstrip(".")
    return "onnx_onnxv1" if suffix == "onnx" else f"sklearn_{'pickle' if suffix == 'pkl' else suffix}"


def _tensor(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


def _describe_output(service: Service[Any], name: str) -> dict[str, Any]:
    """Return an output's metadata; `parameters` name what is in its second dimension."""
    part = service.model.answer_example()[name]
    labels = [*_labels_of(part)]
    values = [*_leaves_of(part)]
    datatypes = {DATATYPES_OF_JSON.get(type(value), "FP64") for value in values}
    datatype = datatypes.pop() if len(datatypes) == 1 else "BYTES" if "BYTES" in datatypes else "FP64"
    described = _tensor(name, datatype, [-1, len(values)] if isinstance(part, dict | list) else [-1])
    return described | ({"parameters": {"labels": labels}} if labels else {})


def _labels_of(part: Any) -> list[Any]:
    """Return what each value of an answer is of: a class, or an output, or a class of an output."""
    if not isinstance(part, dict):
        return []
    inner = [(name, _labels_of(item)) for name, item in part.items()]
    return [label for name, labels in inner for label in ([[name, each] for each in labels] or [name])]


def _leaves_of(part: Any) -> list[Any]:
    if isinstance(part, dict | list):
        items = part.values() if isinstance(part, dict) else part
        return [leaf for item in items for leaf in _leaves_of(item)]
    return [part]


def describe_error() -> dict[str, Any]:
    """Return the content of an error ("Inference Response JSON Error Object")."""
    return {JSON: {"schema": _object({"error": TEXT})}}


def describe_server_answer(service: Service[Any]) -> dict[str, Any]:
    schema = _object({"name": TEXT, "version": TEXT, "extensions": {"type": "array", "items": TEXT}})
    return {JSON: {"schema": schema, "example": SERVER}}


def describe_health_answer(service: Service[Any]) -> dict[str, Any]:
    return {JSON: {"schema": _object({"live": TRUTH, "ready": TRUTH})}}


def describe_ready_answer(service: Service[Any]) -> dict[str, Any]:
    return {JSON: {"schema": _object({"name": TEXT, "ready": TRUTH})}}


def describe_model_answer(service: Service[Any]) -> dict[str, Any]:
    tensor = _object({"name": TEXT, "datatype": DATATYPE, "shape": SHAPE}, parameters={"type": "object"})
    tensors = {"type": "array", "items": tensor}
    texts = {"type": "array", "items": TEXT}
    schema = _object({"name": TEXT, "versions": texts, "platform": TEXT, "inputs": tensors, "outputs": tensors})
    return {JSON: {"schema": schema, "example": describe_model(service)}}


def describe_request(service: Service[Any]) -> dict[str, Any]:
    """Return the content of a request for inference, with one that works."""
    tensor = _object({"name": TEXT, "shape": SHAPE, "datatype": DATATYPE}, parameters=PARAMETERS, data=DATA)
    output = _object({"name": TEXT}, parameters=PARAMETERS)
    inputs, outputs = {"type": "array", "items": tensor, "minItems": 1}, {"type": "array", "items": output}
    schema = _object({"inputs": inputs}, id=TEXT, parameters=PARAMETERS, outputs=outputs)
    media = {"schema": schema, "example": {"inputs": example_inputs(service)}}
    return {JSON: media, OCTETS: {"schema": {"type": "string", "format": "binary"}}}


def example_inputs(service: Service[Any]) -> list[dict[str, Any]]:
    """Return input tensors of one row: a single one if the features share a datatype, or else one a feature."""
    contract = service.model.contract
    row, types = contract.example, {feature.type for feature in contract.features.values()}
    if len(types) == 1:
        datatype = DATATYPES[types.pop() or "float"]
        return [{"name": "input", "shape": [1, len(row)], "datatype": datatype, "data": [[*row.values()]]}]
    datatypes = {name: DATATYPES[feature.type or "float"] for name, feature in contract.features.items()}
    return [{"name": name, "shape": [1], "datatype": datatypes[name], "data": [row[name]]} for name in row]


def describe_answer(service: Service[Any]) -> dict[str, Any]:
    """Return the content of an answer to a request for inference."""
    tensor = _object({"name": TEXT, "shape": SHAPE, "datatype": DATATYPE}, parameters=PARAMETERS, data=DATA)
    outputs = {"type": "array", "items": tensor}
    schema = _object({"model_name": TEXT, "outputs": outputs}, model_version=TEXT, id=TEXT)
    return {JSON: {"schema": schema}, OCTETS: {"schema": {"type": "string", "format": "binary"}}}


def _object(required: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {**required, **more}, "required": [*required]}

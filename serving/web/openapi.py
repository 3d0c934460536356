"""The OpenAPI document of a service, from its table of operations and the contract of its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, TypeAdapter

from serving import VERSION
from serving.predictor.contract import Contract
from serving.predictor.features import describe_cell
from serving.predictor.predictor import Predictor
from serving.web.messages import JSON, write_detail
from serving.web.operation import Operation
from serving.web.service import Service


class Status(BaseModel):
    status: str
    model: str | None = None
    model_sha256: str | None = None  # of the artifact's bytes
    settings_sha256: str | None = None  # of every value in force but the secrets


class Problem(BaseModel):
    detail: str


class BadCell(BaseModel):
    type: str
    loc: list[str | int]
    msg: str
    input: Any


class ValidationProblem(BaseModel):
    detail: list[BadCell]


LABEL_TYPES = {bool: "boolean", int: "integer", str: "string"}
NUMBER = {"type": ["number", "null"]}  # what is no number in JSON is null


def describe_api(service: Service[Any]) -> dict[str, Any]:
    """Make the OpenAPI 3.1 document from the table of operations."""
    contract, sample, auth = service.model.contract, service.model.answer_example(), service.settings.auth
    schemas = _schemas(contract) | {"Prediction": _describe_prediction(service.model.predictor, sample)}
    paths: dict[str, Any] = {}
    for operation in [one for one in service.operations if one.is_described]:
        described = _describe(service, operation, schemas, (contract.example, sample))
        paths.setdefault(operation.path, {})[operation.method.lower()] = described
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": service.settings.model.name, "version": VERSION},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if service.root_path:
        document["servers"] = [{"url": service.root_path}]
    if auth.api_keys:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
    return document


def _schemas(contract: Contract) -> dict[str, Any]:
    types: dict[str, Any] = {
        "Status": TypeAdapter(Status),
        "Problem": TypeAdapter(Problem),
        "ValidationProblem": TypeAdapter(ValidationProblem),
    }
    inputs: list[Any] = [(name, "validation", adapter) for name, adapter in types.items()]
    references, definitions = TypeAdapter.json_schemas(inputs, ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = definitions.get("$defs", {})
    for (name, _), schema in references.items():
        schemas.setdefault(name, schema)
    schemas["Features"] = _describe_features(contract)
    schemas["Document"] = {"type": "object"}
    return schemas


def _describe_features(contract: Contract) -> dict[str, Any]:
    features = contract.features
    described = _describe_object({name: describe_cell(name, feature) for name, feature in features.items()})
    required = [name for name, feature in features.items() if not feature.missing]
    return {"title": "Features"} | described | {"required": required}


def _describe_prediction(predictor: Predictor, sample: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of an answer: that of the sample, with the classes that there are."""
    properties = {"prediction": describe_outputs(predictor, sample["prediction"])}
    if predictor.score is not None:
        properties[predictor.score] = _describe_like(sample[predictor.score], NUMBER)
    return {"title": "Prediction"} | _describe_object(properties)


def describe_outputs(predictor: Predictor, prediction: Any) -> dict[str, Any]:
    """Return the JSON Schema of a label or a number, or of several, such as the sample is."""
    if not isinstance(prediction, dict):
        return _describe_output(prediction, predictor.classes)
    unknown: list[Any] = [None] * len(prediction)
    outputs = zip(prediction.items(), predictor.classes_by_output or unknown, strict=True)
    return _describe_object({name: _describe_output(value, known) for (name, value), known in outputs})


def _describe_output(value: Any, classes: list[Any] | None) -> dict[str, Any]:
    if classes is not None and all(isinstance(label, str | int) for label in classes):
        kinds = {LABEL_TYPES[type(label)] for label in classes}
        return ({"type": kinds.pop()} if len(kinds) == 1 else {}) | {"enum": classes}
    if isinstance(value, int | float | None) and not isinstance(value, bool):
        return NUMBER
    return {"type": LABEL_TYPES[type(value)]} if type(value) in LABEL_TYPES else {}


def _describe_like(value: Any, leaf: dict[str, Any]) -> dict[str, Any]:
    if isinstance(value, dict) and any(isinstance(item, dict | list) for item in value.values()):
        return _describe_object({name: _describe_like(item, leaf) for name, item in value.items()})
    if isinstance(value, dict):  # by class, of which '<=50K' and '>50K' would be one attribute of a generated client
        by_name = {"required": [*value], "propertyNames": {"enum": [*value]}}
        return {"type": "object", "additionalProperties": leaf} | by_name
    return {"type": "array", "items": leaf} if isinstance(value, list) else leaf


def _describe_object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _describe(service: Service[Any], operation: Operation, schemas: Mapping[str, Any], example: Any) -> dict[str, Any]:
    """Describe an operation; `example` is a row and its prediction."""
    secured = operation.needs_key(service.settings.auth)
    described: dict[str, Any] = {"operationId": operation.name, "summary": operation.summary}
    row, answer = example if operation.answer_schema == "Prediction" else (None, None)
    schema: dict[str, Any] = _reference(operation.answer_schema)
    if operation.takes_query:
        described["parameters"] = [*_describe_parameters(schemas["Features"], service.model.contract.example)]
    if operation.media_types:
        rows = _content_of_one_or_many(_reference("Features"), row)
        content = {media_type: rows.get(media_type, {}) for media_type in operation.media_types}
        content |= operation.request_content(service) if operation.request_content else {}
        described["requestBody"] = {"required": True, "content": content}
    in_json = _content_of_one_or_many if JSON in operation.media_types else _content
    given = in_json(schema, answer) if operation.answer_media_type == JSON else {operation.answer_media_type: {}}
    given |= operation.answer_content(service) if operation.answer_content else {}
    described["responses"] = {"200": _answer_described(200, given)}
    for status in operation.errors:
        if status != 401 or secured:
            problem = _content(_reference("ValidationProblem" if status == 422 else "Problem"))
            content = problem if operation.write_error is write_detail else dict(operation.error_content)
            described["responses"][str(status)] = _answer_described(status, content)
    if secured:
        described["security"] = [{"bearer": []}, {"api_key": []}]
    return described


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _describe_parameters(features: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, cell in features["properties"].items():
        is_required = name in features["required"]
        yield {"name": name, "in": "query", "required": is_required, "schema": cell, "example": row[name]}


def _content(schema: dict[str, Any], example: Any = None) -> dict[str, Any]:
    media = {"schema": schema} if example is None else {"schema": schema, "example": example}
    return {JSON: media}


def _content_of_one_or_many(schema: dict[str, Any], example: Any = None) -> dict[str, Any]:
    media: dict[str, Any] = {"schema": {"oneOf": [schema, {"type": "array", "items": schema}]}}
    if example is not None:
        media["examples"] = {
            "one": {"summary": "One row", "value": example},
            "batch": {"summary": "A batch of rows", "value": [example, example]},
        }
    return {JSON: media}


def _answer_described(status: int, content: dict[str, Any]) -> dict[str, Any]:
    headers = {"X-Request-ID": {"schema": {"type": "string"}}}
    return {"description": HTTPStatus(status).phrase, "headers": headers, "content": content}

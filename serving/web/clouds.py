"""The clouds' ways to ask for predictions: SageMaker's and MLflow's, KServe's V1, and the routes of Vertex AI."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import structlog
from pydantic_core import to_json

from serving.platforms import RoutesSettings
from serving.predictor.calls import Job
from serving.predictor.features import describe_cell
from serving.predictor.predictions import PIECE_ROWS, Predictions
from serving.web.accept import prefers
from serving.web.decoding import predict_decoded
from serving.web.endpoints import ready, refuse_if_stopping
from serving.web.envelopes import Envelope
from serving.web.lines import describe_answers, describe_lines, predict_lines
from serving.web.messages import JSON, JSONL, Request, Response
from serving.web.openapi import describe_outputs
from serving.web.operation import Operation
from serving.web.service import Service, ServiceSettings

log = structlog.get_logger()
CSV = "text/csv"
ERRORS = (400, 401, 408, 413, 415, 422, 429, 500, 503)
SCHEMA = "#/components/schemas/"


class CloudSettings(ServiceSettings, Protocol):
    """The tables of the settings that the clouds' operations read."""

    @property
    def routes(self) -> RoutesSettings: ...


class LabelledEnvelope(Envelope):
    """An envelope whose answer is a line of CSV for each row, with its prediction alone."""

    def encode(self, predictions: Predictions | None) -> list[bytes]:
        """Return the pieces of the answer in CSV."""
        columns = [] if predictions is None else predictions.only("prediction").columns
        starts = range(0, self.n_rows, PIECE_ROWS)
        pieces = ([column[start : start + PIECE_ROWS].tolist() for column in columns] for start in starts)
        return [_write_csv(zip(*piece, strict=True)).encode() for piece in pieces] or [b""]


def _write_csv(rows: Iterable[Iterable[Any]]) -> str:
    """Return lines of labels and numbers, which end with "\\n", at which SageMaker's batch transform joins answers."""
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(map(_as_text, row) for row in rows)
    return lines.getvalue()


def _as_text(value: Any) -> str:
    """Return a label or a number as a cell of CSV: as JSON writes it, without quotes, and nothing for null."""
    text = value if isinstance(value, str) else to_json(value, inf_nan_mode="null", fallback=str).decode()
    return "" if text == "null" and value != "null" else text


async def predict_envelope(service: Service[Any], request: Request) -> Response:
    answers_csv = prefers(request, CSV, JSON)
    is_csv = (request.header("content-type") or "").lower().partition(";")[0].strip() == CSV
    kind, media_type = (LabelledEnvelope, CSV) if answers_csv else (Envelope, JSON)
    max_rows = service.settings.limits.max_rows
    envelope = kind(service.model.arrays, request.take_body(), max_rows, is_csv)
    if envelope.is_long:
        return await predict_decoded(service, request, envelope, media_type)
    rows = envelope.read_rows()
    if not rows:
        return Response(envelope.encode(None), media_type=media_type)
    return Response(await service.predict(request, Job(len(rows), rows, envelope.encode)), media_type=media_type)


async def alive(service: Service[Any], request: Request) -> Response:
    return Response.of({"status": "alive"}, headers={"Vary": "Accept"})


async def list_models(service: Service[Any], request: Request) -> Response:
    return Response.of({"models": [service.settings.model.name]})


async def describe_model(service: Service[Any], request: Request) -> Response:
    refuse_if_stopping()
    return Response.of({"name": service.settings.model.name, "ready": True})


def operations(settings: CloudSettings) -> Iterator[Operation]:
    """Yield the rows of the table for the clouds, but for those of `routes`."""
    model = f"/v1/models/{settings.model.name}"
    yield _predicting("/invocations", "invocations", "Predict rows, as SageMaker and MLflow send them")
    yield _predicting(f"{model}:predict", "predict_v1", "Predict rows, as KServe's V1 protocol sends them")
    yield _asking(model, "model_v1", "Whether the model is usable, in KServe's V1 protocol", describe_model, (503,))
    yield Operation(
        "GET",
        "/",
        "live_v1",
        "Whether the process answers, in KServe's V1 protocol",
        alive,
        access="open",
        is_described=False,
        only_for=lambda request: True,  # whom the page does not want, if no route of a user's has the path
    )
    names = _asking("/v1/models", "models_v1", "The names of all models, of which there is one", list_models)
    yield dataclasses.replace(names, scope="/v1/models")


def operations_of_routes(settings: CloudSettings, table: Iterable[Operation]) -> Iterator[Operation]:
    """Yield the rows of the table for the paths of `routes`, but for those that it has already."""
    there = {(operation.method, operation.path) for operation in table if not operation.only_for}
    routes = settings.routes
    if routes.predict and ("POST", routes.predict) not in there:
        yield _predicting(routes.predict, "predict_route", "Predict rows, as Vertex AI sends them")
    if routes.health and ("GET", routes.health) not in there:
        yield _asking(routes.health, "health_route", "Whether the model is usable", ready, (503,), "Status")


def note_routes(settings: CloudSettings, table: Iterable[Operation]) -> None:
    """Log which paths of `routes` were there already, and stay what they are."""
    made = {operation.path for operation in table if operation.name in ("predict_route", "health_route")}
    for name, path in settings.routes:
        if path and path not in made:
            log.info("route_left_alone", setting=f"routes.{name}", path=path)


def _predicting(path: str, name: str, summary: str) -> Operation:
    return Operation(
        "POST",
        path,
        name,
        summary,
        predict_envelope,
        media_types=(JSON, CSV, JSONL),
        stream=predict_lines,
        request_content=describe_request,
        answer_content=describe_answer,
        errors=ERRORS,
        is_hot=True,
    )


def _asking(
    path: str, name: str, summary: str, endpoint: Any, errors: tuple[int, ...] = (), schema: str = "Document"
) -> Operation:
    return Operation("GET", path, name, summary, endpoint, answer_schema=schema, errors=errors, access="open")


def describe_request(service: Service[Any]) -> Mapping[str, Any]:
    """Return the bodies for OpenAPI, with the model's own features as examples."""
    contract = service.model.contract
    row, rows = {"$ref": f"{SCHEMA}Features"}, {"type": "array", "items": {"$ref": f"{SCHEMA}Features"}}
    n_names = len(contract.names)
    listed = {"type": "array", "items": {}, "minItems": n_names, "maxItems": n_names}
    alone = [describe_cell(name, feature) for name, feature in contract.features.items()] if n_names == 1 else []
    mixed = {"type": "array", "items": {"anyOf": [row, listed, *alone]}}
    cells = {"type": "array", "items": {}}
    lists = {"type": "array", "items": cells}
    names = {"type": "array", "items": {"enum": contract.names}}
    split = _object({"columns": names, "index": cells, "data": lists}, ["columns", "data"])
    columns = _object(dict.fromkeys(contract.names, cells), [])
    kinds = {
        "instances": mixed,
        "dataframe_records": rows,
        "dataframe_split": split,
        "inputs": {"anyOf": [columns, mixed]},
        "input_data": {"anyOf": [split, columns, mixed]},
    }
    full = _object({"full": {"type": ["boolean", "null"]}}, [])
    options: dict[str, Any] = {name: {"anyOf": [full, {"type": "null"}]} for name in ("parameters", "params")}
    options["signature_name"] = {"type": ["string", "null"]}
    envelopes = [_object({kind: schema, **options}, [kind]) for kind, schema in kinds.items()]
    example = contract.example
    examples = {name: {"value": value} for name, value in _examples(example).items()}
    described: dict[str, Any] = {"schema": {"anyOf": [*envelopes, row, rows]}, "examples": examples}
    written = _write_csv([example, example.values()])
    lines: dict[str, Any] = {"schema": {"type": "string"}, "example": written}
    return {JSON: described, CSV: lines, **describe_lines(service)}


def _object(properties: Mapping[str, Any], required: list[str]) -> dict[str, Any]:
    described = {"type": "object", "properties": properties, "additionalProperties": False}
    return described | ({"required": required} if required else {})


def _examples(example: Mapping[str, Any]) -> dict[str, Any]:
    """Return a body with one row for each key, by a name for it."""
    split = {"columns": [*example], "data": [[*example.values()]]}
    return {
        "instances": {"instances": [example]},
        "lists": {"instances": [[*example.values()]]},
        "whole_answers": {"instances": [example], "parameters": {"full": True}},
        "records": {"dataframe_records": [example]},
        "split": {"dataframe_split": split},
        "columns": {"inputs": {name: [value] for name, value in example.items()}},
        "azure": {"input_data": {**split, "index": [0]}},
        "rows": [example],
    }


def describe_answer(service: Service[Any]) -> Mapping[str, Any]:
    """Return the answers for OpenAPI, with that to the example."""
    whole = {"$ref": f"{SCHEMA}Prediction"}
    prediction = service.model.answer_example()["prediction"]
    part = describe_outputs(service.model.predictor, prediction)
    answers = {"type": "array", "items": {"anyOf": [part, whole]}}
    example = {"predictions": [prediction]}
    described = {"schema": _object({"predictions": answers}, ["predictions"]), "example": example}
    return {JSON: described, CSV: {"schema": {"type": "string"}}, **describe_answers(service)}

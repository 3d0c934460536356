"""Predictions for rows in JSON or in a query, and health."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from serving.errors import Unavailable
from serving.predictor.bodies import LongBody, is_long, read_rows
from serving.predictor.calls import Job
from serving.predictor.predictions import Predictions
from serving.web.decoding import predict_decoded
from serving.web.lines import describe_answers, describe_lines, predict_lines
from serving.web.messages import JSON, JSONL, Request, Response
from serving.web.operation import Operation
from serving.web.service import STOPPING, Service, ServiceSettings

RESTART_S = 5.0  # seconds until a service that stops may be there again


async def predict_query(service: Service[Any], request: Request) -> Response:
    rows = service.model.contract.parse_query(request.query)
    return Response(await service.predict(request, Job(len(rows), rows, Predictions.render)))


async def predict_body(service: Service[Any], request: Request) -> Response:
    max_rows = service.settings.limits.max_rows
    if is_long(service.model.contract, cast(bytes, request.body)):
        return await predict_decoded(service, request, LongBody(service.model.arrays, request.take_body(), max_rows))
    rows, is_array = read_rows(service.model.contract, request.take_body(), max_rows)
    if not rows:
        return Response([b"[]"])
    answers = await service.predict(request, Job(len(rows), rows, Predictions.render))
    return Response([b"[%b]" % b",".join(answers)] if is_array else answers)


async def live(service: Service[Any], request: Request) -> Response:
    return Response.of({"status": "live"})


async def ready(service: Service[Any], request: Request) -> Response:
    refuse_if_stopping()
    return Response.of({"status": "ready", **service.identity})


def refuse_if_stopping() -> None:
    """Raise `Unavailable` once this process ends, and no other takes over from it."""
    if STOPPING.is_set():
        raise Unavailable("the service is ending", RESTART_S)


def operations(settings: ServiceSettings) -> Iterator[Operation]:
    """Yield the rows of the table for predictions and health."""
    yield Operation(
        "GET",
        "/predictions",
        "predict_query",
        "Predict one row, given as query parameters",
        predict_query,
        takes_query=True,
        answer_schema="Prediction",
        errors=(400, 401, 408, 413, 422, 429, 500, 503),
        is_hot=True,
    )
    yield Operation(
        "POST",
        "/predictions",
        "predict_body",
        "Predict one row, or each row of an array in its order",
        predict_body,
        media_types=(JSON, JSONL),
        stream=predict_lines,
        request_content=describe_lines,
        answer_content=describe_answers,
        answer_schema="Prediction",
        errors=(400, 401, 408, 413, 415, 422, 429, 500, 503),
        is_hot=True,
    )
    yield Operation("GET", "/ping", "ping", "Whether the process answers", live, access="open")
    yield Operation("GET", "/health/live", "live", "Whether the process answers", live, access="open")
    yield Operation("GET", "/health/ready", "ready", "Whether the model is usable", ready, errors=(503,), access="open")

"""The Open Inference Protocol over REST, /v2: health, metadata and inference, for clients of KServe and Triton."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from pydantic_core import to_json

from serving.errors import BadRequest, ServingError, listed, shorten
from serving.predictor.bodies import LONG_BYTES, decode_apart, too_many_rows
from serving.predictor.calls import Job
from serving.predictor.columns import Columns
from serving.predictor.predictions import Predictions
from serving.web import oip_schema
from serving.web.decoding import predict_decoded
from serving.web.endpoints import refuse_if_stopping
from serving.web.messages import JSON, Request, Response
from serving.web.oip_schema import OCTETS, SERVER
from serving.web.operation import Operation
from serving.web.output_tensors import write_answer, write_row
from serving.web.service import STOPPING, Service, ServiceSettings
from serving.web.tensors import (
    HEADER_LENGTH,
    Inference,
    Wanted,
    gather,
    header_length,
    read_header,
    read_inference,
    read_plain_row,
)

SHARED_CELLS = 1024  # cells of a request up to which its rows share a call with those of others
LENGTH_FIELD = HEADER_LENGTH.lower()
OUTPUTS = b',"outputs":['  # behind the head of an answer
MAX_TOLD = 3  # bad cells that an error names
ERROR = oip_schema.describe_error()


def write_error(error: ServingError) -> Response:
    """Return an error in the protocol's shape, `{"error": "…"}`."""
    text = error.detail if isinstance(error.detail, str) else fold(error.detail)
    response = Response.of({"error": text}, error.status, error.headers)
    response.lingers = error.lingers
    return response


def fold(problems: list[dict[str, Any]]) -> str:
    """Return what is wrong with rows as one text, which names the first bad cells by row and feature."""
    told: list[str] = []
    for problem in problems[:MAX_TOLD]:
        _, *place = problem["loc"]
        row, *names = place if place and isinstance(place[0], int) else [0, *place]
        where = ", ".join([f"row {row}", *map(repr, names)])
        given = to_json(problem["input"], inf_nan_mode="strings", fallback=str).decode()
        told.append(f"{where}: {problem['msg']}, not {given}")
    more = len(problems) - len(told)
    return "; ".join([*told, *([f"and {more} more"] if more else [])])


async def server_metadata(service: Service[Any], request: Request) -> Response:
    return Response.of(SERVER)


async def server_live(service: Service[Any], request: Request) -> Response:
    return Response.of({"live": True, "ready": not STOPPING.is_set()})


async def server_ready(service: Service[Any], request: Request) -> Response:
    refuse_if_stopping()
    return Response.of({"live": True, "ready": True})


async def model_ready(service: Service[Any], request: Request) -> Response:
    refuse_if_stopping()
    return Response.of({"name": service.settings.model.name, "ready": True})


async def model_metadata(service: Service[Any], request: Request) -> Response:
    return Response.of(oip_schema.describe_model(service))


async def infer(head: bytes, service: Service[Any], request: Request) -> Response:
    """Answer a request for inference; `head` is the beginning of the answer's JSON."""
    body, contract = request.take_body(), service.model.contract
    size = len(body)
    length = header_length(request.header(LENGTH_FIELD), size)
    payload = None
    if size <= LONG_BYTES:
        payload = read_header(body, length)
        if length == size and (cells := read_plain_row(payload, len(contract.names))) is not None:
            rows = contract.parse_payload([dict(zip(contract.names, cells, strict=True))])
            return Response(await service.predict(request, Job(1, rows, functools.partial(write_row, head + OUTPUTS))))
    asked = Asked(service, head, body, length)
    if payload is not None:
        asked.read(payload)
        if asked.n_cells <= SHARED_CELLS:
            rows = contract.parse_payload(asked.columns.rows())
            return asked.finish(Response(await service.predict(request, Job(len(rows), rows, asked.encode))))
    del body, payload  # `asked` lets go of them once they are decoded
    return asked.finish(await predict_decoded(service, request, asked))


class Asked:
    """A request for inference: a `Body`, of which so many bytes are JSON."""

    columns: Columns  # once it is read

    def __init__(self, service: Service[Any], head: bytes, body: bytes, length: int) -> None:
        self.takes_long, self.length = len(body) > LONG_BYTES, length
        self.n_cells = self._n_rows = self._json_bytes = 0
        self._service, self._head, self._body = service, head, body
        self._wanted: tuple[Wanted, ...] = ()

    @property
    def max_rows_in_it(self) -> int:
        """The number of rows before they are decoded: an element has one byte or more."""
        max_rows: int = self._service.settings.limits.max_rows
        return min(max_rows, max(1, len(self._body) // len(self._service.model.contract.names)))

    def read(self, payload: Any) -> None:
        """Read the tensors, and what of the answer is wanted. Raises `ServingError`."""
        body, self._body = self._body, b""
        contract, max_rows = self._service.model.contract, self._service.settings.limits.max_rows
        inference = read_inference(payload, memoryview(body)[self.length :])
        self._wanted = self._choose(inference)
        n_rows = inference.inputs[0].shape[0]
        self._n_rows, self.n_cells = n_rows, n_rows * len(contract.names)
        self.columns = gather(contract, inference.inputs, is_large=self.n_cells > SHARED_CELLS)
        if n_rows > max_rows:
            raise too_many_rows(n_rows, max_rows)
        self._head += (b',"id":%b' % inference.id if inference.id else b"") + OUTPUTS

    def _choose(self, inference: Inference) -> tuple[Wanted, ...]:
        """Return the outputs that are asked for. Raises `BadRequest` if there is no such one."""
        names = oip_schema.output_names(self._service)
        if inference.outputs is None:
            key = f"{OCTETS if inference.is_binary else JSON} of /v2"
            if (every := self._service.made_once.get(key)) is None:
                every = self._service.made_once[key] = tuple(Wanted(name, inference.is_binary) for name in names)
            return every
        for number, one in enumerate(inference.outputs):
            if one.name not in names:
                raise BadRequest(f"outputs[{number}].name is {shorten(one.name)!r}; use one of {listed(names)}")
        return inference.outputs

    def decode(self) -> Any:
        """Return X. Raises `ServingError`."""
        try:
            return decode_apart(self._decode)
        finally:
            self.__dict__.pop("columns", None)

    def _decode(self) -> Any:
        if self._body:
            self.read(read_header(self._body, self.length))
        return self.columns.read(self._service.model.arrays)

    def encode(self, predictions: Predictions | None) -> list[bytes]:
        """Return the pieces of the answer."""
        if predictions is None:  # of a request without rows, which there is none
            return []
        pieces, self._json_bytes = write_answer(self._head, self._wanted, predictions, self._n_rows)
        return pieces

    def finish(self, response: Response) -> Response:
        """Return the response with what its head says of binary tensors, if there are any."""
        if any(one.is_binary for one in self._wanted):
            response.media_type = OCTETS
            response.more_headers = {HEADER_LENGTH: str(self._json_bytes)}
        return response


def operations(settings: ServiceSettings) -> Iterator[Operation]:
    """Yield the rows of the table for /v2."""
    row = functools.partial(Operation, write_error=write_error, error_content=ERROR)
    yield row(
        "GET",
        "/v2",
        "v2_server_metadata",
        "Describe the server",
        server_metadata,
        answer_content=oip_schema.describe_server_answer,
        errors=(401,),
        scope="/v2",
    )
    health = functools.partial(row, access="open", answer_content=oip_schema.describe_health_answer)
    yield health("GET", "/v2/health/live", "v2_server_live", "Whether the process answers", server_live)
    yield health(
        "GET", "/v2/health/ready", "v2_server_ready", "Whether the model is usable", server_ready, errors=(503,)
    )
    model = settings.model
    yield from _model_operations(f"/v2/models/{model.name}", "v2_model", row, to_json({"model_name": model.name})[:-1])
    head = to_json({"model_name": model.name, "model_version": model.version})[:-1]
    yield from _model_operations(f"/v2/models/{model.name}/versions/{model.version}", "v2_version", row, head)


def _model_operations(path: str, name: str, row: Any, head: bytes) -> Iterator[Operation]:
    yield row(
        "GET",
        path,
        f"{name}_metadata",
        "Describe the model",
        model_metadata,
        answer_content=oip_schema.describe_model_answer,
        errors=(401,),
    )
    yield row(
        "GET",
        f"{path}/ready",
        f"{name}_ready",
        "Whether the model is usable",
        model_ready,
        answer_content=oip_schema.describe_ready_answer,
        errors=(503,),
        access="open",
    )
    yield row(
        "POST",
        f"{path}/infer",
        f"{name}_infer",
        "Predict the rows that are in tensors",
        functools.partial(infer, head),
        media_types=(JSON, OCTETS),
        request_content=oip_schema.describe_request,
        answer_content=oip_schema.describe_answer,
        errors=(400, 401, 408, 413, 415, 422, 429, 500, 503),
        is_hot=True,
    )

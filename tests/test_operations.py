"""An operation from outside: another media type and another shape of errors are one file and one row."""

import asyncio
import concurrent.futures
import functools
from typing import Any

import pytest
from openapi_spec_validator import validate

import app
from serving.errors import ServingError, Unprocessable
from serving.predictor.calls import Job
from serving.web.messages import Request, Response
from serving.web.operation import Operation
from serving.web.service import Exchange, Observer, Service
from tests.lib.apps import call, call_asgi, make_settings
from tests.lib.cases import Case
from tests.lib.clients import ROW, Answer, post_case

CSV = "text/csv"


async def predict_csv(service: Service[Any], request: Request) -> Response:
    """Answer lines of numbers by lines of classes."""
    names = service.model.contract.names
    lines = request.take_body().decode().splitlines()
    try:
        payload = [dict(zip(names, map(float, line.split(",")), strict=True)) for line in lines]
    except ValueError as error:
        raise Unprocessable(f"not lines of {len(names)} numbers: {error}") from None
    rows = service.model.contract.parse_payload(payload)
    predictions = await service.predict(request, Job(len(rows), rows))
    classes, *_ = predictions.columns
    return Response(["\n".join(classes.tolist()).encode()], media_type=CSV)


def write_error(error: ServingError) -> Response:
    return Response([f"error: {error.detail}".encode()], error.status, media_type="text/plain")


ROW_OF_THE_TABLE = Operation(
    "POST",
    "/csv/predict",
    "predict_csv",
    "Predict lines of numbers",
    predict_csv,
    media_types=(CSV,),
    answer_media_type=CSV,
    errors=(422,),
    write_error=write_error,
    scope="/csv",
)


def build(observe: Observer, framework: str, **changes: Any) -> Any:
    """Return an app with one operation more, and an observer."""
    settings = make_settings(framework=framework, **changes)
    made = app.make_service(settings)
    service = Service(settings, made.model, made.proof, [*app.operations(settings), ROW_OF_THE_TABLE], [observe])
    return app.FRAMEWORKS[framework](service)


@pytest.fixture
def native(framework: str) -> Any:
    """An app with one operation more, which shows what observers see in `native.seen`."""
    seen: list[Exchange] = []
    native = build(seen.append, framework)
    native.seen = seen
    return native


def csv_case(body: bytes, path: str = "/csv/predict", media_type: str = CSV) -> Case:
    return Case("csv", "POST", path, (("Content-Type", media_type),), body)


def test_operation_from_outside_has_its_own_media_type(native: Any) -> None:
    """It takes and gives what its row says, and its rows are predicted like any other's."""
    answer = call(native, csv_case(b"5.1,3.5,1.4,0.2\n6.7,3.0,5.2,2.3"))
    assert (answer.status, answer.body) == (200, b"setosa\nvirginica")
    assert answer.headers["content-type"] == CSV


def test_operation_from_outside_writes_its_own_errors(native: Any) -> None:
    """Also those that are found before it is asked, and those of paths beside it; all others are as ever."""
    wrong = call(native, csv_case(b"5.1,3.5"))
    assert (wrong.status, wrong.headers["content-type"]) == (422, "text/plain")
    assert wrong.body.startswith(b"error: not lines of 4 numbers")
    typed = call(native, csv_case(b"[]", media_type="application/json"))
    assert (typed.status, typed.body) == (415, b"error: Content-Type is 'application/json'; use 'text/csv'")
    assert call(native, csv_case(b"", path="/csv/other")).body.startswith(b"error: there is no '/csv/other'")
    assert call(native, Case("get", "GET", "/csv/predict")).body.startswith(b"error: GET is not allowed")
    assert "detail" in call(native, csv_case(b"", path="/csvs")).json


@pytest.mark.parametrize("media_type", ["text/csv; header=present", "text/csv;charset=utf8; header=absent", ""])
def test_parameters_of_another_media_type_do_not_matter(native: Any, media_type: str) -> None:
    """What an operation takes is read whatever the parameters say, or if no type is sent; but not as something else."""
    assert call(native, csv_case(b"5.1,3.5,1.4,0.2", media_type=media_type)).body == b"setosa"
    wrong = call(native, csv_case(b"5.1,3.5,1.4,0.2", media_type="text/csv; charset=latin-1"))
    assert (wrong.status, wrong.body) == (415, b"error: Content-Type has 'charset=latin-1'; send 'text/csv' in UTF-8")
    assert call(native, csv_case(b"[]", media_type="application/x+json")).status == 415


def test_rows_of_several_dialects_are_described_and_observed(native: Any) -> None:
    """The document has the operation, and observers see each exchange with its operation, job and times."""
    document = call(native, Case("openapi", "GET", "/openapi.json")).json
    described = document["paths"]["/csv/predict"]["post"]
    assert [*described["requestBody"]["content"]] == [*described["responses"]["200"]["content"]] == [CSV]
    assert described["responses"]["422"]["content"] == {}
    validate(document)
    call(native, post_case(ROW))
    call(native, csv_case(b"5.1,3.5,1.4,0.2"))
    call(native, Case("missing", "GET", "/nothing"))
    asked, json_one, csv_one, missing = native.seen
    assert asked.operation.path == "/openapi.json"
    assert asked.request.job is None
    assert (json_one.operation.name, csv_one.operation.name) == ("predict_body", "predict_csv")
    assert json_one.request.job.call.n_rows == 1
    assert 0 < json_one.request.job.call.took_s < json_one.took_s
    assert (missing.operation, missing.response.status) == (None, 404)


def test_rows_of_several_dialects_share_a_call(framework: str) -> None:
    """Rows that wait together are predicted together, whatever asked for them, and each is answered as it asked."""
    seen: list[Exchange] = []
    native = build(seen.append, framework, batching={"max_rows": 3, "max_wait_ms": 1000})
    cases = [post_case(ROW), csv_case(b"5.1,3.5,1.4,0.2\n6.7,3.0,5.2,2.3")]
    if framework == "flask":
        with concurrent.futures.ThreadPoolExecutor(len(cases)) as threads:
            json_one, csv_one = threads.map(functools.partial(call, native), cases)
    else:
        json_one, csv_one = asyncio.run(call_together(native, cases))
    assert (json_one.json["prediction"], csv_one.body) == ("setosa", b"setosa\nvirginica")
    first, second = [exchange.request.job for exchange in seen]
    assert first.call is second.call
    assert first.call.n_rows == 3


async def call_together(native: Any, cases: list[Case]) -> list[Answer]:
    return await asyncio.gather(*[call_asgi(native, case) for case in cases])


def test_observer_that_fails_loses_no_answer(framework: str) -> None:
    """Whatever an observer raises, the client gets its answer."""

    def fail(exchange: Exchange) -> None:
        raise RuntimeError("observer")

    answer = call(build(fail, framework), post_case(ROW))
    assert answer.json["prediction"] == "setosa"

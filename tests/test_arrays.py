"""Long arrays are read and written in pieces, as if they were not."""

import asyncio
import gc
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from werkzeug.test import EnvironBuilder

import app
from serving.errors import BadRequest, ContentTooLarge, ServingError, Unprocessable
from serving.predictor.arrays import Arrays
from serving.predictor.bodies import PART_BYTES, QUICK_BYTES, LongBody, cut_array, parse_json, read_rows
from serving.predictor.contract import Contract
from serving.predictor.golden import is_close
from serving.predictor.inputs import read_inputs
from tests.lib.apps import call, call_asgi, make_settings, serve_estimator
from tests.lib.cases import Case
from tests.lib.clients import ROW, Answer, post_case
from tests.lib.pipelines import fitted, rows_of
from tests.lib.sizes import scale

N_ROWS = 10_000
TRICKY = ['},{"a": 1', "plain", "[{}],", 'a "quoted" }, {', "]}"]


def make_rows(n_rows: int) -> list[dict[str, float]]:
    X = np.random.default_rng(0).uniform(0, 8, (n_rows, len(ROW)))
    return [dict(zip(ROW, row, strict=True)) for row in X.tolist()]


def serve(framework: str) -> Any:
    return app.create_app(make_settings(framework=framework))


def test_long_array_is_answered_as_its_rows_are(framework: str) -> None:
    """Row by row the answers to 10 000 rows are those to a few of them, in their order."""
    native, rows = serve(framework), make_rows(N_ROWS)
    answers = call(native, post_case(rows)).json
    assert len(answers) == N_ROWS
    for start in (0, 999, 5000, N_ROWS - 3):
        few = call(native, post_case(rows[start : start + 3])).json
        assert is_close(answers[start : start + 3], few)


@pytest.mark.in_turn
@pytest.mark.parametrize("decimals", [0, 1, 15])
def test_long_array_costs_less_than_four_times_its_size(framework: str, decimals: int) -> None:
    """Neither the rows nor their answers are held as objects all at once: the app needs less than four bodies more."""
    native = serve(framework)
    rows = [{name: round(cell, decimals) for name, cell in row.items()} for row in make_rows(N_ROWS)]
    body = json.dumps(rows, separators=(",", ":")).encode()
    for _ in range(2):
        length, peak = send(native, body)
    assert length > len(body)
    assert peak < 4 * len(body)


def send(native: Any, body: bytes) -> tuple[int, int]:
    """Send a body as a server does, and keep nothing of the answer; give its length, and the most memory there was."""
    n_bytes = 0
    pieces = [body[start : start + 65_536] for start in range(0, len(body), 65_536)]
    if hasattr(native, "wsgi_app"):
        request = EnvironBuilder("/predictions", method="POST", data=body, content_type="application/json")
        environ = request.get_environ()
        tracemalloc.start()
        n_bytes = sum(map(len, native(environ, lambda *_: None)))
        return n_bytes, _stop_tracing()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def note(message: dict[str, Any]) -> None:
        nonlocal n_bytes
        n_bytes += len(message.get("body", b""))

    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "method": "POST", "path": "/predictions", "query_string": b"", "headers": headers}
    tracemalloc.start()
    asyncio.run(native(scope, receive, note))
    return n_bytes, _stop_tracing()


def _stop_tracing() -> int:
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("body", [b"[" + b" " * 70_000 + b"]", b"\n" * 70_000 + b"[]"], ids=["inside", "before"])
def test_long_array_of_nothing_is_answered_by_nothing(framework: str, body: bytes) -> None:
    """White space makes an empty array long, and no more."""
    answer = call(serve(framework), replace(post_case([]), body=body))
    assert (answer.status, answer.body) == (200, b"[]")


def test_long_body_is_decoded_beside_the_loop(framework: str) -> None:
    """While 2.5 MB are decoded, others are answered in the same loop. Its last cell is bad, so nothing is predicted."""
    asgi = app.as_asgi(app.create_app(make_settings(framework=framework, limits={"max_rows": 3 * N_ROWS})))
    rows: list[Any] = [{name: round(cell, 2) for name, cell in row.items()} for row in make_rows(N_ROWS)] * 3
    rows[-1] = {**ROW, "petal_width": "wide"}
    answer, n_pings = asyncio.run(ping_during(asgi, post_case(rows)))
    assert [problem["loc"] for problem in answer.json["detail"]] == [["body", len(rows) - 1, "petal_width"]]
    assert n_pings > 20


async def ping_during(asgi: Any, case: Case) -> tuple[Answer, int]:
    """Send a case, and return its answer and how many requests were answered until it came."""
    long = asyncio.create_task(call_asgi(asgi, case))
    n_pings = 0
    while not long.done():
        assert (await call_asgi(asgi, Case("ping", "GET", "/ping"))).status == 200
        await asyncio.sleep(0)
        n_pings += 1
    return await long, n_pings


def test_refused_long_body_is_let_go_of(framework: str) -> None:
    """Nothing of a long body that was refused waits for the garbage collector."""
    native, rows = serve(framework), [*make_rows(N_ROWS), {**ROW, "petal_width": "wide"}]
    body = json.dumps(rows[1:]).encode()
    send(native, body)
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(5):
            assert call(native, replace(post_case([]), body=body)).status == 422
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert kept < len(body)


@pytest.mark.parametrize("place", [0, 4321, N_ROWS - 1])
def test_bad_cell_of_a_long_array_is_named_by_its_row(framework: str, place: int) -> None:
    """The row's number is that in the whole array, and all bad cells are named."""
    rows: list[Any] = make_rows(N_ROWS)
    rows[place] = {**rows[place], "petal_width": "wide", "colour": 1}
    answer = call(serve(framework), post_case(rows))
    assert answer.status == 422
    assert [problem["loc"] for problem in answer.json["detail"]] == [
        ["body", place, "petal_width"],
        ["body", place, "colour"],
    ]


@pytest.mark.parametrize(
    "cell",
    [
        "true",
        "false",
        "null",
        '"5.1"',
        "[5.1]",
        '{"a": 5.1}',
        "1e39",
        "-1e39",
        "1e400",
        "1" * 400,
        "NaN",
        "Infinity",
        '5.1, "petal_width": 5.1',
        '5.1, "petal_widt\\u0068": 5.1',
        '5.1, "colour": 1',
        '5.1, "": 1',
        "05.1",
        "",
    ],
)
def test_cell_is_refused_in_a_long_array_as_in_a_short_one(cell: str) -> None:
    """What does not fit in one row does not fit in one of thousands, and what is said of it is the same."""
    native, good = serve("fastapi"), json.dumps(ROW)
    bad = good.replace("0.2", cell)
    short, long = (
        call(native, replace(post_case(None), body=f"[{', '.join([bad, *[good] * n_rows])}]".encode()))
        for n_rows in (1, 2000)
    )
    assert short.status in (400, 422)
    assert (long.status, long.body) == (short.status, short.body)


@pytest.mark.parametrize("names", [["true", "false"], ["fun", "stuff"], ["für", 'a "u" \\'], ["x", "y"]], ids=repr)
@pytest.mark.parametrize("cell", ["true", "false", "1e0"])
def test_boolean_is_found_among_numbers_whatever_their_names(tmp_path: Path, names: list[str], cell: str) -> None:
    """A long array is checked by counting letters, which names may have too."""
    X = pd.DataFrame(np.eye(2), columns=names)
    native = serve_estimator(tmp_path / "model.joblib", LinearRegression().fit(X, [1.0, 2.0]))
    for ensure_ascii in (True, False):
        good = json.dumps(dict.fromkeys(names, 0.5), ensure_ascii=ensure_ascii)
        body = f"[{', '.join([good] * 4000 + [good.replace('0.5', cell, 1)])}]"
        assert len(body) > PART_BYTES
        answer = call(native, replace(post_case(None), body=body.encode()))
        assert answer.status == (200 if cell == "1e0" else 422)
        if cell != "1e0":
            assert answer.json["detail"][0]["loc"] == ["body", 4000, names[0]]


@pytest.mark.parametrize("missing", [0, 1234])
def test_missing_feature_of_a_long_array_is_named(missing: int) -> None:
    """A row without one of its features is refused, also when another row has one too many."""
    rows: list[Any] = make_rows(2000)
    rows[missing] = dict(list(rows[missing].items())[1:])
    rows[1999]["colour"] = 1
    problems = call(serve("fastapi"), post_case(rows)).json["detail"]
    assert [problem["loc"] for problem in problems] == [["body", missing, "sepal_length"], ["body", 1999, "colour"]]


def test_too_long_array_says_how_long_it_is(framework: str) -> None:
    """An array of more rows than the limit is 413, with their number."""
    answer = call(serve(framework), post_case(make_rows(N_ROWS + 1)))
    assert (answer.status, answer.json["detail"]) == (413, "the body has 10001 rows; send at most 10000 rows")


@pytest.mark.parametrize("damage", [b"", b"]x", b"]]", b",", b'{"a":', b'},{"sepal_length": 1},{'])
def test_long_body_that_is_no_array_is_400(framework: str, damage: bytes) -> None:
    """What is wrong behind a hundred kilobytes of good rows is found and named."""
    whole = post_case(make_rows(2000))
    answer = call(serve(framework), replace(whole, body=whole.body[:-1] + damage))
    assert answer.status == 400
    assert answer.json["detail"].startswith("the body is not JSON: ")


def served(path: Path, n_rows: int) -> tuple[Answer, Any]:
    """Serve a model of texts and numbers, and ask it for many rows that look like JSON."""
    frame = pd.DataFrame({"text": TRICKY * 4, "number": np.arange(20.0)})
    columns = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["text"]), remainder="passthrough")
    estimator = make_pipeline(columns, LinearRegression()).fit(frame, np.arange(20.0))
    rows = [{"text": TRICKY[i % 5], "number": float(i)} for i in range(n_rows)]
    native = serve_estimator(path / "model.joblib", estimator)
    return call(native, post_case(rows)), estimator.predict(pd.DataFrame(rows))


def test_text_that_looks_like_json_is_not_cut(tmp_path: Path) -> None:
    """A brace and a comma inside a string are part of it, wherever the pieces end."""
    answer, expected = served(tmp_path, 6000)
    assert [row["prediction"] for row in answer.json] == pytest.approx(expected.tolist())


def test_long_array_reaches_code_that_takes_a_dataframe(tmp_path: Path) -> None:
    """Where all features are numbers, but a function of the user's takes a DataFrame, a long array is one too."""
    estimator, table = fitted("function")
    native = serve_estimator(tmp_path / "model.joblib", estimator)
    frame = table.dropna().head(100)
    many = pd.concat([frame] * 20)
    answer = call(native, post_case(rows_of(many)))
    assert [row["prediction"] for row in answer.json] == pytest.approx(estimator.predict(many).tolist())


@pytest.mark.parametrize("separator", [",", ", ", " ,\n\t"])
def test_array_is_cut_between_its_values(separator: str) -> None:
    """Each part has some whole values, whatever is in their texts, and together they have them all."""
    values = [{"a": index, "b": [index, {}], "c": TRICKY[index % 5] + "\\" * (index % 3)} for index in range(8000)]
    body = f"[{separator.join(map(json.dumps, values))}]".encode()
    cuts = list(cut_array(body, 1))
    parts = [body[begin:end] + (b"" if end == len(body) else b"]") for begin, end, _ in cuts]
    assert [value for part in parts for value in json.loads(b"[" + part)] == values
    assert max(map(len, parts)) < QUICK_BYTES


def test_long_value_is_cut_out_and_counted() -> None:
    """A value that is longer than a part is one by itself, with the number of values inside."""
    long = json.dumps([{"text": "a,b", "cells": [1, 2]}] * 5000)
    body = f'[{{"a": 1}}, {{"a": 2}}, {long}, {{"a": 3}}]'.encode()
    before, value, after = cut_array(body, 1)
    assert body[before[0] : before[1]] == b'{"a": 1}, {"a": 2}'
    assert body[value[0] : value[1]].strip() == long.encode()
    # Its own bracket, four commas and brackets in each of its values, a comma behind each.
    assert value[2] == 1 + 5000 * 4 + 5000
    assert body[after[0] : after[1]] == b' {"a": 3}]'


DAMAGE = [*b'"\\,[]{}: \n1', b"null", b",,", b'\\"', "é".encode(), b"\xff", b"NaN", b'"},{"', b'{"text": 1}', b"[[1]]"]


def damage(random: Random, body: bytes) -> bytes:
    """Put something in, leave something out, or cut the rest off, at a place near the end of a part or anywhere."""
    place = random.choice([PART_BYTES, QUICK_BYTES, len(body)]) + random.randrange(-200, 200)
    place = min(max(place, 0), len(body)) if random.random() < 0.7 else random.randrange(len(body))
    piece = random.choice(DAMAGE)
    added = bytes([piece]) if isinstance(piece, int) else piece
    return random.choice(
        [body[:place] + added + body[place:], body[:place] + body[place + 1 + len(added) :], body[:place]]
    )


def read(contract: Contract, arrays: Arrays, body: bytes, max_rows: int, is_long: bool) -> Any:
    """Return what a body is read as: an array or not, and its cells; or the error."""
    try:
        if is_long:
            long = LongBody(arrays, body, max_rows)
            X = long.decode()
            return long.encode(None) if X is None else np.asarray(X).tolist()
        rows, _ = read_rows(contract, body, max_rows)
        return np.asarray(arrays.of_rows(rows)).tolist() if rows else [b"[]"]
    except ServingError as error:
        return type(error), error.detail


def fit_contract(is_mixed: bool) -> Contract:
    frame = pd.DataFrame({"text": [*TRICKY] if is_mixed else np.arange(5.0), "number": np.arange(5.0)})
    columns = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["text"]), remainder="passthrough")
    estimator = make_pipeline(columns, LinearRegression()) if is_mixed else LinearRegression()
    return Contract(read_inputs(estimator.fit(frame, frame["number"])), {})


@pytest.mark.parametrize("is_mixed", [True, False], ids=["mixed", "numbers"])
def test_long_body_is_read_as_a_short_one(is_mixed: bool) -> None:
    """Whatever is wrong with a long body, and wherever, decoding it in parts gives the cells, or the error with its
    place, that decoding it whole gives."""
    random = Random(is_mixed)
    contract = fit_contract(is_mixed)
    arrays, texts = Arrays(contract), TRICKY if is_mixed else [1.5]
    seen: set[Any] = set()
    for number in range(scale(50, 400)):
        rows = [{"text": random.choice(texts), "number": random.choice([1, 2.5])} for _ in range(3000)]
        if number % 3 == 0:
            rows[random.randrange(3000)] = random.choice([{}, {"text": []}, {"text": "x", "number": "x", "colour": 2}])
        body = json.dumps(rows, separators=random.choice([(",", ":"), (", ", ": "), (" ,\n", " :")])).encode()
        for _ in range(number % 4 % 3):
            body = damage(random, body)
        max_rows = 2000 if number % 10 == 0 else 4000
        whole, parts = (read(contract, arrays, body, max_rows, is_long) for is_long in (False, True))
        assert parts == whole
        seen.add(whole[0] if isinstance(whole, tuple) else list)
    assert seen == {list, BadRequest, Unprocessable, ContentTooLarge}


def test_error_in_many_lines_costs_no_more_than_the_body() -> None:
    """The line in which a body is no JSON is found without a copy of each line."""
    body = b" \n" * 1_000_000 + b"x"
    tracemalloc.start()
    with pytest.raises(BadRequest, match=r"at line 1000001 column 1$"):
        parse_json(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * len(body)

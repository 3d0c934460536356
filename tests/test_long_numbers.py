"""Long arrays of numbers in JSON are decoded in parts, as if they were not."""

import asyncio
import itertools
import json
import tracemalloc
from typing import Any

import jiter
import numpy as np
import pytest

import app
from serving.errors import BadRequest
from serving.predictor.bodies import MAX_VALUES, PART_BYTES, QUICK_BYTES, count_values, parse_json
from serving.web.long_numbers import MARK, parse_long
from tests.lib.apps import call, call_asgi, make_settings
from tests.lib.cases import Case
from tests.lib.clients import Answer, post_case
from tests.lib.infer import CELLS, INFER, NAMES, binary, infer, tensor

N = PART_BYTES  # numbers of some bytes each
FLOATS = np.random.default_rng(0).normal(size=(N, 4)).tolist()
FLAT = [*itertools.chain.from_iterable(FLOATS)]


def body_of(data: Any, datatype: str = "FP64", shape: Any = None, **more: Any) -> bytes:
    shape = [len(data)] if shape is None else shape
    return json.dumps({"inputs": [tensor(shape=shape, datatype=datatype, data=data)], **more}).encode()


def edit(old: bytes, new: bytes, body: bytes = b"") -> bytes:
    """Return a long body, with its last such bytes replaced."""
    head, _, tail = (body or body_of(FLAT)).rpartition(old)
    return head + new + tail


REGULAR = {
    "flat": body_of(FLAT),
    "nested": body_of(FLOATS, shape=[N, 4]),
    "nested-by-one": body_of([[cell] for cell in FLAT], shape=[4 * N, 1]),
    "indented": json.dumps(json.loads(body_of(FLOATS, shape=[N, 4])), indent=2).encode(),
    "integers": body_of([*range(-N, N)], "INT64"),
    "integers-of-32-bits": body_of([*range(-N, N)], "INT32"),
    "integers-as-floats": body_of([*range(N)], "FP32"),
    "several": json.dumps(
        {"inputs": [tensor(shape=[4 * N], data=FLAT), tensor(data=[1]), tensor(shape=[4 * N], data=FLAT)]}
    ).encode(),
    "data-last": edit(b"]}", b'], "name":"x"}', body_of(FLAT)),
    "null": body_of([None, *FLAT]),
}
IRREGULAR = {
    "integers-of-which-one-is-a-float": body_of([*range(N), 2.0], "INT64"),
    "integers-of-which-one-is-null": body_of([*range(N), None], "INT64"),
    "integer-beyond-32-bits": body_of([*range(N), 2**31], "INT32"),
    "integer-beyond-64-bits": body_of([*range(N), 2**63], "INT64"),
    "integer-of-400-digits": body_of([*FLAT, 10**400]),
    "true": body_of([*FLAT, True]),
    "text": body_of([*FLAT, "x"]),
    "ragged": body_of([*FLOATS, [1, 2, 3]], shape=[N + 1, 4]),
    "other-width": body_of(FLOATS, shape=[N, 3]),
    "other-length": body_of(FLAT, shape=[4 * N + 1]),
    "no-shape": body_of(FLAT, shape={}),
    "no-datatype": body_of(FLAT, "FP16"),
    "half-nested": body_of([*FLOATS, 1], shape=[N, 4]),
    "in-a-number": json.dumps({"inputs": [1, {"data": FLAT}]}).encode(),
    "mark": body_of(FLAT, id=f"{MARK}0"),
    "trailing-comma": edit(b"]}", b",]}"),
    "two-commas": edit(b", ", b", , "),
    "two-numbers": edit(b", ", b" "),
    "bracket-in-between": edit(b", ", b"],["),
    "nan": body_of([*FLAT, float("nan")]),
    "half-a-null": edit(b", ", b", nul, "),
    "elements-left-out": edit(b"], [", b"],, [", body_of(FLOATS, shape=[N, 4])),
    "comma-left-out": edit(b"], [", b"] [", body_of(FLOATS, shape=[N, 4])),
}

DATA = "data should have texts, numbers, truths and null, or arrays of them, and no empty array"
REFUSED = {
    "nested-too-deep": (
        body_of([FLOATS], shape=[N, 4]),
        "data should have texts, numbers, truths and null, or arrays of them, and no empty array",
    ),
    "elsewhere": (
        body_of([1.0], outputs=[{"data": FLAT}]),
        "outputs has 262146 values; send at most 65536 besides the data of inputs",
    ),
    "in-no-list": (
        json.dumps({"inputs": {"data": FLAT}}).encode(),
        "inputs has 262145 values; send at most 65536 besides the data of inputs",
    ),
    "key-that-ends-so": (
        json.dumps({'x"data': FLAT, "inputs": []}).encode(),
        'x"data has 262145 values; send at most 65536 besides the data of inputs',
    ),
    "open": (edit(b"]}]}", b""), "the body is not JSON: an object in it does not end with '}'"),
    "bracket-too-many": (edit(b"]}", b"]]}"), "the body is not JSON: an object in it does not end with '}'"),
    "objects": (body_of([{}] * N), DATA),
    "objects-in-rows": (body_of([[{}] * 4] * N), DATA),
    "empty-rows": (body_of([[]] * N), DATA),
    "inputs-of-nothing": (b'{"inputs":[' + b"{}," * N + b"{}]}", "inputs has 65537 values; send at most 65536"),
    "array": (b"[" + b"{}," * N * 2 + b"{}]", "the body has 262146 values; send at most 65536"),
    "object-in-data": (body_of([{"": [0] * 2 * N}]), "an element of data has 131073 values; send at most 65536"),
    "array-in-inputs": (json.dumps({"inputs": [[{}] * 2 * N]}).encode(), "the body has 262144 values"),
    "many-keys": (json.dumps(dict.fromkeys(map(str, range(2 * N)))).encode(), "the body has 131072 values"),
}
LONG = {
    "texts": body_of(['a,b[{\\"'] * N, "BYTES"),
    "rows-of-texts": body_of([["a", None]] * N, "BYTES", [N, 2]),
    "one-row-of-texts": body_of([["a,"] * 2 * N], "BYTES", [1, 2 * N]),
    "long-texts": body_of(["," * 2 * N, "x" * 2 * N, ""], "BYTES"),
    "truths": body_of([True, False, None] * N, "BOOL"),
    "many-inputs": json.dumps(
        {"inputs": [tensor(name=str(at), shape=[99], data=[0.5] * 99) for at in range(2000)]}
    ).encode(),
    "parameters": body_of(["a"] * N, "BYTES", parameters=dict.fromkeys(map(str, range(9999)), "long")),
}


def outcome(parse: Any, body: bytes) -> Any:
    """Return what is parsed, numbers as lists, or the error."""
    try:
        payload = parse(body)
    except BadRequest as error:
        return error.detail
    inputs = payload["inputs"]
    for given in inputs if isinstance(inputs, list) else ():
        if isinstance(given, dict) and isinstance(given["data"], np.ndarray):
            given["data"] = given["data"].tolist()
    return payload


@pytest.mark.parametrize("name", REGULAR)
def test_numbers_become_arrays(name: str) -> None:
    """Long arrays of numbers are decoded to arrays of the same numbers, short ones as ever."""
    payload = parse_long(REGULAR[name])
    plain = parse_json(REGULAR[name])
    for given, expected in zip(payload["inputs"], plain["inputs"], strict=True):
        data = expected["data"]
        flat = [*itertools.chain.from_iterable(data)] if isinstance(data[0], list) else data
        if len(data) == 1:
            assert given["data"] == data
        else:
            np.testing.assert_array_equal(given["data"], np.array(flat, given["data"].dtype))
            assert given["data"].dtype == (np.int64 if given["datatype"].startswith("INT") else np.float64)


@pytest.mark.parametrize("name", IRREGULAR)
def test_all_else_is_decoded_as_ever(name: str) -> None:
    """Whatever is no such array, or not as it should be, comes out, or is refused, as by `parse_json`."""
    assert outcome(parse_long, IRREGULAR[name]) == outcome(parse_json, IRREGULAR[name])


@pytest.mark.parametrize("name", LONG)
def test_all_that_data_may_have_is_read_in_parts(decoded: list[bytes], name: str) -> None:
    """Texts, truths and short tensors come out as by `parse_json`, of which a part is decoded at once."""
    expected = parse_json(LONG[name])
    decoded.clear()
    assert outcome(parse_long, LONG[name]) == outcome(lambda body: expected, b"")
    assert max(len(b"".join(part.split())) for part in decoded) <= 2 * QUICK_BYTES  # but for white space


@pytest.mark.parametrize("name", REFUSED)
def test_many_values_that_are_no_data_are_refused(decoded: list[bytes], name: str) -> None:
    """What would take long to decode is not decoded at once, and its message says what is allowed."""
    body, message = REFUSED[name]
    with pytest.raises(BadRequest) as refused:
        parse_long(body)
    assert str(refused.value.detail).startswith(message)
    assert all(len(part) <= QUICK_BYTES or count_values(part) <= MAX_VALUES for part in decoded)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Each text that is decoded."""
    texts: list[bytes] = []
    decode = jiter.from_json
    monkeypatch.setattr(jiter, "from_json", lambda body, **options: texts.append(body) or decode(body, **options))
    return texts


def serve(framework: str) -> Any:
    return app.create_app(make_settings(framework=framework, limits={"max_rows": N}))


@pytest.mark.parametrize("form", ["flat", "nested", "binary"])
def test_long_request_is_decoded_beside_the_loop(framework: str, form: str) -> None:
    """While megabytes are decoded, others are answered in the same loop. A last cell that is bad is named."""
    asgi = app.as_asgi(serve(framework))
    X = np.abs(np.array(FLOATS))
    X[-1, 2] = np.nan
    cells = [None if np.isnan(cell) else cell for cell in X.ravel().tolist()]
    nested = [cells[start : start + 4] for start in range(0, len(cells), 4)]
    case = {
        "flat": lambda: infer("flat", body_of(cells, shape=[N, 4])),
        "nested": lambda: infer("nested", body_of(nested, shape=[N, 4])),
        "binary": lambda: binary("binary", X.tobytes(), shape=[N, 4]),
    }[form]()
    answer, n_pings = asyncio.run(ping_during(asgi, case))
    shown = '"NaN"' if form == "binary" else "null"
    problem = "finite" if form == "binary" else "valid"
    assert answer.json == {"error": f"row {N - 1}, 'petal_length': Input should be a {problem} number, not {shown}"}
    assert n_pings > 2


async def ping_during(asgi: Any, case: Case) -> tuple[Answer, int]:
    """Send a case, and return its answer and how many requests were answered until it came."""
    long = asyncio.create_task(call_asgi(asgi, case))
    n_pings = 0
    while not long.done():
        assert (await call_asgi(asgi, Case("ping", "GET", "/v2/health/live"))).status == 200
        await asyncio.sleep(0)
        n_pings += 1
    return await long, n_pings


def test_long_requests_are_answered_as_rows_are(framework: str) -> None:
    """Whether in JSON or in bytes, ten thousand rows have the answers of /predictions."""
    native = serve(framework)
    X = np.abs(np.array(FLOATS[:10_000]))
    rows = call(native, post_case([dict(zip(NAMES, row, strict=True)) for row in X.tolist()])).json
    for case in (infer("json", body_of(X.tolist(), shape=[*X.shape])), binary("b", X.tobytes(), shape=[*X.shape])):
        assert len(case.body) > 300_000
        assert call(native, case).json["outputs"][0]["data"] == [row["prediction"] for row in rows]


def test_binary_request_needs_no_object_for_each_number() -> None:
    """From the body to the answer the app needs a few arrays, a part of what as many floats would take."""
    native = serve("fastapi")
    n_rows = 40_000
    body = np.array(CELLS * n_rows).tobytes()
    asked = {"parameters": {"binary_data_output": True}, "outputs": [{"name": "probabilities"}]}
    case = binary("many", body, shape=[n_rows, 4], asked=asked)
    call(native, case)
    tracemalloc.start()
    answer = call(native, case)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answer.status == 200
    assert peak < 24 * 4 * n_rows + 3 * len(answer.body)  # as many floats have 24 bytes each, and a list 8 more


def test_json_is_refused_as_a_short_one_is() -> None:
    """A mistake in a long body has the message of `parse_json`, with its place."""
    answer = call(serve("flask"), infer("nan", IRREGULAR["nan"], path=INFER))
    assert answer.json["error"].startswith("the body is not JSON: expected value at line 1 column")
    assert answer.json["error"].endswith("; a value that is missing is null")

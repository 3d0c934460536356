"""Requests to /v2: good ones, and ones with mistakes of each kind, with what must come back."""

import json
import struct
from typing import Any

import numpy as np

from tests.lib.cases import Case, Fields

INFER = "/v2/models/iris/infer"
CELLS = [5.1, 3.5, 1.4, 0.2]
NAMES = ["sepal_length", "sepal_width", "petal_length", "petal_width"]
LENGTH = "Inference-Header-Content-Length"


def tensor(**changes: Any) -> dict[str, Any]:
    """Return a tensor of one flower, with changes; those that are None are left out."""
    whole = {"name": "flowers", "shape": [1, 4], "datatype": "FP64", "data": CELLS} | changes
    return {name: value for name, value in whole.items() if value is not None}


def column(name: str, cell: Any = 1.0, **changes: Any) -> dict[str, Any]:
    return tensor(name=name, shape=[1], data=[cell]) | changes


def columns(**changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a tensor for each feature of a flower, of which some have changes."""
    return [column(name, cell) | changes.get(name, {}) for name, cell in zip(NAMES, CELLS, strict=True)]


def infer(id: str, payload: Any, status: int = 200, says: str = "", path: str = INFER, headers: Fields = ()) -> Case:
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return Case(id, "POST", path, headers, body, status, says)


def one(id: str, status: int = 400, says: str = "", **changes: Any) -> Case:
    """Return a request with one tensor, which has changes."""
    return infer(id, {"inputs": [tensor(**changes)]}, status, says)


def binary(
    id: str, data: bytes, status: int = 200, says: str = "", length: int | str | None = None, **more: Any
) -> Case:
    """Return a request whose tensor follows its JSON; `length` lies about that of the JSON."""
    parameters = more.pop("parameters", {"binary_data_size": len(data)})
    asked = more.pop("asked", {})
    head = json.dumps({"inputs": [tensor(data=None, parameters=parameters, **more)], **asked}).encode()
    return infer(id, head + data, status, says, headers=((LENGTH, str(len(head) if length is None else length)),))


def texts(*cells: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(cell)) + cell for cell in cells)


ROW = np.array(CELLS).tobytes()
AS_FLOAT32 = np.array(CELLS, np.float32).tobytes()
WHOLE = np.array([5, 3, 1, 0], np.int32)
SETOSA = '{"name":"prediction","shape":[1],"datatype":"BYTES","data":["setosa"]}'
OTHERS = "'BOOL', 'INT32', 'INT64', 'FP32', 'FP64', 'BYTES'"

GOOD = [
    one("infer", 200, f'{{"model_name":"iris","outputs":[{SETOSA},{{"name":"probabilities","shape":[1,3]'),
    one("nested", 200, SETOSA, data=[CELLS]),
    one("float32", 200, SETOSA, datatype="FP32"),
    one("integers", 200, SETOSA, datatype="INT64", data=[5, 3, 1, 0]),
    one("integers-as-floats", 200, SETOSA, datatype="INT32", data=[5.0, 3.0, 1.0, 0.0]),
    one("named-as-a-feature", 200, SETOSA, name="petal_width"),
    one("parameters", 200, SETOSA, parameters={"anything": 1}),
    infer(
        "version",
        {"inputs": [tensor()]},
        200,
        '{"model_name":"iris","model_version":"1"',
        "/v2/models/iris/versions/1/infer",
    ),
    infer("id", {"id": 'a"\u00e9', "inputs": [tensor()]}, 200, '{"model_name":"iris","id":"a\\"\u00e9","outputs":['),
    infer("columns", {"inputs": columns()}, 200, SETOSA),
    infer("columns-in-another-order", {"inputs": columns()[::-1]}, 200, SETOSA),
    infer(
        "columns-of-two-dimensions", {"inputs": columns(petal_width={"shape": [1, 1], "data": [[0.2]]})}, 200, SETOSA
    ),
    infer(
        "columns-of-several-types", {"inputs": columns(sepal_length={"datatype": "INT32", "data": [5]})}, 200, SETOSA
    ),
    infer("outputs", {"inputs": [tensor()], "outputs": [{"name": "prediction"}]}, 200, f'"outputs":[{SETOSA}]}}'),
    infer(
        "outputs-in-another-order",
        {"inputs": [tensor()], "outputs": [{"name": "probabilities"}, {"name": "prediction"}]},
        200,
        f"]}},{SETOSA}]}}",
    ),
    infer("outputs-empty", {"inputs": [tensor()], "outputs": []}, 200, SETOSA),
    infer("unknown-fields", {"model_name": "other", "inputs": [tensor()], "parameters": {"priority": 1}}, 200, SETOSA),
    infer(
        "two-rows", {"inputs": [tensor(shape=[2, 4], data=[*CELLS, 6.7, 3.0, 5.2, 2.3])]}, 200, '["setosa","virginica"]'
    ),
    binary("binary", ROW, 200, SETOSA),
    binary("binary-float32", AS_FLOAT32, 200, SETOSA, datatype="FP32"),
    binary("binary-int32", WHOLE.tobytes(), 200, SETOSA, datatype="INT32"),
    binary("binary-int64", WHOLE.astype(np.int64).tobytes(), 200, SETOSA, datatype="INT64"),
    binary("binary-many", ROW * 400, 200, '"shape":[400,3]', shape=[400, 4]),
]

BAD = [
    infer("empty", b"", 400, "the body is empty; send a JSON object with 'inputs'"),
    infer("not-json", b"{", 400, "the body is not JSON"),
    infer(
        "nan",
        json.dumps({"inputs": [tensor(data=[5.1, 3.5, 1.4, float("nan")])]}).encode(),
        400,
        "a value that is missing is null",
    ),
    infer("duplicate-key", b'{"inputs":[],"inputs":[]}', 400, "uplicate key"),
    infer("array", [tensor()], 400, "the body is [{"),
    infer("rows", dict(zip(NAMES, CELLS, strict=True)), 400, "inputs is null; it should be an array"),
    infer("inputs-empty", {"inputs": []}, 400, "inputs is []"),
    infer("inputs-object", {"inputs": tensor()}, 400, "inputs is {"),
    infer("inputs-number", {"inputs": [1]}, 400, "inputs[0] is 1; it should be an object"),
    infer("id-number", {"id": 1, "inputs": [tensor()]}, 400, "id is 1; it should be a text"),
    infer(
        "parameters-array", {"inputs": [tensor()], "parameters": []}, 400, "parameters is []; it should be an object"
    ),
    infer(
        "binary-output-number",
        {"inputs": [tensor()], "parameters": {"binary_data_output": 1}},
        400,
        "binary_data_output is 1",
    ),
    one("no-name", says="inputs[0].name is null", name=None),
    one("name-number", says="inputs[0].name is 1; it should be a text", name=1),
    one("no-datatype", says=f"inputs[0].datatype is null; use one of {OTHERS}", datatype=None),
    one("datatype-fp16", says=f'inputs[0].datatype is \\"FP16\\"; use one of {OTHERS}', datatype="FP16"),
    one("datatype-lower", says=OTHERS, datatype="fp64"),
    one("datatype-array", says=OTHERS, datatype=["FP64"]),
    one("no-shape", says="inputs[0].shape is null", shape=None),
    one("shape-empty", says="inputs[0].shape is []", shape=[]),
    one("shape-number", says="inputs[0].shape is 4", shape=4),
    one("shape-of-three", says="one or two dimensions", shape=[1, 2, 2]),
    one("shape-negative", says="inputs[0].shape is [-1,4]; each dimension should be 1 or more", shape=[-1, 4]),
    one("shape-zero", says="inputs[0].shape is [0,4]", shape=[0, 4], data=[]),
    one("shape-float", says="inputs[0].shape is [1.0,4]", shape=[1.0, 4]),
    one("shape-true", says="inputs[0].shape is [true,4]", shape=[True, 4]),
    one("shape-text", says='inputs[0].shape is [\\"1\\",4]', shape=["1", 4]),
    one("shape-overflows", says="below 2\u2076\u00b3", shape=[2**63, 4]),
    one(
        "shape-product-overflows",
        says="data has 4 elements; its shape [4611686018427387904,4] has 18446744073709551616",
        shape=[2**62, 4],
    ),
    one("shape-of-400-digits", says="inputs[0].shape is [", shape=[10**400, 4]),
    one("shape-too-long", says="data has 4 elements; its shape [2,4] has 8", shape=[2, 4]),
    one("shape-too-short", says="data has 8 elements; its shape [1,4] has 4", data=CELLS * 2),
    one("shape-flat", says="which is no feature; send one tensor [n, 4]", shape=[4]),
    one("shape-wide", says="which is no feature; send one tensor [n, 4]", shape=[1, 5], data=[*CELLS, 1]),
    one("shape-narrow", says="which is no feature", shape=[2, 2]),
    one("no-data", says="inputs[0].data is null; it should be an array", data=None),
    one("data-number", says="inputs[0].data is 1", data=1),
    one("data-object", says="inputs[0].data is {", data={"0": 1}),
    one("data-ragged", says="another nesting than its shape [2,4]", shape=[2, 4], data=[CELLS, CELLS[:3]]),
    one("data-half-nested", says="another nesting", shape=[2, 4], data=[CELLS, 1]),
    one("data-nested-too-deep", says="no FP64", data=[[CELLS, 1, 2, 3]]),
    one("data-nested-otherwise", says="another nesting", data=[[cell] for cell in CELLS]),
    one("data-text", says='inputs[0].data has \\"x\\" at 1, which is no FP64', data=[1, "x", 1, 1]),
    one("data-true", says="inputs[0].data has true at 0, which is no FP64", data=[True, 1, 1, 1]),
    one(
        "data-half-for-int",
        says="inputs[0].data has 2.5 at 1, which is no INT64",
        datatype="INT64",
        data=[1, 2.5, 1, 1],
    ),
    one("data-beyond-int32", says="which is no INT32", datatype="INT32", data=[1, 2**31, 1, 1]),
    one("data-beyond-int64", says="which is no INT64", datatype="INT64", data=[1, 2**63, 1, 1]),
    one("data-infinite-int", says="which is no INT64", datatype="INT64", data=[1, 1e308, 1, 1]),
    one("data-number-for-bool", says="inputs[0].data has 1 at 0, which is no BOOL", datatype="BOOL", data=[1, 0, 1, 1]),
    one("data-number-for-text", says="which is no BYTES", datatype="BYTES", data=[1, 0, 1, 1]),
    one("null", 422, "row 0, 'sepal_width': Input should be a valid number, not null", data=[1, None, 1, 1]),
    one(
        "truths",
        422,
        "row 0, 'sepal_length': Input should be a valid number, not true",
        datatype="BOOL",
        data=[True] * 4,
    ),
    one("texts", 422, "and 1 more", datatype="BYTES", data=["x"] * 4),
    one("beyond-float32", 422, "less than or equal to 3402823466385", data=[1, 3.5e38, 1, 1]),
    one("of-400-digits", 422, "valid number", data=[1, 10**400, 1, 1]),
    one("second-row", 422, "row 1, 'petal_width'", shape=[2, 4], data=[*CELLS, 1, 1, 1, None]),
    one(
        "far-row",
        422,
        "row 999, 'petal_width': Input should be a valid number, not null",
        shape=[1000, 4],
        data=[*CELLS * 999, 1, 1, 1, None],
    ),
    one(
        "far-row-of-400-digits",
        422,
        "row 999, 'petal_width': Input should be a valid number",
        shape=[1000, 4],
        data=[*CELLS * 999, 1, 1, 1, 10**400],
    ),
    one(
        "shared-memory", says="shared_memory_region is not offered", data=None, parameters={"shared_memory_region": "x"}
    ),
    one("parameters-text", says="inputs[0].parameters is", parameters="x"),
    one("too-many-rows", 413, "the body has 10001 rows; send at most 10000 rows", shape=[10_001, 4], data=[1] * 40_004),
    infer("column-missing", {"inputs": columns()[:3]}, 400, "inputs lack 'petal_width'"),
    infer("column-unknown", {"inputs": [*columns()[:3], column("petal_widht")]}, 400, "did you mean 'petal_width'?"),
    infer(
        "column-twice",
        {"inputs": [*columns(), column("petal_width")]},
        400,
        "inputs[4].name is 'petal_width', which an input before it has",
    ),
    infer(
        "column-of-more-rows",
        {"inputs": columns(petal_width={"shape": [2], "data": [1, 2]})},
        400,
        "inputs[3] has 2 rows; inputs[0] has 1",
    ),
    infer(
        "column-wide",
        {"inputs": columns(petal_width={"shape": [1, 2], "data": [1, 2]})},
        400,
        "it should be [n] or [n, 1]",
    ),
    infer("column-beside-matrix", {"inputs": [tensor(), column("petal_width")]}, 400, "which is no feature"),
    infer(
        "column-text",
        {"inputs": columns(petal_width={"datatype": "BYTES", "data": ["0.2"]})},
        422,
        "row 0, 'petal_width'",
    ),
    infer(
        "output-unknown",
        {"inputs": [tensor()], "outputs": [{"name": "label"}]},
        400,
        "outputs[0].name is 'label'; use one of 'prediction', 'probabilities'",
    ),
    infer("output-text", {"inputs": [tensor()], "outputs": ["prediction"]}, 400, "outputs[0] is"),
    infer("outputs-object", {"inputs": [tensor()], "outputs": {"name": "prediction"}}, 400, "outputs is {"),
    infer(
        "output-twice",
        {"inputs": [tensor()], "outputs": [{"name": "prediction"}] * 2},
        400,
        "outputs[1].name is 'prediction', which one before it has",
    ),
    infer(
        "output-binary-text",
        {"inputs": [tensor()], "outputs": [{"name": "prediction", "parameters": {"binary_data": "yes"}}]},
        400,
        "binary_data is",
    ),
    infer(
        "output-classification",
        {"inputs": [tensor()], "outputs": [{"name": "prediction", "parameters": {"classification": 1}}]},
        400,
        "classification is not offered",
    ),
    infer(
        "output-shared-memory",
        {"inputs": [tensor()], "outputs": [{"name": "prediction", "parameters": {"shared_memory_region": "x"}}]},
        400,
        "shared_memory_region is not offered",
    ),
    binary("length-text", ROW, 400, f"{LENGTH} is 'x'; it should be a number of bytes", length="x"),
    binary("length-negative", ROW, 400, f"{LENGTH} is '-1'", length=-1),
    binary("length-of-30-digits", ROW, 400, f"{LENGTH} is '", length="9" * 30),
    binary("length-beyond-the-body", ROW, 400, f"{LENGTH} is 1000; the body has", length=1000),
    binary("length-zero", ROW, 400, f"{LENGTH} is 0; send JSON", length=0),
    binary("length-too-short", ROW, 400, "the body is not JSON", length=20),
    binary("length-too-long", ROW, 400, "the body is not JSON", length=130),
    binary(
        "size-too-large", ROW, 400, "binary_data_size is 64; 32 bytes are left", parameters={"binary_data_size": 64}
    ),
    binary(
        "size-too-small",
        ROW,
        400,
        "binary_data_size is 16; 4 elements of FP64 have 32 bytes",
        parameters={"binary_data_size": 16},
    ),
    binary("size-negative", ROW, 400, "binary_data_size is -1", parameters={"binary_data_size": -1}),
    binary("size-text", ROW, 400, 'binary_data_size is \\"32\\"', parameters={"binary_data_size": "32"}),
    binary("size-true", ROW, 400, "binary_data_size is true", parameters={"binary_data_size": True}),
    binary(
        "bytes-left-over",
        ROW + b"x",
        400,
        "33 bytes follow the JSON; the inputs' parameters.binary_data_size add up to 32",
        parameters={"binary_data_size": 32},
    ),
    binary("bytes-of-nothing", b"", 400, "binary_data_size is 0; 4 elements", parameters={"binary_data_size": 0}),
    binary("bytes-and-data", ROW, 400, "bytes follow the JSON", parameters={}, asked={"inputs": [tensor()]}),
    infer(
        "data-and-size",
        {"inputs": [tensor(parameters={"binary_data_size": 32})]},
        400,
        "inputs[0] has data and parameters.binary_data_size",
    ),
    binary(
        "shape-that-lies", ROW, 400, "binary_data_size is 32; 4611686018427387904 elements of FP64", shape=[2**60, 4]
    ),
    binary("truth-of-two", b"\1\0\1\2", 400, "inputs[0] has the byte 2; a BOOL is 0 or 1", datatype="BOOL"),
    binary(
        "nan-in-bytes",
        np.array([1, np.nan, 1, 1]).tobytes(),
        422,
        "row 0, 'sepal_width': Input should be a finite number, not \\\"NaN\\\"",
    ),
    binary(
        "infinity-in-bytes",
        np.array([1, 1, 1, np.inf]).tobytes(),
        422,
        "row 0, 'petal_width': Input should be a finite number",
    ),
    binary(
        "nan-far-behind",
        np.array([1, 1, 1, 1] * 999 + [1, np.nan, 1, 1]).tobytes(),
        422,
        "row 999, 'sepal_width'",
        shape=[1000, 4],
    ),
    binary(
        "texts-in-bytes",
        texts(b"a", b"b", b"c", b"d"),
        422,
        "row 0, 'sepal_length': Input should be a valid number",
        datatype="BYTES",
    ),
    binary(
        "texts-cut",
        texts(b"a", b"b", b"c", b"dd")[:-1],
        400,
        "inputs[0] has element 3 with a length of 2 bytes; 1 bytes are left",
        datatype="BYTES",
    ),
    binary(
        "texts-length-lies",
        texts(b"a", b"b", b"c") + b"\xff\xff\xff\xff",
        400,
        "a length of 4294967295 bytes; 0 bytes are left",
        datatype="BYTES",
    ),
    binary("texts-too-few", texts(b"abcdefgh", b"b", b"c"), 400, "which end before element 3 of 4", datatype="BYTES"),
    binary("texts-too-many", texts(b"a", b"b", b"c", b"d", b"e"), 400, "its 4 elements end at 20", datatype="BYTES"),
    binary(
        "texts-not-utf-8", texts(b"a", b"b", b"c", b"\xff"), 400, "has element 3, which is not UTF-8", datatype="BYTES"
    ),
    binary("texts-without-room", b"\0" * 8, 400, "4 elements of BYTES have 4 bytes each", datatype="BYTES"),
    infer(
        "text-plain",
        {"inputs": [tensor()]},
        415,
        "Content-Type is 'text/plain'",
        headers=(("Content-Type", "text/plain"),),
    ),
    infer(
        "another-model", {"inputs": [tensor()]}, 404, "did you mean '/v2/models/iris/infer'?", "/v2/models/irs/infer"
    ),
    infer(
        "another-version",
        {"inputs": [tensor()]},
        404,
        "did you mean '/v2/models/iris/versions/1/infer'?",
        "/v2/models/iris/versions/2/infer",
    ),
    infer("post-to-metadata", {"inputs": [tensor()]}, 405, "use one of GET, HEAD, OPTIONS", "/v2/models/iris"),
    Case("get-infer", "GET", INFER, (), b"", 405, "use one of POST, OPTIONS"),
    Case("v2-unknown", "GET", "/v2/nothing", (), b"", 404, "there is no '/v2/nothing'"),
    Case("v2-slash", "GET", "/v2/", (), b"", 404, "there is no '/v2/'"),
    Case("cut-short", "POST", INFER, (), b'{"inputs"', 400, "ended early", cut=True),
    Case("too-large", "POST", INFER, (("Content-Length", "9000000"),), b"", 413, "send at most 8388608 bytes"),
]

"""The table of requests in the clouds' envelopes: what is sent, and what must come back, whoever answers."""

import json
from typing import Any

from tests.lib.cases import FLOWER, JSON, Case, Fields

CSV: Fields = (("Content-Type", "text/csv"),)
ROW: dict[str, float] = json.loads(FLOWER)
NAMES, VALUES = [*ROW], [*ROW.values()]
COLUMNS = {name: [value, value] for name, value in ROW.items()}
HEADER, LINE = ",".join(NAMES), ",".join(map(str, VALUES))
PREDICT_V1 = "/v1/models/iris:predict"
ONE, TWO = '{"predictions":["setosa"]}', '{"predictions":["setosa","setosa"]}'
N_LONG = 4000  # rows of a body that is decoded in parts
NONE_OF_THEM = (
    "Send a row, or rows under one of 'instances', 'dataframe_records', 'dataframe_split', 'inputs', 'input_data'"
)


def split(data: Any, columns: Any = NAMES, **more: Any) -> dict[str, Any]:
    return {"columns": columns, "data": data, **more}


def body_case(
    id: str, payload: Any, status: int = 200, says: str = "", path: str = "/invocations", headers: Fields = JSON
) -> Case:
    """A payload, or a text that is sent as it is."""
    text = payload if isinstance(payload, str) else json.dumps(payload)
    return Case(f"cloud-{id}", "POST", path, headers, text.encode(), status, says)


def csv_case(id: str, text: str | bytes, status: int = 200, says: str = "", headers: Fields = CSV) -> Case:
    body = text if isinstance(text, bytes) else text.encode()
    return Case(f"csv-{id}", "POST", "/invocations", headers, body, status, says)


def without(name: str) -> dict[str, float]:
    return {key: value for key, value in ROW.items() if key != name}


CLOUD_GOOD = [
    body_case("instances", {"instances": [ROW, ROW]}, says=TWO),
    body_case("lists", {"instances": [VALUES]}, says=ONE),
    body_case("objects-and-lists", {"instances": [VALUES, ROW]}, says=TWO),
    body_case("records", {"dataframe_records": [ROW]}, says=ONE),
    body_case("split", {"dataframe_split": split([VALUES, VALUES])}, says=TWO),
    body_case("split-in-another-order", {"dataframe_split": split([VALUES[::-1]], NAMES[::-1], index=[7])}, says=ONE),
    body_case("inputs-by-column", {"inputs": COLUMNS}, says=TWO),
    body_case("inputs-as-lists", {"inputs": [VALUES]}, says=ONE),
    body_case("inputs-as-objects", {"inputs": [ROW]}, says=ONE),
    body_case("input-data-split", {"input_data": split([VALUES], index=[0])}, says=ONE),
    body_case("input-data-lists", {"input_data": [VALUES]}, says=ONE),
    body_case("input-data-by-column", {"input_data": COLUMNS}, says=TWO),
    body_case("bare-row", ROW, says=ONE),
    body_case("bare-rows", [ROW, ROW], says=TWO),
    body_case("no-instances", {"instances": []}, says='{"predictions":[]}'),
    body_case("no-data", {"dataframe_split": split([])}, says='{"predictions":[]}'),
    body_case("full", {"instances": [ROW], "parameters": {"full": True}}, says='[{"prediction":"setosa","prob'),
    body_case("full-by-params", {"inputs": [ROW], "params": {"full": True}}, says='[{"prediction":"setosa","prob'),
    body_case("not-full", {"instances": [ROW], "parameters": {"full": False}}, says=ONE),
    body_case("null-parameters", {"parameters": None, "instances": [ROW]}, says=ONE),
    body_case("signature-name", {"signature_name": "serving_default", "instances": [ROW]}, says=ONE),
    body_case("white-space", f' \n{{ "instances" :\t[ {FLOWER} ] }} \r\n', says=ONE),
    body_case("escaped-key", f'{{"inst\\u0061nces": [{FLOWER}]}}', says=ONE),
    body_case("kserve-v1", {"instances": [VALUES, VALUES]}, says=TWO, path=PREDICT_V1),
    body_case("mlflow-format", ROW, says=ONE, headers=(("Content-Type", "application/json; format=pandas-records"),)),
    body_case("long-instances", {"instances": [ROW] * N_LONG}, says=',"setosa"]}'),
    body_case("long-lists", {"parameters": {"full": True}, "instances": [VALUES] * N_LONG}, says=',{"prediction":"set'),
    body_case("long-records", {"dataframe_records": [ROW] * N_LONG}, says=',"setosa"]}'),
    body_case("long-split", {"dataframe_split": split([VALUES] * N_LONG, index=[*range(N_LONG)])}, says=',"setosa"]}'),
    body_case("long-columns", {"inputs": {name: [x] * N_LONG for name, x in ROW.items()}}, says=',"setosa"]}'),
    body_case("long-bare-rows", [ROW] * N_LONG, says=',"setosa"]}'),
    csv_case("one-line", f"{HEADER}\n{LINE}\n", says=ONE),
    csv_case("without-last-line-end", f"{HEADER}\r\n{LINE}\r\n{LINE}", says=TWO),
    csv_case("in-another-order", f"{','.join(NAMES[::-1])}\n{','.join(map(str, VALUES[::-1]))}", says=ONE),
    csv_case("quoted", '"' + HEADER.replace(",", '","') + '"\n"' + LINE.replace(",", '","') + '"', says=ONE),
    csv_case("empty-lines", f"\n{HEADER}\n\n{LINE}\n\n", says=ONE),
    csv_case("byte-order-mark", b"\xef\xbb\xbf" + f"{HEADER}\n{LINE}".encode(), says=ONE),
    csv_case("header-alone", f"{HEADER}\n", says='{"predictions":[]}'),
    csv_case("parameters", f"{HEADER}\n{LINE}", says=ONE, headers=(("Content-Type", "Text/CSV; charset=utf-8"),)),
    csv_case("long", f"{HEADER}\n" + f"{LINE}\n" * 10_000, says=',"setosa"]}'),
    Case("model-v1", "GET", "/v1/models/iris", says='{"name":"iris","ready":true}'),
    Case("models-v1", "GET", "/v1/models", says='{"models":["iris"]}'),
]

CLOUD_BAD = [
    body_case("empty", "", 400, "the body is empty"),
    body_case("not-json", "instances", 400, "the body is not JSON"),
    body_case("open", '{"instances": [[5.1', 400, "EOF while parsing a list at line 1 column 19"),
    body_case("nan", '{"instances": [[NaN, 1, 2, 3]]}', 400, "; a value that is missing is null"),
    body_case("key-twice", '{"instances": [], "instances": []}', 400, "duplicate key"),
    body_case("null", "null", 422, "Input should be an object or an array of objects"),
    body_case("number", "1", 422, "Input should be an object or an array of objects"),
    body_case("empty-object", {}, 422, NONE_OF_THEM),
    body_case("parameters-alone", {"parameters": {"full": True}}, 422, NONE_OF_THEM),
    body_case("misspelt-key", {"instance": [ROW]}, 422, '"loc":["body","instance"],"msg":"Unknown key; did you mean'),
    body_case("unknown-key", {"rows": [ROW]}, 422, "Unknown key; use one of 'instances', 'dataframe_records'"),
    body_case("key-beside", {"instances": [ROW], "id": "1"}, 422, '"loc":["body","id"],"msg":"Unknown key; use one of'),
    body_case(
        "instances-and-inputs", {"instances": [ROW], "inputs": [ROW]}, 422, "once, as 'instances' or as 'inputs'"
    ),
    body_case("instances-of-one", {"instances": ROW}, 422, '["body","instances"],"msg":"Input should be an array of'),
    body_case("instances-of-null", {"instances": None}, 422, '["body","instances"],"msg":"Input should be an array'),
    body_case("instances-of-text", {"instances": "setosa"}, 422, "Input should be an array of rows"),
    body_case("values-alone", {"instances": VALUES}, 422, '["body","instances",0],"msg":"Input should be an object or'),
    body_case("nulls", {"instances": [None]}, 422, "Input should be an object or an array of 4 values"),
    body_case("nested-lists", {"instances": [[VALUES]]}, 422, "Row should have 4 values, not 1"),
    body_case(
        "short-list", {"instances": [VALUES, VALUES[:3]]}, 422, '"type":"too_short","loc":["body","instances",1]'
    ),
    body_case("long-list", {"inputs": [[*VALUES, 1]]}, 422, '"type":"too_long","loc":["body","inputs",0]'),
    body_case("text-in-list", {"instances": [[*VALUES[:3], "0.2"]]}, 422, '["body","instances",0,"petal_width"]'),
    body_case("true-in-list", {"instances": [[True, *VALUES[1:]]]}, 422, '["body","instances",0,"sepal_length"]'),
    body_case("overflow", {"instances": [[3.5e38, *VALUES[1:]]]}, 422, "less than or equal to 3402823466385"),
    body_case("bad-cell-in-row-3", {"instances": [ROW] * 3 + [ROW | {"petal_width": None}]}, 422, '"instances",3,"pet'),
    body_case("unknown-feature", {"instances": [ROW | {"colour": 1}]}, 422, '["body","instances",0,"colour"]'),
    body_case(
        "missing-feature", {"dataframe_records": [without("petal_width")]}, 422, '["body","dataframe_records",0,"p'
    ),
    body_case(
        "records-of-lists", {"dataframe_records": [VALUES]}, 422, '"dataframe_records",0],"msg":"Input should be an ob'
    ),
    body_case("records-by-column", {"dataframe_records": COLUMNS}, 422, "Input should be an array of rows"),
    body_case("split-of-rows", {"dataframe_split": [ROW]}, 422, "Input should be an object with 'columns' and 'data'"),
    body_case("split-without-data", {"dataframe_split": {"columns": NAMES}}, 422, '["body","dataframe_split","data"]'),
    body_case(
        "split-without-columns", {"dataframe_split": {"data": [VALUES]}}, 422, '"dataframe_split","columns"],"msg'
    ),
    body_case("split-unknown-key", {"dataframe_split": split([VALUES], name="x")}, 422, 'dataframe_split","name"]'),
    body_case(
        "split-unknown-column",
        {"dataframe_split": split([VALUES], [*NAMES[:3], "petal_widht"])},
        422,
        '"columns",3],"msg":"Unknown feature; did you mean \'petal_width\'?"',
    ),
    body_case(
        "split-repeated-column",
        {"dataframe_split": split([VALUES], [*NAMES[:3], NAMES[0]])},
        422,
        '"columns",0],"msg":"Give this column once"',
    ),
    body_case(
        "split-missing-column",
        {"dataframe_split": split([VALUES[:3]], NAMES[:3])},
        422,
        '"columns","petal_width"],"msg":"Field required"',
    ),
    body_case(
        "split-numbered-columns",
        {"dataframe_split": split([VALUES], [0, 1, 2, 3])},
        422,
        "Input should be the name of a feature",
    ),
    body_case(
        "split-columns-text",
        {"dataframe_split": split([VALUES], "abcd")},
        422,
        '"columns"],"msg":"Input should be an array"',
    ),
    body_case(
        "split-data-object", {"dataframe_split": split(COLUMNS)}, 422, '"data"],"msg":"Input should be an array"'
    ),
    body_case(
        "split-ragged", {"dataframe_split": split([VALUES, VALUES[:2]])}, 422, '["body","dataframe_split","data",1]'
    ),
    body_case(
        "split-of-objects",
        {"dataframe_split": split([ROW])},
        422,
        '"data",0],"msg":"Input should be an array of 4 values"',
    ),
    body_case(
        "split-bad-cell", {"dataframe_split": split([VALUES, [*VALUES[:3], "x"]])}, 422, '"data",1,"petal_width"]'
    ),
    body_case(
        "columns-unequal",
        {"inputs": COLUMNS | {"petal_width": [0.2]}},
        422,
        "Column has 1 values; 'sepal_length' has 2",
    ),
    body_case("columns-unknown", {"inputs": COLUMNS | {"colour": [1, 2]}}, 422, '["body","inputs","colour"]'),
    body_case(
        "columns-missing", {"inputs": without("petal_width")}, 422, '["body","inputs","petal_width"],"msg":"Field'
    ),
    body_case(
        "columns-of-values", {"inputs": ROW}, 422, '["body","inputs","sepal_length"],"msg":"Input should be an arr'
    ),
    body_case(
        "columns-bad-cell", {"inputs": COLUMNS | {"petal_width": [0.2, "x"]}}, 422, '["body","inputs","petal_width",1]'
    ),
    body_case("input-data-null", {"input_data": None}, 422, "an array of rows or an object with 'columns' and 'data'"),
    body_case(
        "input-data-ragged", {"input_data": split([VALUES[:1]], index=[0])}, 422, '["body","input_data","data",0]'
    ),
    body_case(
        "full-not-bool",
        {"instances": [ROW], "parameters": {"full": "yes"}},
        422,
        '"parameters","full"],"msg":"Input should be true or false"',
    ),
    body_case(
        "unknown-parameter", {"instances": [ROW], "parameters": {"top_k": 1}}, 422, "Unknown parameter; use 'full'"
    ),
    body_case(
        "parameters-list", {"instances": [ROW], "params": []}, 422, '["body","params"],"msg":"Input should be an object'
    ),
    body_case("signature-number", {"instances": [ROW], "signature_name": 1}, 422, '["body","signature_name"]'),
    body_case("bare-bad-cell", [ROW | {"petal_width": "x"}], 422, '["body",0,"petal_width"]'),
    body_case("bare-misspelt", ROW | {"petal_widht": 1}, 422, "did you mean 'petal_width'?"),
    body_case("bare-lists", [VALUES], 422, '["body",0],"msg":"Input should be an object'),
    body_case(
        "too-many-rows", {"instances": [VALUES] * 10_001}, 413, "the body has 10001 rows; send at most 10000 rows"
    ),
    body_case("too-many-records", {"dataframe_records": [ROW] * 10_001}, 413, "10001 rows"),
    body_case("too-many-lines-of-a-frame", {"dataframe_split": split([[1]] * 10_001)}, 413, "10001 rows"),
    body_case("too-many-cells", {"inputs": {name: [1] * 10_001 for name in NAMES}}, 413, "10001 rows"),
    body_case("too-many-bare-rows", [{}] * 10_001, 413, "10001 rows"),
    body_case(
        "long-and-open", json.dumps({"instances": [VALUES] * N_LONG})[:-5], 400, "EOF while parsing a list at line 1"
    ),
    body_case(
        "long-and-more",
        json.dumps({"instances": [VALUES] * N_LONG}) + "}",
        400,
        "trailing characters at line 1 column 880",
    ),
    body_case("long-twice", f'{{"instances": {[VALUES] * N_LONG}, "instances": []}}', 400, "duplicate key"),
    body_case(
        "long-nan", f'{{"a": 1,\n"instances": {[VALUES] * N_LONG}, "b": NaN}}', 400, "at line 2 column 88021; a value"
    ),
    body_case("long-bad-row", {"instances": [VALUES] * N_LONG + [VALUES[:3]]}, 422, f'["body","instances",{N_LONG}]'),
    body_case(
        "long-bad-cell",
        {"dataframe_split": split([VALUES] * N_LONG + [[*VALUES[:3], "x"]])},
        422,
        f'"data",{N_LONG},"petal_width"]',
    ),
    body_case(
        "long-bad-object", {"instances": [ROW] * N_LONG + [ROW | {"x": 1}]}, 422, f'["body","instances",{N_LONG},"x"]'
    ),
    body_case("long-key-beside", {"instances": [VALUES] * N_LONG, "x": 1}, 422, '["body","x"],"msg":"Unknown key'),
    body_case("long-text", {"instances": "x" * 100_000}, 422, "Input should be an array of rows"),
    body_case("long-object", {"instances": {"x": "x" * 100_000}}, 422, "Input should be an array of rows"),
    body_case("long-row", {"a": [0] * 100_000}, 422, "it has 100000 values inside"),
    body_case("long-nested", f'{{"instances": [[{"[]," * 100_000}[]]]}}', 422, '["body","instances",0]'),
    body_case("too-large", " " * 8_388_609, 413, "the body is 8388609 bytes"),
    *[
        body_case(f"long-list-{text}", f'{{"instances": [{f"{VALUES}," * N_LONG}[1,1,1,{text}]]}}', 422, place)
        for place in [f'["body","instances",{N_LONG},"petal_width"]']
        for text in ("true", "null", '"1"', "1e999", "3.5e38", "[1]", "9" * 400)
    ],
    *[
        body_case(
            f"long-column-{text}",
            f'{{"inputs": {json.dumps({name: [1.0] * N_LONG for name in NAMES[:3]})[:-1]}, '
            f'"petal_width": [{"1," * (N_LONG - 1)}{text}]}}}}',
            422,
            f'["body","inputs","petal_width",{N_LONG - 1}]',
        )
        for text in ("true", "null", '"1"', "1e999", "3.5e38", "[1]", "9" * 400)
    ],
    *[
        csv_case(
            f"long-{text}", f"{HEADER}\n" + f"{LINE}\n" * N_LONG + f"1,1,1,{text}", 422, f'["body",{N_LONG + 2},"p'
        )
        for text in ("1e999", "3.5e38", "-", "1e", "1.2.3", "", "nan", "0x1")
    ],
    csv_case(
        "long-short-line", f"{HEADER}\n" + f"{LINE}\n" * N_LONG + "1,1,1", 422, f'["body",{N_LONG + 2}],"msg":"Line'
    ),
    csv_case(
        "long-lines-all-short", f"{HEADER}\n" + "1,1,1\n" * N_LONG * 2, 422, '["body",2],"msg":"Line should have 4'
    ),
    csv_case(
        "long-missing-column", f"{','.join(NAMES[:3])}\n" + "1,1,1\n" * N_LONG * 2, 422, '["body",1,"petal_width"]'
    ),
    csv_case("long-repeated-column", f"{HEADER},petal_width\n" + f"{LINE},1\n" * N_LONG, 422, "Give this column once"),
    csv_case("long-too-many", f"{HEADER}\n" + "1,1,1,1\n" * 10_001, 413, "the body has 10001 rows"),
    body_case("many-columns", json.dumps({"inputs": {f"a{n}": [] for n in range(80_000)}}), 422, '["body","inputs"]'),
    csv_case("wide", "a," * 80_000, 422, "Line should have 4 cells, not 80001"),
    csv_case("empty", "", 400, "the body is empty; send a line with the features' names"),
    csv_case("line-ends-alone", "\n\n", 400, "the body is empty"),
    csv_case("no-header", f"{LINE}\n{LINE}", 422, '["body",1],"msg":"The first line should name the features: \'sepal'),
    csv_case("unknown-column", f"{HEADER},colour\n{LINE},1", 422, '["body",1,"colour"],"msg":"Unknown feature'),
    csv_case(
        "misspelt-column", f"{HEADER}\n{LINE}".replace("petal_width", "petal_widht"), 422, "did you mean 'petal_width'?"
    ),
    csv_case("repeated-column", f"{HEADER},petal_width\n{LINE},1", 422, "Give this column once"),
    csv_case("missing-column", "sepal_length\n5.1", 422, '["body",1,"petal_width"],"msg":"Field required"'),
    csv_case(
        "blanks-in-header", f"{HEADER.replace(',', ', ')}\n{LINE}", 422, '["body",1," petal_width"],"msg":"Unknown'
    ),
    csv_case("short-line", f"{HEADER}\n{LINE}\n5.1,3.5\n", 422, '["body",3],"msg":"Line should have 4 cells, not 2'),
    csv_case("long-line", f"{HEADER}\n{LINE},9\n", 422, '["body",2],"msg":"Line should have 4 cells, not 5'),
    csv_case("semicolons", f"{HEADER}\n{LINE}".replace(",", ";"), 422, "The first line should name the features"),
    csv_case(
        "text", f"{HEADER}\n{LINE}\n\n5.1,3.5,1.4,wide", 422, '["body",4,"petal_width"],"msg":"Input should be a valid'
    ),
    csv_case("empty-cell", f"{HEADER}\n5.1,3.5,1.4,", 422, '["body",2,"petal_width"]'),
    csv_case("nan", f"{HEADER}\n5.1,3.5,1.4,nan", 422, "Input should be a finite number"),
    csv_case("open-quote", f'{HEADER}\n5.1,3.5,1.4,"0.2', 400, "the body is not CSV: unexpected end of data in line 2"),
    csv_case("text-after-quote", f'{HEADER}\n5.1,3.5,1.4,"0"2', 400, "the body is not CSV"),
    csv_case("latin-1", f"{HEADER}\n{LINE}\xe9".encode("latin-1"), 400, "the body is not CSV: encode it as UTF-8"),
    csv_case("utf-16", f"{HEADER}\n{LINE}".encode("utf-16"), 400, "the body is not CSV: encode it as UTF-8"),
    csv_case("json", json.dumps({"instances": [ROW]}), 422, "The first line should name the features"),
    csv_case("long-cell", f"{HEADER}\n{'9' * 200_000}", 400, "the body is not CSV: field larger than field limit"),
    csv_case("too-many-lines", f"{HEADER}\n" + "\n".join([LINE] * 10_001), 413, "the body has 10001 rows"),
    csv_case("long-bad-cell", f"{HEADER}\n" + f"{LINE}\n" * 9_000 + "a,b,c,d", 422, '["body",9002,"sepal_length"]'),
    csv_case("latin-1-charset", HEADER, 415, "in UTF-8", (("Content-Type", "text/csv; charset=latin-1"),)),
    body_case(
        "text-plain", "x", 415, "use 'application/json' or 'text/csv'", headers=(("Content-Type", "text/plain"),)
    ),
    body_case(
        "recordio",
        "x",
        415,
        "use 'application/json' or",
        headers=(("Content-Type", "application/x-recordio-protobuf"),),
    ),
    body_case("gzip", "x", 400, "the body ends inside its gzip", headers=(*JSON, ("Content-Encoding", "gzip"))),
    body_case(
        "another-model", {"instances": [ROW]}, 404, "did you mean '/v1/models/iris:predict'?", "/v1/models/irs:predict"
    ),
    body_case(
        "another-verb", {"instances": [ROW]}, 404, "there is no '/v1/models/iris:explain'", "/v1/models/iris:explain"
    ),
    body_case("trailing-slash", {"instances": [ROW]}, 404, "did you mean '/invocations'?", "/invocations/"),
    Case("another-model-v1", "GET", "/v1/models/irsi", status=404, says="did you mean '/v1/models/iris'?"),
    Case("get-invocations", "GET", "/invocations", status=405, says="use one of POST, OPTIONS"),
    Case("post-model-v1", "POST", "/v1/models/iris", JSON, b"{}", 405, "use one of GET, HEAD, OPTIONS"),
]

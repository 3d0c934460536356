"""The table of requests: what is sent, and what must come back, whichever framework and worker answers."""

import gzip
import json
import zlib
from dataclasses import dataclass
from typing import Any

Fields = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Case:
    """One request. `cut` ends the connection before the body is whole."""

    id: str
    method: str
    target: str
    headers: Fields = ()
    body: bytes = b""
    status: int = 200
    says: str = ""  # in the answer's text
    chunked: bool = False
    cut: bool = False

    def fields(self) -> Fields:
        """The header fields, with the framing of the body."""
        given = {name.lower() for name, _ in self.headers}
        fields = (("Host", "test"), *self.headers)
        if "x-request-id" not in given:
            fields += (("X-Request-ID", self.id),)
        if self.chunked:
            fields += (("Transfer-Encoding", "chunked"),)
        elif (self.body or self.method == "POST") and "content-length" not in given:
            fields += (("Content-Length", str(len(self.body) + (10 if self.cut else 0))),)
        return fields

    def raw(self) -> bytes:
        """The request as it stands on the wire."""
        head = [f"{self.method} {self.target} HTTP/1.1", *(f"{name}: {value}" for name, value in self.fields())]
        return "\r\n".join([*head, "", ""]).encode() + (self._chunks() if self.chunked else self.body)

    def _chunks(self) -> bytes:
        half = len(self.body) // 2
        parts = [part for part in (self.body[:half], self.body[half:]) if part]
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
        return chunks if self.cut else chunks + b"0\r\n\r\n"


JSON: Fields = (("Content-Type", "application/json"),)
PREFLIGHT: Fields = (("Origin", "http://page.example"), ("Access-Control-Request-Method", "POST"))
FLOWER = '{"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}'
QUERY = "sepal_length=5.1&sepal_width=3.5&petal_length=1.4&petal_width=0.2"
TWICE = FLOWER.replace("}", ', "petal_width": 9}')
SUCH = "such as " + json.dumps(FLOWER.replace(" ", ""))[1:-1]
AROUND = '"detail":[{"type":"extra_forbidden","loc":["body","%s"],"msg":"Unknown feature; send the rows alone, ' + (
    SUCH.replace("as {", "as [{") + ']"'
)
HUGE = 400 * "9"
LATIN_1 = "Content-Type has 'charset=latin-1'; send 'application/json' or 'application/jsonl' in UTF-8"


def post(id: str, body: str | bytes, status: int = 200, says: str = "", headers: Fields = JSON, **more: Any) -> Case:
    data = body.encode() if isinstance(body, str) else body
    return Case(id, "POST", "/predictions", headers, data, status, says, **more)


def compressed(encoding: str, body: bytes, status: int = 200, says: str = "", id: str = "", **more: Any) -> Case:
    return post(id or encoding, body, status, says, (*JSON, ("Content-Encoding", encoding)), **more)


def get(id: str, query: str, status: int = 200, says: str = "", **more: Any) -> Case:
    return Case(id, "GET", f"/predictions?{query}", (), b"", status, says, **more)


def cell(value: str) -> str:
    """A row whose petal_width is the given JSON text."""
    return FLOWER.replace("0.2", value)


def head(target: str, *fields: str, version: str = "1.1") -> bytes:
    """A request line and fields; a POST announces two bytes."""
    length = ["Content-Length: 2"] if target.startswith("POST") else []
    return "\r\n".join([f"{target} HTTP/{version}", "Host: test", *length, *fields, "", ""]).encode()


def chunked(coding: str) -> bytes:
    """A request whose chunked body is said to have another coding."""
    fields = f"Host: test\r\nContent-Type: application/json\r\nTransfer-Encoding: {coding}\r\n\r\n"
    return f"POST /predictions HTTP/1.1\r\n{fields}2\r\n[]\r\n0\r\n\r\n".encode()


IN_PARTS = (FLOWER[:30].encode(), b"", FLOWER[30:].encode())
THOUSAND = f"[{', '.join([FLOWER] * 1000)}]".encode()
BOMB = gzip.compress(b" " * 100_000_000, mtime=0)

GOOD = [
    post("object", FLOWER, says='{"prediction":"setosa","probabilities":{"setosa":0.98'),
    post("array", f"[{FLOWER}, {FLOWER}]", says="setosa"),
    post("array-of-one", f"[{FLOWER}]", says='[{"prediction"'),
    post("array-empty", "[]", says="[]"),
    post("integers", FLOWER.replace("5.1", "5"), says="setosa"),
    post("negative-zero", cell("-0.0"), says="setosa"),
    post("exponent", cell("2e-1"), says="setosa"),
    post("keys-in-another-order", json.dumps(dict(reversed(json.loads(FLOWER).items()))), says="setosa"),
    post("escaped-key", FLOWER.replace("sepal_length", "sepal\\u005flength"), says="setosa"),
    post("white-space", f" \r\n\t{FLOWER}\n ", says="setosa"),
    post("charset", FLOWER, headers=(("Content-Type", "application/json; charset=UTF-8"),), says="setosa"),
    *[
        post(f"media-type-{number}", FLOWER, headers=(("Content-Type", media_type),), says="setosa")
        for number, media_type in enumerate(
            [
                "application/json; charset=utf8",
                "application/json;charset='utf-8'",
                'application/json; charset="UTF-8"',
                "application/json; charset=us-ascii",
                "application/json; charset=utf-8; profile=x",
                "application/json; version=1",
                "application/json ;",
                "application/json; charset=",
                "application/vnd.api+json",
                "application/problem+JSON; charset=UTF8",
            ]
        )
    ],
    post("no-content-type", FLOWER, headers=(), says="setosa"),
    post("empty-content-type", FLOWER, headers=(("Content-Type", ""),), says="setosa"),
    post("blank-content-type", FLOWER, headers=(("Content-Type", " "),), says="setosa"),
    post("content-type-in-capitals", FLOWER, headers=(("content-type", "APPLICATION/JSON"),), says="setosa"),
    post("chunked", FLOWER, chunked=True, says="setosa"),
    post("chunked-array", f"[{', '.join([FLOWER] * 500)}]", chunked=True, says="setosa"),
    post("thousand-rows", f"[{', '.join([FLOWER] * 1000)}]", says="setosa"),
    post("identity", FLOWER, headers=(*JSON, ("Content-Encoding", "identity")), says="setosa"),
    compressed("gzip", gzip.compress(FLOWER.encode(), mtime=0), says="setosa"),
    compressed("GZIP", gzip.compress(FLOWER.encode(), mtime=0), says="setosa"),
    compressed("x-gzip", gzip.compress(FLOWER.encode(), mtime=0), chunked=True, says="setosa"),
    compressed("gzip", b"".join(gzip.compress(part, mtime=0) for part in IN_PARTS), id="gzip-members", says="setosa"),
    compressed("gzip", gzip.compress(THOUSAND, mtime=0), id="gzip-thousand", says="setosa"),
    compressed("deflate", zlib.compress(FLOWER.encode()), says="setosa"),
    compressed("deflate", zlib.compress(FLOWER.encode(), wbits=-15), id="deflate-raw", says="setosa"),
    get("query", QUERY, says="setosa"),
    get("query-integers", QUERY.replace("5.1", "5"), says="setosa"),
    get("query-percent-encoded", QUERY.replace("sepal_length=5.1", "sepal%5Flength=%35%2E1"), says="setosa"),
    get("query-trailing-ampersand", QUERY + "&", says="setosa"),
    Case("path-percent-encoded", "GET", f"/%70redictions?{QUERY}", says="setosa"),
    Case("head", "HEAD", f"/predictions?{QUERY}"),
    Case("head-ping", "HEAD", "/ping"),
    Case("ping", "GET", "/ping", says='{"status":"live"}'),
    Case("root", "GET", "/", says='{"status":"alive"}'),
    Case("live", "GET", "/health/live", says='{"status":"live"}'),
    Case("ready", "GET", "/health/ready", says='{"status":"ready","model":"iris","model_sha256":"'),
    Case("openapi", "GET", "/openapi.json", says='"openapi":"3.1.0"'),
    Case("get-with-body", "GET", "/ping", (), b"ignored", says="live"),
    Case("connection-close", "GET", "/ping", (("Connection", "close"),), says="live"),
    Case("options", "OPTIONS", "/predictions", (), b"", 204, "GET, HEAD, POST, OPTIONS"),
    Case("options-ping", "OPTIONS", "/ping", (), b"", 204, "GET, HEAD, OPTIONS"),
    Case("options-everything", "OPTIONS", "*", (), b"", 204, "GET, HEAD, POST, OPTIONS"),
    Case("options-with-body", "OPTIONS", "/predictions", JSON, b'{"a"', 204, "GET, HEAD, POST, OPTIONS"),
    Case("options-chunked", "OPTIONS", "/ping", (), b"ignored", 204, "GET, HEAD, OPTIONS", chunked=True),
    Case("options-of-a-browser", "OPTIONS", "/predictions", PREFLIGHT, b"", 204, "GET, HEAD, POST, OPTIONS"),
    post("h2c", FLOWER, headers=(*JSON, ("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c")), says="setosa"),
    post(
        "h2c-chunked",
        FLOWER,
        headers=(*JSON, ("Connection", "Upgrade"), ("Upgrade", "h2c")),
        chunked=True,
        says="setosa",
    ),
    Case("websocket", "GET", "/ping", (("Connection", "Upgrade"), ("Upgrade", "websocket")), says="live"),
    Case("repeated-request-id", "GET", "/ping", (("X-Request-ID", "a"), ("X-Request-ID", "b")), says="live"),
    Case("padded-request-id", "GET", "/ping", (("X-Request-ID", " padded \t"),), says="live"),
    Case("sane-request-id", "GET", "/ping", (("X-Request-ID", "a.b:c/d+e=f-g_h"),), says="live"),
]

BAD = [
    compressed("br", b"x", 415, "use one of 'gzip', 'deflate', or send the body as it is"),
    compressed("gzip, gzip", b"x", 415, "use one of 'gzip', 'deflate'", id="gzip-twice"),
    compressed("gzip", b"", 400, "the body is empty", id="gzip-nothing"),
    compressed("gzip", FLOWER.encode(), 400, "the body is not gzip: incorrect header check", id="gzip-not"),
    compressed("gzip", gzip.compress(b"x", mtime=0)[:-1], 400, "the body ends inside its gzip", id="gzip-cut"),
    compressed("gzip", gzip.compress(b"x", mtime=0)[:-8] + bytes(8), 400, "incorrect data check", id="gzip-crc"),
    compressed("gzip", gzip.compress(b"x", mtime=0) + b"xyz", 400, "incorrect header check", id="gzip-tail"),
    compressed("gzip", gzip.compress(b"", mtime=0) * 200, 400, "goes on behind the end of its gzip", id="gzip-empty"),
    compressed("gzip", BOMB, 413, "longer once it is inflated; send at most 8388608 bytes", id="gzip-bomb"),
    compressed("deflate", FLOWER.encode(), 400, "the body is not deflate", id="deflate-not"),
    compressed("deflate", zlib.compress(b"x") + b"x", 400, "goes on behind the end", id="deflate-tail"),
    post("empty-body", "", 400, "the body is empty"),
    post("white-space-only", "  ", 400, "not JSON"),
    post("not-json", "sepal_length=5.1", 400, "line 1 column 1"),
    post("open-object", '{"sepal_length": 5.1', 400, "EOF"),
    post("open-array", f"[{FLOWER}", 400, "EOF"),
    post("open-string", '{"sepal_length', 400, "EOF"),
    post("trailing-comma", FLOWER.replace("}", ",}"), 400, "trailing comma"),
    post("trailing-text", FLOWER + "x", 400, "trailing characters"),
    post("two-documents", FLOWER + FLOWER, 400, "trailing characters"),
    post("single-quotes", FLOWER.replace('"', "'"), 400, "not JSON"),
    post("comment", "/* row */" + FLOWER, 400, "not JSON"),
    post("nan", cell("NaN"), 400, "at line 1 column 79; a value that is missing is null"),
    post("nan-in-the-second-line", f"[{FLOWER},\n{cell('NaN')}]", 400, "at line 2 column 79; a value that is missing"),
    post("infinity", cell("Infinity"), 400, "; a value that is missing is null"),
    post("negative-infinity", cell("-Infinity"), 400, "; a value that is missing is null"),
    post("none", cell("None"), 400, 'column 79"'),
    post("duplicate-key", TWICE, 400, "duplicate key"),
    post("duplicate-key-in-array", f"[{FLOWER}, {TWICE}]", 400, "duplicate key"),
    post("nested-10000-deep", "[" * 10_000 + "]" * 10_000, 400, "recursion"),
    post("nested-objects-10000-deep", '{"a":' * 10_000 + "1" + "}" * 10_000, 400, "recursion"),
    post("bad-utf-8", FLOWER.encode().replace(b"5.1", b'"\xff"'), 400, "not JSON"),
    post("bad-utf-8-key", FLOWER.encode().replace(b"sepal_length", b"sepal\xc3\x28"), 400, "not JSON"),
    post("utf-16", FLOWER.encode("utf-16"), 400, "not JSON: expected value at line 1 column 1; encode it as UTF-8"),
    post("byte-order-mark", b"\xef\xbb\xbf" + FLOWER.encode(), 400, "leave out the byte order mark"),
    post("null-bytes", b"\0\0\0\0", 400, "not JSON"),
    post("lone-surrogate", cell('"\\ud800"'), 400, "not JSON"),
    post("leading-zero", cell("00.2"), 400, "not JSON"),
    post("hexadecimal", cell("0x1"), 400, "not JSON"),
    post("point-without-digits", cell("1."), 400, "not JSON"),
    post("integer-of-5000-digits", cell("9" * 5000), 400, "out of range"),
    post("overflow", cell("1e999"), 422, '"loc":["body","petal_width"],"msg":"Input should be a finite number"'),
    post("integer-of-400-digits", cell(HUGE), 422, "valid number"),
    post("larger-than-float32", cell("3.5e38"), 422, "less than or equal to 3402823466385"),
    post("lower-than-float32", cell("-3.5e38"), 422, "greater than or equal to -3402823466385"),
    post("string-for-number", cell('"0.2"'), 422, '"loc":["body","petal_width"]'),
    post("true-for-number", cell("true"), 422, "valid number"),
    post("null-for-number", cell("null"), 422, "valid number"),
    post("array-for-number", cell("[0.2]"), 422, "valid number"),
    post("object-for-number", cell('{"value": 0.2}'), 422, "valid number"),
    post("deep-value", cell("[" * 150 + "]" * 150), 422, "valid number"),
    post(
        "missing-feature",
        FLOWER.replace(', "petal_width": 0.2', ""),
        422,
        '"type":"missing","loc":["body","petal_width"]',
    ),
    post("misspelt-feature", FLOWER.replace("petal_width", "petal_widht"), 422, "did you mean 'petal_width'?"),
    post("unknown-feature", FLOWER.replace("}", ', "colour": 1}'), 422, "Unknown feature; use one of 'sepal_length'"),
    post("empty-object", "{}", 422, '"loc":["body","sepal_length"]'),
    post("ten-thousand-bad-rows", f"[{','.join(['{}'] * 10_000)}]", 422, '["body",249,"petal_width"]'),
    post("many-unknown-features", '{"a0":1' + "".join(f',"a{n}":1' for n in range(1, 2000)) + "}", 422, "not 2000"),
    post("null", "null", 422, "Input should be an object or an array of objects"),
    post("number", "5.1", 422, "Input should be an object or an array of objects"),
    post("string", '"setosa"', 422, f"Input should be an object or an array of objects, {SUCH}"),
    post("array-of-numbers", "[5.1, 3.5, 1.4, 0.2]", 422, f'"loc":["body",0],"msg":"Input should be an object, {SUCH}'),
    post("array-of-arrays", f"[[{FLOWER}]]", 422, f'"loc":["body",0],"msg":"Input should be an object, {SUCH}'),
    post("array-of-nulls", "[null, null]", 422, f'"loc":["body",0],"msg":"Input should be an object, {SUCH}'),
    post("instances", f'{{"instances": [{FLOWER}]}}', 422, AROUND % "instances"),
    post("inputs", '{"model": "iris", "inputs": [[5.1, 3.5, 1.4, 0.2]]}', 422, AROUND % "inputs"),
    post("data", f'{{"data": {FLOWER}}}', 422, AROUND % "data"),
    post("rows", f'{{"rows": [{FLOWER}]}}', 422, AROUND % "rows"),
    post("dataframe-split", '{"dataframe_split": {"columns": ["a"], "data": [[1]]}}', 422, AROUND % "dataframe_split"),
    post("instances-in-array", f'[{{"instances": [{FLOWER}]}}]', 422, '"loc":["body",0,"instances"],"msg":"Unknown'),
    post(
        "columns", '{"sepal_length": [5.1, 6.0], "sepal_width": [3.5, 2.7]}', 422, "should be rows, not columns, such"
    ),
    post("columns-by-index", '{"sepal_length": {"0": 5.1}, "sepal_width": {"0": 3.5}}', 422, "rows, not columns"),
    post("array-with-null", f"[{FLOWER}, null]", 422, '"loc":["body",1]'),
    post("bad-cell-in-row-3", f"[{FLOWER}, {FLOWER}, {FLOWER}, {cell('true')}]", 422, '["body",3,"petal_width"]'),
    post("two-bad-cells", f"[{cell('true')}, {cell('null')}]", 422, '["body",1,"petal_width"]'),
    post("too-many-rows", f"[{','.join(['{}'] * 10_001)}]", 413, "the body has 10001 rows; send at most 10000 rows"),
    post("long-text", f'"{"x" * 100_000}"', 422, '"input":"' + "x" * 150 + "…" + "x" * 49 + '"'),
    post("long-name", f'{{"{"n" * 100_000}":1}}', 422, '"loc":["body","' + "n" * 150 + "…" + "n" * 49 + '"]'),
    post("long-name-twice", f'{{"{"n" * 100_000}":1, "{"n" * 100_000}":1}}', 400, "…nnn"),
    post("text-plain", FLOWER, 415, "Content-Type is 'text/plain'", (("Content-Type", "text/plain"),)),
    post("text-json", FLOWER, 415, "use 'application/json'", (("Content-Type", "text/json"),)),
    post("json-in-front", FLOWER, 415, "use 'application/json'", (("Content-Type", "application/jsonx"),)),
    post("image-json", FLOWER, 415, "use 'application/json'", (("Content-Type", "image/x+json"),)),
    post("form", QUERY, 415, "use 'application/json'", (("Content-Type", "application/x-www-form-urlencoded"),)),
    post("long-content-type", FLOWER, 415, "xxx…xxx", (("Content-Type", "text/" + "x" * 4000),)),
    post("latin-1-charset", FLOWER, 415, LATIN_1, (("Content-Type", "application/json; v=1; Charset=latin-1; x=y"),)),
    post("utf-16-charset", FLOWER, 415, "in UTF-8", (("Content-Type", "application/x+json;charset=utf-16"),)),
    post("two-charsets", FLOWER, 415, "'charset=x'", (("Content-Type", "application/json;charset=utf-8;charset=x"),)),
    post("chunked-and-bad", '{"a"', 400, "EOF", chunked=True),
    post("cut-short", FLOWER, 400, "ended early", cut=True),
    post("cut-short-chunked", FLOWER, 400, "ended early", chunked=True, cut=True),
    post("cut-short-before-any", "", 400, "ended early", cut=True),
    post("too-large", b" " * 8_388_609, 413, "the body is 8388609 bytes; send at most 8388608 bytes"),
    post("too-large-chunked", b" " * 8_388_609, 413, "the body is longer", chunked=True),
    get("no-query", "", 422, '"loc":["query","sepal_length"]'),
    Case("no-question-mark", "GET", "/predictions", status=422, says='"loc":["query","petal_width"]'),
    get("query-missing-feature", QUERY.replace("&petal_width=0.2", ""), 422, '"type":"missing"'),
    get("query-misspelt-feature", QUERY.replace("petal_width", "petal_widht"), 422, "did you mean 'petal_width'?"),
    get(
        "query-repeated",
        QUERY + "&petal_width=0.2",
        422,
        '"loc":["query","petal_width"],"msg":"Give this parameter once"',
    ),
    get("query-text", QUERY.replace("0.2", "wide"), 422, "valid number"),
    get("query-empty-value", QUERY.replace("0.2", ""), 422, "valid number"),
    get("query-no-value", QUERY.replace("=0.2", ""), 422, "valid number"),
    get("query-nan", QUERY.replace("0.2", "nan"), 422, "finite number"),
    get("query-infinity", QUERY.replace("0.2", "Infinity"), 422, "finite number"),
    get("query-overflow", QUERY.replace("0.2", "1e999"), 422, "finite number"),
    get("query-comma", QUERY.replace("0.2", "0,2"), 422, "valid number"),
    get("query-bad-percent-encoding", QUERY.replace("0.2", "%zz"), 422, "valid number"),
    get("query-bad-utf-8", QUERY.replace("0.2", "%ff"), 400, "not percent-encoded UTF-8"),
    get("query-semicolons", QUERY.replace("&", ";"), 422, '"type":"missing"'),
    get("query-bad-cell-in-head", QUERY.replace("0.2", "wide"), 422),
    Case("unknown-path", "GET", "/prediction", status=404, says="did you mean '/predictions'?"),
    Case("trailing-slash", "GET", f"/predictions/?{QUERY}", status=404, says="did you mean '/predictions'?"),
    Case("double-slash", "GET", f"//predictions?{QUERY}", status=404, says="did you mean"),
    Case("double-slash-inside", "GET", "/health//live", status=404, says="did you mean '/health/live'?"),
    Case("long-path", "GET", "/" + "x" * 4000, status=404, says="xxx…xxx"),
    Case("path-bad-utf-8", "GET", "/%ff", status=404, says="there is no"),
    Case("path-encoded-slash", "GET", "/health%2Flive/x", status=404, says="there is no"),
    Case("path-dots", "GET", "/../settings.toml", status=404, says="there is no"),
    Case("post-unknown-path", "POST", "/predict", JSON, FLOWER.encode(), 404, "did you mean '/predictions'?"),
    Case("static-file", "GET", "/static/app.py", status=404),
    Case("docs-not-there", "GET", "/redoc", status=404),
    Case("delete", "DELETE", "/predictions", status=405, says="use one of GET, HEAD, POST, OPTIONS"),
    Case("put", "PUT", "/predictions", JSON, FLOWER.encode(), 405, "PUT is not allowed"),
    Case("patch", "PATCH", "/predictions", JSON, FLOWER.encode(), 405, "PATCH is not allowed"),
    Case("options-unknown-path", "OPTIONS", "/prediction", status=404, says="did you mean '/predictions'?"),
    Case("trace", "TRACE", "/predictions", status=405, says="TRACE is not allowed"),
    Case("post-ping", "POST", "/ping", JSON, b"{}", 405, "use one of GET, HEAD, OPTIONS"),
    Case("head-unknown-path", "HEAD", "/prediction", status=404),
    Case("insane-request-id", "GET", "/nope", (("X-Request-ID", 'x" \t{"level": "critical"}'),), status=404),
    Case("long-request-id", "GET", "/nope", (("X-Request-ID", "x" * 129),), status=404),
]

# Bytes that are no HTTP request of ours; they are answered before any app: id, bytes, status.
MALFORMED = [
    ("tls-to-a-plain-port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ("no-token", b"\x00", 400),
    ("nonsense", b"nonsense\r\n\r\n", 400),
    ("bad-version", b"GET /ping HTTP/9.9\r\nHost: x\r\n\r\n", 400),
    ("space-in-target", b"GET /ping x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("byte-in-target", b"GET /predictions?a=\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("http-2", b"GET /ping HTTP/2.0\r\nHost: x\r\n\r\n", 400),
    ("no-version", b"GET /ping\r\n\r\n", 400),
    ("two-hosts", b"GET /ping HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    ("two-lengths", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
    ("header-without-colon", b"GET /ping HTTP/1.1\r\nHost x\r\n\r\n", 400),
    ("null-in-header", b"GET /ping HTTP/1.1\r\nHost: x\0y\r\n\r\n", 400),
    ("length-not-a-number", b"POST /predictions HTTP/1.1\r\nHost: x\r\nContent-Length: ten\r\n\r\n", 400),
    ("negative-length", b"POST /predictions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    ("length-and-chunked", b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("long-request-line", b"GET /predictions?a=" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    ("request-line-of-8191-bytes", b"GET /predictions?a=" + b"x" * 8163 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    ("header-of-8191-bytes", b"GET /ping HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 8181 + b"\r\n\r\n", 431),
    ("long-header", b"GET /ping HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 9000 + b"\r\n\r\n", 431),
    ("many-headers", b"GET /ping HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 101 + b"\r\n", 431),
    ("http-1.2", b"GET /ping HTTP/1.2\r\nHost: x\r\n\r\n", 400),
    ("no-host", b"GET /ping HTTP/1.1\r\n\r\n", 400),
    ("two-content-types", head("POST /predictions", "Content-Type: a/b", "Content-Type: a/b") + b"[]", 400),
    ("connect", b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("asterisk-for-get", b"GET * HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("target-without-host", b"GET http:///ping HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("target-with-user", b"GET http://me:secret@x/ping HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("target-with-bad-port", b"GET http://x:y/ping HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("target-without-slash", b"GET ping HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("chunked-http-1.0", b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n0\r\n\r\n", 400),
    ("chunked-twice", chunked("chunked, chunked"), 400),
    ("chunked-twice-in-fields", chunked("chunked\r\nTransfer-Encoding: chunked"), 400),
    ("chunked-not-last", chunked("chunked, gzip"), 400),
    ("gzip-alone", chunked("gzip"), 400),
    ("chunked-with-parameter", chunked("chunked;q=1"), 400),
    ("gzip-and-chunked", chunked("gzip, chunked"), 501),
    ("gzip-and-chunked-in-fields", chunked("gzip\r\nTransfer-Encoding: chunked"), 501),
    ("identity-and-chunked", chunked("identity, chunked"), 501),
    ("unknown-coding-and-chunked", chunked("x-mine, Chunked"), 501),
    ("nothing-and-chunked", chunked(", chunked"), 501),
    ("unknown-expectation", b"GET /ping HTTP/1.1\r\nHost: x\r\nExpect: 200-ok\r\n\r\n", 417),
    ("two-expectations", b"GET /ping HTTP/1.1\r\nHost: x\r\nExpect: 100-continue, x\r\n\r\n", 417),
]

# Heads that one of the workers' parsers would read in another way: id, bytes, status, whether the connection ends.
HEADS = [
    ("absolute", head("GET http://a.example/ping"), 200, False),
    ("absolute-with-port-and-query", head(f"GET HTTPS://[::1]:8000/predictions?{QUERY}"), 200, False),
    ("absolute-without-path", head("GET http://a.example"), 200, False),
    ("absolute-with-query-alone", head("GET http://a.example?a=/ping"), 200, False),
    ("head-of-root", head("HEAD /"), 200, False),
    ("options-absolute", head("OPTIONS http://a.example/ping"), 204, False),
    ("options-absolute-without-path", head("OPTIONS http://a.example"), 204, False),
    ("options-of-a-balancer", b"OPTIONS /ping HTTP/1.0\r\n\r\n", 204, True),
    ("options-of-root", b"OPTIONS / HTTP/1.0\r\n\r\n", 204, True),
    ("close-in-a-list", head("GET /ping", "Connection: x, Close"), 200, True),
    ("close-in-a-second-field", head("GET /ping", "Connection: x", "Connection: close"), 200, True),
    ("http-1.0", b"GET /ping HTTP/1.0\r\n\r\n", 200, True),
    ("http-1.0-keep-alive", b"GET /ping HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200, True),
    ("http-1.0-absolute", b"HEAD http://a.example HTTP/1.0\r\n\r\n", 200, True),
    ("http-1.0-post", head("POST /predictions", *map(": ".join, JSON), version="1.0") + b"[]", 200, True),
    ("chunked-in-capitals", chunked("CHUNKED"), 200, False),
    ("empty-line-in-front", b"\r\n" + head("GET /ping"), 200, False),
]

# Bytes on which the two workers' own parsers differ, both within the standard: id, bytes, status by worker.
DIFFERENT = [
    (
        "length-of-5000-digits",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"0" * 5000 + b"2\r\n\r\n[]",
        {"uvicorn": 405, "gevent": 400},
    ),
    ("unknown-method", b"FOO /ping HTTP/1.1\r\nHost: x\r\n\r\n", {"uvicorn": 400, "gevent": 405}),
    ("two-empty-lines-in-front", b"\r\n\r\n" + head("GET /ping"), {"uvicorn": 200, "gevent": 400}),
    ("two-spaces", b"GET  /ping HTTP/1.1\r\nHost: x\r\n\r\n", {"uvicorn": 200, "gevent": 400}),
]

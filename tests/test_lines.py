"""JSON lines: an answer to each line, in its place, while later ones come in, in bounded memory."""

import asyncio
import gzip
import json
import socket
import subprocess
import time
import tracemalloc
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import hypothesis
import pytest
import requests
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression

import app
from serving.errors import ContentTooLarge
from serving.logs import REQUEST_ID
from serving.predictor.batcher import LoopBatcher, ThreadBatcher
from serving.predictor.bodies import MAX_CELLS, PART_BYTES, parse_json
from serving.web.lines import Part, cut_between_lines, predict_lines
from serving.web.messages import Request
from serving.web.service import Exchange, Service
from serving.web.wsgi import run_now
from tests.lib.apps import call, call_asgi, environ_of, make_service, make_settings
from tests.lib.cases import FLOWER, Case
from tests.lib.clients import ROW, post_case
from tests.lib.proc import peak_mb
from tests.lib.servers import COMBINATIONS, Server, Starter, gunicorn_environment, wait_until
from tests.lib.sizes import each_combination, scale

JSONL = (("Content-Type", "application/jsonl"),)
HEAD = "POST /predictions HTTP/1.1\r\nHost: test\r\nContent-Type: application/jsonl\r\n"
TIMEOUT_S = 3.0
LINE = FLOWER.encode()
ODD_LINES = [
    b"{}",
    b"[]",
    b"nope",
    b'{"sepal_length": 5.1',
    b'"sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}',
    LINE + b"," + LINE,
    b"[" + LINE + b"]",
    b"{},{}",
    b"}{",
    b'{"a{": {}}',
    LINE.replace(b"0.2", b'"}{"'),
    LINE.replace(b"0.2", b"NaN"),
    LINE.replace(b"0.2", b"1e999"),
    LINE.replace(b"0.2", b"true"),
    b" " + LINE + b"\t",
    LINE.replace(b'"sepal_length"', b'"sepal\\u005flength"'),
    LINE.replace(b"}", b', "petal_width": 9}'),
    b"\xff",
    b"null",
    b"5",
]


def lines_case(body: bytes, *fields: tuple[str, str], **more: Any) -> Case:
    return Case("lines", "POST", "/predictions", (*JSONL, *fields), body, **more)


def numbered(answer: Any, place: int) -> Any:
    """Return the error of a row alone as it is in its place among others."""
    if isinstance(answer.get("detail"), list):
        for problem in answer["detail"]:
            body, *names = problem["loc"]
            problem["loc"] = [body, place, *names]
    return answer


@pytest.fixture(scope="module")
def native() -> Any:
    return app.create_app(make_settings(logging={"access": False}))


@hypothesis.settings(deadline=None)
@hypothesis.given(lines=st.lists(st.sampled_from([LINE, LINE, LINE, *ODD_LINES]), min_size=1, max_size=6))
def test_line_is_answered_as_if_it_were_alone(native: Any, lines: list[bytes]) -> None:
    """Whatever stands before or behind it, a line gets the answer that it gets as a body, with its number."""
    answers = call(native, lines_case(b"\n".join(lines))).body.splitlines()
    assert len(answers) == len(lines)
    for place, (line, answer) in enumerate(zip(lines, answers, strict=True)):
        alone = call(native, post_case({}) if line == b"{}" else Case("one", "POST", "/predictions", (), line)).json
        if isinstance(alone, list):
            assert "Input should be an object" in json.loads(answer)["detail"][0]["msg"]
        elif isinstance(alone.get("detail"), str):
            assert json.loads(answer)["detail"].startswith("the line is not JSON: ")
        elif ", such as " in str(alone):  # a right row, or an array of them
            problem, expected = json.loads(answer)["detail"][0], numbered(alone, place)["detail"][0]
            assert (problem["type"], problem["loc"]) == (expected["type"], expected["loc"])
        elif "prediction" in alone:
            assert json.loads(answer)["prediction"] == alone["prediction"]
            assert json.loads(answer)["probabilities"] == pytest.approx(alone["probabilities"])
        else:
            assert json.loads(answer) == numbered(alone, place)


def test_rows_get_the_bytes_that_an_array_gets(server: Server) -> None:
    """Under all four, and a bad line is answered in its place."""
    rows = [ROW | {"petal_width": number / 100} for number in range(2000)]
    body = b"\n".join(json.dumps(row).encode() for row in rows)
    answer = server.send(lines_case(body))
    assert answer.headers["content-type"] == "application/jsonl"
    assert b"[" + answer.body[:-1].replace(b"\n", b",") + b"]" == server.post(rows).body
    mixed = server.send(lines_case(LINE + b"\r\n\r\n" + b"nope\n" + b'{"sepal_length": 5.1}\n' + LINE))
    first, second, third, fourth = map(json.loads, mixed.body.splitlines())
    assert first == fourth
    assert first["prediction"] == "setosa"
    assert second == {"detail": "the line is not JSON: expected ident at column 2"}
    assert third["detail"][0]["loc"] == ["body", 2, "sepal_width"]


@pytest.mark.parametrize("media_type", ["application/x-ndjson", "Application/JSONLines; charset=utf-8"])
def test_other_names_of_the_type_count(server: Server, media_type: str) -> None:
    """The type has no registered name, so the usual ones are taken."""
    case = Case("lines", "POST", "/predictions", (("Content-Type", media_type),), LINE)
    answer = server.send(case)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/jsonl")
    assert int(answer.headers["content-length"]) == len(answer.body)


@pytest.mark.parametrize(
    ("case", "status", "says"),
    [
        (lines_case(b""), 200, ""),
        (lines_case(b"\n\n"), 200, ""),
        (lines_case(gzip.compress(LINE + b"\n" + LINE), ("Content-Encoding", "gzip")), 200, "setosa"),
        (lines_case(gzip.compress(LINE + b"\n" + LINE), ("Content-Encoding", "gzip"), chunked=True), 200, "setosa"),
        (lines_case(b"nope", ("Content-Encoding", "gzip")), 400, "the body is not gzip"),
        (lines_case(LINE, ("Content-Encoding", "br")), 415, "use one of 'gzip', 'deflate'"),
        (lines_case(LINE, ("Content-Length", "ten")), 400, "Content-Length"),
        (lines_case(LINE, cut=True), 400, "the body ended early"),
        (Case("l", "POST", "/predictions", (("Content-Type", "application/jsonl; charset=x"),), b""), 415, "UTF-8"),
        (Case("l", "POST", "/ping", JSONL, LINE), 405, "not allowed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_body_that_is_no_stream_has_its_status(servers: Any, case: Case, status: int, says: str) -> None:
    """What is wrong before a row is answered has a status of its own, the same everywhere."""
    is_malformed = dict(case.headers).get("Content-Length") == "ten"
    answers = [server.send(case) for server in servers.values()]
    assert {answer.status for answer in answers} == {status}
    assert {answer.body for answer in answers if not is_malformed} <= {answers[0].body}
    assert is_malformed or says in answers[0].body.decode()


class Streaming:
    """A client that sends a stream in chunks, and reads each answer as it comes."""

    def __init__(self, server: Server) -> None:
        self.socket = server.connect()
        self.socket.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        self.received = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.received.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        self.socket.sendall(b"0\r\n\r\n")

    def read_head(self) -> bytes:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.received.readline()
        return self.read_head() if b" 100 " in head[:16] else head

    def read_chunk(self) -> bytes:
        size = int(self.received.readline(), 16)
        chunk = self.received.read(size)
        assert self.received.readline() == b"\r\n"
        return chunk

    def read_chunks(self) -> Iterator[bytes]:
        while chunk := self.read_chunk():
            yield chunk


def test_rows_are_answered_while_others_come(server: Server) -> None:
    """A client that waits for each answer before it sends the next row gets it."""
    with Streaming(server) as client:
        client.send(LINE + b"\n" + LINE[:20])
        assert b"200 OK" in client.read_head()
        for _ in range(3):
            assert json.loads(client.read_chunk())["prediction"] == "setosa"
            client.send(LINE[20:] + b"\n" + LINE[:20])
        assert json.loads(client.read_chunk())["prediction"] == "setosa"
        client.send(LINE[20:])
        client.end()
        assert [json.loads(chunk)["prediction"] for chunk in client.read_chunks()] == ["setosa"]


def test_stream_that_is_cut_ends_with_an_error(server: Server) -> None:
    """What came is answered, and the last line says that there was more."""
    with Streaming(server) as client:
        client.send(LINE + b"\n" + LINE[:20])
        client.socket.shutdown(socket.SHUT_WR)
        client.read_head()
        first, last = b"".join(client.read_chunks()).splitlines()
        assert json.loads(first)["prediction"] == "setosa"
        assert json.loads(last)["detail"].startswith("the body ended early")


def test_client_that_leaves_costs_nothing(server: Server) -> None:
    """Its stream ends in the log, and the worker answers others."""
    n_lines = len(server.lines)
    with Streaming(server) as client:
        client.send(LINE + b"\n")
        client.read_head()
        client.read_chunk()
    wait_until(lambda: any(line.get("rows") == 1 for line in server.lines[n_lines:]), "the stream's end in the log")
    assert server.post(ROW).status == 200
    assert {line["level"] for line in server.lines[n_lines:]} == {"info"}


@pytest.fixture(scope="module")
def impatient_servers(serve_module: Starter) -> dict[tuple[str, str], Server]:
    """Servers that wait for a piece of a body for some seconds."""
    return serve_module.each(COMBINATIONS, SERVING_LIMITS__REQUEST_TIMEOUT_S=str(TIMEOUT_S))


@each_combination()
def test_each_piece_has_its_time(impatient_servers: Any, combination: tuple[str, str]) -> None:
    """A stream may take longer than the limit of a body, as long as no piece of it does."""
    with Streaming(impatient_servers[combination]) as client:
        began = time.monotonic()
        client.send(LINE + b"\n")
        client.read_head()
        n_rows = 0
        while time.monotonic() < began + TIMEOUT_S * 1.3:
            assert json.loads(client.read_chunk())["prediction"] == "setosa"
            n_rows += 1
            time.sleep(TIMEOUT_S / 10)  # a client that is slow
            client.send(LINE + b"\n")
        assert n_rows > 5
        *_, last = b"".join(client.read_chunks()).splitlines()
        assert json.loads(last)["detail"].startswith("the body took too long")


def test_stream_takes_no_memory(server: Server, tmp_path: Path) -> None:
    """However many rows, curl gets an answer to each, and the worker does not grow."""
    n_rows = scale(100_000, 1_000_000)
    file = tmp_path / "rows.jsonl"
    file.write_bytes((LINE + b"\n") * n_rows)
    url = f"http://127.0.0.1:{server.port}/predictions"
    options = ["--header", "Content-Type: application/jsonl", "--header", "Transfer-Encoding: chunked"]
    command = ["curl", "-sS", "--fail", *options, "--upload-file", str(file), "--request", "POST", url]
    server.send(lines_case((LINE + b"\n") * 50_000))
    before = max(map(peak_mb, server.worker_pids))
    with (tmp_path / "answers").open("wb") as answers:
        subprocess.run(command, stdout=answers, check=True)
    assert (tmp_path / "answers").read_bytes().count(b'{"prediction":"setosa"') == n_rows
    assert max(map(peak_mb, server.worker_pids)) < before + 16


def test_client_that_sends_all_before_it_reads_is_answered(server: Server) -> None:
    """Most libraries do. Up to `limits.max_body_bytes` that holds nobody up."""
    body = (LINE + b"\n") * (8_000_000 // len(LINE))
    url = f"http://127.0.0.1:{server.port}/predictions"
    answer = requests.post(url, data=body, headers=dict(JSONL), timeout=60)
    assert answer.content.count(b"\n") == body.count(b"\n")


def test_old_client_gets_a_length(server: Server) -> None:
    """HTTP/1.0 has no chunks, so all is answered at once."""
    body = (LINE + b"\n") * 3000
    head = HEAD.replace("1.1", "1.0") + f"Content-Length: {len(body)}\r\n\r\n"
    answer = server.exchange(head.encode() + body)
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert answer.body.count(b"\n") == 3000


class Fragile(ClassifierMixin, BaseEstimator):
    """Predicts "good" for all rows, unless one of them is negative."""

    n_features_in_ = 1
    classes_ = ("good",)

    def predict(self, X: Any) -> Any:
        if (X < 0).any():
            raise ZeroDivisionError("negative")
        return ["good"] * len(X)

    def __sklearn_is_fitted__(self) -> bool:
        return True


def test_row_that_the_estimator_fails_on_is_alone(framework: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The others are predicted, and the log has one traceback, however many fail."""
    native = app.FRAMEWORKS[framework](make_service(make_settings(framework=framework, features={}), Fragile()))
    values = [1.0, -1.0, 2.0, 3.0, -2.0, 4.0, 5.0]
    answer = call(native, lines_case(b"\n".join(b'{"x0": %f}' % value for value in values)))
    answers = [*map(json.loads, answer.body.splitlines())]
    assert [line.get("prediction") for line in answers] == ["good" if value > 0 else None for value in values]
    assert answers[1]["detail"].startswith("internal error")
    assert capfd.readouterr().err.count("ZeroDivisionError: negative") <= 1


def test_stream_waits_for_its_turn(framework: str) -> None:
    """A queue that is full refuses a stream that begins, with its status."""
    settings = make_settings(framework=framework, limits={"max_queued_rows": 1})
    native = app.create_app(settings)
    service = (native.extensions["serving"] if framework == "flask" else native.state.serving).service
    service.queue.queued_rows = service.queue._rows_by_size[1] = 1
    answer = call(native, lines_case(LINE))
    assert answer.status == 429
    service.queue.queued_rows = service.queue._rows_by_size[1] = 0
    assert call(native, lines_case(LINE)).status == 200


def test_many_wide_errors_are_written_in_parts(framework: str) -> None:
    """A part has so many lines that the errors of all its cells are few enough."""
    n_features = 200
    X = [[float(row == column) for column in range(n_features)] for row in range(n_features)]
    estimator = LogisticRegression().fit(X, [row % 2 for row in range(n_features)])
    native = app.FRAMEWORKS[framework](make_service(make_settings(framework=framework, features={}), estimator))
    n_lines = 2 * MAX_CELLS // n_features
    answers = call(native, lines_case(b"{}\n" * n_lines)).body.splitlines()
    assert len(b"{}\n" * n_lines) < PART_BYTES
    assert len(answers) == n_lines
    assert len(json.loads(answers[-1])["detail"]) == n_features
    assert json.loads(answers[-1])["detail"][0]["loc"] == ["body", n_lines - 1, "x0"]


def test_what_a_user_puts_around_sees_streams(serve: Starter, tmp_path: Path) -> None:
    """A stream goes through FastAPI's middleware, and Flask's hooks, as other requests do."""
    module = tmp_path / "extended.py"
    module.write_text(
        "import app\nnative = app.create_app()\n"
        "if hasattr(native, 'wsgi_app'):\n"
        "    native.after_request(lambda answer: (answer.headers.set('X-Seen', 'yes'), answer)[1])\n"
        "else:\n"
        "    @native.middleware('http')\n"
        "    async def see(request, call_next):\n"
        "        answer = await call_next(request)\n"
        "        answer.headers['X-Seen'] = 'yes'\n"
        "        return answer\n"
        "asgi, wsgi = app.as_asgi(native), app.as_wsgi(native)\n"
    )
    for framework, worker in COMBINATIONS:
        kind = "asgi" if worker == "uvicorn" else "wsgi"
        environment = gunicorn_environment(framework, worker, PYTHONPATH=str(tmp_path))
        server = serve(f"gunicorn -c gunicorn.conf.py extended:{kind}", **environment)
        body = (LINE + b"\n") * 1000
        url = f"http://127.0.0.1:{server.port}/predictions"
        request = urllib.request.Request(url, body, dict(JSONL))
        with urllib.request.urlopen(request) as answer:
            assert answer.headers["X-Seen"] == "yes"
            assert answer.read().count(b"\n") == 1000


def test_inflated_lines_are_bounded(server: Server) -> None:
    """A body with a length is inflated no further than the limit, a stream no further than some times its size."""
    bomb = gzip.compress(b"\n" * 100_000_000)
    encoded = ("Content-Encoding", "gzip")
    whole = server.send(lines_case(bomb, encoded))
    assert (whole.status, "longer once it is inflated" in whole.body.decode()) == (413, True)
    streamed = server.send(lines_case(bomb, encoded, chunked=True))
    assert (streamed.status, "times as long once it is inflated" in streamed.body.decode()) == (413, True)


def test_line_of_many_values_is_not_decoded(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused by the number of its values, alone and among others."""
    decoded: list[int] = []

    def note(body: bytes, *more: Any) -> Any:
        decoded.append(len(body))
        return parse_json(body, *more)

    monkeypatch.setattr("serving.web.lines.parse_json", note)
    native = app.create_app(make_settings(framework=framework))
    many = b'{"x": [' + b"[]," * 400_000 + b"0]}"
    for body in (many, LINE + b"\n" + many + b"\n" + LINE):
        answers = [*map(json.loads, call(native, lines_case(body)).body.splitlines())]
        problem = answers[len(answers) // 2]["detail"][0]
        assert (problem["type"], problem["loc"]) == ("too_long", ["body", len(answers) // 2])
    assert max(decoded) < len(many)


def test_rows_before_a_cut_are_answered(server: Server) -> None:
    """Whole lines that come together with the end of the connection are answered, and then it is said."""
    chunk = b"%x\r\n%b\r\n" % (len(LINE) + 1, LINE + b"\n")
    head = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()
    for end in (b"", b"nonsense\r\n"):
        answer = server.exchange(head + chunk + end, half_close=not end)
        first, last = map(json.loads, answer.body.splitlines())
        assert first["prediction"] == "setosa"
        assert "ended early" in last["detail"]


def test_long_answer_without_a_length_needs_chunks(server: Server) -> None:
    """Over HTTP/1.0 an answer is held whole, so it is no longer than some times a body may be."""
    body = gzip.compress(b"{}\n" * 200_000)
    fields = f"Content-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = server.exchange((HEAD.replace("1.1", "1.0") + fields).encode() + body)
    assert (answer.status, "use HTTP/1.1" in answer.json["detail"]) == (413, True)


class Sink:
    """An observer that keeps what it is shown, with the request id of the moment."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, str | None]] = []

    def __call__(self, exchange: Exchange) -> None:
        self.seen.append((exchange.response.status, exchange.request.rows, REQUEST_ID.get(None)))


def serve_seen(framework: str) -> tuple[Sink, Any]:
    settings, sink = make_settings(framework=framework), Sink()
    made = app.make_service(settings)
    service = Service(settings, made.model, made.proof, app.operations(settings), [sink])
    return sink, app.FRAMEWORKS[framework](service)


def test_stream_that_nobody_takes_is_shown() -> None:
    """An answer that is closed before its rest was asked for is shown once, and leaves no request id behind."""
    case = lines_case((LINE + b"\n") * 5000)
    sink, flask = serve_seen("flask")
    environ = environ_of(case)
    pieces = flask(environ, lambda *_: None)
    next(iter(pieces))
    pieces.close()
    pieces.close()
    assert [(status, request_id) for status, _, request_id in sink.seen] == [(499, "lines")]
    assert REQUEST_ID.get(None) is None

    async def send(message: Any) -> None:
        raise ConnectionResetError

    sink, fastapi = serve_seen("fastapi")
    with pytest.raises(ConnectionResetError):
        asyncio.run(call_asgi(fastapi, case, send_instead=send))
    assert [(status, request_id) for status, _, request_id in sink.seen] == [(499, "lines")]


def test_failure_in_a_stream_is_the_services(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails in the middle is the last line, an internal error, and no client that has left."""
    sink, native = serve_seen(framework)
    write, n_parts = Part.write, 0

    def fail_later(part: Part) -> bytes:
        nonlocal n_parts
        n_parts += 1
        if n_parts == 3:
            raise MemoryError
        return write(part)

    monkeypatch.setattr(Part, "write", fail_later)
    answer = call(native, lines_case((LINE + b"\n") * 10_000))
    assert json.loads(answer.body.splitlines()[-1])["detail"].startswith("internal error")
    ((status, n_rows, _),) = sink.seen
    assert (status, n_rows) == (200, answer.body.count(b"\n") - 1)


def test_line_in_small_pieces_takes_no_memory() -> None:
    """A client that sends a byte at a time, and never ends its line, costs no more than these bytes."""
    service, left = app.make_service(make_settings(limits={"max_body_bytes": 200_000})), 300_000

    async def read(size: int) -> bytes:
        nonlocal left
        left -= 1
        return b"x" if left else b""

    fields = {"content-type": "application/jsonl", "transfer-encoding": "chunked"}
    request = Request("POST", "/predictions", "", fields.get, read, ThreadBatcher(service.queue))
    tracemalloc.start()
    with pytest.raises(ContentTooLarge, match="a line is longer than 200000 bytes; send a row in each"):
        run_now(predict_lines(service, request))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_000_000


@pytest.mark.parametrize("size", [50_000, 131_072, 262_144, 1_000_000])
def test_lines_are_read_together_however_they_come(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn hands on up to 256 KiB at once, which is more than what is read at once: no line is read by itself."""
    service = app.make_service(make_settings())
    body = (LINE + b"\n") * 20_000
    read_alone: list[Part] = []
    monkeypatch.setattr(Part, "read", lambda part, hints: read_alone.append(part))

    async def ask() -> int:
        batcher = LoopBatcher(service.queue, asyncio.get_running_loop())
        pieces = iter([body[start : start + size] for start in range(0, len(body), size)])

        async def read(_: int) -> bytes:
            return next(pieces, b"")

        fields = {"content-type": "application/jsonl", "transfer-encoding": "chunked"}
        request = Request("POST", "/predictions", "", fields.get, read, batcher)
        response = await predict_lines(service, request)
        assert response.rest is not None
        return sum(
            [piece.count(b'{"prediction":"setosa"') async for piece in response.rest],
            response.pieces[0].count(b'{"prediction":"setosa"'),
        )

    assert asyncio.run(ask()) == 20_000
    assert read_alone == []


@hypothesis.given(text=st.lists(st.binary(max_size=30)).map(b"\n".join), size=st.integers(1, 50))
def test_blocks_are_cut_between_lines(text: bytes, size: int) -> None:
    """No byte is lost but the newlines between parts, and only a line that is longer makes a part long."""
    parts = [*cut_between_lines(text, size)]
    assert b"\n".join(parts) == text
    longest = max(map(len, text.split(b"\n")))
    assert all(len(part) <= 1.5 * size + 2 * longest + 2 for part in parts)

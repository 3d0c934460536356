"""`gunicorn -c gunicorn.conf.py` with both frameworks and both workers, as real processes."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trustme

from tests.lib.cases import BAD, DIFFERENT, GOOD, HEADS, JSON, MALFORMED, QUERY, Case, head
from tests.lib.clients import ROW, check, post_case, read_answer
from tests.lib.proc import count_files, count_threads, cpu_ticks, is_alive, peak_mb
from tests.lib.servers import (
    COMBINATIONS,
    GUNICORN,
    PROJECT,
    WAIT_S,
    Server,
    Starter,
    gunicorn_environment,
    gunicorn_with,
    run,
    run_gunicorn,
    wait_until,
)
from tests.lib.sizes import each_combination, each_worker

LONG = "600"  # seconds, for which `Server.stop` does not wait
CROSSED = [("flask", "uvicorn"), ("fastapi", "gevent")]
Servers = dict[tuple[str, str], Server]
HEAD = b"POST /predictions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nX-Request-ID: test\r\n"


@pytest.mark.parametrize("case", GOOD + BAD, ids=lambda case: case.id)
def test_combinations_answer_alike(servers: Servers, case: Case) -> None:
    """All four give the same status, headers and body, and leave the connection as they say."""
    answers = {pair: server.send(case) for pair, server in servers.items()}
    first = answers[COMBINATIONS[0]]
    assert all(answer == first for answer in answers.values()), answers
    check(case, first)


@pytest.mark.parametrize(("raw", "status"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED])
def test_malformed_http_is_refused_alike(servers: Servers, raw: bytes, status: int) -> None:
    """Bytes that are no HTTP request get the same JSON error from all four, and the connection ends."""
    answers = [server.exchange(raw) for server in servers.values()]
    answer = answers[0]
    assert answers == [answer] * len(COMBINATIONS)
    assert answer.status == status
    assert answer.json.keys() == {"detail"}
    assert answer.headers["connection"] == "close"
    assert answer.headers["x-request-id"] == "made"


@pytest.mark.parametrize(("raw", "status", "is_last"), [case[1:] for case in HEADS], ids=[case[0] for case in HEADS])
def test_heads_are_read_alike(servers: Servers, raw: bytes, status: int, is_last: bool) -> None:
    """Old clients and those of proxies get the same answer from all four, and the connection stays or ends alike."""
    method = raw.split()[0].decode()
    answers = [server.exchange(raw, method) for server in servers.values()]
    answer = answers[0]
    assert answers == [answer] * len(COMBINATIONS)
    assert (answer.status, "connection" in answer.headers) == (status, is_last)


def test_server_is_not_named(server: Server) -> None:
    """No answer says which server it comes from, nor which version of HTTP an old client has sent."""
    for raw in (head("GET /ping"), head("GET /nope"), head("GET /ping", version="1.0"), b"nonsense\r\n\r\n"):
        with server.connect() as client:
            client.sendall(raw)
            client.shutdown(socket.SHUT_WR)
            text = b"".join(iter(lambda: client.recv(65536), b""))
        assert text.startswith(b"HTTP/1.1 ")
        assert b"\r\nserver:" not in text.lower()


@pytest.mark.parametrize(("raw", "statuses"), [case[1:] for case in DIFFERENT], ids=[case[0] for case in DIFFERENT])
def test_workers_differ_where_the_standard_lets_them(servers: Servers, raw: bytes, statuses: dict[str, int]) -> None:
    """Where the parsers of the workers differ, each gives its own status in JSON, and no framework matters."""
    for (_, worker), server in servers.items():
        answer = server.exchange(raw)
        assert (answer.status, answer.headers["content-type"]) == (statuses[worker], "application/json")


@pytest.mark.parametrize("size", [8190, 8191])
def test_limits_of_the_head_are_the_same_to_the_byte(servers: Servers, size: int) -> None:
    """A request line, and a field of the header, may have 8190 bytes, under every worker."""
    line = b"GET /ping?a=" + b"x" * (size - len(b"GET /ping?a= HTTP/1.1")) + b" HTTP/1.1"
    field = b"X-Long: " + b"x" * (size - len(b"X-Long: \r\n"))
    for server in servers.values():
        assert server.exchange(line + b"\r\nHost: x\r\n\r\n").status == (200 if size == 8190 else 414)
        answer = server.exchange(b"GET /ping HTTP/1.1\r\nHost: x\r\n" + field + b"\r\n\r\n")
        assert answer.status == (200 if size == 8190 else 431)


@pytest.mark.parametrize(
    "start",
    [
        b"GET /ping HTTP/1.1\r\nHost: x\r\nX-Endless: ",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n0\r\nX-Endless: ",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n2;extension=",
    ],
    ids=["header", "trailer", "extension"],
)
def test_endless_field_is_refused(server: Server, start: bytes) -> None:
    """What has no end is not stored: an answer, or the connection's end, comes before 16 MB of it are sent."""
    with server.connect() as client, contextlib.suppress(ConnectionError):
        client.sendall(start)
        sent = 0
        while not select.select([client], [], [], 0)[0]:
            client.sendall(b"x" * 65536)
            sent += 65536
            assert sent < 2**24
    assert server.get("/ping").status == 200


def test_refusal_is_read_by_a_client_that_goes_on_sending(server: Server) -> None:
    """A refusal is not lost to a reset, though the server has not read what the client sent."""
    with server.connect() as client:
        client.sendall(b"GET /ping?a=" + b"x" * 9000)
        assert select.select([client], [], [], WAIT_S)[0]
        for _ in range(10):
            client.sendall(b"x" * 65536)
        assert read_answer(client).status == 414


def test_every_pipelined_upgrade_is_answered(server: Server) -> None:
    """Requests that ask for an upgrade, which is not offered, are requests like others, however many."""
    raw = b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
    with server.connect() as client:
        client.sendall(raw * 500)
        client.shutdown(socket.SHUT_WR)
        text = b"".join(iter(lambda: client.recv(65536), b""))
    assert re.findall(rb"HTTP/1\.1 (\d+)", text) == [b"200"] * 500


def test_header_of_another_name_is_another_header(server: Server) -> None:
    """`X_Request_ID` does not pass for `X-Request-ID`, nor does a trailer, nor do a proxy's `SCRIPT_NAME`."""
    headers = b"X_Request_ID: other\r\nSCRIPT_NAME: /pi\r\nPATH_INFO: /other\r\n"
    answer = server.exchange(b"GET /ping HTTP/1.1\r\nHost: x\r\nX-Request-ID: mine\r\n" + headers + b"\r\n")
    assert (answer.status, answer.headers["x-request-id"]) == (200, "mine")
    body = b"2\r\n[]\r\n0\r\nX-Request-ID: trailer\r\n\r\n"
    answer = server.exchange(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body)
    assert (answer.status, answer.headers["x-request-id"]) == (200, "test")


@pytest.mark.parametrize("half_close", [False, True])
def test_garbage_after_good_requests_does_not_harm_them(server: Server, half_close: bool) -> None:
    """Each request before the bytes that are no HTTP gets its own answer; then comes the refusal, and the end."""
    good = [Case(f"good-{number}", "POST", "/predictions", JSON, b"[]") for number in range(3)]
    with server.connect() as client:
        client.sendall(b"".join(case.raw() for case in good) + b"nonsense\r\n\r\n")
        if half_close:
            client.shutdown(socket.SHUT_WR)
        text = b"".join(iter(lambda: client.recv(65536), b""))
    assert re.findall(rb"HTTP/1\.1 (\d+)", text) == [b"200"] * 3 + [b"400"]
    assert re.findall(rb"(?i)x-request-id: (good-\d)", text) == [b"good-0", b"good-1", b"good-2"]


def test_no_bad_request_is_a_crash(servers: Servers) -> None:
    """After the tables, no server has logged an error, and each still has the worker it had before."""
    for server in servers.values():
        before = server.worker_pids
        for case in BAD:
            server.send(case)
        assert not [line for line in server.lines if line["level"] in ("error", "critical")]
        assert server.worker_pids == before


def test_keep_alive_serves_good_and_bad_requests_on_one_connection(server: Server) -> None:
    """An error in the contract leaves the connection open for the next request."""
    cases = [case for case in GOOD + BAD if not case.cut and case.status != 413 and case.id != "connection-close"]
    with server.connect() as client:
        for case in cases:
            client.sendall(case.raw())
            assert read_answer(client, case.method).status == case.status, case.id


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    """Requests sent without waiting are answered one after the other."""
    cases = [case for case in GOOD[:5] if not case.cut]
    with server.connect() as client:
        client.sendall(b"".join(case.raw() for case in cases))
        stream = client.makefile("rb")
        text = b""
        while text.count(b"HTTP/1.1 200") < len(cases):
            text += stream.readline()
        assert [text.index(f": {case.id}\r\n".encode()) for case in cases[:-1]] == sorted(
            text.index(f": {case.id}\r\n".encode()) for case in cases[:-1]
        )


def test_declared_large_body_is_refused_without_being_sent(server: Server) -> None:
    """The header alone is enough for 413: no byte of the body is waited for."""
    with server.connect() as client:
        client.sendall(HEAD + b"Content-Length: 10000000000\r\n\r\n")
        answer = read_answer(client)
    assert answer.status == 413
    assert answer.headers["connection"] == "close"


def test_expected_large_body_is_refused_without_100_continue(servers: Servers) -> None:
    """Under uvicorn a client that asks first is told 413 at once; gunicorn's parser says 100 before any app runs."""
    for (_, worker), server in servers.items():
        with server.connect() as client:
            client.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 10000000000\r\n\r\n")
            status_line = client.makefile("rb").readline()
        assert status_line.split()[1] == (b"413" if worker == "uvicorn" else b"100")


def test_endless_chunked_body_is_refused_while_it_is_sent(server: Server) -> None:
    """A body without an end is refused past the limit, and the client that goes on sending can read the answer."""
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    with server.connect() as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        client.sendall(chunk * 130)  # 8.5 MB of a limit of 8.4
        assert select.select([client], [], [], WAIT_S)[0]
        for _ in range(20):
            client.sendall(chunk)
        assert read_answer(client).status == 413


def test_malformed_chunk_is_a_bad_request(server: Server) -> None:
    """A chunk whose size is no number gets the same 400 as a body that is cut short."""
    answer = server.exchange(HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n[1\r\nzz\r\n")
    assert answer.status == 400
    assert "chunks are malformed" in answer.json["detail"]


@pytest.mark.parametrize("framing", [b"Content-Length: 1000\r\n\r\n[", b"Transfer-Encoding: chunked\r\n\r\n5\r\n["])
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_client_that_leaves_pins_nothing(server: Server, framing: bytes, reset: bool) -> None:
    """Bodies cut short by clients that are gone leave no connection and no busy processor behind."""
    (pid,) = server.worker_pids
    before = count_files(pid)
    for _ in range(20):
        client = server.connect()
        client.sendall(HEAD + framing)
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    wait_until(lambda: count_files(pid) <= before, "the connections to be gone")
    assert busy_share(pid) < 0.5
    assert server.get("/ping").status == 200


def busy_share(pid: int) -> float:
    """Measure the processor time that a process takes while this one is busy, as a share of what this one gets."""
    before, begun_s = cpu_ticks(pid), time.process_time()
    while (own_s := time.process_time() - begun_s) < 0.3:
        pass
    return (cpu_ticks(pid) - before) / os.sysconf("SC_CLK_TCK") / own_s


def test_client_that_leaves_before_its_answer_leaves_nothing(server: Server) -> None:
    """Whole requests whose clients do not stay for the answer leave no connection and no thread behind."""
    (pid,) = server.worker_pids
    server.post([ROW] * 100)
    before, threads = count_files(pid), count_threads(pid)
    body = Case("left", "POST", "/predictions", JSON, b"[" + b",".join([b"{}"] * 1000) + b"]").raw()
    for _ in range(20):
        client = server.connect()
        client.sendall(body)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    wait_until(lambda: count_files(pid) <= before, "the connections to be gone")
    assert count_threads(pid) <= threads + 10  # a2wsgi's pool grows to its ten
    assert server.post(ROW).status == 200


def test_half_closed_client_gets_its_answer(server: Server) -> None:
    """A client that says it will send no more still reads the answer to what it sent."""
    answer = server.exchange(Case("half", "GET", f"/predictions?{QUERY}").raw(), half_close=True)
    assert answer.status == 200


def test_idle_connection_ends(serve: Starter) -> None:
    """A connection on which no request becomes whole ends after `server.keepalive`, the first time too."""
    for worker in ("uvicorn", "gevent"):
        server = serve(**gunicorn_environment("fastapi", worker, SERVING_SERVER__KEEPALIVE="1"))
        with server.connect() as silent, server.connect() as slow, server.connect() as answered:
            slow.sendall(b"GET /pi")
            answered.sendall(Case("ping", "GET", "/ping").raw())
            assert read_answer(answered).status == 200
            assert [client.recv(1) for client in (silent, slow, answered)] == [b""] * 3


def test_uvicorn_and_gevent_report_their_worker(servers: Servers) -> None:
    """`server.worker_class` decides the worker that gunicorn runs, as the log says."""
    for (framework, worker), server in servers.items():
        assert f'"framework":"{framework}","worker_class":"{worker}"' in server.text


ROUTES = """
import asyncio
import app

native = app.create_app()
if hasattr(native, "wsgi_app"):
    import flask

    @native.post("/length")
    def length():
        return flask.jsonify(len(flask.request.get_data()))
else:
    import fastapi

    @native.post("/length")
    async def length(request: fastapi.Request) -> int:
        return len(await request.body())

    ending = asyncio.Event()

    @native.get("/stream")
    async def stream():
        async def pieces():
            yield b"first"
            await ending.wait()
            yield b"last"

        return fastapi.responses.StreamingResponse(pieces())

    @native.get("/end")
    async def end():
        ending.set()

    native.state.n_pieces = 0

    @native.get("/flood")
    async def flood():
        async def pieces():
            for number in range(16_000):
                native.state.n_pieces = number
                yield bytes(65_536)

        return fastapi.responses.StreamingResponse(pieces())

    @native.get("/pieces")
    async def count_pieces() -> int:
        return native.state.n_pieces

    @native.get("/exit")
    async def leave():
        raise SystemExit(1)

    @native.get("/cancel")
    async def cancel():
        raise asyncio.CancelledError

    class Silent:
        async def __call__(self, scope, receive, send):
            pass

    native.add_route("/silent", Silent())

@native.get("/crash")
def crash():
    raise RuntimeError("the route is broken")

asgi = app.as_asgi(native)
wsgi = app.as_wsgi(native)
"""


@pytest.fixture(scope="module")
def routes_servers(serve_module: Starter, project: Path) -> dict[str, Server]:
    """FastAPI with a user's routes, by worker."""
    (project / "routes.py").write_text(ROUTES)
    workers = ("uvicorn", "gevent")

    def start(worker: str) -> Server:
        return serve_module(gunicorn_with("routes", worker), project, **gunicorn_environment("fastapi", worker))

    with ThreadPoolExecutor() as pool:
        return dict(zip(workers, pool.map(start, workers), strict=True))


@each_combination()
def test_routes_of_a_user_work(serve: Starter, project: Path, combination: tuple[str, str]) -> None:
    """A route added to the framework's object gets whole bodies, and its crash is one line with the traceback."""
    (project / "routes.py").write_text(ROUTES)
    server = serve(gunicorn_with("routes", combination[1]), project, **gunicorn_environment(*combination))
    for chunked in (True, False):
        assert server.send(Case("length", "POST", "/length", (), bytes(100_000), chunked=chunked)).json == 100_000
    cut = server.send(Case("cut", "POST", "/length", (), b"[1,", cut=True))
    assert cut.status == (500 if combination == ("fastapi", "uvicorn") else 400)  # Starlette's own: a client that left
    if combination in CROSSED:
        assert cut.headers["x-request-id"] == "cut"
        assert server.send(Case("large", "POST", "/length", (), bytes(8_388_609))).status == 413
    assert server.get("/crash").status == 500
    server.stop()
    crashes = [line for line in server.lines if "the route is broken" in line.get("exception", "")]
    assert [line["level"] for line in crashes] == ["error"]


def test_streamed_pieces_are_sent_as_they_come(routes_servers: dict[str, Server]) -> None:
    """A route's first piece is with the client while the next is still being made."""
    server = routes_servers["uvicorn"]
    with server.connect() as client:
        client.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        stream = client.makefile("rb")
        assert b"first\r\n" in iter(stream.readline, b"")
        assert server.get("/end").status == 200
        assert b"last\r\n" in iter(stream.readline, b"")


@pytest.mark.parametrize("path", ["/exit", "/cancel", "/silent"])
def test_route_without_an_answer_is_a_crash(routes_servers: dict[str, Server], path: str) -> None:
    """A FastAPI route that ends in no answer gets one under gevent, and the worker goes on."""
    server = routes_servers["gevent"]
    assert server.get(path).json == {"detail": "internal error"}
    assert server.get("/ping").status == 200


EXTENDED = """
import asyncio
import contextlib
import fastapi
import app

@contextlib.asynccontextmanager
async def lifespan(_):
    print("event: started", flush=True)
    yield {"colour": "violet"}
    await asyncio.to_thread(print, "event: in a thread", flush=True)
    print("event: stopped", flush=True)

native = app.create_app()
native.router.lifespan_context = lifespan

@native.get("/colour")
async def colour(request: fastapi.Request) -> str:
    return request.state.colour

asgi = app.as_asgi(native)
wsgi = app.as_wsgi(native)
"""


@pytest.mark.parametrize("worker", ["uvicorn", "gevent"])
def test_lifespan_runs(serve: Starter, project: Path, worker: str) -> None:
    """An extended FastAPI gets its start-up event before the first request, its state, and its shut-down event."""
    (project / "extended.py").write_text(EXTENDED)
    server = serve(gunicorn_with("extended", worker), project, **gunicorn_environment("fastapi", worker))
    assert server.text.index("event: started") < server.text.index('"path":"/ping"')
    assert server.get("/colour").json == "violet"
    assert server.stop() == 0
    assert re.findall("event: (.+)", server.text) == ["started", "in a thread", "stopped"]
    assert "Traceback" not in server.text


def test_lifespan_ends_with_other_servers(serve: Starter, project: Path) -> None:
    """A server that does not know of the shut-down event has it run too, when its worker ends."""
    (project / "extended.py").write_text(EXTENDED)
    command = "gunicorn extended:wsgi --bind 127.0.0.1:0 --workers 1 --worker-class gevent"
    server = serve(command, project, SERVING_FRAMEWORK="fastapi")
    assert server.get("/colour").json == "violet"
    assert server.stop() == 0
    assert re.findall("event: (.+)", server.text) == ["started", "in a thread", "stopped"]


@pytest.mark.parametrize("worker", ["uvicorn", "gevent"])
def test_failed_start_up_event_ends_the_service(project: Path, worker: str) -> None:
    """What a start-up event raises stops the process, under both workers."""
    (project / "failing.py").write_text(EXTENDED.replace('print("event: started", flush=True)', "raise OSError('no')"))
    done = run(gunicorn_with("failing", worker), project, **gunicorn_environment("fastapi", worker))
    assert done.returncode == 3
    assert "OSError: no" in done.stderr


@each_worker()
def test_options_win_over_the_settings(serve: Starter, combination: tuple[str, str]) -> None:
    """Gunicorn's options act alike under both workers, and are what the log and the thread budget say."""
    options = "--workers 2 --keep-alive 1 --limit-request-line 200 --limit-request-fields 20 --log-level debug"
    environment = gunicorn_environment(*combination, SERVING_SERVER__WORKERS="1", SERVING_SERVER__KEEPALIVE="60")
    server = serve(f"{GUNICORN} {options}", **environment)
    budget = json.loads(re.findall('.*"event":"core_budget".*', server.text)[0])
    assert (budget["workers"], budget["threads"]) == (2, max(1, budget["cores"] // 2))
    assert '"level":"debug"' in server.text
    server.wait_for_workers(2)
    long = server.get(f"/predictions?{'x' * 200}")
    assert (long.status, long.json["detail"]) == (414, "the request line is too long; send at most 200 bytes")
    fields = tuple((f"X-{number}", "1") for number in range(20))
    assert server.exchange(Case("fields", "GET", "/ping", fields).raw()).status == 431
    with server.connect() as client:
        client.sendall(Case("ping", "GET", "/ping").raw())
        assert read_answer(client).status == 200
        assert client.recv(1) == b""  # after a second, and not after a minute
    assert server.stop() == 0


@each_worker()
def test_limits_of_the_head_are_gunicorns(serve: Starter, combination: tuple[str, str]) -> None:
    """A limit of 0 stands for a large one, and a line has 8190 bytes at most, as gunicorn's own parser has it."""
    options = "--limit-request-line 0 --limit-request-fields 0 --limit-request-field_size 0"
    server = serve(f"{GUNICORN} {options}", **gunicorn_environment(*combination))
    fields = tuple((f"X-{number}", "1") for number in range(120))
    assert server.exchange(Case("fields", "GET", "/ping", fields).raw()).status == 200
    assert server.get(f"/predictions?{'x' * 9000}").status == 422
    assert server.stop() == 0
    server = serve(f"{GUNICORN} --limit-request-line 9000", **gunicorn_environment(*combination))
    long = server.get(f"/predictions?{'x' * 8500}")
    assert (long.status, long.json["detail"]) == (414, "the request line is too long; send at most 8190 bytes")
    assert server.stop() == 0


@each_worker()
def test_options_of_the_environment_count_too(serve: Starter, combination: tuple[str, str]) -> None:
    """So does GUNICORN_CMD_ARGS, also at a reload, and WEB_CONCURRENCY where the settings leave it open."""
    environment = gunicorn_environment(*combination, WEB_CONCURRENCY="3", GUNICORN_CMD_ARGS="--max-requests 1000")
    del environment["SERVING_SERVER__WORKERS"]
    server = serve(**environment)
    server.wait_for_workers(3)
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: '"event":"reloaded"' in server.text, "the reload")
    assert re.findall('"workers":([0-9]+)', server.text) == ["3", "3"]
    server.wait_for_workers(3)
    assert server.stop() == 0


PRINTED = {
    "workers": ("3", "3"),
    "bind": ('["127.0.0.1:1", "127.0.0.1:2"]', "['127.0.0.1:1', '127.0.0.1:2']"),
    "backlog": ("7", "7"),
    "timeout": ("11", "11"),
    "graceful_timeout": ("12", "12"),
    "keepalive": ("13", "13"),
    "max_requests": ("14", "14"),
    "max_requests_jitter": ("15", "15"),
}


@pytest.mark.parametrize(("framework", "wsgi_app"), [("fastapi", "app:asgi"), ("flask", "app:wsgi")])
def test_settings_reach_gunicorn(framework: str, wsgi_app: str) -> None:
    """Each setting of [server] is what gunicorn says it runs with."""
    settings = {f"SERVING_SERVER__{name.upper()}": text for name, (text, _) in PRINTED.items()}
    done = run_gunicorn("--print-config", SERVING_FRAMEWORK=framework, **settings)
    printed = {
        name.strip(): text.strip() for name, _, text in (line.partition("=") for line in done.stdout.splitlines())
    }
    expected = {name: text for name, (_, text) in PRINTED.items()}
    expected |= {"wsgi_app": wsgi_app, "control_socket_disable": "True"}
    assert {name: printed[name] for name in expected} == expected


@each_worker()
def test_tls(serve: Starter, tmp_path: Path, combination: tuple[str, str]) -> None:
    """With certificate and key of [server], whose paths are relative to the settings file, it is HTTPS."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    for blob in issued.cert_chain_pems:
        blob.write_to_path(tmp_path / "certificate.pem", append=True)
    file = tmp_path / "settings.toml"
    model = f'[model]\npath = "{PROJECT / "model/iris.skops"}"\n'
    file.write_text(f'{model}[server]\ncertfile = "certificate.pem"\nkeyfile = "key.pem"\n')
    context = ssl.create_default_context()
    authority.configure_trust(context)
    waits = {"SERVING_SERVER__GRACEFUL_TIMEOUT": LONG, "SERVING_SERVER__KEEPALIVE": LONG}
    environment = {"SERVING_SETTINGS": str(file), **waits}
    server = serve(tls=context, **gunicorn_environment(*combination, **environment))
    assert server.post(ROW).json["prediction"] == "setosa"
    assert server.reload()["event"] == "reloaded"
    assert server.post(ROW).json["prediction"] == "setosa"
    (tmp_path / "key.pem").write_bytes(authority.issue_cert("127.0.0.1").private_key_pem.bytes())
    refused = server.reload()
    assert refused["event"] == "reload_refused"
    assert "certificate.pem'; it should be a certificate in PEM, with its key" in refused["reason"]
    with server.connect() as client:  # which does not close
        client.sendall(post_case(ROW).raw())
        assert read_answer(client, "POST").json["prediction"] == "setosa"
        assert server.stop() == 0


@each_worker()
def test_files_of_options_are_found_from_the_working_directory(
    serve: Starter, tmp_path: Path, combination: tuple[str, str]
) -> None:
    """A path that is given on the command line starts where gunicorn was started, as with every other tool."""
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    command = f"gunicorn -c {PROJECT / 'gunicorn.conf.py'} --certfile both.pem --keyfile both.pem"
    server = serve(command, tmp_path, tls=context, is_shipped=True, **gunicorn_environment(*combination))
    assert server.post(ROW).json["prediction"] == "setosa"
    assert server.stop() == 0


def test_configuration_is_found_from_another_folder(serve: Starter, tmp_path: Path) -> None:
    """`-c` with a path works from anywhere: settings, model and code lie beside it."""
    command = f"gunicorn -c {PROJECT / 'gunicorn.conf.py'}"
    server = serve(command, tmp_path, is_shipped=True, **gunicorn_environment("flask", "gevent"))
    assert server.post(ROW).json["prediction"] == "setosa"


@each_worker()
def test_stop_ends_every_process(serve: Starter, combination: tuple[str, str]) -> None:
    """TERM ends master and workers with status 0."""
    environment = {"SERVING_SERVER__WORKERS": "2", "SERVING_SERVER__GRACEFUL_TIMEOUT": LONG}
    server = serve(**gunicorn_environment(*combination, **environment))
    pids = server.wait_for_workers(2)
    assert server.stop(signal.SIGTERM) == 0  # no worker missed the signal while it booted
    assert not any(map(is_alive, pids))


def test_field_that_is_too_long_is_refused_before_the_head_ends(servers: dict[tuple[str, str], Server]) -> None:
    """The answer comes as soon as it is known, not when the connection is given up."""
    server = servers["fastapi", "uvicorn"]
    with server.connect() as older, server.connect() as client:  # the older would be given up first
        older.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\nX-More: ")
        client.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 9000 + b"\r\nX-More: ")
        assert read_answer(client).status == 431
        assert not select.select([older], [], [], 0)[0]


def test_long_answer_reaches_a_client_that_has_closed_its_side(server: Server) -> None:
    """A client that sends no more still gets the whole answer."""
    answer = server.exchange(post_case([ROW] * 5000).raw(), "POST", half_close=True)
    assert len(answer.json) == 5000


def test_stream_waits_for_a_client_that_does_not_read(routes_servers: dict[str, Server]) -> None:
    """A route that streams a gigabyte does not put it all into memory."""
    server = routes_servers["uvicorn"]
    (pid,) = server.worker_pids
    with server.connect() as client:
        client.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        client.recv(1000)
        wait_until(lambda: server.get("/pieces").json == server.get("/pieces").json, "a route that waits, or is done")
    assert peak_mb(pid) < 400
    assert server.get("/ping").status == 200

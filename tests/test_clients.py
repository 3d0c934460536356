"""Clients that read nothing, clients that never stop, and what comes of the others meanwhile, on real servers.

The tests have up to 3000 connections open, and so has a worker: the hard limit of open files has to be 4000 at least.
"""

import asyncio
import contextlib
import re
import resource
import select
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import fastapi
import flask
import pytest
import trustme
from starlette.responses import Response
from starlette.routing import Route
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import app
from tests.lib.apps import call, call_asgi, call_wsgi, make_settings
from tests.lib.cases import JSON, QUERY, Case
from tests.lib.clients import ROW, Answer, post_case, read_answer
from tests.lib.proc import count_files, private_mb
from tests.lib.servers import (
    COMBINATIONS,
    GUNICORN,
    Server,
    Starter,
    gunicorn_environment,
    gunicorn_with,
    run_gunicorn,
    wait_until,
)
from tests.lib.sizes import TWINS, each_combination, each_worker, scale

HEARTBEAT_S, SEND_S = 3, 2
PATIENT = {
    "SERVING_SERVER__TIMEOUT": str(HEARTBEAT_S),
    "SERVING_SERVER__SEND_TIMEOUT": str(SEND_S),
    "SERVING_SERVER__KEEPALIVE": "30",  # so that nothing ends for another reason
    "SERVING_SERVER__MAX_REQUESTS_PER_CONNECTION": "0",
    "SERVING_LOGGING__ACCESS": "false",
}
PING = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
DOCUMENT = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY_BYTES = 8_388_608


@pytest.fixture(scope="module", autouse=True)
def many_files() -> Iterator[None]:
    """Let this process have as many connections as the hard limit lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def patient_servers(serve_module: Starter) -> dict[tuple[str, str], Server]:
    """Servers with short time-outs and no bound of requests."""
    return serve_module.each(scale(TWINS, COMBINATIONS), **PATIENT)


@pytest.fixture(params=scale(TWINS, COMBINATIONS), ids="-".join)
def patient(request: pytest.FixtureRequest, patient_servers: dict[tuple[str, str], Server]) -> Server:
    return patient_servers[request.param]


class Deaf:
    """Clients that send requests and read none of the answers, from `with` to its end."""

    def __init__(self, server: Server, raw: bytes, count: int) -> None:
        self.server, self.raw, self.count = server, raw, count
        self.clients: list[socket.socket] = []

    def __enter__(self) -> Self:
        for _ in range(self.count):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.settimeout(30)
            client.connect(("127.0.0.1", self.server.port))
            if self.server.tls:
                client = self.server.tls.wrap_socket(client, server_hostname="127.0.0.1")
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError, ssl.SSLWantWriteError):
                client.send(self.raw)
            self.clients.append(client)
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.clients:
            client.close()


def test_clients_that_do_not_read_silence_nobody(patient: Server) -> None:
    """Beside 1100 clients that pipeline and read nothing all others are answered."""
    (pid,) = patient.worker_pids
    before = count_files(pid), patient.text.count("client_cut_off")
    with Deaf(patient, DOCUMENT * 300, 1100):
        assert [patient.get("/ping").status for _ in range(20)] == [200] * 20
        accepted = count_files(pid) - before[0] + patient.text.count("client_cut_off") - before[1]
        assert accepted > 1000  # of which the first may be cut off by now
    assert patient.worker_pids == [pid]
    assert not [line for line in patient.lines if line["level"] in ("error", "critical")]


def test_clients_that_do_not_read_are_cut_off(patient: Server) -> None:
    """Clients that take nothing of what is sent to them are let go, though they stay."""
    (pid,) = patient.worker_pids
    before = patient.text.count("client_cut_off")
    with Deaf(patient, DOCUMENT * 400, 40):
        wait_until(lambda: patient.text.count("client_cut_off") >= before + 40, "the clients to be cut off")
    assert patient.worker_pids == [pid]


def test_newcomer_is_answered_beside_idle_connections(patient: Server) -> None:
    """Of 3000 idle connections none has to end before a newcomer is answered."""
    (pid,) = patient.worker_pids
    with Deaf(patient, b"", 3000):
        assert patient.get("/ping").status == 200
        assert wait_until(lambda: count_files(pid) > 3000, "all to be accepted")
        assert patient.get("/ping").status == 200
        assert count_files(pid) > 3000
    assert patient.worker_pids == [pid]


class Flood:
    """Clients that send the same bytes again and again, and read what comes, from `with` to its end."""

    def __init__(self, server: Server, start: bytes, again: bytes, count: int = 3) -> None:
        self.server, self.start, self.again = server, start, again
        self.sent_bytes = self.connections = 0
        self.ending = threading.Event()
        self.threads = [threading.Thread(target=self.run) for _ in range(count)]

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        for thread in self.threads:
            thread.join(30)

    def run(self) -> None:
        while not self.ending.is_set():
            with contextlib.suppress(OSError), self.server.connect() as client:
                self.connections += 1
                client.sendall(self.start)
                client.setblocking(False)
                self.go_on(client)

    def go_on(self, client: socket.socket) -> None:
        later = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
        rest = b""
        while not self.ending.is_set():
            select.select([client], [client], [], 0.1)
            rest = rest or self.again
            with contextlib.suppress(*later):
                size = client.send(rest)
                self.sent_bytes += size
                rest = rest[size:]
            with contextlib.suppress(*later):
                if not client.recv(1 << 18):
                    return


CHUNKED = POST % b"/predictions" + b"Transfer-Encoding: chunked\r\n\r\n"
FLOODS = {
    "pipeline": (b"", b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\n" * 200),
    "one-byte-chunks": (CHUNKED, b"1\r\n \r\n" * 4000),
    "refused": (b"nonsense\r\n\r\n", b"x" * 65536),
    "close": (b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"x" * 100),
}


@pytest.mark.in_turn
@pytest.mark.parametrize("kind", FLOODS)
def test_floods_hold_nobody_up(patient: Server, kind: str) -> None:
    """While three clients never stop sending, others are answered, and the worker gives its signs of life."""
    check_flood(patient, *FLOODS[kind])


def check_flood(server: Server, start: bytes, again: bytes) -> None:
    (pid,) = server.worker_pids
    end = time.monotonic() + 2 * HEARTBEAT_S
    answers = []
    with Flood(server, start, again) as flood:
        while time.monotonic() < end or len(answers) < 5:
            answers.append(server.get(f"/predictions?{QUERY}").status)
    assert set(answers) == {200}
    assert flood.sent_bytes > 10_000
    assert server.worker_pids == [pid]


LARGE_BYTES = 20_000_000
LARGE = f"""
import app

native = app.create_app()
content = bytes({LARGE_BYTES})
if hasattr(native, "wsgi_app"):
    native.add_url_rule("/large", view_func=lambda: content)
else:
    import fastapi

    native.add_api_route("/large", lambda: fastapi.Response(content))
asgi, wsgi = app.as_asgi(native), app.as_wsgi(native)
"""
GET_LARGE = b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module", params=["uvicorn", "gevent"])
def tls_server(
    request: pytest.FixtureRequest, serve_module: Starter, tmp_path_factory: pytest.TempPathFactory
) -> Server:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    (folder / "large.py").write_text(LARGE)
    framework = "fastapi" if request.param == "uvicorn" else "flask"
    more = {"SERVING_SERVER__CERTFILE": str(folder / "both.pem"), "PYTHONPATH": str(folder)}
    environment = gunicorn_environment(framework, request.param, **PATIENT, **more)
    return serve_module(gunicorn_with("large", request.param), tls=context, **environment)


def test_tls_clients_are_no_exception(tls_server: Server) -> None:
    """Under TLS too a flood holds nobody up, and clients that read nothing are cut off."""
    check_flood(tls_server, *FLOODS["pipeline"])
    (pid,) = tls_server.worker_pids
    before = count_files(pid)
    with Deaf(tls_server, DOCUMENT * 400, 20):
        wait_until(lambda: count_files(pid) >= before + 15, "the clients to be there")
        wait_until(lambda: count_files(pid) <= before + 5, "the clients to be cut off")
        assert tls_server.get("/ping").status == 200
    assert tls_server.worker_pids == [pid]


def test_large_answer_is_cut_off_by_what_is_taken_of_it(tls_server: Server) -> None:
    """Of an answer that is written at once, a client that reads slowly gets all, and one that does not is cut off."""
    before = tls_server.text.count("client_cut_off")
    with Deaf(tls_server, GET_LARGE, 3):
        wait_until(lambda: tls_server.text.count("client_cut_off") == before + 3, "the clients to be cut off")
    with tls_server.connect() as client:
        client.sendall(GET_LARGE)
        started, size = time.monotonic(), 0
        while size < LARGE_BYTES:
            size += len(client.recv(16_384))
            time.sleep(0.005)
        assert time.monotonic() - started > 2 * SEND_S


def test_slow_reader_gets_all(patient: Server) -> None:
    """A client that reads slowly, but reads, gets its answers, however long they take."""
    raw = post_case([ROW] * 10_000).raw()
    with socket.socket() as client, ThreadPoolExecutor() as pool:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        client.connect(("127.0.0.1", patient.port))
        sending = pool.submit(client.sendall, raw * 6)
        end = time.monotonic() + 4 * SEND_S
        size = 0
        while time.monotonic() < end:
            size += len(client.recv(256))
            time.sleep(0.02)
        answer = patient.post([ROW] * 10_000)
        while size < 6 * len(answer.body):
            piece = client.recv(1 << 20)
            assert piece, f"the connection ended after {size} bytes"
            size += len(piece)
        sending.result()


@each_worker()
def test_end_does_not_wait_for_clients_that_do_not_read(serve: Starter, combination: tuple[str, str]) -> None:
    """TERM beside clients that read nothing takes about `server.send_timeout`, not `server.graceful_timeout`."""
    server = serve(**gunicorn_environment(*combination, **PATIENT))
    (pid,) = server.worker_pids
    before = count_files(pid)
    with Deaf(server, DOCUMENT * 1000, 20):
        wait_until(lambda: count_files(pid) >= before + 15, "the clients to be there")
        started = time.monotonic()
        assert server.stop(signal.SIGTERM) == 0
        assert time.monotonic() - started < 15  # half of graceful_timeout
    assert "drain_cut_short" not in server.text


@pytest.fixture(scope="module")
def bounded_servers(serve_module: Starter) -> dict[tuple[str, str], Server]:
    """The four combinations, with five requests for each connection."""
    return serve_module.each(scale(TWINS, COMBINATIONS), SERVING_SERVER__MAX_REQUESTS_PER_CONNECTION="5")


@pytest.fixture(params=scale(TWINS, COMBINATIONS), ids="-".join)
def bounded(request: pytest.FixtureRequest, bounded_servers: dict[tuple[str, str], Server]) -> Server:
    return bounded_servers[request.param]


@pytest.mark.parametrize(
    "raw",
    [PING, post_case([ROW] * 2).raw(), PING + CHUNKED + b"2\r\n[]\r\n0\r\n\r\n"],
    ids=["ping", "array", "ping-and-chunks"],
)
def test_connection_has_its_number_of_requests(bounded: Server, raw: bytes) -> None:
    """The fifth answer says `Connection: close`, and no answer is lost, though the client has sent more."""
    with bounded.connect() as client:
        client.sendall(raw * 2000)
        text = b"".join(iter(lambda: client.recv(65536), b""))
    statuses, closes = (re.findall(pattern, text) for pattern in (rb"HTTP/1\.1 (\d+)", rb"(?i)connection: close\r"))
    assert (statuses, len(closes)) == ([b"200"] * 5, 1)
    assert text.rindex(closes[0]) > text.rindex(b"HTTP/1.1 200")


def test_connection_ends_after_its_last_answer(bounded: Server) -> None:
    """A client that waits for each answer gets five, of which the last ends the connection."""
    with bounded.connect() as client:
        answers = []
        for _ in range(5):
            client.sendall(PING)
            answers.append(read_answer(client).headers.get("connection"))
        assert answers == [None, None, None, None, "close"]
        assert client.recv(1) == b""


def stall(server: Server, raw: bytes) -> socket.socket:
    """Send most of a body of 8 MB, unless an answer comes before, and return the connection."""
    client = server.connect()
    client.sendall(raw + b"Content-Length: %d\r\n\r\n" % BODY_BYTES)
    with contextlib.suppress(ConnectionError):
        for _ in range(BODY_BYTES // 65536 - 1):
            if select.select([client], [], [], 0)[0]:
                break
            client.sendall(bytes(65536))
    return client


def grow_mb(pid: int, before_mb: float) -> float:
    """Return by how much the memory of a process is more at its most, in a stretch of a second."""
    end = time.monotonic() + 1
    most_mb = 0.0
    while time.monotonic() < end:
        most_mb = max(most_mb, private_mb(pid))
        time.sleep(0.1)
    return most_mb - before_mb


@pytest.fixture(scope="module")
def keyed_servers(serve_module: Starter) -> dict[tuple[str, str], Server]:
    """Servers that ask for a key."""
    return serve_module.each(scale(TWINS, COMBINATIONS), SERVING_AUTH__API_KEYS='["one"]')


@pytest.fixture(params=scale(TWINS, COMBINATIONS), ids="-".join)
def keyed(request: pytest.FixtureRequest, keyed_servers: dict[tuple[str, str], Server]) -> Server:
    return keyed_servers[request.param]


def test_key_is_asked_before_the_body(keyed: Server) -> None:
    """Bodies of 8 MB without a key take no memory: each is answered 401 before it is whole, and the connection ends."""
    (pid,) = keyed.worker_pids
    assert keyed.post(ROW, X_API_Key="one").status == 200
    before_mb = private_mb(pid)
    clients = [stall(keyed, POST % b"/predictions") for _ in range(40)]
    assert grow_mb(pid, before_mb) < 60
    for client in clients:
        with client:
            answer = read_answer(client)
            assert (answer.status, answer.headers["connection"]) == (401, "close")
            assert client.recv(1) == b""


def test_body_that_nobody_needs_is_not_kept(keyed: Server) -> None:
    """Bodies of 8 MB to a path that is not there are read, but take no memory."""
    (pid,) = keyed.worker_pids
    before_mb = private_mb(pid)
    clients = [stall(keyed, POST % b"/nope") for _ in range(40)]
    assert grow_mb(pid, before_mb) < 60
    for client in clients:
        client.close()
    with keyed.connect() as client:
        for _ in range(2):
            client.sendall(Case("nope", "POST", "/nope", JSON, bytes(1_000_000)).raw())
            assert read_answer(client).status == 404


def test_refused_key_without_a_body_leaves_the_connection_open(keyed: Server) -> None:
    """A query without a key gets its 401, and the next request of its connection is answered."""
    with keyed.connect() as client:
        client.sendall(f"GET /predictions?{QUERY} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = read_answer(client)
        assert (answer.status, answer.headers.get("connection")) == (401, None)
        client.sendall(PING)
        assert read_answer(client).status == 200


MARKED = """
import app

native = app.create_app()
if hasattr(native, "wsgi_app"):
    @native.after_request
    def mark(response):
        response.headers["Allow"] = "marked"
        return response
else:
    @native.middleware("http")
    async def mark(request, call_next):
        response = await call_next(request)
        response.headers["Allow"] = "marked"
        return response

asgi, wsgi = app.as_asgi(native), app.as_wsgi(native)
"""


@each_combination()
def test_middleware_sees_a_refused_key(serve: Starter, project: Path, combination: tuple[str, str]) -> None:
    """What a user adds to each answer, such as headers of CORS, is in the 401 too, which does not wait for the body."""
    (project / "marked.py").write_text(MARKED)
    environment = gunicorn_environment(*combination, SERVING_AUTH__API_KEYS='["one"]')
    server = serve(gunicorn_with("marked", combination[1]), project, **environment)
    with stall(server, POST % b"/predictions") as client:
        answer = read_answer(client)
    assert (answer.status, answer.headers["allow"], answer.headers["connection"]) == (401, "marked", "close")
    assert server.post(ROW, X_API_Key="one").headers["allow"] == "marked"
    server.stop()


def test_frameworks_refuse_a_key_alike() -> None:
    """The 401 to a body is the same by every framework and interface."""
    settings = [make_settings(framework=name, auth={"api_keys": ["one"]}) for name in app.FRAMEWORKS]
    natives = [app.create_app(each) for each in settings]
    flask, fastapi = natives
    answers: list[Answer] = [call(each, post_case(ROW, X_Request_ID="a")) for each in natives]
    answers.append(call(app.as_asgi(flask), post_case(ROW, X_Request_ID="a")))
    answers.append(call_wsgi(app.as_wsgi(fastapi), post_case(ROW, X_Request_ID="a")))
    assert answers == [answers[0]] * 4
    assert (answers[0].status, answers[0].headers["connection"]) == (401, "close")


def test_routes_of_a_user_get_their_bodies() -> None:
    """Whatever a user has put around, beside or behind the service's routes gets the whole body that was sent."""

    def length(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(len(environ["wsgi.input"].read())).encode()]

    case = Case("length", "POST", "/other/length", JSON, b"12345")
    around = app.create_app(make_settings(framework="flask"))
    around.wsgi_app = DispatcherMiddleware(around.wsgi_app, {"/other": length})
    behind = app.create_app(make_settings(framework="flask"))
    behind.register_error_handler(404, lambda _: str(len(flask.request.get_data())))
    for native in (around, behind):
        assert asyncio.run(call_asgi(app.as_asgi(native), case)).body == b"5"
    beside = app.create_app(make_settings(framework="fastapi"))
    beside.host("test", fastapi.FastAPI(routes=[Route("/other/length", count_body, methods=["POST"])]))
    assert call_wsgi(app.as_wsgi(beside), case).body == b"5"


async def count_body(request: fastapi.Request) -> Response:
    return Response(str(len(await request.body())))


@pytest.mark.parametrize("start", [b"", PING], ids=["first", "later"])
def test_empty_lines_are_no_request(patient: Server, start: bytes) -> None:
    """Empty lines without end get a 400, and no traceback is logged."""
    with patient.connect() as client:
        client.sendall(start)
        if start:
            read_answer(client)
        with contextlib.suppress(ConnectionError):
            client.sendall(b"\r\n" * 10_000)
        assert read_answer(client).status == 400
    assert "Traceback" not in patient.text


def test_expectation_of_an_old_client_is_ignored(patient: Server) -> None:
    """A client of HTTP/1.0 is not told to go on, which it would take for the answer (RFC 9110, section 10.1.1)."""
    head = POST.replace(b"1.1", b"1.0") % b"/predictions" + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    with patient.connect() as client:
        client.sendall(head)
        client.sendall(b"[]")
        assert client.makefile("rb").readline().split()[1] == b"200"


def test_connections_that_are_reset_are_forgotten(serve: Starter) -> None:
    """Under uvicorn a connection that is reset, silent, idle or with requests left, is not kept until
    `server.keepalive` is over, nor its memory."""
    keepalive = {"SERVING_SERVER__KEEPALIVE": "3600", "SERVING_LOGGING__ACCESS": "false"}
    server = serve(**gunicorn_environment("fastapi", "uvicorn", **keepalive))
    (pid,) = server.worker_pids
    n_files = count_files(pid)
    for raw, reads in [(PING, True), (b"", False)]:
        grown_mb: list[float] = []
        for _ in range(3):
            before_mb = private_mb(pid)
            reset_many(server, 1500, raw, reads)
            wait_until(lambda: count_files(pid) <= n_files, "the connections to be gone")
            grown_mb.append(private_mb(pid) - before_mb)
        assert min(grown_mb) < 2, (raw, grown_mb)  # many at once need more, but once; one that is kept has 11 kB
    reset_many(server, 1000, PING * 20, False)
    wait_until(lambda: count_files(pid) <= n_files, "the connections to be gone")
    server.stop()


def reset_many(server: Server, count: int, raw: bytes, reads: bool) -> None:
    for _ in range(count):
        with server.connect() as client:
            client.sendall(raw)
            if reads:
                read_answer(client)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def test_worker_may_have_many_files(serve: Starter) -> None:
    """A worker raises the soft limit of open files, which is often 1024, to the hard one, or to 65 536."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    command = ["bash", "-c", f"ulimit -S -n 256; exec {GUNICORN}"]
    server = serve(command, **gunicorn_environment("fastapi", "gevent"))
    (pid,) = server.worker_pids
    limits = re.search(r"Max open files\s+(\d+)", Path(f"/proc/{pid}/limits").read_text())
    assert limits is not None
    assert int(limits[1]) == min(hard if hard > 0 else 65_536, 65_536)
    server.stop()


def test_worker_connections_can_be_given() -> None:
    """Gunicorn's own option wins over the shipped value."""
    done = run_gunicorn("--worker-connections 7 --print-config", SERVING_FRAMEWORK="flask")
    assert re.search(r"^worker_connections\s+= 7$", done.stdout, re.MULTILINE)

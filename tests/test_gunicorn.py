"""`gunicorn -c gunicorn.conf.py` with both frameworks and both workers, as real processes."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import BAD, GOOD, JSON, MALFORMED, QUERY, Case
from conftest import BIN, COMBINATIONS, PROJECT, ROW, Server, gunicorn_environment, read_answer, wait_until
from test_parity import check

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


def test_no_bad_request_is_a_crash(servers: Servers) -> None:
    """After the tables, no server has logged an error and each still has the worker it started with."""
    for server in servers.values():
        for case in BAD:
            server.send(case)
        assert not [line for line in server.lines if line["level"] in ("error", "critical")]
        assert len(server.worker_pids) == 1


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
        client.sendall(chunk * 200)  # 13 MB of a limit of 8
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
    before = len(os.listdir(f"/proc/{pid}/fd"))
    for _ in range(20):
        client = server.connect()
        client.sendall(HEAD + framing)
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    wait_until(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before, "the connections to be gone")
    assert cpu_s(pid, during_s=0.5) < 0.25
    assert server.get("/ping").status == 200


def cpu_s(pid: int, during_s: float) -> float:
    """Measure the processor time that a process takes in a stretch of wall time."""

    def spent() -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    start, before = time.monotonic(), spent()
    wait_until(lambda: time.monotonic() - start > during_s, "time to pass")
    return spent() - before


def test_client_that_leaves_before_its_answer_leaves_nothing(server: Server) -> None:
    """Whole requests whose clients do not stay for the answer leave no connection and no thread behind."""
    (pid,) = server.worker_pids
    server.post([ROW] * 100)
    before, threads = len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))
    body = Case("left", "POST", "/predictions", JSON, b"[" + b",".join([b"{}"] * 1000) + b"]").raw()
    for _ in range(20):
        client = server.connect()
        client.sendall(body)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    wait_until(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before, "the connections to be gone")
    assert len(os.listdir(f"/proc/{pid}/task")) <= threads + 10  # a2wsgi's pool grows to its ten
    assert server.post(ROW).status == 200


def test_half_closed_client_gets_its_answer(server: Server) -> None:
    """A client that says it will send no more still reads the answer to what it sent."""
    answer = server.exchange(Case("half", "GET", f"/predictions?{QUERY}").raw(), half_close=True)
    assert answer.status == 200


def test_uvicorn_and_gevent_report_their_worker(servers: Servers) -> None:
    """`server.worker_class` decides the worker that gunicorn runs."""
    for (_, worker), server in servers.items():
        name = {"uvicorn": "ServingUvicornWorker", "gevent": "ServingGeventWorker"}[worker]
        assert f"Using worker: {name}" in server.text


EXTENDED = """
import contextlib
import fastapi
import app

@contextlib.asynccontextmanager
async def lifespan(_):
    print("event: started", flush=True)
    yield {"colour": "violet"}
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
def test_lifespan_runs(serve: Callable[..., Server], project: Path, worker: str) -> None:
    """An extended FastAPI gets its start-up event before the first request, its state, and its shut-down event."""
    (project / "extended.py").write_text(EXTENDED)
    interface = {"uvicorn": "asgi", "gevent": "wsgi"}[worker]
    command = f"gunicorn -c gunicorn.conf.py extended:{interface}"
    server = serve(command, project, **gunicorn_environment("fastapi", worker))
    assert server.text.index("event: started") < server.text.index('"path": "/ping"')
    assert server.get("/colour").json == "violet"
    assert server.stop() == 0
    assert server.text.count("event: started") == server.text.count("event: stopped") == 1


@pytest.mark.parametrize("worker", ["uvicorn", "gevent"])
def test_failed_start_up_event_ends_the_service(project: Path, worker: str) -> None:
    """What a start-up event raises stops the process, under both workers."""
    (project / "failing.py").write_text(EXTENDED.replace('print("event: started", flush=True)', "raise OSError('no')"))
    interface = {"uvicorn": "asgi", "gevent": "wsgi"}[worker]
    command = [f"{BIN}/gunicorn", "-c", "gunicorn.conf.py", f"failing:{interface}"]
    environment = os.environ | gunicorn_environment("fastapi", worker)
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert "OSError: no" in done.stderr


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
    command = [f"{BIN}/gunicorn", "-c", "gunicorn.conf.py", "--print-config"]
    environment = os.environ | settings | {"SERVING_FRAMEWORK": framework}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60)
    printed = {
        name.strip(): text.strip() for name, _, text in (line.partition("=") for line in done.stdout.splitlines())
    }
    expected = {name: text for name, (_, text) in PRINTED.items()}
    expected |= {"wsgi_app": wsgi_app, "control_socket_disable": "True"}
    assert {name: printed[name] for name in expected} == expected


def test_configuration_is_found_from_another_folder(serve: Callable[..., Server], tmp_path: Path) -> None:
    """`-c` with a path works from anywhere: settings, model and code lie beside it."""
    command = f"gunicorn -c {PROJECT / 'gunicorn.conf.py'}"
    server = serve(command, tmp_path, **gunicorn_environment("flask", "gevent"))
    assert server.post(ROW).json["prediction"] == "setosa"


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_stop_ends_every_process(serve: Callable[..., Server], combination: tuple[str, str]) -> None:
    """TERM ends master and workers with status 0."""
    server = serve(**gunicorn_environment(*combination, SERVING_SERVER__WORKERS="2"))
    pids = wait_until(lambda: server.worker_pids if len(server.worker_pids) == 2 else None, "two workers")
    started = time.monotonic()
    assert server.stop(signal.SIGTERM) == 0
    assert time.monotonic() - started < 15  # half of graceful_timeout: no worker missed the signal while it booted
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]

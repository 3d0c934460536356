"""One line per event, from every part of the process tree, and nothing that should stay out of it."""

import contextlib
import json
import logging
import os
import pty
import random
import re
import select
import signal
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import app
from serving import VERSION
from serving.logs import LoggingSettings, _write_event, configure_logging
from serving.web.messages import make_request_id
from tests.lib import estimators
from tests.lib.apps import call, make_settings, serve_estimator
from tests.lib.artifacts import deploy
from tests.lib.cases import BAD, JSON, QUERY, Case
from tests.lib.clients import ROW, post_case
from tests.lib.proc import children_of
from tests.lib.servers import (
    BIN,
    COMBINATIONS,
    GUNICORN,
    PROJECT,
    WAIT_S,
    Server,
    Starter,
    gunicorn_environment,
    run,
    wait_until,
)
from tests.lib.sizes import each_combination, each_worker


def artifact(tmp_path: Path, estimator: Any) -> dict[str, str]:
    """Save a fake estimator, and return the settings that serve it."""
    file = deploy(tmp_path, estimator)
    return {"SERVING_SETTINGS": file, "PYTHONPATH": str(PROJECT), "SERVING_LOGGING__FORMAT": "json"}


def events_of(server: Server, request_id: str, count: int = 1) -> list[dict[str, Any]]:
    """Wait until a request has so many lines, and return all that it has."""

    def found() -> list[dict[str, Any]]:
        return [line for line in server.lines if line.get("request_id") == request_id]

    return wait_until(lambda: found() if len(found()) >= count else None, f"{count} lines of {request_id}")


@each_combination()
def test_every_line_is_one_json_object(serve: Starter, combination: tuple[str, str]) -> None:
    """Master, worker, server and app all write JSON lines with time, level, process and event, from start to stop."""
    server = serve(**gunicorn_environment(*combination))
    for case in BAD[:10]:
        server.send(case)
    server.exchange(b"nonsense\r\n\r\n")
    server.stop()
    assert all({"timestamp", "level", "pid", "event"} <= line.keys() for line in server.lines)
    events = [line["event"] for line in server.lines]
    assert {"serving", "request", "request_refused", "stopping", "draining", "stopped"} <= set(events)
    assert not [line for line in server.lines if "logger" in line]  # what servers say of start and end is for debug
    (serving,) = [line for line in server.lines if line["event"] == "serving"]
    assert (serving["version"], serving["bind"]) == (VERSION, [f"http://127.0.0.1:{server.port}"])
    assert len({line["pid"] for line in server.lines}) == 2
    assert all(events.count(event) == 1 for event in set(events) - {"request"})


@each_combination()
def test_request_has_one_access_line(servers: dict[tuple[str, str], Server], combination: tuple[str, str]) -> None:
    """A request is told once, with method, path, status, duration and rows, under its id."""
    server = servers[combination]
    server.post([ROW] * 3, **{"X_Request_ID": "access-line"})
    (line,) = events_of(server, "access-line")
    assert {key: line[key] for key in ("event", "method", "path", "status", "rows", "level")} == {
        "event": "request",
        "method": "POST",
        "path": "/predictions",
        "status": 200,
        "rows": 3,
        "level": "info",
    }
    assert 0 < line["duration_ms"] < 10_000


def test_duration_is_in_milliseconds(tmp_path: Path, framework: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is at least what the estimator takes, and at most what the client waits."""
    native = serve_estimator(
        tmp_path / "model.joblib", estimators.Slow(0.1), framework=framework, logging={"format": "json"}
    )
    capsys.readouterr()
    started = time.perf_counter()
    assert call(native, post_case({"x0": 1.5})).status == 200
    waited_ms = (time.perf_counter() - started) * 1000
    (line,) = capsys.readouterr().err.splitlines()
    assert 100 <= json.loads(line)["duration_ms"] <= waited_ms


@each_combination()
def test_feature_values_are_in_no_line(servers: dict[tuple[str, str], Server], combination: tuple[str, str]) -> None:
    """Neither good nor bad values, in a body or in a query, reach the log."""
    server = servers[combination]
    server.post(ROW | {"petal_width": 123.456})
    server.post(ROW | {"petal_width": "123.456"})
    server.post(ROW | {"123.456": 1})
    server.get(f"/predictions?{QUERY.replace('0.2', '123.456')}")
    server.get(f"/predictions?{QUERY.replace('0.2', '123.456x')}")
    server.exchange(b"GET /predictions?petal_width=123.456\xff HTTP/1.1\r\nHost: x\r\n\r\n")
    server.exchange(b"GET /predictions?petal_width=123.456 extra HTTP/1.1\r\nHost: x\r\n\r\n")
    server.get("/ping", **{"X-Request-ID": "last-of-values"})
    events_of(server, "last-of-values")
    assert "123.456" not in server.text


def test_request_cannot_forge_a_line(server: Server) -> None:
    """What a client chooses, path and id, stays inside its JSON string."""
    forged = '%0A{"level":"critical","event":"forged"}'
    server.get(f"/{forged}", **{"X-Request-ID": '"}{"level":"critical"'})
    server.send(Case("forging", "GET", f"/nothing{forged}"))
    events_of(server, "forging")
    assert not [line for line in server.lines if line["level"] == "critical" or line["event"] == "forged"]


@pytest.fixture(scope="module")
def worrying_servers(serve_module: Starter, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Server]:
    """The four combinations around an estimator that warns, or is broken."""
    environment = artifact(tmp_path_factory.mktemp("worrying"), estimators.Worrying())
    return serve_module.each(COMBINATIONS, **environment)


@each_combination()
def test_crash_is_one_line_with_its_traceback(
    worrying_servers: dict[tuple[str, str], Server], combination: tuple[str, str]
) -> None:
    """A crash in the estimator is one error line with the traceback; the answer says nothing of it."""
    server = worrying_servers[combination]
    answer = server.post({"x0": 123.456}, **{"X_Request_ID": "crash"})
    assert (answer.status, answer.json) == (500, {"detail": "internal error; the log has it under this X-Request-ID"})
    crash, access = events_of(server, "crash", count=2)
    assert (crash["event"], crash["level"]) == ("request_failed", "error")
    assert crash["exception"].startswith("Traceback")
    assert crash["exception"].endswith("RuntimeError: the estimator is broken")
    assert access["status"] == 500
    assert "123.456" not in server.text


@each_combination()
def test_warning_is_one_line_of_its_request(
    worrying_servers: dict[tuple[str, str], Server], combination: tuple[str, str]
) -> None:
    """The first Python warning of its kind is a line with the request's id, and without the values of features."""
    server = worrying_servers[combination]
    assert server.post({"x0": 1}, **{"X_Request_ID": "worry"}).status == 200
    warning, _ = events_of(server, "worry", count=2)
    assert (warning["logger"], warning["level"]) == ("py.warnings", "warning")
    assert "UserWarning: a matter of some concern: … and … " in warning["event"]
    for value in (71.25, 72.5):
        assert server.post({"x0": value}, **{"X_Request_ID": f"worry-{value}"}).status == 200
    assert len(events_of(server, "worry-72.5")) == 1
    assert len([line for line in server.lines if line.get("logger") == "py.warnings"]) == 1


@pytest.mark.filterwarnings("always:a matter")
def test_warning_of_a_thread_tells_no_value(tmp_path: Path, framework: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What an estimator warns of in a thread that it starts is told without the values of features as well."""
    estimator, json_lines = estimators.WorryingElsewhere(), {"format": "json", "level": "debug"}
    native = serve_estimator(tmp_path / "model.joblib", estimator, framework=framework, logging=json_lines)
    assert call(native, post_case({"x0": 71.25})).status == 200
    text = capsys.readouterr().err
    assert "UserWarning: a matter of some concern: … and … " in text.replace("\\u2026", "…")
    assert "71.25" not in text


@pytest.mark.parametrize(
    ("name", "value", "seen"), [("ACCESS", "false", 0), ("LEVEL", "warning", 0), ("LEVEL", "info", 1)]
)
def test_access_lines_can_be_off(serve: Starter, free_port: int, name: str, value: str, seen: int) -> None:
    """`logging.access = false`, or a level above info, silences the access line."""
    choice = {f"SERVING_LOGGING__{name}": value, "SERVING_SERVER__BIND": f"127.0.0.1:{free_port}"}
    server = serve(port=free_port, **gunicorn_environment("fastapi", "uvicorn", **choice))
    server.get("/ping", **{"X-Request-ID": "quiet"})
    server.stop()
    assert server.text.count('"request_id":"quiet"') == seen


def test_console_format_is_readable(serve: Starter, tmp_path: Path) -> None:
    """`logging.format = "console"` writes lines for people: time, level, event, values; a traceback stands below."""
    environment = artifact(tmp_path, estimators.Failing()) | {"SERVING_LOGGING__FORMAT": "console"}
    server = serve(**gunicorn_environment("flask", "gevent", **environment))
    server.post({"x0": 1.5}, **{"X_Request_ID": "console"})
    server.stop()
    first, *_, last = server.text.splitlines()
    moment = r"\d\d:\d\d:\d\d\.\d{3}"
    assert re.match(rf"{moment} info    serving version={VERSION} bind=http://127.0.0.1:{server.port} framework", first)
    assert re.search(r" model_sha256=[0-9a-f]{8}… ", first)
    request = rf"^{moment} info    request method=POST path=/predictions .*request_id=console pid=\d+$"
    assert re.search(request, server.text, re.MULTILINE)
    assert server.text.count("\nRuntimeError: the estimator is broken\n") == 1
    assert re.fullmatch(rf"{moment} info    stopped pid=\d+", last)
    assert "\x1b" not in server.text  # colours are for terminals


@each_worker()
def test_terminal_sees_a_calm_stop(combination: tuple[str, str], quick_model: dict[str, str]) -> None:
    """On a terminal, Ctrl-C ends the service without an alarm, and a worker that is killed is one line.

    Colours are for terminals, unless NO_COLOR is set.
    """
    colours = {} if combination[1] == "uvicorn" else {"NO_COLOR": "1"}
    text, status = kill_and_press_ctrl_c(gunicorn_environment(*combination, **quick_model, **colours))
    assert status == 0
    lines = [line.split()[1:3] for line in re.sub(r"\x1b\[[0-9;]*m|\^C", "", text).splitlines() if line]
    assert lines[0] == ["info", "serving"]
    assert [line for line in lines if line[0] != "info"] == [["error", "worker_replaced"]]
    assert [event for _, event in lines[-3:]] == ["stopping", "draining", "stopped"]
    assert ("\x1b[31merror" in text, "\x1b" in text) == (not colours, not colours)


def kill_and_press_ctrl_c(environment: dict[str, str]) -> tuple[str, int]:
    """Serve on a terminal, kill the worker, press Ctrl-C, and return what was shown and the status."""
    ours, theirs = pty.openpty()
    command = ["setsid", "--ctty", str(BIN / "gunicorn"), *GUNICORN.split()[1:]]  # with its terminal and session
    env = os.environ | {"TERM": "xterm"} | environment
    process = subprocess.Popen(command, cwd=PROJECT, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""

    def read_until(words: str) -> re.Match[bytes]:
        nonlocal shown
        while not (match := re.search(words.encode(), shown)):
            assert select.select([ours], [], [], WAIT_S)[0], f"waited {WAIT_S} s for {words}: {shown.decode()}"
            shown += os.read(ours, 65_536)
        return match

    try:
        port = int(read_until(r"bind=http://127.0.0.1:(\d+) ")[1])
        ping(port)
        (worker,) = children_of(process.pid)
        os.kill(worker, signal.SIGKILL)
        read_until("worker_replaced")
        ping(port)
        os.write(ours, b"\x03")
        with contextlib.suppress(OSError):  # which is how a terminal ends
            while select.select([ours], [], [], WAIT_S)[0] and (piece := os.read(ours, 65_536)):
                shown += piece
        return shown.decode(), process.wait(WAIT_S)
    finally:
        os.close(ours)
        process.kill()


def ping(port: int) -> None:
    """Wait for an answer, which the only worker gives as soon as it is ready."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=WAIT_S) as answer:
        assert answer.status == 200


def test_console_keeps_control_characters_from_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A client's path cannot send escape sequences to the terminal of whoever reads the log."""
    native = app.create_app(make_settings(logging={"format": "console"}))
    assert call(native, Case("escape", "GET", "/%1b%5d0;title%07%c2%9b31m")).status == 404
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().err)  # the renderer's own colours
    assert "\\x1b]0;title\\x07\\x9b31m" in text
    assert not {"\x1b", "\x07", "\x9b"} & set(text)


def test_records_of_libraries_keep_to_the_format(capsys: pytest.CaptureFixture[str]) -> None:
    """A library's own logging record, with lines and colours in it, becomes one plain JSON line."""
    configure_logging(LoggingSettings(format="json"))
    logging.getLogger("some.library").warning("\x1b[31mtwo\nlines\x1b[0m of %s", "text")
    (line,) = capsys.readouterr().err.splitlines()
    event = json.loads(line)
    assert (event["logger"], event["level"], event["event"]) == ("some.library", "warning", "two lines of text")


def test_simultaneous_requests_keep_their_ids(servers: dict[tuple[str, str], Server]) -> None:
    """Requests handled at the same time log and answer under their own ids."""
    for server in servers.values():
        names = [f"simultaneous-{number}" for number in range(40)]
        answers: dict[str, str] = {}

        def ask(name: str, server: Server = server, answers: dict[str, str] = answers) -> None:
            case = Case(name, "POST", "/predictions", JSON, json.dumps([ROW] * 50).encode())
            answers[name] = server.send(case).headers["x-request-id"]

        threads = [threading.Thread(target=ask, args=[name]) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == {name: name for name in names}
        assert all(len(events_of(server, name)) == 1 for name in names)


@pytest.mark.parametrize("value", ["\udc80", b"\xff", {1, 2}, object, float("nan"), "\x9b31m", "ö"])
def test_event_of_any_value_is_a_line_of_ascii(value: Any) -> None:
    """Whatever is logged is one JSON object a line, without a character that a terminal could obey."""
    line = _write_event({"event": "x", "value": value})
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["event"] == "x"


def test_request_ids_differ_whatever_is_seeded() -> None:
    """A library that seeds Python's random numbers does not repeat ids, nor does a process that is forked."""
    ids = set()
    for _ in range(3):
        random.seed(0)
        ids.add(make_request_id())
    ids_of = "from serving.web import messages as m; os.fork() and os.wait(); print(m.make_request_id(), flush=True)"
    code = f"import os; {ids_of}"
    done = run(["python", "-c", code])
    assert len(ids | set(done.stdout.split())) == 5

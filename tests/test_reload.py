"""HUP: new settings and a new model are taken as a whole or not at all, and no request is lost by it."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sklearn.datasets import load_iris

from serving.errors import STARTUP_STATUS
from tests.lib.artifacts import choose, edit, lay_out, save, variables
from tests.lib.clients import ROW, post_case
from tests.lib.estimators import SlowToLoad, Threading
from tests.lib.load import Load, keeping_and_closing, pause_s
from tests.lib.servers import (
    BIN,
    GUNICORN,
    PROJECT,
    Server,
    Starter,
    find_free_port,
    gunicorn_environment,
    gunicorn_with,
    identity,
    run_gunicorn,
    wait_for_model,
    wait_until,
)
from tests.lib.sizes import TWINS, each_worker, scale, share


@pytest.mark.alone
@each_worker()
def test_reloads_lose_nothing(serve: Starter, combination: tuple[str, str]) -> None:
    """HUPs under load: every request is answered 200, and none waits for a second, on connections old and new."""
    reloads, requests = scale((3, 500), (10, 1000))
    server = serve(**gunicorn_environment(*combination, SERVING_SERVER__WORKERS="2", SERVING_LOGGING__ACCESS="false"))
    kept, closed = keeping_and_closing(server, post_case(ROW))
    with kept, closed:
        for _ in range(reloads):
            assert server.reload()["event"] == "reloaded"
            kept.wait_for(requests)
            closed.wait_for(requests)
    server.stop()
    assert kept.count + closed.count >= 2 * reloads * requests
    for load in (kept, closed):
        assert (load.failures, [*load.answers]) == ([], [200])
        assert max(load.took_s) < 1


def save_slow(path: Path) -> dict[str, str]:
    """Save a model that takes `LOAD_S` seconds to load, and return the settings of [model] that trust it."""
    X, y = load_iris(return_X_y=True, as_frame=True)
    return save(SlowToLoad(C=0.5, max_iter=1000).fit(X.set_axis([*ROW], axis=1), y), path)


def serving(model: dict[str, str]) -> dict[str, str]:
    """Return the environment of a server that takes a model of the tests' own code."""
    return variables(model) | {"PYTHONPATH": str(PROJECT)}


@pytest.mark.alone
@each_worker()
def test_slow_load_stalls_nothing(serve: Starter, tmp_path: Path, combination: tuple[str, str]) -> None:
    """While a model takes seconds to load, twice, requests are answered as ever; HUPs that come together are one."""
    load_s, requests = scale((1, 2000), (6, 20_000))
    environment = gunicorn_environment(*combination, SERVING_LOGGING__ACCESS="false", LOAD_S=str(load_s))
    server = serve(**(environment | serving(save_slow(tmp_path / "slow.joblib"))))
    with Load(server, post_case(ROW)) as load:
        started = time.monotonic()
        assert server.reload()["event"] == "reloaded"
        took_s = time.monotonic() - started
        for _ in range(9):
            os.kill(server.process.pid, signal.SIGHUP)
            load.wait_for(requests // 20)
        wait_until(lambda: len(server.reloads) == 2, "the second reload")
        load.wait_for(requests - load.count)
    assert server.reloads[1]["event"] == "reloaded"
    assert [line["event"] for line in server.lines if line["event"] in ("reload_started", "reloaded")][-1] == "reloaded"
    server.stop()
    assert (load.failures, [*load.answers]) == ([], [200])
    assert load.count >= requests
    assert took_s > 2 * load_s  # or nothing was slow
    assert max(load.took_s) < 1


def truncate_model(file: Path) -> None:
    (file.parent / "cut.skops").write_bytes((PROJECT / "model/iris.skops").read_bytes()[:500])
    text = re.sub(r"sha256 = .*\n", "", file.read_text())
    file.write_text(text.replace("iris.joblib", "cut.skops"))


def change_golden(file: Path) -> None:
    golden = file.parent / "iris.golden.json"
    golden.write_text(golden.read_text().replace('"prediction": "setosa"', '"prediction": "virginica"'))


def take_port(file: Path) -> socket.socket:
    taken = socket.create_server(("127.0.0.1", 0))
    edit(file, ("127.0.0.1:0", f"127.0.0.1:{taken.getsockname()[1]}"))
    return taken


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "invalid TOML": (lambda file: file.write_text(file.read_text() + "[["), "settings.toml: not valid TOML"),
    "unknown key": (lambda file: edit(file, ("workers", "wrokers")), "did you mean 'workers'?"),
    "wrong type": (lambda file: edit(file, ("workers = 2", 'workers = "2"')), "server.workers is '2'"),
    "missing model": (lambda file: edit(file, ("iris.joblib", "irsi.joblib")), "did you mean 'iris.joblib'?"),
    "truncated model": (truncate_model, "cut.skops"),
    "wrong hash": (lambda file: choose(file, {"path": "iris.joblib", "sha256": "0" * 64}), "sha256"),
    "other answers": (change_golden, "answers row"),
    "port in use": (take_port, "Address already in use"),
}


@pytest.mark.parametrize("combination", TWINS, ids="-".join)
def test_broken_reload_changes_nothing(serve: Starter, tmp_path: Path, combination: tuple[str, str]) -> None:
    """Whatever is wrong, one line says so, no request fails, and the next good HUP is taken."""
    file = lay_out(tmp_path, *combination)
    originals = {path: path.read_bytes() for path in file.parent.iterdir()}
    server = serve(SERVING_SETTINGS=str(file))
    before = identity(server)
    cases = share([*BROKEN.items()], combination)
    for number, (name, (break_it, says)) in enumerate(cases):
        with Load(server, post_case(ROW), clients=4, pause_s=pause_s()) as load:
            resource = break_it(file)
            line = server.reload()
            load.wait_for(200)
            replace_worker(server)  # by one that the master has as it is now
            assert [identity(server) for _ in range(10)] == [before] * 10, name
            if resource is not None and not isinstance(resource, int):
                resource.close()
            for path, content in originals.items():
                path.write_bytes(content)
            edit(file, ('"iris"', f'"good-{number}"'))
            healed = server.reload()
            load.wait_for(200)
        assert (line["event"], line["level"]) == ("reload_refused", "error"), name
        assert says in line["reason"], name
        assert healed["event"] == "reloaded", name
        assert (load.failures, [*load.answers]) == ([], [200]), name
        before = wait_for_model(server, f"good-{number}")
    assert len([line for line in server.lines if line["level"] in ("error", "critical")]) == len(cases)
    assert server.stop() == 0


FAILING = """
import pathlib
import app

failing = pathlib.Path(__file__).with_suffix(".failing")
if failing.exists():
    if failing.read_text():
        raise RuntimeError("cannot start now")
    failing.write_text("after the trial")
native = app.create_app()
asgi, wsgi = app.as_asgi(native), app.as_wsgi(native)
print("the app is made", flush=True)
"""


@each_worker()
def test_reload_without_new_workers_is_put_back(serve: Starter, tmp_path: Path, combination: tuple[str, str]) -> None:
    """Where new workers end before they are ready, after a good trial, the master too has what it had before."""
    file = lay_out(tmp_path, *combination)
    (tmp_path / "fails.py").write_text(FAILING)
    server = serve(gunicorn_with("fails", combination[1]), SERVING_SETTINGS=str(file), PYTHONPATH=str(tmp_path))
    before = identity(server)
    wait_until(lambda: server.text.count("the app is made") == 2, "both workers to have loaded the module")
    failing = tmp_path / "fails.failing"
    failing.touch()
    edit(file, ('"iris"', '"second"'), ("127.0.0.1:0", f"127.0.0.1:{find_free_port()}"))
    os.kill(server.process.pid, signal.SIGHUP)
    refusal = wait_until(lambda: re.search('.*"event":"reload_refused".*', server.text), "the refusal")
    assert '"reason":"a new worker ended before it was ready; the log says why"' in refusal[0]
    failing.unlink()
    replace_worker(server)
    replace_worker(server)
    assert [identity(server) for _ in range(10)] == [before] * 10
    assert server.stop() == 0


def replace_worker(server: Server) -> None:
    """Drain the older of two workers, and wait for the one in its place."""
    older, _ = server.wait_for_workers(2)
    server.replace(older, signal.SIGTERM)


def test_everything_changes_by_reload_alone(serve: Starter, file: Path, free_port: int) -> None:
    """Framework, worker class and count, address, model, level of the log: HUP is enough for all of them."""
    model = save_slow(file.parent / "other.joblib")
    server = serve(SERVING_SETTINGS=str(file), PYTHONPATH=str(PROJECT))
    old_port, before = server.port, identity(server)
    edit(file, ('"fastapi"', '"flask"'), ("workers = 2", "workers = 3"), ("127.0.0.1:0", f"127.0.0.1:{free_port}"))
    edit(file, ("access = false", 'level = "warning"'))
    choose(file, model)
    os.kill(server.process.pid, signal.SIGHUP)
    server.port = free_port
    server.wait()
    wait_until(lambda: len(server.worker_pids) == 3, "the old workers to end")
    after = identity(server)
    assert after["model_sha256"] == model["sha256"] != before["model_sha256"]
    assert after["settings_sha256"] != before["settings_sha256"]
    assert server.post(ROW).json["prediction"] == 0  # the new model's classes are numbers
    assert b"HTTP/1.1 100 Continue" in first_line(server)  # as gevent's worker says, and uvicorn's does not
    assert server.get("/ping").status == 200
    assert not [line for line in server.lines if line["event"] == "request" and line["path"] == "/predictions"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", old_port), timeout=5)


def test_other_framework_ends_in_silence(serve: Starter, tmp_path: Path) -> None:
    """What a worker of gevent's has inherited from a model's time under Flask is no traceback at its end."""
    file = lay_out(tmp_path, "flask", "gevent")
    server = serve(["bash", "-c", f"exec {GUNICORN}"], SERVING_SETTINGS=str(file))  # a program: a fork ends otherwise
    edit(file, ('"flask"', '"fastapi"'))
    assert server.reload()["event"] == "reloaded"
    assert server.stop() == 0
    assert [line["event"] for line in server.lines if line["level"] != "info"] == []


def first_line(server: Server) -> bytes:
    with server.connect() as client:
        client.sendall(b"POST /ping HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 99999999\r\n\r\n")
        return client.recv(100)


def test_dropped_address_is_drained(serve: Starter, tmp_path: Path, free_port: int) -> None:
    """Clients of an address that goes get their answers until it refuses them; none gets a reset."""
    for combination in TWINS:
        file = lay_out(tmp_path, *combination)
        server = serve(SERVING_SETTINGS=str(file))
        edit(file, ("127.0.0.1:0", f"127.0.0.1:{free_port}"))
        with Load(server, post_case(ROW), keep_alive=False, until_refused=True, pause_s=pause_s()) as load:
            load.wait_for(500)
            server.reload()
            wait_until(lambda load=load: load.is_over, "the old address to refuse connections")
        assert (load.failures, [*load.answers]) == ([], [200])
        server.port = free_port
        assert server.post(ROW).status == 200
        assert server.stop() == 0


@pytest.mark.parametrize("combination", TWINS, ids="-".join)
def test_loopback_gives_way_to_all_interfaces(
    serve: Starter, tmp_path: Path, free_port: int, combination: tuple[str, str]
) -> None:
    """The same port on all interfaces, IPv4's and IPv6's, instead of one address: the kernel would have it in use.

    `test_listeners.py` has every other change of addresses.
    """
    file = lay_out(tmp_path, *combination)
    edit(file, ("127.0.0.1:0", f"127.0.0.1:{free_port}"))
    server = serve(SERVING_SETTINGS=str(file))
    assert not answers_at("::1", free_port)
    with Load(server, post_case(ROW), pause_s=pause_s()) as load:
        edit(file, (f'"127.0.0.1:{free_port}"', json.dumps([f"[::]:{free_port}", f"0.0.0.0:{free_port}"])))
        assert server.reload()["event"] == "reloaded"
        load.wait_for(1000)
    assert (load.failures, [*load.answers]) == ([], [200])
    assert answers_at("127.0.0.1", free_port)
    assert answers_at("::1", free_port)
    assert server.stop() == 0


def answers_at(host: str, port: int) -> bool:
    client = http.client.HTTPConnection(host, port, timeout=30)
    with contextlib.closing(client), contextlib.suppress(ConnectionRefusedError):
        client.request("GET", "/ping")
        return client.getresponse().status == 200
    return False


def test_unix_sockets_leave_no_file(serve: Starter, file: Path, tmp_path: Path) -> None:
    """A socket's file goes when its address does, and the last with the service, which leaves none in TMPDIR either."""
    places = [tmp_path / "one.sock", tmp_path / "two.sock"]
    edit(file, ('"127.0.0.1:0"', f'["127.0.0.1:0", "unix:{places[0]}"]'))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    server = serve(SERVING_SETTINGS=str(file), TMPDIR=str(temporary))
    assert [place.exists() for place in places] == [True, False]
    edit(file, (str(places[0]), str(places[1])))
    server.reload()
    assert [place.exists() for place in places] == [False, True]
    assert server.stop() == 0
    assert [place.exists() for place in places] == [False, False]
    assert [*temporary.iterdir()] == []


def test_deleted_socket_is_made_anew(serve: Starter, file: Path, tmp_path: Path) -> None:
    """A unix socket whose file somebody has removed is there again after HUP, and its loss does not disturb the end."""
    place = tmp_path / "one.sock"
    edit(file, ('"127.0.0.1:0"', f'["127.0.0.1:0", "unix:{place}"]'))
    server = serve(SERVING_SETTINGS=str(file))
    place.unlink()
    assert server.reload()["event"] == "reloaded"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(place))
    place.unlink()
    assert server.stop() == 0
    assert "Traceback" not in server.text


def test_preloading_is_refused(serve: Starter, project: Path) -> None:
    """`preload_app` would have the master predict: at the start it ends the service, later it is a reload refused."""
    file = project / "gunicorn.conf.py"
    text = file.read_text()
    server = serve(cwd=project, **gunicorn_environment("flask", "gevent"))
    try:
        file.write_text(f"{text}preload_app = True\n")
        assert "leave it out" in server.reload()["reason"]
    finally:
        file.write_text(text)
    assert server.reload()["event"] == "reloaded"
    assert server.post(ROW).status == 200
    done = run_gunicorn("--preload", **gunicorn_environment("flask", "gevent"))
    assert done.returncode == STARTUP_STATUS
    assert "leave it out" in done.stderr


def test_model_with_threads_is_refused(serve: Starter, file: Path) -> None:
    """An artifact that starts threads when it is loaded is refused with the reason, for workers would lack them."""
    model = save(Threading(), file.parent / "threading.joblib")
    server = serve(SERVING_SETTINGS=str(file), PYTHONPATH=str(PROJECT))
    choose(file, model)
    assert "starts threads when it is loaded" in server.reload()["reason"]
    assert server.post(ROW).status == 200
    server.stop()


def test_hup_while_starting_is_kept(tmp_path: Path) -> None:
    """A HUP that comes before the service listens does not end it, but is followed once it serves."""
    environment = (
        os.environ | gunicorn_environment("fastapi", "uvicorn", LOAD_S="1") | serving(save_slow(tmp_path / "m.joblib"))
    )
    command = [f"{BIN}/gunicorn", "-c", "gunicorn.conf.py"]
    log = tmp_path / "log"
    with log.open("w") as stream, subprocess.Popen(command, cwd=PROJECT, env=environment, stderr=stream) as process:
        status = Path(f"/proc/{process.pid}/status")
        wait_until(lambda: re.search(r"SigCgt:.*[13579bdf]$", status.read_text(), re.MULTILINE), "a handler of HUP")
        assert "Listening" not in log.read_text()
        process.send_signal(signal.SIGHUP)
        try:
            wait_until(lambda: '"event":"reloaded"' in log.read_text(), "the reload")
        finally:
            process.terminate()
    assert process.returncode == 0

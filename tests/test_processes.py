"""What ends a worker, or all of them, and what each request gets meanwhile."""

import dataclasses
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tests.lib.artifacts import copy_project, deploy
from tests.lib.cases import Case
from tests.lib.clients import ROW, post_case, read_answer
from tests.lib.estimators import Forking, Hanging
from tests.lib.load import Load, keeping_and_closing, pause_s
from tests.lib.proc import children_of, is_alive, private_mb
from tests.lib.servers import PROJECT, WAIT_S, Server, Starter, gunicorn_environment, gunicorn_with, wait_until
from tests.lib.sizes import TWINS, each_worker, scale

DEBUG = {"SERVING_LOGGING__LEVEL": "debug"}  # gunicorn's own lines: which workers boot


@each_worker()
def test_end_loses_nothing(serve: Starter, combination: tuple[str, str]) -> None:
    """TERM under load: all that is sent before connections are refused is answered; readiness says 503 meanwhile."""
    server = serve(**gunicorn_environment(*combination, SERVING_SERVER__WORKERS="2", SERVING_LOGGING__ACCESS="false"))
    kept, closed = keeping_and_closing(server, post_case(ROW), clients=8, until_refused=True, pause_s=pause_s())
    with kept, closed:
        kept.wait_for(scale(300, 1000))
        closed.wait_for(scale(300, 1000))
        server.process.terminate()
        ready = wait_until(lambda: not_ready(server), "readiness to end")
        wait_until(lambda: kept.is_over and closed.is_over, "the clients' end")
    assert server.end() == 0
    assert ready == 503
    for load in (kept, closed):
        assert (load.failures, [*load.answers]) == ([], [200])


@pytest.mark.parametrize("worker", ["uvicorn", "gevent"])
def test_app_of_its_own_service_is_not_ready_at_the_end(serve: Starter, tmp_path: Path, worker: str) -> None:
    """Readiness ends for every service of a process, so for that of an app that a user's module makes of settings."""
    framework = {"uvicorn": "fastapi", "gevent": "flask"}[worker]
    (tmp_path / "mine.py").write_text(OWN_SERVICE)
    server = serve(gunicorn_with("mine", worker), **gunicorn_environment(framework, worker, PYTHONPATH=str(tmp_path)))
    with server.connect() as client:
        client.sendall(Case("ping", "GET", "/ping").raw())
        assert read_answer(client).status == 200
        server.process.terminate()
        wait_until(lambda: '"event":"draining"' in server.text, "the drain")
        client.sendall(Case("ready", "GET", "/health/ready").raw())
        assert read_answer(client).status == 503
    assert server.end() == 0


OWN_SERVICE = """
import app

native = app.create_app(app.load_settings())
asgi, wsgi = app.as_asgi(native), app.as_wsgi(native)
"""


def not_ready(server: Server) -> int:
    status = server.get("/health/ready").status
    return status if status != 200 else 0


@each_worker()
def test_killed_worker_loses_only_what_it_held(serve: Starter, combination: tuple[str, str]) -> None:
    """`kill -9` of each worker in turn: a client loses at most the request that was in flight there."""
    server = serve(**gunicorn_environment(*combination, SERVING_SERVER__WORKERS="3", SERVING_LOGGING__ACCESS="false"))
    workers = server.wait_for_workers(3)
    with Load(server, post_case(ROW), pause_s=pause_s()) as load:
        for pid in workers:
            load.wait_for(scale(300, 1000))
            server.replace(pid, signal.SIGKILL)
    assert len(load.failures) <= 16 * len(workers)
    assert [*load.answers] == [200]
    server.stop()


@each_worker()
def test_orphans_end(serve: Starter, combination: tuple[str, str]) -> None:
    """Workers whose master is killed drain and end by themselves."""
    server = serve(**gunicorn_environment(*combination, SERVING_SERVER__WORKERS="2"))
    workers = server.wait_for_workers(2)
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not any(map(is_alive, workers)), "the workers to end")


@pytest.mark.in_turn
@pytest.mark.parametrize("is_taken_back", [False, True], ids=["old-ends", "new-ends"])
@each_worker()
def test_other_master_keeps_the_address(serve: Starter, combination: tuple[str, str], is_taken_back: bool) -> None:
    """After USR2 two masters have the same listeners; when either ends, the other goes on accepting."""
    server = serve(**gunicorn_environment(*combination, SERVING_LOGGING__ACCESS="false"))
    workers = server.worker_pids
    server.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: server.text.count('"event":"serving"') == 2, "the second master")
    (second,) = {*server.worker_pids} - {*workers}
    wait_until(lambda: children_of(second), "its worker")
    with Load(server, post_case(ROW), clients=8, keep_alive=False, pause_s=pause_s()) as load:
        load.wait_for(200)
        ending, workers = (second, children_of(second)) if is_taken_back else (server.process.pid, server.worker_pids)
        os.kill(ending, signal.SIGTERM)
        wait_until(lambda: not any(map(is_alive, {*workers} - {second})), "the workers' end")
        load.wait_for(scale(300, 1000))
    assert (load.failures, [*load.answers]) == ([], [200])
    if not is_taken_back:
        os.kill(second, signal.SIGTERM)
        wait_until(lambda: not is_alive(second), "the second master's end")
    server.stop()


FRAGILE = """
import pathlib
import app

if pathlib.Path(__file__).with_suffix(".broken").exists():
    raise RuntimeError("cannot start now")
native = app.create_app()
asgi, wsgi = app.as_asgi(native), app.as_wsgi(native)
"""


def both_ready(server: Server) -> bool:
    """Whether each worker has answered, by the log."""
    return all(f'"pid":{pid},"request_id"' in server.text for pid in server.worker_pids)


@pytest.mark.parametrize("combination", TWINS, ids="-".join)
def test_worker_that_cannot_start_harms_nobody(serve: Starter, project: Path, combination: tuple[str, str]) -> None:
    """While another serves, a worker that cannot start is tried again, later and later, and a reload is refused."""
    (project / "fragile.py").write_text(FRAGILE)
    broken = project / "fragile.broken"
    environment = gunicorn_environment(*combination, SERVING_SERVER__WORKERS="2")
    server = serve(gunicorn_with("fragile", combination[1]), project, **environment)
    workers = server.wait_for_workers(2)
    wait_until(lambda: len(server.get("/ping").body) and both_ready(server), "both to serve")
    broken.touch()
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: '"event":"reload_refused"' in server.text, "the refusal")
    os.kill(workers[0], signal.SIGKILL)
    wait_until(lambda: server.text.count('"event":"worker_not_started"') >= 2, "two failures")
    assert server.post(ROW).status == 200
    assert re.findall(r'"retry_in_s":([\d.]+)', server.text)[:2] == ["2.0", "4.0"]
    broken.unlink()
    server.wait_for_workers(2)
    assert server.stop() == 0


HASTY = """
import os
import signal
from processes.master import Master

spawn_worker = Master.spawn_worker


def spawn_and_end(self):
    pid = spawn_worker(self)
    if self.n_ended < 4:
        self.n_ended += 1
        os.kill(pid, signal.SIGTERM)
    return pid


Master.spawn_worker, Master.n_ended = spawn_and_end, 0
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # on one core, a child runs after its parent
"""


@each_worker()
def test_worker_is_ended_at_its_first_step(serve: Starter, tmp_path: Path, combination: tuple[str, str]) -> None:
    """A signal to a worker that has been forked, and has not run yet, ends it; one that misses it would stay."""
    copy_project(tmp_path)
    with (tmp_path / "gunicorn.conf.py").open("a") as configuration:
        configuration.write(HASTY)
    server = serve(cwd=tmp_path, **gunicorn_environment(*combination, **DEBUG, SERVING_SERVER__WORKERS="4"))
    wait_until(lambda: server.text.count('"Booting worker') == 8, "the workers to be replaced")
    ended = replaced_in(server)
    assert [(line["signal"], line["level"], "hint" in line) for line in ended] == [("SIGTERM", "error", False)] * 4
    server.wait_for_workers(4)
    assert server.stop() == 0


def replaced_in(server: Server) -> list[dict[str, Any]]:
    return [line for line in server.lines if line["event"] == "worker_replaced"]


def test_worker_that_hangs_while_it_starts_is_replaced(serve: Starter) -> None:
    """One that gives no sign of life at all is ended: after `server.timeout`, and the time that a start may take."""
    server = serve(**gunicorn_environment("fastapi", "uvicorn", SERVING_SERVER__TIMEOUT="2", **DEBUG))
    first = server.worker_pids[0]
    os.kill(first, signal.SIGKILL)
    booting = wait_until(lambda: [pid for pid in server.worker_pids if pid != first], "a new worker")[0]
    os.kill(booting, signal.SIGSTOP)  # perhaps at its first step
    wait_until(lambda: booting not in server.worker_pids, "its end", within_s=4 * WAIT_S)  # ten proofs of the model
    ended = wait_until(lambda: found if len(found := replaced_in(server)) == 2 else [], "the line of its end")
    assert [(line["signal"], line.get("hint")) for line in ended] == [
        ("SIGKILL", "perhaps out of memory"),
        ("SIGKILL", None),  # it was the master
    ]
    assert wait_until(lambda: server.get("/ping"), "an answer").status == 200
    assert server.stop() == 0


@pytest.mark.in_turn
@pytest.mark.parametrize("call_s", [0.0, 0.02], ids=["quick", "costly"])
@each_worker()
def test_hanging_prediction_costs_a_worker(
    serve: Starter, tmp_path: Path, combination: tuple[str, str], call_s: float
) -> None:
    """A predict that never ends is ended with its worker, and another serves.

    Where calls run beside the loop, its client and those that wait behind it are told 503; where one has taken the loop
    itself, `server.timeout` ends it.
    """
    file = deploy(tmp_path, Hanging(call_s))
    limits = {"SERVING_LIMITS__REQUEST_TIMEOUT_S": "0.5", "SERVING_SERVER__TIMEOUT": "2", "PYTHONPATH": str(PROJECT)}
    server = serve(**gunicorn_environment(*combination, SERVING_SETTINGS=file, **limits))
    (worker,) = server.worker_pids
    with server.connect() as client:
        client.sendall(post_case({"x0": 666.0}).raw())
        if call_s:
            answers = [client.recv(100), server.exchange(post_case({"x0": 1.0}).raw()).status]
            assert (answers[0].split()[1], answers[1]) == (b"503", 503)
            assert server.get("/ping").status == 200
        wait_until(lambda: not is_alive(worker), "the worker to end")
    assert server.post({"x0": 1.0}).json == {"prediction": 0.0}
    assert server.stop() == 0


@each_worker()
def test_predict_that_forks_gives_one_answer(serve: Starter, tmp_path: Path, combination: tuple[str, str]) -> None:
    """A process that predict forks, and that comes back from it, does not go on as a second worker.

    Nor does it prove the model once more. It is the same for a long body, whose call runs in a thread.
    """
    file = deploy(tmp_path, Forking())
    server = serve(**gunicorn_environment(*combination, SERVING_SETTINGS=file, PYTHONPATH=str(PROJECT)))
    for x0 in (0.0, 1.0, 2.0):
        short = post_case({"x0": x0}, Connection="close")
        for case in (short, dataclasses.replace(short, body=short.body.rjust(300_000))):
            with server.connect() as client:
                client.sendall(case.raw())
                received = b"".join(iter(lambda client=client: client.recv(65_536), b""))
            assert received.count(b"HTTP/1.1") == 1
            assert received.startswith(b"HTTP/1.1 200")
    assert server.stop() == 0
    assert server.text.count('"method":"POST"') == 6


@each_worker()
def test_recycled_workers_lose_nothing(serve: Starter, combination: tuple[str, str]) -> None:
    """`max_requests` with jitter replaces workers under load, and every request is answered."""
    requests = scale(500, 2000)
    recycling = {
        "SERVING_SERVER__MAX_REQUESTS": str(requests // 10),
        "SERVING_SERVER__MAX_REQUESTS_JITTER": str(requests // 50),
    }
    environment = gunicorn_environment(
        *combination, SERVING_SERVER__WORKERS="2", SERVING_LOGGING__ACCESS="false", **recycling, **DEBUG
    )
    server = serve(**environment)
    kept, closed = keeping_and_closing(server, post_case(ROW), clients=8, pause_s=pause_s())
    with kept, closed:
        kept.wait_for(requests)
        closed.wait_for(requests)
    for load in (kept, closed):
        assert (load.failures, [*load.answers]) == ([], [200])
    assert server.text.count("Booting worker") > 5
    assert server.stop() == 0


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The settings file of a model of 104 MB."""
    rng = np.random.default_rng(0)
    estimator = LogisticRegression().fit(rng.normal(size=(20, 2)), [0, 1] * 10)
    estimator.ballast_ = rng.normal(size=13_000_000)
    return deploy(tmp_path_factory.mktemp("large"), estimator)


@pytest.mark.parametrize("combination", TWINS, ids="-".join)
@pytest.mark.xdist_group("large_model")
def test_workers_share_the_model(serve: Starter, large_model: str, combination: tuple[str, str]) -> None:
    """With a model of 100 MB each worker has no more than 25 MB of its own, also after a reload."""
    server = serve(**gunicorn_environment(*combination, SERVING_SETTINGS=large_model, SERVING_SERVER__WORKERS="2"))
    assert max(map(private_mb, used(server))) < 25
    old, master_mb = server.worker_pids, private_mb(server.process.pid)
    assert server.reload()["event"] == "reloaded"
    wait_until(lambda: not any(map(is_alive, old)), "the old workers' end")
    assert max(map(private_mb, used(server))) < 25
    assert private_mb(server.process.pid) < master_mb + 25  # it has neither kept the old one nor gone through the rest
    server.stop()


@pytest.mark.parametrize("combination", TWINS, ids="-".join)
def test_collector_writes_to_nothing_shared(serve: Starter, tmp_path: Path, combination: tuple[str, str]) -> None:
    """The garbage collector of a worker copies nothing of a model of half a million lists."""
    estimator = LogisticRegression().fit([[0.0, 0.0], [1.0, 1.0]], [0, 1])
    estimator.ballast_ = [[0] for _ in range(500_000)]
    file = deploy(tmp_path, estimator)
    server = serve(**gunicorn_environment(*combination, SERVING_SETTINGS=file, SERVING_SERVER__WORKERS="2"))
    assert max(map(private_mb, used(server))) < 25
    server.stop()


def used(server: Server) -> list[int]:
    """Return the workers, after each has predicted."""
    workers = server.wait_for_workers(2)
    for _ in range(50):
        assert server.post([{"x0": 0.5, "x1": 1.5}] * 100).status == 200
    return workers


def test_many_workers_are_a_warning(serve: Starter) -> None:
    """More than four workers for each core take memory for nothing, and the log says so."""
    environment = gunicorn_environment("fastapi", "uvicorn", SERVING_SERVER__WORKERS="5", LOKY_MAX_CPU_COUNT="1")
    server = serve(**environment)
    (line,) = [line for line in server.lines if line["event"] == "many_workers"]
    assert (line["level"], line["workers"], line["cores"]) == ("warning", 5, 1)

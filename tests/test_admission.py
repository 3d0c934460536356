"""Who may wait, and for how long: full queues, late answers, slow senders."""

import asyncio
import concurrent.futures
import contextlib
import itertools
import os
import re
import select
import socket
import ssl
import statistics
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from sklearn.linear_model import LinearRegression

from serving.errors import TooManyRequests, Unavailable
from serving.predictor.arrays import Arrays
from serving.predictor.batcher import LOOK_S, LoopBatcher
from serving.predictor.bodies import LongBody
from serving.predictor.calls import BatchQueue, CallCost, Job, Line
from serving.predictor.contract import Contract
from serving.predictor.inputs import read_inputs
from serving.predictor.predictions import Predictions, Template
from tests.lib.artifacts import deploy
from tests.lib.cases import QUERY, Case
from tests.lib.clients import ROW, post_case, read_answer
from tests.lib.estimators import Gated, Slow
from tests.lib.load import Load
from tests.lib.proc import resident_mb
from tests.lib.servers import COMBINATIONS, PROJECT, Server, Starter, gunicorn_environment, wait_until
from tests.lib.sizes import TWINS, each_worker, scale, share

HEAD = b"POST /predictions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"


def headers_of(server: Server, case: Case) -> tuple[int, dict[str, str]]:
    """Send a case, and return the status and all headers."""
    with server.connect() as client:
        client.sendall(case.raw())
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(1000)
    status, *lines = head.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    return int(status.split()[1]), {name.lower(): text for name, text in (line.split(": ", 1) for line in lines)}


def predict(rows: Any) -> Predictions:
    return Predictions(Template(b"{}", {}), [])


def waiting(queue: BatchQueue, *n_rows: int) -> list[Job]:
    jobs = [Job(n, [{}] * n) for n in n_rows]
    for job in jobs:
        queue.admit(job)
    return jobs


def test_queue_has_its_limit() -> None:
    """What comes on top of `max_queued_rows` is refused, until a call takes some or a client gives up."""
    queue = BatchQueue(predict, predict, 8, 0.0, max_queued_rows=10, cost=CallCost(2.0, 0.5))
    jobs = waiting(queue, 4, 4, 2)
    with pytest.raises(TooManyRequests) as refusal:
        waiting(queue, 4)
    assert refusal.value.headers == {"Retry-After": "9"}  # two calls, and ten rows
    queue.give_up(jobs[2])
    queue.take(line_of(jobs))
    queue.give_up(jobs[1])
    assert (queue.queued_jobs, queue.queued_rows) == (0, 0)
    assert waiting(queue, 4)


def line_of(jobs: list[Job]) -> Line:
    line = Line()
    for job in jobs:
        line.append(job)
    return line


def test_long_arrays_keep_no_short_ones_out() -> None:
    """Rows of arrays that are at least twice as long do not count; those of shorter ones do."""
    queue = BatchQueue(predict, predict, 256, 0.0, max_queued_rows=10_000)
    waiting(queue, 10_000, *[1] * 100, 1000)
    with pytest.raises(TooManyRequests):
        waiting(queue, 9000)
    waiting(queue, *[1] * 9_900)
    with pytest.raises(TooManyRequests):
        waiting(queue, 1)
    with pytest.raises(TooManyRequests):
        waiting(queue, 1000)


def test_rows_that_may_wait_are_bounded() -> None:
    """Whatever lengths come in whatever order, what waits is the limit, once for each order of size, and one more."""
    queue = BatchQueue(predict, predict, 256, 0.0, max_queued_rows=1000)
    for n_rows in [*range(1000, 0, -1)] * 20:
        with contextlib.suppress(TooManyRequests):
            waiting(queue, n_rows)
    assert queue.queued_rows < 10 * (1000 + 1000)


@pytest.mark.parametrize("n_clients", [1, 2, 3])
def test_short_and_long_ones_get_half_of_the_time_each(n_clients: int) -> None:
    """While clients send an array each as soon as they have their answer, and others single rows, each kind has calls
    for about as many seconds; where one array at a time waits, all single rows go between two."""
    queue = BatchQueue(predict, predict, 10, 0.0, cost=CallCost(0.0, 0.001))
    line = line_of([Job(500, X=[0] * 500, is_alone=True) for _ in range(n_clients)])
    n_rows = {True: 0, False: 0}
    for _ in range(500):
        for _ in range(100 - len(line.together)):
            line.append(Job(1, [{}]))
        jobs = queue.take(line)
        is_alone = jobs[0].is_alone
        n_rows[is_alone] += sum(job.n_rows for job in jobs)
        if is_alone:  # its client is back when the call has ended
            line.append(Job(500, X=[0] * 500, is_alone=True))
    assert abs(n_rows[True] - n_rows[False]) <= 500


def test_jobs_that_were_given_up_are_not_predicted() -> None:
    """Nor are they in the halves of a call that failed; each keeps the error that it was given up with."""
    calls: list[Any] = []

    def predict(rows: list[Any]) -> Predictions:
        calls.append([row["x0"] for row in rows])
        for job in jobs[2:] if len(calls) == 1 else ():
            queue.give_up(job)
            job.error = Unavailable("late", 1.0)
        if len(rows) > 1:
            raise ValueError
        return Predictions(Template(b"%b", {}), [np.arange(len(rows))])

    queue = BatchQueue(predict, predict, 8, 0.0)
    jobs = [Job(1, [{"x0": number}]) for number in range(4)]
    groups = [jobs]
    while groups:
        groups += queue.call(groups.pop())
    assert calls == [[0, 1, 2, 3], [0, 1], [1], [0]]
    assert [job.answer is not None for job in jobs] == [True, True, False, False]
    for job in jobs[2:]:
        with pytest.raises(Unavailable):
            job.result()


def test_body_of_a_request_that_is_given_up_is_let_go_of() -> None:
    """Nothing of a job that nobody waits for refers to its body."""
    queue = BatchQueue(predict, predict, 8, 0.0)
    body = LongBody(Arrays(Contract(read_inputs(LinearRegression().fit([[1.0]], [1.0])), {})), b"[]" * 100_000, 10)
    held = weakref.ref(body)
    job = Job(10, encode=body.encode, decode=body.decode, is_alone=True)
    queue.admit(job)
    del body
    queue.give_up(job)
    assert held() is None


@pytest.mark.parametrize("long", [True, False], ids=["decode", "predict"])
def test_process_without_a_thread_more_answers_errors(long: bool) -> None:
    """Where no thread can be started, requests that need one fail, are counted no more, and the next one is as good
    as ever."""

    class Threadless(concurrent.futures.ThreadPoolExecutor):
        def submit(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("can't start new thread")

    async def ask() -> list[Any]:
        queue = BatchQueue(predict, predict, 8, 0.0, cost=CallCost(0.0 if long else 1.0))
        batcher = LoopBatcher(queue, asyncio.get_running_loop())
        threads = batcher._predicting, batcher._decoding
        batcher._predicting = batcher._decoding = Threadless(1)
        jobs = [Job(1, decode=lambda: [1.0], is_alone=True) if long else Job(1, [{}]) for _ in range(3)]
        failed = await asyncio.gather(*map(batcher.predict, jobs), return_exceptions=True)
        assert (queue.queued_jobs, queue.queued_rows) == (0, 0)
        batcher._predicting, batcher._decoding = threads
        return [*failed, await batcher.predict(Job(1, decode=lambda: [1.0], is_alone=True) if long else Job(1, [{}]))]

    *failed, answered = asyncio.run(ask())
    assert [type(error) for error in failed] == [RuntimeError] * 3
    assert isinstance(answered, Predictions)


def test_empty_queue_takes_any_request() -> None:
    """A request of more rows than may wait is taken as long as fewer wait, or it could never be."""
    queue = BatchQueue(predict, predict, 8, 0.0, max_queued_rows=10)
    waiting(queue, 1, 1000)
    with pytest.raises(TooManyRequests):
        waiting(queue, 1000)


def test_late_jobs_are_not_predicted() -> None:
    """A job that would be answered past its deadline is told so, and its rows are in no call."""
    calls: list[int] = []

    def predict(rows: list[Any]) -> Predictions:
        calls.append(len(rows))
        return Predictions(Template(b"%b", {}), [np.arange(len(rows))])

    queue = BatchQueue(predict, predict, 8, 0.0, timeout_s=10.0, cost=CallCost(1.0))
    late, hurried, good = waiting(queue, 1, 2, 3)
    late.deadline = time.monotonic() - 1
    hurried.deadline = time.monotonic() + 0.5
    queue.call([late, hurried, good])
    assert calls == [3]
    assert good.result().render() == [b"0", b"1", b"2"]
    for job in (late, hurried):
        with pytest.raises(Unavailable):
            job.result()


@pytest.mark.alone
@each_worker()
def test_overload_is_refused_and_forgotten(serve: Starter, tmp_path: Path, combination: tuple[str, str]) -> None:
    """At several times what a slow estimator can do, each answer is 200, 429 or 503, in time; health and memory are
    as ever; and a second later a request takes what it took before."""
    file = deploy(tmp_path, Slow(0.02))
    limits = {"SERVING_LIMITS__REQUEST_TIMEOUT_S": "2", "SERVING_LIMITS__MAX_QUEUED_ROWS": "50"}
    batching = {"SERVING_BATCHING__MAX_ROWS": "1", "PYTHONPATH": str(PROJECT), "SERVING_LOGGING__ACCESS": "false"}
    server = serve(**gunicorn_environment(*combination, SERVING_SETTINGS=file, **limits, **batching))
    (worker,) = server.worker_pids
    case, good = post_case({"x0": 1.0}), scale(100, 200)
    alone_s = statistics.median(time_of(server, case) for _ in range(10))
    before_mb = resident_mb(worker)
    health_s: list[float] = []
    with Load(server, case, clients=100, pause_s=0.2) as load:  # up to 500 a second, of which it can do 50
        while load.answers[200] < good and not load.failures and load.count < 20_000:
            health_s.append(time_of(server, Case("live", "GET", "/health/live")))
    assert load.failures == []
    assert load.answers.keys() <= {200, 429, 503}
    assert load.answers[429] > load.answers[200] >= good
    took_s = load.took_by_status[200]
    assert p99(took_s) < 2 + p99(health_s)  # which is what the way there and back takes, on cores that others use too
    assert statistics.median(health_s) < min(0.5, statistics.median(took_s) / 2)
    assert resident_mb(worker) < before_mb + 100
    time.sleep(1)
    assert statistics.median(time_of(server, case) for _ in range(10)) < 2 * alone_s
    assert server.worker_pids == [worker]
    server.stop()


def time_of(server: Server, case: Case) -> float:
    started = time.perf_counter()
    assert server.send(case).status == 200
    return time.perf_counter() - started


@each_worker()
def test_refusals_say_when_to_come_back(serve: Starter, tmp_path: Path, combination: tuple[str, str]) -> None:
    """`Retry-After` of a 429 is what those that wait are expected to take; a 503 comes when the time is over."""
    file, gate = deploy(tmp_path, Gated(0.3, tmp_path)), tmp_path / "open"
    limits = {"SERVING_LIMITS__MAX_QUEUED_ROWS": "4", "SERVING_BATCHING__MAX_ROWS": "1"}
    environment = gunicorn_environment(*combination, SERVING_SETTINGS=file, PYTHONPATH=str(PROJECT), **limits)
    with ThreadPoolExecutor(6) as pool:
        hasty = serve(**environment, SERVING_LIMITS__REQUEST_TIMEOUT_S="3")
        try:
            answers = [future.result() for future in crowd(hasty, pool, tmp_path / "begun")]
        finally:
            gate.touch()
        assert sorted(status for status, _ in answers) == [429] + [503] * 5
        assert all("retry-after" in headers for _, headers in answers)
        hasty.stop()
        gate.unlink()
        patient = serve(**environment, SERVING_LIMITS__REQUEST_TIMEOUT_S="60")
        try:
            futures = crowd(patient, pool, tmp_path / "begun")
        finally:
            gate.touch()
        assert sorted(future.result()[0] for future in futures) == [200] * 5 + [429]
        patient.stop()


def crowd(server: Server, pool: ThreadPoolExecutor, begun: Path) -> list[Future[tuple[int, dict[str, str]]]]:
    """Send a request that is predicted until a gate opens, four that wait, and the one too many, which is refused."""
    futures = [pool.submit(headers_of, server, post_case({"x0": 666.0}))]
    wait_until(begun.exists, "the call to begin")
    begun.unlink()
    futures += [pool.submit(headers_of, server, post_case({"x0": 1.0})) for _ in range(5)]
    refused, headers = wait_until(lambda: [future.result() for future in futures if future.done()], "a refusal")[0]
    assert (refused, headers["retry-after"]) == (429, "2")
    assert server.get("/ping").status == 200
    return futures


@each_worker()
def test_long_arrays_do_not_starve_single_rows(serve: Starter, combination: tuple[str, str]) -> None:
    """Beside four clients that send arrays of 10 000 rows in a loop, and others that leave as soon as they have sent
    one, each request of a single row is answered."""
    server = serve(**gunicorn_environment(*combination))
    heavy, light = post_case([ROW] * 10_000), post_case(ROW)
    with Load(server, heavy, clients=4) as load:
        for _ in range(scale(15, 50)):
            with server.connect() as client:
                client.sendall(heavy.raw())
            assert server.send(light).status == 200
        load.wait_for(1)
    assert load.failures == []
    assert load.answers.keys() <= {200, 429}
    assert load.answers[200] > 0
    server.stop()


@each_worker()
def test_rows_of_clients_that_left_are_not_predicted(
    serve: Starter, tmp_path: Path, combination: tuple[str, str]
) -> None:
    """What waits for a client that has closed its connection is dropped and logged as 499. One that has closed its
    sending side only gets its answer."""
    file, gate = deploy(tmp_path, Gated(0.1, tmp_path)), tmp_path / "open"
    rows = {"SERVING_LIMITS__MAX_ROWS": "50000", "SERVING_LIMITS__MAX_QUEUED_ROWS": "100000"}
    limits = {"SERVING_LIMITS__REQUEST_TIMEOUT_S": "60", "PYTHONPATH": str(PROJECT), **rows}
    server = serve(**gunicorn_environment(*combination, SERVING_SETTINGS=file, **limits))
    sizes = (1, 5000, 10_000, 40_000)  # of which the third is decoded when it comes, and the fourth beside the loop
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.send, post_case({"x0": 666.0}))
        wait_until((tmp_path / "begun").exists, "the call to begin")
        (tmp_path / "calls").unlink()
        for size in sizes:
            with server.connect() as client:
                client.sendall(post_case([{"x0": 1.0}] * size).raw())
        half = pool.submit(server.exchange, post_case([{"x0": 1.0}] * 20_000).raw(), "POST", half_close=True)
        lines = wait_until(
            lambda: found if len(found := [line for line in server.lines if line.get("status") == 499]) == 4 else [],
            "a line for each client that has left",
        )
        gate.touch()
        assert first.result().status == half.result().status == 200
    assert len(half.result().json) == 20_000
    assert {line["path"] for line in lines} == {"/predictions"}
    assert (tmp_path / "calls").read_text() == "20000\n"
    server.stop()


def post_raw(version: str, *fields: str) -> bytes:
    lines = [f"POST /predictions HTTP/{version}", "Host: x", "Content-Type: application/json", "Content-Length: 10"]
    return "\r\n".join([*lines, *fields, "", '{"x0":1.0}']).encode()


LAST = post_raw("1.1", "Connection: close")
ASKED = {  # what a client sends, whether it closes its sending side, and the statuses that it gets
    "closed": (LAST, True, "100 200"),
    "open": (LAST, False, "200"),
    "HTTP/1.0": (post_raw("1.0"), True, "200"),
    "HTTP/1.0, kept": (post_raw("1.0", "Connection: keep-alive") + LAST, True, "200"),
    "behind an answer": (b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n" + LAST, True, "200 100 200"),
    "two requests": (post_raw("1.1") + LAST, True, "100 200( 100)? 200"),  # of which the second may wait as well
}


@each_worker()
def test_only_who_may_have_left_is_asked(serve: Starter, tmp_path: Path, combination: tuple[str, str]) -> None:
    """A client that has closed its sending side is asked by `100 Continue` if it is there, once for a request, before
    its answer begins; one that knows HTTP/1.0 only, or has not closed it, is not."""
    server = serve(**gated(tmp_path, combination))
    with holding_up(server, tmp_path), contextlib.ExitStack() as stack:
        clients = {name: stack.enter_context(server.connect()) for name in ASKED}
        for name, (raw, is_closed, _) in ASKED.items():
            clients[name].sendall(raw)
            if is_closed:
                clients[name].shutdown(socket.SHUT_WR)
        see_looks(server)
        (tmp_path / "open").touch()
        for name, (_, _, expected) in ASKED.items():
            received = b"".join(iter(lambda name=name: clients[name].recv(65_536), b""))
            statuses = " ".join(re.findall(r"HTTP/1.1 (\d+)", received.decode()))
            assert re.fullmatch(expected, statuses), (name, statuses)
    server.stop()


@each_worker()
def test_nobody_is_asked_under_tls(serve: Starter, tmp_path: Path, combination: tuple[str, str]) -> None:
    """Nothing that is not encrypted is written between what is."""
    authority, context = trustme.CA(), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    authority.configure_trust(context)
    certificate = {"SERVING_SERVER__CERTFILE": str(tmp_path / "both.pem")}
    server = serve(tls=context, **gated(tmp_path, combination), **certificate)
    with holding_up(server, tmp_path), server.connect() as client:
        client.sendall(LAST)
        with socket.socket(fileno=os.dup(client.fileno())) as plain:
            plain.settimeout(server.patience_s)
            plain.shutdown(socket.SHUT_WR)
            select.select([plain], [], [], 4 * LOOK_S)  # until there is something, or would have been
            (tmp_path / "open").touch()
            assert b"HTTP/1.1" not in b"".join(iter(lambda: plain.recv(65_536), b""))
    server.stop()


def gated(tmp_path: Path, combination: tuple[str, str]) -> dict[str, str]:
    """Return the environment of a server of `Gated`, in which requests wait for long."""
    file = deploy(tmp_path, Gated(0.1, tmp_path))
    limits = {"SERVING_LIMITS__REQUEST_TIMEOUT_S": "60", "PYTHONPATH": str(PROJECT)}
    return gunicorn_environment(*combination, SERVING_SETTINGS=file, **limits)


@contextlib.contextmanager
def holding_up(server: Server, folder: Path) -> Iterator[None]:
    """Have a call that lasts until the gate is open; it is then, at the latest."""
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.send, post_case({"x0": 666.0}))
        try:
            wait_until((folder / "begun").exists, "the call to begin")
            yield
        finally:
            (folder / "open").touch()
        assert first.result().status == 200


def see_looks(server: Server) -> None:
    """Return when those that wait have been looked at three times, as new ones have, one after the other."""
    for _ in range(3):
        with server.connect() as client:
            client.sendall(LAST)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100).startswith(b"HTTP/1.1 100 ")


@pytest.fixture(scope="module")
def hurried_servers(serve_module: Starter) -> dict[tuple[str, str], Server]:
    """Servers that give a body a second to come."""
    return serve_module.each(scale(TWINS, COMBINATIONS), SERVING_LIMITS__REQUEST_TIMEOUT_S="1")


@pytest.mark.parametrize("framing", [b"Content-Length: 1000\r\n\r\n[", b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n["])
@each_worker()
def test_body_has_its_time(
    hurried_servers: dict[tuple[str, str], Server], combination: tuple[str, str], framing: bytes
) -> None:
    """A body that trickles in, and would for minutes, is answered 408 when its time is over, however it is sent."""
    with hurried_servers[combination].connect() as client:
        started = time.monotonic()  # before the server can begin to count
        client.sendall(HEAD + framing)
        blanks = 0
        while not select.select([client], [], [], 0.2)[0] and blanks < 150:
            client.sendall(b" ")
            blanks += 1
        waited_s = time.monotonic() - started
        answer = read_answer(client)
    assert (answer.status, answer.headers["connection"]) == (408, "close")
    assert waited_s > 0.5
    assert blanks < 150


class SlowSenders:
    """Connections that send a byte every second of a request that never ends, half of them of its head; a tenth of them
    sends at a time."""

    def __init__(self, server: Server, count: int) -> None:
        self.server = server
        self.clients = [self.connect(place) for place in range(count)]
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self.thread.join()
        for client in self.clients:
            client.close()

    def connect(self, place: int) -> socket.socket:
        client = self.server.connect()
        client.sendall(HEAD + (b"Content-Length: 1000\r\n\r\n" if place // 10 % 2 else b""))
        return client

    def run(self) -> None:
        turns = itertools.cycle(range(10))
        while not self.ending.wait(0.1):
            for place in range(next(turns), len(self.clients), 10):
                try:
                    self.clients[place].sendall(b"x")
                except OSError:  # it has been cut off
                    self.clients[place].close()
                    self.clients[place] = self.connect(place)


@pytest.mark.alone
@each_worker()
def test_slow_senders_hold_nobody_up(serve: Starter, combination: tuple[str, str]) -> None:
    """Beside 200 connections that send a byte a second, the p99 of a client that keeps its connection, or of one that
    connects anew, at most doubles."""
    server = serve(**gunicorn_environment(*combination, SERVING_LOGGING__ACCESS="false"))
    case = Case("query", "GET", f"/predictions?{QUERY}")
    for keep_alive in share((True, False), combination):
        at_most_doubled: list[bool] = []
        while max(map(at_most_doubled.count, (True, False))) < 3:  # three of five rounds are what their median says
            alone_s = p99_of(server, case, keep_alive)
            with SlowSenders(server, 200):
                at_most_doubled.append(p99_of(server, case, keep_alive) < 2 * alone_s)
        assert at_most_doubled.count(True) == 3, keep_alive
    server.stop()


def p99_of(server: Server, case: Case, keep_alive: bool) -> float:
    with Load(server, case, clients=1, keep_alive=keep_alive) as load:
        load.wait_for(scale(500, 1000))
    assert (load.failures, [*load.answers]) == ([], [200])
    return p99(load.took_s)


def p99(took_s: list[float]) -> float:
    return statistics.quantiles(took_s, n=100)[-1]

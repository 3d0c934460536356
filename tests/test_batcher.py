"""Requests that wait at the same moment share a call of the estimator, and nothing else."""

import asyncio
import http.client
import itertools
import json
import random
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
import threadpoolctl  # type: ignore[import-untyped]
from lightgbm import LGBMClassifier
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from xgboost import XGBClassifier

import app
from serving.logs import configure_logging
from serving.predictor.calls import INLINE_S, BatchQueue, CallCost, Job, measure
from serving.predictor.contract import Rows
from serving.predictor.golden import Golden, is_close
from serving.predictor.model import make_model
from serving.predictor.predictions import Predictions, Template
from serving.predictor.predictor import Predictor
from serving.predictor.proof import Proof, find_dependence
from serving.web.bridges import Binding
from serving.web.service import Service
from tests.lib import estimators
from tests.lib.apps import answers_of, call, call_asgi, make_service, make_settings
from tests.lib.artifacts import deploy
from tests.lib.clients import ROW, Answer, post_case
from tests.lib.proc import count_files
from tests.lib.servers import PROJECT, Server, Starter, gunicorn_environment, wait_until
from tests.lib.sizes import each_worker

N_CLIENTS = 64
N_REQUESTS = 20  # of each client
NOTHING = Predictions(Template(b"{}", {}), [])


def serve_noting(framework: str, **batching: Any) -> tuple[estimators.Noting, Any]:
    """Return an estimator that notes its calls, and the app around it."""
    estimator = estimators.Noting()
    settings = make_settings(framework=framework, features={}, batching=batching)
    configure_logging(settings.logging)
    return estimator, app.FRAMEWORKS[framework](make_service(settings, estimator))


def ask_together(native: Any, estimator: Any, payloads: Sequence[Any]) -> list[Answer]:
    """Send requests that all wait when the estimator is free to answer them, or at once if it has no gate."""
    cases = [post_case(payload) for payload in payloads]
    if not hasattr(native, "wsgi_app"):

        async def ask() -> list[Answer]:
            return await asyncio.gather(*(call_asgi(native, case) for case in cases))

        return asyncio.run(ask())
    with ThreadPoolExecutor(len(cases)) as pool:
        if not hasattr(estimator, "gate"):
            return list(pool.map(lambda case: call(native, case), cases))
        queue, n_calls = service_of(native).queue, len(estimator.calls)
        estimator.gate.clear()
        try:
            answers = [pool.submit(call, native, cases[0])]
            wait_until(lambda: len(estimator.calls) > n_calls, "the first call")
            answers += [pool.submit(call, native, case) for case in cases[1:]]
            n_waiting = sum(map(bool, payloads[1:]))  # an empty array waits for nobody
            wait_until(lambda: queue.queued_jobs == n_waiting, "the others to wait")
        finally:
            estimator.gate.set()
        return [answer.result() for answer in answers]


def service_of(native: Any) -> Service[Any]:
    binding: Binding = native.extensions["serving"] if hasattr(native, "wsgi_app") else native.state.serving
    return binding.service


async def wait_for_jobs(native: Any, count: int) -> None:
    """Let the loop take turns until so many jobs wait."""
    for _ in range(10_000):
        if service_of(native).queue.queued_jobs == count:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"{service_of(native).queue.queued_jobs} jobs wait, not {count}")


def rows(*values: float) -> list[dict[str, float]]:
    return [{"x0": value} for value in values]


def test_rows_that_wait_are_answered_in_one_call(framework: str) -> None:
    """Objects and small arrays share a call, and each request gets its own answers, in its order."""
    estimator, native = serve_noting(framework)
    payloads = [*rows(0, 1, 2, 3), rows(4, 5), rows(6), []]
    answers = ask_together(native, estimator, payloads)
    predictions = [{"prediction": value} for value in (0.0, 2.0, 4.0, 6.0)]
    arrays = [[{"prediction": 8.0}, {"prediction": 10.0}], [{"prediction": 12.0}], []]
    assert [answer.json for answer in answers] == [*predictions, *arrays]
    assert estimator.calls == ([7] if framework == "fastapi" else [1, 6])


@pytest.mark.parametrize(("max_rows", "expected"), [(3, [3, 3, 1]), (1, [1] * 7), (100, [7])])
def test_call_has_no_more_rows_than_the_setting(max_rows: int, expected: list[int]) -> None:
    """`batching.max_rows` bounds what is put together, and 1 leaves each row alone."""
    estimator, native = serve_noting("fastapi", max_rows=max_rows)
    ask_together(native, estimator, rows(*range(7)))
    assert estimator.calls == expected


def test_long_array_is_a_call_of_its_own(framework: str) -> None:
    """An array longer than `batching.max_rows` shares its call with nobody."""
    estimator, native = serve_noting(framework, max_rows=4)
    answers = ask_together(native, estimator, [{"x0": 1}, rows(*range(9)), {"x0": 2}])
    assert [prediction["prediction"] for prediction in answers[1].json] == [2.0 * value for value in range(9)]
    assert 9 in estimator.calls
    assert sum(estimator.calls) == 11


def test_wait_lets_later_requests_share_the_call() -> None:
    """With `batching.max_wait_ms` a call waits for requests that come a little later."""
    estimator, native = serve_noting("fastapi", max_wait_ms=1000)

    async def ask() -> None:
        first = asyncio.create_task(call_asgi(native, post_case({"x0": 1})))
        await wait_for_jobs(native, 1)
        for _ in range(20):  # turns of the loop, in which a call that waits for nobody would be made
            await asyncio.sleep(0)
        await asyncio.gather(first, call_asgi(native, post_case({"x0": 2})))

    asyncio.run(ask())
    assert estimator.calls == [2]


def test_failing_row_fails_alone(framework: str) -> None:
    """Of requests answered in one call only the one with the bad row is 500."""
    estimator, native = serve_noting(framework)
    payloads: list[Any] = [*rows(*range(24)), rows(7, 8)]
    for place in (0, 11, 25):
        bad = [*payloads[:place], {"x0": -1}, *payloads[place:]]
        answers = ask_together(native, estimator, bad)
        assert [answer.status for answer in answers] == [500 if i == place else 200 for i in range(len(bad))]
        good = [answer.json for answer in answers if answer.status == 200]
        assert good == [*({"prediction": 2.0 * x} for x in range(24)), [{"prediction": 14.0}, {"prediction": 16.0}]]


def test_cancelled_request_leaves_nothing_behind() -> None:
    """A request that is given up while it waits is not predicted, and those beside it are."""
    estimator, native = serve_noting("fastapi", max_wait_ms=1000)

    async def ask() -> Answer:
        given_up = asyncio.create_task(call_asgi(native, post_case({"x0": -1})))
        kept = asyncio.create_task(call_asgi(native, post_case({"x0": 2})))
        await wait_for_jobs(native, 2)
        given_up.cancel()
        return await kept

    assert asyncio.run(ask()).json == {"prediction": 4.0}
    assert estimator.calls == [1]


def test_call_for_nobody_is_not_made() -> None:
    """When all that wait are given up there is no call, and the next request is answered."""
    estimator, native = serve_noting("fastapi", max_wait_ms=1000)

    async def ask() -> Answer:
        given_up = [asyncio.create_task(call_asgi(native, post_case({"x0": 1}))) for _ in range(3)]
        await wait_for_jobs(native, 3)
        for task in given_up:
            task.cancel()
        await asyncio.sleep(1)  # which ends after the wait for a full call, in the order of the loop's timers
        service_of(native).queue.max_wait_s = 0
        return await call_asgi(native, post_case({"x0": 2}))

    assert asyncio.run(ask()).json == {"prediction": 4.0}
    assert estimator.calls == [1]


def test_app_in_several_loops_answers_in_each() -> None:
    """An app that two loops run at the same time, or one after the other, answers in all of them."""
    _, native = serve_noting("fastapi", max_wait_ms=20)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            answers = pool.map(lambda x: asyncio.run(call_asgi(native, post_case({"x0": x}))), (1, 2))
            assert [answer.json for answer in answers] == [{"prediction": 2.0}, {"prediction": 4.0}]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_whatever_an_estimator_raises_stays_with_its_row(framework: str, error: type[BaseException]) -> None:
    """Errors that are no exceptions, too, leave those beside them and those to come unharmed."""
    estimator, native = serve_noting(framework)
    estimator.error = error
    for _ in range(2):
        answers = ask_together(native, estimator, rows(1, 2, -1, 3))
        assert [answer.status for answer in answers] == [200, 200, 500, 200]


def test_client_that_leaves_harms_nobody(server: Server) -> None:
    """Connections that end while their answers are made leave the worker as it was."""
    (pid,) = server.worker_pids
    server.post([ROW] * 3)
    open_files = count_files(pid)
    for _ in range(50):
        with server.connect() as client:
            client.sendall(post_case(ROW).raw())
    assert server.post(ROW).json["prediction"] == "setosa"
    wait_until(lambda: count_files(pid) <= open_files + 1, "closed connections")
    assert server.worker_pids == [pid]
    assert "Traceback" not in server.text


def test_answers_agree_with_those_to_rows_alone() -> None:
    """A row's answer in company is the one that it gets alone, up to the last few units of floating point."""
    model = app.make_service(make_settings()).model
    flowers = [dict(zip(ROW, row, strict=True)) for row in load_iris().data.tolist()]
    together = [json.loads(answer) for answer in model.predict_rows(flowers).render()]
    alone = [json.loads(model.predict_rows([row]).render()[0]) for row in flowers]
    assert [answer["prediction"] for answer in together] == [answer["prediction"] for answer in alone]
    for one, other in zip(together, alone, strict=True):
        assert list(one["probabilities"].values()) == pytest.approx(list(other["probabilities"].values()), rel=1e-12)


def test_estimator_that_looks_at_the_whole_call_is_never_batched(
    tmp_path: Path, framework: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the answer to a row depends on the others, requests do not share calls, and the log says so."""
    file = deploy(tmp_path, estimators.Centring(), "x0 = { example = 1.5 }")
    native = app.create_app(app.load_settings(file).model_copy(update={"framework": framework}))
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["event"] == "never_batched"
    answers = ask_together(native, estimators.Centring(), rows(1, 2, 3))
    assert [answer.json for answer in answers] == [{"prediction": 0.0}] * 3


@each_worker()
def test_slow_call_keeps_nothing_else_waiting(serve: Starter, tmp_path: Path, combination: tuple[str, str]) -> None:
    """Health checks that come after a call has begun are answered before it ends."""
    file = deploy(tmp_path, estimators.Gated(0.05, tmp_path))
    environment = {"SERVING_SETTINGS": file, "PYTHONPATH": str(PROJECT), "SERVING_LOGGING__FORMAT": "json"}
    server = serve(**gunicorn_environment(*combination, SERVING_LIMITS__REQUEST_TIMEOUT_S="60", **environment))
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(server.post, {"x0": 666})
        try:
            wait_until((tmp_path / "begun").exists, "the call to begin")
            answers = [server.get("/health/live").status for _ in range(20)]
            was_done = slow.done()
        finally:
            (tmp_path / "open").touch()
        assert slow.result().json == {"prediction": 666.0}
    assert (answers, was_done) == ([200] * 20, False)
    server.stop()


class Clock:
    """What `time.perf_counter` tells: only what a test has passed."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now_s)
    return clock


@pytest.mark.parametrize(("n_rows", "took_s", "expected"), [(1, 0.11, True), (2000, 0.11, False)])
def test_call_far_longer_than_expected_moves_later_ones_out_of_the_loop(
    clock: Clock, n_rows: int, took_s: float, expected: bool
) -> None:
    """A long array may take long; a row may not, and those after it are expected to be like it."""

    def predict(rows: Rows) -> Predictions:
        clock.pass_s(took_s)
        return NOTHING

    queue = BatchQueue(predict, predict, max_rows=256, max_wait_s=0, cost=CallCost(1e-4, 1e-5))
    job = Job(n_rows, [{}] * n_rows)
    assert queue.call([job]) == []
    assert queue.needs_thread([Job(1, [{}])]) is expected
    assert (queue.cost.seconds_for(1) >= took_s) is expected


def test_call_that_was_disturbed_once_returns_to_the_loop(clock: Clock) -> None:
    """What was slow at the start or once since, as others had the core, is not held against calls that are quick."""
    delays = [0.03, 0.03]

    def predict(rows: Rows) -> Predictions:
        clock.pass_s(delays.pop(0) if delays else 1e-4)
        return NOTHING

    queue = BatchQueue(predict, predict, max_rows=256, max_wait_s=0, cost=CallCost(*measure(predict, {})))
    jobs = [Job(1, [{}])]
    assert not queue.needs_thread(jobs)
    delays.append(0.15)
    queue.call(jobs)
    assert queue.needs_thread(jobs)
    for _ in range(50):
        queue.call(jobs)
    assert not queue.needs_thread(jobs)


@pytest.mark.parametrize("stall_s", [0.0, 0.05, 0.2, 1.0, 30.0])
@pytest.mark.parametrize(("call_s", "row_s"), [(3e-4, 1.28e-4), (1e-3, 0.0), (0.05, 1e-5)])
def test_estimates_return_to_what_calls_take(stall_s: float, call_s: float, row_s: float) -> None:
    """After a stall, and from any estimate, each size of call comes to run where what it takes says."""
    for believed_s in (0.0, 1e-3, 1.0):
        cost = CallCost(believed_s, believed_s / 100)
        sizes = [1, 1, 1, 64, 500, 1, 3000]
        for turn in range(700):
            n_rows = sizes[turn % len(sizes)]
            took_s = stall_s if turn == 200 and stall_s else call_s + row_s * n_rows
            cost.learn(n_rows, took_s)
        for n_rows in sizes:
            took_s = call_s + row_s * n_rows
            if not 0.7 < took_s / INLINE_S < 1.4:
                is_slow = cost.seconds_for(n_rows) > INLINE_S
                assert is_slow is (took_s > INLINE_S), (n_rows, took_s, cost)


def expected_answers(estimator: Any) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """Return rows all over the features, and the estimator's answers to them."""
    X = np.random.default_rng(0).uniform(0, 8, (500, 4)).round(2)
    probabilities = [dict(zip(estimator.classes_, row, strict=True)) for row in estimator.predict_proba(X).tolist()]
    answers = [
        {"prediction": prediction, "probabilities": row}
        for prediction, row in zip(estimator.predict(X).tolist(), probabilities, strict=True)
    ]
    return [dict(zip(ROW, row, strict=True)) for row in X.tolist()], answers


def agree(given: Any, expected: dict[str, Any]) -> bool:
    return is_close(given, expected)


@each_worker()
def test_every_client_gets_its_own_answers_under_load(
    servers: dict[tuple[str, str], Server], combination: tuple[str, str]
) -> None:
    """64 clients send different rows, alone and in arrays, good and bad, and each gets exactly its own answers."""
    flowers, answers = expected_answers(app.make_service(make_settings()).model.predictor.estimator)
    counts, wrong = itertools.count(), []

    def check(client: http.client.HTTPConnection, chance: random.Random) -> None:
        places = [chance.randrange(len(flowers)) for _ in range(chance.choice((1, 1, 1, 5, 300)))]
        payload: Any = [flowers[place] for place in places]
        is_bad = chance.random() < 0.1
        if is_bad:
            payload[-1] = payload[-1] | {"petal_width": "wide"}
        client.request("POST", "/predictions", json.dumps(payload), {"Content-Type": "application/json"})
        response = client.getresponse()
        body = json.loads(response.read())
        next(counts)
        if is_bad:
            is_right = response.status == 422 and body["detail"][0]["loc"] == ["body", len(places) - 1, "petal_width"]
        else:
            pairs = zip(body, [answers[place] for place in places], strict=True)
            is_right = response.status == 200 and all(agree(*pair) for pair in pairs)
        if not is_right:
            wrong.append((payload, response.status, body))

    def work(seed: int) -> None:
        client = http.client.HTTPConnection("127.0.0.1", servers[combination].port, timeout=30)
        for turn in range(1, N_REQUESTS + 1):
            check(client, random.Random(seed + turn * N_CLIENTS))
        client.close()

    with ThreadPoolExecutor(N_CLIENTS) as pool:
        list(pool.map(work, range(N_CLIENTS)))
    assert not wrong
    assert next(counts) == N_REQUESTS * N_CLIENTS


def test_middleware_and_hooks_see_predictions() -> None:
    """What a user adds for every request is in the way of predictions too, and without it nothing else is."""
    fast, flat = (app.create_app(make_settings(framework=name)) for name in ("fastapi", "flask"))
    seen = []
    for native in (fast, flat):
        plain = call(native, post_case(ROW))

        if native is fast:

            @native.middleware("http")
            async def note(request: Any, call_next: Any) -> Any:
                seen.append(request.url.path)
                return await call_next(request)

        else:

            @native.before_request
            def note_too() -> None:
                import flask

                seen.append(flask.request.path)

        assert call(native, post_case(ROW)) == plain
    assert seen == ["/predictions", "/predictions"]


def test_threads_and_jobs_are_limited_to_the_share_of_a_worker() -> None:
    """OpenMP, BLAS and the estimator's own jobs have no more threads than a worker's share of the cores."""
    settings = make_settings(features={}, server={"workers": 1_000})
    busy = [
        RandomForestClassifier(3, n_jobs=8),
        LGBMClassifier(n_estimators=3, verbose=-1),  # whose n_jobs is None, which is every core to it
        XGBClassifier(n_estimators=3),
    ]

    def threads_of(service: Service) -> set[int]:
        service.model.predict_rows([{"x0": 1.0}])
        return {pool["num_threads"] for pool in threadpoolctl.threadpool_info()}

    before = threadpoolctl.threadpool_info()
    try:
        for estimator in busy:
            estimator.fit(np.arange(8.0).reshape(-1, 1), [0, 1] * 4)
            service = make_service(settings, estimator)
            for _ in range(2):  # threads, each of which OpenMP counts for itself
                with ThreadPoolExecutor(1) as pool:
                    assert pool.submit(threads_of, service).result() == {1}
            assert estimator.n_jobs == 1
    finally:
        threadpoolctl.threadpool_limits({pool["prefix"]: pool["num_threads"] for pool in before})


@pytest.mark.parametrize(("workers", "threads"), [("auto", 1), (1, None), (2, None), (1_000, 1)])
def test_workers_and_threads_share_the_cores(workers: Any, threads: int | None) -> None:
    """Workers times threads is no more than the cores, but for more workers than that."""
    settings = make_settings(server={"workers": workers})
    assert settings.threads == (threads or max(1, settings.cores // workers))
    assert settings.workers * settings.threads <= max(settings.cores, settings.workers)


def test_start_says_how_cores_are_shared(server: Server) -> None:
    """One line of the log has cores, workers and threads."""
    (line,) = (line for line in server.lines if line["event"] == "core_budget")
    assert (line["workers"], line["threads"]) == (1, line["cores"])


class Ends(BaseException):
    """What native extensions raise when they panic."""


@pytest.mark.parametrize("error", [Ends, StopIteration, asyncio.CancelledError])
@pytest.mark.parametrize("n_rows", [1, 300])
def test_request_after_a_fatal_one_is_answered(framework: str, error: type[BaseException], n_rows: int) -> None:
    """Neither the batcher nor the thread beside it ends with what an estimator raises."""
    estimator, native = serve_noting(framework)
    estimator.error = error
    for call_s in (0.0, 1.0):  # in the loop, and in the thread beside it
        service_of(native).queue.cost.call_s = call_s
        assert call(native, post_case(rows(*[-1] * n_rows))).status == 500
        assert call(native, post_case({"x0": 2})).json == {"prediction": 4.0}


def test_estimator_is_asked_one_thing_at_a_time(framework: str) -> None:
    """Small batches and long arrays never overlap, in the loop or beside it: an estimator may keep what it is asked."""
    estimator, native = serve_noting(framework)
    service_of(native).queue.cost.row_s = 1e-4  # so that long arrays are costly, and single rows are not
    overlaps: list[int] = []
    predict, running = estimator.predict, threading.Lock()

    def watched(X: Any) -> Any:
        overlaps.append(not running.acquire(blocking=False))
        time.sleep(0.002)
        answer = predict(X)
        if running.locked():
            running.release()
        return answer

    estimator.predict = watched
    payloads = [rows(*range(300)) if place % 5 == 0 else {"x0": place} for place in range(40)]
    answers = ask_together(native, estimator, payloads)
    assert all(answer.status == 200 for answer in answers)
    assert not any(overlaps)


@pytest.mark.parametrize("wrong", [0, 1, -1])
@pytest.mark.parametrize("n_rows", [1, 3, 300, 5000])
def test_wrong_number_of_answers_is_an_error(wrong: int, n_rows: int) -> None:
    """An estimator that gives more or fewer answers than rows gives nobody another's."""
    estimator, native = serve_noting("fastapi")
    estimator.predict = lambda X: np.zeros(len(X) + wrong)
    assert call(native, post_case(rows(*range(n_rows)))).status == (500 if wrong else 200)


def test_full_batch_waits_for_nobody(framework: str) -> None:
    """`batching.max_wait_ms` is the time to wait for a full call, not for one that is full already."""
    for max_rows, n_requests in ((1, 1), (3, 3)):
        estimator, native = serve_noting(framework, max_rows=max_rows)
        queue = service_of(native).queue
        queue.max_wait_s = 3 * queue.timeout_s  # after which the answer would be 503
        answers = ask_at_once(native, rows(*range(n_requests)))
        assert [answer.status for answer in answers] == [200] * n_requests
        assert sum(estimator.calls) == n_requests


def test_lone_request_does_not_wait(framework: str) -> None:
    """By default nothing is waited for: most of a hundred requests, one after the other, take far less than a wait."""
    (_, native), (_, waiting) = serve_noting(framework), serve_noting(framework, max_wait_ms=200)
    alone_s, waited_s = [], []
    for _ in range(5):
        alone_s += [time_of(native) for _ in range(20)]
        waited_s.append(time_of(waiting))
    assert statistics.median(alone_s) < statistics.median(waited_s) / 10


def time_of(native: Any) -> float:
    started = time.perf_counter()
    assert call(native, post_case({"x0": 1})).status == 200
    return time.perf_counter() - started


def ask_at_once(native: Any, payloads: Sequence[Any]) -> list[Answer]:
    return ask_together(native, estimators.Centring(), payloads)


def test_writing_is_a_part_of_the_call() -> None:
    """What takes long to write is expected to take as long, so that later calls run beside the loop."""
    queue = BatchQueue(lambda rows: NOTHING, lambda X: NOTHING, 256, 0.0)
    job = Job(1, [{}], lambda predictions: time.sleep(11 * INLINE_S) or "written")
    assert not queue.needs_thread([job])
    assert queue.call([job]) == []
    assert job.result() == "written"
    assert queue.needs_thread([job])


def test_decoding_is_no_call_that_might_not_end() -> None:
    """A body that takes long to decode does not cost its worker, which ends for a prediction that never ends."""
    queue = BatchQueue(lambda rows: NOTHING, lambda X: NOTHING, 256, 0.0)
    called: list[float | None] = []

    def decode() -> list[float]:
        called.append(queue.called_at)
        return [1.0, 2.0]

    job = Job(100, decode=decode, encode=lambda predictions: called.append(queue.called_at))
    job.read()
    assert queue.call([job]) == []
    assert called[0] is None
    assert called[1] is not None
    assert (job.n_rows, job.call and job.call.n_rows, queue.called_at) == (2, 2, None)


@pytest.mark.parametrize("golden_rows", [[{"x0": 1.5}] * 3, [{"x0": 1.5}, {"x0": 2.5}]], ids=["alike", "different"])
def test_dependence_is_found_with_golden_rows(golden_rows: list[dict[str, float]]) -> None:
    """Golden rows that are all alike do not hide that answers depend on the others of a call."""
    golden = Golden(versions={}, rows=golden_rows, predictions=[{"prediction": 0.0}] * len(golden_rows))
    model = make_model(estimators.Centring(), Path("model.joblib"), {}, golden)
    assert find_dependence(model) is not None
    assert not app.make_service(
        make_settings(features={}), model, Proof(never_batched=find_dependence(model))
    ).queue.can_share


def test_estimator_that_takes_one_row_only_is_served() -> None:
    """Rows that fail together are asked alone, from the first request on."""
    estimator = estimators.Noting()
    estimator.most = 1
    settings = make_settings(features={})
    configure_logging(settings.logging)
    model = make_model(estimator, Path("model.joblib"), {})
    service = app.make_service(settings, model)
    estimator.calls.clear()
    answers = ask_at_once(app.build_fastapi(service), rows(1, 2, 3))
    assert [answer.json for answer in answers] == [{"prediction": 2.0}, {"prediction": 4.0}, {"prediction": 6.0}]
    assert estimator.calls == [1, 1, 1]


def test_retries_let_other_requests_through() -> None:
    """While the failing rows of a large batch are looked for, the loop does other things between two calls."""
    estimator, native = serve_noting("fastapi")

    async def ask() -> list[int]:
        load = asyncio.gather(*(call_asgi(native, post_case({"x0": -1})) for _ in range(64)))
        seen = [0]  # calls by each turn of the loop
        while not load.done():
            await asyncio.sleep(0)
            seen.append(len(estimator.calls))
        assert {answer.status for answer in load.result()} == {500}
        return seen

    seen = asyncio.run(ask())
    assert max(later - earlier for earlier, later in itertools.pairwise(seen)) == 1
    assert len(estimator.calls) > 100


def test_one_call_gives_class_and_probabilities() -> None:
    """Where the likeliest class is the prediction, an estimator is asked for probabilities only."""
    estimator = LogisticRegression().fit([[0.0], [1.0]], ["a", "b"])
    predictor = Predictor(estimator)
    asked = []
    estimator.predict = lambda X: asked.append(X)
    assert answers_of(predictor, np.array([[2.0]]))[0]["prediction"] == "b"
    assert not asked


def test_lean_call_leaves_out_what_the_contract_has_checked() -> None:
    """scikit-learn does not look for infinity where none comes in, and does where a step could make some."""
    X, y = np.arange(20.0).reshape(10, 2), [0, 1] * 5
    for estimator, is_lean in (
        (LogisticRegression(), True),
        (make_pipeline(StandardScaler(), LogisticRegression()), False),
    ):
        service = make_service(make_settings(features={}), estimator.fit(X, y))
        seen = []
        method = estimator.predict_proba
        estimator.predict_proba = lambda X, method=method, seen=seen: (seen.append(sklearn.get_config()), method(X))[1]
        service.model.predict_rows([{"x0": 1.0, "x1": 2.0}])
        assert [config["assume_finite"] for config in seen] == [is_lean]


@pytest.mark.parametrize("is_given", [True, False])
def test_lean_call_leaves_no_trace(is_given: bool) -> None:
    """What a thread has set in scikit-learn is so again after a call, also after one that failed."""
    predictor = Predictor(LogisticRegression().fit([[0.0], [1.0]], ["a", "b"]), assume_finite=True)
    with sklearn.config_context(assume_finite=is_given):
        predictor.ask(np.array([[2.0]]))
        with pytest.raises(ValueError, match="2 features"):
            predictor.ask(np.array([[2.0, 3.0]]))
        assert sklearn.get_config()["assume_finite"] is is_given

"""The load bench measures what it says, and judges it rightly."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.comparisons import Panel
from bench.judge import (
    Comparison,
    Outcome,
    Workload,
    added_us,
    judge,
    make_table,
    rate_ratio,
    tail_ratio,
    without_failures,
)
from bench.run import tell_missing
from bench.servers import GEVENT, BenchError, DidNotStartError, MeasuredServer, reference, service
from bench.stream import Stream, stream_results
from bench.wrk import Sample, run_wrk, write_script
from tests.lib.servers import BIN, run
from tests.lib.sizes import scale

FLASK_HELLO = reference("Flask hello", "flask_hello", GEVENT)
OURS, THEIRS = Workload(FLASK_HELLO), Workload(FLASK_HELLO, connections=1)
CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def hello_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeasuredServer]:
    """A reference app, serving."""
    server = MeasuredServer(FLASK_HELLO, CORES, tmp_path_factory.mktemp("bench") / "log")
    yield server.wait()
    server.stop(signal.SIGKILL)


def samples(*rates: float, p50_us: float = 100, p99_us: float = 200) -> list[Sample]:
    return [Sample(rate, p50_us, p99_us, 0) for rate in rates]


def test_wrk_measures_a_reference_app(hello_server: MeasuredServer, tmp_path: Path) -> None:
    """What wrk prints is read as rate and latency, without failures."""
    write_script("/predictions", 1, tmp_path / "script.lua")
    hello_server.verify(rows=1)
    sample = run_wrk(hello_server.url, tmp_path / "script.lua", connections=2)
    assert sample.n_failed == 0
    assert sample.requests_s > 10
    assert 0 < sample.p50_us <= sample.p99_us


def test_refusals_are_failures(hello_server: MeasuredServer, tmp_path: Path) -> None:
    """A load whose answers are 404 has no rate, however fast they come."""
    write_script("/nowhere", 10, tmp_path / "script.lua")
    sample = run_wrk(hello_server.url, tmp_path / "script.lua", connections=2)
    assert without_failures([sample, *samples(1)]) == f"{sample.n_failed} requests failed"
    assert sample.n_failed > 0


def test_wrong_answers_end_the_bench(hello_server: MeasuredServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that should predict, and says hello, is not measured."""
    monkeypatch.setattr(hello_server, "deployment", dataclasses.replace(FLASK_HELLO, is_hello=False))
    with pytest.raises(BenchError, match="Flask hello answered"):
        hello_server.verify(rows=1)


def test_stream_is_measured_beside_arrays(tmp_path: Path) -> None:
    """Every row is answered either way; without a server the results say why."""
    server = MeasuredServer(service("fastapi"), CORES, tmp_path / "log")
    try:
        speed, memory = stream_results(Stream(20_001, tmp_path), "fastapi", server.wait(), 1, "")
    finally:
        server.stop(signal.SIGKILL)
    assert speed.title == "20,001 rows as a stream of JSON lines / as arrays of 10,000, fastapi"
    assert speed.figure is not None
    assert memory.figure is not None
    assert speed.figure > 0 <= memory.figure
    told = [result.measured for result in stream_results(Stream(1, tmp_path), "fastapi", None, 1, "did not start")]
    assert told == ["did not start"] * 2


def test_stream_without_its_answers_ends_the_bench(hello_server: MeasuredServer, tmp_path: Path) -> None:
    """A server that says hello to the rows is not measured."""
    stream = Stream(3, tmp_path)
    for send in (stream.send, stream.send_arrays):
        with pytest.raises(BenchError, match=r"answered [01] of 3 rows"):
            send(hello_server)


def test_service_that_does_not_start_says_why(tmp_path: Path) -> None:
    """The last line of its log tells."""
    server = MeasuredServer(service("django"), CORES, tmp_path / "log")
    with pytest.raises(DidNotStartError, match="'django'"):
        server.wait()


@pytest.mark.parametrize(
    ("ours", "theirs", "comparison", "figure", "is_met"),
    [
        (samples(60, 9, 6), samples(100, 10, 10), Comparison("", OURS, THEIRS, 0.6, rate_ratio), 0.6, True),
        (samples(50, 9, 5), samples(100, 10, 10), Comparison("", OURS, THEIRS, 0.6, rate_ratio), 0.5, False),
        (samples(1, p99_us=300), [], Comparison("", OURS, None, 3, tail_ratio, at_most=True), 3, True),
        (samples(1, p99_us=301), [], Comparison("", OURS, None, 3, tail_ratio, at_most=True), 3.01, False),
        (samples(1, p50_us=190), samples(1), Comparison("", OURS, THEIRS, 90, added_us, "µs", at_most=True), 90, True),
        ("did not start", samples(1), Comparison("", OURS, THEIRS, 0, rate_ratio), None, False),
        (samples(1), "2 requests failed", Comparison("", OURS, THEIRS, 3, rate_ratio, at_most=True), None, False),
    ],
    ids=["ratio in a round", "short", "tail", "long tail", "latency", "not started", "reference failed"],
)
def test_cases_are_judged(
    ours: Outcome, theirs: Outcome, comparison: Comparison, figure: float | None, is_met: bool
) -> None:
    """Figures are medians over rounds, and none where there is nothing to measure."""
    result = judge(comparison, {OURS: ours, THEIRS: theirs})
    assert result.figure == pytest.approx(figure)
    assert result.is_met == is_met


def test_table_says_what_falls_short() -> None:
    """Below the table stand those of its cases that miss their goals."""
    comparisons = [Comparison("fast", OURS, THEIRS, 0.5, rate_ratio), Comparison("slow", OURS, THEIRS, 2, rate_ratio)]
    table = make_table([judge(each, {OURS: samples(1234), THEIRS: samples(1000)}) for each in comparisons])
    assert "| slow / Flask hello | 1,234 requests/s; p50 0.100 ms, p99 0.200 ms |" in table
    assert table.endswith("1 of 2 goals are met. Short of theirs:\n\n- slow / Flask hello")


def test_points_that_curves_lack_are_told() -> None:
    """A curve without a point at an end says so below the table, for the plot does not."""
    panel = Panel("rows", "rows in a request", {"service": [(1, OURS), (10_000, THEIRS)]})
    told = tell_missing([panel], {OURS: samples(1), THEIRS: "40 requests failed"})
    assert told.endswith("Curves lack:\n\n- rows: service at 10,000: 40 requests failed")
    assert tell_missing([panel], {OURS: samples(1), THEIRS: samples(2)}) == ""


def test_missing_wrk_is_named() -> None:
    """Without wrk the bench ends with how to install it."""
    done = run("python -m bench.run --short", PATH=str(BIN))
    assert done.returncode == 1
    assert "apt-get install wrk" in done.stderr


def test_parts_are_timed() -> None:
    """Each part of a request has its time: what does more takes longer, and the estimator has its share of a call."""
    table = run(f"python -m bench.parts --loops {scale(20, 350)}").stdout
    times_us = {name: float(time_us) for name, time_us in (line[2:-2].split(" | ") for line in table.splitlines()[2:])}

    def of(start: str) -> float:
        return next(us for name, us in times_us.items() if name.startswith(start))

    assert len(times_us) == 8
    assert 0 < of("a request without") < of("the same with") < of("a call for 64")
    assert 0 < of("`pre") < 2 * of("a call for 1 row")
    assert of("a request without") < min(of(f"1000 rows: {part}") for part in ("JSON", "`pre", "numbers"))

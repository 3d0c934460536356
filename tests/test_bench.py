"""The load bench measures what it says, and judges it rightly."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.judge import Case, Load, Outcome, added_us, judge, make_table, rate_ratio, tail_ratio
from bench.load import Sample, run_wrk, write_script
from bench.run import without_failures
from bench.servers import GEVENT, BenchError, DidNotStartError, Running, reference, service
from tests.lib.servers import BIN, PROJECT

HELLO = reference("Flask hello", "flask_hello", GEVENT)
OURS, THEIRS = Load(HELLO), Load(HELLO, connections=1)
CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def hello(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A reference app, serving."""
    running = Running(HELLO, CORES, tmp_path_factory.mktemp("bench") / "log")
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def samples(*rates: float, p50_us: float = 100, p99_us: float = 200) -> list[Sample]:
    return [Sample(rate, p50_us, p99_us, 0) for rate in rates]


def test_wrk_measures_a_reference_app(hello: Running, tmp_path: Path) -> None:
    """What wrk prints is read as rate and latency, without failures."""
    write_script("/predictions", 1, tmp_path / "script.lua")
    hello.check(rows=1)
    sample = run_wrk(hello.url, tmp_path / "script.lua", connections=2)
    assert sample.failures == 0
    assert sample.requests_s > 10
    assert 0 < sample.p50_us <= sample.p99_us


def test_refusals_are_failures(hello: Running, tmp_path: Path) -> None:
    """A load whose answers are 404 has no rate, however fast they come."""
    write_script("/nowhere", 10, tmp_path / "script.lua")
    sample = run_wrk(hello.url, tmp_path / "script.lua", connections=2)
    assert without_failures([sample, *samples(1)]) == f"{sample.failures} requests failed"
    assert sample.failures > 0


def test_wrong_answers_end_the_bench(hello: Running) -> None:
    """A server that should predict, and says hello, is not measured."""
    hello.server = dataclasses.replace(HELLO, is_hello=False)
    with pytest.raises(BenchError, match="Flask hello answered"):
        hello.check(rows=1)


def test_service_that_does_not_start_says_why(tmp_path: Path) -> None:
    """The last line of its log tells."""
    running = Running(service("django"), CORES, tmp_path / "log")
    with pytest.raises(DidNotStartError, match="'django'"):
        running.wait()


@pytest.mark.parametrize(
    ("ours", "theirs", "case", "figure", "is_met"),
    [
        (samples(60, 9, 6), samples(100, 10, 10), Case("", OURS, THEIRS, 0.6, rate_ratio), 0.6, True),
        (samples(50, 9, 5), samples(100, 10, 10), Case("", OURS, THEIRS, 0.6, rate_ratio), 0.5, False),
        (samples(1, p99_us=300), [], Case("", OURS, None, 3, tail_ratio, at_most=True), 3, True),
        (samples(1, p99_us=301), [], Case("", OURS, None, 3, tail_ratio, at_most=True), 3.01, False),
        (samples(1, p50_us=190), samples(1), Case("", OURS, THEIRS, 90, added_us, "µs", at_most=True), 90, True),
        ("did not start", samples(1), Case("", OURS, THEIRS, 0, rate_ratio), None, False),
        (samples(1), "2 requests failed", Case("", OURS, THEIRS, 3, rate_ratio, at_most=True), None, False),
    ],
    ids=["ratio in a round", "short", "tail", "long tail", "latency", "not started", "reference failed"],
)
def test_cases_are_judged(ours: Outcome, theirs: Outcome, case: Case, figure: float | None, is_met: bool) -> None:
    """Figures are medians over rounds, and none where there is nothing to measure."""
    row = judge(case, {OURS: ours, THEIRS: theirs})
    assert row.figure == pytest.approx(figure)
    assert row.is_met == is_met


def test_table_says_what_falls_short() -> None:
    """Below the table stand those of its cases that miss their goals."""
    cases = [Case("fast", OURS, THEIRS, 0.5, rate_ratio), Case("slow", OURS, THEIRS, 2, rate_ratio)]
    table = make_table([judge(case, {OURS: samples(1234), THEIRS: samples(1000)}) for case in cases])
    assert "| slow / Flask hello | 1,234 requests/s; p50 0.100 ms, p99 0.200 ms |" in table
    assert table.endswith("1 of 2 goals are met. Short of theirs:\n\n- slow / Flask hello")


def test_missing_wrk_is_named() -> None:
    """Without wrk the bench ends with how to install it."""
    command = [sys.executable, "-m", "bench.run", "--short"]
    done = subprocess.run(command, cwd=PROJECT, env={"PATH": str(BIN)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "apt-get install wrk" in done.stderr


def test_parts_are_timed() -> None:
    """Each part of a request has its time, and a call for a row takes longer than the estimator's share of it."""
    command = [BIN / "python", "-m", "bench.parts"]
    table = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    times_us = {name: float(time_us) for name, time_us in (line[2:-2].split(" | ") for line in table.splitlines()[2:])}
    call_us, predict_us = (
        next(us for name, us in times_us.items() if name.startswith(start)) for start in ("a call for 1", "`pre")
    )
    assert len(times_us) == 8
    assert call_us > predict_us > 0

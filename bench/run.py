"""Measure the service against reference apps in the same run, and judge it by the goals of its design. Needs Linux.

`make bench` writes `results.md` and `results.png` beside this file; `make bench-short` is a look of under a minute.
"""

import argparse
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.comparisons import SLOW_S, Panel, make_comparisons, make_panels
from bench.judge import Comparison, Outcome, Result, Workload, judge, make_table, without_failures
from bench.plot import plot
from bench.servers import BenchError, Deployment, DidNotStartError, MeasuredServer, Models, service
from bench.stream import STREAM_ROWS, Stream, stream_results
from bench.wrk import INSTALL, Sample, run_wrk, write_script
from tests.lib.proc import private_mb
from tests.lib.servers import PROJECT

FOLDER = Path(__file__).parent
LIBRARIES = ["gunicorn", "uvicorn", "gevent", "fastapi", "flask", "scikit-learn", "onnxruntime", "numpy"]
MEMORY_TITLE, MEMORY_CHECKS = "private memory of a further worker, 104 MB model", 5
START_TITLE, START_S = "start to first answer / its imports", 4
STREAM_TITLE, STREAM_S = "a stream of JSON lines", 6
IMPORTS = "import sklearn.linear_model, fastapi"
PREDICT_US = """
import statistics, sys, time, joblib, numpy
estimator, X, times_ns = joblib.load(sys.argv[1]), numpy.array([[5.1, 3.5, 1.4, 0.2]]), []
for _ in range(2000):
    start_ns = time.perf_counter_ns()
    estimator.predict_proba(X)
    times_ns.append(time.perf_counter_ns() - start_ns)
print(statistics.median(times_ns) / 1000)
"""


class Bench:
    """What a run has: its rounds, models, a folder for logs and scripts, a core for servers, a bar for progress."""

    def __init__(self, folder: Path, rounds: int, is_short: bool) -> None:
        self.folder, self.rounds, self.is_short, self.models = folder, rounds, is_short, Models(folder)
        self.cores = sorted(os.sched_getaffinity(0))
        self.core = self.cores[:1]
        os.sched_setaffinity(0, {self.cores[-1]})  # wrk inherits it
        self.chance = random.Random(0)
        self.bar: Any = tqdm(bar_format="{desc:<64.64} {percentage:3.0f}% |{bar}| {elapsed}, left {remaining}")
        self.problems: dict[Deployment, str] = {}  # of those that did not start

    def measure_all(self, only: str) -> tuple[list[Result], list[Panel], dict[Workload, Outcome]]:
        """Measure the comparisons and curves that have `only` in their titles."""
        groups = make_comparisons(self.models, self.measure_predict_us(min(self.rounds, 3)))
        groups = [[comparison for comparison in group if only in comparison.title] for group in groups]
        panels = [] if self.is_short else make_panels(self.models, self.cores[:2])
        panels = [panel for panel in panels if only in panel.title]
        starts, curve_rounds = min(self.rounds, 7) * (only in START_TITLE), min(self.rounds, 3)
        seconds = [self.seconds(workloads_of(group), self.rounds) for group in groups]
        seconds += [self.seconds(panel.workloads, curve_rounds) for panel in panels]
        streams = min(self.rounds, 5) * (only in STREAM_TITLE)
        once_s = START_S * (starts + (only in MEMORY_TITLE)) + 2 * STREAM_S * streams
        self.bar.reset(sum(seconds) + once_s)

        results: list[Result] = []
        curves: dict[Workload, Outcome] = {}
        for group in groups:
            outcomes = self.measure(workloads_of(group), self.rounds, self.core)
            results += [judge(comparison, outcomes) for comparison in group]
        results += [self.measure_memory()] if only in MEMORY_TITLE else []
        results += [self.measure_start(starts)] if starts else []
        results += self.measure_streams(streams) if streams else []
        for panel in panels:
            curves |= self.measure(panel.workloads, curve_rounds, list(panel.cores) or self.core)
        return results, panels, curves

    def seconds(self, workloads: Sequence[Workload], rounds: int) -> int:
        """Return how long workloads take; a short run has no round to warm up, nor more for slow ones."""
        return len(workloads) * rounds if self.is_short else sum(each.seconds for each in workloads) * (1 + rounds)

    def measure(self, workloads: Sequence[Workload], rounds: int, cores: list[int]) -> dict[Workload, Outcome]:
        """Return each workload's samples: in a round each has its turn, in an order of its own, and the rest idle."""
        warm_ups = 0 if self.is_short else 1
        with ExitStack() as stack:
            servers = self.start_all([each.deployment for each in workloads], cores, stack)
            samples: dict[Workload, list[Sample]] = {each: [] for each in workloads if each.deployment in servers}
            for workload in samples:
                servers[workload.deployment].verify(workload.rows)
            for _ in range(warm_ups + rounds):
                for workload in self.chance.sample(list(samples), len(samples)):
                    samples[workload].append(self.measure_once(workload, servers[workload.deployment]))
        outcomes = {workload: without_failures(taken[warm_ups:]) for workload, taken in samples.items()}
        return {each: outcomes.get(each, self.problems.get(each.deployment, "")) for each in workloads}

    def start_all(
        self, deployments: Sequence[Deployment], cores: list[int], stack: ExitStack
    ) -> dict[Deployment, MeasuredServer]:
        """Start servers side by side, and return those that run; of the service, some may not.

        Each starts on one core, for pools of threads of that size; every other one on wrk's, which has time until then.
        """
        self.bar.set_description(f"starting: {len(set(deployments))}")
        started = []
        for number, deployment in enumerate(dict.fromkeys(deployments)):
            starting = [self.cores[-1]] if number % 2 and len(cores) == 1 else cores
            started.append(MeasuredServer(deployment, starting, self.folder / f"{number}.log"))
            stack.callback(started[-1].stop, signal.SIGKILL)
        for server in started:
            try:
                server.wait().move(cores)
            except DidNotStartError as error:
                if server.deployment.is_reference:
                    raise
                reason = str(error).replace(f"{self.folder}/", "").replace(f"{PROJECT}/", "")
                self.problems[server.deployment] = f"did not start: {reason}"
        return {server.deployment: server for server in started if server.deployment not in self.problems}

    def measure_once(self, workload: Workload, server: MeasuredServer) -> Sample:
        """Measure once, from rest."""
        self.bar.set_description(
            f"{server.deployment.label}; connections {workload.connections}, {workload.form} {workload.rows}"
        )
        path = server.path(workload.rows, workload.form)
        script = self.folder / f"{workload.form} {workload.rows}{path.replace('/', '-')}.lua"
        if not script.exists():
            write_script(path, workload.rows, script, workload.form)
        server.settle()
        seconds = 1 if self.is_short else workload.seconds
        sample = run_wrk(server.url, script, workload.connections, seconds)
        self.bar.update(seconds)
        return sample

    def measure_memory(self) -> Result:
        """Return the larger private memory of two workers that have answered some rows."""
        environment = {"SERVING_SERVER__WORKERS": "2", **self.models.environment("neighbours")}
        deployment, figure, told = service("fastapi", "nearest neighbours", **environment), None, ""
        with ExitStack() as stack:
            for server in self.start_all([deployment], self.core, stack).values():
                for _ in range(MEMORY_CHECKS):
                    server.verify(rows=1)
                workers_mb = [private_mb(pid) for pid in server.worker_pids]
                figure, told = max(workers_mb), " and ".join(f"{worker_mb:.0f} MB" for worker_mb in workers_mb)
        self.bar.update(START_S)
        return Result(MEMORY_TITLE, self.problems.get(deployment, told), "", figure, 25, "MB", at_most=True)

    def measure_start(self, times: int) -> Result:
        """Return the time from the command to the first right answer, over that of the imports that it needs."""
        deployment, starts_s, imports_s = service("fastapi"), [], []
        for _ in range(times):
            begun_s = time.perf_counter()
            with ExitStack() as stack:
                for server in self.start_all([deployment], self.core, stack).values():
                    server.verify(rows=1)
                    starts_s.append(time.perf_counter() - begun_s)
            begun_s = time.perf_counter()
            self.run_python(IMPORTS)
            imports_s.append(time.perf_counter() - begun_s)
            self.bar.update(START_S)
        told = self.problems.get(deployment) or f"{statistics.median(starts_s):.2f} s"
        figure = None
        if deployment not in self.problems:
            figure = statistics.median(a / b for a, b in zip(starts_s, imports_s, strict=True))
        against = f"`python -c '{IMPORTS}'`: {statistics.median(imports_s):.2f} s"
        return Result(START_TITLE, told, against, figure, 2.5, at_most=True)

    def measure_streams(self, rounds: int) -> list[Result]:
        """Return how fast a long stream is under either framework, and what it adds to the memory of a worker."""
        results: list[Result] = []
        stream = Stream(STREAM_ROWS // 10 if self.is_short else STREAM_ROWS, self.folder)
        for framework in ("fastapi", "flask"):
            with ExitStack() as stack:
                deployment = service(framework)
                servers = self.start_all([deployment], self.core, stack)
                self.bar.set_description(f"{deployment.label}; {STREAM_TITLE}")
                results += stream_results(
                    stream, framework, servers.get(deployment), rounds, self.problems.get(deployment, "")
                )
            self.bar.update(STREAM_S * rounds)
        return results

    def measure_predict_us(self, times: int) -> float:
        """Return the time that the estimator takes for a row by itself."""
        self.bar.set_description("the estimator by itself")
        artifact = str(self.models.artifact("iris"))
        return statistics.median(float(self.run_python(PREDICT_US, artifact)) for _ in range(times))

    def run_python(self, code: str, *arguments: str) -> str:
        """Run code on the servers' core, and return what it prints."""
        command = ["taskset", "--cpu-list", str(self.core[0]), sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def describe(self) -> str:
        """Return date, machine, versions and command."""
        model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        machine = f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
        present = [name for name in LIBRARIES if find_spec(name.replace("scikit-learn", "sklearn"))]
        wrk = subprocess.run(["wrk", "-v"], capture_output=True, text=True).stdout.split()[1]
        versions = ", ".join(f"{name} {version(name)}" for name in present)
        slow = f"{SLOW_S} s for textbook forests, and a round before to warm up"
        slow = "too short for textbook forests, which come out low" if self.is_short else slow
        return f"""{date.today()}; {machine}; Python {platform.python_version()}, {versions}, wrk {wrk}.
Servers on core {self.core[0]}, wrk on core {self.cores[-1]}; one worker, and one row a request over 64 connections,
unless stated otherwise. Medians over rounds: {self.rounds}, interleaved, of a
second ({slow}); ratios are within a round.
Two workers have two cores, one of which they share with wrk if there are no more.

Command: `{" ".join(["python -m bench.run", *sys.argv[1:]])}`"""


def tell_missing(panels: Sequence[Panel], outcomes: Mapping[Workload, Outcome]) -> str:
    """Return the points that curves lack, each with its reason, or nothing."""
    missing = [
        f"- {panel.title}: {label} at {x:,}: {outcome}"
        for panel in panels
        for label, points in panel.curves.items()
        for x, workload in points
        if isinstance(outcome := outcomes[workload], str)
    ]
    return "\n".join(["\n\nCurves lack:\n", *missing]) if missing else ""


def workloads_of(comparisons: Sequence[Comparison]) -> list[Workload]:
    """Return each workload of some comparisons once."""
    return list(
        dict.fromkeys(each for comparison in comparisons for each in (comparison.workload, comparison.against) if each)
    )


def main() -> int:
    """Run the bench; returns 0 however the goals fare, and 1 where figures would mean nothing."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--short", action="store_true", help="one round, no curves; writes results-short.*")
    parser.add_argument("--rounds", type=int, help="rounds of each case, instead of 15 or 1")
    parser.add_argument("--only", default="", help="only cases and curves with this in their title; writes nothing")
    options = parser.parse_args()
    if not shutil.which("wrk"):
        print(INSTALL, file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers are ended
    try:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), options.rounds or (1 if options.short else 15), options.short)
            with bench.bar:
                results, panels, curves = bench.measure_all(options.only)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    report = f"{make_table(results)}{tell_missing(panels, curves)}\n\n{bench.describe()}\n"
    print(report)
    if not options.only:
        name = FOLDER / ("results-short" if options.short else "results")
        name.with_suffix(".md").write_text(report)
        plot(name.with_suffix(".png"), results, panels, curves)
    return 0


if __name__ == "__main__":
    sys.exit(main())

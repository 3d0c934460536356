"""Run two services for some minutes, one through reloads and killed workers, one left alone; both get bad requests.

Fails if a request is lost that no killed worker held, or if memory or open files grow. `make soak` runs it.
"""

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.lib.artifacts import edit, lay_out
from tests.lib.cases import BAD
from tests.lib.clients import ROW, post_case
from tests.lib.load import Load
from tests.lib.proc import count_files, private_mb
from tests.lib.servers import GUNICORN, PROJECT, Server
from tests.lib.sizes import TWINS

ROUND_S = 5.0
GROWTH = 1.05  # of what there was in the first half, and
GROWTH_MB = 5.0  # this, which caches and arenas take
GROWTH_FILES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=4.0)
    minutes = parser.parse_args().minutes
    problems = [
        problem
        for framework, worker in TWINS
        for is_troubled in (True, False)
        for problem in soak(framework, worker, is_troubled, minutes * 60 / 4)
    ]
    sys.exit("\n".join(problems) or None)


def soak(framework: str, worker: str, is_troubled: bool, seconds: float) -> list[str]:
    """Run one service, and return what is wrong with it."""
    samples: list[dict[str, float]] = []
    kills = 0
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file = lay_out(Path(folder), framework, worker)
        edit(file, ("[server]\n", "[server]\nkeepalive = 1\n"))
        server = Server(GUNICORN, Path(folder) / "log", PROJECT, SERVING_SETTINGS=str(file)).wait()
        try:
            with Load(server, post_case(ROW), clients=8) as load:
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    if is_troubled:
                        os.kill(random.choice(server.worker_pids), signal.SIGKILL)
                        kills += 1
                        reload(server, file)
                    samples.append(run_round(server, is_troubled))
        finally:
            status = server.stop()
    name = f"{framework} on {worker}, {'with reloads and kills' if is_troubled else 'left alone'}"
    print(f"{name}: {load.answers.total()} answers, {len(load.failures)} lost by {kills} kills; last {samples[-1]}")
    problems = [f"{name}: {problem}" for problem in growth(samples)]
    if len(load.failures) > 8 * kills or load.answers.keys() != {200} or status:
        problems.append(f"{name}: ended with {status}, answers {dict(load.answers)}, failures {load.failures[:5]}")
    return problems


def run_round(server: Server, is_troubled: bool) -> dict[str, float]:
    """Send bad requests, wait until the round is over, and return memory and open files."""
    end = time.monotonic() + ROUND_S
    for case in random.sample([case for case in BAD if not case.cut], 40):
        server.send(case)
    time.sleep(max(0.0, end - time.monotonic()))
    server.wait_for_workers(2)
    return sample(server, is_troubled)


def reload(server: Server, file: Path) -> None:
    """Check that a broken settings file is refused, and a good one taken."""
    good = file.read_text()
    for text, event in ((good + "[[", "reload_refused"), (good, "reloaded")):
        file.write_text(text)
        if (line := server.reload())["event"] != event:
            raise RuntimeError(f"not {event} but {line}")


def sample(server: Server, is_troubled: bool) -> dict[str, float]:
    """Return memory and open files of the master, and of workers if they are old enough to tell."""
    pids = {"master": [server.process.pid], "workers": [] if is_troubled else server.worker_pids}
    figures: dict[str, float] = {}
    for name, group in pids.items():
        if group:
            figures[f"{name} MB"] = sum(map(private_mb, group))
            figures[f"{name} files"] = sum(map(count_files, group))
    return figures


def growth(samples: list[dict[str, float]]) -> list[str]:
    """Return which figures are higher at the end than half-way."""
    third = len(samples) // 3
    problems = []
    for name in samples[0]:
        middle, late = (
            statistics.median(one[name] for one in part) for part in (samples[third:-third], samples[-third:])
        )
        limit = middle + GROWTH_FILES if name.endswith("files") else middle * GROWTH + GROWTH_MB
        if late > limit:
            problems.append(f"{name} grew from {middle:.0f} to {late:.0f}")
    return problems


if __name__ == "__main__":
    main()

"""How many cores a process may use, by made-up trees of control groups and by a real one where it may be made."""

import contextlib
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

import app
from serving.cores import count_cores
from serving.errors import SettingsError
from tests.lib.servers import run

V2 = "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
V1 = "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct"
CPUSET = "34 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"
BOUND = "33 31 0:30 /docker/a /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"
HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
SPACED = r"30 25 0:26 / /mnt/control\040groups rw - cgroup2 cgroup2 rw"
N_CORES = 8
TREES = {  # the groups of the process, mounts, files below /sys/fs/cgroup, and the cores that are left
    "own": ("0::/a/b", V2, {"a/b/cpu.max": "200000 100000"}, 2),
    "one-above": ("0::/a/b", V2, {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
    "smallest": ("0::/a/b", V2, {"a/b/cpu.max": "700000 100000", "a/cpu.max": "200000 100000"}, 2),
    "top": ("0::/", V2, {"cpu.max": "100000 100000"}, 1),
    "fraction": ("0::/a", V2, {"a/cpu.max": "150000 100000"}, 2),
    "less-than-one": ("0::/a", V2, {"a/cpu.max": "1000 100000"}, 1),
    "more-than-there-are": ("0::/a", V2, {"a/cpu.max": "9900000 100000"}, N_CORES),
    "of-systemd": ("0::/system.slice/serving.service", V2, {"system.slice/serving.service/cpu.max": "50000 100000"}, 1),
    "no-quota": ("0::/a", V2, {"a/cpu.max": "max 100000"}, N_CORES),
    "of-another-group": ("0::/a", V2, {"b/cpu.max": "100000 100000"}, N_CORES),
    "no-file": ("0::/a/b", V2, {}, N_CORES),
    "damaged": ("0::/a/b", V2, {"a/b/cpu.max": "many", "a/cpu.max": "400000 100000"}, 4),
    "period-of-zero": ("0::/a", V2, {"a/cpu.max": "100000 0"}, N_CORES),
    "blank-in-mount": ("0::/a", SPACED, {"../../../mnt/control groups/a/cpu.max": "200000 100000"}, 2),
    "other-namespace": ("0::/../b", V2, {"cpu.max": "500000 100000", "b/cpu.max": "100000 100000"}, 5),
    "v1": ("4:cpu,cpuacct:/a/b", V1, {"cpu,cpuacct/a/b/cpu.cfs": "250000 50000"}, 5),
    "v1-above": ("4:cpu,cpuacct:/a/b", V1, {"cpu,cpuacct/a/b/cpu.cfs": "-1 1000", "cpu,cpuacct/a/cpu.cfs": "9 3"}, 3),
    "v1-other-controller": ("4:cpuset:/a", CPUSET, {"cpuset/a/cpu.cfs": "100000 100000"}, N_CORES),
    "v1-in-docker": ("4:cpu:/docker/a", BOUND, {"cpu/cpu.cfs": "200000 100000"}, 2),
    "v1-below-docker": ("4:cpu:/docker/a/b", BOUND, {"cpu/b/cpu.cfs": "100000 100000"}, 1),
    "v1-beside-docker": ("4:cpu:/kubepods/x", BOUND, {"cpu/cpu.cfs": "200000 100000"}, 2),
    "hybrid": ("4:cpu,cpuacct:/a\n0::/b", f"{HYBRID}\n{V1}", {"cpu,cpuacct/a/cpu.cfs": "200000 100000"}, 2),
    "no-groups": ("", "", {}, N_CORES),
    "damaged-lines": ("broken", "broken", {}, N_CORES),
}


@pytest.fixture(autouse=True)
def n_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(N_CORES)))
    monkeypatch.delenv("LOKY_MAX_CPU_COUNT", raising=False)


@pytest.mark.parametrize(("groups", "mounts", "files", "expected"), TREES.values(), ids=TREES.keys())
def test_quotas_up_the_tree_count(
    tmp_path: Path, groups: str, mounts: str, files: dict[str, str], expected: int
) -> None:
    """The smallest quota of the process's own group and of each above it counts, in versions 1 and 2."""
    for name, text in {"cgroup": groups, "mountinfo": mounts}.items():
        write(tmp_path / "proc/self" / name, text)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        if path.name == "cpu.cfs":
            for end, number in zip(("quota_us", "period_us"), text.split(), strict=True):
                write(path.with_name(f"cpu.cfs_{end}"), number)
        else:
            write(path, text)
    assert count_cores(tmp_path) == expected


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_without_proc_affinity_counts(tmp_path: Path) -> None:
    """Where nothing tells of control groups, as on another system, the affinity alone counts."""
    assert count_cores(tmp_path) == N_CORES


def test_joblibs_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`LOKY_MAX_CPU_COUNT`, by which joblib counts, is a limit too; one that is no number is refused."""
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "3")
    assert count_cores(tmp_path) == 3
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "many")
    with pytest.raises(SettingsError, match=r"^environment: LOKY_MAX_CPU_COUNT is 'many'; it should be a number"):
        assert app.load_settings().cores


@pytest.fixture
def group() -> Iterator[Path | None]:
    """A real control group, below one that has a quota of one core; None where nobody may make one."""
    outer = Path(f"/sys/fs/cgroup/cpu/serving-test-{os.getpid()}")
    inner = outer / "inner"
    made: list[Path] = []
    with contextlib.suppress(OSError):
        for place in (outer, inner):
            place.mkdir()
            made.append(place)
        (outer / "cpu.cfs_quota_us").write_text((outer / "cpu.cfs_period_us").read_text())
    yield inner if inner in made else None
    for place in reversed(made):
        place.rmdir()


TELL = """
for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("Cpus_allowed:"):
        print(min(os.cpu_count(), int(line.split()[1].replace(",", ""), 16).bit_count()))
for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines():
    _, controllers, path = line.split(":", 2)
    if controllers == "" or "cpu" in controllers.split(","):
        group = pathlib.Path(("/sys/fs/cgroup/cpu" if controllers else "/sys/fs/cgroup") + path)
        for place in (group, *group.parents):
            if (place / "cpu.max").exists() and "max" not in (text := (place / "cpu.max").read_text()):
                print(text.strip())
            if (place / "cpu.cfs_quota_us").exists() and (quota := int((place / "cpu.cfs_quota_us").read_text())) > 0:
                print(quota, int((place / "cpu.cfs_period_us").read_text()))
"""


def test_real_process_counts_its_cores(group: Path | None) -> None:
    """A process has as many cores as its affinity and the quotas on its way up say, which are read by hand here.

    In a group with a quota of one core, where one can be made, it has one.
    """
    enter = "" if group is None else f"pathlib.Path({str(group / 'cgroup.procs')!r}).write_text(str(os.getpid()))"
    done = run(["python", "-c", f"import os, pathlib, app\n{enter}\nprint(app.Settings().workers)\n{TELL}"])
    workers, *told = done.stdout.splitlines()
    affinity, quotas = int(told[0]), [Fraction(*map(int, line.split())) for line in told[1:]]
    assert (group is None) or 1 in quotas
    assert int(workers) == max(1, min([affinity, *map(math.ceil, quotas)]))

"""How many cores this process may use: its affinity, and the quotas of its control group and of each above it.

joblib's `cpu_count` reads only the root of the tree, where neither systemd's CPUQuota nor a nested group has its quota.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from serving.errors import SettingsError

LIMIT = "LOKY_MAX_CPU_COUNT"  # joblib's variable


def count_cores(root: Path = Path("/")) -> int:
    """Return the number of cores, of a quota the next whole number, as joblib does, and at least 1.

    The folders `proc` and those of control groups are below `root`. Raises `SettingsError`.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get(LIMIT, "").strip() or str(there)
    if not re.fullmatch("[1-9][0-9]{0,8}", limit):
        raise SettingsError(f"environment: {LIMIT} is {limit!r}; it should be a number of cores")
    return max(1, min(there, int(limit), *_quotas(root)))


def _quotas(root: Path) -> Iterator[int]:
    """Yield the cores of each quota on the way from this process's control group to the top of what is mounted."""
    with contextlib.suppress(OSError, ValueError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        groups = [line.split(":", 2) for line in lines]  # its number, its controllers, its path
        own = {"cgroup" if controllers else "cgroup2": path for _, controllers, path in groups if _has_cpu(controllers)}
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            mount, _, system = line.partition(" - ")
            top, point = (re.sub(r"\\([0-7]{3})", _unescape, field) for field in mount.split()[3:5])
            kind, _, options = system.split(" ", 2)
            if kind in own and (kind == "cgroup2" or _has_cpu(options)):
                yield from _quotas_up(root / point.lstrip("/"), _below(top, own[kind]))


def _has_cpu(controllers: str) -> bool:
    """Return whether the processor's controller is among others; version 2 names none."""
    return not controllers or "cpu" in controllers.split(",")


def _unescape(match: re.Match[str]) -> str:
    return chr(int(match[1], 8))


def _below(top: str, path: str) -> Path:
    """Return where a control group is below the one that is mounted; of one that is not below, that one's own place."""
    is_below = path == top or path.startswith(top.rstrip("/") + "/")
    parts = Path(path).relative_to(top) if is_below else Path()
    return Path() if ".." in parts.parts else parts  # of another namespace


def _quotas_up(point: Path, group: Path) -> Iterator[int]:
    for place in (group, *group.parents):
        folder = point / place
        for read in (_read_v2, _read_v1):
            with contextlib.suppress(OSError, ValueError):  # no file, none that may be read, or no quota
                quota, period = read(folder)
                if quota > 0 and period > 0:
                    yield math.ceil(quota / period)


def _read_v2(folder: Path) -> tuple[int, int]:
    quota, period = (folder / "cpu.max").read_text().split()
    return int(quota), int(period)  # "max" for none


def _read_v1(folder: Path) -> tuple[int, int]:
    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    return int(quota), int(period)  # -1 for none

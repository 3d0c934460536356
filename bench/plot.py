"""The picture of a run: each comparison beside its goal, and the curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from bench.comparisons import Panel
from bench.judge import Outcome, Result, Workload, median_rate, show

mpl.use("agg")  # draws without a screen; before pyplot is imported
from matplotlib import pyplot as plt

MET, MISSED, GRID = "#2a7f62", "#c8553d", "#e4e4e4"
COLOURS = {
    "service, fastapi + uvicorn": "#1f5f99",
    "service, flask + gevent": "#d9822b",
    "service, sklearn": "#1f5f99",
    "service, onnx": "#2a7f62",
    "textbook FastAPI": "#c8553d",
    "bare ASGI hello": "#8fb3d3",
    "bare WSGI hello": "#b0a8a0",
    "Flask hello": "#ecc48f",
}
STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5, "font.size": 8.5}


def plot(file: Path, results: Sequence[Result], panels: Sequence[Panel], outcomes: Mapping[Workload, Outcome]) -> None:
    """Write a PNG with the comparisons on the left, and on the right a panel for each kind of growth."""
    with plt.rc_context(STYLE):
        size = (16 if panels else 8, max(8.5, 0.45 * len(results)))
        figure = plt.figure(figsize=size, layout="constrained")
        grid = figure.add_gridspec(2, 3, width_ratios=(1.15, 1, 1)) if panels else figure.add_gridspec(1, 1)
        _draw_results(figure.add_subplot(grid[:, 0]), results)
        for number, panel in enumerate(panels):
            _draw_panel(figure.add_subplot(grid[number // 2, 1 + number % 2]), panel, outcomes)
        figure.savefig(file, dpi=110)
        plt.close(figure)


def _draw_results(axes: Any, results: Sequence[Result]) -> None:
    for place, result in enumerate(results):
        reach = result.reach
        axes.barh(place, min(reach, 2), color=MET if result.is_met else MISSED, height=0.6)
        text = f"{'none' if result.figure is None else show(result.figure, result.unit)}   goal {result.bound}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(text, (min(reach, 2), place), (5, 0), textcoords="offset points", va="center", bbox=box)
    axes.axvline(1, color="black", linewidth=1, zorder=0)
    axes.set_yticks(
        range(len(results)), [result.title.replace("; ", "\n").replace(" / ", "\n/ ") for result in results]
    )
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 3)
    axes.set_xticks([0, 0.5, 1, 1.5, 2], ["0", "0.5", "1", "1.5", "2 or more"])
    axes.set_xlabel("part of the goal that is reached")
    axes.set_title("cases, and the goals of the design")


def _draw_panel(axes: Any, panel: Panel, outcomes: Mapping[Workload, Outcome]) -> None:
    for label, points in panel.curves.items():
        samples = {x: (workload, outcomes[workload]) for x, workload in points}
        rates = {
            x: median_rate(workload, taken) for x, (workload, taken) in samples.items() if not isinstance(taken, str)
        }
        shown = label if rates else f"{label}: none"
        line = "o--" if label.endswith("hello") else "o-"
        axes.plot(list(rates), list(rates.values()), line, color=COLOURS[label], label=shown, markersize=4)
    ticks = [x for x, _ in next(iter(panel.curves.values()))]
    if len(ticks) > 2:
        axes.set_xscale("log")
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low / 3, high)  # room for the legend
    else:
        axes.set_ylim(bottom=0)
        axes.set_xlim(0.5, 2.5)
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    axes.tick_params(axis="x", which="minor", length=0)
    axes.grid(color=GRID)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel("rows/s" if panel.x_label.startswith("rows") else "requests/s")
    axes.set_title(panel.title.replace(", ", "\n", 1))
    axes.legend(frameon=False, loc="best" if len(ticks) > 2 else "lower left")

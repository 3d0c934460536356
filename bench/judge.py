"""Cases and their goals, from samples to the table."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.load import Sample
from bench.servers import Server

Outcome = list[Sample] | str  # by round, or why there are none
Samples = Sequence[Sample]


@dataclass(frozen=True)
class Load:
    """What is sent to a server: requests of so many rows over so many connections that stay open."""

    server: Server
    connections: int = 64
    rows: int = 1
    seconds: int = 1


@dataclass(frozen=True)
class Case:
    """A goal of the design: a load, what it is held against, and how both make the figure that has the goal."""

    title: str
    load: Load
    against: Load | None
    goal: float
    judge: Callable[[Samples, Samples], float]
    unit: str = "×"
    at_most: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table; without a figure, `measured` or `against` says why there is none."""

    title: str
    measured: str
    against: str
    figure: float | None
    goal: float
    unit: str = "×"
    at_most: bool = False

    @property
    def bound(self) -> str:
        """Give the goal as it is read."""
        return f"{'≤' if self.at_most else '≥'} {self.goal:.3g} {self.unit}"

    @property
    def reach(self) -> float:
        """Give the part of the goal that is reached: 1 and more is all of it."""
        if not self.figure:
            return 0.0
        return self.goal / self.figure if self.at_most else self.figure / self.goal

    @property
    def is_met(self) -> bool:
        """Tell whether there is a figure that reaches the goal."""
        if self.figure is None:
            return False
        return self.figure <= self.goal if self.at_most else self.figure >= self.goal


def rate_ratio(samples: Samples, others: Samples) -> float:
    """Give the median over rounds of one rate over the other in the same round."""
    return statistics.median(a.requests_s / b.requests_s for a, b in zip(samples, others, strict=True))


def added_us(samples: Samples, others: Samples) -> float:
    """Give the median over rounds of how much longer a request takes than the other, in microseconds."""
    return statistics.median(a.p50_us - b.p50_us for a, b in zip(samples, others, strict=True))


def tail_ratio(samples: Samples, _: Samples) -> float:
    """Give the median over rounds of p99 over p50."""
    return statistics.median(sample.p99_us / sample.p50_us for sample in samples)


def judge(case: Case, outcomes: Mapping[Load, Outcome]) -> Row:
    """Make a case's line of the table from what was measured."""
    title, figure = case.title, None
    measured, others = outcomes[case.load], outcomes[case.against] if case.against else []
    if not isinstance(measured, str) and not isinstance(others, str):
        figure = case.judge(measured, others)
    if case.against:
        title += f" / {case.against.server.label}"
    return Row(title, tell(case.load, measured), tell(case.against, others), figure, case.goal, case.unit, case.at_most)


def tell(load: Load | None, outcome: Outcome) -> str:
    """Give a server's median rate and latency, or why there are none."""
    if load is None or isinstance(outcome, str):
        return str(outcome or "")
    p50_ms, p99_ms = (
        statistics.median(getattr(each, name) for each in outcome) / 1000 for name in ("p50_us", "p99_us")
    )
    latency = f"p50 {show(p50_ms, 'ms')}, p99 {show(p99_ms, 'ms')}"
    return f"{show(median_rate(load, outcome), 'rows/s' if load.rows > 1 else 'requests/s')}; {latency}"


def median_rate(load: Load, samples: Samples) -> float:
    """Give rows a second."""
    return statistics.median(sample.requests_s for sample in samples) * load.rows


def show(number: float, unit: str) -> str:
    """Give a figure to three digits, or as a whole number."""
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:#.3g} {unit}".replace(". ", " ")


def make_table(rows: Sequence[Row]) -> str:
    """Give the rows as a table in Markdown, and below it those that fall short."""
    lines = ["| case | measured | reference | figure | goal | met |", "|---|---|---|---|---|---|"]
    for row in rows:
        figure = "none" if row.figure is None else show(row.figure, row.unit)
        met = "yes" if row.is_met else "**no**"
        lines.append(f"| {row.title} | {row.measured} | {row.against} | {figure} | {row.bound} | {met} |")
    short = [f"- {row.title}" for row in rows if not row.is_met]
    return "\n".join(
        [*lines, "", f"{len(rows) - len(short)} of {len(rows)} goals are met. Short of theirs:", "", *short]
        if short
        else [*lines, "", "Every goal is met."]
    )

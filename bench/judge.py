"""Comparisons and their goals, from samples to the table."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.servers import Deployment
from bench.wrk import Sample

Outcome = list[Sample] | str  # by round, or why there are none
Samples = Sequence[Sample]


@dataclass(frozen=True)
class Workload:
    """What is sent to a server: requests of so many rows over so many connections that stay open."""

    deployment: Deployment
    connections: int = 64
    rows: int = 1
    seconds: int = 1
    form: str = "rows"  # one of `bench.wrk.FORMS`


@dataclass(frozen=True)
class Comparison:
    """A goal of the design: a workload, what it is held against, and how both make the figure that has the goal."""

    title: str
    workload: Workload
    against: Workload | None
    goal: float
    judge: Callable[[Samples, Samples], float]
    unit: str = "×"
    at_most: bool = False


@dataclass(frozen=True)
class Result:
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
        """Return the goal as it is read."""
        return f"{'≤' if self.at_most else '≥'} {self.goal:.3g} {self.unit}"

    @property
    def reach(self) -> float:
        """Return the part of the goal that is reached: 1 and more is all of it."""
        if not self.figure:
            return 0.0
        return self.goal / self.figure if self.at_most else self.figure / self.goal

    @property
    def is_met(self) -> bool:
        """Return whether there is a figure that reaches the goal."""
        if self.figure is None:
            return False
        return self.figure <= self.goal if self.at_most else self.figure >= self.goal


def without_failures(samples: list[Sample]) -> Outcome:
    """Return the samples, or what was wrong with the answers."""
    n_failed = sum(sample.n_failed for sample in samples)
    if n_failed or not all(sample.requests_s for sample in samples):
        return f"{n_failed} requests failed" if n_failed else "no answer in a round"
    return samples


def rate_ratio(samples: Samples, others: Samples) -> float:
    """Return the median over rounds of one rate over the other in the same round."""
    return statistics.median(a.requests_s / b.requests_s for a, b in zip(samples, others, strict=True))


def added_us(samples: Samples, others: Samples) -> float:
    """Return the median over rounds of how much longer a request takes than the other, in microseconds."""
    return statistics.median(a.p50_us - b.p50_us for a, b in zip(samples, others, strict=True))


def tail_ratio(samples: Samples, _: Samples) -> float:
    """Return the median over rounds of p99 over p50."""
    return statistics.median(sample.p99_us / sample.p50_us for sample in samples)


def judge(comparison: Comparison, outcomes: Mapping[Workload, Outcome]) -> Result:
    """Return a comparison's line of the table from what was measured."""
    title, figure = comparison.title, None
    measured, others = outcomes[comparison.workload], outcomes[comparison.against] if comparison.against else []
    if not isinstance(measured, str) and not isinstance(others, str):
        figure = comparison.judge(measured, others)
    if comparison.against and " / " not in title:
        title += f" / {comparison.against.deployment.label}"
    told, others_told = tell(comparison.workload, measured), tell(comparison.against, others)
    return Result(title, told, others_told, figure, comparison.goal, comparison.unit, comparison.at_most)


def tell(workload: Workload | None, outcome: Outcome) -> str:
    """Return a server's median rate and latency, or why there are none."""
    if workload is None or isinstance(outcome, str):
        return str(outcome or "")
    p50_ms, p99_ms = (
        statistics.median(getattr(each, name) for each in outcome) / 1000 for name in ("p50_us", "p99_us")
    )
    latency = f"p50 {show(p50_ms, 'ms')}, p99 {show(p99_ms, 'ms')}"
    return f"{show(median_rate(workload, outcome), 'rows/s' if workload.rows > 1 else 'requests/s')}; {latency}"


def median_rate(workload: Workload, samples: Samples) -> float:
    """Return rows a second."""
    return statistics.median(sample.requests_s for sample in samples) * workload.rows


def show(number: float, unit: str) -> str:
    """Return a figure to three digits, or as a whole number."""
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:#.3g} {unit}".replace(". ", " ")


def make_table(results: Sequence[Result]) -> str:
    """Return the results as a table in Markdown, and below it those that fall short."""
    lines = ["| case | measured | reference | figure | goal | met |", "|---|---|---|---|---|---|"]
    for result in results:
        figure = "none" if result.figure is None else show(result.figure, result.unit)
        met = "yes" if result.is_met else "**no**"
        lines.append(f"| {result.title} | {result.measured} | {result.against} | {figure} | {result.bound} | {met} |")
    short = [f"- {result.title}" for result in results if not result.is_met]
    return "\n".join(
        [*lines, "", f"{len(results) - len(short)} of {len(results)} goals are met. Short of theirs:", "", *short]
        if short
        else [*lines, "", "Every goal is met."]
    )

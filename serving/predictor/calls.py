"""What waits for the model, what shares a call, and the call itself.

Most of what a call of an estimator costs is the same for one row and for many. So the rows of requests that wait at
the same moment are predicted in one call. There is one call at a time: an estimator may keep what it works on.
"""

from __future__ import annotations

import collections
import contextvars
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveInt

from serving.errors import ClientLeft, TooManyRequests, Unavailable
from serving.predictor.contract import Rows
from serving.predictor.predictions import Predictions
from serving.settings import OtherNames, SettingsTable

INLINE_S = 0.01  # seconds of the longest call that runs in an event loop
SURPRISE_FACTOR = 10.0  # times the expected seconds from which a call sets the expectation alone
SMOOTHING = 0.1  # part of a difference by which an expectation is corrected
STUCK_AFTER_TIMEOUTS = 2.0  # time-outs of a request after which a call is taken never to end
MANY_ROWS = 64  # rows of a call by which the cost of one more is measured
MIN_STUCK_S = 1.0
MAX_SIZE = 64  # of a request, by the number of binary digits of its rows


class BatchingSettings(SettingsTable):
    other_names: ClassVar[OtherNames] = {
        "max_rows": ("batch_size", "max_batch_size"),
        "max_wait_ms": ("timeout_ms", "max_latency_ms"),
    }

    max_rows: PositiveInt = 256
    max_wait_ms: Annotated[float, Field(ge=0, le=1000)] = 0.0


@dataclass(slots=True)
class Call:
    """A call of the model."""

    n_rows: int
    started: float  # by `time.perf_counter`
    took_s: float = math.nan  # while it is made


@dataclass(slots=True, eq=False)
class Job:
    """The rows of one request, from the moment when they wait for a call until they are answered.

    `encode` makes the result of its predictions, as a part of the call. Many rows are given as X instead, and those
    that take long to decode by `decode`, which returns X, or None if there is nothing to predict. Both are `is_alone`.
    """

    n_rows: int
    rows: Rows = field(default_factory=list)
    encode: Callable[[Any], Any] | None = None
    decode: Callable[[], Any] | None = None
    X: Any = None
    is_alone: bool = False  # it shares its call with no other
    client_has_left: Callable[[], bool] | None = None  # where the server can tell
    n_counted: int = 0  # rows of it that the queue counts
    waiter: Any = None  # a future of the loop, or a lock
    answer: Any = None  # predictions, or what `encode` made of them
    call: Call | None = None  # the one that answered it
    error: Exception | None = None
    deadline: float = math.inf  # by the monotonic clock
    is_given_up: bool = False  # nobody waits for it any more
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def read(self) -> None:
        """Decode the rows, unless nobody waits for them, and keep what that raises."""
        decode, self.decode = self.decode, None  # it holds the body, which may be as large as all the rest
        self.n_rows = 0
        if decode is None or self.is_given_up:
            return
        try:
            self.X = self.context.run(decode)
        except Exception as error:  # what code of the user's in a DataFrame's place raises has no bounds
            self.error = error
            return
        self.n_rows = 0 if self.X is None else len(self.X)
        if self.X is None:
            self.answer = None if self.encode is None else self.encode(None)

    def result(self) -> Any:
        """Return the predictions, or what `encode` made of them. Raises what the call raised."""
        if self.error is not None:
            error, self.error = self.error, None
            try:
                raise error
            finally:
                del error  # with its traceback it would be a cycle, which keeps the body until it is collected
        return self.answer


class Line:
    """The jobs that wait: those that share calls, and those that are alone, each in the order in which they came."""

    __slots__ = ("alone", "together")

    def __init__(self) -> None:
        self.together: collections.deque[Job] = collections.deque()
        self.alone: collections.deque[Job] = collections.deque()

    def append(self, job: Job) -> None:
        waiting = self.alone if job.is_alone else self.together
        waiting.append(job)

    def __len__(self) -> int:
        return len(self.together) + len(self.alone)

    def __iter__(self) -> Iterator[Job]:
        return itertools.chain(self.together, self.alone)


def count_rows(jobs: Iterable[Job]) -> int:
    return sum([job.n_rows for job in jobs])


@dataclass(slots=True)
class CallCost:
    """The time that a call is expected to take, in seconds: some by itself, and some for each row."""

    call_s: float = 0.0
    row_s: float = 0.0

    def seconds_for(self, n_rows: int) -> float:
        return self.call_s + self.row_s * n_rows

    def learn(self, n_rows: int, took_s: float) -> None:
        """Correct the expectation by a call: at once if it took far longer, else by a part of the difference.

        The time of a call is an upper bound of both its fixed cost and its cost per row.
        """
        expected_s = self.seconds_for(n_rows)
        if took_s > SURPRISE_FACTOR * max(INLINE_S, expected_s):
            self.call_s = took_s
        elif took_s < expected_s:
            self.call_s = max(self.call_s * (1 - SMOOTHING), min(self.call_s, took_s))
            self.row_s = max(self.row_s * (1 - SMOOTHING), min(self.row_s, took_s / n_rows))
        elif took_s > INLINE_S and n_rows >= MANY_ROWS:
            self.row_s += SMOOTHING * (took_s - expected_s) / n_rows
        elif took_s > INLINE_S:
            self.call_s += SMOOTHING * (took_s - expected_s)


def measure(predict: Callable[[Rows], Any], row: dict[str, Any]) -> tuple[float, float]:
    """Return the seconds of a call and of each of its rows, by calls for one row and, if that is quick, for many."""
    call_s = _time(predict, [row])
    if call_s > INLINE_S:
        return call_s, 0.0
    return call_s, max(0.0, _time(predict, [row] * MANY_ROWS) - call_s) / MANY_ROWS


def _time(predict: Callable[[Rows], Any], rows: Rows) -> float:
    """Return the seconds of a call that nothing disturbs, as the start of other processes does."""
    times: list[float] = []
    while len(times) < 5 and sum(times) < 10 * INLINE_S:
        started = time.perf_counter()
        predict(rows)
        times.append(time.perf_counter() - started)
    return min(times)


@dataclass(slots=True)
class BatchQueue:
    """Who may wait for a model, which jobs share a call, and the call itself.

    `predict_rows` answers checked rows, and `predict` what a job has decoded by itself.
    """

    predict_rows: Callable[[Rows], Predictions]
    predict: Callable[[Any], Predictions]
    max_rows: int  # of a call that several jobs share
    max_wait_s: float
    max_queued_rows: float = math.inf
    timeout_s: float = math.inf
    can_share: bool = True  # the answer to a row does not depend on the others of its call
    cost: CallCost = field(default_factory=CallCost)
    queued_jobs: int = 0  # that no call has taken
    queued_rows: int = 0
    _rows_by_size: list[int] = field(default_factory=lambda: [0] * MAX_SIZE)
    _lead_s: float = 0.0  # seconds by which calls for one job had more time than shared ones, while both waited
    called_at: float | None = None  # by the monotonic clock, while a call is made
    _lock: Any = field(default_factory=threading.Lock)  # of the queue's counts

    def admit(self, job: Job) -> None:
        """Let a job wait until its deadline.

        Raises `TooManyRequests` if the rows that wait have reached the limit. Those of jobs of another order of size,
        at least twice as long, do not count, so that long arrays keep no short ones out.
        """
        size = job.n_rows.bit_length()
        with self._lock:
            if self.queued_rows >= self.max_queued_rows:
                n_ahead = sum(self._rows_by_size[: size + 1])
                if n_ahead >= self.max_queued_rows:
                    raise TooManyRequests(f"{n_ahead} rows wait already", self.seconds_left())
            self.queued_jobs += 1
            self.queued_rows += job.n_rows
            self._rows_by_size[size] += job.n_rows
        job.n_counted = job.n_rows
        job.deadline = time.monotonic() + self.timeout_s

    def give_up(self, job: Job) -> None:
        """Predict a job no more: its client has left, or waited too long."""
        job.is_given_up = True
        job.decode = job.encode = None  # which hold the body
        self.leave(job)

    def leave(self, job: Job) -> None:
        """Count a job no more among those that wait."""
        with self._lock:
            if job.n_counted:
                self.queued_jobs -= 1
                self.queued_rows -= job.n_counted
                self._rows_by_size[job.n_counted.bit_length()] -= job.n_counted
                job.n_counted = 0

    def give_up_lost(self, job: Job) -> bool:
        """Give a job up if nobody will read its answer, or if it is late, and return whether it is."""
        if job.client_has_left is not None and job.client_has_left():
            job.error = ClientLeft()
        elif self.is_late(job):
            job.error = self.too_late()
        else:
            return False
        self.give_up(job)
        return True

    def seconds_left(self) -> float:
        """Return the expected time until all jobs that wait are answered."""
        calls = math.ceil(self.queued_rows / self.max_rows) if self.can_share else self.queued_jobs
        return calls * self.cost.call_s + self.queued_rows * self.cost.row_s

    def is_in_vain(self, jobs: Sequence[Job]) -> bool:
        """Return whether a call would be for nobody. A job that is alone may take long, so its client is looked for."""
        return bool(jobs) and jobs[0].is_alone and self.give_up_lost(jobs[0])

    def is_late(self, job: Job) -> bool:
        """Return whether a job has waited too long, or waits for a call that does not end."""
        return time.monotonic() > job.deadline or self.is_stuck()

    @property
    def stuck_s(self) -> float:
        """The time after which a call is taken never to end, in seconds."""
        return max(STUCK_AFTER_TIMEOUTS * self.timeout_s, MIN_STUCK_S)

    def is_stuck(self) -> bool:
        """Return whether a call is made that does not end."""
        called_at = self.called_at
        return called_at is not None and time.monotonic() - called_at > self.stuck_s

    def too_late(self) -> Unavailable:
        return Unavailable("the prediction took too long", self.seconds_left())

    def needs_thread(self, jobs: Sequence[Job]) -> bool:
        """Return whether a call takes so long that it should not run in an event loop."""
        return self.cost.seconds_for(count_rows(jobs)) > INLINE_S

    def is_full(self, waiting: Iterable[Job]) -> bool:
        """Return whether the jobs that wait have the rows of a call already."""
        return not self.can_share or count_rows(waiting) >= self.max_rows

    def take(self, line: Line) -> list[Job]:
        """Take the jobs of the next call from those that wait; none if nobody waits for them any more.

        Where both kinds wait, each gets half of the time.
        """
        are_both = bool(line.alone and line.together)
        if not are_both:
            self._lead_s = 0.0
        waiting = line.together if self._lead_s > 0 or not line.alone else line.alone
        jobs: list[Job] = []
        n_rows = 0
        while waiting and (not jobs or self._can_join(waiting[0], jobs[0], n_rows)):
            job = waiting.popleft()
            self.leave(job)
            if not job.is_given_up:
                jobs.append(job)
                n_rows += job.n_rows
        if are_both:
            self._lead_s += self.cost.seconds_for(n_rows) * (1 if waiting is line.alone else -1)
        return jobs

    def _can_join(self, job: Job, first: Job, n_rows: int) -> bool:
        are_alone = not self.can_share or first.is_alone or job.is_alone
        return not are_alone and n_rows + job.n_rows <= self.max_rows

    def call(self, jobs: list[Job]) -> list[list[Job]]:
        """Answer jobs in one call. If it fails, return their halves, which isolates an error in the job that causes it.

        A job that would be answered too late gets an error instead.
        """
        jobs = [job for job in jobs if not job.is_given_up]
        called = self._refuse_late(jobs)
        try:
            if called:
                context = called[0].context if len(called) == 1 else contextvars.Context()
                context.run(self._answer, called)
        except Exception as error:  # what an estimator raises has no bounds
            if len(called) > 1:
                return [jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]]
            called[0].error = error
        return []

    def _answer(self, jobs: list[Job]) -> None:
        """Predict what was decoded, write the answers, and learn what that costs."""
        n_rows, is_shared = count_rows(jobs), len(jobs) > 1
        call = Call(n_rows, time.perf_counter())
        self.called_at = time.monotonic()
        try:
            part: Any = self._predict(jobs)
            all_of_them, start = part, 0
            for job in jobs:
                if is_shared:
                    part = all_of_them.part(start, start := start + job.n_rows)
                encode = job.encode
                job.answer = part if encode is None else encode(part)
                job.call = call
        finally:
            self.called_at = None
        call.took_s = time.perf_counter() - call.started
        self.cost.learn(n_rows, call.took_s)

    def _predict(self, jobs: list[Job]) -> Predictions:
        first = jobs[0]
        X, first.X = first.X, None
        if X is not None:
            return self.predict(X)
        return self.predict_rows(first.rows if len(jobs) == 1 else [row for job in jobs for row in job.rows])

    def _refuse_late(self, jobs: list[Job]) -> list[Job]:
        """Return the jobs that can be answered in time.

        The expected time of the call is ignored when it exceeds half of the time-out: refusing everything would never
        correct the expectation.
        """
        takes_s = self.cost.seconds_for(count_rows(jobs))
        end = time.monotonic() + (takes_s if takes_s < self.timeout_s / 2 else 0.0)
        if not jobs or jobs[0].deadline >= end:  # which came first
            return jobs
        for job in jobs:
            if job.deadline < end:
                job.error = self.too_late()
        return [job for job in jobs if job.deadline >= end]

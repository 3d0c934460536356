"""Rows of many requests in one call of the model.

Most of what a call of an estimator costs is the same for one row and for many. So the rows of requests that wait at
the same moment are predicted in one call. There is one call at a time: an estimator may keep what it works on. How a
request waits depends on what runs it: an asyncio loop or a thread, which may be a greenlet of gevent's.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import contextvars
import functools
import itertools
import math
import queue as queues
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import Field, PositiveInt

from serving.errors import TooManyRequests, Unavailable
from serving.predictor.contract import Rows
from serving.predictor.predictions import Predictions
from serving.settings import SettingsTable

T = TypeVar("T")
INLINE_S = 0.01  # seconds of the longest call that runs in an event loop
SURPRISE_FACTOR = 10.0  # times the expected seconds from which a call sets the expectation alone
SMOOTHING = 0.1  # part of a difference by which an expectation is corrected
STUCK_AFTER_TIMEOUTS = 2.0  # time-outs of a request after which a call is taken never to end
MANY_ROWS = 64  # rows of a call by which the cost of one more is measured
MIN_STUCK_S = 1.0
LOOK_S = 0.25  # seconds between two looks at a call that runs beside a loop, and at what waits for it
QUIET_TURNS = 2  # turns of others without a new row before a call begins: gevent polls for input only in the second


class BatchingSettings(SettingsTable):
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
    that take long to decode by `decode`, which returns X in the call, or None if there is nothing to predict. Both are
    `is_alone`.
    """

    n_rows: int
    rows: Rows = field(default_factory=list)
    encode: Callable[[Any], Any] | None = None
    decode: Callable[[], Any] | None = None
    X: Any = None
    is_alone: bool = False  # it shares its call with no other
    is_long: bool = False  # decoding takes longer than an event loop should be kept busy
    waiter: Any = None  # a future of the loop, or a lock
    answer: Any = None  # predictions, or what `encode` made of them
    call: Call | None = None  # the one that answered it
    error: Exception | None = None
    deadline: float = math.inf  # by the monotonic clock
    has_left: bool = False  # the queue, for a call or for good
    is_given_up: bool = False  # nobody waits for it any more
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def read(self) -> None:
        """Decode the rows. Raises what `decode` raises."""
        decode, self.decode = self.decode, None  # it holds the body, which may be as large as all the rest
        self.n_rows = 0
        self.X = decode() if decode else None
        self.n_rows = 0 if self.X is None else len(self.X)

    def result(self) -> Any:
        """Return the predictions, or what `encode` made of them. Raises what the call raised."""
        if self.error is not None:
            error, self.error = self.error, None
            try:
                raise error
            finally:
                del error  # with its traceback it would be a cycle, which keeps the body until it is collected
        return self.answer


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
    called_at: float | None = None  # by the monotonic clock, while a call is made
    _lock: Any = field(default_factory=threading.Lock)  # of the queue's counts

    def admit(self, job: Job) -> None:
        """Let a job wait until its deadline.

        Raises `TooManyRequests` if the queue would exceed its limit; an empty one takes a job of any size.
        """
        with self._lock:
            if self.queued_rows and self.queued_rows + job.n_rows > self.max_queued_rows:
                raise TooManyRequests(f"{self.queued_rows} rows wait already", self.seconds_left())
            self.queued_jobs += 1
            self.queued_rows += job.n_rows
        job.deadline = time.monotonic() + self.timeout_s

    def give_up(self, job: Job) -> None:
        """Predict a job no more: its client has left, or waited too long."""
        with self._lock:
            job.is_given_up = True
            self._uncount(job)

    def _uncount(self, job: Job) -> None:
        if not job.has_left:
            job.has_left = True
            self.queued_jobs -= 1
            self.queued_rows -= job.n_rows

    def seconds_left(self) -> float:
        """Return the expected time until all jobs that wait are answered."""
        calls = math.ceil(self.queued_rows / self.max_rows) if self.can_share else self.queued_jobs
        return calls * self.cost.call_s + self.queued_rows * self.cost.row_s

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
        is_long = bool(jobs) and jobs[0].is_long  # which shares its call with no other
        return is_long or self.cost.seconds_for(count_rows(jobs)) > INLINE_S

    def is_full(self, waiting: Iterable[Job]) -> bool:
        """Return whether the jobs that wait have the rows of a call already."""
        return not self.can_share or count_rows(waiting) >= self.max_rows

    def take(self, waiting: collections.deque[Job]) -> list[Job]:
        """Take the jobs of the next call from those that wait; none if nobody waits for them any more."""
        jobs: list[Job] = []
        n_rows = 0
        while waiting and (not jobs or self._can_join(waiting[0], jobs[0], n_rows)):
            job = waiting.popleft()
            with self._lock:
                self._uncount(job)
            if not job.is_given_up:
                jobs.append(job)
                n_rows += job.n_rows
        return jobs

    def _can_join(self, job: Job, first: Job, n_rows: int) -> bool:
        are_alone = not self.can_share or first.is_alone or job.is_alone
        return not are_alone and n_rows + job.n_rows <= self.max_rows

    def call(self, jobs: list[Job]) -> list[list[Job]]:
        """Answer jobs in one call. If it fails, return their halves, which isolates an error in the job that causes it.

        A job that would be answered too late gets an error instead.
        """
        called = jobs
        try:
            if jobs and jobs[0].decode is not None:  # and then alone
                jobs[0].context.run(jobs[0].read)
            called = self._refuse_late(jobs)
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
            part: Any = self._predict(jobs) if n_rows else None
            all_of_them, start = part, 0
            for job in jobs:
                if is_shared:
                    part = all_of_them.part(start, start := start + job.n_rows)
                job.answer = part if job.encode is None else job.encode(part)
                job.call = call
        finally:
            self.called_at = None
        call.took_s = time.perf_counter() - call.started
        if n_rows:
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
            job.error = self.too_late() if job.deadline < end else None
        return [job for job in jobs if job.deadline >= end]


class LoopBatcher:
    """Batches requests of an asyncio loop: those of one turn of it, and those that came while a call ran beside it."""

    def __init__(self, queue: BatchQueue, loop: asyncio.AbstractEventLoop) -> None:
        self.queue = queue
        self.loop = loop
        self._waiting: collections.deque[Job] = collections.deque()
        self._halves: list[list[Job]] = []  # of calls that failed
        self._timer: asyncio.TimerHandle | None = None  # of a call that waits for more rows
        self._is_due = False  # a call is scheduled, or runs
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "predict")  # which starts when it is first used

    async def predict(self, job: Job) -> Any:
        """Return the result of a job. Raises what its call raised."""
        self.queue.admit(job)
        job.waiter = self.loop.create_future()
        self._waiting.append(job)
        if not self._is_due:
            self._is_due = True
            self._schedule()
        elif self._timer is not None and self.queue.is_full(self._waiting):
            self._timer.cancel()
            self._call()
        try:
            await job.waiter
        except asyncio.CancelledError:
            self.queue.give_up(job)
            raise
        return job.result()

    def _schedule(self) -> None:
        if self.queue.max_wait_s and not self.queue.is_full(self._waiting):
            self._timer = self.loop.call_later(self.queue.max_wait_s, self._call)
        else:
            self.loop.call_soon(self._call)

    def _call(self, n_before: int = 0) -> None:
        self._timer = None
        if n_before < len(self._waiting) < self.queue.max_rows:  # this turn brought some, and so may the next
            self.loop.call_soon(self._call, len(self._waiting))
            return
        jobs = self._halves.pop() if self._halves else self.queue.take(self._waiting)
        if self.queue.needs_thread(jobs):
            call = _natively(functools.partial(self.queue.call, jobs))
            done = self.loop.run_in_executor(self._thread, call)
            done.add_done_callback(lambda done: self._hand_out(jobs, done.result()))
            self.loop.call_later(LOOK_S, self._look, jobs, done)
        else:
            self._hand_out(jobs, self.queue.call(jobs))

    def _look(self, jobs: list[Job], done: asyncio.Future[Any]) -> None:
        """Answer the jobs that wait too long for a call, or behind it."""
        if done.done():
            return
        for job in (*jobs, *self._waiting, *itertools.chain(*self._halves)):
            if not job.waiter.done() and self.queue.is_late(job):
                self.queue.give_up(job)
                job.error = self.queue.too_late()
                job.waiter.set_result(None)
        self.loop.call_later(LOOK_S, self._look, jobs, done)

    def _hand_out(self, jobs: list[Job], halves: list[list[Job]]) -> None:
        self._halves += halves
        for job in jobs if not halves else ():
            if not job.waiter.done():  # as it is when its task was cancelled, or it was told that it is late
                job.waiter.set_result(None)
        self._is_due = bool(self._waiting or self._halves)
        if self._is_due:
            self.loop.call_soon(self._call, len(self._waiting))


class ThreadBatcher:
    """Batches requests of threads, which may be greenlets, in a thread of its own, in which every call is made.

    It starts with the first request of a process: a thread that was started before a fork does not exist in the child.
    """

    def __init__(self, queue: BatchQueue) -> None:
        self.queue = queue
        self._arrived: queues.SimpleQueue[Job] = queues.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    async def predict(self, job: Job) -> Any:
        """Return the result of a job; it blocks. Raises what its call raised."""
        self.queue.admit(job)
        try:
            self._start()
        except RuntimeError:  # no thread more
            self.queue.give_up(job)
            raise
        return self._wait_for(job)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                self._arrived = queues.SimpleQueue()
                self._thread = threading.Thread(target=self._serve, args=[self._arrived], name="predict", daemon=True)
                self._thread.start()

    def _wait_for(self, job: Job) -> Any:
        job.waiter = threading.Lock()
        job.waiter.acquire()
        self._arrived.put(job)
        while not job.waiter.acquire(timeout=LOOK_S):  # until its release
            if self.queue.is_late(job):
                self.queue.give_up(job)
                raise self.queue.too_late()
        return job.result()

    def _serve(self, arrived: queues.SimpleQueue[Job]) -> None:
        waiting: collections.deque[Job] = collections.deque()
        while True:
            if not waiting:
                waiting.append(arrived.get())
                self._wait_for_more(arrived, waiting)
            n_quiet = 0
            while n_quiet < QUIET_TURNS and len(waiting) < self.queue.max_rows:
                time.sleep(0)  # lets others that are ready come in
                n_quiet = n_quiet + 1 if arrived.empty() else 0
                waiting += [arrived.get() for _ in range(arrived.qsize())]
            groups = [self.queue.take(waiting)]
            while groups:
                groups += self._call(groups.pop())

    def _wait_for_more(self, arrived: queues.SimpleQueue[Job], waiting: collections.deque[Job]) -> None:
        end = time.monotonic() + self.queue.max_wait_s
        while not self.queue.is_full(waiting) and (left_s := end - time.monotonic()) > 0:
            with contextlib.suppress(queues.Empty):
                waiting.append(arrived.get(timeout=left_s))

    def _call(self, jobs: list[Job]) -> list[list[Job]]:
        call = functools.partial(self.queue.call, jobs)
        halves = (_natively(call) if self.queue.needs_thread(jobs) else call)()
        for job in jobs if not halves else ():
            job.waiter.release()
        return halves


def _natively(call: Callable[[], T]) -> Callable[[], T]:
    """Return a call that runs in a thread of the system where gevent has patched Python's own to be greenlets.

    Elsewhere the thread that calls is one already.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return call
    return functools.partial(_gevent_thread().apply, call)


@functools.cache
def _gevent_thread() -> Any:
    import gevent.threadpool

    return gevent.threadpool.ThreadPool(1)

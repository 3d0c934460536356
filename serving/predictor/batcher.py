"""How a request waits for its call: in an asyncio loop, or in a thread, which may be a greenlet of gevent's."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import itertools
import queue as queues
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from serving.errors import ServingError, TooManyRequests
from serving.predictor.calls import BatchQueue, Job, Line

T = TypeVar("T")
LOOK_S = 0.25  # seconds between two looks at what waits, and at a call that runs beside a loop
QUIET_TURNS = 2  # turns of others without a new row before a call begins: gevent polls for input only in the second


class LoopBatcher:
    """Batches requests of an asyncio loop: those of one turn of it, and those that came while a call ran beside it."""

    def __init__(self, queue: BatchQueue, loop: asyncio.AbstractEventLoop) -> None:
        self.queue = queue
        self.loop = loop
        self._line = Line()
        self._reading: list[Job] = []  # jobs that are decoded beside the loop, or wait for that
        self._called: list[Job] = []  # those of the call that runs beside the loop
        self._halves: list[list[Job]] = []  # of calls that failed
        self._timer: asyncio.TimerHandle | None = None  # of a call that waits for more rows
        self._is_due = False  # a call is scheduled, or runs
        self._looked_at = 0.0  # by the monotonic clock
        self._is_looking = False  # the next look is scheduled
        # Threads, which start when they are first used.
        self._predicting = concurrent.futures.ThreadPoolExecutor(1, "predict")
        self._decoding = concurrent.futures.ThreadPoolExecutor(1, "decode")

    async def predict(self, job: Job) -> Any:
        """Return the result of a job. Raises what its call raised."""
        try:
            self.queue.admit(job)
        except TooManyRequests:
            if time.monotonic() - self._looked_at < LOOK_S or not self._drop_lost():
                raise
            self.queue.admit(job)
        job.waiter = self.loop.create_future()
        if job.decode is None:
            self._put(job)
        else:
            self._read(job)
        try:
            await job.waiter
        except asyncio.CancelledError:
            self.queue.give_up(job)
            raise
        return job.result()

    async def beside(self, work: Callable[[], T]) -> T:
        """Return what some work returns, which is done beside the loop. Raises what it raises."""
        trying = natively(functools.partial(Attempt, work), "decode")
        return (await self.loop.run_in_executor(self._decoding, trying)).result()

    async def pause(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    def _read(self, job: Job) -> None:
        """Decode a job beside the loop, and then let it wait for its call."""
        try:
            done = self.loop.run_in_executor(self._decoding, natively(job.read, "decode"))
        except RuntimeError:  # no thread more
            self.queue.give_up(job)
            raise
        self._reading.append(job)
        done.add_done_callback(lambda _: self._has_read(job))
        self._look_soon()

    def _has_read(self, job: Job) -> None:
        self._reading.remove(job)
        if job.waiter.done():  # it was given up
            return
        if job.n_rows:
            self._put(job)
        else:
            self.queue.leave(job)
            job.waiter.set_result(None)

    def _put(self, job: Job) -> None:
        self._line.append(job)
        if not self._is_due:
            self._is_due = True
            self._schedule()
        elif self._timer is not None and self.queue.is_full(self._line):
            self._timer.cancel()
            self._call()

    def _schedule(self) -> None:
        if self.queue.max_wait_s and not self.queue.is_full(self._line):
            self._timer = self.loop.call_later(self.queue.max_wait_s, self._call)
        else:
            self.loop.call_soon(self._call)

    def _call(self, n_before: int = 0) -> None:
        self._timer = None
        if n_before < len(self._line) < self.queue.max_rows:  # this turn brought some, and so may the next
            self.loop.call_soon(self._call, len(self._line))
            return
        jobs = self._halves.pop() if self._halves else self.queue.take(self._line)
        if self.queue.is_in_vain(jobs):
            self._hand_out(jobs, [])
        elif self.queue.needs_thread(jobs):
            self._call_beside(jobs)
        else:
            self._hand_out(jobs, self.queue.call(jobs))

    def _call_beside(self, jobs: list[Job]) -> None:
        """Make a call in a thread; if there can be none, its jobs fail."""
        call = natively(functools.partial(self.queue.call, jobs), "predict")
        try:
            done = self.loop.run_in_executor(self._predicting, call)
        except RuntimeError as error:
            for job in jobs:
                self.queue.give_up(job)
                job.error = error
            self._hand_out(jobs, [])
            return
        self._called = jobs
        done.add_done_callback(lambda done: self._hand_out(jobs, done.result()))
        self._look_soon()

    def _look_soon(self) -> None:
        """Look each `LOOK_S` at what waits, as long as something runs beside the loop."""
        if not self._is_looking:
            self._is_looking = True
            self.loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._is_looking = False
        self._drop_lost()
        if self._called or self._reading:
            self._look_soon()

    def _drop_lost(self) -> bool:
        """Answer jobs that wait too long for a call, or behind it, and those whose clients have left. Return whether
        there were any."""
        self._looked_at = time.monotonic()
        waiting = (*self._called, *self._reading, *self._line, *itertools.chain(*self._halves))
        lost = [job for job in waiting if not job.waiter.done() and self.queue.give_up_lost(job)]
        for job in lost:
            job.waiter.set_result(None)
        return bool(lost)

    def _hand_out(self, jobs: list[Job], halves: list[list[Job]]) -> None:
        self._called = []
        self._halves += halves
        for job in jobs if not halves else ():
            if not job.waiter.done():  # as it is when its task was cancelled, or it was told that it is late
                job.waiter.set_result(None)
        self._is_due = bool(self._line or self._halves)
        if self._is_due:
            self.loop.call_soon(self._call, len(self._line))


class ThreadBatcher:
    """Batches requests of threads, which may be greenlets, in a thread of its own, in which every call is made.

    It starts with the first request of a process: a thread that was started before a fork does not exist in the child.
    """

    def __init__(self, queue: BatchQueue) -> None:
        self.queue = queue
        self._arrived: queues.SimpleQueue[Job] = queues.SimpleQueue()
        self._starting = threading.Lock()
        self._decoding = threading.Lock()  # lock for one at a time: under Python's own, two gain nothing
        self._thread: threading.Thread | None = None

    async def predict(self, job: Job) -> Any:
        """Return the result of a job; it blocks. Raises what its call raised."""
        self.queue.admit(job)
        try:
            if job.decode is not None and not self._read(job):
                self.queue.leave(job)
                return job.result()
            self._start()
        except RuntimeError:  # no thread more
            self.queue.give_up(job)
            raise
        return self._wait_for(job)

    async def beside(self, work: Callable[[], T]) -> T:
        """Return what some work returns; it blocks, but not the greenlets of others. Raises what it raises."""
        with self._decoding:
            attempt = natively(functools.partial(Attempt, work), "decode")()
        return attempt.result()

    async def pause(self, seconds: float) -> None:
        """Wait; it blocks, but not the greenlets of others."""
        time.sleep(seconds)  # noqa: ASYNC251 — under WSGI whatever is awaited blocks

    def _read(self, job: Job) -> bool:
        """Decode a job, and return whether it then has rows to predict."""
        while not self._decoding.acquire(timeout=LOOK_S):
            if self.queue.give_up_lost(job):
                return False
        try:
            natively(job.read, "decode")()
        finally:
            self._decoding.release()
        return bool(job.n_rows)

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
            if self.queue.give_up_lost(job):
                break
        return job.result()

    def _serve(self, arrived: queues.SimpleQueue[Job]) -> None:
        line = Line()
        while True:
            if not line:
                line.append(arrived.get())
                self._wait_for_more(arrived, line)
            n_quiet = 0
            while n_quiet < QUIET_TURNS and len(line) < self.queue.max_rows:
                time.sleep(0)  # lets others that are ready come in
                n_quiet = n_quiet + 1 if arrived.empty() else 0
                for _ in range(arrived.qsize()):
                    line.append(arrived.get())
            groups = [self.queue.take(line)]
            while groups:
                groups += self._call(groups.pop())

    def _wait_for_more(self, arrived: queues.SimpleQueue[Job], line: Line) -> None:
        end = time.monotonic() + self.queue.max_wait_s
        while not self.queue.is_full(line) and (left_s := end - time.monotonic()) > 0:
            with contextlib.suppress(queues.Empty):
                line.append(arrived.get(timeout=left_s))

    def _call(self, jobs: list[Job]) -> list[list[Job]]:
        halves: list[list[Job]] = []
        if not self.queue.is_in_vain(jobs):
            call = functools.partial(self.queue.call, jobs)
            halves = (natively(call, "predict") if self.queue.needs_thread(jobs) else call)()
        for job in jobs if not halves else ():
            job.waiter.release()
        return halves


class Attempt(Generic[T]):
    """What some work returns or raises. Gevent's threads would print what is raised in them."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._error: Exception | None = None
        try:
            self._returned = work()
        except Exception as error:
            if isinstance(error, ServingError):
                error.__traceback__ = None  # which would keep all that was worked on
            self._error = error

    def result(self) -> T:
        """Return what was returned. Raises what was raised, once."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._returned
        finally:
            del error  # with its traceback it would be a cycle


def natively(call: Callable[[], T], name: str) -> Callable[[], T]:
    """Return a call that runs in a thread of the system where gevent has patched Python's own to be greenlets: in the
    one of that name.

    Elsewhere the thread that calls is one already.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return call
    return functools.partial(_gevent_thread(name).apply, call)


@functools.cache
def _gevent_thread(name: str) -> Any:
    import gevent.threadpool

    return gevent.threadpool.ThreadPool(1)

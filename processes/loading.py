"""Loading a model in the master, and proving it in a child, in a limited time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Generator
from typing import NoReturn

import structlog

import app
from processes import options
from processes.patches import check_ssl, patch_as_worker, patch_ssl
from processes.tls import check_tls
from processes.trial import try_out, wait_for
from serving.errors import STARTUP_STATUS, ModelError, StartupError, errors_about, listed, print_error, reason_of
from serving.logs import configure_logging
from serving.output import finish_output
from serving.predictor.batcher import natively
from serving.predictor.model import Model
from serving.predictor.proof import Proof
from serving.web.service import Service

log = structlog.get_logger()

Loaded = tuple[app.Settings, Model]
PROGRESS_S = 10.0  # seconds between lines about what takes long
WATCH_MARGIN_S = 2.0  # seconds in which a process that starts ends by itself
WATCH_POLL_S = 0.1
UVICORN = "server.worker_class = 'uvicorn'"
INSTALL = "run pip install 'gunicorn[gevent]', as requirements.txt has it"
PATCHED = (
    "without gevent it does not: gevent patches Python's standard library after the model's code was loaded, and "
    f"starts no program in a thread; set {UVICORN}, or have names of the library imported where they are used"
)
PERHAPS_PATCHED = f"gevent, which patches Python's standard library, may be why; see whether it starts with {UVICORN}"


class Deadline:
    """The time that loading and proving a model may take together, in this process and in children of it.

    Its memory is shared with them: a child tells what it does, and what the settings that it has read say.
    """

    LIMIT, ARTIFACT, DOING = slice(0, 8), slice(8, 1608), slice(1608, 3208)  # seconds, and two texts
    THREADS, HINT = slice(3208, 3408), slice(3408, 4096)  # texts of what may be why it takes too long

    def __init__(self, limit_s: float) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._started = time.monotonic()
        self._next_line_s = PROGRESS_S
        self.threads_before: int | None = None  # native ones, before loading began
        self.set("the model", limit_s)

    def set(self, artifact: str, limit_s: float) -> None:
        """Note what the settings say."""
        self._note(self.ARTIFACT, artifact)
        self._memory[self.LIMIT] = struct.pack("d", limit_s)  # whole for whoever reads it; pack_into clears it first
        self.report("reading its settings")

    def report(self, doing: str) -> None:
        """Note what is done now."""
        self._note(self.DOING, doing)

    def suspect(self, hint: str) -> None:
        """Note what may be why it takes too long, from now on."""
        self._note(self.HINT, hint)

    def look(self) -> None:
        """Note how many native threads loading has left behind, if it was in this process."""
        if self.threads_before is not None:
            left = count_native_threads() - self.threads_before
            problem = f"loading it left {left} native threads behind, for which a forked process may wait"
            self._note(self.THREADS, problem if left > 0 else "")

    def _note(self, place: slice, text: str) -> None:
        size = place.stop - place.start
        self._memory[place] = text.encode(errors="replace")[:size].ljust(size, b"\0")

    def _read(self, place: slice) -> str:
        return self._memory[place].rstrip(b"\0").decode(errors="replace")

    @property
    def limit_s(self) -> float:
        (limit_s,) = struct.unpack("d", self._memory[self.LIMIT])
        return float(limit_s)

    @property
    def took_s(self) -> float:
        return time.monotonic() - self._started

    @property
    def is_over(self) -> bool:
        return self.took_s > self.limit_s

    def check(self) -> None:
        """Log what takes long. Raises `ModelError` when it takes too long."""
        self.look()
        if self.is_over:
            raise self.error()
        took_s, limit_s = self.took_s, self.limit_s
        if took_s > self._next_line_s:
            self._next_line_s += PROGRESS_S
            doing = self._read(self.DOING)
            log.warning("model_takes_long", doing=doing, for_s=round(took_s, 1), limit_s=limit_s)

    def error(self) -> ModelError:
        """Return what to raise when it takes too long."""
        what = f"{self._read(self.ARTIFACT)} takes longer than model.load_timeout_s = {self.limit_s:g} s"
        hints = [hint for hint in map(self._read, (self.THREADS, self.HINT)) if hint]
        return ModelError("; ".join([f"{what} while {self._read(self.DOING)}", *hints]))


class Loading:
    """A model that is loaded in a thread of its own, so that its caller can go on.

    OpenMP starts threads for each thread that calls it, as LightGBM and XGBoost do while they are loaded. A process
    that is forked later lacks them and waits for them, unless they have ended with the thread that called.
    """

    def __init__(self, settings: app.Settings, deadline: Deadline, wakeup: Callable[[], None] = lambda: None) -> None:
        self._settings, self._deadline, self._wakeup = settings, deadline, wakeup
        self._threads_before = count_native_threads()
        self._results: list[Loaded | BaseException] = []
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(load(self._settings, self._deadline))
        except BaseException as error:  # what an artifact raises has no bounds
            self._results.append(error)
        self._wakeup()

    def has_ended(self) -> bool:
        """Return whether `result` is there."""
        return bool(self._results)

    def result(self) -> Loaded:
        """Return the settings and the model that they describe, and let go of them. Raises `StartupError`."""
        self._thread.join()
        result, self._results = self._results[0], [StartupError("the result was taken")]
        if isinstance(result, StartupError):
            raise result
        if isinstance(result, BaseException):
            raise StartupError(reason_of(result))
        self._deadline.threads_before = self._threads_before
        return result


def count_native_threads() -> int:
    """Return how many threads this process has that Python does not know of, where the system tells."""
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/task")) - threading.active_count()
    return 0


def prepare_settings(deadline: Deadline) -> app.Settings:
    """Return the settings, unless gunicorn's options do not fit them, and prepare this process for loading their model.

    Call it in the main thread. Raises `StartupError`.
    """
    given = options.read_options()
    options.check_options(given, given)
    settings = app.load_settings(options=given)
    options.check_app(given["wsgi_app"] or options.APPS[settings.worker_class], given, given, settings)
    deadline.set(settings.artifact_subject, settings.model.load_timeout_s)
    is_start = app.current_service() is None
    if is_start:
        configure_logging(settings.logging)
    check_tls(settings)
    if options.is_gevents(settings):
        if not is_start:
            check_ssl()
        try:
            patch_ssl()
        except ImportError as error:
            problem = f"{settings.place('server', 'worker_class')} means gevent's worker, and gevent cannot be imported"
            raise StartupError(f"{problem}: {error}; {INSTALL}, or set {UVICORN}") from None
    return settings


def load(settings: app.Settings, deadline: Deadline) -> Loaded:
    """Load the model that the settings describe, for workers to be forked. Raises `StartupError`."""
    model = app.load(settings, deadline.report)
    ours = (threading.main_thread(), threading.current_thread())
    if others := [thread.name for thread in threading.enumerate() if thread not in ours]:
        with errors_about(settings.artifact_subject):
            raise ModelError(f"starts threads when it is loaded, which forked workers lack: {listed(others)}")
    importlib.import_module(settings.framework)  # once for all workers
    return settings, model


def load_and_prove(deadline: Deadline) -> Generator[None, None, Service[app.Settings]]:
    """Yield until the model of the settings is loaded and proven, in a process whose parent looks at the deadline.

    Raises `StartupError`.
    """
    loading = Loading(prepare_settings(deadline), deadline)
    loaded: Loaded = yield from wait_for(loading, deadline.look)
    return (yield from prove_in_child(loaded, deadline, deadline.look))


def prove_in_child(
    loaded: Loaded, deadline: Deadline, check: Callable[[], None]
) -> Generator[None, None, Service[app.Settings]]:
    """Yield until a child, patched as a worker will be, has proven a model, and return the service of it.

    `check` is called each turn. Raises `StartupError`, which blames gevent's patches if the model can be proven without
    them.
    """
    settings, model = loaded
    prove = functools.partial(_prove, settings, model)
    is_patched = options.is_gevents(settings)
    deadline.suspect(PERHAPS_PATCHED if is_patched else "")
    try:
        proof = yield from try_out(functools.partial(prove, is_patched), settings.artifact_subject, check)
    except ModelError as error:
        if not is_patched or deadline.is_over:
            raise
        try:
            yield from try_out(functools.partial(prove, False), settings.artifact_subject, check)
        except StartupError:
            raise error from None
        raise ModelError(f"{model.without_hints(str(error))}; {PATCHED}") from None
    return app.make_service(settings, model, Proof(**json.loads(proof)))


def _prove(settings: app.Settings, model: Model, is_patched: bool) -> str:
    if is_patched:
        patch_as_worker()
    proof = app.prove_here(settings, model)
    if is_patched:
        with errors_about(settings.artifact_subject):
            _answer_natively(proof.applied_to(model))
    return json.dumps(dataclasses.asdict(proof))


def _answer_natively(model: Model) -> None:
    """Make a model answer a row in the thread in which a patched worker makes calls that take long."""
    errors: list[ModelError] = []  # which gevent would print

    def answer() -> None:
        try:
            model.answer(model.known_rows[:1], "a known row in a thread")
        except ModelError as error:
            errors.append(error)

    natively(answer, "predict")()
    if errors:
        raise errors[0]


def end_when_late(pid: int, deadline: Deadline) -> str:
    """End a process that is late and does not end itself, since what it loads never gives the interpreter back."""
    while deadline.took_s < deadline.limit_s + WATCH_MARGIN_S:
        if os.getppid() != pid:
            return ""  # it has ended, and its number may be another's by now
        time.sleep(WATCH_POLL_S)
    print_error(deadline.error())
    finish_output()
    os.kill(pid, signal.SIGKILL)
    return ""


def refuse_start(error: StartupError) -> NoReturn:
    """End the process with the message alone, without waiting for threads that an artifact has started."""
    print_error(error)
    finish_output()
    os._exit(STARTUP_STATUS)

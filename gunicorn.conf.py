"""The process path: from `settings.toml`, which worker class, how many, when a reload is taken, how a worker ends.

Run with `gunicorn -c gunicorn.conf.py`. Settings and predictor are loaded here, in the master, before it listens, so
a mistake in them stops it, and the workers share their memory. Only names that are gunicorn settings reach gunicorn.

In order: a trial in a child process, loading, answers to what is no HTTP, the two workers, the master with its reload,
gunicorn's hooks, and at the end gunicorn's settings. HUP runs this file again, in the trial and then in the master.
"""

import asyncio
import collections
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import functools
import gc
import importlib
import itertools
import json
import logging
import mmap
import os
import resource
import signal
import socket
import ssl
import struct
import sys
import tempfile
import termios
import threading
import time
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn, cast

early_hups: list[int] = []
if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # it would end this process while it starts
    signal.signal(signal.SIGHUP, lambda number, _: early_hups.append(number))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import gunicorn.sock
import structlog
from gunicorn import util
from gunicorn.arbiter import Arbiter
from gunicorn.config import Config
from gunicorn.errors import HaltServer
from gunicorn.glogging import Logger
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, NoMoreData, ParseException
from gunicorn.sock import TCP6Socket, TCPSocket, UnixSocket, close_sockets
from gunicorn.workers.base import Worker

import app
from serving import errors
from serving.errors import (
    STARTUP_STATUS,
    BodyCutShort,
    BodyTooSlow,
    ModelError,
    ServingError,
    SettingsError,
    StartupError,
    about,
    exit_on_startup_error,
    listed,
    reason_of,
)
from serving.logs import configure_logging
from serving.output import finish_output, flush_output, protect_output, reopen_output
from serving.predictor.artifact import ModelSettings
from serving.predictor.model import Model
from serving.predictor.proof import Proof
from serving.web.asgi import CUT_SHORT
from serving.web.bridges import FastAPIOverWSGI
from serving.web.messages import LINGER_S, Response, make_request_id
from serving.web.service import Service

protect_output()
log = structlog.get_logger()

PROVEN, REFUSED = "+", "-"
MAX_SAID_BYTES = 32_768  # half of what a pipe holds, so that nobody need read while it is written
PR_SET_PDEATHSIG = 1  # prctl(2): the signal to get when the parent ends
APPS = {"uvicorn": "app:asgi", "gevent": "app:wsgi"}  # that workers call, by the kind of worker
OTHER_WORKERS = {"uvicorn_worker.UvicornWorker": APPS["uvicorn"], "gevent": APPS["gevent"]}  # than ours
CHOICES = {"protocol": ("http",), "http_parser": ("auto", "python")}  # of gunicorn's options that would answer nobody
BOOTING, READY, DRAINING = 0, 1, 2  # stages of a worker
BOOT_S, BOOTS = 10.0, 10.0  # that a worker may take to start, and as many times what a proof of the model took
DRAIN_S = 1.0  # for which connections stay open after the order to end: clients in use come back sooner
SETTLE_S = 0.1  # in which a connection that was begun comes to be accepted
MARGIN_S = 0.5  # before the master kills what has not ended
POLL_S = 0.05
START_POLL_S = 0.005
TICK_S = 0.1
PROGRESS_S = 10.0  # between lines about what takes long
WATCH_MARGIN_S = 2.0  # in which a process that starts ends by itself
MAX_WAIT_S = 30.0
SO_ATTACH_FILTER = 26  # asm-generic/socket.h
TCP_INFO_BYTES, TCP_BYTES_ACKED = 128, 120  # of struct tcp_info, and where in it (linux/tcp.h, since Linux 4.1)
MAX_HELD_BYTES = 16_384
GC_THRESHOLD = 10_000  # new objects: more than requests in flight have, so that these are not searched for garbage
MAX_WASTE_BYTES = 1_048_576  # more than a request line and 100 fields come to
PIECE_BYTES = 256  # of a body that the parser gets at once, at the least, where empty lines are in it
MAX_PIECE_BYTES = 32_768  # that it gets at once, at the most
TURN_S = 0.005  # for which one connection's bytes are parsed before others have their turn
TURN_REQUESTS = 16  # requests that were sent too early and are begun in one turn of the loop
ACCEPTS_PER_S, MAX_ACCEPTS = 2000, 100  # by which a busy loop makes up for turns that it had not
LOOK_S = 1.0  # between two looks at what is being sent
MAX_FILES = 65_536  # that a worker may have open, where the hard limit lets it
OWN_FILES = 100  # of a worker: listeners, libraries, logs and what a model opens


class Trial:
    """A call made in a child process: its crash, its memory and its threads, which workers that are forked later would
    lack and wait for (gunicorn's issue 1891), are not this one's. `call` gives a text or raises `StartupError`;
    `what` is tried.
    """

    running: ClassVar["Trial | None"] = None  # whose status the master must not take for a worker's

    def __init__(self, call: Callable[[], str], what: str) -> None:
        self.what = what
        reading, writing = os.pipe()
        os.set_blocking(reading, False)  # whatever the child started may hold the other end
        self.pid = os.fork()
        if self.pid == 0:
            self._run(call, writing)
        os.close(writing)
        self._pipe = os.fdopen(reading, "rb")
        self._status: int | None = None

    def _run(self, call: Callable[[], str], writing: int) -> None:
        said = ""  # what is said counts, not the status, for a predict may end the process with any
        try:
            for number in (*Arbiter.SIGNALS, signal.SIGCHLD):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, signal.SIG_DFL)
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            said = PROVEN + call()
        except StartupError as error:
            said = f"{REFUSED}{type(error).__name__}: {error}"
        except Exception as error:  # of a user's module, or of what an artifact holds
            log.exception("trial_failed")
            said = f"{REFUSED}StartupError: {reason_of(error)}"
        finally:
            try:
                os.write(writing, said.encode(errors="backslashreplace")[:MAX_SAID_BYTES])
            finally:
                finish_output()
                os._exit(0)  # and wait for no thread

    def has_ended(self) -> bool:
        """Say whether `result` is there."""
        return self._has_ended(os.WNOHANG)

    def _has_ended(self, options: int) -> bool:
        if self._status is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:  # gunicorn's master waits for whatever child it has
                pid, status = self.pid, 0
            self._status = status if pid else None
        return self._status is not None

    def result(self) -> str:
        """Wait, and give what the call gave. Raises `StartupError` with what it raised."""
        self._has_ended(0)
        with self._pipe:
            said = (self._pipe.read() or b"").decode(errors="ignore")
        if said.startswith(PROVEN):
            return said.removeprefix(PROVEN)
        if said.startswith(REFUSED):
            kind, _, text = said.removeprefix(REFUSED).partition(": ")
            raise getattr(errors, kind, StartupError)(text)
        status = os.waitstatus_to_exitcode(self._status or 0)
        raise ModelError(f"{self.what} ended the process that tried it, with status {status}")

    def stop(self) -> None:
        """End the child, if it has not ended."""
        if not self.has_ended():
            os.kill(self.pid, signal.SIGKILL)
            self._has_ended(0)
        self._pipe.close()


def check_tls(loaded: app.Settings) -> None:
    """Raise `SettingsError` unless certificate and key, if there are any, can be read and belong together."""
    files = dict(zip(("certfile", "keyfile"), tls_files(loaded), strict=True))
    for name, file in files.items():
        if file and not os.access(file, os.R_OK):
            raise SettingsError(f"{loaded.place('server', name)} is {file!r}, which cannot be read")
    certificate, key = files.values()
    if key and not certificate:
        raise SettingsError(f"{loaded.place('server', 'keyfile')} needs server.certfile beside it")
    try:
        if certificate:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError):  # of which ssl.SSLError is one; it does not say more
        rule = "should be a certificate in PEM, with its key, which is not encrypted, in server.keyfile or behind it"
        raise SettingsError(f"{loaded.place('server', 'certfile')} is {certificate!r}; it {rule}") from None


def tls_files(loaded: app.Settings) -> list[str | None]:
    """Give the paths of certificate and key, or None."""
    return [str(loaded.folder / name) if name else None for name in (loaded.server.certfile, loaded.server.keyfile)]


class Deadline:
    """How long loading and proving a model may take together, in this process and in children of it.

    Its memory is shared with them: a child tells what it does, and what the settings that it has read say.
    """

    LIMIT, ARTIFACT, DOING = slice(0, 8), slice(8, 1608), slice(1608, 3208)  # seconds, and two texts

    def __init__(self, limit_s: float) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._started = time.monotonic()
        self._next_line_s = PROGRESS_S
        self.threads_before: int | None = None  # native ones, before what is loaded by now was
        self.set("the model", limit_s)

    def set(self, artifact: str, limit_s: float) -> None:
        """Note what the settings say."""
        self._note(self.ARTIFACT, artifact)
        self._memory[self.LIMIT] = struct.pack("d", limit_s)  # whole for whoever reads it; pack_into clears it first
        self.report("reading its settings")

    def report(self, doing: str) -> None:
        """Note what is done now."""
        self._note(self.DOING, doing)

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

    def check(self) -> None:
        """Log what takes long. Raises `ModelError` when it takes too long."""
        took_s, limit_s = self.took_s, self.limit_s
        if took_s > limit_s:
            raise self.error()
        if took_s > self._next_line_s:
            self._next_line_s += PROGRESS_S
            doing = self._read(self.DOING)
            log.warning("model_takes_long", doing=doing, for_s=round(took_s, 1), limit_s=limit_s)

    def error(self) -> ModelError:
        """Return what to raise when it takes too long."""
        what = f"{self._read(self.ARTIFACT)} takes longer than model.load_timeout_s = {self.limit_s:g} s"
        left = 0 if self.threads_before is None else count_native_threads() - self.threads_before
        hint = (
            f"; loading it left {left} native threads behind, for which a forked process may wait" if left > 0 else ""
        )
        return ModelError(f"{what} while {self._read(self.DOING)}{hint}")


Loaded = tuple[app.Settings, Model]


class Loading:
    """A model that is loaded in a thread of its own, so that its caller can go on.

    OpenMP starts threads for each thread that calls it, as LightGBM and XGBoost do while they are loaded. A process
    that is forked later lacks them and waits for them, unless they have ended with the thread that called.
    """

    def __init__(self, deadline: Deadline, wakeup: Callable[[], None] = lambda: None) -> None:
        self._deadline, self._wakeup = deadline, wakeup
        self._threads_before = count_native_threads()
        self._results: list[Loaded | BaseException] = []
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(load(self._deadline))
        except BaseException as error:  # what an artifact raises has no bounds
            self._results.append(error)
        self._wakeup()

    def has_ended(self) -> bool:
        """Say whether `result` is there."""
        return bool(self._results)

    def result(self) -> Loaded:
        """Return the settings and the model that they describe. Raises `StartupError`."""
        self._thread.join()
        (result,) = self._results
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


def load(deadline: Deadline) -> Loaded:
    """Load what the settings say, for workers to be forked. Raises `StartupError`."""
    loaded = app.load_settings()
    deadline.set(loaded.artifact, loaded.model.load_timeout_s)
    if app.current_service() is None:
        configure_logging(loaded.logging)
    check_tls(loaded)
    model = app.load(loaded, deadline.report)
    ours = (threading.main_thread(), threading.current_thread())
    if others := [thread.name for thread in threading.enumerate() if thread not in ours]:
        with about(loaded.artifact):
            raise ModelError(f"starts threads when it is loaded, which forked workers lack: {listed(others)}")
    importlib.import_module(loaded.framework)  # once for all workers
    return loaded, model


def prove(settings: app.Settings, model: Model) -> str:
    """Prove a model, and return the proof as text. Raises `ModelError`."""
    return json.dumps(dataclasses.asdict(app.prove_here(settings, model)))


def prove_in_child(loaded: Loaded, deadline: Deadline) -> Generator[None, None, Service[app.Settings]]:
    """Yield until a child has proven a model, and return the service around it. Raises `StartupError`."""
    settings, model = loaded
    proof = yield from try_out(functools.partial(prove, settings, model), settings.artifact, deadline)
    return app.make_service(settings, model, Proof(**json.loads(proof)))


def wait_for(task: Any, deadline: Deadline) -> Generator[None, None, Any]:
    """Yield until a `Trial` or a `Loading` has ended, and return its result. Raises `StartupError`."""
    while not task.has_ended():
        deadline.check()
        yield
    return task.result()


def try_out(call: Callable[[], str], what: str, deadline: Deadline) -> Generator[None, None, str]:
    """Make a call in a child process, and yield until it has ended, or must. Raises `StartupError`."""
    trial = Trial(call, what)
    try:
        Trial.running = trial
        result: str = yield from wait_for(trial, deadline)
        return result
    finally:
        Trial.running = None
        trial.stop()


def finish(steps: Generator[None, None, Any]) -> Any:
    """Take all steps of what waits where it yields, and return what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        time.sleep(START_POLL_S)


def end_when_late(pid: int, deadline: Deadline) -> str:
    """End a process that is late and does not end itself, since what it loads never gives the interpreter back."""
    while deadline.took_s < deadline.limit_s + WATCH_MARGIN_S:
        if os.getppid() != pid:
            return ""  # it has ended, and its number may be another's by now
        time.sleep(TICK_S)
    print_error(deadline.error())
    finish_output()
    os.kill(pid, signal.SIGKILL)
    return ""


def read_command_line() -> dict[str, Any]:
    """Return gunicorn's options of the command line and of GUNICORN_CMD_ARGS, which win over this file.

    Gunicorn parses them anew once it has read this file; a check of the configuration has no later hook.
    """
    config = Config()
    parser = config.parser()
    both = [vars(parser.parse_known_args(words)[0]) for words in (config.get_cmd_args_from_env(), None)]
    options = {name: value for options in both for name, value in options.items() if value is not None}
    return options | {"wsgi_app": next(iter(options["args"]), None)}


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `StartupError` if the service cannot work with gunicorn's options."""
    if options.get("preload_app"):
        raise StartupError(
            "preload_app would have the master predict; leave it out: the workers share the model anyway"
        )
    kind = options.get("worker_class")
    if not (kind is None or kind in OTHER_WORKERS or hasattr(kind, "begin_drain")):
        rule = "leave it out, and set server.worker_class to 'uvicorn' or 'gevent'"
        raise StartupError(f"gunicorn's worker_class is {getattr(kind, '__name__', kind)!r}; {rule}")
    for name, allowed in CHOICES.items():
        if (given := options.get(name, allowed[0])) not in allowed:
            raise StartupError(f"gunicorn's {name} is {given!r}; leave it out, or use one of {listed(allowed)}")
    for name in ("workers", "worker_connections", "keepalive"):
        if (number := options.get(name, 1)) < 1:
            raise StartupError(f"gunicorn's {name} is {number}; use 1 or more, or nobody is answered")
    folder = options.get("worker_tmp_dir")
    check_folder(f"worker_tmp_dir is {folder!r}, where no file" if folder else "no temporary file", folder)
    if pidfile := options.get("pidfile"):
        check_folder(f"pidfile is {pidfile!r}, where no file", os.path.dirname(pidfile) or ".")


def check_folder(problem: str, folder: str | None) -> None:
    """Raise `StartupError` if no file can be made in a folder, or without one where temporary files go."""
    try:
        file, name = tempfile.mkstemp(prefix="gunicorn-", dir=folder)
        os.close(file)
        os.unlink(name)
    except OSError as error:
        rule = "gunicorn needs one; see --worker-tmp-dir, --pid and TMPDIR"
        raise StartupError(f"{problem} can be made: {error.strerror or error}; {rule}") from None


def check_app(uri: str, options: Mapping[str, Any]) -> None:
    """Raise `StartupError` if the worker cannot work with the app, which may be of the other interface, or options."""
    settings = the_service().settings
    called = OTHER_WORKERS.get(options.get("worker_class", ""), APPS[settings.worker_class])
    if called == APPS["uvicorn"] and options.get("proxy_protocol") not in (None, False, "off"):
        raise StartupError("proxy_protocol is not known to uvicorn's worker; leave it out, or use gevent's")
    native = {"fastapi": "app:asgi", "flask": "app:wsgi"}[settings.framework]
    given = native if uri in ("app:app", "app:create_app()") else uri
    if given in APPS.values() and given != called:
        worker = next(name for name, needed in APPS.items() if needed == called)
        raise StartupError(f"the app is {uri!r}, which {worker}'s worker cannot run; use {called!r}")


def the_service() -> Service[app.Settings]:
    """Return the service of this process, which a start has made."""
    return cast(Service[app.Settings], app.current_service())


def freeze() -> None:
    """Keep the garbage collector from what is there for good, which it would go through again and again, in vain."""
    gc.collect()
    gc.freeze()


def refuse_start(error: StartupError) -> NoReturn:
    """End the process with the message alone, without waiting for threads that an artifact has started."""
    print_error(error)
    finish_output()
    os._exit(STARTUP_STATUS)


def print_error(error: StartupError) -> None:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)


def start() -> float:
    """Load and prove what is served, and return the seconds that the proof took. Raises `StartupError`."""
    options = read_command_line()
    check_options(options)
    deadline = Deadline(ModelSettings().load_timeout_s)
    watch = Trial(functools.partial(end_when_late, os.getpid(), deadline), "")
    loaded = finish(wait_for(Loading(deadline), deadline))
    started = time.monotonic()
    service = finish(prove_in_child(loaded, deadline))
    took_s = time.monotonic() - started
    watch.stop()
    app.set_current_service(service)
    check_app(options["wsgi_app"] or APPS[service.settings.worker_class], options)
    return took_s


proving_s = 0.0
if app.current_service() is None:  # else a reload runs this file again, with a service that is proven
    freeze()  # the libraries, but no service, for a reload drops it
    try:
        proving_s = start()
    except StartupError as error:
        refuse_start(error)
settings = the_service().settings


class StructuredLogger(Logger):
    """Gunicorn's logger without its handlers: `app.configure_logging` has put ours in their place."""

    def setup(self, cfg: Any) -> None:
        self.cfg = cfg
        self.loglevel = logging.root.level
        self._access_log_enabled = False


def count_unacknowledged(sock: Any) -> int:
    """Return the bytes that a socket has taken and the other side's kernel has not: a client may read for long before
    a full socket takes more."""
    count = bytearray(4)
    with contextlib.suppress(OSError, ValueError):  # no such count for this kind of socket, or it is closed
        fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
    return int.from_bytes(count, sys.byteorder)


def count_acknowledged(sock: Any) -> int | None:
    """Return how many bytes the other side's kernel has taken so far; None where TCP does not say."""
    with contextlib.suppress(OSError, ValueError, TypeError, struct.error):
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        return int(struct.unpack_from("Q", info, TCP_BYTES_ACKED)[0])
    return None


def forget_unsent(sock: Any) -> None:
    """Have the kernel drop what a socket has not sent when it is closed, instead of keeping it for a client that reads
    nothing."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def note_cut_off() -> None:
    log.info("client_cut_off", reason="it took no byte of its answer", after_s=send_timeout)


class Progress:
    """How many bytes a client has taken, and since when no more."""

    def __init__(self, taken: int) -> None:
        self.taken, self.since = taken, time.monotonic()

    def has_ended(self, taken: int) -> bool:
        """Note how many it has taken by now. Return whether these have been no more for `server.send_timeout`."""
        now = time.monotonic()
        if taken > self.taken:
            self.taken, self.since = taken, now
        return now - self.since >= send_timeout


def refuse(status: int) -> bytes:
    """Give the whole answer to bytes that are no HTTP request we take, in the shape of every other error."""
    details = {
        400: "not a valid HTTP/1.1 request",
        414: f"the request line is too long; send at most {limit_request_line} bytes",
        431: f"the header is too large; send at most {limit_request_fields} fields of {limit_request_field_size} bytes",
        500: "internal error",
    }
    request_id = make_request_id()
    log.warning("request_refused", status=status, request_id=request_id)
    response = Response.of({"detail": details[status]}, status, {"Connection": "close"})
    response.request_id = request_id
    head = [f"HTTP/1.1 {response.status_line}", *map(": ".join, response.headers)]
    return "\r\n".join([*head, "", ""]).encode() + b"".join(response.pieces)


class Together:
    """A transport that sends what is written in one turn of the loop in one piece, and ends when nothing more leaves.

    uvicorn writes a head and then a body, each of which would be a packet and a system call: a fifth of the time that
    a small answer takes.
    """

    pending: ClassVar[collections.deque["Together"]] = collections.deque()  # those of this turn
    sending: ClassVar[dict["Together", Progress]] = {}  # those that may have something to send

    def __init__(self, transport: Any, loop: Any) -> None:
        self.transport = transport
        self.is_closing = transport.is_closing  # which is asked for each answer
        self.loop = loop
        self.written: list[bytes] = []
        self.sent_bytes = 0  # given to the transport
        self.lingers = False  # the client may still be sending when this is closed
        self.is_over = False  # closed, but for what lingers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        if not self.written:
            if not self.pending:
                self.loop.call_soon(self.flush_pending)
            self.pending.append(self)
        self.written.append(data)
        if len(data) > MAX_HELD_BYTES or len(self.written) > 2:
            self.flush()  # so that the transport can say when it has enough

    def write_eof(self) -> None:
        self.flush()
        self.transport.write_eof()

    def close(self) -> None:
        """Close; where the client may still be sending, not before it could read its last answer."""
        if self.is_over:
            return
        self.flush()
        self.is_over = True
        if not self.lingers or self.is_closing():
            self.transport.close()
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.transport.resume_reading()  # and the protocol throws it away
        self.loop.call_later(LINGER_S, self.transport.close)

    def flush_pending(self) -> None:
        try:
            while self.pending:
                self.pending.popleft().flush()
        finally:
            if self.pending:  # one transport's failure is not the others'
                self.loop.call_soon(self.flush_pending)

    def flush(self) -> None:
        if self.written and not self.is_over and not self.transport.is_closing():
            self.transport.writelines(self.written)
            self.sent_bytes += sum(map(len, self.written))
            if self not in self.sending:
                self.watch()
        self.written = []

    def watch(self) -> None:
        """Look each second whether something leaves, until all has."""
        if not self.sending:
            self.loop.call_later(LOOK_S, self.look, self.loop)
        self.sending[self] = Progress(self.count_taken())

    @classmethod
    def look(cls, loop: Any) -> None:
        """Let go of transports that have sent all, and abort those whose clients take nothing."""
        try:
            for transport, progress in [*cls.sending.items()]:
                if transport.has_sent_all():
                    del cls.sending[transport]
                elif progress.has_ended(transport.count_taken()):
                    del cls.sending[transport]
                    transport.cut_off()
        finally:
            if cls.sending:
                loop.call_later(LOOK_S, cls.look, loop)

    def has_sent_all(self) -> bool:
        """Whether the client's kernel has all, or never will. Under TLS, what uvloop keeps of it is not in the size of
        its buffer, and a transport that is closed has no socket."""
        sock = self.transport.get_extra_info("socket")
        return sock is None or (not self.transport.get_write_buffer_size() and not count_unacknowledged(sock))

    def count_taken(self) -> int:
        """Return how many bytes the client's kernel has taken."""
        sock = self.transport.get_extra_info("socket")
        unsent: int = self.transport.get_write_buffer_size()
        taken = count_acknowledged(sock)
        return self.sent_bytes - unsent - count_unacknowledged(sock) if taken is None else taken

    def cut_off(self) -> None:
        """End at once, whatever is not sent."""
        note_cut_off()
        forget_unsent(self.transport.get_extra_info("socket"))
        self.transport.abort()


def http_protocol() -> type:
    """Give uvicorn's protocol with gunicorn's limits, and an answer for every client that can still read one.

    The class stands in here because importing its base imports uvicorn.
    """
    import httptools
    from uvicorn.protocols.http.flow_control import FlowControl
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Flow(FlowControl):
        is_held = False  # enough has come

        def resume_reading(self) -> None:
            if not self.is_held:
                super().resume_reading()

    class Protocol(HttpToolsProtocol):
        is_draining = False  # which all connections share
        refusal = 400
        waste_bytes = 0  # received since the last head or piece of a body was whole
        failed = False
        body_timer: Any = None  # until the body that is being received must be whole
        n_requests = 0
        held = b""  # what came behind a request that has to be answered first
        behind: ClassVar[collections.deque[Any]] = collections.deque()  # those that hold what can be taken
        accept_more: ClassVar[Any]  # see `DrainingServer`
        transport: Any
        flow: Any
        headers: Any

        def connection_made(self, transport: Any) -> None:
            super().connection_made(cast(Any, Together(transport, self.loop)))
            self.flow = Flow(self.transport)
            self.timeout_keep_alive_task = self.loop.call_later(keepalive, self.timeout_keep_alive_handler)
            self.loop.call_soon(self.accept_more, time.monotonic())

        @property
        def is_busy(self) -> bool:
            """Whether a whole request waits for its answer."""
            return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

        def data_received(self, data: bytes) -> None:
            if self.transport.is_over or self.failed:
                return
            cycle = self.cycle
            if self.held or (cycle is not None and not cycle.more_body and not cycle.response_complete):
                self._hold(self.held + data)
            else:
                self._take(data)

        def _hold(self, data: bytes) -> None:
            """Keep what came too early, and read no more until it is needed: requests that are parsed take many times
            their size, and their turn."""
            self.held = data
            self.flow.pause_reading()
            self.flow.is_held = self.transport.lingers = True

        def _queue_up(self) -> None:
            """Take what was kept, but not before those that wait already."""
            self._unset_keepalive_if_required()  # it is not idle
            if not self.behind:
                self.loop.call_soon(self._let_go_on)
            self.behind.append(self)

        def _let_go_on(self) -> None:
            try:
                for _ in range(min(TURN_REQUESTS, len(self.behind))):
                    self.behind.popleft()._go_on()
            finally:
                if self.behind:
                    self.loop.call_soon(self._let_go_on)

        def _go_on(self) -> None:
            held, self.held = self.held, b""
            if not held or self.transport.is_over:
                return
            self.transport.lingers = self.n_requests == max_requests_per_connection
            self._take(held)
            if not self.held:
                self.flow.is_held = False
                self.flow.resume_reading()

        def _take(self, data: bytes) -> None:
            """Parse what came, as far as there is no request that has to be answered first."""
            data = self._take_piece(data)
            if data:
                started = time.monotonic()
                while data and not self.failed and not self.is_busy and time.monotonic() - started < TURN_S:
                    data = self._take_piece(data)
                if data and not self.failed:
                    self._hold(data)
                    if not self.is_busy:
                        self._queue_up()
            cycle = self.cycle
            if self.body_timer is None and cycle is not None and cycle.more_body and not cycle.response_complete:
                self.body_timer = self.loop.call_later(request_timeout_s, self._cut_short, BodyTooSlow)
            if self.waste_bytes > limit_request_field_size and not self.failed:
                self._check_waste()

        def _take_piece(self, data: bytes) -> bytes:
            """Parse some of it, and return the rest."""
            in_body = self.cycle is not None and self.cycle.more_body
            piece, data = cut_requests(data, PIECE_BYTES if in_body else 0)
            self.waste_bytes += len(piece)
            return self._feed(piece) + data

        def _check_waste(self) -> None:
            """Refuse fields that are too long before they end, and empty lines without a request."""
            if self.headers is not None:
                self._check_fields()
            if self.headers is not None and self.waste_bytes > MAX_WASTE_BYTES:
                self.refusal = 431
            if self.headers is None or self.refusal == 431:
                self._fail()

        def _feed(self, data: bytes) -> bytes:
            """Feed the parser, and give what it shall be fed next.

            A request that asks for an upgrade is taken as if it did not, for none is offered (RFC 9110, section 7.8).
            """
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                line = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
                fields = [b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"]
                self.parser = httptools.HttpRequestParser(self)
                return b"\r\n".join([line, *fields, b"", data[upgrade.args[0] :]])
            except httptools.HttpParserError:
                self._fail()
            return b""

        def on_url(self, url: bytes) -> None:
            self.url += url
            if len(self.parser.get_method()) + len(self.url) + len("  HTTP/1.1") > limit_request_line:
                self.refusal = 414
            if self.refusal != 400 or not self.url.isascii():
                raise ValueError("request line")

        def on_headers_complete(self) -> None:
            self.waste_bytes = 0
            self._unset_keepalive_if_required()
            hosts = self._check_fields()
            version = self.parser.get_http_version()
            is_http_1 = version in ("1.1", "1.0")
            if self.refusal != 400 or hosts > 1 or not is_http_1 or self.parser.get_method() == b"CONNECT":
                raise ValueError("head")
            if not self.parser.should_upgrade():
                if version == "1.0":
                    self.expect_100_continue = False  # which such a client does not know (RFC 9110, section 10.1.1)
                super().on_headers_complete()
                self.n_requests += 1
                if self.n_requests == max_requests_per_connection:
                    self.cycle.keep_alive = False
                    self.transport.lingers = True
                if self.is_draining:
                    self.drain()
                self.headers = []  # for trailers, which must not pass for headers (RFC 9110, section 6.5.1)

        def drain(self) -> None:
            """Have the answer that is being made be the last, unless it is on its way."""
            if self.cycle is not None and not self.cycle.response_started:
                self.cycle.keep_alive = False

        def end_tls(self, within_s: float) -> None:
            """Close without the client's word that it closes too, which the transport would wait half a minute for."""
            if self.transport.is_closing() or self.cycle is None or self.cycle.response_complete:
                self.transport.close()
                is_sent = self.transport.get_write_buffer_size() == 0
                self.loop.call_later(SETTLE_S if is_sent else within_s, self.transport.abort)

        def _check_fields(self) -> int:
            """Refuse too many fields, or one that is too long, and count those that name a host."""
            hosts = 0
            for name, value in self.headers:
                hosts += name == b"host"
                if len(name) + len(value) + len(": \r\n") > limit_request_field_size:
                    self.refusal = 431
            if len(self.headers) > limit_request_fields:
                self.refusal = 431
            return hosts

        def on_body(self, body: bytes) -> None:
            self.waste_bytes = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self.waste_bytes = 0
            self._stop_body_timer()
            if not self.parser.should_upgrade():
                super().on_message_complete()
                self.headers = None  # until the next request begins

        def _stop_body_timer(self) -> None:
            if self.body_timer is not None:
                self.body_timer.cancel()
                self.body_timer = None

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_body_timer()
            self._unset_keepalive_if_required()  # which uvicorn does only where there was no error
            self.held = b""
            Together.sending.pop(self.transport, None)
            super().connection_lost(exc)

        def _fail(self) -> None:
            self.failed = True
            if not self._cut_short() and (self.cycle is None or self.cycle.response_complete):
                self._refuse()

        def on_response_complete(self) -> None:
            if self.pipeline and self.transport.is_over:
                self.pipeline.clear()
            super().on_response_complete()
            if (self.held or self.failed) and not self.transport.is_over and not self.transport.is_closing():
                self._follow()

        def _follow(self) -> None:
            """Take what came behind a request that is answered now."""
            if self.failed and self.cycle.response_complete:
                self._refuse()  # what follows the requests that were good
            elif not self.is_busy:
                self._queue_up()

        def _refuse(self) -> None:
            self.transport.write(refuse(self.refusal))
            self.transport.lingers = True
            self.transport.close()

        def eof_received(self) -> bool:  # type: ignore[override]
            """Answer a client that has closed its sending side only, as WSGI workers do."""
            self.transport.flush()
            waiting = self.cycle is not None and not self.cycle.response_complete and self.scheme == "http"
            waiting = waiting and not self.transport.is_over
            if waiting and not self.failed:
                self._cut_short()
                self.cycle.keep_alive = False
            return waiting

        def _cut_short(self, error: type[ServingError] = BodyCutShort) -> bool:
            """Tell the app, if it waits for the rest of a body, that there is none."""
            if self.cycle is None or not self.cycle.more_body or self.cycle.response_complete:
                return False
            scope: Any = self.cycle.scope
            scope[CUT_SHORT] = error
            self.cycle.more_body = False
            self.cycle.message_event.set()
            return True

    return Protocol


def cut_requests(data: bytes, start: int) -> tuple[bytes, bytes]:
    """Cut what comes behind the first empty line after `start` bytes, if there is a second one: it may end another
    request."""
    end = data.find(b"\r\n\r\n", start, MAX_PIECE_BYTES) + 4
    if end < 4 or data.find(b"\r\n\r\n", end, MAX_PIECE_BYTES) < 0:
        end = MAX_PIECE_BYTES
    return data[:end], data[end:]


def drop_new_connections(sock: Any) -> None:
    """Have the kernel drop the first packet of each new connection to a listening socket, as if nothing had come.

    A listener that is closed resets the connections that the kernel has queued for it; so first no more may come. The
    program is one of the classic BPF's (linux/filter.h), run on the header of TCP, whose byte 13 has the flags.
    """
    if sock.family == socket.AF_UNIX:
        return
    load_flags, jump_unless_syn, drop, keep = (0x30, 0, 0, 13), (0x45, 0, 1, 2), (6, 0, 0, 0), (6, 0, 0, 0xFFFF)
    code = b"".join(struct.pack("HBBI", *step) for step in (load_flags, jump_unless_syn, drop, keep))
    buffer = ctypes.create_string_buffer(code)
    with contextlib.suppress(OSError):  # where the kernel has none, a few connections may be reset
        program = struct.pack("HL", len(code) // 8, ctypes.addressof(buffer))
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


class Serving(Worker):
    """What both workers share: how the master learns that one is ready, and what one that shall end has to do."""

    fate: mmap.mmap  # shared with the master: whether the service ends, then for each listener whether it is dropped
    alive: bool
    stage = BOOTING

    def notify(self) -> None:
        """Give a sign of life; the first, when the worker listens, tells the master that it is ready."""
        flush_output()
        self.tmp.notify()
        if self.stage == BOOTING:
            self._tell(READY)

    def _tell(self, stage: int) -> None:
        """Tell the master, by the length of the file whose time gives the signs of life."""
        self.stage = stage
        os.truncate(self.tmp.fileno(), stage)
        self.tmp.notify()
        with contextlib.suppress(OSError):  # another user's; it looks each second anyway
            os.kill(self.ppid, signal.SIGCHLD)  # for which the master looks after its workers

    def must_end(self) -> bool:
        """Whether this worker has lost its master, or makes a call that does not end."""
        queue = the_service().queue
        if queue.is_stuck():
            log.critical("prediction_stuck", after_s=queue.stuck_s)
            return True
        return self.is_orphan

    @property
    def is_orphan(self) -> bool:
        return bool(os.getppid() != self.ppid)

    def begin_drain(self) -> tuple[float, float]:
        """Say that this worker ends. Give the time by which it must have, before the master loses its patience, and the
        seconds for which clients may come back."""
        service = the_service()
        service.is_stopping = bool(self.fate[0]) or self.is_orphan
        log.info("draining", service_ends=service.is_stopping)
        if not self.is_orphan:
            self._tell(DRAINING)
        left_s = float(self.cfg.graceful_timeout) - MARGIN_S
        return time.monotonic() + left_s, min(DRAIN_S, left_s / 2)

    def close_listeners(self, servers: Sequence[Any], moment_s: float) -> Iterator[float]:
        """Close the servers of this worker's sockets, and yield the seconds to wait between the steps.

        What the kernel has queued for a dropped listener nobody else will accept, so that is accepted first."""
        dropped = [n for n in range(len(servers)) if self.fate[n + 1]]
        for n, server in enumerate(servers):
            if n not in dropped:
                server.close()
        if dropped:
            yield moment_s
            for n in dropped:
                drop_new_connections(self.sockets[n])
            yield SETTLE_S
            for n in dropped:
                servers[n].close()


def uvicorn_worker() -> type:
    """Give uvicorn's worker with gunicorn's time-outs, which it does not pass on by itself, and a drain at its end.

    The classes stand in here because importing their bases imports uvicorn.
    """
    from uvicorn.server import Server
    from uvicorn_worker import UvicornWorker

    protocol: Any = http_protocol()

    class DrainingServer(Server):
        def __init__(self, worker: Any) -> None:
            super().__init__(worker.config)
            self.worker = worker
            self.connecting: set[asyncio.Task[None]] = set()

        async def startup(self, sockets: Any = None) -> None:
            self.sockets = sockets
            protocol.accept_more = self.accept_more
            await super().startup(sockets)

        def accept_more(self, since: float) -> None:
            """Accept as many as a loop would have that is not busy.

            Uvloop accepts one in each turn, and with a thousand busy connections a turn is long.
            """
            count = min(MAX_ACCEPTS, int((time.monotonic() - since) * ACCEPTS_PER_S))
            for sock in self.sockets:
                with contextlib.suppress(OSError):  # none waits, or the listener is closed
                    for _ in range(count):
                        client, _ = sock.accept()
                        task = asyncio.create_task(self.connect(client))
                        self.connecting.add(task)
                        task.add_done_callback(self.connecting.discard)

        async def connect(self, client: socket.socket) -> None:
            make = functools.partial(protocol, self.config, self.server_state, self.lifespan.state)
            client.setblocking(False)
            with contextlib.suppress(OSError):  # no TLS, or the client has left
                loop = asyncio.get_running_loop()
                await loop.connect_accepted_socket(make, client, ssl=self.config.ssl)

        async def on_tick(self, counter: int) -> bool:
            self.worker.notify()
            return await super().on_tick(counter) or self.worker.must_end()

        async def shutdown(self, sockets: Any = None) -> None:
            """End without a reset: what is under way is answered, with `Connection: close`, and so is what comes on
            open connections for a moment, before those that are idle are closed."""
            end, moment_s = self.worker.begin_drain()
            signs_of_life = asyncio.create_task(self._give_signs_of_life())
            protocol.is_draining = True
            connections: Any = self.server_state.connections
            for connection in connections:
                connection.drain()
            for wait_s in self.worker.close_listeners(self.servers, moment_s):
                await asyncio.sleep(wait_s)
            idle_end = time.monotonic() + moment_s
            is_tls = self.config.is_ssl  # of which uvicorn learns only when the handshake is over
            while (connections or is_tls) and time.monotonic() < min(idle_end, end):  # noqa: ASYNC110 — no event
                await asyncio.sleep(POLL_S)
            for connection in [*connections] if is_tls else ():
                connection.end_tls(end - time.monotonic())
            self.config.timeout_graceful_shutdown = max(POLL_S, end - time.monotonic())
            await super().shutdown()
            signs_of_life.cancel()

        async def _give_signs_of_life(self) -> None:
            while True:
                self.worker.notify()
                await asyncio.sleep(TICK_S)

    class ServingUvicornWorker(Serving, UvicornWorker):
        CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
            "loop": "uvloop",
            "http": protocol,
            "ws": "none",
            "server_header": False,  # nobody's business
            "callback_notify": None,  # more than a second may pass between its calls
        }

        async def _serve(self) -> None:
            self.config.app = self.wsgi
            server = DrainingServer(self)
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGQUIT, server.handle_exit, signal.SIGTERM, None)
            await server.serve(sockets=[listener.sock for listener in self.sockets])
            if not server.started:
                sys.exit(Arbiter.WORKER_BOOT_ERROR)

    return ServingUvicornWorker


def linger(sock: Any) -> None:
    """Close a connection on which the client may still send, but not before it could read the answer."""
    end = time.monotonic() + LINGER_S
    with contextlib.suppress(OSError), contextlib.closing(sock):
        sock.shutdown(socket.SHUT_WR)
        while (left_s := end - time.monotonic()) > 0:
            sock.settimeout(left_s)
            if not sock.recv(MAX_HELD_BYTES):
                break


def gevent_worker() -> type:
    """Give gevent's worker, with `Connection: close` from the app honoured and errors in JSON.

    The class stands in here because importing its base imports gevent.
    """
    import gevent
    from gevent.lock import Semaphore
    from gevent.pool import Pool
    from gevent.server import StreamServer
    from gunicorn.workers.ggevent import GeventWorker

    class TimedBody:
        """The body of a request, which has to come in time."""

        def __init__(self, body: Any) -> None:
            self.body = body
            self.end = time.monotonic() + request_timeout_s

        def read(self, *size: Any) -> Any:
            return self._in_time(self.body.read, *size)

        def readline(self, *size: Any) -> Any:
            return self._in_time(self.body.readline, *size)

        def readlines(self, *hint: Any) -> Any:
            return self._in_time(self.body.readlines, *hint)

        def __iter__(self) -> Iterator[bytes]:
            return iter(self.readline, b"")

        def _in_time(self, read: Callable[..., Any], *size: Any) -> Any:
            with gevent.Timeout(self.end - time.monotonic(), BodyTooSlow):
                return read(*size)

    class Client:
        """The socket of a client: one that takes nothing is cut off, and one that never stops lets others have their
        turn. Where nothing has to be waited for, a greenlet would go on for ever, and not even the worker's signs of
        life would be given.
        """

        gate = Semaphore(1)  # one at a time of those that have sent too early, or all of them would be ready at once

        def __init__(self, sock: Any) -> None:
            self.sock = sock
            self.has_yielded = False  # since it was last read from: between two requests once is enough

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

        def recv(self, *size: int) -> Any:
            if not self.has_yielded:
                gevent.sleep(0)
            self.has_yielded = False
            return self.sock.recv(*size)

        def let_others(self, has_more: bool) -> None:
            """Let others have their turn before the next request."""
            with self.gate if has_more else contextlib.nullcontext():
                gevent.sleep(0)
            self.has_yielded = True

        def sendall(self, data: Any) -> None:
            rest = memoryview(data)
            while rest:
                rest = rest[self.send(rest) :]

        def send(self, data: Any) -> int:
            """Send some of it. Raises `ConnectionResetError` if the client takes nothing, which gunicorn ignores."""
            progress: Progress | None = None
            self.sock.settimeout(LOOK_S)  # of sending only
            try:
                while True:
                    try:
                        return int(self.sock.send(data))
                    except TimeoutError:
                        acknowledged = count_acknowledged(self.sock)
                        taken = -count_unacknowledged(self.sock) if acknowledged is None else acknowledged
                        progress = progress or Progress(taken)
                        if progress.has_ended(taken):
                            raise self._cut_off() from None
            finally:
                self.sock.settimeout(None)

        def _cut_off(self) -> OSError:
            note_cut_off()
            forget_unsent(self.sock)
            return ConnectionResetError(errno.ECONNRESET, "the client took nothing")

    class Listening(StreamServer):
        """A server whose TLS handshakes have their time, and go on after it is closed."""

        def __init__(self, sock: Any, handle: Callable[..., None], **options: Any) -> None:
            super().__init__(sock, handle, **options)
            self.serve = handle

        def wrap_socket_and_handle(self, client: Any, address: Any) -> None:
            try:
                with gevent.Timeout(keepalive, TimeoutError):
                    wrapped = self.wrap_socket(client, **self.ssl_args)
            except OSError:  # no TLS, or none in time
                client.close()
            else:
                self.serve(wrapped, address)

    class ServingGeventWorker(Serving, GeventWorker):
        wsgi: Any
        inner: Any

        def run(self) -> None:
            """Serve until told to end, then drain."""
            self.waiting: set[Any] = set()  # greenlets whose connections have no whole request
            # Where no file more may be open, what comes shall wait to be accepted.
            n_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            self.pool = Pool(min(self.worker_connections, max(1, n_files - OWN_FILES)))
            tls = {"ssl_context": gunicorn.sock.ssl_context(self.cfg)} if self.cfg.is_ssl else {}
            servers = []
            for sock in self.sockets:
                sock.setblocking(1)
                # Its name is asked for each connection, and would not be there once it is closed.
                listener = types.SimpleNamespace(getsockname=itertools.repeat(sock.getsockname()).__next__)
                server = Listening(sock, functools.partial(self.handle, listener), spawn=self.pool, **tls)
                server.max_accept = 1 if self.cfg.workers > 1 else StreamServer.max_accept
                server.start()
                servers.append(server)
            while self.alive and not self.must_end():
                self.notify()
                started = time.monotonic()
                gevent.sleep(TICK_S)
                late_s = time.monotonic() - started - TICK_S
                for server in servers if self.cfg.workers > 1 else ():
                    server.max_accept = 1 + min(MAX_ACCEPTS, int(late_s * ACCEPTS_PER_S))
            self.alive = False
            self.drain(servers)
            if isinstance(self.inner, FastAPIOverWSGI):
                self.inner.stop()

        def drain(self, servers: list[Any]) -> None:
            """End without a reset, as `DrainingServer` does; gunicorn answers `Connection: close` by itself by now."""
            end, moment_s = self.begin_drain()
            for wait_s in self.close_listeners(servers, moment_s):
                gevent.sleep(wait_s)
            self.wait(min(time.monotonic() + moment_s, end))
            for greenlet in [*self.waiting]:
                greenlet.kill(NoMoreData, block=False)
            self.wait(end)
            if self.pool:
                log.error("drain_cut_short", connections=len(self.pool))
                self.pool.kill(timeout=POLL_S)

        def wait(self, end: float) -> None:
            """Wait until no connection is left, or `end` has come."""
            while self.pool and time.monotonic() < end:
                self.notify()
                gevent.sleep(POLL_S)

        @contextlib.contextmanager
        def timeout_ctx(self) -> Iterator[None]:
            greenlet = gevent.getcurrent()
            self.waiting.add(greenlet)
            try:
                with super().timeout_ctx():
                    yield
            finally:
                self.waiting.discard(greenlet)

        def load_wsgi(self) -> None:
            super().load_wsgi()
            self.inner = inner = self.wsgi
            if isinstance(inner, FastAPIOverWSGI):
                inner.start()

            def wsgi(environ: dict[str, Any], start_response: Any) -> Any:
                body = environ["wsgi.input"]

                def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
                    if any(name.lower() == "connection" and value == "close" for name, value in headers):
                        start_response.__self__.force_close()
                        body.failed = True  # gunicorn's mark of one that was not read to its end
                    return start_response(status, headers, exc_info)

                environ["wsgi.input"] = TimedBody(body)
                if "HTTP_TRANSFER_ENCODING" not in environ:
                    environ.pop("wsgi.input_terminated")  # so that werkzeug counts, and sees a body that is cut short
                return inner(environ, start)

            self.wsgi = wsgi

        def handle(self, listener: Any, client: Any, addr: Any) -> None:
            super().handle(listener, Client(client), addr)

        def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
            is_last = req.req_number == max_requests_per_connection
            if is_last:
                req.force_close()
            try:
                result = super().handle_request(listener_name, req, sock, addr)
            except StopIteration:
                if req.body.failed or is_last:
                    linger(sock)
                raise
            sock.let_others(has_more=req.unreader.buf.getbuffer().nbytes > 0)
            return result

        def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
            if isinstance(exc, LimitRequestLine):
                status = 414
            elif isinstance(exc, LimitRequestHeaders):
                status = 431
            elif isinstance(exc, ParseException):
                status = 400
            else:
                status = 500
                log.error("worker_failed", exc_info=exc)
            with contextlib.suppress(OSError):  # it has left, or reads nothing
                client.sendall(refuse(status))
                linger(client)

    return ServingGeventWorker


@dataclass
class Before:
    """What goes on if a reload is refused."""

    service: Service[app.Settings]
    application: dict[str, Any]  # the attributes of gunicorn's application object, its configuration among them
    listeners: list[Any]
    workers: list[int]
    num_workers: int
    fate: mmap.mmap


class Master(Arbiter):
    """Gunicorn's arbiter, with a reload that is a transaction.

    The reload goes on a step with each turn of the arbiter's loop, and waits where it yields, so that the master looks
    after the workers all the while. Gunicorn has no setting for the class of its arbiter, so the object is given it.
    """

    LISTENERS: list[Any]
    fate: mmap.mmap  # of the workers that are forked from now on, which share it: see `Serving`
    retired: dict[int, float]  # workers that shall end, with the time by which they must have
    reloading: Generator[None, None, None] | None = None
    before: Before | None = None  # while workers are replaced
    is_asked = False  # to reload
    loading: Loading | None = None  # the last one
    is_loading = False  # in a thread, beside which nothing is forked as long as it is waited for
    is_stopping = False
    has_served = False
    boot_s: float  # that a worker may take to start, before `server.timeout` counts
    n_failed = 0  # times in a row that a worker did not start
    spawn_after = 0.0

    @classmethod
    def adopt(cls, arbiter: Any) -> None:
        """Make an arbiter one of this class."""
        arbiter.__class__ = cls
        arbiter.fate = mmap.mmap(-1, mmap.PAGESIZE)
        arbiter.retired = {}
        arbiter.is_asked = bool(early_hups)
        arbiter.boot_s = BOOT_S + BOOTS * proving_s

    def handle_hup(self) -> None:
        """Ask for a reload. One that is under way gives way to it, unless it loads: that cannot be stopped."""
        self.is_asked = True

    def _go_on(self) -> None:
        """Take the next step of a reload, and begin one if it is asked for."""
        if self.is_asked and not self.is_loading:
            if self.reloading is not None:
                self.reloading.close()
                log.info("reload_given_up", reason="another HUP came")
            self.is_asked, self.reloading = False, self._reload()
        if self.reloading is None:
            return
        try:
            next(self.reloading)
            return
        except StopIteration:
            log.info("reloaded", **the_service().identity)
        except Exception as error:  # whatever is wrong, what there was goes on
            is_ours = isinstance(error, StartupError)
            reason = str(error) if type(error) is StartupError else f"{type(error).__name__}: {error}"
            log.error("reload_refused", reason=reason, serving=the_service().identity, exc_info=not is_ours)
        self.reloading = None
        gc.collect()  # what is served no more, which refers to itself; nothing of a service is frozen here
        if self.is_asked:
            self.wakeup()

    def _reload(self) -> Generator[None, None, None]:
        """Take new settings and a new model, or raise and leave all as it was."""
        log.info("reload_started")
        if self.loading is not None and not self.loading.has_ended():  # its thread cannot be stopped
            raise StartupError("the model of an earlier reload is still being loaded; send HUP later, or restart")
        deadline = Deadline(the_service().settings.model.load_timeout_s)
        started = time.monotonic()
        identity = yield from try_out(functools.partial(self._rehearse, deadline), "the new model", deadline)
        took_s = time.monotonic() - started
        service = yield from self._load()
        if json.dumps(service.identity) != identity:
            raise StartupError("settings or model were changed while they were loaded; send HUP again")
        self.boot_s = BOOT_S + BOOTS * took_s
        yield from self._replace(service)

    def _rehearse(self, deadline: Deadline) -> str:
        """Do in a child what the master and a worker will do; the child's changes end with it."""
        settings, model = load(deadline)
        service = app.make_service(settings, model)
        app.set_current_service(service)
        self._configure()
        if not self.app.app_uri.startswith("app:"):
            self.app.load()  # a user's module
        return json.dumps(service.identity)

    def _load(self) -> Generator[None, None, Service[app.Settings]]:
        """Load beside the arbiter's loop, which goes on, and have a child prove that what is forked from here answers.

        It is what a start does, so that no reload takes what the next start would refuse.
        """
        deadline = Deadline(the_service().settings.model.load_timeout_s)
        self.is_loading, self.loading = True, Loading(deadline, self.wakeup)
        try:
            loaded: Loaded = yield from wait_for(self.loading, deadline)
        finally:
            self.is_loading = False
        return (yield from prove_in_child(loaded, deadline))

    def _replace(self, service: Service[app.Settings]) -> Generator[None, None, None]:
        """Fork workers of the new service, and retire the old ones once all the new ones are ready.

        No frame that is on the stack while they are forked may refer to the old service: they would for ever.
        """
        state, workers = dict(self.app.__dict__), [*self.WORKERS]
        self.before = Before(the_service(), state, self.LISTENERS, workers, self.num_workers, self.fate)
        self.fate = mmap.mmap(-1, mmap.PAGESIZE)
        del state
        app.set_current_service(service)
        new: list[int] = []
        try:
            self._configure()
            self.LISTENERS = self._listen()
            self.setup(self.app)
            yield from self._start(new)
        except (Exception, GeneratorExit):
            self._restore(self.before, new)
            raise
        else:
            self._leave(self.before)
        finally:
            self.before = None

    def _start(self, new: list[int]) -> Generator[None, None, None]:
        """Fork the new workers, and wait until each has been ready."""
        for _ in range(self.num_workers):
            new.append(self.spawn_worker())
        ready: set[int] = set()
        latest_s = self.boot_s + (self.timeout or MAX_WAIT_S) + BOOT_S
        end = time.monotonic() + latest_s
        while not ready.issuperset(new):
            if time.monotonic() > end:
                raise StartupError(f"a new worker was not ready after {latest_s:.0f} s")
            yield
            ready |= {pid for pid in new if self._stage(pid) != BOOTING}
            if not ready.union(self.WORKERS).issuperset(new):
                raise StartupError("a new worker ended before it was ready; the log says why")

    def _restore(self, before: Before, new: list[int]) -> None:
        """Go back to what was before."""
        opened = [listener for listener in self.LISTENERS if listener not in before.listeners]
        for n, listener in enumerate(self.LISTENERS):
            self.fate[n + 1] = listener in opened
        self.app.__dict__.update(before.application)
        self.LISTENERS, self.fate = before.listeners, before.fate
        app.set_current_service(before.service)
        self.setup(self.app)
        self.num_workers = before.num_workers
        for pid in new:
            self._retire(pid)
        close(opened)

    def _leave(self, before: Before) -> None:
        """Retire what was before."""
        for n, listener in enumerate(before.listeners):
            before.fate[n + 1] = listener not in self.LISTENERS
        for pid in before.workers:
            self._retire(pid)
        close(self._dropped(before), self.LISTENERS)
        self.cfg.on_reload(self)
        announce()

    def _dropped(self, before: Before) -> list[Any]:
        return [listener for listener in before.listeners if listener not in self.LISTENERS]

    def leave_before(self) -> None:
        """Have a worker that was just forked keep nothing of what was before."""
        if self.before is not None:
            for listener in self._dropped(self.before):
                listener.close()
            self.before.service.__dict__.clear()
            self.before = None

    def _configure(self) -> None:
        """Read gunicorn's configuration again, this file among it."""
        try:
            self.app.reload()
        except SystemExit:
            problem = "gunicorn.conf.py or gunicorn's options are refused; the lines before this one say why"
            raise StartupError(problem) from None
        check_options(final_options(self.app.cfg))
        check_app(self.app.app_uri, final_options(self.app.cfg))

    def _listen(self) -> list[Any]:
        """Give a listener for each address of the configuration: those that there are, and new ones."""
        cfg = self.app.cfg
        there = {listener.cfg_addr: listener for listener in self.LISTENERS if has_file(listener.cfg_addr)}
        are_same = cfg.address == self.cfg.address and len(there) == len(self.LISTENERS)
        if are_same or self.systemd or cfg.reuse_port:
            return self.LISTENERS
        listeners: list[Any] = []
        try:
            for address in cfg.address:
                listeners.append(there.get(address) or listen(address, cfg, self.log, self.LISTENERS))
        except (OSError, ValueError) as error:
            close([listener for listener in listeners if listener not in self.LISTENERS])
            where = the_service().settings.place("server", "bind")
            shown = ":".join(map(str, address)) if isinstance(address, tuple) else address
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise SettingsError(f"{where}: cannot listen at {shown!r}: {reason}") from None
        return listeners

    def manage_workers(self) -> None:
        """Go on with a reload; replace workers that ended, retire those that are too many, kill those that linger."""
        flush_output()
        self._go_on()
        self.retired = {pid: end for pid, end in self.retired.items() if pid in self.WORKERS}
        for pid in self.WORKERS.keys() - self.retired.keys():
            if self._stage(pid) == DRAINING:  # of its own accord
                self.retired[pid] = time.monotonic() + self.cfg.graceful_timeout
        for pid, end in self.retired.items():
            if time.monotonic() > end:
                self.kill_worker(pid, signal.SIGKILL)
        if self.before is not None or self.is_loading:
            return
        serving = sorted(self.WORKERS.keys() - self.retired.keys(), key=lambda pid: self.WORKERS[pid].age)
        if len(serving) >= self.num_workers and all(self._stage(pid) == READY for pid in serving):
            self.n_failed, self.has_served = 0, True
        if time.monotonic() >= self.spawn_after:
            self._spawn(self.num_workers - len(serving))
        for pid in serving[: max(0, len(serving) - self.num_workers)]:
            self._retire(pid)

    def spawn_worker(self) -> int:
        """Fork a worker, for which signals wait until it has lost the master's handlers.

        These would queue a signal where nobody reads it, and Python forgets in a child what came before its first step
        (`PyOS_AfterFork_Child`); the service would wait `graceful_timeout` for the worker.
        """
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, Worker.SIGNALS)
        try:
            return int(super().spawn_worker())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _spawn(self, count: int) -> None:
        try:
            for _ in range(count):
                self.spawn_worker()
        except (OSError, RuntimeError) as error:  # no process more, or no file for signs of life
            if not self.has_served and not self.WORKERS:
                raise HaltServer(reason_of(error), STARTUP_STATUS) from error
            self._hold_off(reason_of(error))

    def _hold_off(self, reason: str) -> None:
        """Start workers later, and after each failure later still."""
        self.n_failed += 1
        wait_s = min(2.0**self.n_failed, MAX_WAIT_S)
        self.spawn_after = time.monotonic() + wait_s
        log.error("worker_not_started", reason=reason, retry_in_s=wait_s)

    def _retire(self, pid: int) -> None:
        if pid in self.WORKERS:
            self.retired[pid] = time.monotonic() + self.cfg.graceful_timeout
            self.kill_worker(pid, signal.SIGTERM)

    def _stage(self, pid: int) -> int:
        """Give the stage of a worker by what it has told; those of other classes than ours tell nothing."""
        if not hasattr(self.WORKERS.get(pid), "stage"):
            return READY if pid in self.WORKERS else BOOTING
        with contextlib.suppress(KeyError, ValueError):  # it has ended, and its file is closed
            return os.fstat(self.WORKERS[pid].tmp.fileno()).st_size
        return BOOTING

    def reap_workers(self) -> None:
        """Bury workers that have ended. Once all have served, one that cannot start does not end the service."""
        if Trial.running is not None:
            Trial.running.has_ended()  # or its status would be lost
        booting = [pid for pid in self.WORKERS if self._stage(pid) == BOOTING]
        while True:
            try:
                super().reap_workers()
                break
            except HaltServer:
                if not self.has_served and not self.is_stopping:
                    raise
        failed = [pid for pid in booting if pid not in self.WORKERS and pid not in self.retired]
        if failed and self.before is None and not self.is_stopping:
            self._hold_off(f"{listed(failed)} ended before it was ready")

    def stop(self, graceful: bool = True) -> None:
        """End the workers. They know by their fate that the service ends, and whether anyone else has their listeners:
        the process that this one was replaced by, or is to replace, or one that gave them to it."""
        self.is_stopping = True
        if self.reloading is not None:
            self.reloading.close()
            self.reloading = None
        is_given = self.systemd or any(isinstance(address, int) for address in self.cfg.address)
        are_shared = is_given or self.reexec_pid or self.master_pid
        self.fate[0] = True
        for n, listener in enumerate(self.LISTENERS):
            self.fate[n + 1] = not are_shared
            listener.close() if are_shared else close([listener])
        self.LISTENERS = []
        super().stop(graceful)


def has_file(address: Any) -> bool:
    """Whether the file of a unix socket is there; other addresses have none."""
    return not isinstance(address, str) or os.path.exists(address)


def close(listeners: Iterable[Any], kept: Iterable[Any] = ()) -> None:
    """Close listeners, and remove the files of unix sockets, unless those that are kept have the same."""
    addresses = {listener.cfg_addr for listener in kept}
    for listener in listeners:
        with contextlib.suppress(OSError):  # its file is gone
            close_sockets([listener], unlink=listener.cfg_addr not in addresses)


def listen(address: Any, cfg: Any, logger: Any, others: Iterable[Any]) -> Any:
    """Open a listener. Raises `OSError`, `ValueError`.

    One for all interfaces and one for a single one can have the same port only if both say so while they are bound.
    """
    if isinstance(address, int):
        raise ValueError("a file descriptor is taken over at the start only")
    if not isinstance(address, tuple):
        return UnixSocket(address, cfg, logger)
    kind = TCP6Socket if util.is_ipv6(address[0]) else TCPSocket
    sockets = [socket.socket(kind.FAMILY), *(other.sock for other in others if isinstance(other, TCPSocket))]
    try:
        sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for sock in sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sockets[0].bind(address)
        return kind(address, cfg, logger, fd=os.dup(sockets[0].fileno()))
    finally:
        for sock in sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
        sockets[0].close()


def announce() -> None:
    """Log what is served, and how the cores are shared out: workers times threads is no more of them, unless there are
    more workers."""
    service = the_service()
    named = {"framework": service.settings.framework, "worker_class": service.settings.worker_class}
    log.info("serving", **named, **service.identity)
    budget = {name: getattr(service.settings, name) for name in ("cores", "workers", "threads")}
    log.info("core_budget", **budget)
    service.model.note_python()


def final_options(config: Config) -> dict[str, Any]:
    """Return gunicorn's options as they are in force."""
    return {name: setting.get() for name, setting in config.settings.items()}


def on_starting(server: Any) -> None:
    """Have the arbiter reload as a transaction, and refuse what would make it fork beside threads."""
    try:
        check_options(final_options(server.cfg))
        check_app(server.app.app_uri, final_options(server.cfg))
    except StartupError as error:
        if server.pidfile is not None:
            server.pidfile.unlink()
        refuse_start(error)
    if server.cfg.daemon:
        reopen_output()
    Master.adopt(server)


def when_ready(server: Any) -> None:
    server.is_asked = server.is_asked or bool(early_hups)  # one that came before the arbiter had its own handler
    announce()


def allow_files() -> None:
    """Let this process have as many files open as it may; a soft limit of 1024, the usual one, is as many clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def post_fork(server: Any, worker: Any) -> None:
    """Prepare a worker. A signal that came while it was forked, as `Master.spawn_worker` tells, ends it here."""
    gc.freeze()  # or the collector would write to all that is shared with the master
    worker.fate = server.fate
    server.leave_before()
    allow_files()
    latest = time.monotonic() + server.boot_s
    os.utime(worker.tmp.fileno(), (latest, latest))  # as if it were its last sign of life
    for number in worker.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, worker.SIGNALS)


def worker_exit(server: Any, worker: Any) -> None:
    """End a worker in which a call is still made: Python would wait for its thread."""
    if the_service().queue.called_at is not None:
        finish_output()
        os._exit(0)


def post_worker_init(worker: Any) -> None:
    """Answer the first rows, and spare the garbage collector what the worker has loaded."""
    service = the_service()
    with exit_on_startup_error(), about(service.settings.artifact):
        service.model.warm_up()
    freeze()
    gc.set_threshold(GC_THRESHOLD)


request_timeout_s = settings.limits.request_timeout_s
send_timeout = settings.server.send_timeout
max_requests_per_connection = settings.server.max_requests_per_connection
WORKERS = {"uvicorn": uvicorn_worker, "gevent": gevent_worker}

worker_class = WORKERS[settings.worker_class]()
wsgi_app = APPS[settings.worker_class]
workers = settings.workers
bind = settings.server.bind
backlog = settings.server.backlog
timeout = settings.server.timeout
graceful_timeout = settings.server.graceful_timeout
keepalive = settings.server.keepalive
worker_connections = 10_000  # under gevent, or the idle ones would keep others out
sendfile = False  # or gevent would send a file without our time-out
certfile, keyfile = tls_files(settings)
max_requests = settings.server.max_requests
max_requests_jitter = settings.server.max_requests_jitter
limit_request_line = 8190  # bytes; as long as gunicorn goes, for rows given as a query
limit_request_fields = 100
limit_request_field_size = 8190  # bytes
forwarder_headers = ""  # or a local client's header SCRIPT_NAME would change the path
logger_class = StructuredLogger
control_socket_disable = True  # or gunicorn opens one in the home folder

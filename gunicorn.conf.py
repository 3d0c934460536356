"""The process path: from `settings.toml`, which worker class, how many, and how a worker ends a connection.

Run with `gunicorn -c gunicorn.conf.py`. Settings and predictor are loaded here, in the master, before it listens, so
a mistake in them stops it, and the workers share their memory. Only names that are gunicorn settings reach gunicorn.
"""

import asyncio
import collections
import contextlib
import ctypes
import functools
import gc
import importlib
import itertools
import json
import logging
import mmap
import os
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gunicorn.sock
import structlog
from gunicorn import util
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from gunicorn.glogging import Logger
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, NoMoreData, ParseException
from gunicorn.sock import TCP6Socket, TCPSocket, UnixSocket, close_sockets
from gunicorn.workers.base import Worker

import app

log = structlog.get_logger()

PROVEN, REFUSED = "+", "-"
MAX_SAID_BYTES = 32_768  # half of what a pipe holds, so that nobody need read while it is written
PR_SET_PDEATHSIG = 1  # prctl(2): the signal to get when the parent ends


def end_with_parent(number: int) -> None:
    """Have the kernel send a signal to this process when its parent ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


class Trial:
    """A call made in a child process: its crash, its memory and its threads, which workers that are forked later would
    lack and wait for (gunicorn's issue 1891), are not this one's. `call` gives a text or raises `StartupError`;
    `what` is tried.
    """

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
                signal.signal(number, signal.SIG_DFL)
            end_with_parent(signal.SIGKILL)
            said = PROVEN + call()
        except app.StartupError as error:
            said = f"{REFUSED}{type(error).__name__}: {error}"
        except Exception as error:  # of a user's module, or of what an artifact holds
            log.exception("trial_failed")
            said = f"{REFUSED}StartupError: {app.reason_of(error)}"
        finally:
            os.write(writing, said.encode()[:MAX_SAID_BYTES])
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
            raise getattr(app, kind)(text)
        status = os.waitstatus_to_exitcode(self._status or 0)
        raise app.ModelError(f"{self.what} ended the process that tried it, with status {status}")

    def stop(self) -> None:
        """End the child, if it has not ended."""
        if not self.has_ended():
            os.kill(self.pid, signal.SIGKILL)
            self._has_ended(0)
        self._pipe.close()


def check_tls(loaded: app.Settings) -> None:
    """Raise `SettingsError` unless certificate and key, if there are any, can be read and belong together."""
    certificate, key = tls_files(loaded)
    try:
        if certificate:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:  # of which ssl.SSLError is one
        place = loaded.place("server", "certfile")
        raise app.SettingsError(f"{place} is {certificate!r}, which cannot be used: {app.reason_of(error)}") from None
    if key and not certificate:
        raise app.SettingsError(f"{loaded.place('server', 'keyfile')} needs server.certfile beside it")


def tls_files(loaded: app.Settings) -> list[str | None]:
    """Give the paths of certificate and key, or None."""
    return [str(loaded.folder / name) if name else None for name in (loaded.server.certfile, loaded.server.keyfile)]


def load() -> app.Service:
    """Load what the settings say, for workers to be forked. Raises `StartupError`."""
    loaded = app.load_settings()
    if not app.IN_USE:
        app.configure_logging(loaded.logging)
    check_tls(loaded)
    service = app.make_service(loaded)
    ours = (threading.main_thread(), threading.current_thread())
    if others := [thread.name for thread in threading.enumerate() if thread not in ours]:
        with app.about_artifact(service.settings):
            raise app.ModelError(f"starts threads when it is loaded, which forked workers lack: {app.listed(others)}")
    importlib.import_module(service.settings.framework)  # once for all workers
    return service


def prove(service: app.Service) -> str:
    """Have a service answer its golden rows, and give what identifies it. Raises `StartupError`."""
    service.prove()
    return json.dumps(service.identity)


def freeze() -> None:
    """Keep the garbage collector from what is loaded, or it would write to all that workers share with the master."""
    gc.collect()
    gc.freeze()


early_hups: list[int] = []
if not app.IN_USE:  # else a reload runs this file again, with a service that is proven
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # which would end this process
        signal.signal(signal.SIGHUP, lambda number, _: early_hups.append(number))
    with app.exit_on_startup_error():
        loaded = load()
        Trial(functools.partial(prove, loaded), app.name_artifact(loaded.settings)).result()
        app.use(loaded)
        del loaded
    freeze()
settings = app.load_service().settings


class StructuredLogger(Logger):
    """Gunicorn's logger without its handlers: `app.configure_logging` has put ours in their place."""

    def setup(self, cfg: Any) -> None:
        self.cfg = cfg
        self.loglevel = logging.root.level
        self._access_log_enabled = False


def refuse(status: int) -> bytes:
    """Give the whole answer to bytes that are no HTTP request we take, in the shape of every other error."""
    details = {
        400: "not a valid HTTP/1.1 request",
        414: f"the request line is too long; send at most {limit_request_line} bytes",
        431: f"the header is too large; send at most {limit_request_fields} fields of {limit_request_field_size} bytes",
        500: "internal error",
    }
    request_id = app.make_request_id()
    log.warning("request_refused", status=status, request_id=request_id)
    response = app.Response.of({"detail": details[status]}, status, {"Connection": "close"})
    response.request_id = request_id
    head = [f"HTTP/1.1 {response.status_line}", *map(": ".join, response.headers)]
    return "\r\n".join([*head, "", ""]).encode() + b"".join(response.pieces)


class Together:
    """A transport that sends what is written in one turn of the loop in one piece.

    uvicorn writes a head and then a body, each of which would be a packet and a system call: a fifth of the time that
    a small answer takes.
    """

    pending: ClassVar[collections.deque["Together"]] = collections.deque()  # those of this turn

    def __init__(self, transport: Any, loop: Any) -> None:
        self.transport = transport
        self.is_closing = transport.is_closing  # which is asked for each answer
        self.loop = loop
        self.written: list[bytes] = []

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
        self.flush()
        self.transport.close()

    def flush_pending(self) -> None:
        try:
            while self.pending:
                self.pending.popleft().flush()
        finally:
            if self.pending:  # one transport's failure is not the others'
                self.loop.call_soon(self.flush_pending)

    def flush(self) -> None:
        if self.written and not self.transport.is_closing():
            self.transport.writelines(self.written)
        self.written = []


def http_protocol() -> type:
    """Give uvicorn's protocol with gunicorn's limits, and an answer for every client that can still read one.

    The class stands in here because importing its base imports uvicorn.
    """
    import httptools
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Protocol(HttpToolsProtocol):
        is_draining = False  # which all connections share
        refusal = 400
        waste_bytes = 0  # received since the last head or piece of a body was whole
        failed = False
        body_timer: Any = None  # until the body that is being received must be whole

        def connection_made(self, transport: Any) -> None:
            super().connection_made(cast(Any, Together(transport, self.loop)))
            self.timeout_keep_alive_task = self.loop.call_later(keepalive, self.timeout_keep_alive_handler)

        def data_received(self, data: bytes) -> None:
            self.waste_bytes += len(data)
            while data and not self.failed:
                data = self._feed(data)
            if self.body_timer is None and self.cycle is not None and self.cycle.more_body:
                self.body_timer = self.loop.call_later(request_timeout_s, self._cut_short, app.BodyTooSlow)
            if self.waste_bytes > limit_request_field_size and not self.failed:
                self._check_fields()
                if self.waste_bytes > MAX_WASTE_BYTES:
                    self.refusal = 431
                if self.refusal == 431:
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
            is_http_1 = self.parser.get_http_version() in ("1.1", "1.0")
            if self.refusal != 400 or hosts > 1 or not is_http_1 or self.parser.get_method() == b"CONNECT":
                raise ValueError("head")
            if not self.parser.should_upgrade():
                super().on_headers_complete()
                if self.is_draining:
                    self.drain()
                self.headers = []  # for trailers, which must not pass for headers (RFC 9110, section 6.5.1)

        def drain(self) -> None:
            """Have the answer that is being made be the last, unless it is on its way."""
            if self.cycle is not None and not self.cycle.response_started:
                self.cycle.keep_alive = False

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

        def _stop_body_timer(self) -> None:
            if self.body_timer is not None:
                self.body_timer.cancel()
                self.body_timer = None

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_body_timer()
            super().connection_lost(exc)

        def _fail(self) -> None:
            self.failed = True
            if not self._cut_short() and (self.cycle is None or self.cycle.response_complete):
                self._refuse()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.failed and self.cycle.response_complete and not self.transport.is_closing():
                self._refuse()  # what follows the requests that were good

        def _refuse(self) -> None:
            self.transport.write(refuse(self.refusal))
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.loop.call_later(app.LINGER_S, self.transport.close)

        def eof_received(self) -> bool:  # type: ignore[override]
            """Answer a client that has closed its sending side only, as WSGI workers do."""
            self.transport.flush()  # type: ignore[attr-defined]
            waiting = self.cycle is not None and not self.cycle.response_complete and self.scheme == "http"
            if waiting and not self.failed:
                self._cut_short()
                self.cycle.keep_alive = False
            return waiting

        def _cut_short(self, error: type[app.ServingError] = app.BodyCutShort) -> bool:
            """Tell the app, if it waits for the rest of a body, that there is none."""
            if self.cycle is None or not self.cycle.more_body or self.cycle.response_complete:
                return False
            scope: Any = self.cycle.scope
            scope[app.CUT_SHORT] = error
            self.cycle.more_body = False
            self.cycle.message_event.set()
            return True

    return Protocol


def refuse_new(sock: Any) -> None:
    """Have the kernel drop the first packet of each new connection to a listening socket, as if nothing had come.

    A listener that is closed resets the connections that the kernel has queued for it; so first no more may come. The
    program is one of the classic BPF's (linux/filter.h), run on the header of TCP, whose byte 13 has the flags.
    """
    load_flags, jump_unless_syn, drop, keep = (0x30, 0, 0, 13), (0x45, 0, 1, 2), (6, 0, 0, 0), (6, 0, 0, 0xFFFF)
    code = b"".join(struct.pack("HBBI", *step) for step in (load_flags, jump_unless_syn, drop, keep))
    buffer = ctypes.create_string_buffer(code)
    if sock.family == socket.AF_UNIX:
        return
    with contextlib.suppress(OSError):  # where the kernel has none, a few connections may be reset
        program = struct.pack("HL", len(code) // 8, ctypes.addressof(buffer))
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


BOOTING, READY, DRAINING = 0, 1, 2  # stages of a worker


class Serving(Worker):
    """What both workers share: how the master learns that one is ready, and what one that shall end has to do."""

    fate: mmap.mmap  # shared with the master: whether the service ends, then for each listener whether it is dropped
    alive: bool
    stage = BOOTING

    def notify(self) -> None:
        """Give a sign of life; the first, when the worker listens, tells the master that it is ready."""
        self.tmp.notify()
        if self.stage == BOOTING:
            self._tell(READY)

    def _tell(self, stage: int) -> None:
        """Tell the master, by the length of the file whose time gives the signs of life."""
        self.stage = stage
        os.truncate(self.tmp.fileno(), stage)
        self.tmp.notify()
        os.kill(self.ppid, signal.SIGCHLD)  # for which the master looks after its workers

    def is_stuck(self) -> bool:
        """Whether this worker makes a call that does not end, and so shall end itself."""
        if not app.load_service().batching.is_stuck():
            return False
        log.critical("prediction_stuck", after_s=app.STUCK * request_timeout_s)
        return True

    @property
    def is_orphan(self) -> bool:
        return bool(os.getppid() != self.ppid)

    def begin_drain(self) -> tuple[float, list[int]]:
        """Say that this worker ends. Give the time by which it must have, before the master loses its patience, and
        which of its listeners nobody else has: what the kernel has queued for them is to be accepted."""
        app.Service.is_ending = bool(self.fate[0]) or self.is_orphan
        log.info("draining", service_ends=app.Service.is_ending)
        if not self.is_orphan:
            self._tell(DRAINING)
        alone = [n for n in range(len(self.sockets)) if app.Service.is_ending or self.fate[n + 1]]
        return time.monotonic() + float(self.cfg.graceful_timeout) - MARGIN_S, alone


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

        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or self.worker.is_stuck()

        async def shutdown(self, sockets: Any = None) -> None:
            """End without a reset: what is under way is answered, with `Connection: close`, and so is what comes on
            open connections for a moment, before those that are idle are closed."""
            end, alone = self.worker.begin_drain()
            signs_of_life = asyncio.create_task(self._give_signs_of_life())
            protocol.is_draining = True
            connections: Any = self.server_state.connections
            for connection in connections:
                connection.drain()
            for n, server in enumerate(self.servers):
                if n not in alone:
                    server.close()
            if alone:
                await asyncio.sleep(DRAIN_S)
                for n in alone:
                    refuse_new(sockets[n])
                await asyncio.sleep(SETTLE_S)
                for n in alone:
                    self.servers[n].close()
            idle_end = time.monotonic() + DRAIN_S
            while connections and time.monotonic() < min(idle_end, end):  # noqa: ASYNC110 — no event
                await asyncio.sleep(POLL_S)
            self.config.timeout_graceful_shutdown = max(POLL_S, end - time.monotonic())
            await super().shutdown()
            signs_of_life.cancel()

        async def _give_signs_of_life(self) -> None:
            while True:
                self.worker.notify()
                await asyncio.sleep(1)

    class ServingUvicornWorker(Serving, UvicornWorker):
        CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
            "loop": "uvloop",
            "http": protocol,
            "ws": "none",
            "server_header": False,  # nobody's business
        }

        async def _serve(self) -> None:
            self.config.app = self.wsgi
            server = DrainingServer(self)
            self._install_sigquit_handler()
            await server.serve(sockets=[listener.sock for listener in self.sockets])
            if not server.started:
                sys.exit(Arbiter.WORKER_BOOT_ERROR)

    return ServingUvicornWorker


def linger(sock: Any) -> None:
    """Close a connection on which the client may still send, but not before it could read the answer."""
    util.close_graceful(sock, timeout=app.LINGER_S, max_drain=sys.maxsize)


def gevent_worker() -> type:
    """Give gevent's worker, with `Connection: close` from the app honoured and errors in JSON.

    The class stands in here because importing its base imports gevent.
    """
    import gevent
    from gevent.pool import Pool
    from gevent.server import StreamServer
    from gunicorn.workers.ggevent import GeventWorker

    class TimedBody:
        """The body of a request, which has to come in time."""

        def __init__(self, body: Any) -> None:
            self.body = body
            self.end = time.monotonic() + request_timeout_s

        def __getattr__(self, name: str) -> Any:
            return getattr(self.body, name)

        def read(self, size: int | None = None) -> bytes:
            with gevent.Timeout(self.end - time.monotonic(), app.BodyTooSlow):
                return cast(bytes, self.body.read(size))

    class ServingGeventWorker(Serving, GeventWorker):
        wsgi: Any
        inner: Any

        def run(self) -> None:
            """Serve until told to end, then drain."""
            self.waiting: set[Any] = set()  # greenlets whose connections have no whole request
            self.pool = Pool(self.worker_connections)
            tls = {"ssl_context": gunicorn.sock.ssl_context(self.cfg)} if self.cfg.is_ssl else {}
            servers = []
            for sock in self.sockets:
                sock.setblocking(1)
                # Its name is asked for each connection, and would not be there once it is closed.
                listener = types.SimpleNamespace(getsockname=itertools.repeat(sock.getsockname()).__next__)
                server = StreamServer(sock, handle=functools.partial(self.handle, listener), spawn=self.pool, **tls)
                server.max_accept = 1 if self.cfg.workers > 1 else StreamServer.max_accept
                server.start()
                servers.append(server)
            while self.alive and not self.is_stuck():
                self.notify()
                gevent.sleep(TICK_S)
            self.alive = False
            self.drain(servers)
            if isinstance(self.inner, app.FastAPIOverWSGI):
                self.inner.stop()

        def drain(self, servers: list[Any]) -> None:
            """End without a reset, as `DrainingServer` does; gunicorn answers `Connection: close` by itself by now."""
            end, alone = self.begin_drain()
            for n, server in enumerate(servers):
                if n not in alone:
                    server.close()
            if alone:
                gevent.sleep(DRAIN_S)
                for n in alone:
                    refuse_new(servers[n].socket)
                gevent.sleep(SETTLE_S)
                for n in alone:
                    servers[n].close()
            self.wait(min(time.monotonic() + DRAIN_S, end))
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
            if isinstance(inner, app.FastAPIOverWSGI):
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

        def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
            try:
                return super().handle_request(listener_name, req, sock, addr)
            except StopIteration:
                if req.body.failed:
                    linger(sock)
                raise

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
            util.write_nonblock(client, refuse(status))
            linger(client)

    return ServingGeventWorker


class Master(Arbiter):
    """Gunicorn's arbiter, with a reload that is a transaction.

    The reload goes on a step with each turn of the arbiter's loop, and waits where it yields, so that the master looks
    after the workers all the while. Gunicorn has no setting for the class of its arbiter, so the object is given it.
    """

    LISTENERS: list[Any]
    fate: mmap.mmap  # of the workers that are forked from now on, which share it: see `Serving`
    dropped: Sequence[Any] = ()  # listeners of old workers that new ones shall not have
    retired: dict[int, float]  # workers that shall end, with the time by which they must have
    reloading: Generator[None, None, None] | None = None
    is_asked = False  # to reload
    is_loading = False  # in a thread, beside which nothing may be forked
    is_replacing = False
    n_failed = 0  # workers in a row that ended before they were ready
    spawn_after = 0.0

    @classmethod
    def adopt(cls, arbiter: Any) -> None:
        """Make an arbiter one of this class."""
        arbiter.__class__ = cls
        arbiter.fate = mmap.mmap(-1, mmap.PAGESIZE)
        arbiter.retired = {}
        arbiter.is_asked = bool(early_hups)

    def handle_hup(self) -> None:
        """Ask for a reload. One that is under way gives way to it."""
        self.is_asked = True

    def _go_on(self) -> None:
        """Take the next step of a reload, and begin one if it is asked for."""
        try:
            if self.is_asked and self.reloading is not None and not self.is_loading:
                self.reloading.close()
                self.reloading = None
                log.info("reload_given_up", reason="another HUP came")
            if self.is_asked and self.reloading is None:
                self.is_asked = False
                self.reloading = self._reload()
            if self.reloading is not None:
                next(self.reloading)
        except StopIteration:
            self.reloading = None
        except (app.StartupError, OSError) as error:
            self.reloading = None
            kind = type(error).__name__
            reason = str(error) if kind == "StartupError" else f"{kind}: {error}"
            log.error("reload_refused", reason=reason, serving=app.load_service().identity)
        if self.is_asked and self.reloading is None:
            self.wakeup()

    def _reload(self) -> Generator[None, None, None]:
        """Take new settings and a new model, or raise `StartupError` and leave all as it was."""
        log.info("reload_started")
        identity = yield from self._try()
        service = yield from self._load()
        if json.dumps(service.identity) != identity:
            raise app.StartupError("settings or model were changed while they were loaded; send HUP again")
        yield from self._replace(service)
        log.info("reloaded", **service.identity)
        del service
        gc.unfreeze()  # or what the old service has in cycles would stay for ever
        freeze()

    def _try(self) -> Generator[None, None, str]:
        trial = Trial(self._rehearse, "the new model")
        try:
            while not trial.has_ended():
                yield
            return trial.result()
        finally:
            trial.stop()

    def _rehearse(self) -> str:
        """Do in a child what the master and a worker will do; the child's changes end with it."""
        service = load()
        identity = prove(service)
        app.use(service)
        self._configure()
        if not self.app.app_uri.startswith("app:"):
            self.app.load()  # a user's module
        return identity

    def _load(self) -> Generator[None, None, app.Service]:
        """Load beside the arbiter's loop, which goes on."""
        results: list[app.Service | BaseException] = []

        def run() -> None:
            try:
                results.append(load())
            except BaseException as error:  # what an artifact raises has no bounds
                results.append(error)
            self.wakeup()

        self.is_loading = True
        thread = threading.Thread(target=run, name="load", daemon=True)
        thread.start()
        while not results:
            yield
        thread.join()
        self.is_loading = False
        (result,) = results
        if isinstance(result, app.StartupError):
            raise result
        if isinstance(result, BaseException):
            raise app.StartupError(app.reason_of(result))
        return result

    def _replace(self, service: app.Service) -> Iterator[None]:
        """Fork workers of the new service, and retire the old ones once all the new ones are ready."""
        old_service, old_app, old = app.load_service(), dict(self.app.__dict__), [*self.WORKERS]
        old_listeners, old_fate = self.LISTENERS, self.fate
        new: list[int] = []
        self.is_replacing, self.fate = True, mmap.mmap(-1, mmap.PAGESIZE)
        app.use(service)
        try:
            self._configure()
            self.LISTENERS = self._listen()
            self.dropped = [listener for listener in old_listeners if listener not in self.LISTENERS]
            self.setup(self.app)
            freeze()
            new += [self.spawn_worker() for _ in range(self.num_workers)]
            while not self._are_ready(new):
                yield
                if not self.WORKERS.keys() >= set(new):
                    raise app.StartupError("a new worker ended before it was ready; the log says why")
        except (app.StartupError, OSError, GeneratorExit):
            close_sockets([listener for listener in self.LISTENERS if listener not in old_listeners])
            self.app.__dict__.update(old_app)
            self.LISTENERS, self.fate = old_listeners, old_fate
            app.use(old_service)
            self.setup(self.app)
            for pid in new:
                self._retire(pid)
            raise
        else:
            for n, listener in enumerate(old_listeners):
                old_fate[n + 1] = listener in self.dropped
            close_sockets(self.dropped)
        finally:
            self.is_replacing, self.dropped = False, ()
        for pid in old:
            self._retire(pid)
        self.cfg.on_reload(self)
        announce()

    def _configure(self) -> None:
        """Read gunicorn's configuration again, this file among it."""
        try:
            self.app.reload()
        except SystemExit:
            problem = "gunicorn.conf.py or gunicorn's options are refused; the lines before this one say why"
            raise app.StartupError(problem) from None

    def _listen(self) -> list[Any]:
        """Give a listener for each address of the configuration: those that there are, and new ones."""
        cfg = self.app.cfg
        if cfg.address == self.cfg.address or self.systemd or cfg.reuse_port:
            return self.LISTENERS
        there = {listener.cfg_addr: listener for listener in self.LISTENERS}
        listeners: list[Any] = []
        try:
            for address in cfg.address:
                listeners.append(there.get(address) or listen(address, cfg, self.log, self.LISTENERS))
        except (OSError, ValueError) as error:
            close_sockets([listener for listener in listeners if listener not in self.LISTENERS])
            where = app.load_service().settings.place("server", "bind")
            shown = ":".join(map(str, address)) if isinstance(address, tuple) else address
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise app.SettingsError(f"{where}: cannot listen at {shown!r}: {reason}") from None
        return listeners

    def manage_workers(self) -> None:
        """Go on with a reload; replace workers that ended, retire those that are too many, kill those that linger."""
        self._go_on()
        self.retired = {pid: end for pid, end in self.retired.items() if pid in self.WORKERS}
        for pid in self.WORKERS.keys() - self.retired.keys():
            if self._stage(pid) == DRAINING:  # of its own accord
                self.retired[pid] = time.monotonic() + self.cfg.graceful_timeout
        for pid, end in self.retired.items():
            if time.monotonic() > end:
                self.kill_worker(pid, signal.SIGKILL)
        serving = sorted(self.WORKERS.keys() - self.retired.keys(), key=lambda pid: self.WORKERS[pid].age)
        if self.is_replacing or self.is_loading:
            return
        if len(serving) >= self.num_workers and self._are_ready(serving):
            self.n_failed = 0
        if time.monotonic() >= self.spawn_after:
            for _ in range(self.num_workers - len(serving)):
                self.spawn_worker()
        for pid in serving[: max(0, len(serving) - self.num_workers)]:
            self._retire(pid)

    def _retire(self, pid: int) -> None:
        if pid in self.WORKERS:
            self.retired[pid] = time.monotonic() + self.cfg.graceful_timeout
            self.kill_worker(pid, signal.SIGTERM)

    def _stage(self, pid: int) -> int:
        """Give the stage of a worker by what it has told."""
        with contextlib.suppress(KeyError, ValueError):  # it has ended, and its file is closed
            return os.fstat(self.WORKERS[pid].tmp.fileno()).st_size
        return BOOTING

    def _are_ready(self, pids: Iterable[int]) -> bool:
        return all(self._stage(pid) == READY for pid in pids)

    def reap_workers(self) -> None:
        """Bury workers that have ended. While others serve, one that cannot start does not end the service, and is
        started anew later and later."""
        booting = [pid for pid in self.WORKERS if self._stage(pid) == BOOTING]
        try:
            super().reap_workers()
        except HaltServer:
            if not any(self._stage(pid) == READY for pid in self.WORKERS):
                raise
        failed = [pid for pid in booting if pid not in self.WORKERS]
        if failed and not self.is_replacing:
            self.n_failed += 1
            wait_s = min(2.0**self.n_failed, MAX_WAIT_S)
            self.spawn_after = time.monotonic() + wait_s
            log.error("worker_not_started", pids=failed, retry_in_s=wait_s)

    def stop(self, graceful: bool = True) -> None:
        """End the workers, which know by it that the service ends."""
        if self.reloading is not None:
            self.reloading.close()
        self.fate[0] = True
        super().stop(graceful)


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
    service = app.load_service()
    named = {"framework": service.settings.framework, "worker_class": service.settings.worker_class}
    log.info("serving", **named, **service.identity)
    budget = {name: getattr(service.settings, name) for name in ("cores", "workers", "threads")}
    log.info("core_budget", **budget)


def on_starting(server: Any) -> None:
    """Have the arbiter reload as a transaction, and refuse what would make it fork beside threads."""
    if server.cfg.preload_app:
        reason = "it would predict in the master; leave it out: workers share the model anyway"
        log.critical("preload_refused", reason=reason)
        sys.exit(app.STARTUP_STATUS)
    Master.adopt(server)


def when_ready(server: Any) -> None:
    announce()


def post_fork(server: Any, worker: Any) -> None:
    """End a worker that is told to stop while it boots.

    Until it has handlers of its own, those of the master queue the signal in a copy of the queue that nobody reads,
    and the service would wait `graceful_timeout` for the worker.
    """
    worker.fate = server.fate
    for listener in server.dropped:
        listener.close()
    for number in worker.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    while not server.SIG_QUEUE.empty():
        if server.SIG_QUEUE.get_nowait() in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            sys.exit(0)


def worker_exit(server: Any, worker: Any) -> None:
    """End a worker in which a call is still made: Python would wait for its thread."""
    if app.load_service().batching.called_at is not None:
        sys.stderr.flush()
        os._exit(0)


def post_worker_init(worker: Any) -> None:
    """Tie a worker to its master, and spare the garbage collector what was loaded, which it would go through again and
    again and find in use."""
    end_with_parent(signal.SIGTERM)  # which a change of user would undo, so not before it
    if worker.is_orphan:
        sys.exit(0)
    freeze()
    gc.set_threshold(GC_THRESHOLD)


request_timeout_s = settings.limits.request_timeout_s
DRAIN_S = 1.0  # for which connections stay open after the order to end: clients in use come back sooner
SETTLE_S = 0.1  # in which a connection that was begun comes to be accepted
MARGIN_S = 0.5  # before the master kills what has not ended
POLL_S = 0.05
TICK_S = 0.1
MAX_WAIT_S = 30.0
SO_ATTACH_FILTER = 26  # asm-generic/socket.h
MAX_HELD_BYTES = 16_384
GC_THRESHOLD = 10_000  # new objects: more than requests in flight have, so that these are not searched for garbage
MAX_WASTE_BYTES = 1_048_576  # more than a request line and 100 fields come to
WORKERS = {
    "uvicorn": (uvicorn_worker, "app:asgi"),
    "gevent": (gevent_worker, "app:wsgi"),
}

make_worker, wsgi_app = WORKERS[settings.worker_class]
worker_class = make_worker()
workers = settings.workers
bind = settings.server.bind
backlog = settings.server.backlog
timeout = settings.server.timeout
graceful_timeout = settings.server.graceful_timeout
keepalive = settings.server.keepalive
certfile, keyfile = tls_files(settings)
max_requests = settings.server.max_requests
max_requests_jitter = settings.server.max_requests_jitter
limit_request_line = 8190  # bytes; as long as gunicorn goes, for rows given as a query
limit_request_fields = 100
limit_request_field_size = 8190  # bytes
forwarder_headers = ""  # or a local client's header SCRIPT_NAME would change the path
logger_class = StructuredLogger
control_socket_disable = True  # or gunicorn opens one in the home folder

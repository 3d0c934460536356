"""The process path: from `settings.toml`, which worker class, how many, and how a worker ends a connection.

Run with `gunicorn -c gunicorn.conf.py`. Settings and predictor are loaded here, in the master, before it listens, so
a mistake in them stops it, and the workers share their memory. Only names that are gunicorn settings reach gunicorn.
"""

import collections
import ctypes
import gc
import importlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, ClassVar, cast

sys.path.insert(0, str(Path(__file__).resolve().parent))

import structlog
from gunicorn import util
from gunicorn.glogging import Logger
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, ParseException

import app

log = structlog.get_logger()

PROVEN, REFUSED = b"+", b"-"
PR_SET_PDEATHSIG = 1  # prctl(2): the signal to get when the parent ends


def prove(service: app.Service) -> None:
    """Have a child process answer the golden rows: what predicts here may start threads, which workers that are forked
    later would lack, and wait for (gunicorn's issue 1891).

    What the child says counts, not its status, for a predict may end it with any.
    """
    reading, writing = os.pipe()
    os.set_blocking(reading, False)  # whatever the child started may hold the other end
    child = os.fork()
    if child == 0:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            with app.exit_on_startup_error():
                service.prove()
            os.write(writing, PROVEN)
        except SystemExit:
            os.write(writing, REFUSED)
        finally:
            os._exit(app.STARTUP_STATUS)  # and wait for no thread
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    if said == REFUSED:
        sys.exit(app.STARTUP_STATUS)
    if said != PROVEN:
        with app.about_artifact(service.settings):
            raise app.ModelError(f"ended the process that tried it, with status {os.waitstatus_to_exitcode(status)}")


app.load_service.cache_clear()  # gunicorn runs this file again on HUP
with app.exit_on_startup_error():
    settings = app.load_service().settings
    prove(app.load_service())
importlib.import_module(settings.framework)  # once for all workers
gc.collect()
gc.freeze()  # or the collector of a worker would write to all that it shares with the master, and so get its own


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
        refusal = 400
        waste_bytes = 0  # received since the last head or piece of a body was whole
        failed = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(cast(Any, Together(transport, self.loop)))
            self.timeout_keep_alive_task = self.loop.call_later(keepalive, self.timeout_keep_alive_handler)

        def data_received(self, data: bytes) -> None:
            self.waste_bytes += len(data)
            while data and not self.failed:
                data = self._feed(data)
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
                self.headers = []  # for trailers, which must not pass for headers (RFC 9110, section 6.5.1)

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
            if not self.parser.should_upgrade():
                super().on_message_complete()

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

        def _cut_short(self) -> bool:
            """Tell the app, if it waits for the rest of a body, that there is none."""
            if self.cycle is None or not self.cycle.more_body or self.cycle.response_complete:
                return False
            scope: Any = self.cycle.scope
            scope[app.CUT_SHORT] = True
            self.cycle.more_body = False
            self.cycle.message_event.set()
            return True

    return Protocol


def uvicorn_worker() -> type:
    """Give uvicorn's worker with gunicorn's time-outs, which it does not pass on by itself."""
    from uvicorn_worker import UvicornWorker

    class ServingUvicornWorker(UvicornWorker):
        CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
            "loop": "uvloop",
            "http": http_protocol(),
            "ws": "none",
            "server_header": False,  # nobody's business
            "timeout_graceful_shutdown": settings.server.graceful_timeout,
        }

    return ServingUvicornWorker


def linger(sock: Any) -> None:
    """Close a connection on which the client may still send, but not before it could read the answer."""
    util.close_graceful(sock, timeout=app.LINGER_S, max_drain=sys.maxsize)


def gevent_worker() -> type:
    """Give gevent's worker, with `Connection: close` from the app honoured and errors in JSON.

    The class stands in here because importing its base imports gevent.
    """
    from gunicorn.workers.ggevent import GeventWorker

    class ServingGeventWorker(GeventWorker):
        wsgi: Any
        inner: Any

        def run(self) -> None:
            super().run()
            if isinstance(self.inner, app.FastAPIOverWSGI):
                self.inner.stop()

        def load_wsgi(self) -> None:
            super().load_wsgi()
            self.inner = inner = self.wsgi
            if isinstance(inner, app.FastAPIOverWSGI):
                inner.start()

            def wsgi(environ: dict[str, Any], start_response: Any) -> Any:
                def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
                    if any(name.lower() == "connection" and value == "close" for name, value in headers):
                        start_response.__self__.force_close()
                        environ["wsgi.input"].failed = True  # gunicorn's mark of a body that was not read to its end
                    return start_response(status, headers, exc_info)

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


def post_fork(server: Any, worker: Any) -> None:
    """End a worker that is told to stop while it boots.

    Until it has handlers of its own, those of the master queue the signal in a copy of the queue that nobody reads,
    and the service would wait `graceful_timeout` for the worker.
    """
    for number in worker.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    while not server.SIG_QUEUE.empty():
        if server.SIG_QUEUE.get_nowait() in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            sys.exit(0)


def when_ready(server: Any) -> None:
    """Say how the cores are shared out: workers times threads is no more of them, unless there are more workers."""
    log.info("core_budget", cores=settings.cores, workers=settings.workers, threads=settings.threads)


def post_worker_init(worker: Any) -> None:
    """Spare the garbage collector what was loaded, which it would go through again and again and find in use."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


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
max_requests = settings.server.max_requests
max_requests_jitter = settings.server.max_requests_jitter
limit_request_line = 8190  # bytes; as long as gunicorn goes, for rows given as a query
limit_request_fields = 100
limit_request_field_size = 8190  # bytes
forwarder_headers = ""  # or a local client's header SCRIPT_NAME would change the path
logger_class = StructuredLogger
control_socket_disable = True  # or gunicorn opens one in the home folder

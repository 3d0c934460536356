"""gevent's worker, with `Connection: close` from the app honoured, errors in JSON, and the same rules for a head."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import re
import resource
import socket
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import gevent
import gunicorn.http.wsgi
import gunicorn.sock
import structlog
from gevent.lock import Semaphore
from gevent.pool import Pool
from gevent.server import StreamServer
from gunicorn.http.errors import (
    ExpectationFailed,
    LimitRequestHeaders,
    LimitRequestLine,
    NoMoreData,
    ParseException,
    UnsupportedTransferCoding,
)
from gunicorn.http.message import Request
from gunicorn.http.parser import RequestParser
from gunicorn.workers import ggevent

from processes.patches import patch_fork, spare_end
from processes.presence import has_input, has_left
from processes.refusals import JUDGED, judge_head, origin_form, refuse
from processes.sending import LOOK_S, Progress, count_acknowledged, count_unacknowledged, forget_unsent, note_cut_off
from processes.worker import ACCEPTS_PER_S, MAX_ACCEPTS, POLL_S, TICK_S, SupervisedWorker
from serving.errors import BodyTooSlow
from serving.web.bridges import FastAPIOverWSGI
from serving.web.messages import LINGER_S

log = structlog.get_logger()

OWN_FILES = 100  # open files of a worker besides connections: listeners, libraries, logs, a model's
LINGER_BYTES = 16_384  # bytes of one read from a client whose connection ends
BEGINNING = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z\r\n-]")  # of a request (RFC 9110, 9.1; RFC 9112, 2.2)
STATUSES = {  # of what gunicorn's parser refuses; all else is 400
    LimitRequestLine: 414,
    ExpectationFailed: 417,
    LimitRequestHeaders: 431,
    UnsupportedTransferCoding: 501,
}


class RefusedHead(ParseException):
    """A head that gunicorn's parser would take."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class JudgedRequest(Request):
    """A request whose head is held to the rules of both workers."""

    path: str

    def set_body_reader(self) -> None:
        fields = [(name.lower(), value) for name, value in self.headers]
        version = f"{self.version[0]}.{self.version[1]}"
        judged = [field for field in fields if field[0] in JUDGED]
        if (status := judge_head(self.method, self.uri, version, judged)) is not None:
            raise RefusedHead(status)
        if not self.path.startswith("/"):
            self.path = "/" if (origin_form(self.method, self.uri) or "").startswith("/") else "*"
        connection = ",".join(value for name, value in fields if name == "connection").lower()
        if version == "1.0" or "close" in [token.strip(" \t") for token in connection.split(",")]:
            self.force_close()
        super().set_body_reader()


class Answer(gunicorn.http.wsgi.Response):
    """gunicorn's answer in HTTP/1.1, as uvicorn's is, without `Server`, which is nobody's business."""

    def default_headers(self) -> list[str]:
        lines = [line for line in super().default_headers() if not line.startswith("Server:")]
        return [f"HTTP/1.1 {self.status}\r\n", *lines[1:]]


class TimedBody:
    """The body of a request, which has to come in time: whole, or piece by piece if it is read as a stream."""

    def __init__(self, body: Any, sock: Any, timeout_s: float) -> None:
        self.body, self.sock = body, sock
        self.timeout_s = timeout_s
        self.end = time.monotonic() + timeout_s
        self.error: Exception | None = None  # that the next reading ends with

    def time_piece(self, is_waited_for: bool) -> None:
        """Let the next piece of the body have its own time, if it is waited for."""
        self.end = time.monotonic() + self.timeout_s

    def read1(self, size: int) -> bytes:
        """Read what is there, but wait for a byte at least: gunicorn's own `read` waits for all."""
        held = self.body.buf.tell()
        if held:
            return cast(bytes, self.body.read(min(size, held)))
        if self.error is not None:
            raise self.error
        pieces = [self._read_some(size)]
        left = size - len(pieces[0])
        while left and pieces[-1] and has_input(self.sock.fileno()):
            try:
                pieces.append(self._read_some(left))
            except (OSError, ParseException) as error:  # which ends the body, but not what came before
                self.error = error
                break
            left -= len(pieces[-1])
        return b"".join(pieces)

    def _read_some(self, size: int) -> bytes:
        """Read what one look at the socket brings."""
        first: bytes = self._in_time(self.body._read_reader, 1)
        reader = self.body.reader
        held = (reader.unreader if hasattr(reader, "unreader") else reader).buf.tell()
        return first + self.body._read_reader(min(size - 1, held)) if first else first

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

    def __init__(self, sock: Any, patience_s: float) -> None:
        self.sock = sock
        self.patience_s = patience_s  # seconds after which a client that takes nothing is cut off
        self.has_yielded = False  # since it was last read from: between two requests once is enough
        self.takes_interim = False  # whether it may be asked if it is there: once for a request
        self.has_begun = False  # whether it has sent anything

    def has_left(self) -> bool:
        """Return whether the client has left, whose request waits."""
        return has_left(self.sock.fileno(), self._may_ask)

    def _may_ask(self) -> bool:
        """Return whether the client may be asked if it is there: once for a request, and not between two answers."""
        may_ask = self.takes_interim and not count_unacknowledged(self.sock)
        self.takes_interim = self.takes_interim and not may_ask
        return may_ask

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def recv(self, *size: int) -> Any:
        if not self.has_yielded:
            gevent.sleep(0)
        self.has_yielded = False
        data = self.sock.recv(*size)
        if not self.has_begun:
            self.has_begun = True
            if data and not BEGINNING.match(data):  # as TLS does, whose client waits for an answer before it goes on
                raise RefusedHead(400)
        return data

    def let_others(self, has_more: bool) -> None:
        """Let others have their turn before the next request."""
        with self.gate if has_more else contextlib.nullcontext():
            gevent.sleep(0)
        self.has_yielded = True

    def sendall(self, data: Any) -> None:
        """Send some of an answer, after which there is nothing more to ask."""
        self.takes_interim = False
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
                    progress = progress or Progress(taken, self.patience_s)
                    if progress.is_stalled(taken):
                        raise self._cut_off() from None
        finally:
            self.sock.settimeout(None)

    def _cut_off(self) -> OSError:
        note_cut_off(self.patience_s)
        forget_unsent(self.sock)
        return ConnectionResetError(errno.ECONNRESET, "the client took nothing")


class TimedTLSServer(StreamServer):
    """A server whose TLS handshakes have their time, and go on after it is closed."""

    def __init__(self, sock: Any, handle: Callable[..., None], handshake_s: float, **options: Any) -> None:
        super().__init__(sock, handle, **options)
        self.serve = handle
        self.handshake_s = handshake_s

    def wrap_socket_and_handle(self, client: Any, address: Any) -> None:
        try:
            with gevent.Timeout(self.handshake_s, TimeoutError):
                wrapped = self.wrap_socket(client, **self.ssl_args)
        except OSError:  # no TLS, or none in time
            client.close()
        else:
            self.serve(wrapped, address)


class GeventWorker(SupervisedWorker, ggevent.GeventWorker):
    """Runs a WSGI app, honours its `Connection: close`, and answers errors in JSON."""

    wsgi: Any
    inner: Any

    def patch(self) -> None:
        super().patch()
        patch_fork()
        spare_end()

    def handle_quit(self, sig: int, frame: Any) -> None:
        """End by a drain: gunicorn's own exit, which is made in a greenlet, is a traceback."""
        self.alive = False

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
            handle = functools.partial(self.handle, listener)
            server = TimedTLSServer(sock, handle, self.cfg.keepalive, spawn=self.pool, **tls)
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
        # By these names gunicorn asks for them.
        RequestParser.mesg_class, gunicorn.http.wsgi.Response = JudgedRequest, Answer
        self.inner = inner = self.wsgi
        settings = self.service.settings
        request_timeout_s = settings.limits.request_timeout_s
        self.max_requests_per_connection = settings.server.max_requests_per_connection
        if isinstance(inner, FastAPIOverWSGI):
            inner.start()

        def wsgi(environ: dict[str, Any], start_response: Any) -> Any:
            body = environ["wsgi.input"]

            def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
                if any(name.lower() == "connection" and value == "close" for name, value in headers):
                    start_response.__self__.force_close()
                    body.failed = True  # gunicorn's mark of one that was not read to its end
                return start_response(status, headers, exc_info)

            environ["wsgi.input"] = TimedBody(body, environ["gunicorn.socket"], request_timeout_s)
            if "HTTP_TRANSFER_ENCODING" not in environ:
                environ.pop("wsgi.input_terminated")  # so that werkzeug counts, and sees a body that is cut short
            return inner(environ, start)

        self.wsgi = wsgi

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        super().handle(listener, Client(client, self.service.settings.server.send_timeout), addr)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        is_last = req.req_number == self.max_requests_per_connection
        if is_last:
            req.force_close()
        sock.takes_interim = req.version >= (1, 1) and not self.cfg.is_ssl
        try:
            result = super().handle_request(listener_name, req, sock, addr)
        except StopIteration:
            if req.body.failed or is_last:
                linger(sock)
            raise
        sock.let_others(has_more=req.unreader.buf.getbuffer().nbytes > 0)
        return result

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        if isinstance(exc, RefusedHead):
            status = exc.status
        elif isinstance(exc, ParseException):
            status = STATUSES.get(type(exc), 400)
        else:
            status = 500
            log.error("worker_failed", exc_info=exc)
        with contextlib.suppress(OSError):  # it has left, or reads nothing
            client.sendall(refuse(status, self.cfg))
            linger(client)


def linger(sock: Any) -> None:
    """Close a connection on which the client may still send, but not before it could read the answer."""
    end = time.monotonic() + LINGER_S
    with contextlib.suppress(OSError), contextlib.closing(sock):
        sock.shutdown(socket.SHUT_WR)
        while (left_s := end - time.monotonic()) > 0:
            sock.settimeout(left_s)
            if not sock.recv(LINGER_BYTES):
                break

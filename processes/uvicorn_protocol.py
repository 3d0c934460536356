"""uvicorn's protocol with gunicorn's limits, and an answer for every client that can still read one."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import app
from processes.presence import has_left
from processes.refusals import JUDGED, HeadLimits, judge_head, origin_form, refuse
from processes.transport import CoalescingTransport, Sending
from processes.worker import SETTLE_S
from serving.errors import BodyCutShort, BodyTooSlow, ServingError
from serving.web.asgi import CLIENT_HAS_LEFT, CUT_SHORT, TIME_PIECE

MAX_UNPARSED_BYTES = 1_048_576  # bytes without a whole head: more than a request line and 100 fields have
PIECE_BYTES = 256  # smallest piece, in bytes, of a body with empty lines in it that the parser gets
MAX_PIECE_BYTES = 32_768  # largest piece that the parser gets
TURN_S = 0.005  # seconds for which one connection's bytes are parsed before others have their turn
TURN_REQUESTS = 16  # early requests that are begun in one turn of the loop
JUDGED_NAMES = {name.encode() for name in JUDGED}


class Connections:
    """What the connections of a worker share: gunicorn's configuration, the order to end, and the turn to go on."""

    def __init__(self, cfg: Any, settings: app.Settings, loop: Any, accept_more: Callable[[float], None]) -> None:
        self.cfg = cfg
        self.loop = loop
        self.accept_more = accept_more
        self.are_draining = False
        self.request_timeout_s = settings.limits.request_timeout_s
        self.max_requests = settings.server.max_requests_per_connection
        self.head_limits = HeadLimits.of(cfg)
        self.sending = Sending(loop, settings.server.send_timeout)
        self._behind: collections.deque[Protocol] = collections.deque()  # those that hold what can be taken

    def queue_up(self, protocol: Protocol) -> None:
        """Let a connection go on in its turn."""
        if not self._behind:
            self.loop.call_soon(self._let_go_on)
        self._behind.append(protocol)

    def _let_go_on(self) -> None:
        left = TURN_REQUESTS
        try:
            for _ in range(len(self._behind)):
                protocol = self._behind.popleft()
                left -= bool(protocol.held)  # those that have been reset meanwhile hold nothing, and nobody up
                protocol.go_on()
                if left == 0:
                    break
        finally:
            if self._behind:
                self.loop.call_soon(self._let_go_on)


class Flow(FlowControl):
    is_held = False  # enough has come

    def resume_reading(self) -> None:
        if not self.is_held:
            super().resume_reading()


class Protocol(HttpToolsProtocol):
    refusal = 400
    unparsed_bytes = 0  # received since the last head or piece of a body was whole
    failed = False
    body_timer: Any = None  # until the body that is being received, or its next piece, must be there
    times_pieces = False  # of this body, which the app reads piece by piece
    n_requests = 0
    takes_interim = True  # whether it knows HTTP/1.1
    was_asked = False  # whether it is there, in the request that waits
    held = b""  # what came behind a request that has to be answered first
    transport: Any
    flow: Any
    headers: Any

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self.shared = connections
        self.cfg = connections.cfg

    def connection_made(self, transport: Any) -> None:
        super().connection_made(cast(Any, CoalescingTransport(transport, self.shared.sending)))
        self.flow = Flow(self.transport)
        keepalive: float = self.cfg.keepalive
        self.timeout_keep_alive_task = self.loop.call_later(keepalive, self.timeout_keep_alive_handler)
        self.loop.call_soon(self.shared.accept_more, time.monotonic())

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
        self.shared.queue_up(self)

    def go_on(self) -> None:
        held, self.held = self.held, b""
        if not held or self.transport.is_over:
            return
        self.transport.lingers = self.n_requests == self.shared.max_requests
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
        if self.body_timer is None and not self.times_pieces:
            self._start_body_timer()
        if self.unparsed_bytes > self.shared.head_limits.field_size and not self.failed:
            self._check_unparsed()

    def _take_piece(self, data: bytes) -> bytes:
        """Parse some of it, and return the rest."""
        in_body = self.cycle is not None and self.cycle.more_body
        piece, data = cut_requests(data, PIECE_BYTES if in_body else 0)
        self.unparsed_bytes += len(piece)
        return self._feed(piece) + data

    def _check_unparsed(self) -> None:
        """Refuse fields that are too long before they end, and empty lines without a request."""
        if self.headers is not None:
            self._check_fields()
        if self.headers is not None and self.unparsed_bytes > MAX_UNPARSED_BYTES:
            self.refusal = 431
        if self.headers is None or self.refusal == 431:
            self._fail()

    def _feed(self, data: bytes) -> bytes:
        """Feed the parser. Return the bytes to feed it next.

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
        if len(self.parser.get_method()) + len(self.url) + len("  HTTP/1.1") > self.shared.head_limits.line:
            self.refusal = 414
        if self.refusal != 400 or not self.url.isascii():
            raise ValueError("request line")

    def on_headers_complete(self) -> None:
        self.unparsed_bytes = 0
        self._unset_keepalive_if_required()
        judged = self._check_fields()
        version = self.parser.get_http_version()
        if self.refusal == 400:
            self._judge(version, judged)
        if self.refusal != 400:
            raise ValueError("head")
        if not self.parser.should_upgrade():
            if version == "1.0":
                # Which such a client does not know (RFC 9110, section 10.1.1).
                self.expect_100_continue = self.takes_interim = False
            self.times_pieces = False
            self.scope[CLIENT_HAS_LEFT] = self.has_left  # type: ignore[literal-required]
            self.scope[TIME_PIECE] = self.time_piece  # type: ignore[literal-required]
            super().on_headers_complete()
            self.n_requests += 1
            if self.n_requests == self.shared.max_requests:
                self.cycle.keep_alive = False
                self.transport.lingers = True
            if self.shared.are_draining:
                self.drain()
            self.headers = []  # for trailers, which must not pass for headers (RFC 9110, section 6.5.1)

    def has_left(self) -> bool:
        """Return whether the client has left, whose request waits."""
        sock = self.transport.get_extra_info("socket")
        return sock is None or self.transport.is_closing() or has_left(sock.fileno(), self._may_ask)

    def _may_ask(self) -> bool:
        """Return whether the client may be asked if it is there: once for a request, and not between two answers."""
        is_plain = self.scheme == "http" and self.takes_interim and not self.was_asked
        may_ask = is_plain and not self.cycle.response_started and bool(self.transport.has_sent_all())
        self.was_asked = self.was_asked or may_ask
        return may_ask

    def drain(self) -> None:
        """Let the answer that is being made be the last, unless it is on its way."""
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def end_tls(self, within_s: float) -> None:
        """Close without the client's word that it closes too, which the transport would wait half a minute for."""
        if self.transport.is_closing() or self.cycle is None or self.cycle.response_complete:
            self.transport.close()
            is_sent = self.transport.get_write_buffer_size() == 0
            self.loop.call_later(SETTLE_S if is_sent else within_s, self.transport.abort)

    def _judge(self, version: str, judged: list[tuple[bytes, bytes]]) -> None:
        """Refuse what gunicorn's parser refuses and this one does not, and take the path of a proxy's target.

        Raises `ValueError`.
        """
        method, target = self.parser.get_method().decode(), self.url.decode()
        fields = [(name.decode(), value.decode("latin-1").strip(" \t")) for name, value in judged]
        if (status := judge_head(method, target, version, fields)) is not None:
            self.refusal = status
            raise ValueError("head")
        if self.url[:1] != b"/":
            self.url = cast(str, origin_form(method, target)).encode()

    def _check_fields(self) -> list[tuple[bytes, bytes]]:
        """Refuse too many fields, or one that is too long, and return those that are judged by what they say."""
        judged = []
        for field in self.headers:
            name, value = field
            if name in JUDGED_NAMES:
                judged.append(field)
            if len(name) + len(value) + len(": \r\n") > self.shared.head_limits.field_size:
                self.refusal = 431
        if len(self.headers) > self.shared.head_limits.fields:
            self.refusal = 431
        return judged

    def on_body(self, body: bytes) -> None:
        self.unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.unparsed_bytes = 0
        self._stop_body_timer()
        if not self.parser.should_upgrade():
            super().on_message_complete()
            self.headers = None  # until the next request begins

    def time_piece(self, is_waited_for: bool) -> None:
        """Let the next piece of the body have its own time, as long as the app waits for it."""
        self.times_pieces = True
        self._stop_body_timer()
        if is_waited_for:
            self._start_body_timer()

    def _start_body_timer(self) -> None:
        cycle = self.cycle
        if cycle is not None and cycle.more_body and not cycle.response_complete:
            self.body_timer = self.loop.call_later(self.shared.request_timeout_s, self._cut_short, BodyTooSlow)

    def _stop_body_timer(self) -> None:
        if self.body_timer is not None:
            self.body_timer.cancel()
            self.body_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_body_timer()
        self._unset_keepalive_if_required()  # which uvicorn does only where there was no error
        if self.scope is not None:
            for name in (CLIENT_HAS_LEFT, TIME_PIECE):
                cast(Any, self.scope).pop(name, None)  # or both would wait for the garbage collector
        self.held = b""
        self.shared.sending.forget(self.transport)
        super().connection_lost(exc)

    def _fail(self) -> None:
        self.failed = True
        if not self._cut_short() and (self.cycle is None or self.cycle.response_complete):
            self._refuse()

    def on_response_complete(self) -> None:
        self.was_asked = False
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
        self.transport.write(refuse(self.refusal, self.cfg))
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


def cut_requests(data: bytes, start: int) -> tuple[bytes, bytes]:
    """Cut what comes behind the first empty line after `start` bytes, if there is a second one: it may end another
    request."""
    end = data.find(b"\r\n\r\n", start, MAX_PIECE_BYTES) + 4
    if end < 4 or data.find(b"\r\n\r\n", end, MAX_PIECE_BYTES) < 0:
        end = MAX_PIECE_BYTES
    return data[:end], data[end:]

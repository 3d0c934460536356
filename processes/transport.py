"""A transport that sends what is written in one turn of the loop in one piece, and ends when nothing more leaves."""

from __future__ import annotations

import collections
from typing import Any

from processes.sending import LOOK_S, Progress, count_acknowledged, count_unacknowledged, forget_unsent, note_cut_off
from serving.web.messages import LINGER_S

MAX_HELD_BYTES = 16_384  # bytes that wait for the end of a turn


class Sending:
    """The transports of a worker that have something to send."""

    def __init__(self, loop: Any, patience_s: float) -> None:
        self.loop = loop
        self.patience_s = patience_s  # seconds after which a client that takes nothing is cut off
        self.pending: collections.deque[CoalescingTransport] = collections.deque()  # those of this turn
        self.watched: dict[CoalescingTransport, Progress] = {}  # those that may have sent only a part

    def add(self, transport: CoalescingTransport) -> None:
        """Flush a transport at the end of this turn."""
        if not self.pending:
            self.loop.call_soon(self._flush)
        self.pending.append(transport)

    def _flush(self) -> None:
        try:
            while self.pending:
                self.pending.popleft().flush()
        finally:
            if self.pending:  # one transport's failure is not the others'
                self.loop.call_soon(self._flush)

    def watch(self, transport: CoalescingTransport) -> None:
        """Look each second whether something leaves, until all has."""
        if not self.watched:
            self.loop.call_later(LOOK_S, self._look)
        self.watched[transport] = Progress(transport.count_taken(), self.patience_s)

    def _look(self) -> None:
        """Let go of transports that have sent all, and abort those whose clients take nothing."""
        try:
            for transport, progress in [*self.watched.items()]:
                if transport.has_sent_all():
                    del self.watched[transport]
                elif progress.is_stalled(transport.count_taken()):
                    del self.watched[transport]
                    transport.cut_off()
        finally:
            if self.watched:
                self.loop.call_later(LOOK_S, self._look)

    def forget(self, transport: Any) -> None:
        self.watched.pop(transport, None)


class CoalescingTransport:
    """Sends what is written in one turn of the loop in one piece.

    uvicorn writes a head and then a body, each of which would be a packet and a system call: a fifth of the time that
    a small answer takes.
    """

    def __init__(self, transport: Any, sending: Sending) -> None:
        self.transport = transport
        self.is_closing = transport.is_closing  # which is asked for each answer
        self.sending = sending
        self.written: list[bytes] = []
        self.sent_bytes = 0  # given to the transport
        self.lingers = False  # the client may still be sending when this is closed
        self.is_over = False  # closed, but for what lingers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        if not self.written:
            self.sending.add(self)
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
        self.sending.loop.call_later(LINGER_S, self.transport.close)

    def flush(self) -> None:
        if self.written and not self.is_over and not self.transport.is_closing():
            self.transport.writelines(self.written)
            self.sent_bytes += sum(map(len, self.written))
            if self not in self.sending.watched:
                self.sending.watch(self)
        self.written = []

    def has_sent_all(self) -> bool:
        """Return whether the client's kernel has all, or never will.

        Under TLS, what uvloop keeps of it is not in the size of its buffer, and a transport that is closed has no
        socket.
        """
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
        note_cut_off(self.sending.patience_s)
        forget_unsent(self.transport.get_extra_info("socket"))
        self.transport.abort()

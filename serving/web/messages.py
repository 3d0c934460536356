"""A request and a response, whichever framework received the one and sends the other."""

from __future__ import annotations

import os
import random
import re
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Protocol

from pydantic_core import to_json

from serving.errors import BadRequest, BodyCutShort, BodyTooLarge, ClientLeft, ServingError, shorten
from serving.predictor.batcher import LoopBatcher, ThreadBatcher
from serving.predictor.calls import Job

JSON = "application/json"
JSONL = "application/jsonl"
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
URL_SAFE = "/!$&'()*+,;=:@"  # characters of a path that stand for themselves (RFC 3986, section 3.3)
LINGER_S = 2.0  # seconds for which a closed connection still reads, or its client might lose the answer
OWN_PHRASES = {ClientLeft.status: "Client Closed Request"}  # of a status that HTTP does not have
READ_BYTES = 65_536  # bytes of a body that are asked for at once
IDS = random.Random()  # noqa: S311 — no secrets; its own generator, for no system call, and nobody else seeds it
os.register_at_fork(after_in_child=IDS.seed)


def make_request_id() -> str:
    return f"{IDS.getrandbits(128):032x}"


@dataclass(slots=True)
class Request:
    """One request, whichever framework received it."""

    method: str
    path: str
    query: str  # percent-encoded
    header: Callable[[str], str | None]  # by lower-case name; repeated fields are joined by commas
    read: Callable[[int], Awaitable[bytes]]  # the next piece of the body, of about so many bytes; b"" at its end
    batcher: LoopBatcher | ThreadBatcher
    client_has_left: Callable[[], bool] | None = None  # where the server can tell
    time_piece: Callable[[bool], None] | None = None  # told when the next piece has to come in time, where it may not
    may_stream: bool = True  # the answer may begin before its length is known, which HTTP/1.0 cannot say
    root_path: str = ""  # what stood in front of the path, where the client sees it
    read_some: Callable[[int], Awaitable[bytes]] | None = None  # as `read`, where that waits for all of its bytes
    body: bytes | ServingError | None = None  # the bytes, or the error that reading ended with
    rows: int = 0
    job: Job | None = None  # its prediction

    @property
    def announces_body(self) -> bool:
        """Whether the head says that a body follows."""
        return self.header("content-length") not in (None, "0") or self.header("transfer-encoding") is not None

    def link_to(self, path: str) -> str:
        """Return a path of the service's as its client finds it, for a `Location` or a link."""
        return urllib.parse.quote(self.root_path, safe=URL_SAFE) + path

    async def read_body(self, limit: int, keeps: bool = True) -> bytes | ServingError:
        """Read the whole body, but no more than `limit` bytes, into `body`; or the error that it ends with.

        A body that nobody needs is not kept: it is read so that the connection can go on.
        """
        if self.body is None:
            try:
                self.body = await self._read_body(limit, keeps)
            except ServingError as error:
                self.body = error
        return self.body

    def take_body(self) -> bytes:
        """Return the body that was read, and let go of it. Raises the error that it ended with."""
        body, self.body = self.body, b""
        if isinstance(body, ServingError):
            raise body
        return body or b""

    def is_within(self, limit: int) -> bool:
        """Return whether the head says that the body has no more bytes than a limit. Raises `BadRequest`."""
        length = self._content_length()
        return length <= limit if length is not None else self.header("transfer-encoding") is None

    async def pieces(self, size: int) -> AsyncIterator[bytes]:
        """Yield the body, whether it was read or not, in pieces of about so many bytes. Each has to come in time.

        Raises `ServingError`.
        """
        if self.body is not None:
            body = self.take_body()
            for start in range(0, len(body), size):
                yield body[start : start + size]
            return
        length = self._content_length()
        self.body = b""
        n_bytes = 0
        while n_bytes != length:
            piece = await self._read_in_time(size if length is None else min(length - n_bytes, size))
            if not piece:
                break
            n_bytes += len(piece)
            yield piece
        if length is not None and n_bytes < length:
            raise BodyCutShort

    async def _read_in_time(self, size: int) -> bytes:
        read = self.read_some or self.read
        if self.time_piece is None:
            return await read(size)
        self.time_piece(True)
        piece = await read(size)
        self.time_piece(False)
        return piece

    async def _read_body(self, limit: int, keeps: bool) -> bytes:
        length = self._content_length()
        if length is None and self.header("transfer-encoding") is None:
            return b""
        if length is not None and length > limit:
            raise BodyTooLarge(f"the body is {length} bytes", limit)
        size = 0
        pieces: list[bytes] = []
        while size != length:
            piece = await self.read(READ_BYTES if length is None else min(length - size, READ_BYTES))
            if not piece:
                break
            if keeps:
                pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise BodyTooLarge("the body is longer", limit)
        if length is not None and size < length:
            raise BodyCutShort
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _content_length(self) -> int | None:
        given = self.header("content-length")
        # More digits are no length that could be, and Python refuses to read more than 4300 of them.
        if given is not None and not (given.isascii() and given.isdigit() and len(given.lstrip("0")) <= 18):
            detail = f"Content-Length is {shorten(given)!r}; it should be a number of bytes"
            raise BadRequest(detail, {"Connection": "close"})
        return None if given is None else int(given[-18:])


class Rest(Protocol):
    """What follows the first pieces of an answer. Whoever sends it closes it, whether it was sent or not."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...
    def __anext__(self) -> Awaitable[bytes]: ...
    def aclose(self) -> Awaitable[None]: ...


@dataclass(slots=True)
class Response:
    """One answer, whichever framework sends it. Its body is in pieces, so that a long one is never copied."""

    pieces: list[bytes]
    status: int = 200
    more_headers: Mapping[str, str] = field(default_factory=dict)
    media_type: str = JSON  # none of a 204, which has no body
    request_id: str = ""
    lingers: bool = False  # the client may still be sending
    rest: Rest | None = None  # what follows the pieces, of a length that is not known

    @classmethod
    def of(cls, payload: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        """Return a payload as JSON; what JSON cannot say of a float becomes a string."""
        return cls([to_json(payload, inf_nan_mode="strings", fallback=str)], status, headers or {})

    @property
    def status_line(self) -> str:
        """The status as WSGI and HTTP/1.1 write it."""
        return f"{self.status} {OWN_PHRASES.get(self.status) or HTTPStatus(self.status).phrase}"

    @property
    def length(self) -> int:
        """The bytes of the body."""
        return sum(map(len, self.pieces))

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The headers as WSGI and HTTP/1.1 write them."""
        own = [("Content-Type", self.media_type)] if self.media_type else []
        if own and self.rest is None:
            own.append(("Content-Length", str(self.length)))
        return [*own, *self.more_headers.items(), ("X-Request-ID", self.request_id)]

    @property
    def start_message(self) -> dict[str, Any]:
        """The status and the headers as ASGI sends them."""
        headers = [(b"content-type", self.media_type.encode())] if self.media_type else []
        if headers and self.rest is None:
            headers.append((b"content-length", b"%d" % self.length))
        for name, value in self.more_headers.items():
            headers.append((name.lower().encode(), value.encode("latin-1")))
        headers.append((b"x-request-id", self.request_id.encode()))
        return {"type": "http.response.start", "status": self.status, "headers": headers}


def write_detail(error: ServingError) -> Response:
    """Return an error in the shape that FastAPI gives errors, `{"detail": …}`."""
    response = Response.of({"detail": error.detail}, error.status, error.headers)
    response.lingers = error.lingers
    return response

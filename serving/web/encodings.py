"""Bodies that come compressed: `Content-Encoding: gzip` and `deflate` (RFC 9110, section 8.4.1)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from serving.errors import BadRequest, ContentTooLarge

IDENTITY = "identity"
RAW = -zlib.MAX_WBITS  # a deflate without the header of zlib, which some send
WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
ENCODINGS = (IDENTITY, *WINDOW_BITS)
PIECE_BYTES = 65_536  # most bytes that are inflated at once
FED_BYTES = 4096  # most bytes that zlib gets at once: what follows a member in them is copied
SMALL_BODY_BYTES = 1024  # longest body that is inflated in place: to 1 MB, for zlib's ratio is 1032 at most
MAX_SMALL_MEMBERS = 100  # members of a gzip beyond one for each kilobyte inside: more are an attack
MAX_RATIO = 128  # of what is inside a stream to the stream, beyond the limit of a body


def encoding_of(field: str | None) -> str:
    """Return the encoding that a `Content-Encoding` names; "x-gzip" is gzip (RFC 9110, section 8.4.1.3)."""
    return (field or IDENTITY).strip().lower().replace("x-gzip", "gzip")


class Inflater:
    """Inflates what comes in pieces. A gzip may have several members, one behind the other (RFC 1952, section 2.2)."""

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._inflating = zlib.decompressobj(WINDOW_BITS[encoding])
        self._is_first = True  # nothing has been inflated
        self._n_members, self.n_bytes = 1, 0  # so far, and what was inside

    def inflate(self, data: bytes) -> Iterator[bytes]:
        """Yield what is inside, in pieces of `PIECE_BYTES` at most. Raises `BadRequest`."""
        for start in range(0, len(data), FED_BYTES):
            yield from self._inflate(data[start : start + FED_BYTES])

    def _inflate(self, data: bytes) -> Iterator[bytes]:
        piece = b""
        while data or len(piece) == PIECE_BYTES:
            if self._inflating.eof:
                self._begin_member()
            piece = self._inflate_some(data)
            is_over = self._inflating.eof
            data = self._inflating.unused_data if is_over else self._inflating.unconsumed_tail
            if piece:
                self.n_bytes += len(piece)
                yield piece
            if is_over and len(piece) == PIECE_BYTES and not data:
                return

    def _inflate_some(self, data: bytes) -> bytes:
        is_first, self._is_first = self._is_first, False
        try:
            return self._inflating.decompress(data, PIECE_BYTES)
        except zlib.error as error:
            if is_first and self._encoding == "deflate":
                self._inflating = zlib.decompressobj(RAW)
                return self._inflate_some(data)
            reason = str(error).rpartition(": ")[2]
            raise BadRequest(f"the body is not {self._encoding}: {reason}") from None

    def _begin_member(self) -> None:
        self._n_members += 1
        if self._encoding == "deflate" or self._n_members > MAX_SMALL_MEMBERS + self.n_bytes // 1024:
            raise BadRequest(f"the body goes on behind the end of its {self._encoding}")
        self._inflating = zlib.decompressobj(WINDOW_BITS[self._encoding])

    def end(self) -> None:
        """Raise `BadRequest` if what came has no end."""
        if not self._inflating.eof:
            raise BadRequest(f"the body ends inside its {self._encoding}; send all of it")


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """Return what a whole body has inside. Raises `BadRequest`, and `ContentTooLarge` for more than `limit` bytes."""
    inflater = Inflater(encoding)
    pieces: list[bytes] = []
    for piece in inflater.inflate(body):
        if inflater.n_bytes > limit:
            raise ContentTooLarge(f"the body is longer once it is inflated; send at most {limit} bytes")
        pieces.append(piece)
    inflater.end()
    return b"".join(pieces)

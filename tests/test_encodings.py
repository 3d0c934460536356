"""Compressed bodies: what is inside counts, and no more of it is inflated than may be."""

import gzip
import itertools
import random
import tracemalloc
import zlib
from collections.abc import Callable

import pytest

from serving.errors import BadRequest, ContentTooLarge
from serving.web.encodings import MAX_SMALL_MEMBERS, PIECE_BYTES, Inflater, inflate
from tests.lib.cases import BOMB, FLOWER, compressed
from tests.lib.proc import peak_mb
from tests.lib.servers import Server

LIMIT = 10 * PIECE_BYTES
TEXTS = [b"", b"x", random.Random(0).randbytes(3 * PIECE_BYTES), b"\0" * LIMIT, b"\0" * PIECE_BYTES]
Compress = Callable[[bytes], bytes]


def compress_in_members(text: bytes) -> bytes:
    return gzip.compress(text[:7]) + gzip.compress(b"") + gzip.compress(text[7:])


def compress_raw(text: bytes) -> bytes:
    return zlib.compress(text, wbits=-zlib.MAX_WBITS)


WAYS = [
    ("gzip", gzip.compress),
    ("gzip", compress_in_members),
    ("deflate", zlib.compress),
    ("deflate", compress_raw),
]


@pytest.mark.parametrize(("encoding", "compress"), WAYS)
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: f"{len(text)}-{text[:1]!r}")
def test_body_is_inflated(encoding: str, compress: Compress, text: bytes) -> None:
    """All that was compressed comes back, from a whole body and from pieces of it, and never much at once."""
    body = compress(text)
    assert inflate(body, encoding, LIMIT) == text
    for size in (3, 1000):
        inflater = Inflater(encoding)
        pieces = [body[start : start + size] for start in range(0, len(body), size)]
        inflated = [*itertools.chain.from_iterable(map(inflater.inflate, pieces))]
        inflater.end()
        assert b"".join(inflated) == text
        assert max(map(len, inflated), default=0) <= PIECE_BYTES


@pytest.mark.parametrize(("encoding", "compress"), WAYS)
def test_body_that_is_cut_is_refused(encoding: str, compress: Compress) -> None:
    """A body that ends before its end is refused, and so is one that goes on behind it."""
    body = compress(b"0123456789abcdef" * 10)
    first = gzip.compress(b"0123456")
    whole = [len(first), len(first + gzip.compress(b""))] if compress is compress_in_members else []
    for length in range(1, len(body)):
        if length not in whole:
            with pytest.raises(BadRequest, match=f"the body ends inside its {encoding}; send all of it"):
                inflate(body[:length], encoding, LIMIT)
    with pytest.raises(BadRequest, match=f"not {encoding}|behind the end of its {encoding}"):
        inflate(body + b"more of it", encoding, LIMIT)


@pytest.mark.parametrize("text", [b"", b"x"])
def test_small_members_are_counted(text: bytes) -> None:
    """A gzip of nothing, or of a byte, again and again, is no body; one in blocks, as of `bgzip`, is."""
    member = gzip.compress(text)
    few = MAX_SMALL_MEMBERS - 1
    assert inflate(member * few + gzip.compress(b"y"), "gzip", LIMIT) == text * few + b"y"
    with pytest.raises(BadRequest, match="goes on behind the end of its gzip"):
        inflate(member * (MAX_SMALL_MEMBERS + 2), "gzip", LIMIT)
    block = bytes(1024)
    assert inflate(gzip.compress(block) * 600, "gzip", LIMIT) == block * 600


def test_bomb_takes_no_memory() -> None:
    """A body that would be larger than the limit is inflated no further than that."""
    tracemalloc.start()
    with pytest.raises(ContentTooLarge, match=f"longer once it is inflated; send at most {LIMIT} bytes"):
        inflate(BOMB, "gzip", LIMIT)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2 * LIMIT


def test_worker_survives_bombs(server: Server) -> None:
    """Bombs leave nothing in a worker, which says nothing but their statuses, and answers as before."""
    bomb = compressed("gzip", BOMB, 413)
    assert server.send(bomb).status == 413
    n_lines, before = len(server.lines), max(map(peak_mb, server.worker_pids))
    assert [server.send(bomb).status for _ in range(20)] == [413] * 20
    assert max(map(peak_mb, server.worker_pids)) < before + 32
    assert server.send(compressed("gzip", gzip.compress(FLOWER.encode()))).json["prediction"] == "setosa"
    assert {line["event"] for line in server.lines[n_lines:]} <= {"request"}

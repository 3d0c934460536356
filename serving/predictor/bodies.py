"""Bodies in JSON: the rows of a short one, and X of a long one, which is decoded part by part."""

from __future__ import annotations

import contextlib
import gc
import itertools
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar

import jiter
import numpy as np

from serving.errors import BadRequest, ContentTooLarge, ServingError, shorten
from serving.predictor.arrays import Arrays, count_byte
from serving.predictor.contract import MAX_PROBLEMS, Contract, Hints, Rows
from serving.predictor.inputs import Array
from serving.predictor.predictions import Predictions

T = TypeVar("T")

PART_BYTES = 65_536  # size of a part, which ends with a whole row
QUICK_BYTES = 2 * PART_BYTES  # longest part that is read without a look at what is a string
LONG_BYTES = 262_144  # largest body that is decoded when it comes; longer ones are decoded beside the event loop
MAX_CELLS = 65_536  # cells that are checked at once where `{}` is a row, which makes many of them out of few bytes
MIN_PART_BYTES = 256  # each costs some time of its own
EMPTY_ROW_BYTES = len(b"{},")
MAX_VALUES = 65_536  # values of a row besides one for each feature: more are not decoded, for it would take long
ARRAY = re.compile(rb"[ \t\r\n]*\[")
BETWEEN_OBJECTS = re.compile(rb"\}[ \t\r\n]*,[ \t\r\n]*\{")
PLACE = re.compile(r"at line (\d+) column (\d+)$")  # of an error, as jiter names it
NO_NUMBER = re.compile(rb"\W{0,2}(NaN|Infinity)")  # as Python writes them
QUOTE, COMMA, NEWLINE = b'",\n'
LEVELS = np.zeros(256, np.int8)  # by how many levels a byte outside of strings leads on
LEVELS[[*b"[{"]], LEVELS[[*b"]}"]] = 1, -1


def read_rows(contract: Contract, body: bytes, max_rows: int) -> tuple[Rows, bool]:
    """Return the rows of a body, and whether they are an array. Raises `ServingError`."""
    payload = parse_json(body)
    is_array = isinstance(payload, list)
    if is_array and len(payload) > max_rows:
        raise too_many_rows(len(payload), max_rows)
    return contract.parse_payload(payload), is_array


def is_long(contract: Contract, body: bytes) -> bool:
    """Return whether a body is to be decoded in parts: for its bytes, or for its cells."""
    return len(body) > PART_BYTES or count_implied(contract, body) > MAX_CELLS


def count_implied(contract: Contract, body: bytes) -> int:
    """Return how many cells a body may have that are not written: the more the more rows it has."""
    return len(contract.names) * count_byte(body, ord("{")) if contract.nullable else 0


def refuse_too_large(contract: Contract, value: bytes, place: list[Any]) -> None:
    """Raise `Unprocessable` for a row with so many values in it that it would take long to be decoded."""
    if (n_values := count_values(value)) > len(contract.names) + MAX_VALUES:
        raise contract.refusal([contract.too_large(place, n_values)])


def too_many_rows(n_rows: int, max_rows: int) -> ContentTooLarge:
    return ContentTooLarge(f"the body has {n_rows} rows; send at most {max_rows} rows")


def parse_json(body: Any, relocate: Callable[[str], str] = str) -> Any:
    """Decode a JSON body as RFC 8259 has it: no NaN, no Infinity, no key twice. Raises `BadRequest`.

    `relocate` corrects the place in an error, where the body is a part of another one.
    """
    if not body:
        raise BadRequest("the body is empty; send a JSON object or an array of them")
    try:
        return jiter.from_json(body, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="keys")
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {shorten(relocate(str(error)))}{_cure(body, str(error))}") from None


def _cure(body: bytes, error: str) -> str:
    """Return what to do about a mistake that clients of some kinds make, to follow jiter's error."""
    if body.startswith(b"\xef\xbb\xbf"):
        return "; leave out the byte order mark"
    if b"\0" in body[:4]:
        return "; encode it as UTF-8"
    if (place := PLACE.search(error)) is not None:
        line, column = int(place[1]), int(place[2])
        if NO_NUMBER.match(body, _find_line(body, line) + max(0, column - 2)):
            return "; a value that is missing is null"
    return ""


def _find_line(body: bytes, number: int) -> int:
    """Return where a line begins, part by part: to split a body into millions of lines would take many times its size.

    Lines are numbered from 1.
    """
    begin = 0
    while number > 1:
        ends = np.flatnonzero(np.frombuffer(body[begin : begin + PART_BYTES], np.uint8) == NEWLINE)
        if len(ends) >= number - 1:
            return begin + int(ends[number - 2]) + 1
        number -= len(ends)
        begin += PART_BYTES
    return begin


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Keep the garbage collector from what is decoded: there is no garbage in it, and it may be millions of objects,
    which the collector would go through again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def decode_apart(decode: Callable[[], T]) -> T:
    """Return what `decode` makes of a long body, without the garbage collector. An error lets go of what was decoded,
    which should end before the collector sees it."""
    with collector_off():
        try:
            return decode()
        except ServingError as error:
            error.__traceback__ = error.__context__ = None
            raise


class LongBody:
    """A body over `PART_BYTES`, which is decoded in parts, and whose answers are written in parts.

    Python's lock is held for no longer than a part takes, so other threads go on meanwhile.
    """

    def __init__(self, arrays: Arrays, body: bytes, max_rows: int) -> None:
        self.takes_long = len(body) > LONG_BYTES or count_implied(arrays.contract, body) > MAX_CELLS
        self.n_rows = 0  # once it is decoded
        self._arrays, self._body, self._max_rows = arrays, body, max_rows
        self._is_array = ARRAY.match(body) is not None

    @property
    def max_rows_in_it(self) -> int:
        """The number of rows before they are decoded: fewer where braces are in texts; more would be refused."""
        return min(self._max_rows, max(1, count_byte(self._body, ord("{"))))

    def decode(self) -> Any:
        """Return X, or None for an empty array. Raises `ServingError`."""
        body, self._body = self._body, b""
        X = decode_apart(partial(self._decode_array if self._is_array else self._decode_row, body))
        self.n_rows = 0 if X is None else len(X)
        return X

    def _decode_array(self, body: bytes) -> Any:
        parts = LongArray(self._arrays, body, self._max_rows).read()
        return self._arrays.join(parts) if parts else None

    def _decode_row(self, body: bytes) -> Any:
        contract = self._arrays.contract
        refuse_too_large(contract, body, ["body"])
        return self._arrays.of_rows(contract.parse_payload(parse_json(body)))

    def encode(self, predictions: Predictions | None) -> list[bytes]:
        """Return the pieces of the answer in JSON."""
        if predictions is None:
            return [b"[]"]
        return predictions.render_array(self.n_rows) if self._is_array else predictions.render()


class Layout(Protocol):
    """What the rows of an array look like, such as lists, in the words of a `Contract`."""

    def of_numbers_in(self, part: bytes) -> Array | None: ...
    def check(self, payload: Any) -> Rows | None: ...
    def find_problems(self, payload: Any, first: int, hints: Hints) -> Iterator[dict[str, Any]]: ...
    def find_shape(self, payload: Any, is_whole: bool) -> dict[str, Any] | None: ...
    def too_large(self, place: list[Any], n_values: int) -> dict[str, Any]: ...


class LongArray:
    """The rows of a long array, which are decoded and checked in parts. They are objects, if no layout is given.

    What is wrong is said as of a short one: that it is no JSON comes first, wherever that is, but for a value that is
    too large to be decoded; then that it has too many rows; then what is wrong with these.
    """

    def __init__(self, arrays: Arrays, body: bytes, max_rows: int, layout: Layout | None = None) -> None:
        self._arrays, self._body, self._max_rows = arrays, body, max_rows
        self._contract = arrays.contract
        self._layout: Layout | Contract = layout or arrays.contract
        self._of_numbers_in = layout.of_numbers_in if layout else arrays.of_numbers_in
        self._begin = ARRAY.match(body).end()  # type: ignore[union-attr]
        self._inputs: list[Any] = []
        self._n_rows = 0
        self._problems: list[dict[str, Any]] = []
        self._misshapen: dict[str, Any] | None = None
        self._hints = Hints()

    def read(self) -> list[Any]:
        """Return X in parts. Raises `ServingError`."""
        start = self._read_quickly()
        if start is not None:
            self._read_exactly(start)
        if self._n_rows > self._max_rows:
            raise too_many_rows(self._n_rows, self._max_rows)
        if self._problems:
            raise self._contract.refusal([self._misshapen] if self._misshapen else self._problems)
        return self._inputs

    def _read_quickly(self) -> int | None:
        """Read parts that are cut between objects, until one is not as it should be. Return where that begins.

        A cut inside a string or inside another value leaves a part that is no JSON, so parts that are make up the
        whole.
        """
        start = self._begin
        while True:
            size = self._part_bytes(start)
            cut = BETWEEN_OBJECTS.search(self._body, start + size, start + size + PART_BYTES)
            if cut is None and len(self._body) - start > size + PART_BYTES:
                return start
            if not self._take(self._body[start : cut.start()] + b"}]" if cut else self._body[start:]):
                return start
            if cut is None:
                return None
            start = cut.end() - 1

    def _part_bytes(self, start: int) -> int:
        """Return how long the part should be that begins there."""
        longest = self._body[start : start + PART_BYTES]
        n_cells = count_implied(self._contract, longest)
        return PART_BYTES if n_cells <= MAX_CELLS else max(1, len(longest) * MAX_CELLS // n_cells)

    def _take(self, rest: bytes) -> bool:
        """Take the rows of a part, given without its first bracket. Return whether there are some, and all fit."""
        part = b"[" + rest
        X = self._of_numbers_in(part)
        if X is None:
            with contextlib.suppress(BadRequest):
                rows = self._layout.check(parse_json(part))
                X = self._arrays.of_rows(rows) if rows else None
        if X is None or not len(X):
            return False
        self._add(len(X), X)
        return True

    def _add(self, n_rows: int, X: Any) -> None:
        self._n_rows += n_rows
        if self._n_rows <= self._max_rows and not self._problems:
            self._inputs.append(X)

    def _read_exactly(self, start: int) -> None:
        """Read parts that end where a value of the array does, and note what is wrong with them."""
        n_cells = len(self._contract.names) if self._contract.nullable else 0  # of the shortest row
        size = min(PART_BYTES, max(MIN_PART_BYTES, EMPTY_ROW_BYTES * MAX_CELLS // n_cells)) if n_cells else PART_BYTES
        for begin, end, n_values in cut_array(self._body, start, size):
            if n_values > len(self._contract.names) + MAX_VALUES:
                self._note([self._layout.too_large(["body", self._n_rows], n_values)])
                self._n_rows += 1
            elif self._problems or not self._take(self._body[begin:end] + (b"" if end == len(self._body) else b"]")):
                self._explain(begin, end)

    def _explain(self, begin: int, end: int) -> None:
        """Note what is wrong with the rows of a part. Raises `BadRequest` if it is no JSON.

        A number in front of a comma that comes before it, and one behind a comma that follows, make nothing between two
        commas the mistake that it is.
        """
        is_first, is_last = begin == self._begin, end == len(self._body)
        before, after = b"[" if is_first else b"[0,", b"" if is_last else b",0]"
        part = before + self._body[begin:end] + after
        rows = parse_json(part, partial(relocate, self._body, begin, len(before)))
        rows = rows[0 if is_first else 1 : None if is_last else -1]
        if rows and is_first:
            self._misshapen = self._layout.find_shape(rows, is_whole=is_last)
        if self._n_rows <= self._max_rows and self._layout.check(rows) is None:
            self._note(self._layout.find_problems(rows, self._n_rows, self._hints))
        self._n_rows += len(rows)

    def _note(self, problems: Any) -> None:
        self._problems += itertools.islice(problems, MAX_PROBLEMS - len(self._problems))
        self._inputs.clear()


def relocate(body: bytes, begin: int, added: int, text: str) -> str:
    """Return jiter's error about a part of a body, in front of which some bytes were added, with its place there."""
    n_lines = body.count(b"\n", 0, begin)
    line_begin = body.rfind(b"\n", 0, begin) + 1

    def place(match: re.Match[str]) -> str:
        line, column = int(match[1]), int(match[2])
        return f"at line {line + n_lines} column {column + (begin - added - line_begin if line == 1 else 0)}"

    return PLACE.sub(place, text)


def count_values(body: bytes) -> int:
    """Return how many values a JSON value has inside, at whatever depth: its commas and opening brackets."""
    return max(n_values for _, _, n_values in cut_array(body, 0))


def cut_array(body: bytes, begin: int, size: int = PART_BYTES) -> Iterator[tuple[int, int, int]]:
    """Cut what is left of an array behind a comma, or behind its bracket, at `begin`, into parts of about `size` bytes.

    Yield where each part begins and ends: with a comma of the array, or with the body. One that may be long is a
    single value, and comes with the number of values in it, at whatever depth; others come with 0.
    """
    position, n_values, depth, in_string, is_escaped = begin, 0, 1, 0, False
    while position < len(body) and depth > 0:
        chunk = body[position : position + size]
        if is_escaped or b"\\" in chunk:
            chunk = b"_" + chunk[1:] if is_escaped else chunk
            is_escaped = (len(chunk) - len(chunk.rstrip(b"\\"))) % 2 == 1
            chunk = chunk.replace(rb"\\", b"__").replace(rb"\"", b"__")
        data = np.frombuffer(chunk, np.uint8)
        inside = np.bitwise_xor.accumulate((data == QUOTE).view(np.uint8)) ^ np.uint8(in_string)
        levels = LEVELS[data] * (inside == 0)
        depths = depth + np.cumsum(levels, dtype=np.int64)
        commas = (data == COMMA) & (inside == 0)
        values = n_values + np.cumsum(commas | (levels > 0), dtype=np.int64)
        ends = np.flatnonzero(commas & (depths == 1))
        if depths.min() < 1:  # the array ends here
            ends = ends[ends < np.argmax(depths < 1)]
        n_values = int(values[-1])
        if len(ends):
            first, last = int(ends[0]), int(ends[-1])
            if position + first - begin > size:
                yield begin, position + first, int(values[first])
                begin = position + first + 1
            if begin <= position + last:
                yield begin, position + last, 0
                begin = position + last + 1
            n_values -= int(values[last])
        depth, in_string = int(depths[-1]) if depths.min() > 0 else 0, int(inside[-1])
        position += len(chunk)
    yield begin, len(body), n_values

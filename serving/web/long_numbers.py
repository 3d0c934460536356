"""Long JSON with long arrays of numbers in it, of which these are decoded in parts, straight to arrays of numpy.

Python's lock is held for no longer than a part takes, so other threads go on meanwhile. What is not as it should be is
left to the decoder of all other JSON, which says what is wrong.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import jiter
import numpy as np

from serving.errors import BadRequest
from serving.predictor.bodies import PART_BYTES, parse_json
from serving.predictor.inputs import Array

KEY = b'"data"'
COLON = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*(?=\[)")
BETWEEN = re.compile(rb"[ \t\r\n]*(,[ \t\r\n]*|$)")  # behind a part
MARK = "numbers of this request, array "  # in place of an array of them
IN_NUMBERS = np.zeros(256, bool)
IN_NUMBERS[[*b"0123456789+-.eE, \t\r\n[]nul"]] = True  # "nul" of null
DTYPES: dict[str, tuple[Any, set[type]]] = {  # and the types of elements that it can have as such
    "FP32": (np.float64, {int, float, type(None)}),
    "FP64": (np.float64, {int, float, type(None)}),
    "INT32": (np.int64, {int}),
    "INT64": (np.int64, {int}),
}
INT32_LIMIT = 2**31


class IrregularError(Exception):
    """Something is not as it should be."""


def parse_long(body: bytes) -> Any:
    """Return what `parse_json` returns, but arrays of numpy as the long `data` of inputs. Raises `BadRequest`."""
    places = [*_find(body)]
    if not places or MARK.encode() in body:
        return parse_json(body)
    begins, ends = [0, *(end for _, end in places)], [*(begin for begin, _ in places), len(body)]
    between = [body[begin:end] for begin, end in zip(begins, ends, strict=True)]
    marks = [b'["%b%d"]' % (MARK.encode(), number) for number in range(len(places))]
    try:
        payload = parse_json(b"".join(itertools.chain(*zip(between, [*marks, b""], strict=True))))
        left = {f"{MARK}{number}": place for number, place in enumerate(places)}
        for given in payload["inputs"]:
            data = given.get("data")
            if data and data[0] in left:
                given["data"] = _read(body, *left.pop(data[0]), given["shape"], given["datatype"])
    except (BadRequest, IrregularError, LookupError, TypeError, AttributeError, ValueError, OverflowError):
        return parse_json(body)
    return parse_json(body) if left else payload


def _find(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield where long arrays of numbers begin and end, whatever they have inside."""
    begin = body.find(KEY)
    while begin >= 0:
        begin += len(KEY)
        if (colon := COLON.match(body, begin)) is not None:
            begin = colon.end()
            end = begin + len(body[begin : _end_of_numbers(body, begin)].rstrip(b", \t\r\n"))
            if end - begin > PART_BYTES and body[end - 1 : end] == b"]":
                yield begin, end
            begin = end
        begin = body.find(KEY, begin)


def _end_of_numbers(body: bytes, begin: int) -> int:
    """Return where the first byte is that no array of numbers has."""
    for start in range(begin, len(body), PART_BYTES):
        part = np.frombuffer(body, np.uint8, min(PART_BYTES, len(body) - start), start)
        others = np.flatnonzero(~IN_NUMBERS[part])
        if len(others):
            return start + int(others[0])
    return len(body)


def _read(body: bytes, begin: int, end: int, shape: list[int], datatype: str) -> Array:
    """Return the elements of an array, flat. Raises `IrregularError`, and what jiter and numpy raise."""
    begin, end = begin + 1, end - 1  # its own brackets
    is_nested = body[begin : begin + PART_BYTES].lstrip().startswith(b"[")
    width = shape[1] if is_nested else 0
    dtype, kinds = DTYPES[datatype]
    parts: list[Array] = []
    while begin < end:
        cut = _cut(body, begin, end, b"]" if is_nested else b",")
        values = jiter.from_json(b"[%b]" % body[begin:cut], allow_inf_nan=False)
        if is_nested:
            if {*map(type, values)} != {list} or {*map(len, values)} != {width}:
                raise IrregularError
            values = [*itertools.chain.from_iterable(values)]
        if not values or not kinds.issuperset(map(type, values)):
            raise IrregularError
        parts.append(np.array(values, dtype))
        between = BETWEEN.match(body, cut, end)
        if between is None or (between[1] and between.end() == end):
            raise IrregularError
        begin = between.end()
    found = np.concatenate(parts)
    if len(found) != math.prod(shape):
        raise IrregularError
    if datatype == "INT32" and not -INT32_LIMIT <= found.min() <= found.max() < INT32_LIMIT:
        raise IrregularError
    return found


def _cut(body: bytes, begin: int, end: int, mark: bytes) -> int:
    """Return where a part ends that begins there: in front of a comma, behind a bracket, or with all."""
    if end - begin <= PART_BYTES:
        return end
    cut = body.rfind(mark, begin, begin + PART_BYTES)
    if cut < 0:
        raise IrregularError
    return cut if mark == b"," else cut + 1

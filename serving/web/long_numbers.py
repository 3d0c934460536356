"""Long JSON of /v2, which is decoded in parts: long arrays of numbers straight to arrays of numpy.

Python's lock is held for no longer than a part takes, so other threads go on meanwhile. All other data, and what is not
as it should be, is cut into parts too, of which each says what is wrong. What has too many values inside where no data
belongs is refused without decoding it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jiter
import numpy as np

from serving.errors import BadRequest, shorten
from serving.predictor.bodies import ARRAY, MAX_VALUES, PART_BYTES, count_values, cut_array, parse_json, relocate
from serving.predictor.inputs import Array
from serving.web.envelopes import BLANKS, COLUMN_BYTES, OBJECT, Long, open_object

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
SCALARS = {str, int, float, bool, type(None)}  # of which elements are


class IrregularError(Exception):
    """Something is not as it should be."""


def parse_long(body: bytes) -> Any:
    """Return what `parse_json` returns, but arrays of numpy as the long `data` of inputs. Raises `BadRequest`."""
    places = [*_find(body)]
    if not places or MARK.encode() in body:
        return _parse_in_parts(body)
    begins, ends = [0, *(end for _, end in places)], [*(begin for begin, _ in places), len(body)]
    between = [body[begin:end] for begin, end in zip(begins, ends, strict=True)]
    marks = [b'["%b%d"]' % (MARK.encode(), number) for number in range(len(places))]
    try:
        rest = b"".join(itertools.chain(*zip(between, [*marks, b""], strict=True)))
        _check_rest(rest)
        payload = parse_json(rest)
        left = {f"{MARK}{number}": place for number, place in enumerate(places)}
        for given in payload["inputs"]:
            data = given.get("data")
            if data and data[0] in left:
                given["data"] = _read(body, *left.pop(data[0]), given["shape"], given["datatype"])
    except (BadRequest, IrregularError, LookupError, TypeError, AttributeError, ValueError, OverflowError):
        return _parse_in_parts(body)
    return _parse_in_parts(body) if left else payload


def _find(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield where long arrays of numbers begin and end, whatever they have inside."""
    begin = body.find(KEY)
    while begin >= 0:
        begin += len(KEY)
        if (colon := COLON.match(body, begin)) is not None:
            begin = colon.end()
            end = begin + len(body[begin : _end_of_numbers(body, begin)].rstrip(b", \t\r\n"))
            if end - begin > COLUMN_BYTES and body[end - 1 : end] == b"]":
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


def _check_rest(rest: bytes) -> None:
    """Raise `BadRequest` for what has too many values in it to be decoded at once."""
    _refuse_large("the body", count_values(rest))


def _refuse_large(what: str, n_values: int) -> None:
    if n_values > MAX_VALUES:
        raise BadRequest(f"{what} has {n_values} values; send at most {MAX_VALUES} besides the data of inputs")


def _parse_in_parts(body: bytes) -> Any:
    """Return what `parse_json` returns. Raises `BadRequest`, also for what would take long to decode and is no data."""
    payload = _open(body)
    if isinstance(payload, dict):
        for name, value in payload.items():
            if isinstance(value, Long):
                payload[name] = (
                    _read_inputs(value.body) if name == "inputs" and value.is_array else _settle(name, value)
                )
    return payload


def _open(body: bytes) -> Any:
    if OBJECT.match(body) is None:
        _check_rest(body)
    return open_object(body, _check_rest)


def _settle(name: str, value: Long) -> Any:
    _refuse_large(shorten(name), value.n_values)
    return value.decode()


def _read_inputs(body: bytes) -> list[Any]:
    inputs: list[Any] = []
    for items in _read_array(body, lambda _, text: _read_input(text)):
        inputs += items
        _refuse_large("inputs", len(inputs))
    return inputs


def _read_input(body: bytes) -> Any:
    given = _open(body)
    if isinstance(given, dict):
        for name, value in given.items():
            if isinstance(value, Long):
                is_data = name == "data" and value.is_array
                given[name] = _read_data(value.body, given) if is_data else _settle(name, value)
    return given


def _read_data(body: bytes, given: dict[str, Any]) -> Any:
    """Return the elements of an input: an array of numbers, or a list, in the nesting that it has."""
    begin, end = ARRAY.match(body).end() - 1, len(body.rstrip(b" \t\r\n"))  # type: ignore[union-attr]
    try:
        if body[end - 1 : end] == b"]":
            return _read(body, begin, end, given["shape"], given["datatype"])
    except (IrregularError, LookupError, TypeError, ValueError, OverflowError):
        pass
    data: list[Any] = []
    for items in _read_array(body, _read_row):
        _check_elements(items)
        data += items
    return data


def _read_row(n_values: int, body: bytes) -> Any:
    """Return an element that is long: a text, or a row of elements."""
    if n_values <= MAX_VALUES or ARRAY.match(body) is None:
        _refuse_large("an element of data", n_values)
        return parse_json(body)
    row: list[Any] = []
    for items in _read_array(body, _read_text):
        _check_elements([items])
        row += items
    return row


def _read_text(n_values: int, body: bytes) -> Any:
    _refuse_large("an element of data", n_values)
    return parse_json(body)


def _check_elements(items: list[Any]) -> None:
    """Raise `BadRequest` for elements that no data has, before there are many of them."""
    rows = [item for item in items if type(item) is list]
    if (
        not (({*map(type, items)} - {list}) | {*map(type, itertools.chain.from_iterable(rows))} <= SCALARS)
        or [] in rows
    ):
        raise BadRequest("data should have texts, numbers, truths and null, or arrays of them, and no empty array")


def _read_array(body: bytes, read_long: Callable[[int, bytes], Any]) -> Iterator[list[Any]]:
    """Yield the items of an array, some at a time; long ones are read by `read_long`. Raises `BadRequest`.

    A number in front of a comma that comes before a part, and one behind a comma that follows, make nothing between two
    commas the mistake that it is.
    """
    first = ARRAY.match(body).end()  # type: ignore[union-attr]
    for begin, end, n_values in cut_array(body, first):
        is_last = end == len(body)
        stop = len(body.rstrip(b" \t\r\n")) - 1 if is_last else end
        if n_values and stop - begin > PART_BYTES and (not is_last or body[stop : stop + 1] == b"]"):
            yield [_read_placed(body, begin, stop, partial(read_long, n_values))]
            continue
        _refuse_large("an array that does not end", n_values)
        before, after = b"[" if begin == first else b"[0,", b"" if is_last else b",0]"
        part = before + body[begin:end] + after
        items = parse_json(part, partial(relocate, body, begin, len(before)))
        yield items[0 if begin == first else 1 : None if is_last else -1]


def _read_placed(body: bytes, begin: int, end: int, read: Callable[[bytes], Any]) -> Any:
    """Return what is read of a part of a body; errors name its place in the whole."""
    try:
        return read(body[begin:end])
    except BadRequest as error:
        if " at line " not in str(error.detail):
            raise
    return read(body[:begin].translate(BLANKS) + body[begin:end])

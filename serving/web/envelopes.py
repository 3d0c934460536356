"""The envelopes of the clouds: what is around the rows of a body, and around the answers to them.

A body has its rows under one of `KEYS`, or is rows alone, as `/predictions` takes them, or CSV. One over `PART_BYTES`
is opened without decoding what is long in it, which goes through the same parts as an array of `/predictions`, or
column by column. What has too many values inside to be decoded at once, and no rows, is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from serving.errors import BadRequest, listed
from serving.predictor.arrays import Arrays, count_byte
from serving.predictor.bodies import (
    ARRAY,
    LONG_BYTES,
    MAX_CELLS,
    MAX_VALUES,
    PART_BYTES,
    Layout,
    LongArray,
    count_values,
    cut_array,
    decode_apart,
    parse_json,
)
from serving.predictor.contract import Hints, Rows
from serving.predictor.predictions import Predictions
from serving.web.tables import (
    BareRows,
    ColumnTable,
    CSVTable,
    Place,
    Problems,
    RowTable,
    Table,
    check_columns,
    make_problem,
)

KEYS = ("instances", "dataframe_records", "dataframe_split", "inputs", "input_data")
PARAMETERS = ("parameters", "params")  # Vertex AI's word and MLflow's
OPTIONS = (*PARAMETERS, "signature_name")  # which TensorFlow Serving's clients send, and KServe's after them
SHORT_BYTES = 4096  # size of a body whose written values are decoded in no time
IN_COLUMNS = (b'"input', b"\\")  # one of these is in a body of columns: its key, or an escape in that
COLUMN_BYTES = 1024  # longest value that is decoded with others where these are many
CELL_BYTES = 20  # of a value in JSON, with its name
OBJECT = re.compile(rb"[ \t\r\n]*\{")
KEY = re.compile(rb'[ \t\r\n]*("[^"\\]*(?:\\.[^"\\]*)*")[ \t\r\n]*:[ \t\r\n]*', re.DOTALL)
BLANKS = bytes(ord("\n" if byte == ord("\n") else " ") for byte in range(256))  # which keep the places of errors


@dataclass(frozen=True)
class Long:
    """A value that is not decoded yet: a part of a body."""

    whole: bytes
    begin: int
    end: int
    n_values: int  # at whatever depth

    @property
    def body(self) -> bytes:
        """A body that ends with the value, and has blanks in place of what is before it."""
        return self.whole[: self.begin].translate(BLANKS) + self.whole[self.begin : self.end]

    def decode(self) -> Any:
        """Return it decoded. Raises `BadRequest`."""
        try:
            return parse_json(self.whole[self.begin : self.end])
        except BadRequest:
            return parse_json(self.body)  # which says where it is no JSON

    @property
    def is_array(self) -> bool:
        """Whether it is an array."""
        return ARRAY.match(self.whole, self.begin) is not None


@dataclass(frozen=True)
class LongRows:
    """An array of rows that is not decoded yet."""

    body: bytes
    layout: Layout | None  # None for objects


def open_object(body: bytes, check: Callable[[bytes], None]) -> Any:
    """Decode JSON, but of a long object no long values, each of which is `Long`. Raises `BadRequest`.

    Where many values would be left, shorter ones are no longer decoded either. What is to be decoded of a long object
    is shown to `check`, which raises if that would take long. A long object that does not end is not decoded.
    """
    start = OBJECT.match(body)
    if len(body) <= PART_BYTES or start is None:
        return parse_json(body)
    last = len(body.rstrip(b" \t\r\n")) - 1
    if body[last : last + 1] != b"}":
        if count_values(body) > MAX_VALUES:
            raise BadRequest("the body is not JSON: an object in it does not end with '}'")
        return parse_json(body)  # which says where it is no JSON
    rest, long = _set_aside(body, start.end(), last, PART_BYTES)
    if count_values(rest) > MAX_VALUES:
        rest, long = _set_aside(body, start.end(), last, COLUMN_BYTES)
    check(rest)
    return parse_json(rest) | long


def _set_aside(body: bytes, start: int, last: int, size: int) -> tuple[bytes, dict[str, Long]]:
    """Return an object with a digit in place of each value of more bytes than `size`, and these by their keys."""
    pieces, long = [body[:start]], {}
    for begin, end, n_values in cut_array(body, start, size):
        stop = last if end == len(body) else end
        key = KEY.match(body, begin) if n_values and stop - begin > size else None
        if key is None:
            pieces.append(body[begin:end])
        else:
            value = body[key.end() : stop]
            long[parse_json(key[1])] = Long(body, key.end(), stop, n_values)
            pieces += [key[0], b"0", _filler(value), body[stop:end]]
        if end < len(body):
            pieces.append(b",")
    return b"".join(pieces), long


def _filler(value: bytes) -> bytes:
    """Return blanks that, behind a digit, take as many lines and columns as a value."""
    n_lines = value.count(b"\n")
    return b"\n" * n_lines + b" " * (len(value) - value.rfind(b"\n") - 1 - (0 if n_lines else 1))


class Envelope:
    """A body with rows in it, and the answers to them in the envelope that clients of the clouds expect."""

    def __init__(self, arrays: Arrays, body: bytes, max_rows: int, is_csv: bool = False) -> None:
        self.n_rows = 0  # once it is decoded
        self.is_full = False  # whole answers, not predictions alone
        self._arrays, self._contract = arrays, arrays.contract
        self._body, self._max_rows, self._is_csv = body, max_rows, is_csv
        n_cells = len(arrays.contract.names) * self.max_rows_in_it
        size = len(body)  # in bytes, or about those of its rows as objects: they tell how long decoding takes
        if len(body) > SHORT_BYTES:
            size = max(len(body), CELL_BYTES * n_cells)
        has_many = n_cells > MAX_CELLS and bool(arrays.contract.nullable)  # which need not be written
        self.is_long, self.takes_long = size > PART_BYTES or has_many, size > LONG_BYTES or has_many

    @property
    def max_rows_in_it(self) -> int:
        """The number of rows before they are decoded; more would be refused."""
        if self._is_csv:
            return min(self._max_rows, max(1, count_byte(self._body, ord("\n"))))
        n_rows = max(1, *(count_byte(self._body, mark) for mark in b"{["))
        if len(self._contract.names) == 1 or any(mark in self._body for mark in IN_COLUMNS):
            n_needed = max(1, len(self._contract.names) - len(self._contract.nullable))
            n_rows = max(n_rows, count_byte(self._body, ord(",")) // n_needed + 1)
        return min(self._max_rows, n_rows)

    def read_rows(self) -> Rows:
        """Return the rows of a short body. Raises `ServingError`."""
        source = self._open(self._body)
        rows = [] if isinstance(source, LongRows) else [*itertools.chain(*source.pieces(self._max_rows))]
        self.n_rows = len(rows)
        return rows

    def decode(self) -> Any:
        """Return X, or None where there are no rows. Raises `ServingError`."""
        body, self._body = self._body, b""
        parts = decode_apart(partial(self._read_parts, body))
        X = self._arrays.join(parts) if parts else None
        self.n_rows = 0 if X is None else len(X)
        return X

    def _read_parts(self, body: bytes) -> list[Any]:
        source = self._open(body)
        if isinstance(source, LongRows):
            return LongArray(self._arrays, source.body, self._max_rows, source.layout).read()
        return source.parts(self._max_rows)

    def _open(self, body: bytes) -> Table | LongRows:
        if self._is_csv:
            return CSVTable(self._arrays, body)
        if self.is_long and ARRAY.match(body):
            return LongRows(body, None)
        payload = open_object(body, partial(self._check_rest, ["body"]))
        if not isinstance(payload, dict):
            return BareRows(self._arrays, payload)
        keys = [key for key in KEYS if key in payload and self._is_meant(key, payload[key])]
        if not keys:
            return self._open_row(payload)
        if len(keys) > 1 or len(payload) > 1:
            self._read_options(keys[0], payload)
        return self._open_table(["body", keys[0]], payload[keys[0]])

    def _is_meant(self, key: str, value: Any) -> bool:
        """Return whether a key is the envelope's, and no feature that is called the same."""
        return isinstance(value, list | dict | Long) or key not in self._contract.features

    def _open_row(self, payload: dict[str, Any]) -> Table:
        """Return the table of an object that has no key of an envelope: a row, if it has a feature."""
        for name, value in payload.items():
            if isinstance(value, Long):
                raise self._contract.refusal([self._contract.too_large(["body", name], value.n_values)])
        if payload.keys() & self._contract.features.keys():
            return BareRows(self._arrays, payload)
        unknown = next((name for name in payload if name not in OPTIONS), None)
        if unknown is None:
            message = f"Send a row, or rows under one of {listed(KEYS)}"
            raise self._contract.refusal([make_problem("missing", ["body"], message, payload)])
        message = Hints().add("Unknown key", unknown, KEYS)
        raise self._contract.refusal([make_problem("extra_forbidden", ["body", unknown], message, payload[unknown])])

    def _read_options(self, key: str, payload: Mapping[str, Any]) -> None:
        """Read what is beside the rows. Raises `Unprocessable`."""
        options = {name: self._settle(["body", name], payload[name]) for name in OPTIONS if name in payload}
        problems = [*itertools.islice(_find_problems(key, payload, options), MAX_VALUES)]
        if problems:
            raise self._contract.refusal(problems)
        self.is_full = any(bool((options.get(name) or {}).get("full")) for name in PARAMETERS)

    def _open_table(self, place: Place, value: Any) -> Table | LongRows:
        key, is_long_array = place[-1], isinstance(value, Long) and value.is_array
        is_object = isinstance(value, dict) or (isinstance(value, Long) and not is_long_array)
        if key in ("inputs", "input_data", "dataframe_split") and is_object:
            columns = value if isinstance(value, dict) else open_object(value.body, partial(self._check_rest, place))
            if isinstance(columns, dict):
                return self._open_columns(place, columns)
        if key == "dataframe_split" or not (isinstance(value, list) or is_long_array):
            what = {"dataframe_split": SPLIT, "inputs": f"{ROWS} or of columns", "input_data": f"{ROWS} or {SPLIT}"}
            message = f"Input should be {what.get(key, ROWS)}"
            raise self._contract.refusal([make_problem("table_type", place, message, _shown(value))])
        return self._open_rows(place, value, None if key == "dataframe_records" else self._contract.names)

    def _open_columns(self, place: Place, columns: dict[str, Any]) -> Table | LongRows:
        names = {"columns", "data"} & (columns.keys() - self._contract.features.keys())
        if place[-1] == "dataframe_split" or (place[-1] == "input_data" and names):
            return self._open_frame(place, columns)
        for name, value in columns.items():
            if isinstance(value, Long):
                columns[name] = self._settle([*place, name], value)
        return ColumnTable(self._arrays, place, columns)

    def _open_frame(self, place: Place, frame: dict[str, Any]) -> Table | LongRows:
        """Return the table of a frame that is split into columns and data. Its index is not used."""
        problems = [
            make_problem("extra_forbidden", [*place, name], Hints().add("Unknown key", name, FRAME), _shown(value))
            for name, value in itertools.islice(frame.items(), MAX_VALUES)
            if name not in FRAME
        ]
        problems += [
            make_problem("missing", [*place, name], "Field required", None)
            for name in FRAME
            if name not in {*frame, "index"}
        ]
        settled = {name: self._settle([*place, name], frame[name]) for name in ("columns", "index") if name in frame}
        columns, data = settled.get("columns", []), frame.get("data", [])
        is_array = isinstance(data, list) or (isinstance(data, Long) and data.is_array)
        for name, value, fits in (("columns", columns, isinstance(columns, list)), ("data", data, is_array)):
            if not fits:
                problems.append(make_problem("list_type", [*place, name], "Input should be an array", _shown(value)))
        if problems:
            raise self._contract.refusal(problems)
        whole = [*place, "columns"]
        check_columns(self._contract, columns, lambda number: [*whole, number], whole)
        return self._open_rows([*place, "data"], data, columns, takes_objects=False)

    def _open_rows(
        self, place: Place, value: Any, columns: list[str] | None, takes_objects: bool = True
    ) -> Table | LongRows:
        if isinstance(value, Long):
            return LongRows(value.body, RowTable(self._arrays, place, (), columns, takes_objects))
        return RowTable(self._arrays, place, value, columns, takes_objects)

    def _settle(self, place: Place, value: Any) -> Any:
        """Return a value that has no rows in it, decoded. Raises `ServingError`."""
        if not isinstance(value, Long):
            return value
        self._refuse_large(place, value.n_values)
        return value.decode()

    def _check_rest(self, place: Place, rest: bytes) -> None:
        """Raise `Unprocessable` for an object with too many keys or values to be decoded at once.

        There are no more keys than colons, of which there are more in texts alone. Of each column only some values are
        left, and no brackets in it.
        """
        self._refuse_large(place, count_byte(rest, ord(":")))
        self._refuse_large(place, sum(count_byte(rest, mark) for mark in b"{["))
        n_values = count_values(rest)
        if n_values > COLUMN_BYTES // 2 * len(self._contract.names) + MAX_VALUES:
            raise self._contract.refusal([self._contract.too_large(place, n_values)])

    def _refuse_large(self, place: Place, n_values: int) -> None:
        """Raise `Unprocessable` for what has too many values in it to be decoded at once."""
        if n_values > len(self._contract.names) + max(MAX_VALUES, self._max_rows):
            raise self._contract.refusal([self._contract.too_large(place, n_values)])

    def encode(self, predictions: Predictions | None) -> list[bytes]:
        """Return the pieces of the answer in JSON."""
        if predictions is None:
            return [b'{"predictions":[]}']
        chosen = predictions if self.is_full else predictions.only("prediction")
        pieces = chosen.render_array(self.n_rows)
        pieces[0] = b'{"predictions":' + pieces[0]
        pieces[-1] += b"}"
        return pieces


FRAME = ("columns", "index", "data")
ROWS = "an array of rows"
SPLIT = "an object with 'columns' and 'data'"


def _shown(value: Any) -> Any:
    """Return a value for a message, or None for one that is not decoded."""
    return None if isinstance(value, Long) else value


def _find_problems(key: str, payload: Mapping[str, Any], options: Mapping[str, Any]) -> Problems:
    """Yield what is wrong with what is beside the rows under a key."""
    hints = Hints()
    for name, value in payload.items():
        if name in KEYS and name != key:
            message = f"Send the rows once, as {key!r} or as {name!r}"
            yield make_problem("repeated", ["body", name], message, _shown(value))
        elif name != key and name not in OPTIONS:
            message = hints.add("Unknown key", name, [*KEYS, *OPTIONS])
            yield make_problem("extra_forbidden", ["body", name], message, _shown(value))
    if not isinstance(options.get("signature_name"), str | None):
        yield make_problem(
            "string_type", ["body", "signature_name"], "Input should be a text", options["signature_name"]
        )
    for name in PARAMETERS:
        yield from _find_problems_of_parameters(["body", name], options.get(name))


def _find_problems_of_parameters(place: Place, parameters: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(parameters, dict | None):
        yield make_problem("dict_type", place, 'Input should be an object, such as {"full":true}', parameters)
        return
    for name, value in (parameters or {}).items():
        if name != "full":
            yield make_problem("extra_forbidden", [*place, name], "Unknown parameter; use 'full'", value)
        elif not isinstance(value, bool | None):
            yield make_problem("bool_type", [*place, name], "Input should be true or false", value)

"""Tables as others send them: lists of rows, columns, and CSV. Each becomes checked rows, or problems in its own terms.

A table knows its place in the body, and no envelope.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from serving.errors import BadRequest, listed, shorten
from serving.predictor.arrays import Arrays
from serving.predictor.bodies import MAX_VALUES, too_many_rows
from serving.predictor.contract import Contract, Hints, Rows
from serving.predictor.inputs import Array

FIRST_OBJECT = re.compile(rb"\[[ \t\r\n]*\{")
NUMERIC = b"0123456789+-.eE,\r\n"
PIECE_CELLS = 65_536  # cells that are checked at once

Place = list[Any]  # the beginning of a `loc`
Problems = Iterator[dict[str, Any]]


class Table(Protocol):
    """Rows that are not checked yet."""

    def pieces(self, max_rows: int) -> Iterator[Rows]:
        """Yield the checked rows, some at a time. Raises `ServingError`."""

    def parts(self, max_rows: int) -> list[Any]:
        """Return X in parts. Raises `ServingError`."""


def parts_of_rows(arrays: Arrays, pieces: Iterable[Rows]) -> list[Any]:
    return [arrays.of_rows(rows) for rows in pieces if rows]


def make_problem(kind: str, loc: Place, message: str, given: Any) -> dict[str, Any]:
    """Return a problem as the contract describes it."""
    return {"type": kind, "loc": loc, "msg": message, "input": shorten(given)}


def rows_at_once(contract: Contract) -> int:
    return max(1, PIECE_CELLS // len(contract.names))


def check_columns(contract: Contract, columns: Sequence[Any], where: Callable[[int], Place], whole: Place) -> None:
    """Raise `Unprocessable` unless columns are the features, in any order. One that may be missing may be left out.

    `where` returns the place of a column by its number, and `whole` is that of all of them.
    """
    counts = Counter(column for column in columns if isinstance(column, str))
    needed = contract.features.keys() - counts.keys() - {*contract.nullable}
    is_each_once = counts.total() == len(columns) == len(counts)
    if is_each_once and not needed and counts.keys() <= contract.features.keys():
        return

    def find() -> Problems:
        hints = Hints()
        for number, column in enumerate(columns):
            if not isinstance(column, str):
                yield make_problem("string_type", where(number), "Input should be the name of a feature", column)
            elif column not in contract.features:
                message = hints.add("Unknown feature", column, contract.names)
                yield make_problem("extra_forbidden", where(number), message, column)
            elif counts[column] > 1:
                yield make_problem("repeated", where(number), "Give this column once", column)
        for name in contract.names:
            if name in needed:
                yield make_problem("missing", [*whole, name], "Field required", None)

    raise contract.refusal(find())


class BareRows:
    """One row or an array of them, as `/predictions` takes them."""

    def __init__(self, arrays: Arrays, payload: Any) -> None:
        self.arrays, self.contract = arrays, arrays.contract
        self.payload = payload

    def pieces(self, max_rows: int) -> Iterator[Rows]:
        """Yield the checked rows. Raises `ServingError`."""
        if isinstance(self.payload, list) and len(self.payload) > max_rows:
            raise too_many_rows(len(self.payload), max_rows)
        yield self.contract.parse_payload(self.payload)

    def parts(self, max_rows: int) -> list[Any]:
        """Return X in parts. Raises `ServingError`."""
        return parts_of_rows(self.arrays, self.pieces(max_rows))


class RowTable:
    """An array of rows at a place of the body: lists of values, one for each of the `columns`, or objects, or both.

    Of a model with one feature a row can be its value alone. It is a `Layout` of a long array too.
    """

    def __init__(
        self,
        arrays: Arrays,
        place: Place,
        items: Sequence[Any] = (),
        columns: Sequence[str] | None = None,
        takes_objects: bool = True,
    ) -> None:
        self.arrays, self.contract = arrays, arrays.contract
        self.place, self.items = place, items
        self.columns = columns
        self._takes_objects = takes_objects
        self._takes_values = takes_objects and columns is not None and len(columns) == 1
        numbers = {name: position for position, name in enumerate(columns or ())}
        is_whole = arrays.are_numbers and numbers.keys() == {*arrays.order}
        self._positions = [numbers[name] for name in arrays.order] if is_whole else None

    def pieces(self, max_rows: int) -> Iterator[Rows]:
        """Yield the checked rows, some at a time. Raises `ServingError`."""
        if len(self.items) > max_rows:
            raise too_many_rows(len(self.items), max_rows)
        step = rows_at_once(self.contract)
        for first in range(0, len(self.items), step):
            rows = self.check(self.items[first : first + step])
            if rows is None:
                raise self.contract.refusal(self.find_problems(self.items[first:], first))
            yield rows

    def parts(self, max_rows: int) -> list[Any]:
        """Return X in parts. Raises `ServingError`."""
        return parts_of_rows(self.arrays, self.pieces(max_rows))

    def of_numbers_in(self, part: bytes) -> Array | None:
        """Return X for a JSON array of rows of numbers, or None if one may not fit."""
        if self._takes_objects and FIRST_OBJECT.match(part):
            return self.arrays.of_numbers_in(part)
        return self.arrays.of_lists_in(part, self._positions) if self._positions else None

    def check(self, payload: Any) -> Rows | None:
        """Return the rows of an array, or None if one does not fit."""
        rows = [self._as_object(item) for item in payload]
        return None if None in rows else self.contract.check(rows)

    def _as_object(self, item: Any) -> dict[str, Any] | None:
        if isinstance(item, dict):
            return item if self._takes_objects else None
        if isinstance(item, list):
            fits = self.columns is not None and len(item) == len(self.columns)
            return dict(zip(self.columns or (), item, strict=True)) if fits else None
        return {self.columns[0]: item} if self._takes_values and self.columns else None

    def find_problems(self, payload: Any, first: int = 0, hints: Hints | None = None) -> Problems:
        """Yield what is wrong with an array, whose first row has the number `first`."""
        hints = hints or Hints()
        for index, item in enumerate(payload, first):
            row = self._as_object(item)
            if row is None:
                yield self._misfit([*self.place, index], item)
                continue
            for problem in self.contract.find_problems([row], index, hints):
                yield {**problem, "loc": [*self.place, *problem["loc"][1:]]}

    def _misfit(self, loc: Place, item: Any) -> dict[str, Any]:
        """Return the problem of a row that is no object, and no list of the right length."""
        if not isinstance(item, list) or self.columns is None:
            kinds = ["an object"] if self._takes_objects else []
            kinds += [] if self.columns is None else [f"an array of {len(self.columns)} values"]
            return make_problem("row_type", loc, f"Input should be {' or '.join(kinds)}", item)
        return wrong_length(loc, "Row", "values", item, self.columns)

    def find_shape(self, payload: Any, is_whole: bool) -> None:
        """Return None: the place of an array in an envelope tells its shape."""

    def too_large(self, place: Place, n_values: int) -> dict[str, Any]:
        """Return the problem of a row that has too many values in it to be decoded."""
        return self.contract.too_large([*self.place, *place[1:]], n_values)


def wrong_length(loc: Place, what: str, of: str, given: Sequence[Any], columns: Sequence[str]) -> dict[str, Any]:
    kind = "too_short" if len(given) < len(columns) else "too_long"
    message = f"{what} should have {len(columns)} {of}, not {len(given)}: {listed(columns)}"
    return make_problem(kind, loc, message, [*given])


class ColumnTable:
    """Columns by name at a place of the body, as lists of one length."""

    def __init__(self, arrays: Arrays, place: Place, columns: Mapping[str, Any]) -> None:
        self.arrays, self.contract = arrays, arrays.contract
        self.place, self.columns = place, columns

    def pieces(self, max_rows: int) -> Iterator[Rows]:
        """Yield the checked rows, some at a time. Raises `ServingError`."""
        n_rows = self._check_shape(max_rows)
        step = rows_at_once(self.contract)
        for first in range(0, n_rows, step):
            rows = [*self._rows(first, first + step)]
            checked = self.contract.check(rows)
            if checked is None:
                raise self.contract.refusal(self._find_problems(first))
            yield checked

    def parts(self, max_rows: int) -> list[Any]:
        """Return X in parts. Raises `ServingError`."""
        X = self.arrays.of_lists(self.columns) if self._check_shape(max_rows) else None
        return parts_of_rows(self.arrays, self.pieces(max_rows)) if X is None else [X]

    def _check_shape(self, max_rows: int) -> int:
        """Return the number of rows. Raises `ServingError` where there are other columns, or of several lengths."""
        names = [*self.columns]
        check_columns(self.contract, names, lambda number: [*self.place, names[number]], self.place)
        lengths = {name: len(cells) for name, cells in self.columns.items() if isinstance(cells, list)}
        n_rows = next(iter(lengths.values()), 0)
        if len(lengths) < len(names) or {*lengths.values()} - {n_rows}:
            raise self.contract.refusal(self._find_misshapen(lengths))
        if n_rows > max_rows:
            raise too_many_rows(n_rows, max_rows)
        return n_rows

    def _rows(self, first: int, end: int | None) -> Iterator[dict[str, Any]]:
        cells = (itertools.islice(column, first, end) for column in self.columns.values())
        return (dict(zip(self.columns, row, strict=True)) for row in zip(*cells, strict=True))

    def _find_problems(self, first: int) -> Problems:
        hints = Hints()
        for index, row in enumerate(self._rows(first, None), first):
            for problem in self.contract.find_problems([row], index, hints):
                name = problem["loc"][-1]
                yield {**problem, "loc": [*self.place, name, index]}

    def _find_misshapen(self, lengths: Mapping[str, int]) -> Problems:
        """Yield the columns that are no lists, and those of another length than the first."""
        first = next(iter(lengths), "")
        for name, cells in self.columns.items():
            if name not in lengths:
                yield make_problem("list_type", [*self.place, name], "Input should be an array", cells)
            elif lengths[name] != lengths[first]:
                message = f"Column has {lengths[name]} values; {first!r} has {lengths[first]}"
                yield make_problem("unequal_lengths", [*self.place, name], message, cells)


class CSVTable:
    """Lines of CSV (RFC 4180), of which the first has the names of the columns."""

    def __init__(self, arrays: Arrays, body: bytes) -> None:
        self.arrays, self.contract = arrays, arrays.contract
        self._body = body

    def pieces(self, max_rows: int) -> Iterator[Rows]:
        """Yield the checked rows, some at a time. Raises `ServingError`.

        That the body is no CSV comes first, wherever that is, and then that it has too many rows.
        """
        n_rows = sum(1 for _ in self._lines()) - 1
        if n_rows < 0:
            raise BadRequest("the body is empty; send a line with the features' names, and then a line for each row")
        if n_rows > max_rows:
            raise too_many_rows(n_rows, max_rows)
        lines = self._lines()
        columns = self._check_header(next(lines))
        step = rows_at_once(self.contract)
        while piece := [*itertools.islice(lines, step)]:
            rows = [self._check_line(columns, cells) for _, cells in piece]
            if None in rows:
                raise self.contract.refusal(self._find_problems(columns, itertools.chain(piece, lines)))
            yield [row for row in rows if row is not None]

    def parts(self, max_rows: int) -> list[Any]:
        """Return X in parts. Raises `ServingError`."""
        parts = self._parts_of_numbers()
        if parts is None:
            return parts_of_rows(self.arrays, self.pieces(max_rows))
        if (n_rows := sum(map(len, parts))) > max_rows:
            raise too_many_rows(n_rows, max_rows)
        return parts

    def _parts_of_numbers(self) -> list[Array] | None:
        """Return X in parts for numbers alone, in a small part of the time that checking each line takes.

        None if there may be something else, or something wrong.
        """
        order = self.arrays.order
        header, _, rest = self._body.partition(b"\n")
        if not self.arrays.are_numbers or header.count(b",") + 1 != len(order) or rest.translate(None, NUMERIC):
            return None
        columns = header.rstrip(b"\r").decode("latin-1").split(",")
        if {*columns} != {*order}:
            return None
        positions = [columns.index(name) for name in order]
        lines, parts = io.TextIOWrapper(io.BytesIO(rest), "ascii"), list[Array]()
        while piece := [*itertools.islice(lines, rows_at_once(self.contract))]:
            if filled := [line for line in piece if line != "\n"]:
                X = self._read_numbers(filled, positions)
                if X is None:
                    return None
                parts.append(X)
        return parts

    def _read_numbers(self, lines: Sequence[str], positions: Sequence[int]) -> Array | None:
        """Return X for lines of numbers between commas, without white space inside; None if one may not fit."""
        try:
            X = np.loadtxt(lines, np.float64, delimiter=",", ndmin=2, comments=None)
        except ValueError:
            return None
        return self.arrays.of_matrix(X[:, positions]) if X.shape[1] == len(positions) else None

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the cells of each line that is not empty, with its number. Raises `BadRequest`."""
        text = io.TextIOWrapper(io.BytesIO(self._body), "utf-8-sig", newline="")
        reader = csv.reader(map(self._refuse_wide, text), strict=True)
        number = 1
        try:
            for cells in reader:
                if cells:
                    yield number, cells
                number = reader.line_num + 1
        except csv.Error as error:
            raise BadRequest(f"the body is not CSV: {error} in line {reader.line_num or 1}") from None
        except UnicodeDecodeError:
            raise BadRequest("the body is not CSV: encode it as UTF-8") from None

    def _refuse_wide(self, line: str) -> str:
        """Return a line. Raises `Unprocessable` for one with too many cells to be taken apart."""
        n_cells = line.count(",") + 1
        if n_cells > len(self.contract.names) + MAX_VALUES:
            message = f"Line should have {len(self.contract.names)} cells, not {n_cells}"
            raise self.contract.refusal([make_problem("too_long", ["body"], message, None)])
        return line

    def _check_header(self, line: tuple[int, list[str]]) -> list[str]:
        number, columns = line
        if not self.contract.features.keys() & {*columns}:
            message = f"The first line should name the features: {listed(self.contract.names)}"
            raise self.contract.refusal([make_problem("header", ["body", number], message, columns)])
        check_columns(self.contract, columns, lambda column: ["body", number, columns[column]], ["body", number])
        return columns

    def _check_line(self, columns: list[str], cells: list[str]) -> dict[str, Any] | None:
        if len(cells) != len(columns):
            return None
        return self.contract.check_texts(dict(zip(columns, cells, strict=True)))

    def _find_problems(self, columns: list[str], lines: Iterable[tuple[int, list[str]]]) -> Problems:
        hints = Hints()
        for number, cells in lines:
            if len(cells) != len(columns):
                yield wrong_length(["body", number], "Line", "cells", cells, columns)
            else:
                row = dict(zip(columns, cells, strict=True))
                yield from self.contract.find_problems_of_texts(row, ["body", number], hints)

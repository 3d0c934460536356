"""Columns of cells → X. What numpy can check of a column as a whole needs no Python object for each of its numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from serving.predictor.arrays import Arrays, Checked
from serving.predictor.contract import Contract, Hints, Rows
from serving.predictor.features import NUMBER_RANGES, FeatureSettings, bounds_of, within
from serving.predictor.inputs import Array

Cells = Array | list[Any]  # numbers or truths, or values of any kind as JSON has them
PART_ROWS = 1000  # rows that are checked at once, where numpy cannot check the columns


class Columns:
    """The cells of n_rows rows: a column for each feature that is given, by its name, or `flat`, row after row.

    NaN in an array is a missing value where the feature may be missing, and in those of `nulls` it was null. A feature
    that is left out is missing in all rows.
    """

    def __init__(
        self,
        contract: Contract,
        n_rows: int,
        by_name: Mapping[str, Cells] | None = None,
        flat: Cells | None = None,
        nulls: Collection[str] = (),
    ) -> None:
        self.n_rows = n_rows
        self._nullable = [*nulls, *contract.nullable]
        self._contract, self._by_name, self._flat = contract, by_name or {}, flat

    def rows(self, start: int = 0, stop: int | None = None) -> list[dict[str, Any]]:
        """Return rows that the contract has not checked."""
        stop = self.n_rows if stop is None else min(stop, self.n_rows)
        if self._flat is not None:
            names = self._contract.names
            width = len(names)
            cells = _tell(self._flat[start * width : stop * width])
            rows = [dict(zip(names, cells[at : at + width], strict=True)) for at in range(0, len(cells), width)]
        else:
            columns = [_tell(cells[start:stop]) for cells in self._by_name.values()]
            rows = [dict(zip(self._by_name, row, strict=True)) for row in zip(*columns, strict=True)]
        for name in self._nullable if self._nullable and self._has_nan() else ():
            for row in rows:
                if _is_nan(row.get(name)):
                    row[name] = None
        return rows

    def _has_nan(self) -> bool:
        """Whether cells may be NaN, which those that come as JSON are not."""
        arrays = self._by_name.values() if self._flat is None else [self._flat]
        return any(isinstance(cells, np.ndarray) and cells.dtype.kind == "f" for cells in arrays)

    def read(self, arrays: Arrays) -> Any:
        """Return X. Raises `Unprocessable`, which names each bad cell as that of a row."""
        X = self._read_quickly(arrays)
        return self._read_rows(arrays) if X is None else X

    def _read_quickly(self, arrays: Arrays) -> Any:
        """Return X by numpy alone, or None if a cell may not fit."""
        contract = self._contract
        by_name = self._by_name
        if self._flat is not None:
            width = len(contract.names)
            if arrays.has_bounds and isinstance(self._flat, np.ndarray):
                return arrays.of_matrix(self._flat.reshape(self.n_rows, width))
            by_name = {name: self._flat[place::width] for place, name in enumerate(contract.names)}
        checked: dict[str, Checked] = {}
        for name, cells in by_name.items():
            column = check_cells(contract.features[name], cells)
            if column is None:
                return None
            checked[name] = column
        return arrays.of_columns(checked, self.n_rows)

    def _read_rows(self, arrays: Arrays) -> Any:
        parts: list[Any] = []
        for start in range(0, self.n_rows, PART_ROWS):
            rows: Rows | None = self._contract.check(self.rows(start, start + PART_ROWS))
            if rows is None:
                raise self._contract.refusal(self._find_problems(start))
            parts.append(arrays.of_rows(rows))
        return arrays.join(parts)

    def _find_problems(self, start: int) -> Iterator[dict[str, Any]]:
        hints = Hints()
        for first in range(start, self.n_rows, PART_ROWS):
            yield from self._contract.find_problems(self.rows(first, first + PART_ROWS), first, hints)


def _tell(cells: Cells) -> list[Any]:
    return cells if isinstance(cells, list) else cells.tolist()


def _is_nan(value: Any) -> bool:
    return type(value) is float and math.isnan(value)


def check_cells(feature: FeatureSettings, cells: Cells) -> Checked | None:
    """Return a column as X takes it, or None if one of its cells may not fit, which the contract then says."""
    if isinstance(cells, list):
        return _check_texts(feature, cells) if feature.type == "str" else None
    is_truth = cells.dtype.kind == "b"
    if feature.type == "str" or (is_truth and feature.type != "bool"):
        return None
    if feature.type == "bool" and not is_truth and not feature._is_number:
        return None
    missing = np.isnan(cells) if feature.missing and cells.dtype.kind == "f" else None
    if missing is None or not missing.any():
        return _check_numbers(feature, cells, None)
    return _check_numbers(feature, np.where(missing, _some_number(feature), cells), missing)


def _some_number(feature: FeatureSettings) -> float:
    """Return a number that fits, for the place of one that is missing."""
    if feature.choices is not None:
        return float(feature.choices[0])
    return 0.0 if feature.type == "bool" else within(0.0, feature)


def _check_texts(feature: FeatureSettings, cells: list[Any]) -> Checked | None:
    known = {*cells} if {*map(type, cells)} <= {str, type(None)} else {0}
    if not feature.missing and None in known:
        return None
    known.discard(None)
    fits = known <= {*feature.choices} if feature.choices is not None else 0 not in known
    return Checked(cells) if fits else None


def _check_numbers(feature: FeatureSettings, cells: Array, missing: Array | None) -> Checked | None:
    """Return numbers, or truths, if all of them fit; those in the place of `missing` ones do."""
    if feature.type == "bool":
        numbers = cells.astype(np.float64)
        choices = [0, 1] if feature.choices is None else feature.choices
        return Checked(numbers.astype(bool), missing) if np.isin(numbers, choices).all() else None
    if feature.type == "int" and cells.dtype.kind == "f" and not _are_whole(cells):
        return None
    numbers = cells.astype(np.int64 if feature.type == "int" else np.float64)
    if feature.choices is not None:
        return Checked(numbers, missing) if np.isin(numbers, feature.choices).all() else None
    low, high = (int(bound) if feature.type == "int" else bound for bound in bounds_of(feature))
    return Checked(numbers, missing) if ((numbers >= low) & (numbers <= high)).all() else None


def _are_whole(cells: Array) -> bool:
    """Whether all floats are integers, and none so large that it may stand for another one."""
    return bool(((np.abs(cells) < NUMBER_RANGES["int"]) & (cells == np.trunc(cells))).all())

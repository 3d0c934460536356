"""From checked rows to what an estimator takes: X, a DataFrame, or texts."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jiter
import numpy as np

from serving.errors import ModelError
from serving.predictor.contract import Contract, Rows
from serving.predictor.features import FeatureSettings, bounds_of
from serving.predictor.inputs import Array, Column, Form, is_nan

Words = Literal["category", "str", "object"]  # types of a DataFrame's column of texts


@dataclass(frozen=True, slots=True)
class Checked:
    """A column of cells that fit: numbers or truths, of which some are `missing`, or a list with None for missing."""

    values: Array | list[Any]
    missing: Array | None = None

    def filled(self, null: Any, dtype: Any) -> Array:
        """Return an array of numbers or truths, with `null` where one is missing."""
        filled = np.array(self.values, dtype)
        if self.missing is not None:
            filled[self.missing] = null
        return filled

    def tell(self, null: Any) -> list[Any]:
        """Return a list, with `null` where a cell is missing."""
        if isinstance(self.values, list):
            return [null if value is None else value for value in self.values]
        cells: list[Any] = self.values.tolist()
        for place in () if self.missing is None else np.flatnonzero(self.missing):
            cells[place] = null
        return cells


class Arrays:
    """Checked rows as the estimator takes them: X of shape (n_samples, n_features), a DataFrame, or texts.

    `form` and `words` are two of those that `list_forms` and `list_words` say, by default the first. Raises
    `ModelError` where a DataFrame is needed without pandas.
    """

    def __init__(self, contract: Contract, form: Form | None = None, words: Words | None = None) -> None:
        self.contract = contract
        self.order = list(contract.columns)  # the columns of X
        features = contract.features
        used = {name: column for name, column in contract.columns.items() if column is not None}
        objects = _are_objects(contract)
        self.form = form or list_forms(contract)[0]
        is_array = self.form == "array" and not objects
        self.are_numbers = is_array and not contract.nullable and contract.names == self.order
        self._dtype = object if objects else np.float64
        self._bounds = _find_bounds([*features.values()]) if self.are_numbers else None
        names = b"".join(b'"%b"' % name.encode() for name in self.order)
        self._marks = {mark: names.count(mark) for mark in b'"uf'}  # which strings, true and false have
        self._cells = _cells_getter(self.order)
        self._nulls = {name: column.null for name, column in used.items()}
        if self.form == "frame":
            self._pandas = _import_pandas()
            self._words = words or list_words(contract)[0]
            self._dtypes = {name: self._column_dtype(name, column) for name, column in contract.columns.items()}
        elif not objects:  # None becomes NaN by itself, which any null is but a number
            numbers = {name: null for name, null in self._nulls.items() if isinstance(null, int | float)}
            self._nulls = {name: null for name, null in numbers.items() if not is_nan(null)}

    def of_rows(self, rows: Rows) -> Any:
        """Return X for checked rows, with a column for each of `order`; or a list of texts."""
        if self.are_numbers:
            return self._of_numbers(rows)
        if self.form == "texts":
            return [row[self.order[0]] for row in rows]
        if self._nulls:
            rows = [row | {name: null for name, null in self._nulls.items() if row[name] is None} for row in rows]
        if self.form == "frame":
            columns = {name: [row.get(name) for row in rows] for name in self.order}
            return self._pandas.DataFrame({name: self._make_column(name, columns[name]) for name in self.order})
        X = np.array([[row.get(name) for name in self.order] for row in rows], dtype=self._dtype)
        return X.reshape(len(rows), len(self.order))

    def of_numbers_in(self, body: bytes) -> Array | None:
        """Return X for a JSON array of rows, where all that a row may have is floats; None if one may not fit.

        It takes half the time of checking each cell, because it counts bytes: if every row has all features, and the
        body has exactly as many quotes and letters "u" and "f" as their names need, then it holds no other key, no
        repeated key, no string and no boolean.
        """
        if self._bounds is None or b"\\" in body:
            return None
        try:
            rows = jiter.from_json(body, allow_inf_nan=False, cache_mode="keys")
            if len(rows) * len(self.order) > len(body):
                return None  # which would have room made for more cells than there can be
            X = self._of_numbers(rows)
        except (ValueError, TypeError, KeyError, OverflowError):
            return None
        if any(count_byte(body, mark) != len(X) * number for mark, number in self._marks.items()):
            return None
        return self._within_bounds(X)

    def of_lists_in(self, body: bytes, positions: Sequence[int]) -> Array | None:
        """Return X for a JSON array of arrays of floats; None if one may not fit.

        `positions` are those of the columns of X in each array. A body without quotes and without the letters "u" and
        "f" has no text, no boolean and no null in it.
        """
        if self._bounds is None or any(count_byte(body, mark) for mark in b'"uf'):
            return None
        try:
            X = np.array(jiter.from_json(body, allow_inf_nan=False), np.float64)
        except (ValueError, TypeError, OverflowError):
            return None
        return self._within_bounds(X[:, positions]) if X.ndim == 2 and X.shape[1] == len(self.order) else None

    def of_lists(self, columns: Mapping[str, list[Any]]) -> Array | None:
        """Return X for lists of one length by the names of columns; None if one may not fit."""
        if self._bounds is None or any({*map(type, cells)} - {int, float} for cells in columns.values()):
            return None
        try:
            X = np.array([columns[name] for name in self.order], np.float64).T
        except OverflowError:
            return None
        return self._within_bounds(X)

    @property
    def has_bounds(self) -> bool:
        """Whether all that a row may have is floats between bounds, which `of_matrix` takes."""
        return self._bounds is not None

    def of_matrix(self, matrix: Array) -> Array | None:
        """Return X for numbers of shape (n_samples, n_features), as a copy; None if one may not fit."""
        return None if matrix.dtype.kind == "b" else self._within_bounds(matrix.astype(np.float64))

    def _within_bounds(self, X: Array) -> Array | None:
        """Return X as it is, or None if a value is out of its feature's bounds."""
        if self._bounds is None:
            return None
        low, high = self._bounds
        return X if ((low <= X) & (high >= X)).all() else None

    def of_columns(self, columns: Mapping[str, Checked], n_rows: int) -> Any:
        """Return X for checked columns by name, as `of_rows` returns it for rows. One that is left out is missing."""
        if self.form == "texts":
            return columns[self.order[0]].tell(None)
        if self.form == "frame":
            made = {name: self._frame_column(name, columns.get(name), n_rows) for name in self.order}
            return self._pandas.DataFrame(made)
        X: Array = np.empty((n_rows, len(self.order)), self._dtype)
        nothing = None if self._dtype is object else math.nan
        for place, name in enumerate(self.order):
            column, null = columns.get(name), self._nulls.get(name, nothing)
            if column is None:
                X[:, place] = null
            elif self._dtype is object:
                X[:, place] = np.fromiter(column.tell(null), object, n_rows)
            else:
                X[:, place] = column.filled(null, np.float64)
        return X

    def _frame_column(self, name: str, column: Checked | None, n_rows: int) -> Any:
        null, dtype = self._nulls.get(name), self._dtypes[name]
        if column is None:
            return self._make_column(name, [null] * n_rows)
        if _is_plain(dtype) and (column.missing is None or isinstance(null, int | float)):
            return column.filled(null, dtype)
        return self._make_column(name, column.tell(null))

    def _of_numbers(self, rows: Rows) -> Array:
        cells = itertools.chain.from_iterable(map(self._cells, rows))
        return np.fromiter(cells, np.float64, len(rows) * len(self.order)).reshape(len(rows), len(self.order))

    def join(self, parts: list[Any]) -> Any:
        """Return the X of all rows, which are in parts."""
        if self.form == "texts":
            return [*itertools.chain.from_iterable(parts)]
        return self._pandas.concat(parts, ignore_index=True) if self.form == "frame" else np.concatenate(parts)

    def _make_column(self, name: str, cells: list[Any]) -> Any:
        """Return a column of a DataFrame: as an array if it is one to numpy, in a twentieth of the time of a Series."""
        dtype = self._dtypes[name]
        return np.array(cells, dtype) if _is_plain(dtype) else self._pandas.Series(cells, dtype=dtype)

    def _column_dtype(self, name: str, column: Column | None) -> Any:
        """Return the type of a DataFrame's column, as the estimator was fitted; one that it drops can be of any."""
        if column is None:
            return "object"
        feature = self.contract.features[name]
        kind = column.type or feature.type
        if self._words == "category" and _may_be_category(column, feature):
            return self._pandas.CategoricalDtype(feature.choices)
        if self._words != "object" and _is_word_to_code(column, feature) and has_str_columns():
            return "str"
        if column.is_object:
            return "object"
        if column.null is self._pandas.NA:
            return {"float": "Float64", "int": "Int64", "bool": "boolean"}.get(kind or "", "object")
        is_counted = kind == "int" or (kind == "bool" and column.is_category)  # boosters take no objects
        if feature.missing and is_nan(column.null) and is_counted:
            return "float64"
        return {"float": "float64", "int": "int64", "bool": "object" if feature.missing else "bool"}.get(
            kind or "", "object"
        )


def _is_plain(dtype: Any) -> bool:
    """Whether a DataFrame's column is an array to numpy."""
    return isinstance(dtype, str) and dtype in ("float64", "int64", "bool")


def _are_objects(contract: Contract) -> bool:
    """Whether the estimator takes more than numbers."""
    used = {name: column for name, column in contract.columns.items() if column is not None}
    return any(contract.features[name].type == "str" or column.is_object for name, column in used.items())


def list_forms(contract: Contract) -> list[Form]:
    """Return the forms in which an estimator may take rows, the likeliest first.

    There are several where code that is not scikit-learn's does not know the names that features have been given.
    """
    inputs, objects = contract.inputs, _are_objects(contract)
    if inputs.form != "array" or inputs.names is not None:
        return ["frame" if objects and inputs.form == "array" else inputs.form]
    columns = contract.columns
    is_opaque = any(column is not None and column.is_opaque for column in columns.values())
    is_named = [*columns] != [f"x{position}" for position in range(len(columns))]
    if not is_opaque or not is_named or not is_installed("pandas"):
        return ["array"]
    return ["frame", "array"] if objects else ["array", "frame"]


def list_words(contract: Contract) -> list[Words]:
    """Return the types that a DataFrame's columns of texts may have, the likeliest first.

    To scikit-learn's own they are all the same.
    """
    pairs = [(column, contract.features[name]) for name, column in contract.columns.items() if column is not None]
    words: list[Words] = ["category"] if any(_may_be_category(*pair) for pair in pairs) else []
    if any(_is_word_to_code(*pair) for pair in pairs) and has_str_columns():
        words.append("str")
    return [*words, "object"]


def _may_be_category(column: Column, feature: FeatureSettings) -> bool:
    is_said = column.choices is None and _is_word_to_code(column, feature)  # by the settings
    return feature.choices is not None and (column.is_category or is_said)


def _is_word_to_code(column: Column, feature: FeatureSettings) -> bool:
    """Whether a column of texts goes into code that is not scikit-learn's, to which its type may matter."""
    return feature.type == "str" and column.is_opaque and is_nan(column.null) and not column.takes_int


def is_installed(name: str) -> bool:
    """Whether a module can be imported, without importing it."""
    with contextlib.suppress(ImportError):
        return importlib.util.find_spec(name) is not None
    return False


@functools.cache
def has_str_columns() -> bool:
    """Whether pandas has a type of its own for columns of texts, which its version 3 gives them."""
    return int(_import_pandas().__version__.partition(".")[0]) >= 3


def count_byte(body: bytes, byte: int) -> int:
    """Return how often a byte is in a body, in a tenth of the time of `bytes.count`."""
    return int(np.count_nonzero(np.frombuffer(body, np.uint8) == byte))


def _cells_getter(names: Sequence[str]) -> Callable[[dict[str, Any]], Sequence[Any]]:
    """Return a function that takes the cells out of a row; of one alone `itemgetter` makes no tuple."""
    return operator.itemgetter(*names) if len(names) > 1 else lambda row: [row[name] for name in names]


def _find_bounds(features: Sequence[FeatureSettings]) -> tuple[Array, Array] | None:
    """Return the bounds of features, (n_features,) each, if all are floats between bounds."""
    if any(feature.type != "float" or feature.choices is not None for feature in features):
        return None
    bounds = np.array([*map(bounds_of, features)]).reshape(len(features), 2)
    return bounds[:, 0], bounds[:, 1]


def _import_pandas() -> Any:
    """Import pandas, which only estimators fitted on named, mixed columns need. Raises `ModelError`."""
    try:
        import pandas
    except ImportError:
        hint = "install pandas: pip install -r requirements-pandas.txt"
        problem = (
            "takes a DataFrame: it was fitted on one, with more than numbers in it or code that is not scikit-learn's"
        )
        raise ModelError(f"{problem}; {hint}") from None
    return pandas

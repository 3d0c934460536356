"""Rows from outside, checked: each has the features of the model, each of its type, and every problem is named."""

from __future__ import annotations

import contextlib
import functools
import itertools
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import CoreSchema, SchemaValidator, core_schema, to_json

from serving.errors import (
    MAX_ITEMS,
    BadRequest,
    Key,
    MisfitError,
    ModelError,
    Unprocessable,
    listed,
    nearest,
    shorten,
)
from serving.predictor.features import FeatureSettings, cell_schema, complete_feature, some_value, text_schema
from serving.predictor.inputs import Column, Inputs

Rows = list[dict[str, Any]]  # of checked cells by the names of features
MAX_PROBLEMS = 1000  # bad cells named in one answer
MAX_DETAIL_BYTES = 131_072  # bytes of its JSON, about those of a thousand problems with short names and values
MAX_HINTS = 10  # suggestions in one answer


class Contract:
    """The types of input: which features a row has, and of which type each is.

    `inputs` come from the estimator; `given` completes them, and `row`, one that the model is known to answer, gives
    examples. Raises `MisfitError` where settings and estimator contradict each other.
    """

    def __init__(
        self, inputs: Inputs, given: Mapping[str, FeatureSettings], row: Mapping[str, Any] | None = None
    ) -> None:
        columns = name_columns(inputs, given, row or ())
        used = {name: column for name, column in columns.items() if column is not None}
        _refuse_contradictions(used, given)
        self.inputs = inputs
        self.columns = columns  # those that the estimator drops too
        self.names = list(used)
        row = row or {}
        self.untyped = {name for name in used if name not in row and (name not in given or given[name].type is None)}
        self.features = _complete_features(used, given, row)
        self.nullable = [name for name, feature in self.features.items() if feature.missing]
        row_schema = _row_schema(self.features)
        self.row = SchemaValidator(row_schema)
        self.row_of_texts = SchemaValidator(_row_schema(self.features, text_schema))
        self.rows = SchemaValidator(core_schema.list_schema(row_schema, fail_fast=True))

    @functools.cached_property
    def example(self) -> dict[str, Any]:
        """One row that fits, of the features' examples; a feature without one has a value within its bounds."""
        return {name: some_value(feature) for name, feature in self.features.items()}

    def parse_query(self, query: str) -> list[dict[str, Any]]:
        """Read one row from a query string, in which every value is text, and one that may be missing can be empty.

        Raises `BadRequest`, `Unprocessable`.
        """
        try:
            pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, errors="strict")
        except ValueError:
            raise BadRequest("the query is not percent-encoded UTF-8") from None
        cells: dict[str, Any] = dict(pairs)
        if len(cells) < len(pairs):
            raise self.refusal(_find_repeated(pairs))
        row = self.check_texts(cells)
        if row is None:
            raise self.refusal(self.find_problems_of_texts(cells, ["query"], Hints()))
        return [row]

    def check_texts(self, cells: dict[str, Any]) -> dict[str, Any] | None:
        """Return a row of texts, parsed, or None if one does not fit. A text that may be missing can be empty."""
        with contextlib.suppress(ValidationError):
            row: dict[str, Any] = self._parse_texts(cells)
            return row
        return None

    def _parse_texts(self, cells: dict[str, Any]) -> Any:
        missing = [name for name in self.nullable if cells.get(name) == ""]
        given = {name: text for name, text in cells.items() if name not in missing} if missing else cells
        return self.row_of_texts.validate_strings(given, strict=False)

    def find_problems_of_texts(self, cells: dict[str, Any], place: list[Any], hints: Hints) -> Iterator[dict[str, Any]]:
        """Yield what is wrong with a row of texts; `place` goes in front of each `loc`."""
        try:
            self._parse_texts(cells)
        except ValidationError as error:
            yield from self._problems(place, error, hints)

    def parse_payload(self, payload: Any) -> list[dict[str, Any]]:
        """Check one row, or a list of rows, as decoded from JSON. Raises `Unprocessable`."""
        if (rows := self.check(payload)) is None:
            misshapen = self.find_shape(payload)
            raise self.refusal([misshapen] if misshapen else self.find_problems(payload))
        return rows

    def check(self, payload: Any) -> Rows | None:
        """Return the rows of a payload, or None if one does not fit, in less time than it takes to say why."""
        if self._has_long_row(payload if isinstance(payload, list) else [payload]):
            return None
        with contextlib.suppress(ValidationError):
            if isinstance(payload, list):
                rows: Rows = self.rows.validate_python(payload, strict=True)
                return rows
            return [self.row.validate_python(payload, strict=True)]
        return None

    def _has_long_row(self, rows: list[Any]) -> bool:
        """Whether a row has more unknown names than an answer has room for, each of which pydantic would note."""
        with contextlib.suppress(TypeError):  # of a number, which is no row at all
            return max(map(len, rows), default=0) > len(self.names) + MAX_PROBLEMS
        return False

    def refusal(self, problems: Iterable[dict[str, Any]]) -> Unprocessable:
        """Return the error with the first problems, as many as an answer may have, and one at least."""
        detail: list[dict[str, Any]] = []
        left = MAX_DETAIL_BYTES
        for problem in itertools.islice(problems, MAX_PROBLEMS):
            problem["loc"] = [part if part in self.features else shorten(part) for part in problem["loc"]]
            left -= len(to_json(problem, inf_nan_mode="strings", fallback=str)) + len(",")
            if left < 0 and detail:
                break
            detail.append(problem)
        return Unprocessable(detail)

    def find_problems(self, payload: Any, first: int = 0, hints: Hints | None = None) -> Iterator[dict[str, Any]]:
        """Check row by row, so that an answer of bounded length costs a bounded time.

        `first` is the number of the first row of an array, and `hints` what is left of those of the answer.
        """
        hints = hints or Hints()
        rows = enumerate(payload, first) if isinstance(payload, list) else [(None, payload)]
        for index, row in rows:
            place = ["body"] if index is None else ["body", index]
            if isinstance(row, dict) and self._has_long_row([row]):
                message = f"Object should have at most {len(self.names)} features, not {len(row)}"
                yield _problem("too_long", place, message, None)
                continue
            try:
                self.row.validate_python(row, strict=True)
            except ValidationError as error:
                yield from self._problems(place, error, hints)

    def too_large(self, place: list[Any], n_values: int) -> dict[str, Any]:
        """Return the problem of a value that has too many others in it to be decoded."""
        message = f"Input should be an object with at most {len(self.names)} features; it has {n_values} values inside"
        return _problem("too_long", place, message, None)

    def find_shape(self, payload: Any, is_whole: bool = True) -> dict[str, Any] | None:
        """Return the one problem of a body in another shape than rows, with a right one in its message, or None.

        Such are values and arrays of values, an object around the rows, and columns instead of rows. An array that is
        not whole has more rows.
        """
        is_array = isinstance(payload, list)
        place, row = (["body", 0], payload[0]) if is_array else (["body"], payload)
        if not isinstance(row, dict):
            what = "an object" if is_array else "an object or an array of objects"
            return _problem("dict_type", place, f"Input should be {what}, such as {self._sample}", row)
        if is_array and not (is_whole and len(payload) == 1):
            return None
        nested = [name for name, value in itertools.islice(row.items(), MAX_PROBLEMS) if isinstance(value, list | dict)]
        if not nested or (len(nested) < len(row) and row.keys() & self.features.keys()):
            return None
        if nested[0] in self.features:
            message = f"Input should be rows, not columns, such as [{self._sample}]"
            return _problem("dict_type", place, message, row)
        message = f"Unknown feature; send the rows alone, such as [{self._sample}]"
        return _problem("extra_forbidden", [*place, nested[0]], message, row[nested[0]])

    @property
    def _sample(self) -> str:
        """The example as a message shows it: of a row with many features only the first."""
        first = itertools.islice(self.features.items(), MAX_ITEMS + 1)
        return to_json(shorten({name: some_value(feature) for name, feature in first})).decode()

    def _problems(self, place: list[Any], error: ValidationError, hints: Hints) -> Iterator[dict[str, Any]]:
        """Yield pydantic's errors in the words of JSON; `place` goes in front of each `loc`."""
        for problem in error.errors(include_url=False, include_context=False):
            kind, message, given = problem["type"], problem["msg"], problem["input"]
            if kind == "extra_forbidden":
                message = hints.add("Unknown feature", str(problem["loc"][-1]), self.names)
            elif kind == "literal_error":
                choices = self.features[str(problem["loc"][-1])].choices or []
                message = hints.add("Input is none of the choices", given, choices)
            elif kind == "dict_type":
                message = "Input should be an object" + (" or an array of objects" if place == ["body"] else "")
            elif kind == "missing":
                given = None  # not the whole row, once for each feature that it lacks
            yield _problem(kind, [*place, *problem["loc"]], message, given)


class Hints:
    """The suggestions of one answer, of which only its first problems get one, and each name is looked up once."""

    def __init__(self) -> None:
        self._left = MAX_HINTS
        self._nearest = functools.cache(nearest)

    def add(self, message: str, name: Any, names: Sequence[Any]) -> str:
        """Return a message with what `name` should have been, as long as there are suggestions left."""
        if self._left == 0:
            return message
        self._left -= 1
        return f"{message}; {self._nearest(name, tuple(names))}"


def name_columns(inputs: Inputs, features: Iterable[str], row: Iterable[str] = ()) -> dict[str, Column | None]:
    """Return the estimator's columns by name: as it was fitted, else x0, x1, …, or else in the order of the settings.

    Without settings, `row` has names, if it has as many as the estimator takes.
    """
    given = list(features)
    if not given and (inputs.columns is None or len([*row]) == len(inputs.columns) - inputs.columns.count(None)):
        given = list(row)
    if inputs.columns is None:
        if not given:
            raise ModelError("does not say how many features it takes; name them in [features], in its order")
        return dict.fromkeys(given, Column(is_opaque=True))
    made = ["text"] if inputs.form == "texts" else [f"x{column}" for column in range(len(inputs.columns))]
    names = inputs.names or made
    if inputs.names is None and not set(given) <= set(made):
        used = [name for name, column in zip(made, inputs.columns, strict=True) if column is not None]
        if len(given) != len(used):
            problem = f"names {len(given)} features, {listed(given)}; the model takes {len(used)}: {listed(used)}"
            raise MisfitError((("features",), problem))
        new = dict(zip(used, given, strict=True))
        names = [new.get(name, name) for name in made]
    return dict(zip(names, inputs.columns, strict=True))


def _complete_features(
    columns: Mapping[str, Column], given: Mapping[str, FeatureSettings], row: Mapping[str, Any]
) -> dict[str, FeatureSettings]:
    """Return each feature as settings, estimator and a known row have it. Raises `MisfitError` with all that differ."""
    features: dict[str, FeatureSettings] = {}
    problems: list[tuple[Key, str]] = []
    for name, column in columns.items():
        try:
            features[name] = complete_feature(name, column, given.get(name, FeatureSettings()), row)
        except MisfitError as error:
            problems += error.problems
    if problems:
        raise MisfitError(*problems)
    return features


def _refuse_contradictions(columns: Mapping[str, Column], features: Mapping[str, FeatureSettings]) -> None:
    """Raise `MisfitError` where settings and estimator differ, and `ModelError` where its own parts do."""
    unknown = [name for name in features if name not in columns]
    for name in [name for name, column in columns.items() if column.choices == ()]:
        raise ModelError(f"has parts that know no category of {name!r} in common, so that it can answer none")
    hint = nearest(unknown[0], columns) if len(unknown) == 1 else f"use one of {listed([*columns])}"
    problems: list[tuple[Key, str]] = [
        (("features", name), f"is not about a feature of the model; {hint}") for name in unknown
    ]
    problems += [
        (("features", name, key), f"is {shorten(getattr(given, key))!r}; the model takes {allowed} there")
        for name, given in features.items()
        for key, allowed in _find_contradictions(given, columns.get(name, Column()))
    ]
    if problems:
        raise MisfitError(*problems)


def _find_contradictions(given: FeatureSettings, column: Column) -> Iterator[tuple[str, str]]:
    """Yield each key of a feature's settings that the estimator contradicts, with what it takes."""
    takes_it = given.type in (None, column.type) or (column.takes_int and given.type == "int")
    if column.type and not takes_it and "str" in (given.type, column.type):
        yield "type", f"{column.type!r}"
    if given.missing and column.missing is False:
        yield "missing", "no missing value"
    if column.choices is None:
        return
    for key in ("ge", "le"):
        if getattr(given, key) is not None:
            yield key, f"only {listed(column.choices)}"
    if not set(given.choices or ()) <= set(column.choices):
        yield "choices", f"only {listed(column.choices)}"


def _find_repeated(pairs: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    given: dict[str, list[str]] = {}
    for name, value in pairs:
        given.setdefault(name, []).append(value)
    for name, values in given.items():
        if len(values) > 1:
            yield _problem("repeated", ["query", name], "Give this parameter once", values)


def _problem(kind: str, loc: list[Any], message: str, given: Any) -> dict[str, Any]:
    return {"type": kind, "loc": loc, "msg": message, "input": shorten(given)}


def _row_schema(
    features: Mapping[str, FeatureSettings], schema_of: Callable[[FeatureSettings], CoreSchema] = cell_schema
) -> CoreSchema:
    """Return pydantic's schema of a row, in which a value that may be missing is None where it is left out."""
    fields: dict[str, core_schema.TypedDictField] = {}
    for name, feature in features.items():
        cell = schema_of(feature)
        cell = core_schema.with_default_schema(cell, default=None) if feature.missing else cell
        fields[name] = core_schema.typed_dict_field(cell, required=not feature.missing)
    return core_schema.typed_dict_schema(fields, extra_behavior="forbid")

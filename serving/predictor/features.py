"""One feature: its settings, and how the estimator and known rows complete them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, SchemaValidator, core_schema

from serving.errors import MisfitError, listed
from serving.predictor.inputs import FEATURE_TYPES, Cell, Column
from serving.settings import Finite, OtherNames, SettingsTable, check_each_once, should

NUMBER_RANGES: dict[str, float] = {  # largest magnitude of a number, by the feature's type
    "float": float(np.finfo(np.float32).max),  # trees compute in float32
    "int": 2**53,  # up to here every integer is a float64 of its own
}

JSON_TYPES = {"float": "number", "int": "integer", "bool": "boolean", "str": "string"}


class FeatureSettings(SettingsTable):
    """Settings of one feature. A key that is None is read off the estimator."""

    other_names: ClassVar[OtherNames] = {
        "type": ("dtype", "kind"),
        "ge": ("min", "minimum", "lower", "gte", "gt"),
        "le": ("max", "maximum", "upper", "lte", "lt"),
        "choices": ("enum", "values", "categories", "options", "levels"),
        "missing": ("nullable", "optional", "null", "required"),
    }

    type: Literal["float", "int", "bool", "str"] | None = None
    ge: Finite | None = None
    le: Finite | None = None
    choices: Annotated[list[Cell], Field(min_length=1), AfterValidator(check_each_once)] | None = None
    missing: bool | None = None
    unit: str | None = None
    example: Cell | None = None
    _is_variable: bool = PrivateAttr(default=False)  # the example comes from the environment, where all is text
    _is_number: bool = PrivateAttr(default=False)  # a bool is 1 or 0 to the estimator

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        bounds = [bound for bound in (self.ge, self.le) if bound is not None]
        limit = NUMBER_RANGES.get(self.type or "float")
        if bounds and limit is None:
            raise ValueError(f"a {self.type} should have no bounds")
        if bounds and self.choices is not None:
            raise ValueError("a feature should have choices or bounds, not both")
        if self.type == "int" and not all(bound.is_integer() for bound in bounds):
            raise ValueError("an int should have whole numbers as bounds")
        if limit and any(abs(bound) > limit for bound in bounds):
            raise ValueError(f"a feature should have bounds within ±{limit:.8g}")
        if bounds != sorted(bounds):
            raise ValueError("bounds should have ge no greater than le")
        return self

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        choices = self.choices or []
        kinds = (float, int) if self.type == "float" else (FEATURE_TYPES.get(self.type or "", object),)
        wrong = [
            choice
            for choice in choices
            if not isinstance(choice, kinds) or isinstance(choice, bool) != (self.type == "bool")
        ]
        if wrong and self.type is not None:
            raise ValueError(f"choices should have the type {self.type!r}, unlike {wrong[0]!r}")
        return self


def complete_feature(name: str, column: Column, given: FeatureSettings, row: Mapping[str, Any]) -> FeatureSettings:
    """Return what settings, estimator and a known row together say of a feature. Raises `MisfitError`."""
    known: Iterable[Any] = given.choices or [row.get(name)]
    texts = all(isinstance(value, str) for value in known)
    said = {
        "type": column.type or ("str" if texts else "float"),
        "choices": _choices_of(column, given.type),
        "missing": bool(column.missing),
        **given.model_dump(exclude_none=True, exclude={"example"}),
    }
    try:
        feature = FeatureSettings.model_validate(said)
    except ValidationError as error:
        problem = f"does not fit the model: it should {should(error.errors()[0])}"
        raise MisfitError((("features", name), problem)) from None
    feature._is_number = feature.type == "bool" and column.type != "bool"
    if given.example is not None:
        example = _check_example(name, given, feature)
    else:
        example = next(_fitting([row.get(name), column.example, *(feature.choices or ())], feature), None)
    return feature.model_copy(update={"example": example})


def _choices_of(column: Column, kind: str | None) -> list[Cell] | None:
    """Return the values that the estimator knows, as booleans where the settings say that 0 and 1 are."""
    if column.choices is None:
        return None
    truths = kind == "bool" and set(column.choices) <= {0, 1}
    return [bool(choice) if truths else choice for choice in column.choices]


def _check_example(name: str, given: FeatureSettings, feature: FeatureSettings) -> Any:
    cell = SchemaValidator(cell_schema(feature))
    example: Any = given.example
    is_text = isinstance(example, str) and given._is_variable
    try:
        return cell.validate_strings(example) if is_text else cell.validate_python(example, strict=True)
    except ValidationError as error:
        problem = f"is {example!r}; it should {should(error.errors()[0])}"
        raise MisfitError((("features", name, "example"), problem)) from None


def _fitting(values: Iterable[Any], feature: FeatureSettings) -> Iterator[Any]:
    cell = SchemaValidator(cell_schema(feature))
    for value in values:
        with contextlib.suppress(ValidationError):
            if value is not None:
                yield cell.validate_python(value, strict=True)


def some_value(feature: FeatureSettings) -> Cell:
    """Return a feature's example, or the value nearest to nothing that its bounds admit."""
    kind = FEATURE_TYPES[feature.type or "float"]
    value: Cell = kind()
    if feature.example is not None:
        value = feature.example
    elif feature.ge is not None and feature.ge > 0:
        value = kind(feature.ge)
    elif feature.le is not None and feature.le < 0:
        value = kind(feature.le)
    return value


def cell_schema(feature: FeatureSettings) -> CoreSchema:
    """Return pydantic's schema of one feature's value, in a tenth of the time that a `TypeAdapter` takes for it."""
    cell = _kind_schema(feature)
    if feature.choices is not None:
        cell = core_schema.no_info_after_validator_function(_make_check(feature.choices), cell)
    return core_schema.nullable_schema(cell) if feature.missing else cell


def text_schema(feature: FeatureSettings) -> CoreSchema:
    """Return the schema of one feature's value where it is written as a text."""
    cell = cell_schema(feature)
    if feature.type not in ("int", "float"):
        return cell

    def refuse_underscores(text: Any) -> Any:
        """Refuse what would be a number to pydantic, and to Python, but is none in JSON or CSV: `1_000`."""
        if "_" in text:
            raise PydanticKnownError("int_parsing" if feature.type == "int" else "float_parsing")
        return text

    return core_schema.no_info_before_validator_function(refuse_underscores, cell)


def _kind_schema(feature: FeatureSettings) -> CoreSchema:
    if feature.type == "str":
        return core_schema.str_schema()
    if feature.type == "bool":
        truth = core_schema.bool_schema()
        return core_schema.no_info_before_validator_function(_as_truth, truth) if feature._is_number else truth
    low, high = bounds_of(feature) if feature.choices is None else (None, None)
    if feature.type == "int":
        whole = [None if bound is None else int(bound) for bound in (low, high)]
        number = core_schema.int_schema(ge=whole[0], le=whole[1])
        return core_schema.no_info_before_validator_function(_as_whole, number)
    return core_schema.float_schema(ge=low, le=high, allow_inf_nan=False)


def _as_whole(value: Any) -> Any:
    """Return a float without a fraction as an integer, which it is in JSON Schema, and all else as it is."""
    if type(value) is not float or not value.is_integer():
        return value
    limit = int(NUMBER_RANGES["int"])
    if value > limit:
        raise PydanticKnownError("less_than_equal", {"le": limit})
    if value < -limit:
        raise PydanticKnownError("greater_than_equal", {"ge": -limit})
    return int(value)


def _as_truth(value: Any) -> Any:
    """Return the numbers 1 and 0 as true and false, and all else as it is."""
    return bool(value) if type(value) in (int, float) and value in (0, 1) else value


def _make_check(choices: list[Cell]) -> Callable[[Any], Any]:
    """Return what refuses all but some values. Pydantic's own schema of them knows no floats, nor 1 from true, and
    lists all choices in each of its errors."""
    known, shown = frozenset(choices), listed(choices)

    def check(value: Any) -> Any:
        if value not in known:
            raise PydanticCustomError("literal_error", "Input should be one of {choices}", {"choices": shown})
        return value

    return check


def describe_cell(name: str, feature: FeatureSettings) -> dict[str, Any]:
    """Return the JSON Schema of one feature's value."""
    described: dict[str, Any] = {"title": name.replace("_", " ").title()}
    if feature.unit:
        described["unit"] = feature.unit
    if feature.example is not None:
        described["examples"] = [feature.example]
    cell: dict[str, Any] = {"type": JSON_TYPES[feature.type or "float"]}
    if feature.choices is not None:
        cell |= _describe_choices(feature.choices)
    elif feature.type in NUMBER_RANGES:
        cell["minimum"], cell["maximum"] = bounds_of(feature)
    truths = {"enum": [int(choice) for choice in feature.choices or (False, True)]} if feature._is_number else None
    options = [option for option in (cell, truths, {"type": "null"} if feature.missing else None) if option]
    return described | ({"anyOf": options} if len(options) > 1 else cell)


def _describe_choices(choices: list[Cell]) -> dict[str, Any]:
    """Return the JSON Schema of some values, in which whole numbers are integers: clients are made of no other enum."""
    floats = [choice for choice in choices if isinstance(choice, float)]
    if all(choice.is_integer() for choice in floats):
        return {"enum": [int(choice) if isinstance(choice, float) else choice for choice in choices]}
    return {"anyOf": [{"const": choice} for choice in choices]}


def bounds_of(feature: FeatureSettings) -> tuple[float, float]:
    """Return the least and the greatest number that a feature takes."""
    limit = NUMBER_RANGES[feature.type or "float"]
    return -limit if feature.ge is None else feature.ge, limit if feature.le is None else feature.le


def within(value: float, feature: FeatureSettings) -> float:
    low, high = bounds_of(feature)
    value = min(max(value, low), high)
    return int(value) if feature.type == "int" else value

"""From a fitted estimator to the features that it takes: how many, their names, types, categories and missing values.

scikit-learn keeps none of this in one place, so each part of an estimator is read by the name of its class.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import sklearn.utils
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.preprocessing import FunctionTransformer

from serving.errors import ModelError
from serving.predictor.boosters import find_categories, is_of, restore_blanks
from serving.settings import Finite

Array = np.ndarray[Any, Any]
Cell = bool | int | Finite | str  # of a row
Form = Literal["array", "frame", "texts"]
FEATURE_TYPES: dict[str, Any] = {"float": float, "int": int, "bool": bool, "str": str}


@dataclass(frozen=True, slots=True)
class Column:
    """What an estimator, or a part of it, knows about one input feature."""

    type: str | None = None  # one of FEATURE_TYPES; None where it does not say
    choices: tuple[Cell, ...] | None = None  # the only values that it knows
    missing: bool | None = None  # True: it takes a missing value; False: it fails on one; None: it hands it on
    null: Any = math.nan  # a missing value as it was fitted with
    is_object: bool = False  # it was fitted on Python's own values, and takes no others
    is_category: bool = False  # where all values are known, they are a category of pandas' to it
    example: Cell | None = None
    takes_int: bool = False  # whole numbers are as good as texts, where the settings say that it has them
    is_text: bool = False  # it is the whole input, which is then one-dimensional
    is_opaque: bool = False  # it goes into code of which nothing is known
    is_idle: bool = False  # nothing looks at it
    known: tuple[Cell, ...] | None = None  # the values besides which all others become missing

    def beside(self, other: Column) -> Column:
        """Merge what two parts know about a feature that both of them get."""
        choices = self.choices if other.choices is None else other.choices
        if self.choices is not None and other.choices is not None:
            choices = tuple(choice for choice in self.choices if choice in other.choices)
        missing = False if False in (self.missing, other.missing) else self.missing and other.missing
        kind = "str" if "str" in (self.type, other.type) else self.type or other.type
        kind = type_of(choices) if choices else kind
        return replace(self._or(other), type=kind, choices=choices, missing=missing)

    def before(self, other: Column) -> Column:
        """Merge what two steps know about a feature that passes through the first step into the second."""
        if self.is_opaque:
            return self
        missing = other.missing if self.missing is None else self.missing
        kind = other.type if other.choices is not None else self.type or other.type
        others = self.known if other.choices is None and other.missing is False else other.choices
        choices = others if self.choices is None else self.choices
        known = other.known or (self.known if other.missing is None else None)
        return replace(self._or(other), type=kind, choices=choices, missing=missing, known=known)

    def _or(self, other: Column) -> Column:
        return replace(
            self,
            null=other.null if is_nan(self.null) else self.null,
            example=other.example if self.example is None else self.example,
            known=self.known or other.known,
            is_object=self.is_object or other.is_object,
            is_category=self.is_category or (other.is_category and other.choices is not None),
            is_opaque=self.is_opaque or other.is_opaque,
        )


Columns = dict[int, Column]  # by their position in X; one that is not used is left out


@dataclass(frozen=True, slots=True)
class Inputs:
    """The features of a fitted estimator, in its order: their names if it knows them, and what it says of each.

    `form` is what its methods take: an array of shape (n_samples, n_features), a DataFrame of as many columns, or
    n_samples texts.
    """

    names: list[str] | None
    columns: list[Column | None] | None  # None in it for a column that the estimator drops
    form: Form


def read_inputs(estimator: Any, given: Iterable[str] = ()) -> Inputs:
    """Read the features off a fitted estimator and its parts. Raises `ModelError` when their names make no sense.

    `given` are names by others, which count where the estimator has them with underscores for blanks.
    """
    if isinstance(inputs := getattr(estimator, "inputs", None), Inputs):
        return inputs
    first = _find_first(estimator)
    names = [str(name) for name in getattr(first, "feature_names_in_", ())] or None
    width: int | None = getattr(first, "n_features_in_", len(names) if names else _given_width(first))
    if _is_catboost(first):
        names, width = first.feature_names_, len(first.feature_names_)
        names = None if names == [str(position) for position in range(width)] else names
    if names and any(is_of(part, "lightgbm") for part in find_parts(estimator)):
        names = restore_blanks(names, {*given, *_find_names(estimator)})
    if names and (width != len(names) or len(set(names)) < len(names)):
        raise ModelError(f"has {len(names)} names for {width} features, {len(set(names))} of them different")
    try:
        read = read_columns(estimator, width)
    except AttributeError as error:
        raise ModelError(f"is not as this version of scikit-learn fits it: {error}; save it with this one") from error
    if any(column.is_text for column in read.values()):
        return Inputs(None, [replace(read[0], is_text=False)], "texts")
    columns = [read.get(position) for position in range(width)] if width is not None else None
    named = names is not None and any(map(_needs_names, find_parts(estimator)))
    return Inputs(names, columns, "frame" if named else "array")


def _find_names(estimator: Any) -> Iterator[str]:
    for part in find_parts(estimator):
        yield from map(str, getattr(part, "feature_names_in_", ()))


def _is_catboost(part: Any) -> bool:
    """Whether a part is one of CatBoost's, which once loaded has an `n_features_in_` of 0 and names of its own."""
    return hasattr(part, "get_cat_feature_indices")


def _find_first(estimator: Any) -> Any:
    """Return the part that knows its features. What holds others may not: a pipeline may begin with "passthrough"."""
    steps = [step for _, step in getattr(estimator, "steps", ()) if hasattr(step, "fit")]
    names = ("best_estimator_", "estimator_", "estimators_", "calibrated_classifiers_")
    held = [getattr(estimator, name, None) for name in names]
    inner = [part[0] if isinstance(part, list | tuple) else part for part in held if part is not None]
    inner = [part.estimator if type(part).__name__ == "_CalibratedClassifier" else part for part in steps or inner]
    # An ensemble around CatBoost repeats its 0, or has no names.
    knows = getattr(estimator, "n_features_in_", 0) and not (
        inner and _is_catboost(inner[0]) and not hasattr(estimator, "feature_names_in_")
    )
    return estimator if knows or not inner else _find_first(inner[0])


def _given_width(estimator: Any) -> int | None:
    """Return the width of an estimator that takes one feature, which it does not keep."""
    if not isinstance(estimator, BaseEstimator):
        return None
    tags = sklearn.utils.get_tags(estimator).input_tags
    return 1 if tags.one_d_array and not tags.two_d_array and not tags.string else None


def read_columns(part: Any, width: int | None) -> Columns:
    """Read what a part of an estimator, fitted on `width` features, says of each of them."""
    if isinstance(part, str) or part is None:
        return {} if part == "drop" else dict.fromkeys(range(width or 0), Column())
    if _is_catboost(part):
        return _read_catboost(part)
    own = [kind.__name__ for kind in type(part).__mro__ if kind.__module__.partition(".")[0] in LIBRARIES]
    read = next((READERS[name] for name in own if name in READERS), _read_plain)
    return read(part, width)


def _read_steps(pipeline: Any, width: int | None) -> Columns:
    """Read the steps of a pipeline: what one does not say is asked of the next, while values stay what they were."""
    steps = [step for _, step in pipeline.steps if step is not None and not isinstance(step, str)]
    columns: Columns = {} if steps else dict.fromkeys(range(width or 0), Column())
    places: dict[int, int] = {}  # of columns among the outputs of the steps before
    for step in steps:
        if not columns:
            columns = read_columns(step, width)
            places = {position: position for position in columns}
        else:
            read = read_columns(step, getattr(step, "n_features_in_", None))
            rest = Column(missing=_all_missing(read))
            columns = {
                position: column.before(read.get(places.get(position, -1), rest))
                for position, column in columns.items()
            }
        kept = _find_kept(step, places.values())
        places = {position: kept[place] for position, place in places.items() if place in kept}
    return columns


def _all_missing(columns: Columns) -> bool | None:
    answers = [column.missing for column in columns.values()]
    return False if False in answers else True if answers and all(answers) else None


def _find_kept(step: Any, positions: Iterable[int]) -> dict[int, int]:
    """Return where among a step's outputs its inputs are that stay what they are, but for missing values."""
    if not hasattr(step, "output_indices_"):
        return {position: position for position in positions} if _keeps_values(step) else {}
    inputs, outputs = step._transformer_to_input_indices, step.output_indices_
    passed = [name for name, part, _ in step.transformers_ if part == "passthrough" or _keeps_values(part)]
    pairs = ((inputs[name], range(outputs[name].start, outputs[name].stop)) for name in passed)
    return {place: output for places, outs in pairs for place, output in zip(places, outs, strict=False)}


def _keeps_values(step: Any) -> bool:
    """Return whether a step's first output columns are its input columns, unchanged but for filled missing values."""
    if not hasattr(step, "statistics_"):
        return isinstance(step, FunctionTransformer) and step.func is None
    names = getattr(step, "feature_names_in_", [f"x{column}" for column in range(step.n_features_in_)])
    return list(step.get_feature_names_out()[: len(names)]) == list(names)


def _read_branches(transformer: Any, width: int | None) -> Columns:
    """Read a ColumnTransformer, of which each branch gets some of the columns. One that gets none is not fitted."""
    positions = transformer._transformer_to_input_indices
    return _join(
        {
            positions[name][inner]: replace(column, is_text=False)
            for inner, column in read_columns(part, len(positions[name])).items()
        }
        for name, part, _ in transformer.transformers_
        if len(positions[name])
    )


def _read_union(union: Any, width: int | None) -> Columns:
    return _join(read_columns(part, width) for _, part in union.transformer_list)


def _read_inner(part: Any, width: int | None, attribute: str) -> Columns:
    """Read the estimators inside one that hands its input to them as it is."""
    inner = getattr(part, attribute)
    return _join(read_columns(item, width) for item in (inner if isinstance(inner, list | tuple) else [inner]))


def _read_stack(stack: Any, width: int | None) -> Columns:
    """Read a stacking estimator, whose final one may get X too, after the answers of the others."""
    columns = _read_inner(stack, width, "estimators_")
    if not stack.passthrough or width is None:
        return columns
    final, n_inputs = stack.final_estimator_, stack.final_estimator_.n_features_in_
    read = read_columns(final, n_inputs)
    answers = n_inputs - width
    return _join([columns, {position - answers: read[position] for position in read if position >= answers}])


def _read_bag(bag: Any, width: int | None) -> Columns:
    """Read a bagging estimator, which may give each of its own some of the columns only."""
    pairs = zip(bag.estimators_, bag.estimators_features_, strict=True)
    return _join(
        {int(positions[inner]): column for inner, column in read_columns(part, len(positions)).items()}
        for part, positions in pairs
    )


def _join(readings: Iterable[Columns]) -> Columns:
    """Merge what all parts know about each column. Parts that ignore their input count only if every part does."""
    readings = list(readings)
    busy = [reading for reading in readings if not all(column.is_idle for column in reading.values())]
    columns: Columns = {}
    for reading in busy or readings:
        for position, column in reading.items():
            columns[position] = columns[position].beside(column) if position in columns else column
    return columns


def _read_histogram(boosting: Any, width: int | None) -> Columns:
    """Read a HistGradientBoosting estimator, for which missing values and unknown categories are like any other."""
    columns = _read_plain(boosting, width)
    if boosting._preprocessor is not None:
        columns |= _read_branches(boosting._preprocessor, width)
    return {
        position: replace(column, type=column.type or "float", missing=True) for position, column in columns.items()
    }


def _read_encoder(encoder: Any, width: int | None) -> Columns:
    """Read the categories of a OneHotEncoder, OrdinalEncoder or TargetEncoder."""
    takes_unknown = getattr(encoder, "handle_unknown", "ignore") != "error"
    columns: Columns = {}
    for position, categories in enumerate(encoder.categories_):
        values = categories.tolist()
        nulls = [value for value in values if value is None or is_nan(value)]
        known = tuple(value for value in values if value is not None and not is_nan(value))
        if known and type_of(known) is None:
            raise ModelError(f"has categories of the type {type(known[0]).__name__}, which JSON does not have")
        columns[position] = Column(
            type=type_of(known),
            choices=None if takes_unknown else known,
            known=known if is_nan(getattr(encoder, "unknown_value", None)) else None,
            missing=_takes_missing(encoder, nulls, takes_unknown),
            null=nulls[0] if nulls else math.nan,
            is_object=categories.dtype == object,
            example=known[0] if known else None,
        )
    return columns


def _takes_missing(encoder: Any, nulls: list[Any], takes_unknown: bool) -> bool | None:
    """Return whether an encoder accepts missing values. None: it passes them on, which it does for NaN only."""
    if not nulls:
        return None if takes_unknown else False
    hands_on = is_nan(getattr(encoder, "encoded_missing_value", None))
    return None if hands_on and is_nan(nulls[0]) else True


def _refuse_dicts(part: Any, width: int | None) -> Columns:
    raise ModelError(f"has a {type(part).__name__} in it, which takes dictionaries; fit a ColumnTransformer on columns")


def _read_nothing(part: Any, width: int | None) -> Columns:
    """Read an estimator that does not look at its input."""
    return dict.fromkeys(range(width or 0), Column(missing=True, is_idle=True))


def _read_adaboost(boosting: Any, width: int | None) -> Columns:
    """Read an AdaBoost estimator, which hands its input on but refuses missing values by itself."""
    columns = _read_inner(boosting, width, "estimators_")
    return {position: replace(column, missing=False) for position, column in columns.items()}


def _read_category_counts(bayes: Any, width: int | None) -> Columns:
    """Read a CategoricalNB, which takes the numbers of categories."""
    counts = bayes.n_categories_.tolist()
    return {j: Column("int", tuple(range(count)), missing=False, example=0) for j, count in enumerate(counts)}


def _read_imputer(imputer: Any, width: int | None) -> Columns:
    are_objects = getattr(imputer, "_fit_dtype", np.dtype(float)).kind in "OU"
    column = Column(None if are_objects else "float", missing=True, null=imputer.missing_values)
    columns = dict.fromkeys(range(imputer.n_features_in_), column)
    if getattr(imputer, "strategy", "") == "constant":  # which is typical of nothing
        return columns
    columns = _with_examples(imputer, columns)
    if not are_objects:
        return columns
    kinds = {position: type_of([column.example]) for position, column in columns.items()}
    wider = {"int": "float"}  # of which the most frequent may be whole
    return {j: replace(column, type=wider.get(kinds[j] or "", kinds[j])) for j, column in columns.items()}


def _read_plain(part: Any, width: int | None) -> Columns:
    """Read a part by its tags alone: scikit-learn's own take numbers, or texts; of others nothing is known."""
    tags = sklearn.utils.get_tags(part).input_tags if isinstance(part, BaseEstimator) else None
    if tags is not None and tags.string and not tags.two_d_array:
        return {0: Column(type="str", missing=False, is_text=True)}
    if tags is None or is_opaque(part):
        predicts = hasattr(part, "predict")  # as LightGBM and XGBoost do
        takes = tags is not None and tags.allow_nan and predicts
        column = Column(missing=True if takes else None, is_category=predicts, is_opaque=True)
    else:
        hands_on = isinstance(part, FunctionTransformer)
        column = Column(None if hands_on else "float", missing=None if tags.allow_nan or hands_on else False)
    return _with_examples(part, dict.fromkeys(range(width or 0), column))


def _read_catboost(part: Any) -> Columns:
    """Read an estimator of CatBoost's, which takes texts, or whole numbers, where it has categories."""
    if part.get_embedding_feature_indices():
        raise ModelError("has embedding features, which are arrays; a feature should be a number or a text")
    number = Column("float", missing=part.get_all_params().get("nan_mode") != "Forbidden", is_opaque=True)
    category = Column("str", missing=False, is_object=True, is_opaque=True, takes_int=True)
    columns = dict.fromkeys(range(len(part.feature_names_)), number)
    columns |= dict.fromkeys(part.get_cat_feature_indices(), category)
    return columns | dict.fromkeys(part.get_text_feature_indices(), replace(category, takes_int=False))


def _read_booster(part: Any, width: int | None) -> Columns:
    """Read an estimator of LightGBM's or XGBoost's, which keep the categories of pandas' columns."""
    columns, categories = _read_plain(part, width), find_categories(part)
    if categories is None:
        return columns
    read = {position: replace(column, type="float", is_category=False) for position, column in columns.items()}
    for position, values in categories.items():
        if (kind := type_of(values)) is None:
            raise ModelError(f"has categories like {values[:1]}, which JSON does not have, or of several types")
        column = Column(kind, tuple(values), missing=True, is_category=True, is_opaque=True, example=values[0])
        read[position] = column
    return read


def _with_examples(part: Any, columns: Columns) -> Columns:
    """Add a value that is typical of each column, where the part has learnt one."""
    for attribute in ("statistics_", "mean_", "center_", "data_min_"):
        values = getattr(part, attribute, None)
        if isinstance(values, np.ndarray) and values.shape == (len(columns),):
            examples = [float(f"{value:.4g}") if isinstance(value, float) else value for value in values.tolist()]
            return {
                position: replace(column, example=None if is_nan(example) else example)
                for (position, column), example in zip(columns.items(), examples, strict=True)
            }
    return columns


def type_of(values: Iterable[Any]) -> str | None:
    """Return the one type of feature that all values have, if there is one."""
    kinds = {type(value) for value in values}
    if kinds == {int, float}:
        return "float"
    return kinds.pop().__name__ if len(kinds) == 1 and kinds <= set(FEATURE_TYPES.values()) else None


def is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def is_opaque(part: Any) -> bool:
    """Whether a part may do anything with its input: it is not scikit-learn's, or runs a function of the user's."""
    function = getattr(part, "func", None)
    own = type(part).__module__.partition(".")[0] == "sklearn"
    if not own or not isinstance(part, TransformerMixin) or isinstance(function, np.ufunc | None):
        return not own
    return not getattr(function, "func", function).__module__.startswith("sklearn.")  # a partial of its own check_array


def _needs_names(part: Any) -> bool:
    """Whether a part may ask for the names of columns, or hand on a DataFrame."""
    output = getattr(part, "_sklearn_output_config", {}).get("transform", "default")
    return output != "default" or (hasattr(part, "fit") and is_opaque(part))


def find_parts(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Yield an estimator and every object of scikit-learn's or of the user's inside it, each once."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, type | str | bytes | int | float | None):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        inner: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object):
        inner = value
    elif hasattr(value, "__dict__") and (hasattr(value, "fit") or type(value).__module__.startswith("sklearn.")):
        yield value
        inner = vars(value).values()
    else:
        return
    for item in inner:
        yield from find_parts(item, seen)


Reader = Callable[[Any, int | None], Columns]


def _inside(attribute: str) -> Reader:
    return functools.partial(_read_inner, attribute=attribute)


LIBRARIES = ("sklearn", "lightgbm", "xgboost")

READERS: dict[str, Reader] = {  # by the name of a library's class; of other classes the tags are read
    "LGBMModel": _read_booster,
    "XGBModel": _read_booster,
    "Pipeline": _read_steps,
    "ColumnTransformer": _read_branches,
    "FeatureUnion": _read_union,
    "DictVectorizer": _refuse_dicts,
    "FeatureHasher": _refuse_dicts,
    "_BaseEncoder": _read_encoder,
    "_BaseImputer": _read_imputer,
    "MissingIndicator": _read_imputer,
    "CategoricalNB": _read_category_counts,
    "BaseHistGradientBoosting": _read_histogram,
    "BaseWeightBoosting": _read_adaboost,
    "_BaseStacking": _read_stack,
    "BaseBagging": _read_bag,
    "DummyClassifier": _read_nothing,
    "DummyRegressor": _read_nothing,
    "_ConstantPredictor": _read_nothing,
    # Those that give their input unchecked to what they keep under this name.
    "BaseSearchCV": _inside("best_estimator_"),
    "CalibratedClassifierCV": _inside("calibrated_classifiers_"),
    "_CalibratedClassifier": _inside("estimator"),
    "BaseThresholdClassifier": _inside("estimator_"),
    "SelfTrainingClassifier": _inside("estimator_"),
    "RANSACRegressor": _inside("estimator_"),
    "FrozenEstimator": _inside("estimator"),
    "TransformedTargetRegressor": _inside("regressor_"),
    "_BaseVoting": _inside("estimators_"),
    "OneVsRestClassifier": _inside("estimators_"),
    "OneVsOneClassifier": _inside("estimators_"),
    "OutputCodeClassifier": _inside("estimators_"),
    "_MultiOutputEstimator": _inside("estimators_"),
}

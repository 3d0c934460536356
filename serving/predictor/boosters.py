"""What LightGBM and XGBoost keep in ways of their own: the categories of columns, and names without blanks."""

from __future__ import annotations

import itertools
import json
from typing import Any

from serving.errors import ModelError, listed

XGBOOST_CATEGORIES = '"cats":'  # the key in a model's JSON


def is_of(part: Any, library: str) -> bool:
    """Whether a part is an estimator of a library's, or of a class made of one."""
    return any(kind.__module__.partition(".")[0] == library for kind in type(part).__mro__)


def restore_blanks(names: list[str], known: set[str]) -> list[str]:
    """Return names of LightGBM's, which writes underscores for blanks, as they are known with blanks.

    Raises `ModelError` where several known names are one.
    """
    blanks: dict[str, list[str]] = {}
    for name in sorted(name for name in known if " " in name):
        blanks.setdefault(name.replace(" ", "_"), []).append(name)
    for name in names:
        if len(found := blanks.get(name, [])) > 1:
            problem = f"has one feature {name!r}, with underscores for blanks"
            raise ModelError(f"{problem}, but {listed(found)} in [features]; keep one of them")
    return [blanks.get(name, [name])[0] for name in names]


def find_categories(part: Any) -> dict[int, list[Any]] | None:
    """Return the categories of an estimator's columns, by their position. None: it does not say."""
    return _find_of_lightgbm(part.booster_) if is_of(part, "lightgbm") else _find_of_xgboost(part.get_booster())


def _find_of_lightgbm(booster: Any) -> dict[int, list[Any]] | None:
    positions, categories = booster.params.get("categorical_column") or [], booster.pandas_categorical or []
    if len(positions) != len(categories):
        return None  # some are numbers, which were said to be categories
    return dict(zip(positions, categories, strict=True))


def _find_of_xgboost(booster: Any) -> dict[int, list[Any]] | None:
    """Read the categories in the model's JSON, which has them since XGBoost 3.1."""
    if "c" not in (booster.feature_types or ()):
        return {}
    text = bytes(booster.save_raw("json")).decode()
    start = text.find(XGBOOST_CATEGORIES)
    if start < 0:
        return None
    encoded = json.JSONDecoder().raw_decode(text, start + len(XGBOOST_CATEGORIES))[0]["enc"]
    try:
        categories = [_decode(**column) for column in encoded]
    except UnicodeDecodeError:  # XGBoost counts letters where it should count bytes
        return None
    return {position: values for position, values in enumerate(categories) if values}


def _decode(values: list[Any], offsets: list[int] | None = None, **_: Any) -> list[Any]:
    """Return the categories of a column: numbers, or texts as signed bytes with the place where each begins."""
    if offsets is None:
        return values
    data = bytes(value % 256 for value in values)
    return [data[start:end].decode() for start, end in itertools.pairwise(offsets)]

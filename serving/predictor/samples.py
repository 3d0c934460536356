"""Rows that nobody sent: made up around known ones, or kept by an estimator, to compare answers with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.predictor.contract import Contract, Rows
from serving.predictor.features import FeatureSettings, some_value, within
from serving.predictor.inputs import find_parts

MAX_COMPARED = 16  # rows that are answered both alone and together
N_VARIED = 400  # made-up rows with which the runtimes are compared


def make_up_rows(
    rows: Rows, contract: Contract, n_rows: int, thresholds: Mapping[str, list[float]] | None = None
) -> Rows:
    """Make up rows around some, which are the same each time, and all within what the contract admits.

    One third is rounded like the known rows and one third to one decimal more: on such a grid, ties and exact
    thresholds are common. `thresholds` are numbers at which the estimator may decide otherwise, by feature.
    """
    thresholds = thresholds or {}
    random = np.random.default_rng(0)
    varied = [dict(rows[random.integers(len(rows))]) for _ in range(n_rows)]
    for name, feature in contract.features.items():
        cells = feature.choices or [row[name] for row in rows if row[name] is not None] or [some_value(feature)]
        spread = _spread_of(cells, feature)
        for index, row in enumerate(varied):
            drawn = random.random()
            if feature.missing and drawn < 0.1:
                row[name] = None
            elif name in thresholds and drawn < 0.3:
                row[name] = within(thresholds[name][random.integers(len(thresholds[name]))], feature)
            elif drawn < 0.8:
                row[name] = _make_up_cell(cells, spread, feature, random, index % 3)
    return varied


def _spread_of(cells: list[Any], feature: FeatureSettings) -> float:
    """Return how far the known numbers of a feature spread; 0 where that is not known, as of one alone."""
    if feature.choices is not None or feature.type in ("bool", "str") or len(cells) == 1:
        return 0.0
    return float(np.std(np.array(cells, float)))


def _make_up_cell(
    cells: list[Any], spread: float, feature: FeatureSettings, random: np.random.Generator, rounding: int
) -> Any:
    """Return a choice of a feature, or a text that may be unknown, or a number near known ones."""
    cell = cells[random.integers(len(cells))]
    if feature.choices is not None:
        return cell
    if feature.type == "bool":
        return bool(random.integers(2))
    if feature.type == "str":
        return cell + "?" * int(random.integers(2))
    spread = spread or (abs(cell) or 1.0) * 10 ** random.uniform(-1, 3)
    decimals = len(repr(float(cell)).partition(".")[2])
    value = float(cell + spread * random.normal())
    return within(round(value, decimals + rounding - 1) if rounding else value, feature)


def find_training_rows(estimator: Any, contract: Contract) -> list[dict[str, Any]]:
    """Return rows that an estimator keeps of its training, as one of neighbours does."""
    if any(feature.type != "float" for feature in contract.features.values()):
        return []
    kept = [getattr(part, name, None) for part in find_parts(estimator) for name in ("_fit_X", "support_vectors_")]
    rows = [X for X in kept if isinstance(X, np.ndarray) and X.shape[1] == len(contract.names)]
    return [
        {name: within(cell, contract.features[name]) for name, cell in zip(contract.names, row, strict=True)}
        for X in rows
        for row in X[:: len(X) // N_VARIED + 1].tolist()
    ]


def find_thresholds(estimator: Any, contract: Contract) -> dict[str, list[float]]:
    """Return the thresholds of trees by feature, each with the next float32 on either side."""
    thresholds: dict[str, set[float]] = {}
    order = list(contract.columns)
    for part in find_parts(estimator):
        if (tree := getattr(part, "tree_", None)) is not None and tree.n_features == len(contract.columns):
            for position, threshold in zip(tree.feature.tolist(), tree.threshold.tolist(), strict=True):
                name = order[position]
                if position >= 0 and contract.features[name].type == "float" and math.isfinite(threshold):
                    near = np.float32(threshold)
                    beside = (np.nextafter(near, np.float32(end)) for end in (-np.inf, np.inf))
                    thresholds.setdefault(name, set()).update((threshold, float(near), *map(float, beside)))
    return {name: sorted(values) for name, values in thresholds.items()}

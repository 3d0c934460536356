"""What people hit in the field, a row each: what was tried, and what should come of it. The next one is a row."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from lightgbm import LGBMClassifier
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from xgboost import XGBClassifier

RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class ModelCase:
    """A model as its owner made it, asked as a client would.

    `expected` is the prediction, a list of them for rows, or an error's status with a part of its text. Of a model
    that cannot be served, `refused` is a part of the line that ends the start.
    """

    id: str
    make: Callable[[], Any]  # a fitted estimator
    asked: Any = None  # a row or rows as JSON has them, or the query of a GET
    expected: Any = None
    refused: str = ""
    suffix: str = ".joblib"
    settings: dict[str, Any] = field(default_factory=dict)  # tables, such as {"features": {…}, "model": {…}}


def fit_blanks() -> Any:
    X = pd.DataFrame(RNG.normal(size=(200, 2)), columns=["body mass (kg)", "bill length (mm)"])
    return LGBMClassifier(n_estimators=5, verbosity=-1, n_jobs=1).fit(X, X["body mass (kg)"] > 0)


def fit_numbers() -> Any:
    X = np.array([[0.0], [1.0], [2.0], [3.0]])
    return LogisticRegression().fit(X, ["low", "low", "high", "high"])


BOOLEANS = pd.DataFrame({"smoker": [True, False] * 20, "vip": [True] * 20 + [False] * 20})
SAID = {"features": {"smoker": {"type": "bool"}, "vip": {"type": "bool"}}}


def fit_booleans(estimator: Any) -> Any:
    return estimator.fit(BOOLEANS, [1, 0] * 20)


def fit_rooms() -> Any:
    X = pd.DataFrame({"rooms": [1, 2, 3] * 20, "area": RNG.normal(60, 9, 60)})
    columns = make_column_transformer((OneHotEncoder(), ["rooms"]), (SimpleImputer(), ["area"]))
    return make_pipeline(columns, LogisticRegression()).fit(X, X.rooms * 10)


MODELS = [
    ModelCase("array-of-one", fit_numbers, [{"x0": 9.0}], ["high"]),
    ModelCase("text-for-a-number", fit_numbers, {"x0": "9"}, (422, "valid number")),
    ModelCase("lightgbm-underscores", fit_blanks, {"body_mass_(kg)": 9, "bill_length_(mm)": 0}, True),
    ModelCase("booleans-are-numbers", lambda: fit_booleans(LogisticRegression()), {"smoker": 1, "vip": 0}, 1),
    ModelCase(
        "true-for-a-number", lambda: fit_booleans(LogisticRegression()), {"smoker": True, "vip": 0}, (422, "smoker")
    ),
    ModelCase(
        "booleans-once-said",
        lambda: fit_booleans(LogisticRegression()),
        [{"smoker": True, "vip": False}, {"smoker": 0, "vip": 1.0}],
        [1, 0],
        settings=SAID,
    ),
    ModelCase("booleans-in-a-query", lambda: fit_booleans(LogisticRegression()), "smoker=true&vip=0", 1, settings=SAID),
    ModelCase(
        "booleans-of-xgboost",
        lambda: fit_booleans(XGBClassifier(n_estimators=5, n_jobs=1)),
        [{"smoker": True, "vip": False}, {"smoker": 0, "vip": 1}, {"smoker": True}],
        [1, 0, 1],
        settings=SAID,
    ),
    ModelCase("whole-float-for-an-int", fit_rooms, [{"rooms": 2.0, "area": 50}, {"rooms": 3, "area": 50.0}], [20, 30]),
    ModelCase("fraction-for-an-int", fit_rooms, {"rooms": 2.5, "area": 50}, (422, "valid integer")),
    ModelCase("whole-float-in-a-query", fit_rooms, "rooms=2.0&area=50", 20),
    ModelCase("left-out", fit_rooms, [{"rooms": 2}, {"rooms": 1, "area": None}], [20, 10]),
    ModelCase("left-out-but-needed", fit_rooms, {"area": 50}, (422, "Field required")),
]

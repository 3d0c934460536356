"""What people hit in the field, a row each: what was tried, and what should come of it. The next one is a row."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from lightgbm import LGBMClassifier
from sklearn.linear_model import LogisticRegression

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


MODELS = [
    ModelCase("array-of-one", fit_numbers, [{"x0": 9.0}], ["high"]),
    ModelCase("text-for-a-number", fit_numbers, {"x0": "9"}, (422, "valid number")),
    ModelCase("lightgbm-underscores", fit_blanks, {"body_mass_(kg)": 9, "bill_length_(mm)": 0}, True),
]

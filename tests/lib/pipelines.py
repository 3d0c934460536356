"""Pipelines fitted on tables with strings, numbers and missing values."""

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from palmerpenguins import load_penguins
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor, make_column_selector, make_column_transformer
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import (
    BaggingRegressor,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.impute import KNNImputer, MissingIndicator, SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, RANSACRegressor, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsOneClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import Pipeline, make_pipeline, make_union
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    OrdinalEncoder,
    StandardScaler,
)
from sklearn.tree import DecisionTreeClassifier

PENGUINS = load_penguins()  # of Palmer Station: strings, numbers, missing values
SPECIES = PENGUINS.pop("species")
TEXTS = ["island", "sex"]
NUMBERS = [name for name in PENGUINS if name not in TEXTS]
CATEGORIES = PENGUINS.astype(dict.fromkeys(TEXTS, "category"))
WEIGHED = PENGUINS[PENGUINS["body_mass_g"].notna()].drop(columns="body_mass_g")
MASS = PENGUINS["body_mass_g"].dropna()
FILMS = ["a good film", "a bad film", "good, good", "bad and dull"]
ISLANDS = ["Biscoe", "Dream", "Torgersen"]


def encoding() -> Any:
    return make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder())


def preprocessing() -> Any:
    return make_column_transformer((encoding(), TEXTS), (make_pipeline(SimpleImputer(), StandardScaler()), NUMBERS))


def forest() -> Any:
    return make_pipeline(preprocessing(), RandomForestClassifier(n_estimators=5, random_state=0))


def weigh() -> Any:
    numbers = [name for name in NUMBERS if name != "body_mass_g"]
    return make_pipeline(make_column_transformer((encoding(), TEXTS), (KNNImputer(), numbers)), Ridge())


ESTIMATORS: dict[str, Callable[[], tuple[Any, Any]]] = {  # fitted, with the table that it was fitted on
    "boosting": lambda: fit(make_pipeline(preprocessing(), GradientBoostingClassifier(n_estimators=5))),
    "native-categories": lambda: fit(HistGradientBoostingClassifier(max_iter=5), CATEGORIES),
    "grid-search": lambda: fit(
        GridSearchCV(make_pipeline(preprocessing(), LogisticRegression()), {"logisticregression__C": [1, 10]}, cv=2)
    ),
    "calibrated": lambda: fit(CalibratedClassifierCV(forest(), cv=2)),
    "stacking": lambda: fit(StackingClassifier([("a", forest()), ("b", forest())], cv=2)),
    "voting": lambda: fit(VotingClassifier([("a", forest()), ("b", forest())], voting="soft")),
    "several-outputs": lambda: fit(MultiOutputClassifier(forest()), y=np.column_stack([SPECIES, SPECIES.str[0]])),
    "log-target": lambda: fit(TransformedTargetRegressor(weigh(), func=np.log, inverse_func=np.exp), WEIGHED, MASS),
    "passthrough": lambda: fit(
        make_pipeline(
            make_column_transformer((OrdinalEncoder(), ["island"]), remainder="passthrough"),
            HistGradientBoostingClassifier(max_iter=5),
        ),
        PENGUINS.drop(columns="sex"),
    ),
    "columns-by-place": lambda: fit(
        make_pipeline(
            ColumnTransformer(
                [
                    ("texts", encoding(), [0, 5]),
                    ("slice", SimpleImputer(), slice(1, 3)),
                    ("dropped", "drop", [4]),
                    ("mask", SimpleImputer(), [False] * 6 + [True]),
                ]
            ),
            LogisticRegression(max_iter=10_000),
        )
    ),
    "columns-by-kind": lambda: fit(
        make_pipeline(
            make_column_transformer(
                (encoding(), make_column_selector(dtype_exclude="number")), remainder=make_pipeline(SimpleImputer())
            ),
            DecisionTreeClassifier(max_depth=3),
        )
    ),
    "nested": lambda: fit(
        make_pipeline(
            make_column_transformer(
                (make_column_transformer((encoding(), ["sex"]), (OneHotEncoder(), ["island"])), TEXTS),
                (make_union(SimpleImputer(), MissingIndicator(features="all")), NUMBERS),
            ),
            DecisionTreeClassifier(max_depth=3),
        )
    ),
    "function": lambda: fit(
        make_pipeline(FunctionTransformer(add_ratio), SimpleImputer(), LinearRegression()), WEIGHED[NUMBERS[:3]], MASS
    ),
    "dataframe-output": lambda: fit(
        make_pipeline(SimpleImputer(), StandardScaler(), LinearRegression()).set_output(transform="pandas"),
        WEIGHED[NUMBERS[:3]],
        MASS,
    ),
    "stacked-passthrough": lambda: fit(
        StackingClassifier(
            [("a", make_pipeline(make_column_transformer((SimpleImputer(), ["year"])), LogisticRegression()))],
            DecisionTreeClassifier(max_depth=3, random_state=0),
            cv=2,
            passthrough=True,
        ),
        WEIGHED[["year", "flipper_length_mm"]],
        SPECIES[WEIGHED.index],
    ),
    "bagged-columns": lambda: fit(
        BaggingRegressor(make_pipeline(SimpleImputer(), Ridge()), 5, max_features=2, random_state=0),
        WEIGHED[NUMBERS[:3]],
        MASS,
    ),
    "numbers-by-name": lambda: fit(
        make_pipeline(
            make_column_transformer((StandardScaler(), NUMBERS[:2]), ("passthrough", NUMBERS[2:3])),
            SimpleImputer(),
            Ridge(),
        ),
        WEIGHED[NUMBERS[:3]],
        MASS,
    ),
    "pairs": lambda: fit(
        OneVsOneClassifier(make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression())), PENGUINS[NUMBERS]
    ),
    "outliers": lambda: fit(
        RANSACRegressor(make_pipeline(SimpleImputer(), Ridge()), min_samples=100, random_state=0),
        WEIGHED[NUMBERS[:3]],
        MASS,
    ),
    "searched-passthrough": lambda: fit(
        GridSearchCV(Pipeline([("scale", "passthrough"), ("impute", SimpleImputer()), ("tell", Ridge())]), {}, cv=2),
        WEIGHED[NUMBERS[:3]],
        MASS,
    ),
    "branch-passthrough": lambda: fit(
        make_pipeline(
            make_column_transformer((encoding(), TEXTS), (Pipeline([("as-it-is", "passthrough")]), ["year"])),
            DecisionTreeClassifier(max_depth=3),
        )
    ),
    "baseline": lambda: fit(VotingClassifier([("a", forest()), ("b", DummyClassifier())], voting="soft")),
    "numbers": lambda: fit(
        GridSearchCV(make_pipeline(SimpleImputer(), StandardScaler(), Ridge()), {"ridge__alpha": [1, 2]}),
        WEIGHED[NUMBERS[:3]],
        MASS,
    ),
}


def add_ratio(X: pd.DataFrame) -> pd.DataFrame:
    return X.assign(ratio=X["bill_length_mm"] / X["bill_depth_mm"])


def fit(estimator: Any, X: Any = PENGUINS, y: Any = SPECIES) -> tuple[Any, Any]:
    return estimator.fit(X, y), X


@functools.cache
def fitted(name: str) -> tuple[Any, Any]:
    return ESTIMATORS[name]()


def rows_of(table: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(table.to_json(orient="records"))
    return rows

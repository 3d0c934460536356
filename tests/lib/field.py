"""What people hit in the field, a row each: what was tried, and what should come of it. The next one is a row."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import sklearn
from catboost import CatBoostClassifier, CatBoostRegressor
from lightgbm import LGBMClassifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import (
    ColumnTransformer,
    TransformedTargetRegressor,
    make_column_selector,
    make_column_transformer,
)
from sklearn.ensemble import RandomForestClassifier, StackingClassifier, VotingClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from xgboost import XGBClassifier

from tests.lib import steps
from tests.lib.artifacts import Trap, pickle_old


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


BLANKS = pd.DataFrame(np.random.default_rng(0).normal(size=(200, 2)), columns=["body mass (kg)", "bill length (mm)"])


def boost(estimator: Any = None) -> Any:
    """Return LightGBM, or an estimator with it inside, fitted on names with blanks."""
    booster = LGBMClassifier(n_estimators=5, verbosity=-1, n_jobs=1)
    return (estimator(booster) if estimator else booster).fit(BLANKS, BLANKS["body mass (kg)"] > 0)


CATS = pd.DataFrame({"home city": ["a", "b", "a", "c"] * 20, "rooms": [1, 2, 2, 4] * 20, "area": np.arange(80.0)})
NOTES = ["a good film", "a bad film", "good, good", "bad and dull"] * 20


def cat(kind: Any = CatBoostClassifier, **options: Any) -> Any:
    return kind(iterations=5, verbose=0, allow_writing_files=False, **options)


def fit_cat(
    X: Any = CATS, y: Any = (CATS["home city"] == "a"), wrap: Any = lambda booster: booster, **options: Any
) -> Any:
    return wrap(cat(**options)).fit(X, y)


def fit_numbers() -> Any:
    X = np.array([[0.0], [1.0], [2.0], [3.0]])
    return LogisticRegression().fit(X, ["low", "low", "high", "high"])


BOOLEANS = pd.DataFrame({"smoker": [True, False] * 20, "vip": [True] * 20 + [False] * 20})
SAID = {"features": {"smoker": {"type": "bool"}, "vip": {"type": "bool"}}}


def fit_booleans(estimator: Any) -> Any:
    return estimator.fit(BOOLEANS, [1, 0] * 20)


def fit_rooms() -> Any:
    X = pd.DataFrame({"rooms": [1, 2, 3] * 20, "area": [50.0, 60.5] * 30})
    columns = make_column_transformer((OneHotEncoder(), ["rooms"]), (SimpleImputer(), ["area"]))
    return make_pipeline(columns, DecisionTreeClassifier(random_state=0)).fit(X, X.rooms * 10)


TEXTS = pd.DataFrame({"city": ["a", "bbb", "cc", "a"] * 10, "size": np.arange(40.0) % 7})
CATEGORIES = TEXTS.astype({"city": "category"})
DATES = pd.DataFrame({"when": ["2026-01-05", "2026-02-28"] * 20, "size": np.arange(40.0) % 7})
SIZES = pd.DataFrame({"size": np.arange(40.0) % 7, "weight": np.arange(40.0) % 3})
ALL = TEXTS.assign(count=range(40), flag=[True, False] * 20)
TEXT: dict[str, Any] = {"features": {"city": {"type": "str"}, "size": {}}}
CHOICES: dict[str, Any] = {"features": {"city": {"choices": ["a", "bbb", "cc"]}, "size": {}}}
BOTH: dict[str, Any] = {"features": {"size": {}, "weight": {}}}


def behind_columns(X: Any, booster: Any) -> Any:
    """Return a booster, which tells the city, behind a scaler that lets the city pass."""
    columns = ColumnTransformer([("a", StandardScaler(), ["size"])], remainder="passthrough")
    return make_pipeline(columns.set_output(transform="pandas"), booster).fit(X, TEXTS["city"])


def step(X: Any, *parts: Any, output: str = "default") -> Any:
    """Return steps in front of a tree, which answers the sum of what they make of a row of X.

    `output` is what `sklearn.set_config` was told at the training.
    """
    before = sklearn.get_config()["transform_output"]
    sklearn.set_config(transform_output=output)
    try:
        made = np.asarray(make_pipeline(*parts).fit_transform(X), float)
        return make_pipeline(*parts, DecisionTreeRegressor()).fit(X, made.sum(axis=1))
    finally:
        sklearn.set_config(transform_output=before)


NUMBERS = np.random.default_rng(0).normal(size=(60, 2))
WORDS = np.where(NUMBERS[:, 0] > 0, "high", "low")
FAR = [{"x0": 9.0, "x1": 0.0}, {"x0": -9.0, "x1": 0.0}]
ONNX = {"model": {"runtime": "onnx"}}


def fit_votes(voting: Any) -> Any:
    voters = [("t", DecisionTreeClassifier()), ("n", GaussianNB()), ("l", LogisticRegression())]
    return VotingClassifier(voters, voting=voting).fit(NUMBERS, WORDS)


def fit_catboost() -> Any:
    return CatBoostClassifier(iterations=5, verbose=0, allow_writing_files=False).fit(NUMBERS, WORDS)


def fit_target() -> Any:
    target = TransformedTargetRegressor(LinearRegression(), func=np.log, inverse_func=np.exp)
    return target.fit(NUMBERS, np.exp(NUMBERS[:, 0]))


def fit_forest() -> Any:
    return RandomForestClassifier(2).fit(NUMBERS, WORDS)


def fit_file_names() -> Any:
    vectorizer = CountVectorizer(input="filename")
    vectorizer.vocabulary_ = {"fox": 0}
    return make_pipeline(vectorizer, LogisticRegression().fit([[0], [1]], [0, 1]))


def pickle_of(module: str) -> Any:
    """Return what loads a pickle that names a class of a module."""
    return Trap(pickle.loads, f"c{module}\nStep\n.".encode())


def fit_old_tree() -> Any:
    """Return what loads a tree of an older version."""
    return Trap(pickle.loads, pickle_old(DecisionTreeClassifier(max_depth=2).fit(NUMBERS, WORDS)))


def fit_no_texts() -> Any:
    texts = make_column_selector(dtype_include=object)
    columns = make_column_transformer((OneHotEncoder(), texts), remainder="passthrough")
    return make_pipeline(columns, DecisionTreeClassifier()).fit(SIZES, SIZES["size"])


def in_onnx(name: str, make: Callable[[], Any], expected: Any) -> ModelCase:
    return ModelCase(f"onnx-{name}", make, FAR, expected, settings=ONNX)


def refused(name: str, make: Callable[[], Any], line: str, **more: Any) -> ModelCase:
    return ModelCase(name, make, refused=line, **more)


MODELS = [
    ModelCase("array-of-one", fit_numbers, [{"x0": 9.0}], ["high"]),
    ModelCase("text-for-a-number", fit_numbers, {"x0": "9"}, (422, "valid number")),
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
    ModelCase("lightgbm-underscores", boost, {"body_mass_(kg)": 9, "bill_length_(mm)": 0}, True),
    ModelCase(
        "lightgbm-blanks",
        boost,
        {"body mass (kg)": 9, "bill length (mm)": 0},
        True,
        settings={"features": {"body mass (kg)": {"ge": -9}, "bill length (mm)": {}}},
    ),
    ModelCase(
        "lightgbm-blanks-behind-passthrough",
        lambda: boost(lambda booster: make_pipeline("passthrough", booster)),
        "body+mass+(kg)=9&bill_length_(mm)=0",
        True,
        settings={"features": {"body mass (kg)": {}}},
    ),
    ModelCase(
        "lightgbm-blanks-that-others-keep",
        lambda: boost(lambda booster: VotingClassifier([("a", booster), ("b", LogisticRegression())], voting="soft")),
        {"body mass (kg)": 9, "bill length (mm)": 0},
        True,
    ),
    ModelCase(
        "lightgbm-two-names-for-one",
        boost,
        refused="'body_mass_(kg)', with underscores for blanks, but 'body mass (kg)', 'body mass_(kg)' in [features]",
        settings={"features": {"body mass (kg)": {}, "body mass_(kg)": {}}},
    ),
    ModelCase(
        "lightgbm-both-spellings",
        boost,
        refused="features.\"body_mass_(kg)\" is not about a feature of the model; did you mean 'body mass (kg)'?",
        settings={"features": {"body mass (kg)": {}, "body_mass_(kg)": {}}},
    ),
    ModelCase(
        "catboost-regressor",
        lambda: fit_cat(y=CATS["area"], kind=CatBoostRegressor, cat_features=["home city"]),
        {"home city": "a", "rooms": None, "area": 1},
        (200, '{"prediction":'),
    ),
    ModelCase(
        "catboost-positions",
        lambda: fit_cat(CATS.to_numpy(), cat_features=[0]),
        [{"x0": "a", "x1": 1, "x2": 0.5}, {"x0": "b", "x1": 2, "x2": 0.5}],
        [True, False],
    ),
    ModelCase(
        "catboost-numeric-categories",
        lambda: fit_cat(cat_features=["home city", "rooms"]),
        {"home city": "a", "rooms": 2, "area": 1},
        True,
        settings={"features": {"rooms": {"type": "int"}}},
    ),
    ModelCase(
        "catboost-numeric-categories-as-texts",
        lambda: fit_cat(cat_features=["home city", "rooms"]),
        {"home city": "a", "rooms": "2", "area": 1},
        True,
    ),
    ModelCase(
        "catboost-texts",
        lambda: fit_cat(CATS.assign(note=NOTES), cat_features=["home city"], text_features=["note"]),
        {"home city": "a", "rooms": 2, "area": 1, "note": "a good film"},
        True,
    ),
    ModelCase(
        "catboost-embeddings",
        lambda: fit_cat(CATS[["area"]].assign(e=[[1.0, 2.0]] * 80), embedding_features=["e"]),
        refused="has embedding features, which are arrays; a feature should be a number or a text",
    ),
    ModelCase(
        "catboost-last-in-a-pipeline",
        lambda: fit_cat(cat_features=[0], wrap=lambda booster: make_pipeline("passthrough", booster)),
        "home+city=a&rooms=2&area=1",
        True,
    ),
    ModelCase(
        "catboost-voting",
        lambda: fit_cat(CATS[["area"]], wrap=lambda booster: VotingClassifier([("a", booster)])),
        {"area": 0},
        True,
    ),
    ModelCase(
        "catboost-stacked",
        lambda: fit_cat(CATS[["area"]], CATS["area"] > 39, wrap=lambda booster: StackingClassifier([("a", booster)])),
        {"area": 70},
        True,
    ),
    ModelCase(
        "catboost-calibrated",
        lambda: fit_cat(
            CATS[["area"]], CATS["home city"] == "a", wrap=lambda booster: CalibratedClassifierCV(booster, cv=2)
        ),
        {"area": 70},
        (200, '{"prediction":false,"probabilities":{"false":0.5'),
    ),
    ModelCase(
        "catboost-searched",
        lambda: fit_cat(CATS[["area"]], CATS["area"] > 39, wrap=lambda booster: GridSearchCV(booster, {}, cv=2)),
        {"area": 70},
        True,
    ),
    ModelCase(
        "catboost-several-classes",
        lambda: fit_cat(y=CATS["home city"], cat_features=["home city"]),
        {"home city": "c", "rooms": 4, "area": 1},
        "c",
    ),
    ModelCase(
        "catboost-several-labels",
        lambda: fit_cat(
            CATS[["area"]], np.column_stack([CATS["area"] > 9, CATS["area"] > 39]) * 1, loss_function="MultiLogloss"
        ),
        {"area": 70},
        {"y0": 1, "y1": 1},
    ),
    ModelCase(
        "lightgbm-categories-behind-columns",
        lambda: behind_columns(CATEGORIES, LGBMClassifier(n_estimators=5, min_child_samples=1, verbosity=-1, n_jobs=1)),
        [{"size": 3, "city": "cc"}, {"size": 3, "city": None}, {"size": 3, "city": "a"}],
        ["cc", "a", "a"],
    ),
    ModelCase(
        "catboost-categories-behind-columns",
        lambda: behind_columns(TEXTS, cat(cat_features=[1])),
        [{"size": 3, "city": "cc"}, {"size": 3, "city": "a"}],
        ["cc", "a"],
    ),
    ModelCase(
        "step-with-dates",
        lambda: step(DATES, steps.Months()),
        [{"when": "2026-01-31", "size": 1}, {"when": "2026-02-01", "size": 5}],
        [2.0, 7.0],
        settings={"features": {"when": {"type": "str", "example": "2026-01-01"}, "size": {}}},
    ),
    ModelCase("step-with-texts", lambda: step(TEXTS, steps.Lengths()), {"city": "bbb", "size": 2}, 5.0, settings=TEXT),
    ModelCase(
        "step-with-objects",
        lambda: step(TEXTS.astype({"city": object}), steps.OldLengths()),
        {"city": "bbb", "size": 2},
        5.0,
        settings=TEXT,
    ),
    ModelCase(
        "step-with-categories",
        lambda: step(CATEGORIES, steps.Codes()),
        [{"city": "cc", "size": 2}, {"city": "a", "size": 2}],
        [4.0, 2.0],
        settings=CHOICES,
    ),
    ModelCase(
        "named-step-with-categories",
        lambda: step(CATEGORIES, steps.NamedCodes()),
        {"city": "cc", "size": 2},
        4.0,
        settings=CHOICES,
    ),
    ModelCase(
        "step-with-texts-of-choices",
        lambda: step(TEXTS, steps.Suffixes()),
        {"city": "bbb", "size": 2},
        6.0,
        settings=CHOICES,
    ),
    ModelCase(
        "step-with-types",
        lambda: step(ALL, steps.Types()),
        {"city": "bbb", "size": 2, "count": 9, "flag": False},
        15.0,
        settings={"features": {**TEXT["features"], "count": {"type": "int"}, "flag": {"type": "bool"}}},
    ),
    ModelCase("step-by-name", lambda: step(SIZES, steps.ByName()), {"size": 2, "weight": 1}, 5.0, settings=BOTH),
    ModelCase(
        "step-by-place", lambda: step(SIZES.to_numpy(), steps.ByPlace()), {"size": 2, "weight": 1}, 5.0, settings=BOTH
    ),
    ModelCase(
        "step-by-place-with-texts",
        lambda: step(TEXTS.to_numpy(), steps.TextByPlace()),
        {"city": "bbb", "size": 2},
        5.0,
        settings=TEXT,
    ),
    ModelCase(
        "function-of-texts",
        lambda: step(
            TEXTS, make_column_transformer((FunctionTransformer(steps.lengths), ["city"]), remainder="passthrough")
        ),
        {"city": "bbb", "size": 2},
        5.0,
        settings=TEXT,
    ),
    ModelCase(
        "function-of-categories",
        lambda: step(
            CATEGORIES, make_column_transformer((FunctionTransformer(steps.codes), ["city"]), remainder="passthrough")
        ),
        {"city": "cc", "size": 2},
        4.0,
        settings=CHOICES,
    ),
    ModelCase(
        "columns-by-type",
        lambda: step(
            TEXTS,
            make_column_transformer((OneHotEncoder(sparse_output=False), make_column_selector(dtype_include="str"))),
        ),
        {"city": "cc"},
        1.0,
    ),
    ModelCase(
        "output-in-pandas-for-columns",
        lambda: step(SIZES, StandardScaler(), ColumnTransformer([("a", "passthrough", ["size"])]), output="pandas"),
        {"size": 3.0, "weight": 1},
        (200, '{"prediction":'),
    ),
    ModelCase(
        "output-in-pandas-for-columns-of-texts",
        lambda: step(
            TEXTS,
            ColumnTransformer(
                [("a", OneHotEncoder(sparse_output=False), ["city"]), ("b", "passthrough", ["size"])],
                verbose_feature_names_out=False,
            ),
            ColumnTransformer([("a", "passthrough", ["size", "city_cc"])]),
            output="pandas",
        ),
        {"city": "cc", "size": 2},
        3.0,
    ),
    ModelCase(
        "output-in-pandas-for-a-step",
        lambda: step(
            SIZES,
            FunctionTransformer(),
            ColumnTransformer([("a", "passthrough", ["weight", "size"])], verbose_feature_names_out=False),
            steps.Chosen(),
            output="pandas",
        ),
        {"size": 3.0, "weight": 1},
        3.0,
    ),
    ModelCase(
        "output-in-pandas-and-onnx",
        lambda: step(SIZES, StandardScaler(), ColumnTransformer([("a", "passthrough", ["size"])]), output="pandas"),
        refused='set model.runtime = "sklearn"',
        settings={"model": {"runtime": "onnx"}},
    ),
    ModelCase(
        "output-in-polars",
        lambda: step(
            SIZES,
            ColumnTransformer([("a", "passthrough", ["weight", "size"])], verbose_feature_names_out=False),
            steps.InPolars(),
            output="polars",
        ),
        {"size": 3.0, "weight": 1},
        3.0,
    ),
    ModelCase(
        "text-that-a-step-does-not-know",
        lambda: step(TEXTS, steps.LookedUp()),
        refused="fails on its example row, of which 'city', 'size' are made up; give examples in [features], or golden",
        settings=TEXT,
    ),
    ModelCase(
        "step-that-is-not-finished",
        lambda: make_pipeline(steps.Unfinished(), LinearRegression().fit([[1.0]], [1.0])),
        refused="has code that fails on its example row: AttributeError: 'Unfinished' object has no attribute 'table_'",
        settings=TEXT,
    ),
    ModelCase(
        "step-that-wants-another-name",
        lambda: step(SIZES, steps.ByName()),
        refused="given a DataFrame instead: KeyError: 'weight' (in ByName.transform, ",
        settings={"features": {"size": {}, "mass": {}}},
    ),
    ModelCase(
        "step-that-wants-categories",
        lambda: step(CATEGORIES, steps.Codes()),
        refused="; 'city' is a text: with choices in [features], categories",
        settings=TEXT,
    ),
    ModelCase("selector-that-selects-nothing", fit_no_texts, {"size": 2, "weight": 1}, 2),
    in_onnx("lightgbm", lambda: LGBMClassifier(verbosity=-1, n_jobs=1).fit(NUMBERS, WORDS), ["high", "low"]),
    in_onnx("xgboost", lambda: XGBClassifier(n_jobs=1).fit(NUMBERS, NUMBERS[:, 0] > 0), [1, 0]),
    in_onnx("catboost", fit_catboost, ["high", "low"]),
    in_onnx("soft-votes", lambda: fit_votes("soft"), ["high", "low"]),
    in_onnx("hard-votes", lambda: fit_votes("hard"), ["high", "low"]),
    refused("onnx-target", fit_target, "no converter for TransformedTargetRegressor; set", settings=ONNX),
    refused("names-of-files", fit_file_names, "has a CountVectorizer with input='filename', for which"),
    refused("untrusted-forest", fit_forest, 'set model.trusted_types = ["sklearn.tree._tree.Tree"]', suffix=".skops"),
    refused("old-tree", fit_old_tree, "was made with another scikit-learn (of an unknown version), here"),
    refused("old-module", lambda: pickle_of("sklearn.ensemble.forest"), "was made with another scikit-learn"),
    refused("notebook", lambda: pickle_of("__main__"), "needs 'Step', which a notebook or a script has defined"),
    refused("no-module", lambda: pickle_of("nowhere"), "needs the module 'nowhere', which is neither installed, nor"),
    refused("own-module", lambda: pickle_of("serving"), "'serving' is the service's own here; give yours another"),
]

"""Models of LightGBM, XGBoost, CatBoost and scikit-learn that take categories: what is printed of them is served."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from catboost import CatBoostClassifier, CatBoostRegressor
from lightgbm import LGBMClassifier
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from xgboost import XGBClassifier

from model.describe import describe
from tests.lib.apps import call, serve_estimator
from tests.lib.artifacts import save
from tests.lib.clients import post_case

CITIES = ["c", "a", "b"]  # in an order of their own
TABLE = pd.DataFrame(
    {
        "home city": pd.Categorical(["a", "b", "c", "a"] * 30, categories=CITIES),
        "rooms": pd.Categorical([1, 2, 4] * 40),
        "area": np.arange(120.0),
    }
)
LABELS = (np.arange(120) * 7 % 5 > 2).astype(int)
TEXTS = TABLE.astype({"home city": "str", "rooms": "int"})


def lightgbm() -> Any:
    return LGBMClassifier(n_estimators=5, min_child_samples=2, verbosity=-1, n_jobs=1)


def catboost() -> Any:
    return CatBoostClassifier(iterations=5, verbose=0, cat_features=[0, 1], allow_writing_files=False)


BOOSTERS: dict[str, tuple[Callable[[], Any], pd.DataFrame]] = {
    "lightgbm": (lightgbm, TABLE),
    "lightgbm-in-a-pipeline": (lambda: make_pipeline(FunctionTransformer(), lightgbm()), TABLE),
    "xgboost": (lambda: XGBClassifier(n_estimators=5, enable_categorical=True, n_jobs=1), TABLE),
    "catboost": (catboost, TEXTS),
    "catboost-regressor": (
        lambda: CatBoostRegressor(iterations=5, verbose=0, cat_features=[0, 1], allow_writing_files=False),
        TEXTS,
    ),
    "histogram": (lambda: HistGradientBoostingClassifier(max_iter=5, min_samples_leaf=2), TABLE),
}


@pytest.mark.parametrize("name", BOOSTERS)
def test_described_model_is_served(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """What is printed of a model with categories, pasted as it is, serves what the model answers; rows give names."""
    make, table = BOOSTERS[name]
    estimator = make().fit(table, LABELS)
    path = tmp_path / "model.joblib"
    save(estimator, path)
    describe(path, trust=True, golden=None)
    serve_estimator(path, estimator, features=tomllib.loads(capsys.readouterr().out)["features"])
    (tmp_path / "rows.json").write_text(table.head(8).to_json(orient="records"))
    describe(path, trust=True, golden=tmp_path / "rows.json")
    features = tomllib.loads(capsys.readouterr().out)["features"]
    assert list(features) == list(table)
    rows = json.loads(table.to_json(orient="records"))
    answers = call(serve_estimator(path, estimator, features=features), post_case(rows)).json
    assert [answer["prediction"] for answer in answers] == estimator.predict(table).tolist()
    if name in ("lightgbm", "xgboost"):
        assert [features[column].get("choices") for column in features] == [CITIES, [1, 2, 4], None]

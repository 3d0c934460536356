"""Boosting of other libraries in ONNX Runtime: converted, or from a file of each library's exporter."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from catboost import CatBoostClassifier, CatBoostRegressor
from lightgbm import LGBMClassifier, LGBMRegressor
from onnxmltools import convert_lightgbm, convert_xgboost
from onnxmltools.convert.common.data_types import FloatTensorType as BoostingFloats
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import make_column_transformer
from sklearn.ensemble import StackingClassifier, VotingClassifier, VotingRegressor
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from xgboost import XGBClassifier, XGBRegressor

from serving.predictor.golden import TOLERANCE_OF_FLOAT32, is_close
from serving.predictor.predictor import Predictor
from tests.lib.apps import answers_of
from tests.lib.artifacts import save, variables
from tests.lib.graphs import (
    CAT,
    NAMES,
    NUMBERS,
    ROWS,
    TABLE,
    TARGET,
    WIDE,
    X,
    agree,
    make_beside,
    prove_graph,
    proven,
    y,
)
from tests.lib.servers import run

LGBM = {"n_estimators": 8, "n_jobs": 1, "verbosity": -1}
XGB = {"n_estimators": 8, "n_jobs": 1}


@pytest.mark.in_turn
@pytest.mark.parametrize("labels", [NAMES, y == 1], ids=["str", "bool"])
@pytest.mark.parametrize(
    "estimator",
    [
        LGBMClassifier(**LGBM),
        XGBClassifier(**XGB),
        CatBoostClassifier(**CAT),
        make_pipeline(StandardScaler(), LGBMClassifier(**LGBM)),
        make_pipeline(StandardScaler(), XGBClassifier(**XGB)),
        make_pipeline(StandardScaler(), CatBoostClassifier(**CAT)),
        CalibratedClassifierCV(LGBMClassifier(**LGBM), cv=2),
        CalibratedClassifierCV(XGBClassifier(**XGB), cv=2),
        VotingClassifier([("l", LGBMClassifier(**LGBM)), ("x", XGBClassifier(**XGB)), ("n", GaussianNB())]),
        VotingClassifier([("l", LGBMClassifier(**LGBM)), ("x", XGBClassifier(**XGB))], voting="soft"),
        StackingClassifier([("l", LGBMClassifier(**LGBM)), ("x", XGBClassifier(**XGB))], LogisticRegression()),
    ],
    ids=[
        *("lightgbm", "xgboost", "catboost", "lightgbm-last", "xgboost-last", "catboost-last"),
        *("lightgbm-calibrated", "xgboost-calibrated", "hard", "soft", "stacked"),
    ],
)
def test_boosting_answers_as_itself(tmp_path: Path, estimator: Any, labels: Any) -> None:
    """Classifiers of other libraries are converted wherever they are, with classes of whatever type they take."""
    parts = str(estimator)
    if "XGB" in parts and labels is NAMES and not hasattr(estimator, "voting") and "Stacking" not in parts:
        labels = np.where(y == 0, 0, 1)  # it takes no texts by itself
    if "CatBoost" in parts and labels.dtype == bool:
        labels = np.where(y > 0, "yes", "no")  # booleans it does not export
    estimator = clone(estimator).fit(X, labels)
    service = proven(tmp_path / "model.joblib", estimator, row=ROWS[0])
    assert agree(service, X)
    predictions = [answer["prediction"] for answer in answers_of(service.model.predictor, X)]
    assert predictions == estimator.predict(X).ravel().tolist()


@pytest.mark.parametrize(
    "estimator",
    [
        LGBMRegressor(**LGBM),
        LGBMRegressor(objective="poisson", **LGBM),
        XGBRegressor(**XGB),
        CatBoostRegressor(**CAT),
        VotingRegressor([("l", LGBMRegressor(**LGBM)), ("x", XGBRegressor(**XGB))]),
    ],
    ids=["lightgbm", "poisson", "xgboost", "catboost", "voting"],
)
def test_boosted_number_is_as_itself(tmp_path: Path, estimator: Any) -> None:
    """Regressors of other libraries are converted too."""
    assert agree(proven(tmp_path / "model.joblib", estimator.fit(NUMBERS, TARGET)), NUMBERS)


@pytest.mark.parametrize("last", [LGBMClassifier(**LGBM), XGBClassifier(**XGB), CatBoostClassifier(**CAT)])
def test_boosting_of_tables_answers_as_itself(tmp_path: Path, last: Any) -> None:
    """Names of columns are no obstacle, behind a ColumnTransformer or alone."""
    columns = make_column_transformer((OneHotEncoder(), ["island"]), (StandardScaler(), ["mass", "depth"]))
    row = {"island": "Dream", "mass": 4700.0, "depth": 1.5}
    service = proven(tmp_path / "model.joblib", make_pipeline(columns, last).fit(TABLE, y), row=row)
    assert agree(service, TABLE)
    numbers = TABLE[["mass", "depth"]]
    alone = clone(last).fit(numbers, y)
    service = proven(tmp_path / "model.joblib", alone, row={"mass": 4700.0, "depth": 1.5})
    assert agree(service, numbers)


def borders_of(estimator: Any) -> list[tuple[int, float]]:
    """Return the thresholds of LightGBM, XGBoost or CatBoost, with the feature of each."""
    if isinstance(estimator, CatBoostClassifier):
        return [(feature, value) for feature, values in estimator.get_borders().items() for value in values]
    is_light = isinstance(estimator, LGBMClassifier)
    table = (estimator.booster_ if is_light else estimator.get_booster()).trees_to_dataframe()
    pairs = zip(
        table["split_feature" if is_light else "Feature"], table["threshold" if is_light else "Split"], strict=True
    )
    return [(int(name[-1]), value) for name, value in pairs if value == value]


@pytest.mark.parametrize("estimator", [LGBMClassifier(**LGBM), XGBClassifier(**XGB), CatBoostClassifier(**CAT)])
def test_rows_beside_a_border_go_the_same_way(tmp_path: Path, estimator: Any) -> None:
    """LightGBM compares in float64, the others in float32, and so does what they are converted to."""
    points = np.random.default_rng(0).normal(size=(300, 4))
    estimator = clone(estimator).fit(points, (points[:, 0] + points[:, 1] > 0).astype(int))
    assert agree(proven(tmp_path / "model.joblib", estimator, row=ROWS[0]), make_beside(borders_of(estimator), points))


@pytest.mark.parametrize("library", ["lightgbm", "xgboost", "catboost"])
@pytest.mark.parametrize("labels", [NAMES, np.where(y > 0, "yes", "no"), y, y + 5], ids=["str", "two", "int", "five"])
def test_file_of_each_library_is_served(tmp_path: Path, library: str, labels: Any) -> None:
    """What exporters write by default has maps of scores: their names of classes are kept."""
    path, types = tmp_path / "model.onnx", [("X", BoostingFloats([None, 4]))]
    if library == "lightgbm":
        estimator: Any = LGBMClassifier(**LGBM).fit(X, labels)
        path.write_bytes(convert_lightgbm(estimator, initial_types=types).SerializeToString())
    elif library == "xgboost":
        estimator = XGBClassifier(**XGB).fit(X, np.unique(labels, return_inverse=True)[1])
        path.write_bytes(convert_xgboost(estimator, initial_types=types).SerializeToString())
    else:
        estimator = CatBoostClassifier(**CAT).fit(X, labels)
        estimator.save_model(path, format="onnx")
    answers = answers_of(prove_graph(path, path.read_bytes()).model.predictor, WIDE)
    expected = answers_of(Predictor(estimator), WIDE)
    assert all(map(is_close, answers, expected, [1.0] * len(WIDE), [TOLERANCE_OF_FLOAT32] * len(WIDE)))


def test_missing_package_of_boosting_is_named(tmp_path: Path) -> None:
    """Only what asks for it needs it, and then the message names the file to install."""
    model = variables(save(LGBMClassifier(**LGBM).fit(X, y), tmp_path / "model.joblib"))
    code = "import sys; sys.modules['onnxmltools'] = None; import app; app.create_app()"
    changes = {"SERVING_MODEL__RUNTIME": "onnx", "SERVING_SETTINGS": "/dev/null", **model}
    done = run(["python", "-c", code], **changes)
    assert "needs onnxmltools to run in ONNX Runtime" in done.stderr
    assert "pip install -r requirements-onnx-boosting.txt" in done.stderr

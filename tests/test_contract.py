"""Which rows the contract takes, and who may send them."""

import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pandas as pd
import pytest
from jsonschema import Draft202012Validator
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

import app
from serving.errors import SettingsError, Unprocessable
from serving.predictor.arrays import Arrays
from serving.web.messages import Response
from tests.lib.apps import call, make_settings, serve_estimator
from tests.lib.artifacts import save
from tests.lib.cases import Case, get
from tests.lib.clients import ROW, post_case

X, y = load_iris(return_X_y=True)


def make_row(values: Any) -> dict[str, float]:
    return {f"x{column}": value for column, value in enumerate(values)}


def test_large_numbers_do_not_crash_a_forest(tmp_path: Path) -> None:
    """Trees compute in float32: what is larger is a bad cell."""
    native = serve_estimator(tmp_path / "model.joblib", RandomForestClassifier(n_estimators=2).fit(X, y))
    assert call(native, post_case(make_row([3.4e38, -3.4e38, 1e-320, 0]))).status == 200
    assert call(native, post_case(make_row([3.5e38, 0, 0, 0]))).json["detail"][0]["loc"] == ["body", "x0"]


def test_array_keeps_the_order_of_the_features() -> None:
    """Columns follow the estimator's order, whatever the order of the keys."""
    contract = app.make_service(make_settings()).model.contract
    rows = contract.parse_payload([dict(reversed(ROW.items())), ROW])
    assert Arrays(contract).of_rows(rows).tolist() == [list(ROW.values())] * 2


FEATURES = {
    "sepal_length": {"ge": 0, "le": 10},
    "sepal_width": {"type": "int"},
    "petal_length": {"type": "bool"},
    "petal_width": {"missing": True},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sepal_length": -1}, "greater than or equal to 0"),
        ({"sepal_length": 11}, "less than or equal to 10"),
        ({"sepal_width": 3.5}, "valid integer"),
        ({"sepal_width": True}, "valid integer"),
        ({"sepal_width": 2**53 + 1}, "less than or equal to 9007199254740992"),
        ({"sepal_width": -(10**400)}, "greater than or equal to -9007199254740992"),
        ({"petal_length": 2}, "valid boolean"),
        ({"sepal_length": None}, "valid number"),
    ],
    ids=str,
)
def test_features_of_settings_are_held_to(
    forest: dict[str, str], framework: str, change: dict[str, Any], message: str
) -> None:
    """Types and bounds of [features] refuse what does not fit."""
    settings = make_settings(framework=framework, model=forest, features=FEATURES)
    good = {"sepal_length": 5.1, "sepal_width": 3, "petal_length": True, "petal_width": None}
    answer = call(app.create_app(settings), post_case(good | change))
    assert answer.status == 422
    assert message in answer.json["detail"][0]["msg"]


def test_answer_to_many_bad_cells_is_bounded() -> None:
    """At most 1000 bad cells are named, in less time than it takes to write what was sent; that is repeated once."""
    contract = app.make_service(make_settings()).model.contract
    written_s = refused_s = 0.0
    payloads = (
        ([{}] * 10_000, 2 * 10**6),
        ({f"a{number}": 1 for number in range(200_000)}, 2 * 10**6),
        ([{"a": "x" * 10**6}], 2 * 10**6),
        ([{f"a{number}": 1 for number in range(120)}] * 9_000, 2 * 10**6),
        ([{"a" * 8_000_000: 1}], 9 * 10**6),
    )
    for payload, most_bytes in payloads:
        begun_s = time.process_time()
        json.dumps(payload)
        written_s += time.process_time() - begun_s
        begun_s = time.process_time()
        with pytest.raises(Unprocessable) as caught:
            contract.parse_payload(payload)
        assert len(caught.value.detail) <= 1000
        assert len(Response.of(caught.value.detail, 422).pieces[0]) < most_bytes
        refused_s += time.process_time() - begun_s
    assert refused_s < written_s


def test_missing_value_reaches_the_estimator_as_nan(forest: dict[str, str]) -> None:
    """A null is NaN in the array where the feature may be missing, and true is 1."""
    contract = app.make_service(make_settings(model=forest, features=FEATURES)).model.contract
    rows = contract.parse_payload({"sepal_length": 5, "sepal_width": 3, "petal_length": True, "petal_width": None})
    np.testing.assert_array_equal(Arrays(contract).of_rows(rows), [[5.0, 3.0, 1.0, np.nan]])


ROOMS = [1, 2, 3, 4] * 20
HOUSES = pd.DataFrame(
    {"rooms": ROOMS, "floor": ROOMS[::-1], "garden": [0, 1] * 40, "cellar": [True] * 41 + [False] * 39, "area": 60.5}
)
HOUSE = {"rooms": 2, "floor": 3, "garden": True, "cellar": True, "area": 70.5}
HOUSE_FEATURES = {"floor": {"type": "int"}, "garden": {"type": "bool"}}


@pytest.fixture(scope="module")
def houses() -> Any:
    """An estimator of choices that are integers and booleans, of numbers, and of one that may be missing."""
    encoded, imputed = (OneHotEncoder(), ["rooms", "cellar"]), (SimpleImputer(), ["area"])
    columns = make_column_transformer(encoded, imputed, remainder="passthrough")
    return make_pipeline(columns, LinearRegression()).fit(HOUSES, np.arange(80))


def schema_of(native: Any) -> Draft202012Validator:
    """Return what the document says of a row."""
    schemas = call(native, Case("openapi", "GET", "/openapi.json")).json["components"]["schemas"]
    return Draft202012Validator(schemas["Features"])


def without(name: str) -> dict[str, Any]:
    return {other: value for other, value in HOUSE.items() if other != name}


@pytest.mark.parametrize(
    ("sent", "same"),
    [
        (without("area"), HOUSE | {"area": None}),
        (HOUSE | {"rooms": 2.0}, HOUSE | {"rooms": 2}),
        (HOUSE | {"floor": 3.0}, HOUSE | {"floor": 3}),
        (HOUSE | {"floor": -0.0}, HOUSE | {"floor": 0}),
        (HOUSE | {"floor": 9007199254740992.0}, HOUSE | {"floor": 2**53}),
        (HOUSE | {"area": 70}, HOUSE | {"area": 70.0}),
        (HOUSE | {"garden": 1}, HOUSE | {"garden": True}),
        (HOUSE | {"garden": 0}, HOUSE | {"garden": False}),
    ],
    ids=str,
)
def test_what_is_the_same_in_json_is_answered_alike(
    tmp_path: Path, framework: str, houses: Any, sent: dict[str, Any], same: dict[str, Any]
) -> None:
    """Rows that mean the same get the same bytes, alone, in arrays short and long, and in a query; the document
    has them all."""
    native = serve_estimator(tmp_path / "model.joblib", houses, framework=framework, features=HOUSE_FEATURES)
    assert call(native, post_case(sent)).status == 200
    for n_rows in (1, 1000, 5000):
        assert (
            call(native, post_case([sent, HOUSE] * n_rows)).body == call(native, post_case([same, HOUSE] * n_rows)).body
        )
    query = urlencode({name: json.dumps(value) for name, value in sent.items()})
    answers = [call(native, case).body for case in (get("query", query), post_case(sent), post_case(same))]
    assert answers[0] == answers[1] == answers[2]
    assert schema_of(native).is_valid(sent)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (without("rooms"), "Field required"),
        (without("floor"), "Field required"),
        (HOUSE | {"rooms": 2.5}, "Input should be a valid integer"),
        (HOUSE | {"rooms": 5.0}, "Input is none of the choices; use one of 1, 2, 3, 4"),
        (HOUSE | {"floor": 2.5}, "Input should be a valid integer"),
        (HOUSE | {"floor": "2"}, "Input should be a valid integer"),
        (HOUSE | {"floor": True}, "Input should be a valid integer"),
        (HOUSE | {"floor": 1e300}, "Input should be less than or equal to 9007199254740992"),
        (HOUSE | {"area": True}, "Input should be a valid number"),
        (HOUSE | {"garden": 2}, "Input should be a valid boolean"),
        (HOUSE | {"garden": 0.5}, "Input should be a valid boolean"),
        (HOUSE | {"garden": "true"}, "Input should be a valid boolean"),
        (HOUSE | {"cellar": 1}, "Input should be a valid boolean"),
    ],
    ids=str,
)
def test_what_is_not_the_same_in_json_is_refused(
    tmp_path: Path, framework: str, houses: Any, sent: dict[str, Any], message: str
) -> None:
    """A value of another kind, or none where one must be, is a bad cell, alone, in arrays short and long; the document
    has none of them."""
    native = serve_estimator(tmp_path / "model.joblib", houses, framework=framework, features=HOUSE_FEATURES)
    for payload in (sent, [HOUSE, sent], [HOUSE] * 5000 + [sent]):
        answer = call(native, post_case(payload))
        problem = answer.json["detail"][0]
        assert (answer.status, problem["msg"]) == (422, message)
        assert problem["input"] in (None, *sent.values())
    assert not schema_of(native).is_valid(sent)


def test_names_of_settings_name_a_nameless_model(tmp_path: Path) -> None:
    """An estimator fitted on arrays takes the names of [features], in their order, if they are as many."""
    model = save(LogisticRegression(max_iter=1000).fit(X, y), tmp_path / "model.joblib")
    named = app.Settings(model=model, features={name: {} for name in ROW})
    assert call(app.create_app(named), post_case(ROW)).json["prediction"] == 0
    with pytest.raises(SettingsError, match="names 1 features, 'a'; the model takes 4: 'x0'"):
        app.create_app(app.Settings(model=model, features={"a": {}}))


@pytest.mark.parametrize(
    "header",
    [
        {"Authorization": "Bearer two"},
        {"Authorization": "bearer one"},
        {"X_API_Key": "one"},
        {"X_API_Key": "clé"},
        {"X_API_Key": "one", "Authorization": "Bearer of-a-gateway"},
    ],
)
def test_valid_key_is_let_in(framework: str, header: dict[str, str]) -> None:
    """Either header carries a key, also beside another's token, and any key of the list counts."""
    native = app.create_app(make_settings(framework=framework, auth={"api_keys": ["one", "two", "clé"]}))
    assert call(native, post_case(ROW, **header)).status == 200


@pytest.mark.parametrize(
    "header",
    [{}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}, {"X_API_Key": "on"}, {"X_API_Key": "é"}],
)
def test_invalid_key_is_refused(framework: str, header: dict[str, str]) -> None:
    """Without a key of the list there are no predictions, but health answers."""
    native = app.create_app(make_settings(framework=framework, auth={"api_keys": ["one", "two"]}))
    answer = call(native, post_case(ROW, **header))
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert "X-API-Key: KEY" in answer.json["detail"]
    assert call(native, Case("get", "GET", "/health/ready")).status == 200
    assert call(native, Case("get", "GET", "/openapi.json")).status == 401


def test_document_may_be_open(framework: str) -> None:
    """`auth.open_docs` shows the document to everyone, which then says so; predictions take a key as ever."""
    native = app.create_app(make_settings(framework=framework, auth={"api_keys": ["one"], "open_docs": True}))
    document = call(native, Case("get", "GET", "/openapi.json"))
    assert document.status == 200
    assert "security" not in document.json["paths"]["/openapi.json"]["get"]
    assert call(native, post_case(ROW)).status == 401

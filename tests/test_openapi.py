"""The document that both frameworks serve, held to the specification and to what the service really answers."""

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

import app
from serving import VERSION
from serving.predictor.model import make_model
from serving.web import documentation
from tests.lib.apps import call, make_settings
from tests.lib.cases import BAD, GOOD, Case
from tests.lib.clients import ROW, post_case
from tests.lib.estimators import Noting


def document_of(native: Any) -> dict[str, Any]:
    document: dict[str, Any] = call(native, Case("openapi", "GET", "/openapi.json")).json
    return document


@pytest.fixture(scope="module")
def native() -> Any:
    return app.create_app(make_settings())


@pytest.fixture(scope="module")
def document(native: Any) -> dict[str, Any]:
    return document_of(native)


def test_document_is_valid(document: dict[str, Any]) -> None:
    """The document is OpenAPI 3.1, of the model by its name and the service by its version."""
    validate(document)
    assert document["info"] == {"title": "iris", "version": VERSION}


def test_document_lists_the_table(document: dict[str, Any]) -> None:
    """Each operation of the table is in the document, and nothing else is."""
    listed = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert listed == {(operation.method, operation.path) for operation in [*app.operations(make_settings())]}


def test_document_asks_the_model_nothing() -> None:
    """Its example was answered when the model was proven, so the first request for it makes no call."""
    estimator = Noting()
    service = app.make_service(make_settings(features={}), make_model(estimator, Path("model.joblib"), {}))
    estimator.calls.clear()
    assert documentation.document_of(service)["components"]["schemas"]["Prediction"]["required"] == ["prediction"]
    assert estimator.calls == []


def test_document_shows_features(document: dict[str, Any]) -> None:
    """Features have type, unit and example, all are required, and no other is allowed."""
    features = document["components"]["schemas"]["Features"]
    assert features["properties"]["petal_width"] == {
        "type": "number",
        "title": "Petal Width",
        "unit": "cm",
        "examples": [0.2],
        "minimum": -3.4028234663852886e38,
        "maximum": 3.4028234663852886e38,
    }
    assert features["required"] == list(ROW)
    assert features["additionalProperties"] is False


def test_document_shows_bounds(forest: dict[str, str]) -> None:
    """Bounds, types and null of [features] are in the schema; what may be null is not required."""
    features = {"sepal_length": {"ge": 0, "le": 10}, "sepal_width": {"type": "int"}, "petal_width": {"missing": True}}
    native = app.create_app(make_settings(model=forest, features=features))
    schema = document_of(native)["components"]["schemas"]["Features"]
    properties = schema["properties"]
    assert schema["required"] == ["sepal_length", "sepal_width", "petal_length"]
    assert (properties["sepal_length"]["minimum"], properties["sepal_length"]["maximum"]) == (0, 10)
    assert properties["sepal_width"]["type"] == "integer"
    assert {"type": "null"} in properties["petal_width"]["anyOf"]


def test_document_shows_keys_where_they_are_asked_for() -> None:
    """With API keys set, the security schemes and 401 are in the document, and health stays open."""
    document = document_of_secured()
    assert document["paths"]["/predictions"]["post"]["security"] == [{"bearer": []}, {"api_key": []}]
    assert "401" in document["paths"]["/predictions"]["post"]["responses"]
    assert "security" not in document["paths"]["/ping"]["get"]
    validate(document)


def document_of_secured() -> dict[str, Any]:
    native = app.create_app(make_settings(auth={"api_keys": ["key"]}))
    case = Case("openapi", "GET", "/openapi.json", (("X-API-Key", "key"),))
    document: dict[str, Any] = call(native, case).json
    return document


def test_examples_are_real(native: Any, document: dict[str, Any]) -> None:
    """The example request, sent, gives the example answer."""
    operation = document["paths"]["/predictions"]["post"]
    request = operation["requestBody"]["content"]["application/json"]["example"]
    answer = operation["responses"]["200"]["content"]["application/json"]["example"]
    assert call(native, post_case(request)).json == answer


@pytest.mark.parametrize("case", [case for case in GOOD + BAD if case.method != "HEAD"], ids=lambda case: case.id)
def test_answers_fit_the_document(native: Any, document: dict[str, Any], case: Case) -> None:
    """Each answer to a listed operation has a listed status, and fits its schema."""
    operation = document["paths"].get(case.target.partition("?")[0], {}).get(case.method.lower())
    answer = call(native, case)
    if operation is None:
        assert answer.status in (200, 204, 404, 405)  # 200 for a path that is percent-encoded
        return
    schema = operation["responses"][str(answer.status)]["content"]["application/json"]["schema"]
    Draft202012Validator(schema | {"components": document["components"]}).validate(answer.json)


def test_native_apps_know_routes_and_document(native: Any, document: dict[str, Any]) -> None:
    """FastAPI's own `openapi()`, `url_path_for` and routes, and Flask's URL map, know the operations."""
    flask = app.create_app(make_settings(framework="flask"))
    assert native.openapi() == document
    assert native.url_path_for("predict_query") == "/predictions"
    assert {operation.path for operation in [*app.operations(make_settings())]} <= {
        route.path for route in native.routes
    }
    assert {operation.path for operation in [*app.operations(make_settings())]} <= {
        rule.rule for rule in flask.url_map.iter_rules()
    }


def test_native_apps_can_be_extended() -> None:
    """Routes and errors that a user adds to the framework's object are the framework's, not ours."""
    import fastapi
    import flask

    fast, flat = app.create_app(make_settings()), app.create_app(make_settings(framework="flask"))

    @fast.get("/mine")
    async def mine() -> str:
        raise fastapi.HTTPException(404, "mine")

    @flat.get("/mine")
    def mine_too() -> str:
        flask.abort(404, "mine")

    assert call(fast, Case("mine", "GET", "/mine")).json == {"detail": "mine"}
    assert b"<p>mine</p>" in call(flat, Case("mine", "GET", "/mine")).body

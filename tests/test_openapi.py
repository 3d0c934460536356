"""The document that both frameworks serve, held to the specification and to what the service really answers."""

from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from sklearn.linear_model import LinearRegression

import app
from serving import VERSION
from serving.predictor.model import make_model
from serving.web import documentation
from tests.lib.apps import call, make_settings, serve_estimator
from tests.lib.cases import BAD, GOOD, Case
from tests.lib.clients import ROW, post_case
from tests.lib.estimators import Noting
from tests.lib.pages import rounded


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
    """Each operation of the table is in the document, but for files of a page, and nothing else is."""
    listed = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    described = [operation for operation in app.operations(make_settings()) if operation.is_described]
    assert listed == {(operation.method, operation.path) for operation in described}
    hidden = {operation.path for operation in app.operations(make_settings()) if not operation.is_described}
    assert hidden == {"/", *(f"/docs/{name}" for name in documentation.FILES)}


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
    """Each example request, of one row and of a batch, gives its example answer; so do the parameters of the query."""
    operation = document["paths"]["/predictions"]["post"]
    requests = operation["requestBody"]["content"]["application/json"]["examples"]
    answers = operation["responses"]["200"]["content"]["application/json"]["examples"]
    assert [*requests] == [*answers] == ["one", "batch"]
    for name, request in requests.items():
        assert rounded(call(native, post_case(request["value"])).json) == rounded(answers[name]["value"])
    query = document["paths"]["/predictions"]["get"]
    values = {parameter["name"]: parameter["example"] for parameter in query["parameters"]}
    asked = call(native, Case("query", "GET", f"/predictions?{urlencode(values)}"))
    assert rounded(asked.json) == rounded(query["responses"]["200"]["content"]["application/json"]["example"])


def test_examples_are_made_up_where_none_is_known(tmp_path: Path) -> None:
    """A model of which neither operator nor golden rows give a row has an example too, and answers it."""
    native = serve_estimator(tmp_path / "model.joblib", LinearRegression().fit([[1, 2], [3, 4]], [1, 2]))
    operation = document_of(native)["paths"]["/predictions"]["post"]
    request = operation["requestBody"]["content"]["application/json"]["examples"]["batch"]["value"]
    assert request == [{"x0": 0.0, "x1": 0.0}] * 2
    assert call(native, post_case(request)).status == 200


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
    paths = {operation.path for operation in app.operations(make_settings()) if not operation.only_for}
    assert paths <= {route.path for route in native.routes}
    assert paths <= {rule.rule for rule in flask.url_map.iter_rules()}


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

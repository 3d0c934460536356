"""The clouds' envelopes: what they take and answer, the same under both frameworks, all workers, either interface."""

import asyncio
import json
from typing import Any

import jiter
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.tree import DecisionTreeClassifier

import app
from serving.predictor.bodies import MAX_VALUES, count_values
from serving.web.service import Exchange, Service
from tests.lib.apps import call, call_asgi, call_wsgi, make_settings, serve_estimator
from tests.lib.cases import JSON, Case
from tests.lib.clients import check
from tests.lib.cloud_cases import CLOUD_BAD, CLOUD_GOOD, CSV, HEADER, LINE, PREDICT_V1, ROW, VALUES, body_case, csv_case
from tests.lib.servers import COMBINATIONS, Server

CASES = CLOUD_GOOD + CLOUD_BAD
WITH_CSV = (*JSON, ("Accept", "text/csv"))


@pytest.fixture(scope="module")
def apps() -> dict[str, Any]:
    return {name: app.create_app(make_settings(framework=name)) for name in app.FRAMEWORKS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_frameworks_answer_alike(apps: dict[str, Any], case: Case) -> None:
    """Flask and FastAPI give the same status, headers and body, also each by the other's interface."""
    answers = [call(native, case) for native in apps.values()]
    answers += [call(app.as_asgi(apps["flask"]), case), call_wsgi(app.as_wsgi(apps["fastapi"]), case)]
    assert answers == [answers[0]] * 4
    check(case, answers[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_combinations_answer_alike(servers: dict[tuple[str, str], Server], case: Case) -> None:
    """All four servers give the same status, headers and body."""
    answers = [server.send(case) for server in servers.values()]
    assert answers == [answers[0]] * len(COMBINATIONS)
    check(case, answers[0])


def test_table_is_large_enough() -> None:
    """At least 40 bad requests are in the table, none with a status of 500, and each under its own name."""
    assert len(CLOUD_BAD) >= 40
    assert all(400 <= case.status < 500 for case in CLOUD_BAD)
    assert len({case.id for case in CASES}) == len(CASES)


FLOWERS = np.random.default_rng(0).uniform(0.1, 7.0, (5000, 4)).round(1).tolist()
NAMES = [*ROW]
RECORDS = [dict(zip(NAMES, values, strict=True)) for values in FLOWERS]
LAYOUTS: dict[str, Any] = {
    "instances": {"instances": RECORDS},
    "lists": {"instances": FLOWERS},
    "mixed": {"instances": [*RECORDS[:2500], *FLOWERS[2500:]]},
    "records": {"dataframe_records": RECORDS},
    "split": {"dataframe_split": {"data": [row[::-1] for row in FLOWERS], "columns": NAMES[::-1]}},
    "columns": {"inputs": {name: [row[name] for row in RECORDS] for name in NAMES[::-1]}},
    "bare": RECORDS,
}


@pytest.mark.parametrize("n_rows", [30, 5000], ids=["short", "long"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_say_the_same(apps: dict[str, Any], layout: str, n_rows: int) -> None:
    """However the same rows are laid out, they get the answers of `/predictions`."""
    rows = RECORDS[:n_rows]
    payload = shortened(LAYOUTS[layout], n_rows)
    expected = call(apps["fastapi"], Case("post", "POST", "/predictions", JSON, json.dumps(rows).encode())).json
    answer = call(apps["fastapi"], body_case(layout, payload)).json
    assert answer == {"predictions": [one["prediction"] for one in expected]}
    assert len({*answer["predictions"]}) == 3


def shortened(payload: Any, n_rows: int) -> Any:
    """Return a payload with the first rows alone."""
    if isinstance(payload, list):
        return payload[:n_rows]
    return {key: value if value in (NAMES, NAMES[::-1]) else shortened(value, n_rows) for key, value in payload.items()}


def test_csv_says_the_same(apps: dict[str, Any]) -> None:
    """A long body in CSV, with the line ends of Windows, gets the answers of the same rows in JSON."""
    lines = "\r\n".join([HEADER, *(",".join(map(str, row)) for row in FLOWERS)])
    expected = call(apps["flask"], body_case("lists", {"instances": FLOWERS})).json
    for text in (lines, lines.replace("\r\n5.1", '\r\n"5.1"'), lines.replace("\r\n", "\n"), f"{lines}\r\n\r\n"):
        assert call(apps["flask"], csv_case("long", text)).json == expected
    labels = call(apps["flask"], csv_case("labels", lines, headers=(*CSV, ("Accept", "text/csv"))))
    assert labels.headers["content-type"] == "text/csv"
    assert labels.body.decode().splitlines() == expected["predictions"]


@pytest.mark.parametrize("rows", [[], [VALUES], [VALUES] * 2000], ids=len)
def test_labels_are_lines_where_csv_is_accepted(apps: dict[str, Any], rows: list[Any]) -> None:
    """`Accept: text/csv` alone gets a label a line; with JSON beside it, or in an error, it is JSON."""
    for native in apps.values():
        answer = call(native, body_case("labels", {"instances": rows}, headers=WITH_CSV))
        assert (answer.headers["content-type"], answer.body) == ("text/csv", b"setosa\n" * len(rows))
        either = (*JSON, ("Accept", "application/json, text/csv"))
        assert "predictions" in call(native, body_case("labels", {"instances": rows}, headers=either)).json
        assert "detail" in call(native, body_case("labels", {"instances": [1]}, headers=WITH_CSV)).json


def test_full_answers_are_those_of_predictions(apps: dict[str, Any]) -> None:
    """With `full` an answer is the object that `/predictions` gives."""
    one = call(apps["flask"], Case("post", "POST", "/predictions", JSON, json.dumps([ROW] * 2).encode())).json
    answer = call(apps["flask"], body_case("full", {"instances": [ROW] * 2, "parameters": {"full": True}})).json
    assert answer == {"predictions": one}


def test_one_feature_can_come_alone(tmp_path: Any, framework: str) -> None:
    """Of a model with one feature a row may be its value; a number is answered as JSON writes it."""
    native = serve_estimator(
        tmp_path / "model.joblib", LinearRegression().fit([[0.0], [1.0]], [0.0, 2.0]), framework=framework
    )
    for rows in ([3, 4.5], [[3], [4.5]], [{"x0": 3}, [4.5]]):
        answer = call(native, body_case("values", {"instances": rows}))
        assert answer.json["predictions"] == pytest.approx([6.0, 9.0])
    long = call(native, body_case("values", {"instances": [3.0, 4.5] * 5000, "parameters": {}}))
    assert len(long.json["predictions"]) == 10_000
    wrong = call(native, body_case("values", {"instances": [3, "4"]}))
    assert wrong.json["detail"][0]["loc"] == ["body", "instances", 1, "x0"]


def test_missing_values_may_be_left_out(tmp_path: Any, framework: str) -> None:
    """A column that may be missing can be left out, an empty cell of CSV is missing, and null is so in lists."""
    X = [[0.0, 0.0], [np.nan, 1.0], [1.0, np.nan]]
    tree = DecisionTreeClassifier().fit(X, ["a", "b", "c"])
    features = {"x0": {"missing": True}, "x1": {"missing": True}}
    native = serve_estimator(tmp_path / "model.joblib", tree, framework=framework, features=features)
    expected = call(native, body_case("object", {"instances": [{"x1": 1.0}]})).json
    assert len(expected["predictions"]) == 1
    same = [
        body_case("list", {"instances": [[None, 1.0]]}),
        body_case("split", {"dataframe_split": {"columns": ["x1"], "data": [[1.0]]}}),
        body_case("columns", {"inputs": {"x1": [1.0]}}),
        csv_case("empty-cell", "x0,x1\n,1"),
        csv_case("left-out", "x1\n1.0"),
    ]
    assert [call(native, case).json for case in same] == [expected] * len(same)
    long = call(native, body_case("long", {"dataframe_split": {"columns": ["x0", "x1"], "data": [[None, 1]] * 9000}}))
    assert long.json == {"predictions": expected["predictions"] * 9000}


def test_outputs_are_objects_by_name(tmp_path: Any, framework: str) -> None:
    """Several outputs are an object for each row, and in CSV a cell each, quoted where they need it."""
    tree = DecisionTreeClassifier().fit([[0.0], [1.0]], [['a,"b"', "x"], ["c", "y"]])
    native = serve_estimator(tmp_path / "model.joblib", tree, framework=framework)
    answer = call(native, body_case("outputs", {"instances": [[0], [1]]}))
    assert answer.json == {"predictions": [{"y0": 'a,"b"', "y1": "x"}, {"y0": "c", "y1": "y"}]}
    lines = call(native, body_case("outputs", {"instances": [[0], [1]]}, headers=WITH_CSV))
    assert lines.body == b'"a,""b""",x\nc,y\n'


def test_feature_named_like_a_key_is_a_feature(tmp_path: Any, framework: str) -> None:
    """A row with a feature called `instances` is a row, unless it is an array."""
    model = LogisticRegression().fit([[0.0], [9.0]], ["low", "high"])
    native = serve_estimator(
        tmp_path / "model.joblib", model, framework=framework, features={"instances": {"type": "float"}}
    )
    for payload in ({"instances": 9.0}, {"instances": [{"instances": 9.0}]}, {"instances": [9.0]}):
        assert call(native, body_case("named", payload)).json == {"predictions": ["high"]}


def test_envelopes_share_calls_with_others() -> None:
    """Rows of an envelope and of `/predictions` that wait together are predicted together."""
    seen: list[Exchange] = []
    settings = make_settings(batching={"max_rows": 3, "max_wait_ms": 1000})
    made = app.make_service(settings)
    service = Service(settings, made.model, made.proof, app.operations(settings), [seen.append])
    native = app.FRAMEWORKS["fastapi"](service)

    async def together() -> Any:
        cases = [
            body_case("two", {"instances": [VALUES] * 2}),
            Case("one", "POST", "/predictions", JSON, json.dumps(ROW).encode()),
        ]
        return await asyncio.gather(*[call_asgi(native, case) for case in cases])

    two, one = asyncio.run(together())
    assert (two.json, one.json["prediction"]) == ({"predictions": ["setosa"] * 2}, "setosa")
    jobs = [exchange.request.job for exchange in seen]
    assert jobs[0] is not None
    assert jobs[1] is not None
    assert jobs[0].call is jobs[1].call
    assert [exchange.request.rows for exchange in seen] in ([2, 1], [1, 2])


def test_keys_are_needed_for_predictions(framework: str) -> None:
    """Whatever predicts needs a key where there are keys; what tells whether the service is up does not."""
    routes = {"predict": "/vertex", "health": "/up"}
    native = app.create_app(make_settings(framework=framework, auth={"api_keys": ["key"]}, routes=routes))
    for path in ("/invocations", PREDICT_V1, "/vertex"):
        assert call(native, body_case("key", {"instances": [ROW]}, path=path)).status == 401
        headers = (*JSON, ("X-API-Key", "key"))
        assert call(native, body_case("key", {"instances": [ROW]}, path=path, headers=headers)).status == 200
    for path in ("/v1/models", "/v1/models/iris", "/up", "/ping"):
        assert call(native, Case("open", "GET", path)).status == 200


@pytest.mark.parametrize("path", ["/invocations", PREDICT_V1])
def test_document_has_the_envelopes(apps: dict[str, Any], path: str) -> None:
    """The document is valid, and each example that it shows, sent, gets an answer that fits its schema."""
    document = call(apps["fastapi"], Case("openapi", "GET", "/openapi.json")).json
    validate(document)
    operation = document["paths"][path]["post"]
    content, answers = operation["requestBody"]["content"], operation["responses"]["200"]["content"]
    components = {"components": document["components"]}
    examples = {name: example["value"] for name, example in content["application/json"]["examples"].items()}
    assert len(examples) == 8
    for name, example in examples.items():
        Draft202012Validator(content["application/json"]["schema"] | components).validate(example)
        answer = call(apps["fastapi"], body_case(name, example, path=path)).json
        Draft202012Validator(answers["application/json"]["schema"] | components).validate(answer)
        if name != "whole_answers":
            assert answer == answers["application/json"]["example"]
    assert content["text/csv"]["example"] == f"{HEADER}\n{LINE}\n"
    lines = call(apps["fastapi"], csv_case("example", content["text/csv"]["example"]))
    assert lines.json == answers["application/json"]["example"]


def test_names_of_operations_are_unique() -> None:
    """No two operations have one id, with routes of a platform either."""
    table = [*app.operations(make_settings(routes={"predict": "/p", "health": "/h"}))]
    assert len({operation.name for operation in table}) == len(table)


def test_name_of_the_model_is_in_its_paths(framework: str) -> None:
    """KServe's paths have the model's name, and those of another name are not there."""
    native = app.create_app(make_settings(framework=framework, model={"name": "Iris-2.0_b"}))
    assert call(native, Case("named", "GET", "/v1/models/Iris-2.0_b")).json == {"name": "Iris-2.0_b", "ready": True}
    path = "/v1/models/Iris-2.0_b:predict"
    assert call(native, body_case("named", {"instances": [ROW]}, path=path)).json == {"predictions": ["setosa"]}
    assert call(native, body_case("named", {"instances": [ROW]}, path=PREDICT_V1)).status == 404


def test_line_is_the_flower() -> None:
    """The line of CSV in the table is the same row as its objects."""
    assert [*map(float, LINE.split(","))] == VALUES


NOTHINGS = ",".join(["{}"] * 20_000)
COLUMNS = ",".join(f'"c{number}":[{NOTHINGS}]' for number in range(20))
SHORT_COLUMNS = ",".join(f'"c{number}":[{",".join(["{}"] * 300)}]' for number in range(1000))
HEAVY = {
    "columns-of-objects": (f'{{"inputs":{{{COLUMNS}}}}}', 422, "Unknown feature"),
    "short-columns-of-objects": (f'{{"inputs":{{{SHORT_COLUMNS}}}}}', 422, "it has"),
    "keys-beside": (f'{{"instances":[],{COLUMNS}}}', 422, "Unknown key"),
    "no-end": (f'{{"instances":[{NOTHINGS},{NOTHINGS},{NOTHINGS},', 400, "an object in it does not end with '}'"),
    "columns-without-end": (f'{{"inputs":{{{COLUMNS}', 400, "an object in it does not end with '}'"),
}


@pytest.mark.parametrize("name", HEAVY)
def test_many_values_are_not_decoded_at_once(apps: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What a call of the decoder gets has no more values than a part or a row may have."""
    counts: list[int] = []
    decode = jiter.from_json

    def note(body: bytes, **options: Any) -> Any:
        counts.append(count_values(body))
        return decode(body, **options)

    monkeypatch.setattr(jiter, "from_json", note)
    body, status, says = HEAVY[name]
    answer = call(apps["fastapi"], Case(name, "POST", "/invocations", JSON, body.encode()))
    assert (answer.status, says in answer.body.decode()) == (status, True), answer.body
    assert max(counts, default=0) <= MAX_VALUES + 4


def test_short_columns_of_many_features_are_read(tmp_path: Any) -> None:
    """As many columns as a model has may come, each of them short, however many cells that makes."""
    X = np.random.default_rng(0).normal(size=(30, 1000))
    native = serve_estimator(tmp_path / "m.joblib", LogisticRegression().fit(X, [0, 1] * 15))
    columns = {f"x{number}": [0.5] * 200 for number in range(1000)}
    answer = call(native, body_case("wide", {"inputs": columns}))
    assert (answer.status, len(answer.json["predictions"])) == (200, 200)

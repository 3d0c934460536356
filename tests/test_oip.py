"""The Open Inference Protocol over REST: each route, the forms of requests and answers, mistakes, and real clients."""

import asyncio
import concurrent.futures
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from jsonschema import Draft202012Validator
from sklearn.ensemble import IsolationForest, RandomForestClassifier
from sklearn.linear_model import LinearRegression
from sklearn.multioutput import MultiOutputClassifier
from sklearn.svm import SVC
from tritonclient.http import aio

import app
from serving.web.service import STOPPING
from tests.lib.apps import call, call_asgi, make_service, make_settings, serve_estimator
from tests.lib.artifacts import save, variables
from tests.lib.cases import Case
from tests.lib.clients import Answer, post_case
from tests.lib.estimators import Noting
from tests.lib.infer import BAD, CELLS, GOOD, INFER, LENGTH, NAMES, binary, infer, one, tensor
from tests.lib.pipelines import fitted, rows_of
from tests.lib.servers import Server, Starter, gunicorn_environment
from tests.lib.sizes import each_combination, share


@pytest.fixture(scope="module")
def apps() -> dict[str, Any]:
    return {name: app.create_app(make_settings(framework=name)) for name in app.FRAMEWORKS}


@pytest.fixture
def native(framework: str, apps: dict[str, Any]) -> Any:
    return apps[framework]


def get(native: Any, path: str, *headers: tuple[str, str]) -> Answer:
    return call(native, Case("get", "GET", path, headers))


def check(case: Case, answer: Answer) -> None:
    """Hold an answer to its case: errors have exactly the protocol's shape."""
    assert answer.status == case.status, answer.body
    assert case.says in answer.body.decode()
    if case.status == 200:
        assert "outputs" in answer.json
    else:
        assert [*answer.json] == ["error"]
        assert type(answer.json["error"]) is str


@pytest.mark.parametrize("case", GOOD + BAD, ids=lambda case: case.id)
def test_frameworks_answer_alike(apps: dict[str, Any], case: Case) -> None:
    """Flask and FastAPI give the same status, headers and body, and never a 500."""
    flask, fastapi = call(apps["flask"], case), call(apps["fastapi"], case)
    assert flask == fastapi
    check(case, flask)


@each_combination()
def test_servers_answer_as_apps_do(
    servers: dict[tuple[str, str], Server], apps: dict[str, Any], combination: tuple[str, str]
) -> None:
    """Each framework on each worker gives the bytes that an app gives in this process."""
    for case in share(GOOD + BAD, combination):
        assert servers[combination].send(case) == call(apps["fastapi"], case), case.id


def test_table_is_large_enough() -> None:
    """At least 60 bad requests are in the table, each under its own name."""
    assert len(BAD) >= 60
    assert len({case.id for case in GOOD + BAD}) == len(GOOD + BAD)


def test_health_has_both_words(native: Any) -> None:
    """Clients look for `live` or `ready`, in whichever answer; a model's has its name."""
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert get(native, path).json == {"live": True, "ready": True}
    for path in ("/v2/models/iris/ready", "/v2/models/iris/versions/1/ready"):
        assert get(native, path).json == {"name": "iris", "ready": True}


def test_service_that_ends_is_live_but_not_ready(native: Any) -> None:
    """As `/health/ready` does, readiness says 503, in the protocol's shape."""
    STOPPING.set()
    try:
        assert get(native, "/v2/health/live").json == {"live": True, "ready": False}
        for path in ("/v2/health/ready", "/v2/models/iris/ready", "/v2/models/iris/versions/1/ready"):
            answer = get(native, path)
            assert (answer.status, [*answer.json]) == (503, ["error"])
    finally:
        STOPPING.clear()


def test_wrong_path_is_told_of_its_neighbours(native: Any) -> None:
    """Below /v2 a hint is one of the protocol's paths; elsewhere it names /v2, and none of the many below it."""
    assert (
        get(native, "/v2/zzzzzzzzz")
        .json["error"]
        .startswith("there is no '/v2/zzzzzzzzz'; use one of '/v2', '/v2/health/live'")
    )
    said = get(native, "/zzzzzzzzz").json["detail"]
    assert "'/v2'" in said
    assert "/v2/" not in said


def test_metadata_describes_server_and_model(native: Any) -> None:
    """The server names its extension, the model its inputs, outputs, and the order of its classes."""
    assert get(native, "/v2").json["extensions"] == ["binary_tensor_data"]
    described = get(native, "/v2/models/iris").json
    assert described == get(native, "/v2/models/iris/versions/1").json
    assert (described["name"], described["versions"], described["platform"]) == ("iris", ["1"], "sklearn_skops")
    assert described["inputs"] == [{"name": name, "datatype": "FP64", "shape": [-1]} for name in NAMES]
    labels = {"labels": ["setosa", "versicolor", "virginica"]}
    assert described["outputs"] == [
        {"name": "prediction", "datatype": "BYTES", "shape": [-1]},
        {"name": "probabilities", "datatype": "FP64", "shape": [-1, 3], "parameters": labels},
    ]


def test_version_and_name_are_those_of_the_settings() -> None:
    """Both are texts of the operator's; others are not found."""
    native = app.create_app(make_settings(model={"name": "flowers", "version": "2024-05"}))
    assert get(native, "/v2/models/flowers").json["versions"] == ["2024-05"]
    case = infer("version", {"inputs": [tensor()]}, path="/v2/models/flowers/versions/2024-05/infer")
    answer = call(native, case).json
    assert (answer["model_name"], answer["model_version"]) == ("flowers", "2024-05")
    assert get(native, "/v2/models/flowers/versions/1").status == 404


def test_keys_are_needed_as_elsewhere(framework: str) -> None:
    """Health is open; metadata and inference need a key, and say so in the protocol's shape."""
    native = app.create_app(make_settings(framework=framework, auth={"api_keys": ["key"]}))
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/iris/ready"):
        assert get(native, path).status == 200
    for path in ("/v2", "/v2/models/iris"):
        answer = get(native, path)
        assert (answer.status, [*answer.json]) == (401, ["error"])
        assert get(native, path, ("Authorization", "Bearer key")).status == 200
    refused = call(native, one("key"))
    assert (refused.status, [*refused.json], refused.headers["www-authenticate"]) == (401, ["error"], "Bearer")


@pytest.mark.parametrize("n_rows", [1, 3, 64, 300, 5000])
def test_tensors_are_answered_as_rows_are(native: Any, n_rows: int) -> None:
    """Whatever the form and the number of rows, the answers are those of /predictions."""
    X = np.random.default_rng(0).uniform(0.1, 8, (n_rows, 4))
    cells = {name: column.tolist() for name, column in zip(NAMES, X.T, strict=True)}
    rows = call(native, post_case([dict(zip(NAMES, row, strict=True)) for row in X.tolist()])).json
    labels = [row["prediction"] for row in rows]
    scores = [score for row in rows for score in row["probabilities"].values()]
    by_name = [
        {"name": name, "shape": [n_rows, 1], "datatype": "FP64", "data": column} for name, column in cells.items()
    ]
    shape = [n_rows, 4]
    for case in (
        one("flat", shape=shape, data=X.ravel().tolist()),
        one("nested", shape=shape, data=X.tolist()),
        infer("columns", {"inputs": by_name}),
        binary("binary", X.tobytes(), shape=shape),
    ):
        prediction, probabilities = call(native, case).json["outputs"]
        assert (prediction["shape"], probabilities["shape"]) == ([n_rows], [n_rows, 3])
        assert prediction["data"] == labels
        np.testing.assert_allclose(probabilities["data"], scores, rtol=1e-9)


@pytest.mark.parametrize("n_rows", [1, 300])
def test_outputs_are_binary_where_asked_for(native: Any, n_rows: int) -> None:
    """All of them by `binary_data_output`, or each by its own parameter, which counts more."""
    shape, data = [n_rows, 4], CELLS * n_rows
    plain = call(native, one("json", shape=shape, data=data)).json["outputs"]
    mixed = [{"name": "probabilities", "parameters": {"binary_data": False}}, {"name": "prediction"}]
    for outputs in ([], mixed):
        payload = {"inputs": [tensor(shape=shape, data=data)], "parameters": {"binary_data_output": True}}
        answer, length = call_for_binary(native, infer("binary", payload | {"outputs": outputs}))
        head, rest = json.loads(answer.body[:length]), answer.body[length:]
        assert answer.headers["content-type"] == "application/octet-stream"
        assert [output["name"] for output in head["outputs"]] == [one["name"] for one in outputs or plain]
        for output in head["outputs"]:
            expected = next(one["data"] for one in plain if one["name"] == output["name"])
            size = output.get("parameters", {}).get("binary_data_size", 0)
            packed, rest = rest[:size], rest[size:]
            if outputs and output["name"] == "probabilities":
                assert output["data"] == expected
            elif output["datatype"] == "FP64":
                assert np.frombuffer(packed, "<f8").tolist() == expected
            else:
                assert packed == b"\6\0\0\0setosa" * n_rows
        assert rest == b""


def call_for_binary(native: Any, case: Case) -> tuple[Answer, int]:
    """Return an answer, and the length of its JSON, which no other header of an answer that is compared says."""
    answer = call(native, case)
    _, length = json.JSONDecoder().raw_decode(answer.body.decode("latin-1"))
    return answer, length


def test_rows_of_tensors_share_a_call(framework: str) -> None:
    """Rows of /v2 and of /predictions that wait together are predicted together."""
    estimator = Noting()
    settings = make_settings(framework=framework, features={}, batching={"max_rows": 5, "max_wait_ms": 1000})
    service = make_service(settings, estimator)
    native = app.FRAMEWORKS[framework](service)
    service.model.warm_up()
    estimator.calls.clear()
    (name,) = service.model.contract.names
    two = [tensor(shape=[2, 1], data=[1, 2])]
    asked: list[dict[str, Any]] = [{"outputs": []}, {"parameters": {"binary_data_output": True}}]
    cases = [infer("tensor", {"inputs": two, **more}) for more in asked]
    cases.append(post_case({name: 3.0}))
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        if framework == "flask":
            answers = [*threads.map(functools.partial(call, native), cases)]
        else:
            answers = asyncio.run(together(native, cases))
    assert [answer.status for answer in answers] == [200, 200, 200]
    assert estimator.calls == [5]


async def together(native: Any, cases: list[Case]) -> list[Answer]:
    return await asyncio.gather(*[call_asgi(native, case) for case in cases])


POINTS = pd.DataFrame([[0.0, 1.0], [1.0, 3.0], [2.0, 5.0], [3.0, 7.0]], columns=["a", "b"])
ASKED = {"inputs": [tensor(shape=[2, 2], data=[0, 1, 3, 7])]}
PLACE = "/v2/models/iris"
ESTIMATORS: dict[str, tuple[Any, Any, list[tuple[str, str, list[int]]]]] = {  # with y, and the outputs that come
    "regressor": (LinearRegression(), [0, 1, 2, 3.5], [("prediction", "FP64", [2])]),
    "two-numbers": (LinearRegression(), POINTS * 2, [("prediction", "FP64", [2, 2])]),
    "truths": (
        RandomForestClassifier(3, random_state=0),
        [True, True, False, False],
        [("prediction", "BOOL", [2]), ("probabilities", "FP64", [2, 2])],
    ),
    "integers": (SVC(), [1, 1, 2, 2], [("prediction", "INT64", [2]), ("decision", "FP64", [2])]),
    "texts-as-objects": (
        SVC(),
        np.array(["x", "y", "y", "z"], object),
        [("prediction", "BYTES", [2]), ("decision", "FP64", [2, 3])],
    ),
    "outliers": (
        IsolationForest(n_estimators=5, random_state=0),
        None,
        [("prediction", "INT64", [2]), ("score", "FP64", [2])],
    ),
    "two-texts": (
        MultiOutputClassifier(RandomForestClassifier(3, random_state=0)),
        np.array([["x", "p"], ["x", "q"], ["y", "p"], ["y", "r"]], object),
        [("prediction", "BYTES", [2, 2]), ("probabilities", "FP64", [2, 5])],
    ),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_outputs_are_those_of_the_estimator(tmp_path: Path, name: str) -> None:
    """Datatypes and shapes come as the metadata says, with the values of /predictions, for one row and for two."""
    estimator, y, expected = ESTIMATORS[name]
    native = serve_estimator(tmp_path / "model.joblib", estimator.fit(POINTS, y))
    outputs = call(native, infer("two", ASKED)).json["outputs"]
    assert [(one["name"], one["datatype"], one["shape"]) for one in outputs] == expected
    described = get(native, PLACE).json["outputs"]
    assert [(one["name"], one["datatype"], [2, *one["shape"][1:]]) for one in described] == expected
    rows = call(native, post_case(POINTS.iloc[[0, 3]].to_dict("records"))).json
    for number, (row, cells) in enumerate(zip(rows, ([0, 1], [3, 7]), strict=True)):
        alone = call(native, one("alone", shape=[1, 2], data=cells)).json["outputs"]
        for output, both in zip(alone, outputs, strict=True):
            width = len(output["data"])
            assert output["data"] == both["data"][number * width : (number + 1) * width]
            assert output["data"] == [*leaves(row[output["name"]])]
            assert (output["datatype"], output["shape"][1:]) == (both["datatype"], both["shape"][1:])


def leaves(value: Any) -> list[Any]:
    """Return the values of an answer, in their order."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if items is None else [leaf for item in items for leaf in leaves(item)]


@pytest.mark.parametrize("n_rows", [1, 500])
def test_table_of_texts_and_missing_values_is_predicted(tmp_path: Path, framework: str, n_rows: int) -> None:
    """Texts are BYTES, null and NaN are missing values where a feature has them, and a feature may be left out."""
    estimator, table = fitted("boosting")
    native = serve_estimator(tmp_path / "model.joblib", estimator, framework=framework)
    rows = (rows_of(table) * 2)[3 : 3 + n_rows]  # the first of which has nothing but missing values
    inputs, data = [], b""
    for name in table:
        cells = [row[name] for row in rows]
        if table[name].dtype == "float64" and name != "year":
            packed = np.array(cells, np.float64).tobytes()
            data += packed
            more = {"data": None, "parameters": {"binary_data_size": len(packed)}}
        else:
            more = {"datatype": "FP64" if name == "year" else "BYTES", "data": cells}
        inputs.append(tensor(name=name, shape=[n_rows], **more))
    head = json.dumps({"inputs": inputs}).encode()
    answer = call(native, infer("table", head + data, headers=((LENGTH, str(len(head))),)))
    assert answer.json["outputs"][0]["data"] == [row["prediction"] for row in call(native, post_case(rows)).json]
    described = {one["name"]: one["datatype"] for one in get(native, PLACE).json["inputs"]}
    assert (described["island"], described["bill_length_mm"]) == ("BYTES", "FP64")
    left_out = {"inputs": [one for one in inputs if one["name"] in ("island", "year")]}
    assert call(native, infer("missing", left_out)).status == 200
    wrong = call(
        native, infer("choice", {"inputs": [tensor(name="island", shape=[1], datatype="BYTES", data=["Java"])]})
    )
    assert (wrong.status, "row 0, 'island': Input is none of the choices" in wrong.json["error"]) == (422, True)


def test_document_has_requests_that_work(apps: dict[str, Any]) -> None:
    """The example of the document, sent, is answered in the shape that the document says, and errors are."""
    document = get(apps["fastapi"], "/openapi.json").json
    names = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(names) == len({*names})
    for path in (INFER, f"{PLACE}/versions/1/infer"):
        described = document["paths"][path]["post"]
        assert [*described["requestBody"]["content"]] == ["application/json", "application/octet-stream"]
        example = described["requestBody"]["content"]["application/json"]["example"]
        for case in (infer("example", example, path=path), infer("bad", {"inputs": []}, path=path)):
            answer = call(apps["flask"], case)
            schema = described["responses"][str(answer.status)]["content"]["application/json"]["schema"]
            Draft202012Validator(schema).validate(answer.json)
    for path in ("/v2", PLACE, f"{PLACE}/ready", "/v2/health/live", "/v2/health/ready"):
        (content,) = document["paths"][path]["get"]["responses"]["200"]["content"].values()
        Draft202012Validator(content["schema"]).validate(get(apps["fastapi"], path).json)


SYNC_CLIENT = """
import sys
import numpy as np
import tritonclient.http as http

with http.InferenceServerClient(sys.argv[1]) as client:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("iris") and client.is_model_ready("iris", "1")
    assert not client.is_model_ready("irs")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert client.get_model_metadata("iris")["outputs"][1]["parameters"]["labels"][2] == "virginica"
    X = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]])
    for dtype, datatype in ((np.float64, "FP64"), (np.float32, "FP32")):
        for is_binary in (True, False):
            matrix = http.InferInput("flowers", [2, 4], datatype)
            matrix.set_data_from_numpy(X.astype(dtype), is_binary)
            result = client.infer("iris", [matrix], request_id="7")
            assert result.as_numpy("prediction").tolist() == [b"setosa", b"virginica"]
            assert result.as_numpy("probabilities").shape == (2, 3)
            assert result.get_response()["id"] == "7" and "model_version" not in result.get_response()
    columns = []
    for name, cells in zip(["sepal_length", "sepal_width", "petal_length", "petal_width"], X.T):
        columns.append(http.InferInput(name, [2, 1], "FP64"))
        columns[-1].set_data_from_numpy(np.ascontiguousarray(cells).reshape(2, 1))
    wanted = [http.InferRequestedOutput("probabilities"), http.InferRequestedOutput("prediction", binary_data=False)]
    result = client.infer("iris", columns, model_version="1", outputs=wanted)
    assert result.get_response()["model_version"] == "1"
    assert result.as_numpy("probabilities").argmax(axis=1).tolist() == [0, 2]
    assert result.as_numpy("prediction").tolist() == ["setosa", "virginica"]
    handles = [client.async_infer("iris", columns) for _ in range(4)]
    assert all(handle.get_result().as_numpy("prediction")[1] == b"virginica" for handle in handles)
    for algorithm in ("gzip", "deflate"):
        for inputs in (columns, [matrix]):
            result = client.infer("iris", inputs, request_compression_algorithm=algorithm)
            assert result.as_numpy("prediction")[1] in ("virginica", b"virginica")
    try:
        client.infer("iris", columns[:3])
    except http.InferenceServerException as error:
        assert "inputs lack 'petal_width'" in str(error) and error.status() == "400"
    else:
        raise AssertionError("it took three columns")
print("done")
"""


@each_combination()
def test_triton_client_predicts(servers: dict[tuple[str, str], Server], combination: tuple[str, str]) -> None:
    """`tritonclient.http`: health, metadata, its defaults, which are binary, JSON, several tensors, and errors.

    It is a program of its own, for it runs on gevent.
    """
    command = [sys.executable, "-c", SYNC_CLIENT, f"127.0.0.1:{servers[combination].port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@each_combination()
def test_triton_client_of_asyncio_predicts(
    servers: dict[tuple[str, str], Server], combination: tuple[str, str]
) -> None:
    """`tritonclient.http.aio`: its defaults, many at once."""

    async def predict() -> list[Any]:
        async with aio.InferenceServerClient(f"127.0.0.1:{servers[combination].port}") as client:
            assert await client.is_server_ready()
            matrix = aio.InferInput("flowers", [100, 4], "FP64")
            matrix.set_data_from_numpy(np.array([CELLS] * 100))
            return await asyncio.gather(*[client.infer("iris", [matrix]) for _ in range(10)])

    results = asyncio.run(predict())
    assert [result.as_numpy("prediction").tolist() for result in results] == [[b"setosa"] * 100] * 10


def test_triton_client_sends_texts(serve: Starter, tmp_path: Path, framework: str) -> None:
    """Texts of a table go as BYTES in the client's default, and those of the answer come so."""
    estimator, table = fitted("boosting")
    model = variables(save(estimator, tmp_path / "model.joblib"))
    worker = "uvicorn" if framework == "fastapi" else "gevent"
    server = serve(**gunicorn_environment(framework, worker, SERVING_FEATURES="{}", **model))

    async def predict() -> Any:
        async with aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            inputs = []
            for name in table:
                texts = table[name].dtype.kind not in "if"
                cells = np.array(table[name].fillna("") if texts else table[name], object if texts else np.float64)[:1]
                inputs.append(aio.InferInput(name, [1], "BYTES" if texts else "FP64"))
                inputs[-1].set_data_from_numpy(cells)
            return await client.infer("iris", inputs)

    assert asyncio.run(predict()).as_numpy("prediction").tolist() == [b"Adelie"]

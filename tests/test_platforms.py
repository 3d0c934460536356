"""What Vertex AI and SageMaker say by their variables, and what their manuals demand of a container, line by line."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import app
from serving.errors import SettingsError
from tests.lib.apps import call, make_settings
from tests.lib.cases import JSON, Case
from tests.lib.cloud_cases import CSV, HEADER, LINE, ONE, ROW, VALUES, body_case, csv_case
from tests.lib.servers import COMBINATIONS, PROJECT, Server, Starter, find_free_port, gunicorn_environment, run
from tests.lib.sizes import TWINS, scale

PORT, PREDICT, HEALTH, BIND_TO = "AIP_HTTP_PORT", "AIP_PREDICT_ROUTE", "AIP_HEALTH_ROUTE", "SAGEMAKER_BIND_TO_PORT"
OWN = "SERVING_SERVER__BIND"
DEPLOYED = "/v1/endpoints/123/deployedModels/456"  # as Vertex AI names routes that are left to it


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({}, 'bind = "127.0.0.1:8000"  # settings.toml'),
        ({PORT: "8080"}, 'bind = "0.0.0.0:8080"  # environment: AIP_HTTP_PORT'),
        ({PORT: ""}, 'bind = "127.0.0.1:8000"  # settings.toml'),
        ({BIND_TO: "8081"}, 'bind = "0.0.0.0:8081"  # environment: SAGEMAKER_BIND_TO_PORT'),
        ({PORT: "8080", BIND_TO: "8080"}, 'bind = "0.0.0.0:8080"  # environment: AIP_HTTP_PORT'),
        ({PORT: "8080", OWN: "127.0.0.1:9"}, 'bind = "127.0.0.1:9"  # environment: SERVING_SERVER__BIND'),
        ({PORT: "8080", OWN: "127.0.0.1:8000"}, 'bind = "127.0.0.1:8000"  # environment: SERVING_SERVER__BIND'),
        ({PORT: "1", BIND_TO: "2", OWN: "127.0.0.1:9"}, 'bind = "127.0.0.1:9"  # environment: SERVING_SERVER__BIND'),
        ({PORT: "http", OWN: "127.0.0.1:9"}, 'bind = "127.0.0.1:9"  # environment: SERVING_SERVER__BIND'),
        ({PORT: "8080", "GUNICORN_CMD_ARGS": "-b :9"}, 'bind = [":9"]  # gunicorn\'s options'),
        ({PORT: "http", "GUNICORN_CMD_ARGS": "-b :9"}, 'bind = [":9"]  # gunicorn\'s options'),
        (
            {PORT: "http", "GUNICORN_CMD_ARGS": "-b 127.0.0.1:8000"},
            'bind = ["127.0.0.1:8000"]  # gunicorn\'s options',
        ),
        ({PREDICT: "/predict"}, 'predict = "/predict"  # environment: AIP_PREDICT_ROUTE'),
        (
            {PREDICT: "/predict", "SERVING_ROUTES__PREDICT": "/p"},
            'predict = "/p"  # environment: SERVING_ROUTES__PREDICT',
        ),
        ({HEALTH: DEPLOYED}, f'health = "{DEPLOYED}"  # environment: AIP_HEALTH_ROUTE'),
        ({}, 'health = ""  # settings.toml'),
    ],
    ids=lambda value: "-".join(value) or "none" if isinstance(value, dict) else "",
)
def test_settings_show_the_platforms_variable(variables: dict[str, str], line: str) -> None:
    """`python app.py` prints what a platform's variable sets, with its name; the operator's own settings win."""
    assert line in run("python app.py", **variables).stdout.splitlines()


def test_operators_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operator has changed in the file stays, whatever a platform's variables say."""
    text = (PROJECT / "settings.toml").read_text().replace('bind = "127.0.0.1:8000"', 'bind = "127.0.0.1:9"')
    file = tmp_path / "settings.toml"
    file.write_text(text.replace('predict = ""', 'predict = "/mine"'))
    for name, value in ((PORT, "8080"), (PREDICT, "/theirs"), (HEALTH, "/health")):
        monkeypatch.setenv(name, value)
    settings = app.load_settings(file)
    assert (settings.server.bind, settings.routes.predict, settings.routes.health) == (
        "127.0.0.1:9",
        "/mine",
        "/health",
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({PORT: "http"}, "environment: AIP_HTTP_PORT is 'http'; it should be a port, 1 to 65535"),
        ({PORT: "0"}, "environment: AIP_HTTP_PORT is '0'; it should be a port, 1 to 65535"),
        ({PORT: "65536"}, "environment: AIP_HTTP_PORT is '65536'; it should be a port, 1 to 65535"),
        ({PORT: " 80"}, "environment: AIP_HTTP_PORT is ' 80'; it should be a port, 1 to 65535"),
        ({BIND_TO: "-1"}, "environment: SAGEMAKER_BIND_TO_PORT is '-1'; it should be a port, 1 to 65535"),
        ({BIND_TO: "٣"}, "environment: SAGEMAKER_BIND_TO_PORT is '٣'; it should be a port, 1 to 65535"),
        (
            {PORT: "1", BIND_TO: "2"},
            "environment: AIP_HTTP_PORT and SAGEMAKER_BIND_TO_PORT set one key to two values; unset one of them",
        ),
        *[
            (
                {PREDICT: route},
                f"environment: AIP_PREDICT_ROUTE: routes.predict is {route!r}; "
                "it should begin with '/' and have no '?', '#', '%' or blank",
            )
            for route in ("predict", "/predict?a=1", "/a#b", "/a b", "/%41")
        ],
        (
            {HEALTH: "health"},
            "environment: AIP_HEALTH_ROUTE: routes.health is 'health'; "
            "it should begin with '/' and have no '?', '#', '%' or blank",
        ),
    ],
    ids=lambda value: "-".join(f"{name}={text}" for name, text in value.items()) if isinstance(value, dict) else "",
)
def test_bad_variable_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    """A variable that says nothing ends the start, with one line: its name, its value, what is allowed."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        app.load_settings()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("routes", "left_alone"),
    [
        ({"predict": "/predictions"}, ["/predictions"]),
        ({"predict": "/invocations", "health": "/ping"}, ["/invocations", "/ping"]),
        ({"health": "/health/ready"}, ["/health/ready"]),
        ({"predict": "/ping", "health": "/invocations"}, []),
        ({"predict": "/", "health": "/"}, []),
    ],
    ids=str,
)
def test_route_that_is_there_is_left_alone(routes: dict[str, str], left_alone: list[str]) -> None:
    """A path that answers the method already stays what it is; another method of it may be added."""
    tables = [app.operations(make_settings()), app.operations(make_settings(routes=routes))]
    before, after = [{(one.method, one.path): one.name for one in table if not one.only_for} for table in tables]
    assert before.items() <= after.items()
    added = {path for _, path in after.keys() - before.keys()}
    assert added == {*routes.values()} - {*left_alone}


def test_route_of_a_platform_comes_before_a_users(framework: str) -> None:
    """A route that a user adds for the same path and method is never asked, under either framework."""
    native = app.create_app(make_settings(framework=framework, routes={"predict": "/mine"}))
    if framework == "flask":
        native.add_url_rule("/mine", view_func=lambda: {"mine": True}, methods=["POST"])
    else:
        native.add_api_route("/mine", lambda: {"mine": True}, methods=["POST"])
    assert call(native, body_case("mine", {"instances": [ROW]}, path="/mine")).json == json.loads(ONE)


@pytest.mark.parametrize(
    "routes", [{"predict": "/p", "health": "/h"}, {"predict": "/both", "health": "/both"}], ids=str
)
def test_routes_answer_alike(routes: dict[str, str]) -> None:
    """Both frameworks answer at the routes, and to other methods of them, with the same bytes."""
    cases = [
        body_case("predict", {"instances": [VALUES]}, path=routes["predict"], says=ONE),
        Case("health", "GET", routes["health"]),
        Case("delete", "DELETE", routes["predict"], status=405),
        Case("options", "OPTIONS", routes["health"], status=204),
    ]
    apps = [app.create_app(make_settings(framework=name, routes=routes)) for name in app.FRAMEWORKS]
    for case in cases:
        answers = [call(native, case) for native in apps]
        assert answers[0] == answers[1]
        assert answers[0].status == case.status
        assert case.says in answers[0].body.decode()


Variables = dict[str, str]
PAIRS = scale(TWINS, COMBINATIONS)


def start(serve: Starter, pair: tuple[str, str], **variables: str) -> Server:
    """Start a server as a container is: only the platform says where it listens."""
    environment = gunicorn_environment(*pair, **variables)
    del environment[OWN]
    port = int(variables.get(PORT) or variables[BIND_TO])
    return serve(port=port, **environment)


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def vertex_server(request: pytest.FixtureRequest, serve_module: Starter) -> Server:
    """A server with the variables that Vertex AI sets, where it chooses the routes."""
    variables = {
        PORT: str(find_free_port()),
        HEALTH: DEPLOYED,
        PREDICT: f"{DEPLOYED}:predict",
        "AIP_MODE": "PREDICTION",
    }
    return start(serve_module, request.param, **variables)


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def sagemaker_server(request: pytest.FixtureRequest, serve_module: Starter) -> Server:
    """A server with the variables that SageMaker sets."""
    return start(serve_module, request.param, **{BIND_TO: str(find_free_port()), "SAGEMAKER_SAFE_PORT_RANGE": "1-9"})


def predict(path: str, payload: Any, headers: Any = JSON) -> Case:
    return body_case("manual", payload, path=path, headers=headers)


# "Custom container requirements for prediction", of Vertex AI: the subject of a sentence, what is sent, what it says.
VERTEX = [
    ("health-checks-are-get-at-AIP_HEALTH_ROUTE", Case("manual", "GET", DEPLOYED), '"status":"ready"'),
    ("requests-are-post-at-AIP_PREDICT_ROUTE", predict(f"{DEPLOYED}:predict", {"instances": [ROW]}), ONE),
    ("instances-is-an-array-of-any-json-type", predict(f"{DEPLOYED}:predict", {"instances": [VALUES]}), ONE),
    (
        "parameters-is-optional-and-any-json-object",
        predict(f"{DEPLOYED}:predict", {"instances": [ROW], "parameters": {"full": True}}),
        '{"predictions":[{"prediction":"setosa"',
    ),
    (
        "predictions-has-one-for-each-instance",
        predict(f"{DEPLOYED}:predict", {"instances": [ROW] * 3}),
        '"setosa",' * 2,
    ),
    (
        "content-type-is-application-json",
        predict(f"{DEPLOYED}:predict", {"instances": [ROW]}, (("Content-Type", "application/json"),)),
        ONE,
    ),
    (
        "raw-predict-has-any-payload",
        Case("manual", "POST", f"{DEPLOYED}:predict", CSV, f"{HEADER}\n{LINE}".encode()),
        ONE,
    ),
]


@pytest.mark.parametrize(("case", "says"), [row[1:] for row in VERTEX], ids=[row[0] for row in VERTEX])
def test_vertex_ai_manual(vertex_server: Server, case: Case, says: str) -> None:
    """Each sentence of "Custom container requirements for prediction" about a request gets its answer."""
    answer = vertex_server.send(case)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert says in answer.body.decode()


def test_vertex_ai_listens_on_all_addresses(vertex_server: Server) -> None:
    """The container listens on 0.0.0.0 at AIP_HTTP_PORT, over HTTP/1.1, and the log says so."""
    (line,) = [line for line in vertex_server.lines if line["event"] == "serving"]
    assert f"0.0.0.0:{vertex_server.port}" in json.dumps(line)


def test_vertex_ai_payload_of_1_5_mb(vertex_server: Server) -> None:
    """A request has up to 1.5 MB: that many bytes are taken."""
    rows = [ROW] * 9000
    case = predict(f"{DEPLOYED}:predict", {"instances": rows})
    padded = Case(case.id, case.method, case.target, case.headers, case.body + b" " * (1_500_000 - len(case.body)))
    assert vertex_server.send(padded).json == {"predictions": ["setosa"] * 9000}


# "Use your own inference code with hosting services", of SageMaker, and of batch transform.
SAGEMAKER = [
    ("ping-is-get-and-200", Case("manual", "GET", "/ping"), '{"status":"live"}'),
    ("invocations-is-post", predict("/invocations", {"instances": [VALUES]}), ONE),
    ("content-type-is-the-clients", csv_case("manual", f"{HEADER}\n{LINE}"), ONE),
    (
        "accept-is-the-clients",
        csv_case("manual", f"{HEADER}\n{LINE}", headers=(*CSV, ("Accept", "text/csv"))),
        "setosa\n",
    ),
    (
        "custom-attributes-are-passed-on",
        predict("/invocations", ROW, (*JSON, ("X-Amzn-SageMaker-Custom-Attributes", "trace=1"))),
        ONE,
    ),
    (
        "target-variant-is-passed-on",
        predict("/invocations", [ROW], (*JSON, ("X-Amzn-SageMaker-Target-Variant", "a"))),
        ONE,
    ),
]


@pytest.mark.parametrize(("case", "says"), [row[1:] for row in SAGEMAKER], ids=[row[0] for row in SAGEMAKER])
def test_sagemaker_manual(sagemaker_server: Server, case: Case, says: str) -> None:
    """Each sentence of "Use your own inference code" about a request gets its answer."""
    answer = sagemaker_server.send(case)
    assert answer.status == 200
    assert says in answer.body.decode()


def test_sagemaker_ping_within_two_seconds(sagemaker_server: Server) -> None:
    """The container responds to /ping within 2 seconds, also while it predicts."""
    with sagemaker_server.connect() as busy:
        busy.sendall(predict("/invocations", {"instances": [ROW] * 10_000}).raw())
        started = time.monotonic()
        assert sagemaker_server.get("/ping").status == 200
        assert time.monotonic() - started < 2


def test_sagemaker_client_errors_are_not_failures(sagemaker_server: Server) -> None:
    """A model error of the client's has a status of its own and JSON that tells why; the container stays up."""
    answer = sagemaker_server.send(predict("/invocations", {"instances": ["x"]}))
    assert (answer.status, answer.json.keys()) == (422, {"detail"})
    assert sagemaker_server.get("/ping").status == 200


@pytest.mark.parametrize("pair", TWINS, ids="-".join)
def test_sagemaker_stops_by_sigterm(serve: Starter, pair: tuple[str, str]) -> None:
    """SIGTERM ends the container with success, within the 30 seconds after which SIGKILL is sent."""
    server = start(serve, pair, **{BIND_TO: str(find_free_port())})
    assert server.stop(signal.SIGTERM) == 0


def test_log_names_routes_that_are_there(serve: Starter) -> None:
    """A route that is there already is logged once, by its setting."""
    server = start(serve, TWINS[0], **{PORT: str(find_free_port()), HEALTH: "/ping", PREDICT: "/predictions"})
    lines = [line for line in server.lines if line["event"] == "route_left_alone"]
    assert [(line["setting"], line["path"]) for line in lines] == [
        ("routes.predict", "/predictions"),
        ("routes.health", "/ping"),
    ]
    assert server.get("/ping").json == {"status": "live"}

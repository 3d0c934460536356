"""What a user adds in `mine.py`: closed without a key, logged, and beside the service's own in all else."""

import asyncio
import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastapi
import pytest
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.profiler import ProfilerMiddleware
from werkzeug.test import EnvironBuilder

import app
from serving.errors import SettingsError
from tests.lib.apps import call, call_asgi, call_wsgi, make_settings
from tests.lib.cases import FLOWER, JSON, PREFLIGHT, Case
from tests.lib.clients import ROW, Answer, post_case, read_answer
from tests.lib.servers import COMBINATIONS, Server, Starter, gunicorn_environment, gunicorn_with, wait_until

MINE = """
from pathlib import Path

import app

FILES = Path(__file__).parent / "files"
native = app.create_app()
if hasattr(native, "wsgi_app"):
    import flask
    from flask_cors import CORS, cross_origin
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    def mounted(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"secret"]

    CORS(native)
    part = flask.Blueprint("part", __name__, url_prefix="/part", static_folder=FILES, static_url_path="/static")
    part.get("/data")(lambda: "secret")
    native.register_blueprint(part)
    native.route("/closed", endpoint="closed", methods=["GET", "POST", "OPTIONS"])(lambda: "secret")
    native.get("/items/<name>", endpoint="item")(lambda name: "secret")
    native.get("/slash/", endpoint="slash")(lambda: "secret")
    native.post("/ping", endpoint="more-of-ping")(lambda: "secret")
    native.get("/hello", endpoint="hello")(lambda: "hello")
    native.get("/public/<name>", endpoint="public")(lambda name: "hello")
    native.get("/decorated", endpoint="decorated")(cross_origin()(lambda: "secret"))
    native.wsgi_app = DispatcherMiddleware(native.wsgi_app, {"/mounted": mounted})

    @native.after_request
    def see(response):
        response.headers["WWW-Seen"] = "yes"
        return response
else:
    import fastapi
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import PlainTextResponse
    from fastapi.staticfiles import StaticFiles

    async def mounted(scope, receive, send):
        await PlainTextResponse("secret")(scope, receive, send)

    def secret():
        return PlainTextResponse("secret")

    def hello():
        return PlainTextResponse("hello")

    part = fastapi.APIRouter(prefix="/part")
    part.get("/data")(secret)
    native.include_router(part)
    native.mount("/part/static", StaticFiles(directory=FILES))
    native.api_route("/closed", methods=["GET", "POST", "OPTIONS"])(secret)
    native.get("/items/{name}")(secret)
    native.get("/slash/")(secret)
    native.get("/hello")(hello)
    native.get("/public/{name}")(hello)
    native.mount("/mounted", mounted)
    native.frontend("/front", directory=FILES)

    @native.middleware("http")
    async def see(request, call_next):
        response = await call_next(request)
        response.headers["WWW-Seen"] = "yes"
        return response

    native.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])

asgi, wsgi = app.as_asgi(native), app.as_wsgi(native)
"""
CLOSED = [
    ("GET", "/closed"),
    ("HEAD", "/closed"),
    ("POST", "/closed"),
    ("OPTIONS", "/closed"),
    ("PUT", "/closed"),
    ("GET", "/part/data"),
    ("GET", "/part/static/file.txt"),
    ("GET", "/part/static/none.txt"),
    ("GET", "/items/1"),
    ("GET", "/slash/"),
    ("GET", "/mounted/x"),
    ("OPTIONS", "/mounted/x"),
]
OF_FLASK = [("POST", "/ping"), ("GET", "/slash"), ("GET", "/decorated")]
OF_FASTAPI = [("GET", "/front/file.txt"), ("GET", "/front")]
KEY = {"Authorization": "Bearer one"}
SETTINGS = {
    "SERVING_AUTH__API_KEYS": '["one"]',
    "SERVING_AUTH__OPEN_PATHS": '["/hello", "/public/*"]',
}


@pytest.fixture(scope="module")
def mine_servers(serve_module: Starter, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Server]:
    """The four combinations with what a user has added."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "files").mkdir()
    (folder / "files/file.txt").write_text("secret")
    (folder / "files/index.html").write_text("secret")
    (folder / "mine.py").write_text(MINE)
    return {
        pair: serve_module(
            gunicorn_with("mine", pair[1]), **gunicorn_environment(*pair, PYTHONPATH=str(folder), **SETTINGS)
        )
        for pair in COMBINATIONS
    }


@pytest.fixture(params=COMBINATIONS, ids="-".join)
def mine(request: pytest.FixtureRequest, mine_servers: dict[tuple[str, str], Server]) -> Server:
    server = mine_servers[request.param]
    server.framework = request.param[0]  # type: ignore[attr-defined]
    return server


def ask(server: Server, method: str, path: str, **headers: str) -> tuple[Answer, dict[str, str]]:
    """Send a request, and return the answer with all its headers."""
    case = Case("ask", method, path, tuple((name.replace("_", "-"), value) for name, value in headers.items()))
    with server.connect() as client:
        client.sendall(case.raw())
        client.shutdown(1)
        text = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = text.partition(b"\r\n\r\n")
    status, *fields = head.decode("latin-1").split("\r\n")
    pairs = [field.split(": ", 1) for field in fields]
    answer = Answer.of(int(status.split()[1]), [(name, value) for name, value in pairs], body)
    return answer, {name.lower(): value for name, value in pairs}


def test_what_is_added_needs_a_key(mine: Server) -> None:
    """Every route, mounted app and file of a user's is refused as ours are, in the user's own middleware."""
    own = OF_FLASK if mine.framework == "flask" else OF_FASTAPI  # type: ignore[attr-defined]
    for method, path in CLOSED + own:
        answer, headers = ask(mine, method, path, Origin="http://page.example")
        assert answer.status == 401, (method, path)
        assert headers["www-authenticate"] == "Bearer"
        assert headers["x-request-id"] == "ask"
        if method != "HEAD":
            assert answer.json["detail"].startswith("no valid API key")
        if not path.startswith("/mounted") or mine.framework == "fastapi":  # type: ignore[attr-defined]
            assert headers["access-control-allow-origin"]
            assert headers["www-seen"] == "yes"
        wrong, _ = ask(mine, method, path, X_API_Key="two")
        assert wrong.status == 401
        good, headers = ask(mine, method, path, **KEY)
        assert good.status != 401, (method, path)
        assert headers["x-request-id"] == "ask"


def test_open_paths_need_none(mine: Server) -> None:
    """What is listed answers without a key, and only that; unknown paths are 404, with open ones in the hint."""
    assert ask(mine, "GET", "/hello")[0].body == b"hello"
    assert ask(mine, "GET", "/public/x")[0].body == b"hello"
    for path in ("/public", "/hello/", "/public/../closed", "/HELLO", "/closed/x", "/nope"):
        assert ask(mine, "GET", path)[0].status == 404, path
    assert "did you mean '/hello'?" in ask(mine, "GET", "/helo")[0].json["detail"]
    assert "/slash" not in ask(mine, "GET", "/slas")[0].json["detail"]
    for path in ("/ping", "/health/ready"):
        assert ask(mine, "GET", path)[0].status == 200
    for path in ("/predictions", "/openapi.json"):
        assert ask(mine, "GET", path)[0].status == 401


def test_preflights_need_none(mine: Server) -> None:
    """A browser that asks before it sends gets leave for any path, and the headers of CORS are in errors too."""
    more = dict(PREFLIGHT) | {"Access-Control-Request-Headers": "content-type"}
    paths = ["/predictions", "/ping", "/hello", "/items/1", "/part/data"]
    if mine.framework == "flask":  # type: ignore[attr-defined]
        paths.append("/decorated")
    for path in paths:
        answer, headers = ask(mine, "OPTIONS", path, **more)
        assert answer.status in (200, 204), path
        assert headers["access-control-allow-origin"] in ("*", "http://page.example")
        assert "POST" in headers["access-control-allow-methods"]
        assert "content-type" in headers["access-control-allow-headers"].lower()
    for status, key, media_type, body, path in [
        (401, {}, "application/json", FLOWER, "/predictions"),
        (404, KEY, "application/json", FLOWER, "/nope"),
        (415, KEY, "text/plain", FLOWER, "/predictions"),
        (422, KEY, "application/json", "{}", "/predictions"),
        (200, KEY, "application/json", FLOWER, "/predictions"),
    ]:
        fields = (("Origin", "http://page.example"), ("Content-Type", media_type), *key.items())
        with mine.connect() as client:
            client.sendall(Case("cors", "POST", path, fields, body.encode()).raw())
            text = client.makefile("rb").read(400).lower()
        assert text.startswith(b"http/1.1 %d" % status)
        assert b"\r\naccess-control-allow-origin: " in text


def test_what_is_added_is_logged(mine: Server) -> None:
    """Each request has its line, whoever answered it, with its id, which the answer has too."""
    for path in ("/hello", "/closed", "/predictions", "/nope"):
        mine.get(path, X_Request_ID="logged")  # no such field
        ask(mine, "GET", path, **{"X-Request-ID": f"logged-{path[1:]}"})
        ask(mine, "GET", path, **{"X-Request-ID": f"logged-with-key-{path[1:]}"}, **KEY)

    def logged() -> dict[str, int]:
        lines = [line for line in mine.lines if line["event"] == "request"]
        return {line["request_id"]: line["status"] for line in lines if line["request_id"].startswith("logged-")}

    wait_until(lambda: len(logged()) == 8, "the lines")
    assert logged() == {
        "logged-hello": 200,
        "logged-closed": 401,
        "logged-predictions": 401,
        "logged-nope": 404,
        "logged-with-key-hello": 200,
        "logged-with-key-closed": 200,
        "logged-with-key-predictions": 422,
        "logged-with-key-nope": 404,
    }
    (line,) = [line for line in mine.lines if line.get("request_id") == "logged-with-key-closed"]
    assert (line["method"], line["path"], line["rows"]) == ("GET", "/closed", 0)
    assert 0 <= line["duration_ms"] < 60_000


def test_body_without_a_key_is_not_read(mine: Server) -> None:
    """The refusal comes before the body, and the connection ends with it."""
    for path in ("/closed", "/mounted/x"):
        with mine.connect() as client, contextlib.suppress(ConnectionError):
            client.sendall(Case("body", "POST", path, (("Content-Length", "8000000"),)).raw())
            client.sendall(bytes(1000))
            answer = read_answer(client)
            assert (answer.status, answer.headers["connection"]) == (401, "close"), path
    with mine.connect() as client:
        client.sendall(Case("body", "POST", "/closed", (*JSON, *KEY.items()), b"[]").raw())
        assert client.recv(100).startswith(b"HTTP/1.1 200")


def make_app(framework: str, **auth: Any) -> Any:
    return app.create_app(make_settings(framework=framework, auth={"api_keys": ["one"], **auth}))


def test_websocket_is_closed_before_it_opens() -> None:
    """Without a key a WebSocket of a user's is refused; with one it opens."""
    native = make_app("fastapi")

    @native.websocket("/talk")
    async def talk(socket: fastapi.WebSocket) -> None:
        await socket.accept()
        await socket.close()

    assert asyncio.run(talk_to(native, [])) == [{"type": "websocket.close", "code": 1008, "reason": ""}]
    opened = asyncio.run(talk_to(native, [(b"x-api-key", b"one")]))
    assert opened[0]["type"] == "websocket.accept"


async def talk_to(native: Any, headers: list[tuple[bytes, bytes]]) -> list[Any]:
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/talk", "query_string": b"", "headers": headers, "subprotocols": []}
    await native(scope, receive, send)
    return sent


def test_route_in_front_of_ours_is_closed_too(framework: str) -> None:
    """A route with which a user takes a path of ours needs a key, though ours does not; so does one for all paths."""
    native = make_app(framework)
    if framework == "flask":
        native.post("/ping", endpoint="mine")(lambda: "mine")
        native.get("/<path:rest>", endpoint="rest")(lambda rest: "mine")
    else:
        native.post("/ping")(lambda: "mine")
        native.router.routes.insert(0, native.router.routes.pop())
        native.get("/{rest:path}")(lambda rest: "mine")
    for method, path in [("POST", "/ping"), ("GET", "/other")]:
        assert call(native, Case("closed", method, path)).status == 401
        assert b"mine" in call(native, Case("open", method, path, (("X-API-Key", "one"),))).body
    assert call(native, Case("ready", "GET", "/health/ready")).status == 200


def test_open_route_in_front_of_ours_gets_its_body() -> None:
    """A bridge asks for the key of the route that answers, not of the one behind it."""
    native = make_app("fastapi", open_paths=["/*"])

    @native.get("/openapi.json")
    async def echo(request: fastapi.Request) -> Any:
        return fastapi.Response(await request.body())

    native.router.routes.insert(0, native.router.routes.pop())
    case = Case("echo", "GET", "/openapi.json", body=b"mine")
    for answer in (call(native, case), call_wsgi(app.as_wsgi(native), case)):
        assert (answer.status, answer.body) == (200, b"mine")


def test_route_for_options_alone_is_open(framework: str) -> None:
    """What a user has written for preflights answers them, and a view that takes OPTIONS among others does not."""
    native = make_app(framework)
    if framework == "flask":
        native.route("/<path:rest>", endpoint="rest", methods=["OPTIONS"])(lambda rest: "leave")
    else:
        native.options("/{rest:path}")(lambda rest: "leave")
    assert b"leave" in call(native, Case("preflight", "OPTIONS", "/other", PREFLIGHT)).body


def test_routes_of_included_routers_are_looked_into() -> None:
    """A router in a router counts by its own routes: for OPTIONS alone without a key, and in hints if open."""
    native = make_app("fastapi", open_paths=["/outer/inner/shown", "/plain"])
    outer, inner = fastapi.APIRouter(prefix="/outer"), fastapi.APIRouter(prefix="/inner")
    inner.options("/opt")(lambda: "leave")
    inner.get("/opt")(lambda: "secret")
    inner.api_route("/both", methods=["GET", "OPTIONS"])(lambda: "secret")
    inner.get("/shown")(lambda: "hello")
    outer.options("/opt")(lambda: "leave")
    outer.add_route("/plain", lambda request: fastapi.Response("hello"))
    outer.include_router(inner)
    native.include_router(outer)
    for path in ("/outer/opt", "/outer/inner/opt"):
        assert b"leave" in call(native, Case("leave", "OPTIONS", path)).body
    for method, path in [("GET", "/outer/opt"), ("GET", "/outer/inner/opt"), ("OPTIONS", "/outer/inner/both")]:
        assert call(native, Case("closed", method, path)).status == 401, (method, path)
    for path, near in [("/outer/inner/shwn", "/outer/inner/shown"), ("/plan", "/plain")]:
        assert f"did you mean '{near}'?" in call(native, Case("hint", "GET", path)).json["detail"]


def test_without_keys_all_is_open(framework: str) -> None:
    """Where nobody needs a key, what is added needs none, and hints name it."""
    native = app.create_app(make_settings(framework=framework))
    native.get("/added")(lambda: "mine")
    case = Case("added", "GET", "/added")
    over = call_wsgi(app.as_wsgi(native), case), asyncio.run(call_asgi(app.as_asgi(native), case))
    for answer in (call(native, case), *over):
        assert (answer.status, answer.headers["x-request-id"]) == (200, "added")
    assert "did you mean '/added'?" in call(native, Case("hint", "GET", "/aded")).json["detail"]


def logged(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str, int]]:
    """Return path, id and status of each request that was logged since the last call."""
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    return [(line["path"], line["request_id"], line["status"]) for line in lines if line["event"] == "request"]


def test_request_within_a_request_has_its_own_line(framework: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A route that asks the app itself has its line and its id, and so has what it asks for."""
    native = app.create_app(make_settings(framework=framework, logging={"format": "json"}))
    inner = Case("inner", "POST", "/predictions", JSON, FLOWER.encode())
    if framework == "flask":
        native.get("/batch")(lambda: call_wsgi(native, inner).body)
    else:

        @native.get("/batch")
        async def batch(request: fastapi.Request) -> Any:
            scope = {**request.scope, "path": "/ping"}
            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            await native(scope, request.receive, send)
            assert dict(sent[0]["headers"])[b"x-request-id"] == b"outer"  # of the header in the same scope
            return (await call_asgi(native, inner)).json

    capsys.readouterr()
    answer = call(native, Case("outer", "GET", "/batch"))
    assert (answer.status, answer.headers["x-request-id"], b"setosa" in answer.body) == (200, "outer", True)
    lines = logged(capsys)
    assert [line for line in lines if line[0] != "/ping"] == [("/predictions", "inner", 200), ("/batch", "outer", 200)]
    assert [line for line in lines if line[0] == "/ping"] == [("/ping", "outer", 200)] * (framework == "fastapi")


def admin(environ: Any, start_response: Any) -> list[bytes]:
    """Answer anything, as an app that a user mounts."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"secret"]


class Stripped:
    """A WSGI middleware that takes `/v1` off a path."""

    def __init__(self, inner: Any) -> None:
        self.app = inner

    def __call__(self, environ: Any, start_response: Any) -> Any:
        return self.app({**environ, "PATH_INFO": environ["PATH_INFO"].removeprefix("/v1")}, start_response)


def mounted(native: Any, mount: str = "/admin") -> Any:
    return DispatcherMiddleware(native.wsgi_app, {mount: admin})


AROUND: dict[str, Callable[[Any], Any]] = {  # what a user puts around a Flask
    "dispatcher": mounted,
    "profiler": lambda native: ProfilerMiddleware(mounted(native), stream=None),
    "function": lambda native: functools.partial(lambda inner, *args: inner(*args), mounted(native)),
    "stripped": lambda native: Stripped(mounted(native)),
    "answers": lambda native: admin,
    "subclass": lambda native: type("Mine", (DispatcherMiddleware,), {})(native.wsgi_app, {"/admin": admin}),
    "inside": lambda native: DispatcherMiddleware(admin, {"/v1": native.wsgi_app}),
}


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("path", ["/admin", "/admin/x", "/v1/admin/x", "/admin/hello", "//admin/x"])
def test_whatever_stands_around_flask_needs_a_key(name: str, path: str) -> None:
    """No way to put an app beside Flask's opens it, under either interface and by any method."""
    native = make_app("flask", open_paths=["/hello", "/public/*"])
    native.get("/hello")(lambda: "hello")
    native.wsgi_app = AROUND[name](native)
    for method in ("GET", "POST", "OPTIONS", "PATCH"):
        case = Case("closed", method, path, PREFLIGHT)
        for answer in (call_wsgi(app.as_wsgi(native), case), asyncio.run(call_asgi(app.as_asgi(native), case))):
            assert b"secret" not in answer.body
            assert answer.status == 401 or (name == "dispatcher" and answer.status == 404)
    assert call(native, Case("open", "GET", path, (("X-API-Key", "one"),))).status in (200, 404)
    if name not in ("answers", "inside"):
        for open_path in ("/hello", "/ping", "/health/ready"):
            assert call(native, Case("hello", "GET", open_path)).status == 200
        assert call(native, Case("ours", "OPTIONS", "/predictions")).status == 204
        assert call(native, Case("added", "OPTIONS", "/hello")).status == 200
    assert call(native, Case("ours", "POST", "/predictions", JSON, b"[]")).status == 401


def test_mounted_path_is_compared_as_werkzeug_does() -> None:
    """A mount whose name is not ASCII is closed for the bytes by which werkzeug finds it."""
    native = make_app("flask")
    native.wsgi_app = mounted(native, "/\xfc")
    environ = dict(EnvironBuilder("/").get_environ(), PATH_INFO="/\xfc/x")
    started: list[str] = []
    native(environ, lambda status, headers, exc_info=None: started.append(status))
    assert started == ["401 Unauthorized"]


def test_wsgi_middleware_sees_every_request(capsys: pytest.CaptureFixture[str]) -> None:
    """What stands around a Flask sees ours too, under either interface; each request has one line and one id."""
    native = app.create_app(make_settings(framework="flask", logging={"format": "json"}))
    native.get("/hello")(lambda: "hello")
    inner, seen = native.wsgi_app, []

    def around(environ: Any, start_response: Any) -> Any:
        seen.append(environ["PATH_INFO"])
        return admin(environ, start_response) if environ["PATH_INFO"] == "/own" else inner(environ, start_response)

    native.wsgi_app = around
    cases = [Case("own", "GET", "/own"), Case("hello", "GET", "/hello"), Case("ping", "GET", "/ping")]
    cases += [Case("one", "POST", "/predictions", JSON, FLOWER.encode()), Case("nope", "GET", "/nope", status=404)]
    wsgi, asgi = app.as_wsgi(native), app.as_asgi(native)
    for send in (functools.partial(call_wsgi, wsgi), lambda case: asyncio.run(call_asgi(asgi, case))):
        seen.clear()
        capsys.readouterr()
        for case in cases:
            answer = send(case)
            assert (answer.status, answer.headers["x-request-id"]) == (case.status, case.id)
        assert seen == [case.target for case in cases]
        assert logged(capsys) == [(case.target, case.id, case.status) for case in cases]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["/predictions"], "auth.open_paths has '/predictions', which is the service's own; list paths that you have"),
        (["/hello", "/openapi.json"], "'/openapi.json', which is the service's own; set auth.open_docs"),
        (
            ["hello"],
            "it should begin with '/', have no '?', '#' or '%', and '*' only in '/*' at its end, unlike 'hello'",
        ),
        (["/a*"], "'*' only in '/*' at its end, unlike '/a*'"),
        (["/*/b"], "'*' only in '/*' at its end"),
        (["/a?b=1"], "have no '?'"),
        ("/hello", "it should be a list"),
    ],
)
def test_open_paths_are_checked(file: Path, paths: Any, message: str) -> None:
    """A path that can be none of a user's is refused at the start, in one line."""
    file.write_text(file.read_text().replace("[auth]", "") + f"\n[auth]\nopen_paths = {json.dumps(paths)}\n")
    with pytest.raises(SettingsError) as refusal:
        app.load_settings(file)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_all_paths_of_a_user_can_be_open(framework: str) -> None:
    """`/*` opens what is added, and nothing of ours."""
    native = make_app(framework, open_paths=["/*"])
    native.get("/added")(lambda: "mine")
    assert call(native, Case("added", "GET", "/added")).status == 200
    assert call(native, Case("predictions", "GET", "/predictions")).status == 401


def test_other_method_of_our_path_is_the_users(framework: str) -> None:
    """What a user adds for a path of the service answers the methods that the service does not, with a key."""
    native = app.create_app(make_settings(framework=framework, auth={"api_keys": ["one"]}))
    if framework == "flask":
        native.add_url_rule("/predictions", "mine", lambda: {"mine": True}, methods=["DELETE", "POST"])
    else:
        native.add_api_route("/predictions", lambda: {"mine": True}, methods=["DELETE", "POST"])
    key = ("X-API-Key", "one")
    assert call(native, Case("mine", "DELETE", "/predictions", (key,))).json == {"mine": True}
    assert call(native, Case("mine", "DELETE", "/predictions")).status == 401
    assert call(native, post_case(ROW, X_API_Key="one")).json["prediction"] == "setosa"
    refused = call(native, Case("other", "PUT", "/predictions", (key,)))
    assert (refused.status, refused.headers["allow"]) == (405, "GET, HEAD, POST, OPTIONS")

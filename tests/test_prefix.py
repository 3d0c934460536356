"""A path prefix: whether a proxy strips it or not, a request is the same, and what the service links to is below it."""

import asyncio
import functools
import json
import re
from pathlib import Path
from typing import Any

import fastapi
import pytest
from openapi_spec_validator import validate
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import app
from serving.errors import SettingsError
from tests.lib.apps import call, call_asgi, call_wsgi, forbid_router, make_settings
from tests.lib.cases import BAD, FLOWER, GOOD, JSON, Case
from tests.lib.clients import Answer, post_case
from tests.lib.servers import (
    COMBINATIONS,
    GUNICORN,
    PROJECT,
    Server,
    Starter,
    find_free_port,
    gunicorn_environment,
    wait_until,
)
from tests.lib.sizes import each_combination

PREFIX = "/models/iris"
CASES = [case for case in GOOD + BAD if case.target.startswith("/")]
(RULE,) = re.findall(r"^    (http-request .*)$", (PROJECT / "docs/operate.md").read_text(), re.M)
HAPROXY = f"""
defaults
    mode http
    timeout connect 2s
    timeout client 30s
    timeout server 30s
frontend strips
    bind 127.0.0.1:%d
    {RULE}
    default_backend serving
frontend passes
    bind 127.0.0.1:%d
    default_backend serving
backend serving
    server one 127.0.0.1:%d
"""


def below(case: Case, prefix: str = PREFIX) -> Case:
    """Return a request as it arrives by a proxy that does not strip the prefix."""
    return Case(**{**vars(case), "target": prefix + case.target})


def make_app(framework: str, **changes: Any) -> Any:
    return app.create_app(make_settings(framework=framework, server={"root_path": PREFIX}, **changes))


def senders(native: Any) -> list[Any]:
    """Return what sends a case to an app by its own interface and by the other one."""

    def by_asgi(case: Case) -> Answer:
        return asyncio.run(call_asgi(app.as_asgi(native), case))

    return [by_asgi, functools.partial(call_wsgi, app.as_wsgi(native))]


@pytest.fixture(scope="module")
def apps() -> dict[str, Any]:
    return {name: make_app(name) for name in app.FRAMEWORKS}


@pytest.fixture(scope="module")
def plain() -> Any:
    return app.create_app(make_settings())


@pytest.mark.in_turn
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_request_is_the_same_with_and_without(apps: dict[str, Any], plain: Any, framework: str, case: Case) -> None:
    """Status, headers and body are those of a service without a prefix, by both interfaces."""
    expected = call(plain, case)
    if case.target == "/openapi.json" and case.method == "GET":
        return
    for send in senders(apps[framework]):
        assert send(case) == expected
        assert send(below(case)) == expected


def test_exactly_the_prefix_is_the_root(framework: str) -> None:
    """With a slash behind it or not it is `/`, and letters behind it make another path."""
    native = make_app(framework)
    native.get("/")(lambda: "root")
    for send in senders(native):
        for path in ("/", PREFIX, f"{PREFIX}/", f"{PREFIX}{PREFIX}"):
            assert b"root" in send(Case("root", "GET", path)).body, path
        for path in (f"{PREFIX}2/ping", f"{PREFIX}ping", "/models/ping", "/models", f"{PREFIX}//ping"):
            assert send(Case("other", "GET", path)).status == 404, path
        assert send(Case("star", "OPTIONS", "*")).status == 204


def test_hints_and_log_have_no_prefix(framework: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They name the paths of the service, as `auth.open_paths` does."""
    native = make_app(framework, auth={"api_keys": ["one"], "open_paths": ["/hello"]}, logging={"format": "json"})
    for path in ("/hello", "/closed"):
        native.add_url_rule(path, path, lambda: "mine") if framework == "flask" else native.get(path)(lambda: "mine")
    for send in senders(native):
        capsys.readouterr()
        answer = send(below(Case("hint", "GET", "/helo")))
        assert answer.json["detail"] == "there is no '/helo'; did you mean '/hello'?"
        for path, status in [("/hello", 200), ("/closed", 401), ("/ping", 200), ("/openapi.json", 401)]:
            assert [send(case).status for case in (Case("x", "GET", path), Case("x", "GET", PREFIX + path))] == [
                status
            ] * 2
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        paths = [line["path"] for line in lines if line["event"] == "request"]
        assert paths == ["/helo", "/hello", "/hello", "/closed", "/closed", "/ping", "/ping", *["/openapi.json"] * 2]


def test_frameworks_link_below_the_prefix(framework: str) -> None:
    """`url_for` and the frameworks' own redirects keep to it, whether the proxy strips it or not."""
    native = make_app(framework)
    if framework == "flask":
        import flask

        native.get("/link/", endpoint="link")(lambda: flask.url_for("link", _external=True))
        with native.test_request_context("/other"):
            assert flask.url_for("link") == f"{PREFIX}/link/"
    else:
        native.router.redirect_slashes = True
        native.get("/link/", name="link")(lambda request: None)
        native.router.routes.pop()

        @native.get("/link/", name="link")
        def link(request: fastapi.Request) -> str:
            return str(request.url_for("link"))

    for send in senders(native):
        for prefix in ("", PREFIX):
            answer = send(Case("link", "GET", f"{prefix}/link/"))
            assert answer.body.strip(b'"').decode().endswith(f"test{PREFIX}/link/")
            moved = send(Case("moved", "GET", f"{prefix}/link"))
            assert moved.status in (307, 308)
            assert moved.headers["location"].endswith(f"{PREFIX}/link/")
            assert moved.headers["location"].count(PREFIX) == 1


def test_mounted_apps_are_found_below_the_prefix(framework: str) -> None:
    """What a user mounts gets the rest of the path, and the prefix in front of its own."""
    native = make_app(framework)
    if framework == "flask":

        def mounted(environ: Any, start_response: Any) -> list[bytes]:
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [f"{environ['SCRIPT_NAME']} {environ['PATH_INFO']}".encode()]

        native.wsgi_app = DispatcherMiddleware(native.wsgi_app, {"/mounted": mounted})
    else:
        inner = fastapi.FastAPI()

        @inner.get("/x")
        def show(request: fastapi.Request) -> fastapi.Response:
            root_path = request.scope["root_path"]
            return fastapi.Response(f"{root_path} {request.scope['path'].removeprefix(root_path)}")

        native.mount("/mounted", inner)
    for send in senders(native):
        for prefix in ("", PREFIX):
            assert send(Case("mounted", "GET", f"{prefix}/mounted/x")).body == f"{PREFIX}/mounted /x".encode()


def test_socket_is_found_below_the_prefix() -> None:
    """A WebSocket of a user's opens with the prefix and without it."""
    native = make_app("fastapi")

    @native.websocket("/talk")
    async def talk(socket: fastapi.WebSocket) -> None:
        await socket.accept()
        await socket.close()

    async def open_it(path: str) -> list[str]:
        sent: list[str] = []

        async def receive() -> dict[str, str]:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message["type"])

        await native({"type": "websocket", "path": path, "query_string": b"", "headers": []}, receive, send)
        return sent

    for path in ("/talk", f"{PREFIX}/talk"):
        assert asyncio.run(open_it(path)) == ["websocket.accept", "websocket.close"]


def test_prefix_leaves_the_shortcut(framework: str) -> None:
    """A prediction is answered in front of the router, with the prefix too."""
    native = make_app(framework)
    forbid_router(native)
    for case in (post_case(json.loads(FLOWER)), below(post_case(json.loads(FLOWER)))):
        assert call(native, case).json["prediction"] == "setosa"
    with pytest.raises(AssertionError, match="router"):
        call(native, below(Case("slow", "GET", "/openapi.json")))


def test_document_names_the_prefix(apps: dict[str, Any], plain: Any) -> None:
    """Clients that are made from it ask below the prefix; without one it names no server."""
    case = Case("document", "GET", "/openapi.json")
    for native in apps.values():
        for send in senders(native):
            document = send(below(case)).json
            assert document["servers"] == [{"url": PREFIX}]
            assert send(case).json == document
            validate(document)
    assert apps["fastapi"].openapi()["servers"] == [{"url": PREFIX}]
    assert "servers" not in call(plain, case).json


def test_prefix_of_the_server_counts_without_the_setting(plain: Any) -> None:
    """What a server says by its interface is in the document, and the setting wins over it."""
    case = Case("document", "GET", "/openapi.json")
    flask = app.create_app(make_settings(framework="flask"))
    by_scope = asyncio.run(call_asgi(plain, case, "/a b"))
    assert by_scope.json["servers"] == [{"url": "/a%20b"}]
    assert by_scope == call_wsgi(functools.partial(under, flask, "/a b"), case)
    assert asyncio.run(call_asgi(app.as_asgi(flask), case, "/a b")) == by_scope
    assert call_wsgi(functools.partial(under, app.as_wsgi(plain), "/a b"), case) == by_scope
    validate(by_scope.json)


def under(wsgi: Any, script_name: str, environ: Any, start_response: Any) -> Any:
    return wsgi({**environ, "SCRIPT_NAME": script_name}, start_response)


@pytest.mark.parametrize("given", [PREFIX, "/other", "/models", "/"])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_prefix_of_the_server_and_the_setting(apps: dict[str, Any], given: str, prefix: str) -> None:
    """A server that has a root path of its own, in front of which a proxy strips or not, finds the same."""
    case = Case("document", "GET", f"{prefix}/openapi.json")
    expected = call(apps["fastapi"], case)
    for native in apps.values():
        assert asyncio.run(call_asgi(app.as_asgi(native), case, given)) == expected
        assert call_wsgi(functools.partial(under, app.as_wsgi(native), given), case) == expected


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (f'[server]\nroot_path = "{path}"', f"server.root_path is '{path}'; it should begin with '/', not end with it")
        for path in (
            "models",
            "/models/",
            "/",
            "//models",
            "/a//b",
            "/a?b",
            "/a#b",
            "/a%20b",
            "/a/../b",
            "/.",
            "/\u00fc",
        )
    ]
    + [
        ('[server]\nroot_path = "/health"', "server.root_path is '/health', with which the service's own '/health/"),
        (
            '[server]\nroot_path = "/predictions"',
            "with which the service's own '/predictions' begins; use another path",
        ),
        (
            '[server]\nroot_path = "/api"\n[auth]\nopen_paths = ["/api/hello"]',
            "auth.open_paths has '/api/hello'; leave out '/api', which is server.root_path",
        ),
    ],
)
def test_prefix_is_checked(tmp_path: Path, tables: str, message: str) -> None:
    """One that no client's path has in front, or that a path of the service's begins with, is refused at the start."""
    file = tmp_path / "settings.toml"
    file.write_text(tables, encoding="utf-8")
    with pytest.raises(SettingsError) as refusal:
        app.load_settings(file)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def prefixed_servers(serve_module: Starter) -> dict[tuple[str, str], Server]:
    return serve_module.each(COMBINATIONS, SERVING_SERVER__ROOT_PATH=PREFIX)


def expect_all(server: Server, prefix: str) -> None:
    """Hold a server, or a proxy in front of one, to what a client below a prefix sees."""
    assert server.get(f"{prefix}/health/ready").status == 200
    assert server.send(below(post_case(json.loads(FLOWER)), prefix)).json["prediction"] == "setosa"
    assert server.get(f"{prefix}/openapi.json").json["servers"] == [{"url": PREFIX}]
    assert "did you mean '/predictions'?" in server.get(f"{prefix}/prediction").json["detail"]
    long = Case("long", "POST", f"{prefix}/predictions", JSON, b"[" + b",".join([FLOWER.encode()] * 2000) + b"]")
    assert len(server.send(long).json) == 2000


@each_combination()
def test_servers_answer_with_and_without(
    prefixed_servers: dict[tuple[str, str], Server], combination: tuple[str, str]
) -> None:
    """Behind either kind of proxy, and for a platform that asks for health without the prefix."""
    server = prefixed_servers[combination]
    for prefix in ("", PREFIX):
        expect_all(server, prefix)
    assert server.get(f"{PREFIX}2/ping").status == 404
    wait_until(lambda: any(line.get("path") == f"{PREFIX}2/ping" for line in server.lines), "the line")
    paths = {line["path"] for line in server.lines if line["event"] == "request"}
    assert paths >= {"/health/ready", "/predictions", "/openapi.json", "/prediction"}
    assert not [path for path in paths if path.startswith(f"{PREFIX}/")]


@each_combination()
def test_haproxy_strips_or_passes(
    prefixed_servers: dict[tuple[str, str], Server], serve: Starter, tmp_path: Path, combination: tuple[str, str]
) -> None:
    """HAProxy with the rule of the page, and without it, has all below the prefix."""
    strips, passes = find_free_port(), find_free_port()
    file = tmp_path / "haproxy.cfg"
    file.write_text(HAPROXY % (strips, passes, prefixed_servers[combination].port))
    proxy = serve(f"haproxy -db -f {file}", port=strips)
    expect_all(proxy, PREFIX)
    assert proxy.get(PREFIX).json == {"status": "alive"}
    proxy.port = passes
    expect_all(proxy, PREFIX)
    proxy.stop()


@pytest.mark.parametrize(
    ("command", "framework", "variables"),
    [
        (f"uvicorn app:app --port 0 --root-path {PREFIX}", "fastapi", {}),
        (f"uvicorn app:asgi --port 0 --root-path {PREFIX}", "flask", {}),
        (f"uvicorn app:app --port 0 --root-path {PREFIX}", "fastapi", {"SERVING_SERVER__ROOT_PATH": PREFIX}),
        ("flask --app app run --port 0", "flask", {"SERVING_SERVER__ROOT_PATH": PREFIX}),
    ],
)
def test_development_servers_know_the_prefix(
    serve: Starter, command: str, framework: str, variables: dict[str, str]
) -> None:
    """uvicorn's own option, which is for proxies that strip, does as the setting does; both together do too."""
    server = serve(command, SERVING_FRAMEWORK=framework, **variables)
    expect_all(server, "")
    if variables:
        expect_all(server, PREFIX)
    server.stop()


class PrefixedServer(Server):
    """A server that knows nothing but what is below the prefix."""

    def is_answering(self) -> bool:
        return self.get(f"{PREFIX}/ping").status == 200


@pytest.mark.in_turn
def test_variable_of_gunicorn_is_for_gevent(tmp_path: Path, quick_model: dict[str, str], framework: str) -> None:
    """Gunicorn's `SCRIPT_NAME` does as the setting does, with which it may stand, but refuses what has no prefix."""
    variables = {**quick_model, "SCRIPT_NAME": PREFIX, "SERVING_SERVER__ROOT_PATH": PREFIX}
    environment = gunicorn_environment(framework, "gevent", **variables)
    server = PrefixedServer(GUNICORN, tmp_path / "log", PROJECT, **environment)
    try:
        expect_all(server.wait(), PREFIX)
        assert server.get("/ping").status == 400
    finally:
        server.stop()

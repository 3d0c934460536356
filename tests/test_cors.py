"""CORS: which answers a page of another origin may read, held to the fetch standard by its words and by a browser."""

import asyncio
import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastapi
import pytest
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import StreamingResponse
from flask_cors import CORS
from selenium import webdriver
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import app
from serving.errors import SettingsError
from serving.web import cors
from serving.web.cors import EXPOSED
from tests.lib.apps import call, call_asgi, call_wsgi, forbid_router, make_settings
from tests.lib.cases import BAD, FLOWER, GOOD, JSON, Case, Fields
from tests.lib.clients import ROW, Answer, check
from tests.lib.servers import COMBINATIONS, Server, Starter, gunicorn_environment, gunicorn_with
from tests.lib.sizes import each_combination, each_worker

PAGE, STRANGER = "http://page.example", "http://stranger.example"
LISTED, ALL = [PAGE, "https://other.example:8443"], ["*"]
READABLE = {"access-control-allow-origin": PAGE, "access-control-expose-headers": ", ".join(EXPOSED), "vary": "Origin"}
MINE = """
import app

native = app.create_app()
if hasattr(native, "wsgi_app"):
    native.add_url_rule("/mine", "mine", lambda: ("mine", {"X-Request-ID": "own"}), methods=["PUT"])
else:
    import fastapi

    @native.put("/mine")
    def mine():
        return fastapi.Response("mine", headers={"X-Request-ID": "own"})
asgi, wsgi = app.as_asgi(native), app.as_wsgi(native)
"""
ASK = """
const [url, options, done] = arguments;
fetch(url, options)
  .then(async answer => done({
    status: answer.status,
    body: await answer.text(),
    headers: Object.fromEntries(answer.headers),
  }))
  .catch(error => done({refused: String(error)}));
"""


def make_app(framework: str, origins: list[str], **changes: Any) -> Any:
    return app.create_app(make_settings(framework=framework, server={"cors_origins": origins}, **changes))


def senders(native: Any) -> list[Any]:
    """Return what sends a case to an app by its own interface and by the other one."""

    def by_asgi(case: Case) -> Answer:
        return asyncio.run(call_asgi(app.as_asgi(native), case))

    return [by_asgi, functools.partial(call_wsgi, app.as_wsgi(native))]


def cors_of(answer: Answer) -> dict[str, str]:
    names = [name for name in answer.headers if name.startswith("access-control-") or name == "vary"]
    return {name: answer.headers[name] for name in names}


def preflight(path: str, origin: str = PAGE, method: str = "POST", headers: str = "content-type,x-api-key") -> Case:
    asked = (("Access-Control-Request-Method", method), ("Access-Control-Request-Headers", headers))
    return Case("preflight", "OPTIONS", path, (("Origin", origin), *(pair for pair in asked if pair[1])), status=204)


def with_origin(case: Case, origin: str) -> Case:
    return Case(**{**vars(case), "headers": (*case.headers, ("Origin", origin))})


@pytest.fixture(scope="module")
def apps() -> dict[str, Any]:
    return {name: make_app(name, LISTED) for name in app.FRAMEWORKS}


CASES = [case for case in GOOD + BAD if not {"Origin", "origin"} & {name for name, _ in case.headers}]


@pytest.mark.in_turn
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_answer_may_be_read(apps: dict[str, Any], framework: str, case: Case) -> None:
    """Good or bad, it has the same headers for a listed origin, and is otherwise what it is without one."""
    for send in senders(apps[framework]):
        answer = send(with_origin(case, PAGE))
        check(case, Answer(answer.status, without_cors(answer), answer.body))
        vary = {"vary": "Accept, Origin" if case.target == "/" else "Origin"}  # at `/` it differs by that too
        assert cors_of(answer) == READABLE | vary
        assert cors_of(send(with_origin(case, STRANGER))) == vary


def without_cors(answer: Answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in cors_of(answer)}


def test_refusals_may_be_read(framework: str) -> None:
    """So are those of who sends no key, too much, or too many rows; they say what a page needs to know."""
    limits = {"max_body_bytes": 1000, "max_rows": 1}
    native = make_app(framework, LISTED, auth={"api_keys": ["one"]}, limits=limits)
    native.put("/mine")(lambda: "mine")
    key = ("X-API-Key", "one")
    for send in senders(native):
        for status, path, fields, body in [
            (401, "/predictions", JSON, FLOWER),
            (401, "/mine", JSON, FLOWER),
            (404, "/nope", (*JSON, key), FLOWER),
            (405, "/predictions", (*JSON, key), FLOWER),
            (413, "/predictions", (*JSON, key), FLOWER + " " * 1000),
            (413, "/predictions", (*JSON, key), f"[{FLOWER}, {FLOWER}]"),
        ]:
            method = "PUT" if status == 405 or path == "/mine" else "POST"
            answer = send(Case("refused", method, path, (*fields, ("Origin", PAGE)), body.encode()))
            assert (answer.status, cors_of(answer)) == (status, READABLE), path


@pytest.mark.parametrize("path", ["/predictions", "/ping", "/openapi.json", "/mine", "/mounted/x", "/nope"])
def test_preflight_gets_leave(framework: str, path: str) -> None:
    """It needs no key, whatever the path, and nothing that a user has added is asked."""
    native = make_app(framework, LISTED, auth={"api_keys": ["one"]})
    asked: list[str] = []
    if framework == "flask":
        native.post("/mine", endpoint="mine")(lambda: "mine")
        native.before_request(lambda: asked.append("hook"))
        native.wsgi_app = DispatcherMiddleware(native.wsgi_app, {"/mounted": lambda *args: asked.append("mounted")})
    else:
        native.post("/mine")(lambda: "mine")
        native.mount("/mounted", lambda *args: asked.append("mounted"))

        @native.middleware("http")
        async def see(request: Any, call_next: Any) -> Any:
            asked.append("hook")
            return await call_next(request)

    methods = {"/predictions": "GET, HEAD, POST, OPTIONS", "/ping": "GET, HEAD, OPTIONS"}
    methods["/openapi.json"] = methods["/ping"]
    for send in senders(native):
        asked.clear()
        answer = send(preflight(path))
        assert (answer.status, answer.body, asked) == (204, b"", [])
        assert answer.headers.get("allow") == methods.get(path)
        assert cors_of(answer) == READABLE | {
            "access-control-allow-methods": methods.get(path, "POST"),
            "access-control-allow-headers": "content-type,x-api-key",
            "access-control-max-age": "7200",
        }
        stranger = send(preflight(path, STRANGER))
        assert "access-control-allow-origin" not in stranger.headers
        assert stranger.headers["vary"] == "Origin"


@pytest.mark.parametrize(
    ("method", "headers", "leave"),
    [
        ("PUT", "", {"access-control-allow-methods": "PUT"}),
        (
            "PATCH",
            "Authorization , traceparent",
            {"access-control-allow-methods": "PATCH", "access-control-allow-headers": "Authorization , traceparent"},
        ),
        ("P T", "a b", {}),
        ("PUT", "a;b", {"access-control-allow-methods": "PUT"}),
        ("PUT", ",".join(["a"] * 101), {"access-control-allow-methods": "PUT"}),
        ("PUT", "a" * 101, {"access-control-allow-methods": "PUT"}),
    ],
)
def test_preflight_repeats_names_only(
    apps: dict[str, Any], framework: str, method: str, headers: str, leave: dict[str, str]
) -> None:
    """What it asks for is in the answer if it is a list of names, of a length that a page may have."""
    for send in senders(apps[framework]):
        answer = send(preflight("/other", method=method, headers=headers))
        assert answer.status == 204
        assert cors_of(answer) == READABLE | {"access-control-max-age": "7200"} | leave


def test_options_that_is_no_preflight_is_as_ever(apps: dict[str, Any], framework: str) -> None:
    """Without the method that a browser asks about it is OPTIONS, which does not know every path."""
    for send in senders(apps[framework]):
        known = send(Case("options", "OPTIONS", "/ping", (("Origin", PAGE),)))
        assert (known.status, cors_of(known)) == (204, READABLE)
        assert send(Case("options", "OPTIONS", "/nope", (("Origin", PAGE),))).status == 404
        assert send(Case("options", "OPTIONS", "*", (("Origin", PAGE),))).status == 204


@pytest.mark.parametrize("origin", [PAGE, STRANGER, "null"])
def test_star_is_every_origin(framework: str, origin: str) -> None:
    """The answer is the same for all of them, so caches need not know; who is no page gets it as it is."""
    native = make_app(framework, ALL)
    for send in senders(native):
        answer = send(with_origin(Case("ping", "GET", "/ping"), origin))
        assert cors_of(answer) == {name: value for name, value in READABLE.items() if name != "vary"} | {
            "access-control-allow-origin": "*"
        }
        assert send(preflight("/predictions", origin)).headers["access-control-allow-methods"]
        assert cors_of(send(Case("ping", "GET", "/ping"))) == {}


@pytest.mark.parametrize(
    "origin",
    [f"{PAGE}/", f"{PAGE}:80", PAGE.upper(), "null", f"{PAGE}, {PAGE}", f"{PAGE}.more", "https" + PAGE[4:]],
)
def test_origin_is_compared_letter_by_letter(apps: dict[str, Any], framework: str, origin: str) -> None:
    """What is only like a listed origin gets no leave."""
    for send in senders(apps[framework]):
        assert cors_of(send(with_origin(Case("ping", "GET", "/ping"), origin))) == {"vary": "Origin"}


def test_without_origins_nothing_is_said(framework: str) -> None:
    """The default is the service as it was, of which no page may read anything."""
    native = make_app(framework, [])
    for send in senders(native):
        assert cors_of(send(with_origin(Case("ping", "GET", "/ping"), PAGE))) == {}
        assert cors_of(send(preflight("/predictions"))) == {}


def add_routes(native: Any, framework: str) -> None:
    """Add routes that say something of their own in headers of CORS, or nothing, or fail, or answer in pieces."""
    if framework == "flask":
        import flask

        def answer(body: Any, **headers: str) -> Any:
            return flask.Response(body, headers={name.replace("_", "-"): value for name, value in headers.items()})

        for name, view in {
            "own": lambda: answer("x", Access_Control_Allow_Origin="http://own.example", Vary="Accept"),
            "vary": lambda: answer("x", Vary="Accept"),
            "star": lambda: answer("x", Vary="*"),
            "pieces": lambda: answer(iter(["x", "y"])),
            "fails": lambda: [][0],
        }.items():
            native.add_url_rule(f"/{name}", name, view)
        return

    def fail() -> None:
        raise IndexError

    own = {"Access-Control-Allow-Origin": "http://own.example", "Vary": "Accept"}
    native.get("/own")(lambda: fastapi.Response("x", headers=own))
    native.get("/vary")(lambda: fastapi.Response("x", headers={"Vary": "Accept"}))
    native.get("/star")(lambda: fastapi.Response("x", headers={"Vary": "*"}))
    native.get("/pieces")(lambda: StreamingResponse(iter(["x", "y"])))
    native.get("/fails")(fail)


def test_routes_of_a_user_may_be_read(framework: str) -> None:
    """Their answers, errors and streams have the headers, but for those that say something of their own."""
    native = make_app(framework, LISTED)
    add_routes(native, framework)
    sends = senders(native)
    if framework == "fastapi":
        del sends[0]  # which would raise what a server is to log
    for send in sends:
        own = send(with_origin(Case("own", "GET", "/own"), PAGE))
        assert cors_of(own) == {"access-control-allow-origin": "http://own.example", "vary": "Accept"}
        for path, status, vary in [
            ("/vary", 200, "Accept, Origin"),
            ("/star", 200, "*"),
            ("/pieces", 200, "Origin"),
            ("/fails", 500, "Origin"),
        ]:
            answer = send(with_origin(Case("mine", "GET", path), PAGE))
            assert (answer.status, cors_of(answer)) == (status, READABLE | {"vary": vary}), path


@pytest.mark.parametrize("theirs", [PAGE, STRANGER, "*"])
def test_middleware_beside_it_doubles_nothing(framework: str, theirs: str) -> None:
    """Where a user has CORS of another kind too, each answer has one leave: of its origin, or of all."""
    native = make_app(framework, LISTED)
    if framework == "flask":
        CORS(native, origins=[theirs] if theirs != "*" else "*")
        native.get("/mine", endpoint="mine")(lambda: "mine")
    else:
        native.add_middleware(CORSMiddleware, allow_origins=[theirs], allow_methods=["*"], allow_headers=["*"])
        native.get("/mine")(lambda: "mine")
    for send in senders(native):
        for case in (Case("one", "POST", "/predictions", JSON, FLOWER.encode()), Case("mine", "GET", "/mine")):
            for origin in (PAGE, STRANGER):
                answer = cors_of(send(with_origin(case, origin)))
                is_allowed = origin == PAGE or theirs in (origin, "*")
                assert answer.get("access-control-allow-origin") in ((origin, "*") if is_allowed else (None,))
                assert " and " not in "".join(answer.values())


def test_cors_leaves_the_shortcut(framework: str) -> None:
    """A prediction and a preflight are answered in front of the router."""
    native = make_app(framework, LISTED)
    forbid_router(native)
    prediction = Case("one", "POST", "/predictions", (*JSON, ("Origin", PAGE)), FLOWER.encode())
    assert call(native, prediction).json["prediction"] == "setosa"
    assert call(native, preflight("/mine")).status == 204
    with pytest.raises(AssertionError, match="router"):
        call(native, Case("slow", "GET", "/openapi.json"))


def test_cors_and_a_prefix_go_together(framework: str) -> None:
    """A page asks below the prefix, and leave is for the path as the service knows it."""
    native = app.create_app(
        make_settings(framework=framework, server={"cors_origins": LISTED, "root_path": "/models/iris"})
    )
    for send in senders(native):
        for prefix in ("", "/models/iris"):
            leave = send(preflight(f"{prefix}/predictions"))
            assert leave.headers["access-control-allow-methods"] == "GET, HEAD, POST, OPTIONS"
            assert cors_of(send(with_origin(Case("nope", "GET", f"{prefix}/nope"), PAGE))) == READABLE


@pytest.mark.parametrize(
    "origin",
    [
        "page.example",
        "http://page.example/",
        "http://page.example/path",
        "http://Page.example",
        "http://page.example:80",
        "https://page.example:443",
        "http://page.example:0",
        "http://page.example:65536",
        "http://*.example",
        "http://",
        "http://page example",
        "null",
        "",
    ],
)
def test_origins_are_checked(tmp_path: Path, origin: str) -> None:
    """One that no browser would send is refused at the start, in one line."""
    file = tmp_path / "settings.toml"
    file.write_text(f"[server]\ncors_origins = {json.dumps([PAGE, origin])}\n")
    with pytest.raises(SettingsError) as refusal:
        app.load_settings(file)
    assert f"server.cors_origins is {origin!r}; it should be 'scheme://host' or" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("origins", "message"),
    [
        (["*", PAGE], "it should have '*' alone, or not at all"),
        ([PAGE, PAGE], "it should have each value once"),
        (PAGE, "it should be a list"),
    ],
)
def test_list_of_origins_is_checked(tmp_path: Path, origins: Any, message: str) -> None:
    """Every origin and some of them is not both meant."""
    file = tmp_path / "settings.toml"
    file.write_text(f"[server]\ncors_origins = {json.dumps(origins)}\n")
    with pytest.raises(SettingsError) as refusal:
        app.load_settings(file)
    assert "server.cors_origins is" in str(refusal.value)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "origin",
    ["http://localhost:3000", "https://xn--bcher-kva.example", "http://[::1]:8080", "app://local", "http://10.0.0.1"],
)
def test_origins_that_browsers_send_are_taken(tmp_path: Path, origin: str) -> None:
    """Names, addresses and schemes of programs may be listed."""
    file = tmp_path / "settings.toml"
    file.write_text(f"[server]\ncors_origins = {json.dumps([origin])}\n")
    assert app.load_settings(file).server.cors_origins == [origin]
    assert cors.CORS.of([]) is None


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    """The port of a web site with an empty page, which is not the service's."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>page</title>")

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def cors_servers(
    serve_module: Starter, site: int, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Server]:
    """The four combinations with a route of a user's, a key, and the site by its address as the only origin."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text(MINE)
    variables = {
        "PYTHONPATH": str(folder),
        "SERVING_SERVER__CORS_ORIGINS": json.dumps([f"http://127.0.0.1:{site}"]),
        "SERVING_AUTH__API_KEYS": '["one"]',
    }
    return {
        pair: serve_module(gunicorn_with("mine", pair[1]), **gunicorn_environment(*pair, **variables))
        for pair in COMBINATIONS
    }


@each_combination()
def test_servers_answer_pages(
    cors_servers: dict[tuple[str, str], Server], site: int, combination: tuple[str, str]
) -> None:
    """Over sockets too, for each kind of answer that there is: ours, a user's, and a refusal that ends a connection."""
    server, origin = cors_servers[combination], f"http://127.0.0.1:{site}"
    fields: Fields = (*JSON, ("Origin", origin), ("X-API-Key", "one"))
    readable = READABLE | {"access-control-allow-origin": origin}
    for case in (
        Case("good", "POST", "/predictions", fields, FLOWER.encode()),
        Case("bad", "POST", "/predictions", fields, b"{", 400),
        Case("nobody", "POST", "/predictions", fields[:2], FLOWER.encode(), 401),
        Case("nowhere", "GET", "/nope", fields, status=404),
        Case("document", "GET", "/openapi.json", fields),
        Case("mine", "PUT", "/mine", fields, FLOWER.encode()),
        Case("mine-of-nobody", "PUT", "/mine", fields[:2], FLOWER.encode(), 401),
    ):
        answer = server.send(case)
        assert (answer.status, cors_of(answer)) == (case.status, readable), case.id
        assert cors_of(server.send(with_origin(Case(**{**vars(case), "headers": JSON}), STRANGER))) == {
            "vary": "Origin"
        }
    for path in ("/predictions", "/mine", "/nope"):
        answer = server.send(preflight(path, origin))
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (204, origin)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """Debian's Chromium, without a window."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@each_worker()
def test_browser_lets_a_listed_page_ask(
    cors_servers: dict[tuple[str, str], Server], site: int, browser: webdriver.Chrome, combination: tuple[str, str]
) -> None:
    """A page of the list sends JSON with a key and reads body and headers, of good answers and of errors."""
    browser.get(f"http://127.0.0.1:{site}/")
    url, key = f"http://127.0.0.1:{cors_servers[combination].port}", {"X-API-Key": "one"}
    json_too = {"Content-Type": "application/json", **key, "X-Request-ID": "of-the-page"}

    def ask(path: str, method: str, headers: dict[str, str], body: Any = ROW) -> dict[str, Any]:
        options = {"method": method, "headers": headers, **({} if method == "GET" else {"body": json.dumps(body)})}
        answer: dict[str, Any] = browser.execute_async_script(ASK, url + path, options)
        return answer

    good = ask("/predictions", "POST", json_too)
    assert json.loads(good["body"])["prediction"] == "setosa"
    assert good["headers"]["x-request-id"] == "of-the-page"
    bad = ask("/predictions", "POST", json_too, {})
    assert (bad["status"], len(json.loads(bad["body"])["detail"])) == (422, 4)
    closed = ask("/predictions", "POST", {"Content-Type": "application/json", "Authorization": "Bearer two"})
    assert (closed["status"], closed["headers"]["www-authenticate"]) == (401, "Bearer")
    assert ask("/nope", "GET", key)["status"] == 404
    mine = ask("/mine", "PUT", json_too)
    assert (mine["body"], mine["headers"]["x-request-id"]) == ("mine", "own")
    assert "Failed to fetch" in ask("/predictions", "DELETE", json_too)["refused"]


@each_worker()
def test_browser_keeps_answers_from_other_pages(
    cors_servers: dict[tuple[str, str], Server], site: int, browser: webdriver.Chrome, combination: tuple[str, str]
) -> None:
    """The same site by another name is another origin: it may neither send JSON nor read anything."""
    browser.get(f"http://localhost:{site}/")
    url = f"http://127.0.0.1:{cors_servers[combination].port}"
    asked = {"method": "POST", "headers": {"Content-Type": "application/json"}, "body": json.dumps(ROW)}
    for path, options in [("/predictions", asked), ("/ping", {})]:
        assert "Failed to fetch" in browser.execute_async_script(ASK, url + path, options)["refused"]

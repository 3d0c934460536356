"""The page on which one tries the service, without a browser: who gets it, with which headers, and what `/` answers."""

import http.client
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import app
from serving.errors import SettingsError, StartupError
from serving.web import documentation
from serving.web.documentation import FILES
from tests.lib.apps import call, make_settings
from tests.lib.cases import Case
from tests.lib.servers import COMBINATIONS, Server, Starter

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
PATHS = ["/docs", *(f"/docs/{name}" for name in FILES)]
KEY = {"SERVING_AUTH__API_KEYS": '["one"]'}


def ask(server: Server, target: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Send a request, and return status, body, and all headers but those that tell of server and moment."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=server.patience_s)
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, target, headers={"X-Request-ID": "ask", **fields})
    answer = connection.getresponse()
    kept, body = {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    for name in ("date", "server", "connection"):
        kept.pop(name, None)
    return answer.status, kept, body


def ask_all(servers: dict[tuple[str, str], Server], *arguments: Any, **headers: str) -> Any:
    """Send a request to all combinations, and return the answer, which is the same of all."""
    first, *others = [ask(servers[pair], *arguments, **headers) for pair in COMBINATIONS]
    assert others == [first] * 3
    return first


class Linked(HTMLParser):
    """What a page asks for, and what stands inline in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.inline: list[str] = []
        self.open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open = tag
        self.urls += [value or "" for name, value in attributes if name in ("href", "src")]
        self.inline += [name for name, _ in attributes if name == "style" or name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if self.open in ("script", "style") and data.strip():
            self.inline.append(data)


def test_page_is_the_same_everywhere(servers: dict[tuple[str, str], Server]) -> None:
    """All combinations give the page and each of its files, with the same headers, to GET and to HEAD."""
    for path in PATHS:
        status, headers, body = ask_all(servers, path)
        assert (status, int(headers["content-length"])) == (200, len(body))
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-request-id"] == "ask"
        assert ask_all(servers, path, "HEAD") == (200, headers, b"")


def test_page_has_nothing_inline_or_from_outside(servers: dict[tuple[str, str], Server]) -> None:
    """Its files are its own, by relative URLs that are answered, and its policy allows no others."""
    _, headers, body = ask_all(servers, "/docs")
    page = Linked(body.decode())
    assert page.inline == []
    assert {*page.urls} == {"openapi.json", *(f"docs/{name}" for name in FILES)}
    assert headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy.pop("img-src") == "'self' data:"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert {*policy.values()} == {"'self'", "'none'"}


def test_files_have_their_types(servers: dict[tuple[str, str], Server]) -> None:
    """A browser that may not guess takes each file for what it is."""
    types = {name: ask_all(servers, f"/docs/{name}")[1]["content-type"] for name in FILES}
    assert types["swagger-ui.css"] == "text/css; charset=utf-8"
    assert types["init.js"] == types["swagger-ui-bundle.js"] == "text/javascript; charset=utf-8"
    assert types["favicon-32x32.png"] == "image/png"


@pytest.mark.parametrize("path", PATHS)
def test_files_are_sent_once(servers: dict[tuple[str, str], Server], path: str) -> None:
    """A client asks each time, for a new version has the same URL, and gets no body if it has the same already."""
    _, headers, _ = ask_all(servers, path)
    tag = headers["etag"]
    assert headers["cache-control"] == "no-cache"
    for known in (tag, f'"other", W/{tag}', "*"):
        status, kept, body = ask_all(servers, path, If_None_Match=known)
        assert (status, body, kept["etag"]) == (304, b"", tag)
        assert "content-type" not in kept
    for unknown in ('"other"', tag.strip('"'), ""):
        assert ask_all(servers, path, If_None_Match=unknown)[0] == 200


def test_other_paths_below_are_unknown(servers: dict[tuple[str, str], Server]) -> None:
    """No other file is to be had, and errors keep their shape."""
    for path in ("/docs/", "/docs/swagger-ui.js", "/docs/index.html", "/docs/../settings.toml", "/docs/%2e%2e/app.py"):
        status, headers, body = ask_all(servers, path)
        assert (status, headers["content-type"]) == (404, "application/json")
        assert b"did you mean '/docs'?" in body or b"use one of" in body
    status, headers, _ = ask_all(servers, "/docs/init.js", "POST", Content_Length="0")
    assert (status, headers["allow"]) == (405, "GET, HEAD, OPTIONS")
    status, headers, _ = ask_all(servers, "/docs", "OPTIONS")
    assert (status, headers["allow"]) == (204, "GET, HEAD, OPTIONS")


@pytest.mark.parametrize("accept", [BROWSER, "text/html", "TEXT/HTML ; level=1", "text/*", "a/b;q=x, text/html;q=0.1"])
def test_browser_is_sent_to_the_page(servers: dict[tuple[str, str], Server], accept: str) -> None:
    """Whoever would rather have HTML is redirected from `/`, by a relative URL, which is right below a prefix too."""
    for method in ("GET", "HEAD"):
        status, headers, body = ask_all(servers, "/", method, Accept=accept)
        assert (status, headers["location"], headers["vary"], body) == (307, "docs", "Accept", b"")


@pytest.mark.parametrize(
    "accept",
    [
        "*/*",
        "",
        "application/json",
        "application/json, text/html",
        "text/html;q=0.5, */*",
        "text/html;q=0",
        "text/html;q=0, a/b",
    ],
)
def test_others_are_not_sent_there(servers: dict[tuple[str, str], Server], accept: str) -> None:
    """A client that has no preference for HTML learns that the service is alive; other methods are not allowed."""
    status, headers, body = ask_all(servers, "/", Accept=accept)
    assert (status, headers["vary"], body) == (200, "Accept", b'{"status":"alive"}')
    unknown = ask_all(servers, "/none")[2]
    status, headers, body = ask_all(servers, "//", Accept=BROWSER)
    assert (status, headers["content-type"]) == (404, "application/json")
    assert body.replace(b"'//'", b"'/none'") == unknown
    for method, expected in [("POST", 405), ("OPTIONS", 204)]:
        status, headers, _ = ask_all(servers, "/", method, Accept=BROWSER, Content_Length="0")
        assert (status, headers["allow"]) == (expected, "GET, HEAD, OPTIONS")


@pytest.fixture(scope="module")
def closed_servers(serve_module: Starter) -> dict[tuple[str, str], Server]:
    """The four combinations with a key."""
    return serve_module.each(COMBINATIONS, **KEY)


def test_page_is_as_open_as_the_document(closed_servers: dict[tuple[str, str], Server]) -> None:
    """Where there are keys each of its files needs one, unless `auth.open_docs` says otherwise."""
    for path in ("/openapi.json", *PATHS):
        status, headers, body = ask_all(closed_servers, path)
        assert (status, headers["content-type"]) == (401, "application/json")
        assert b"no valid API key" in body
        assert ask_all(closed_servers, path, X_API_Key="one")[0] == 200
    assert ask_all(closed_servers, "/", Accept=BROWSER)[0] == 307


def test_requests_for_the_page_are_logged(closed_servers: dict[tuple[str, str], Server]) -> None:
    """The access log has a line for each, as for any request."""
    for server in closed_servers.values():
        ask(server, "/", Accept=BROWSER, X_Request_ID="to-page")
        ask(server, "/docs", X_API_Key="one", X_Request_ID="page")
        ask(server, "/docs/init.js", X_API_Key="one", X_Request_ID="file")
        ids = {"to-page", "page", "file"}
        lines = [line for line in server.lines if line["event"] == "request" and line["request_id"] in ids]
        logged = {line["request_id"]: (line["path"], line["status"]) for line in lines}
        assert logged == {"to-page": ("/", 307), "page": ("/docs", 200), "file": ("/docs/init.js", 200)}


def test_page_can_be_open(framework: str) -> None:
    """With `auth.open_docs` page and files need no key, but predictions do, as the document says."""
    native = app.create_app(make_settings(framework=framework, auth={"api_keys": ["one"], "open_docs": True}))
    for path in ("/openapi.json", *PATHS):
        assert call(native, Case("open", "GET", path)).status == 200
    document = call(native, Case("open", "GET", "/openapi.json")).json
    assert "401" not in document["paths"]["/docs"]["get"]["responses"]
    assert call(native, Case("closed", "GET", "/predictions")).status == 401


def test_page_can_be_switched_off(framework: str) -> None:
    """Without it nothing of it is there, for browsers too; the document is."""
    native = app.create_app(make_settings(framework=framework, docs={"enabled": False}))
    for path in PATHS:
        answer = call(native, Case("off", "GET", path, (("Accept", BROWSER),)))
        assert (answer.status, "detail" in answer.json) == (404, True)
    assert call(native, Case("off", "GET", "/", (("Accept", BROWSER),))).json == {"status": "alive"}
    assert "/docs" not in call(native, Case("document", "GET", "/openapi.json")).json["paths"]


def test_name_of_the_model_is_the_title(framework: str) -> None:
    """Who has several services open tells their pages apart."""
    native = app.create_app(make_settings(framework=framework, model={"name": "penguins"}))
    assert b"<title>penguins</title>" in call(native, Case("page", "GET", "/docs")).body


def test_root_of_a_user_goes_first(framework: str) -> None:
    """A route for `/` that a user has added answers browsers and others, and may be open beside keys."""
    native: Any = app.create_app(make_settings(framework=framework, auth={"api_keys": ["one"], "open_paths": ["/"]}))
    native.get("/")(lambda: "mine")
    for accept in (BROWSER, "*/*"):
        answer = call(native, Case("root", "GET", "/", (("Accept", accept),)))
        assert (answer.status, answer.body.strip(b'"')) == (200, b"mine")


def test_root_of_a_user_may_need_a_key(framework: str) -> None:
    """A route for `/` that is not listed as open is refused without a key, and never redirected."""
    native: Any = app.create_app(make_settings(framework=framework, auth={"api_keys": ["one"]}))
    native.get("/")(lambda: "mine")
    assert call(native, Case("root", "GET", "/", (("Accept", BROWSER),))).status == 401


def test_own_paths_cannot_be_opened_by_path(file: Path) -> None:
    """The page among the paths of a user's ends the start, with the setting that opens it."""
    file.write_text(file.read_text() + '\n[auth]\napi_keys = ["one"]\nopen_paths = ["/docs"]\n')
    with pytest.raises(SettingsError, match=re.escape("has '/docs', which is the service's own; set auth.open_docs")):
        app.load_settings(file)


def test_missing_files_end_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the start says what to do, and without the page it is not needed."""
    settings, without = make_settings(), make_settings(docs={"enabled": False})
    monkeypatch.setattr(documentation, "PACKAGE", "flask_swagger_ui_that_is_missing")
    with pytest.raises(StartupError, match=r"docs.enabled needs flask-swagger-ui; pip install -r requirements.txt"):
        app.create_app(settings)
    assert call(app.create_app(without), Case("document", "GET", "/openapi.json")).status == 200

"""The page on which one tries the service, in a real browser: what a person clicks and types, and what is sent."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver

from serving.web.documentation import FILES
from tests.lib.artifacts import save, variables
from tests.lib.browser import Page, open_browser
from tests.lib.clients import ROW
from tests.lib.pages import rounded
from tests.lib.pipelines import fitted
from tests.lib.servers import COMBINATIONS, Server, Starter
from tests.lib.sizes import TWINS, each_worker, scale

KEYS = {"SERVING_AUTH__API_KEYS": '["one"]', "SERVING_AUTH__OPEN_DOCS": "true"}
PREFIX = "/models/iris"
BELOW = {"SERVING_SERVER__ROOT_PATH": PREFIX}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def page_servers(serve_module: Starter, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Servers of iris, open to all and with a key, and of penguins."""
    model = save(fitted("boosting")[0], tmp_path_factory.mktemp("penguins") / "penguins.joblib")
    kinds = {"open": {}, "keys": KEYS, "penguins": variables(model) | {"SERVING_FEATURES": "{}"}, "below": BELOW}
    pairs = scale(TWINS, COMBINATIONS)
    return {kind: serve_module.each(pairs, **environment) for kind, environment in kinds.items()}


@pytest.fixture(scope="module")
def browser(page_servers: dict[str, Any]) -> Iterator[webdriver.Chrome]:
    with open_browser() as driver:
        yield driver


def url_of(server: Server, path: str = "/docs") -> str:
    return f"http://127.0.0.1:{server.port}{path}"


def check_quiet(page: Page, server: Server, *paths: str, prefix: str = "") -> None:
    """Hold a page to its host: it has asked for these paths, beside them for its own files, and not complained."""
    asked = [urlsplit(url) for url in page.asked_for()]
    assert {url.netloc for url in asked} == {f"127.0.0.1:{server.port}"}
    own = {f"{prefix}{path}" for path in ("/docs", "/openapi.json", *(f"/docs/{name}" for name in FILES))}
    # A file may be in the browser's cache.
    assert {f"{prefix}/docs", *paths} <= {url.path for url in asked} <= own | {*paths}
    assert page.complaints() == []


@each_worker()
def test_prediction_is_made_by_clicking(
    page_servers: dict[str, Any], browser: webdriver.Chrome, tmp_path: Path, combination: tuple[str, str]
) -> None:
    """A browser that opens `/` gets the page, where one click predicts a row, and two a batch."""
    server = page_servers["open"][combination]
    page = Page(browser, url_of(server, "/"))
    assert (browser.current_url, browser.title) == (url_of(server), "iris")
    operation, expected = page.open("predict_body"), server.post(ROW).json
    assert page.execute(operation) == (200, expected)
    picture = tmp_path / "docs-page.png"
    assert browser.save_screenshot(str(picture))
    assert picture.read_bytes().startswith(PNG)
    page.clear(operation)
    page.choose(operation, "A batch of rows")
    status, answers = page.execute(operation)
    assert (status, rounded(answers)) == (200, [rounded(expected)] * 2)
    check_quiet(page, server, "/", "/predictions")


@each_worker()
def test_query_is_filled_in(
    page_servers: dict[str, Any], browser: webdriver.Chrome, combination: tuple[str, str]
) -> None:
    """One click predicts a row as query parameters, and health and the document are to be had in the same way."""
    server = page_servers["open"][combination]
    page = Page(browser, url_of(server))
    assert page.execute(page.open("predict_query")) == (200, server.post(ROW).json)
    assert page.execute(page.open("ping")) == (200, {"status": "live"})
    check_quiet(page, server, "/predictions", "/ping")


@each_worker()
def test_strings_and_missing_values_are_filled_in(
    page_servers: dict[str, Any], browser: webdriver.Chrome, combination: tuple[str, str]
) -> None:
    """A model with choices and what may be missing is predicted at the first click too, by body and by query."""
    server = page_servers["penguins"][combination]
    page = Page(browser, url_of(server))
    for name in ("predict_body", "predict_query"):
        status, answer = page.execute(page.open(name))
        assert (status, [*answer]) == (200, ["prediction", "probabilities"])
    check_quiet(page, server, "/predictions")


@each_worker()
@pytest.mark.parametrize("field", ["auth-bearer-value", "api_key_value"])
def test_key_is_typed_in(
    page_servers: dict[str, Any], browser: webdriver.Chrome, combination: tuple[str, str], field: str
) -> None:
    """With keys the page is open if the operator says so, and predicts once a key was typed, in either field."""
    server = page_servers["keys"][combination]
    refused = server.post(ROW)
    assert refused.status == 401
    page = Page(browser, url_of(server, "/"))
    operation = page.open("predict_body")
    assert page.execute(operation) == (401, refused.json)
    (complaint,) = page.complaints()
    assert "the server responded with a status of 401" in complaint
    page.clear(operation)
    page.authorize(field, "one")
    assert page.execute(operation) == (200, server.post(ROW, X_API_Key="one").json)
    check_quiet(page, server, "/", "/predictions")


@each_worker()
@pytest.mark.parametrize("entry", [PREFIX, f"{PREFIX}/"])
def test_page_works_below_a_prefix(
    page_servers: dict[str, Any], browser: webdriver.Chrome, combination: tuple[str, str], entry: str
) -> None:
    """All that the page asks for is below the path at which a proxy offers the service, predictions too."""
    server = page_servers["below"][combination]
    page = Page(browser, url_of(server, entry))
    assert browser.current_url == url_of(server, f"{PREFIX}/docs")
    assert page.execute(page.open("predict_body")) == (200, server.post(ROW).json)
    check_quiet(page, server, entry, f"{PREFIX}/predictions", prefix=PREFIX)

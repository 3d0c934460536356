"""Debian's chromium, driven as a person would: by what is seen, clicked and typed."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

WAIT_S = 60.0
OPTIONS = [
    "--headless=new",
    "--no-sandbox",  # which root cannot have
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--window-size=1000,1850",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


@contextlib.contextmanager
def open_browser() -> Iterator[webdriver.Chrome]:
    """Open a browser that knows no host but this one, and keeps what pages ask for and complain of."""
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    for option in OPTIONS:
        options.add_argument(option)
    driver = webdriver.Chrome(options, Service(program("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def program(name: str) -> str:
    """Return the path of a program that has to be installed."""
    path = shutil.which(name)
    assert path, f"no {name}; apt-get install chromium chromium-driver"
    return path


class Page:
    """A page of Swagger UI in a browser."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        for kind in ("performance", "browser"):
            self._take_log(kind)  # that of pages before
        driver.get(url)
        self.wait_for(".opblock")

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Poll until a condition holds, and return what it returned."""
        return WebDriverWait(self.driver, WAIT_S, 0.05).until(lambda _: condition())

    def wait_for(self, selector: str, inside: WebElement | None = None) -> WebElement:
        """Wait for something to be seen, and return it."""
        within = inside or self.driver
        shown: list[WebElement] = self.wait(
            lambda: [found for found in within.find_elements(By.CSS_SELECTOR, selector) if found.is_displayed()]
        )
        return shown[0]

    def open(self, name: str) -> WebElement:
        """Unfold an operation, and return it."""
        operation = self.driver.find_element(By.ID, f"operations-default-{name}")
        self.wait_for(".opblock-summary-control", operation).click()
        return operation

    def choose(self, operation: WebElement, example: str) -> None:
        """Choose one of the examples of a body."""
        Select(self.wait_for("select.examples-select-element", operation)).select_by_visible_text(example)

    def execute(self, operation: WebElement) -> tuple[int, Any]:
        """Press "Execute" of an operation that was not executed before, and return the status and what is shown."""
        self.wait_for(".execute", operation).click()
        table = self.wait_for(".live-responses-table", operation)
        status = self.wait_for("tbody .response-col_status", table).text.split()[0]
        body = self.wait_for(".highlight-code code", table).get_attribute("textContent")
        return int(status), json.loads(body or "")

    def clear(self, operation: WebElement) -> None:
        """Take the answer of an operation away."""
        self.wait_for(".btn-clear", operation).click()
        self.wait(lambda: not operation.find_elements(By.CSS_SELECTOR, ".live-responses-table"))

    def authorize(self, field: str, key: str) -> None:
        """Type a key into a field of "Authorize"."""
        self.wait_for(".auth-wrapper .btn.authorize").click()
        container: WebElement = self.wait_for(f".auth-container:has(#{field})")
        self.wait_for(f"#{field}", container).send_keys(key)
        self.wait_for(".btn.authorize", container).click()
        self.wait_for(".btn-done").click()

    def asked_for(self) -> list[str]:
        """Return the URL of each request since the page was opened, unless the URL itself is the data."""
        messages = [json.loads(line["message"])["message"] for line in self._take_log("performance")]
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent if urlsplit(one["request"]["url"]).scheme != "data"]

    def complaints(self) -> list[str]:
        """Return what the console has got since it was last looked at."""
        return [line["message"] for line in self._take_log("browser")]

    def _take_log(self, kind: str) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = self.driver.get_log(kind)  # type: ignore[no-untyped-call]
        return lines

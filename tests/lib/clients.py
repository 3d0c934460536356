"""What a client sends to a server, and what it gets."""

import http.client
import json
import re
import socket
from dataclasses import dataclass
from typing import Any

from tests.lib.cases import Case

ROW = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}
COMPARED = {"content-type", "content-length", "allow", "www-authenticate", "x-request-id", "location", "vary"}
MADE_ID = re.compile(r"^[0-9a-f]{32}$")


@dataclass(frozen=True)
class Answer:
    """What came back, reduced to what must be the same everywhere."""

    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def of(cls, status: int, headers: Any, body: bytes) -> "Answer":
        kept: dict[str, str] = {}
        for name, value in [(name.lower(), MADE_ID.sub("made", value)) for name, value in headers]:
            if name in COMPARED or name.startswith("access-control-"):
                kept[name] = f"{kept[name]} and {value}" if name in kept else value  # one that is there twice shows
        closes = any(name.lower() == "connection" and value == "close" for name, value in headers)
        body = re.sub(rb'(?<="settings_sha256":")[0-9a-f]{64}', b"0" * 64, body)  # which names the framework too
        return cls(status, kept | ({"connection": "close"} if closes else {}), body)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def post_case(payload: Any, **headers: str) -> Case:
    fields = {"Content-Type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
    return Case("post", "POST", "/predictions", tuple(fields.items()), json.dumps(payload).encode(), 200)


def read_answer(client: socket.socket, method: str = "GET") -> Answer:
    response = http.client.HTTPResponse(client, method=method)
    response.begin()
    return Answer.of(response.status, response.getheaders(), response.read())


def check(case: Case, answer: Answer) -> None:
    """Hold an answer to its case."""
    assert answer.status == case.status
    if case.status == 204:
        assert answer.headers.keys() <= {"allow", "x-request-id", "connection"}
        assert answer.headers["allow"] == case.says
        assert answer.body == b""
        return
    assert answer.headers["content-type"] == "application/json"
    if case.method != "HEAD":
        assert int(answer.headers["content-length"]) == len(answer.body)
        assert case.says in answer.body.decode()
        assert (case.status == 200) != ("detail" in answer.json if isinstance(answer.json, dict) else False)

"""A row of the table from which routes, answers and the OpenAPI document are made."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from serving.errors import ServingError, UnsupportedMediaType, listed, shorten
from serving.web.encodings import ENCODINGS, WINDOW_BITS, encoding_of
from serving.web.messages import JSON, JSONL, Request, Response, write_detail

if TYPE_CHECKING:
    from serving.web.service import AuthSettings, Service

JSON_BASED = re.compile(r"application/[^/\s]+\+json")  # RFC 6839, section 3.1
LINES = {JSONL, "application/jsonlines", "application/x-jsonlines", "application/x-ndjson", "application/ndjson"}
UTF_8 = {"utf-8", "utf8", "us-ascii", "ascii", ""}  # names of it, and of a part of it
Endpoint = Callable[["Service[Any]", Request], Awaitable[Response]]


def is_lines(request: Request) -> bool:
    """Return whether a body is in JSON lines."""
    given = request.header("content-type")
    return given is not None and given != JSON and given.partition(";")[0].strip().lower() in LINES


@dataclass(frozen=True, eq=False)
class Operation:
    """A row of the table from which routes, answers and the OpenAPI document are made.

    A body may have one of `media_types`; without media types it takes none.
    `write_error` writes its errors, and those of unknown paths below `scope`. One that is `only_for` some requests gets
    them where no route of a user's does, and is not there for others.
    """

    method: str
    path: str
    name: str
    summary: str
    endpoint: Endpoint
    media_types: Sequence[str] = ()
    stream: Endpoint | None = None  # what answers JSON lines, and reads the body itself
    takes_query: bool = False  # one row, given as query parameters
    answer_schema: str = "Status"  # of JSON
    answer_media_type: str = JSON
    request_content: Callable[[Service[Any]], Mapping[str, Any]] | None = None  # in OpenAPI, where not rows in JSON
    answer_content: Callable[[Service[Any]], Mapping[str, Any]] | None = None
    error_content: Mapping[str, Any] = field(default_factory=dict)  # where `write_error` is not the usual one
    errors: Sequence[int] = ()
    access: Literal["key", "docs", "open"] = "key"  # "docs": as `auth.open_docs` says
    is_hot: bool = False  # answered in front of the framework's router, unless the user has added something
    write_error: Callable[[ServingError], Response] = write_detail
    scope: str | None = None
    is_described: bool = True  # in the OpenAPI document, and in the hints of a 404
    only_for: Callable[[Request], bool] | None = None

    def needs_key(self, auth: AuthSettings) -> bool:
        """Return whether it answers only to an API key."""
        is_closed = self.access == "key" or (self.access == "docs" and not auth.open_docs)
        return is_closed and bool(auth.api_keys)

    def streams(self, request: Request) -> bool:
        """Return whether it takes a body as a stream."""
        return self.stream is not None and is_lines(request)

    def check_media_type(self, request: Request) -> None:
        """Raise `UnsupportedMediaType` for a body that it does not take."""
        encoding = request.header("content-encoding")
        if encoding is not None and encoding_of(encoding) not in ENCODINGS:
            problem = f"Content-Encoding is {shorten(encoding)!r}"
            rule = f"use one of {listed([*WINDOW_BITS])}, or send the body as it is"
            raise UnsupportedMediaType(f"{problem}; {rule}")
        given = request.header("content-type")
        if given in self.media_types or not given:  # nobody else's type is meant where none is sent
            return
        media_type, *parameters = given.lower().split(";")
        media_type = JSONL if media_type.strip() in LINES else media_type
        is_json = JSON in self.media_types and JSON_BASED.fullmatch(media_type.strip())
        allowed = " or ".join(map(repr, self.media_types))
        if media_type.strip() not in self.media_types and not is_json:
            raise UnsupportedMediaType(f"Content-Type is {shorten(given)!r}; use {allowed}")
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "charset" and value.strip(" \t\"'") not in UTF_8:
                raise UnsupportedMediaType(f"Content-Type has {shorten(parameter.strip())!r}; send {allowed} in UTF-8")

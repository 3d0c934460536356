"""Which headers let a page of another origin read an answer, and ask in the first place (CORS).

A browser decides by them, as https://fetch.spec.whatwg.org/#http-cors-protocol says. Cookies are not used here: a key
goes into a header, so no answer allows credentials.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from serving.server import EVERY_ORIGIN
from serving.web.messages import Request

# What a page may read besides what it always may: https://fetch.spec.whatwg.org/#cors-safelisted-response-header-name
EXPOSED = (
    "X-Request-ID",
    "Retry-After",
    "WWW-Authenticate",
    "Allow",
    "Inference-Header-Content-Length",
    "Server-Timing",
)
MAX_AGE_S = 7200  # seconds for which a browser need not ask again; the most that Chromium takes
NAME = r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}"  # RFC 9110, section 5.6.2
NAMES = re.compile(rf"{NAME}(?:[ \t]*,[ \t]*{NAME}){{0,99}}")
Fields = Mapping[str, str]


class CORS:
    """The origins whose pages may read answers, or every one by `*`."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._is_for_all = EVERY_ORIGIN in origins
        # An answer that differs by origin says so to all, or a cache would give one's to another:
        # https://fetch.spec.whatwg.org/#cors-protocol-and-http-caches
        self._others: Fields = {"Vary": "Origin"}
        self._allowed: dict[str, Fields] = {
            origin: {
                **({} if self._is_for_all else self._others),
                "Access-Control-Allow-Origin": origin,
                "Access-Control-Expose-Headers": ", ".join(EXPOSED),
            }
            for origin in origins
        }

    @classmethod
    def of(cls, origins: Sequence[str]) -> CORS | None:
        """Return what the settings ask for, which is nothing where they name no origin."""
        return cls(origins) if origins else None

    def fields(self, request: Request) -> Fields:
        """Return the header fields that the answer to a request gets."""
        origin = request.header("origin")
        if origin is not None and self._is_for_all:
            origin = EVERY_ORIGIN
        if origin not in self._allowed:
            return {} if self._is_for_all else self._others
        return self._allowed[origin]

    def is_preflight(self, request: Request) -> bool:
        """Return whether a browser asks for leave, on behalf of a page that may have it."""
        if request.method != "OPTIONS" or not request.header("access-control-request-method"):
            return False
        return "Access-Control-Allow-Origin" in self.fields(request)

    def leave(self, request: Request, methods: str | None) -> Fields:
        """Return the header fields of the answer to a preflight: the methods, or else the one that was asked for, and
        the headers that were asked for. What is no name is not repeated."""
        asked_method = request.header("access-control-request-method") or ""
        asked_headers = request.header("access-control-request-headers") or ""
        leave = {
            "Access-Control-Allow-Methods": methods or asked_method,
            "Access-Control-Allow-Headers": asked_headers,
        }
        sane = {name: value for name, value in leave.items() if NAMES.fullmatch(value)}
        return sane | {"Access-Control-Max-Age": str(MAX_AGE_S)}

    def add_to(self, given: Iterable[tuple[str, str]], request: Request) -> list[tuple[str, str]]:
        """Return the header fields of an answer with those that it gets, unless it has its own."""
        given = [*given]
        if any(name.lower() == "access-control-allow-origin" for name, _ in given):
            return given
        more = dict(self.fields(request))
        vary = ", ".join(value for name, value in given if name.lower() == "vary")
        if vary and "Vary" in more:
            names = {name.strip().lower() for name in vary.split(",")}
            more["Vary"] = vary if names & {"*", "origin"} else f"{vary}, {more['Vary']}"
            given = [pair for pair in given if pair[0].lower() != "vary"]
        return [*given, *more.items()]

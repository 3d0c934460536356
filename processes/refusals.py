"""Answers to bytes that are no acceptable HTTP request, in the shape of every other error, and the limits of one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import structlog
from gunicorn.http import message

from serving.web.messages import Response, make_request_id

log = structlog.get_logger()


class HeadLimits(NamedTuple):
    """The most that the head of a request may have."""

    line: int  # bytes of the request line
    fields: int
    field_size: int  # bytes of a field

    @classmethod
    def of(cls, cfg: Any) -> HeadLimits:
        """Return gunicorn's limits as its own parser takes them, `gunicorn.http.message`: 0 stands for a large one."""
        line, fields, field_size = cfg.limit_request_line, cfg.limit_request_fields, cfg.limit_request_field_size
        return cls(
            min(line, message.MAX_REQUEST_LINE) or MAX_LINE_BYTES,
            min(fields, message.MAX_HEADERS) or message.MAX_HEADERS,
            field_size or message.DEFAULT_MAX_HEADERFIELD_SIZE,
        )


MAX_LINE_BYTES = 1_048_576  # bytes of a request line without a limit
JUDGED = {"host", "content-type", "transfer-encoding", "expect"}  # the fields that `judge_head` asks for
ABSOLUTE = re.compile(r"[A-Za-z]+://(?:\[[0-9A-Fa-f:.]+\]|[^\[\]@:/?#]+)(?::[0-9]{0,5})?(?=[/?#]|$)")


def judge_head(method: str, target: str, version: str, fields: Sequence[tuple[str, str]]) -> int | None:
    """Return the status with which a head is refused that one of the workers' parsers would take, or None.

    `fields` are those of `JUDGED`, by lower-case names.
    """
    names = [name for name, _ in fields]
    is_known = version == "1.0" or (version == "1.1" and "host" in names)  # RFC 9112, section 3.2
    if not is_known or names.count("host") > 1 or names.count("content-type") > 1:
        return 400
    if method == "CONNECT" or (target == "*" and method != "OPTIONS") or origin_form(method, target) is None:
        return 400
    encodings = [value for name, value in fields if name == "transfer-encoding"]
    codings = [coding.strip(" \t").lower() for coding in ",".join(encodings).split(",")] if encodings else []
    if codings and (version == "1.0" or codings[-1] != "chunked" or codings.count("chunked") > 1):
        return 400  # nobody knows where such a body ends (RFC 9112, section 6)
    if len(codings) > 1:
        return 501
    return 417 if any(name == "expect" and value.lower() != "100-continue" for name, value in fields) else None


def origin_form(method: str, target: str) -> str | None:
    """Return a target as clients of an origin send it, `/path?query`, or None where there is none.

    A proxy's client sends it with a scheme and a host in front (RFC 9112, section 3.2), and perhaps no path.
    """
    if target.startswith("/") or target == "*":
        return target
    match = ABSOLUTE.match(target)
    if match is None:
        return None
    rest = target[match.end() :]
    if rest.startswith("/"):
        return rest
    return "*" if method == "OPTIONS" and not rest else f"/{rest}"


def refuse(status: int, cfg: Any) -> bytes:
    """Return the whole answer with a status, as HTTP/1.1 has it. `cfg` has gunicorn's limits."""
    limits = HeadLimits.of(cfg)
    details = {
        400: "not a valid HTTP/1.1 request",
        414: f"the request line is too long; send at most {limits.line} bytes",
        417: "no such expectation can be met; send 'Expect: 100-continue', or none",
        431: f"the header is too large; send at most {limits.fields} fields of {limits.field_size} bytes",
        500: "internal error",
        501: "Transfer-Encoding has a coding that is not understood; use 'chunked', or none",
    }
    request_id = make_request_id()
    log.warning("request_refused", status=status, request_id=request_id)
    response = Response.of({"detail": details[status]}, status, {"Connection": "close"})
    response.request_id = request_id
    head = [f"HTTP/1.1 {response.status_line}", *map(": ".join, response.headers)]
    return "\r\n".join([*head, "", ""]).encode() + b"".join(response.pieces)

"""Answers to bytes that are no acceptable HTTP request, in the shape of every other error, and the limits of one."""

from __future__ import annotations

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


def refuse(status: int, cfg: Any) -> bytes:
    """Return the whole answer with a status, as HTTP/1.1 has it. `cfg` has gunicorn's limits."""
    limits = HeadLimits.of(cfg)
    details = {
        400: "not a valid HTTP/1.1 request",
        414: f"the request line is too long; send at most {limits.line} bytes",
        431: f"the header is too large; send at most {limits.fields} fields of {limits.field_size} bytes",
        500: "internal error",
    }
    request_id = make_request_id()
    log.warning("request_refused", status=status, request_id=request_id)
    response = Response.of({"detail": details[status]}, status, {"Connection": "close"})
    response.request_id = request_id
    head = [f"HTTP/1.1 {response.status_line}", *map(": ".join, response.headers)]
    return "\r\n".join([*head, "", ""]).encode() + b"".join(response.pieces)

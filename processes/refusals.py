"""Answers to bytes that are no HTTP request which is taken, in the shape of every other error."""

from __future__ import annotations

from typing import Any

import structlog

from serving.web.messages import Response, make_request_id

log = structlog.get_logger()


def refuse(status: int, cfg: Any) -> bytes:
    """Return the whole answer with a status, as HTTP/1.1 has it. `cfg` has gunicorn's limits."""
    fields, field_bytes = cfg.limit_request_fields, cfg.limit_request_field_size
    details = {
        400: "not a valid HTTP/1.1 request",
        414: f"the request line is too long; send at most {cfg.limit_request_line} bytes",
        431: f"the header is too large; send at most {fields} fields of {field_bytes} bytes",
        500: "internal error",
    }
    request_id = make_request_id()
    log.warning("request_refused", status=status, request_id=request_id)
    response = Response.of({"detail": details[status]}, status, {"Connection": "close"})
    response.request_id = request_id
    head = [f"HTTP/1.1 {response.status_line}", *map(": ".join, response.headers)]
    return "\r\n".join([*head, "", ""]).encode() + b"".join(response.pieces)

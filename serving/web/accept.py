"""Which of two media types a client would rather have (RFC 9110, section 12.5.1)."""

from __future__ import annotations

import re

from serving.web.messages import Request

WEIGHT = re.compile(r"q=([01](?:\.[0-9]{0,3})?)")  # RFC 9110, section 12.4.2


def prefers(request: Request, media_type: str, other: str) -> bool:
    """Return whether a client weighs one media type more than the other one."""
    weights: dict[str, float] = {}
    for offer in (request.header("accept") or "").lower().split(","):
        name, *parameters = (part.strip() for part in offer.split(";"))
        weight = next((match for text in parameters if (match := WEIGHT.fullmatch(text))), None)
        weights[name] = float(weight[1]) if weight else 1.0
    return _weight_of(media_type, weights) > _weight_of(other, weights)


def _weight_of(media_type: str, weights: dict[str, float]) -> float:
    ranges = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
    return next((weights[name] for name in ranges if name in weights), 0.0)

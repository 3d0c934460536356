"""The log as a person reads it: a short line for each event, with local time, level and event first."""

from __future__ import annotations

import functools
import os
import re
import sys
import time
from collections.abc import MutableMapping
from typing import Any

LONG_HEX = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{24,}\b")  # hashes, and ids that are made here
PLAIN = re.compile(r"[^\s\"'=]+")  # a value that needs no quotes
STYLES = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}  # of ECMA-48, by level


def has_colours() -> bool:
    """Return whether standard error shows colours (https://no-color.org)."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def add_local_time(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    seconds, ns = divmod(time.time_ns(), 1_000_000_000)
    event["timestamp"] = f"{_write_second(seconds)}.{ns // 1_000_000:03d}"
    return event


@functools.lru_cache(maxsize=1)
def _write_second(seconds: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


class ConsoleRenderer:
    """Write an event as a line, and its traceback below it. No control character of a value reaches the terminal."""

    def __init__(self, has_colours: bool) -> None:
        self.has_colours = has_colours

    def __call__(self, _: Any, __: str, event: MutableMapping[str, Any]) -> str:
        moment, level, name = (str(event.pop(key, "")) for key in ("timestamp", "level", "event"))
        below = [str(event.pop(key, None) or "") for key in ("exception", "stack")]
        event["pid"] = event.pop("pid", None)  # last, as what is read least
        values = "".join(f" {key}={_show(value)}" for key, value in event.items() if value is not None)
        first = [self._style("2", moment), self._style(STYLES.get(level, ""), f"{level:7}"), self._style("1", name)]
        lines = [f"{' '.join(first)}{values}", *(line for text in below for line in text.splitlines())]
        return "\n".join([lines[0], *map(_escape, lines[1:])])

    def _style(self, style: str, text: str) -> str:
        text = _escape(text)
        return f"\x1b[{style}m{text}\x1b[0m" if self.has_colours else text


def _show(value: Any) -> str:
    """Return a value as a word: hashes cut short, and what has blanks in quotes."""
    if isinstance(value, dict):
        return "{" + " ".join(f"{key}={_show(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return ",".join(map(_show, value))
    text = LONG_HEX.sub(r"\1…", str(value))
    return text if PLAIN.fullmatch(text) and text.isprintable() else repr(text)


def _escape(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode()

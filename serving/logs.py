"""Logging: every event of the process, of ours and of the servers, is one line on standard error."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from typing import Annotated, Any, ClassVar, Literal

import structlog
from pydantic import BeforeValidator
from pydantic_core import to_json

from serving.console import ConsoleRenderer, add_local_time, has_colours
from serving.output import LossyOutput
from serving.settings import OtherNames, SettingsTable

REQUEST_ID: contextvars.ContextVar[str] = contextvars.ContextVar("request_id")
ANSI_STYLE = re.compile(r"\x1b\[[0-9;]*m")
VALUE = re.compile(r"'[^']*'|\"[^\"]*\"|[+-]?\.?\d[\w.+-]*")  # what may be a feature's in the text of a warning
SERVER_LOGGERS = ("gunicorn.error", "uvicorn", "uvicorn.error", "uvicorn.asgi", "werkzeug", "py.warnings")
UVICORNS_ROUTINE = re.compile("(Started|Finished) server process|(Waiting for a|A)pplication|Shutting down")
SERVER_ACCESS_LOGGERS = ("gunicorn.access", "uvicorn.access")


LEVELS = {"warn": "warning", "fatal": "critical"}  # Python's other words


def _find_level(word: Any) -> Any:
    return LEVELS.get(word.lower(), word) if isinstance(word, str) else word


class LoggingSettings(SettingsTable):
    other_names: ClassVar[OtherNames] = {
        "level": ("log_level", "loglevel"),
        "format": ("log_format",),
        "access": ("access_log", "accesslog"),
    }

    level: Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_find_level)] = "info"
    format: Literal["auto", "json", "console"] = "auto"
    access: bool = True


class LineLogger:
    """What structlog hands its lines to. It has no lock, at which a signal's handler that logs would wait for ever."""

    def __init__(self, stream: Any) -> None:
        output = getattr(stream, "buffer", None)
        self._write: Callable[[str], Any] = stream.write
        if isinstance(output, LossyOutput):  # past the text stream, which costs as much as the write does
            self._write = lambda text: output.write(text.encode(errors="backslashreplace"))

    def msg(self, line: str) -> None:
        self._write(line + "\n")

    debug = info = warning = error = critical = msg


def configure_logging(settings: LoggingSettings) -> None:
    """Send every event of the process, ours, the servers' and Python's warnings, to stderr as one line each."""
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    console = settings.format == "console" or (settings.format == "auto" and sys.stderr.isatty())
    renderer = ConsoleRenderer(has_colours()) if console else structlog.processors.JSONRenderer(_write_event)
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        _add_process_and_request,
        add_local_time if console else _add_time,
    ]
    rendering = [structlog.processors.format_exc_info, renderer]
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: LineLogger(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared, _fold_event],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    logging.captureWarnings(True)  # which keeps libraries from doing it later
    warnings.showwarning = _log_warning
    logging.root.handlers = [handler]
    logging.root.setLevel(level)
    for name in SERVER_LOGGERS:
        _take_over(name, [handler]).setLevel(level)
    logging.getLogger("uvicorn.error").filters = [_lower_routine]
    for name in SERVER_ACCESS_LOGGERS:
        _take_over(name, [])
    logging.getLogger("werkzeug").filters = [_is_no_access_line]


_logged: set[tuple[type[Warning], str, int]] = set()  # kinds of warnings that this process has logged

os.register_at_fork(after_in_child=_logged.clear)

_hides_values = False  # a warning may come from a call, and have a feature's value in its text


@contextlib.contextmanager
def telling_versions() -> Iterator[None]:
    """Keep numbers and quoted words in the texts of warnings while a model is loaded, and in none after that.

    By then a call may be made, and warn from whatever thread it starts.
    """
    global _hides_values
    _hides_values = False
    try:
        yield
    finally:
        _hides_values = True


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Log the first warning of each category and source line, and the others at the level debug.

    Python's own memory of warnings is emptied by each `catch_warnings`, which libraries use in every call.
    """
    kind = category, filename, lineno
    level = logging.DEBUG if kind in _logged else logging.WARNING
    _logged.add(kind)
    logger = logging.getLogger("py.warnings")
    if logger.isEnabledFor(level):
        text = VALUE.sub("…", str(message)) if _hides_values else str(message)
        logger.log(level, "%s", warnings.formatwarning(text, category, filename, lineno, line))


def _write_event(event: MutableMapping[str, Any], **_: Any) -> str:
    """Write an event as JSON, which in ASCII is safe on every terminal; pydantic does it in a quarter of the time."""
    with contextlib.suppress(ValueError):  # of text that is no Unicode, or bytes that are no text
        text = to_json(event, fallback=repr).decode()
        if text.isascii():
            return text
    return json.dumps(event, default=repr, separators=(",", ":"))


def _is_no_access_line(record: logging.LogRecord) -> bool:
    return record.levelno != logging.INFO or " - - [" not in str(record.msg)


def _lower_routine(record: logging.LogRecord) -> bool:
    """Make what uvicorn says of each start and end of a process a line for `debug`: ours are shorter."""
    if record.levelno == logging.INFO and UVICORNS_ROUTINE.match(str(record.msg)):
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return record.levelno >= logging.root.level


def _take_over(name: str, handlers: list[logging.Handler]) -> logging.Logger:
    """Replace a logger's handlers. Without any it is silent: access lines are `AccessLog`'s alone."""
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = handlers, False
    return logger


_get_pid = functools.cache(os.getpid)  # a system call less each

os.register_at_fork(after_in_child=_get_pid.cache_clear)


def _add_process_and_request(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["pid"] = _get_pid()
    request_id = REQUEST_ID.get(None)
    if request_id is not None:
        event["request_id"] = request_id
    return event


def _add_time(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add the time, as structlog's own processor does in ten times the time."""
    seconds, ns = divmod(time.time_ns(), 1_000_000_000)
    event["timestamp"] = f"{_write_second(seconds)}.{ns // 1000:06d}Z"
    return event


@functools.lru_cache(maxsize=1)
def _write_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _fold_event(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Put a message that brings its own lines and colours (werkzeug, warnings) on one plain line."""
    event["event"] = " ".join(ANSI_STYLE.sub("", str(event["event"])).split())
    return event

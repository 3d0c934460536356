"""Errors: those of the operator, which end the start with one line, and those of a request, which are its answer.

StartupError          a mistake found before the service listens
  SettingsError       the settings file or a variable of the environment is wrong
    MisfitError       settings do not fit the model
  ModelError          the artifact is missing, cannot be loaded, or is not a fitted predictor
    EstimatorError    the estimator raised what only it can explain
ServingError          an answer other than success, with its HTTP status
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import itertools
import math
import operator
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

Key = tuple[str, ...]  # of a setting, such as ("server", "workers")
MAX_NAME = 100  # characters of the longest name that gets a suggestion: comparing takes time by their square
MAX_NAMES = 200  # right names that are looked through for a suggestion
LIKELY_NAMES = 5  # right names that are compared letter by letter
MAX_LISTED = 20  # values that a message lists
MAX_SHOWN = 200  # characters of a text that a message shows
MAX_DIGITS = 200  # digits of an integer that a message shows
MAX_ITEMS = 6  # items of an array or an object that a message shows
MAX_DEPTH = 3  # levels of arrays and objects that a message shows
CUT = "…"  # mark in place of what is left out
STARTUP_STATUS = 4


class StartupError(Exception):
    """A mistake of the operator's, found before the service listens; its text is the whole message."""


class SettingsError(StartupError):
    """The settings file or a `SERVING_…` variable is wrong."""


class MisfitError(SettingsError):
    """Settings do not fit the model: a problem for each key. `Settings.locate` puts the place of each in front."""

    def __init__(self, *problems: tuple[Key, str]) -> None:
        super().__init__("\n".join(f"{'.'.join(key)} {problem}" for key, problem in problems))
        self.problems = problems


class ModelError(StartupError):
    """The artifact is missing, cannot be loaded, or is not a fitted predictor. Its text begins with a verb."""


class EstimatorError(ModelError):
    """The estimator raised what only it can explain."""


@contextlib.contextmanager
def exit_on_startup_error() -> Iterator[None]:
    """End the process with the message alone: an operator's mistake is not worth a traceback.

    Its status is gunicorn's "app failed to load", on which its master stops instead of starting worker after worker;
    3, uvicorn's, would make Flask's reloader start over without end.
    """
    try:
        yield
    except StartupError as error:
        print_error(error)
        sys.exit(STARTUP_STATUS)


def print_error(error: StartupError) -> None:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)


@contextlib.contextmanager
def errors_about(subject: str) -> Iterator[None]:
    """Put a subject, which names the artifact, in front of each `ModelError`, whose text begins with its verb."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{subject} {error}") from error.__cause__


def reason_of(error: BaseException) -> str:
    """Return an error of others in one line."""
    return f"{type(error).__name__}: {error}".strip(": \n").splitlines()[0]


class ServingError(Exception):
    """An answer other than success. `detail` is what the client reads, so it holds no internals."""

    status: ClassVar[int] = 500
    lingers: bool = False  # the client may still be sending

    def __init__(self, detail: Any, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = dict(headers or {})


class BadRequest(ServingError):
    status = 400


class BodyCutShort(BadRequest):
    """The connection gave fewer bytes than it announced, or its chunks are malformed: the connection ends here."""

    def __init__(self) -> None:
        super().__init__("the body ended early or its chunks are malformed; send all of it", {"Connection": "close"})


class BodyTooSlow(ServingError):
    """The body did not come in time, and may never: the connection ends here."""

    status = 408

    def __init__(self) -> None:
        super().__init__("the body took too long; send it faster, or in smaller requests", {"Connection": "close"})


class Unauthorized(ServingError):
    """The key is missing or wrong. No body is read for it, so a connection on which one was announced ends here."""

    status = 401

    def __init__(self, detail: str, lingers: bool) -> None:
        super().__init__(detail, {"WWW-Authenticate": "Bearer"} | ({"Connection": "close"} if lingers else {}))
        self.lingers = lingers


class NotFound(ServingError):
    status = 404


class MethodNotAllowed(ServingError):
    status = 405


class ContentTooLarge(ServingError):
    status = 413


class BodyTooLarge(ContentTooLarge):
    """The body is longer than the limit, and the rest of it may be on its way: the connection ends here."""

    lingers = True

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(f"{what}; send at most {limit} bytes", {"Connection": "close"})


class UnsupportedMediaType(ServingError):
    status = 415


class ClientLeft(ServingError):
    """Nobody reads the answer. The status is nginx's, for the log."""

    status = 499

    def __init__(self) -> None:
        super().__init__("the client has left", {"Connection": "close"})


class InternalError(ServingError):
    """Something failed that is not the client's; the log says what."""


class TryAgain(ServingError):
    """There is too much to do; `Retry-After` says when there will be less."""

    def __init__(self, detail: str, wait_s: float) -> None:
        seconds = max(1, math.ceil(wait_s))
        super().__init__(f"{detail}; try again in {seconds} s", {"Retry-After": str(seconds)})


class TooManyRequests(TryAgain):
    status = 429


class Unavailable(TryAgain):
    status = 503


class Unprocessable(ServingError):
    """Well-formed input that the contract refuses; `detail` lists `{type, loc, msg, input}`, one for each bad cell."""

    status = 422


def nearest(name: Any, names: Iterable[Any]) -> str:
    """Return what `name` should have been: the one name close to it, or else the first of all `names`."""
    names = list(names)
    texts = [text for text in names[:MAX_NAMES] if isinstance(text, str)]
    comparable = isinstance(name, str) and len(name) <= MAX_NAME
    close = difflib.get_close_matches(name, _likely(name, texts), n=1) if comparable else []
    return f"did you mean {close[0]!r}?" if close else f"use one of {listed(names)}"


def _likely(name: str, texts: list[str]) -> list[str]:
    """Return the few texts that share most pairs of letters with a name.

    To count these takes a small part of the time of a comparison, which grows with the square of a name's length.
    """
    pairs = _letter_pairs(name)
    others = {text: _letter_pairs(text) for text in texts}
    shares = {text: len(pairs & theirs) / (1 + len(pairs) + len(theirs)) for text, theirs in others.items()}
    return sorted(shares, key=shares.__getitem__, reverse=True)[:LIKELY_NAMES]


def _letter_pairs(text: str) -> set[str]:
    text = text[: 3 * MAX_NAME]  # a longer one is like no name that is compared
    return {*map(operator.add, text, text[1:])}


def listed(values: Sequence[Any]) -> str:
    """List values for a message; of many only the first."""
    first = ", ".join(repr(shorten(value)) for value in values[:MAX_LISTED])
    return f"{first} and {len(values) - MAX_LISTED} more" if len(values) > MAX_LISTED else first


def shorten(value: Any, length: int = MAX_SHOWN, depth: int = MAX_DEPTH) -> Any:
    """Return a value from outside as a message shows it, in JSON's types: a small one as it is.

    A text longer than `length`, or a longer integer as a text, keeps its ends; an array or an object keeps its first
    items, in which texts have half the length, down to a depth.
    """
    if isinstance(value, int) and value.bit_length() > MAX_DIGITS * math.log2(10):
        value = str(value) if value.bit_length() < 14_000 else hex(value)  # Python writes 4300 digits at most
    if isinstance(value, str) and len(value) > length:
        return value[: length - length // 4] + CUT + value[len(value) - length // 4 + 1 :]
    if not isinstance(value, list | dict) or not value:
        return value
    if depth == 0:
        return CUT
    inner = functools.partial(shorten, length=length // 2, depth=depth - 1)
    if isinstance(value, list):
        return [*map(inner, value[:MAX_ITEMS]), *([CUT] if len(value) > MAX_ITEMS else [])]
    first = {inner(name): inner(item) for name, item in itertools.islice(value.items(), MAX_ITEMS)}
    return first | ({CUT: CUT} if len(value) > MAX_ITEMS else {})

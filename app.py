"""Serve one scikit-learn predictor over HTTP, through Flask or FastAPI, as `settings.toml` says.

The path of a request, the same under both frameworks:

1. the framework's route hands it to the binding, which makes a `Request` of it;
2. `Service.respond` gives it an id, reads its body up to the limit and finds its `Operation`;
3. the operation's endpoint turns bytes into rows by the `Contract`;
4. a batcher puts the rows of requests that wait at the same moment together, and the `Predictor` answers them;
5. the `Response` goes back through the binding, byte for byte the same under each.

Run it with `gunicorn -c gunicorn.conf.py`, or while developing with `flask --app app run --debug` or
`uvicorn app:app --reload`; `python app.py` prints the settings in force. `app:app` is the framework's own object,
`app:asgi` and `app:wsgi` are the same service behind either interface.

Sections: errors, settings, logging, inputs, contract, predictor, ONNX, artifact, golden rows, batcher, endpoints,
OpenAPI, service, Flask, FastAPI, bridges, factory.
"""

from __future__ import annotations

import asyncio
import atexit
import collections
import concurrent.futures
import contextlib
import contextvars
import copy
import difflib
import errno
import functools
import gc
import hashlib
import hmac
import importlib
import io
import itertools
import json
import logging
import math
import operator
import os
import pickle
import queue as queues
import random
import re
import select
import socket
import stat
import string
import sys
import threading
import time
import tomllib
import urllib.parse
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NotRequired,
    Protocol,
    Self,
    TypeVar,
    cast,
    get_args,
    get_origin,
)

import jiter
import joblib
import numpy as np
import sklearn.utils
import structlog
import threadpoolctl  # type: ignore[import-untyped]
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    NonNegativeInt,
    PositiveInt,
    PrivateAttr,
    SecretStr,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, to_json
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import NotFittedError
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.validation import check_is_fitted
from typing_extensions import TypedDict

if TYPE_CHECKING:
    import fastapi
    import flask

T = TypeVar("T")
Key = tuple[str, ...]  # of a setting, such as ("server", "workers")
Sources = dict[Key, str]  # what gives the value of a setting
PROJECT = Path(__file__).resolve().parent
log = structlog.get_logger()
Array = np.ndarray[Any, Any]
MAX_NAME = 100  # characters up to which a name is compared with the right ones, which takes their product's time
MAX_NAMES = 200  # names with which it is compared
LIKELY_NAMES = 5  # of these the ones with which it is compared letter by letter
MAX_LISTED = 20  # values that a message lists
MAX_SHOWN = 200  # characters of a text that a message shows
MAX_DIGITS = 200  # of an integer
MAX_ITEMS = 6  # of an array or an object
MAX_DEPTH = 3  # of arrays and objects inside each other
CUT = "…"  # stands for what is left out


def nearest(name: Any, names: Iterable[Any]) -> str:
    """Say what `name` should have been: the one name close to it, or else all of `names`, if they are not many."""
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


# Errors ---------------------------------------------------------------------------------------------------------------


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
    """The artifact is missing, cannot be loaded, or is not a fitted predictor. `about` puts its name in front."""


class EstimatorError(ModelError):
    """The estimator raised what only it can explain."""


@contextlib.contextmanager
def about(artifact: str) -> Iterator[None]:
    """Put the name of an artifact in front of what is wrong with it."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{artifact} {error}") from error.__cause__


def reason_of(error: BaseException) -> str:
    """Say in one line what others raised."""
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


# Settings -------------------------------------------------------------------------------------------------------------


class SettingsTable(BaseModel):
    """A table of the settings file. Its owner declares the keys, their types and their defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    is_secret: ClassVar[bool] = False  # its values stay out of messages


ADDRESS = re.compile(r"(?:[\w.-]*|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})|unix:[^\x00-\x1f]+|fd://[0-9]+", re.ASCII)
FEATURE_TYPES: dict[str, Any] = {"float": float, "int": int, "bool": bool, "str": str}
LIMITS: dict[str, float] = {  # of a feature, by its type
    "float": float(np.finfo(np.float32).max),  # trees compute in float32
    "int": 2**53,  # up to here every integer is a float64 of its own
}


def _check_address(address: str) -> str:
    match = ADDRESS.fullmatch(address)
    if match is None or int(match[1] or 0) > 65_535:
        raise ValueError("an address should be 'host:port', 'unix:path' or 'fd://number'")
    return address


def _check_key(key: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[^\s\ud800-\udfff]+", key.get_secret_value()):
        raise ValueError("a key should be text without white space")
    return key


def _check_hash(text: str) -> str:
    if not re.fullmatch(r"([0-9a-fA-F]{64})?", text):
        raise ValueError("a hash should be 64 hexadecimal digits, or empty")
    return text


def _check_each_once(values: list[T]) -> list[T]:
    if len(set(values)) < len(values):
        raise ValueError("a list should have each value once")
    return values


Address = Annotated[str, AfterValidator(_check_address)]
PathText = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Cell = bool | int | Finite | str  # of a row


class ServerSettings(SettingsTable):
    """Gunicorn's own names and units, which `gunicorn.conf.py` hands on, and two for connections, which it reads."""

    worker_class: Literal["auto", "uvicorn", "gevent"] = "auto"
    workers: PositiveInt | Literal["auto"] = "auto"
    bind: Address | Annotated[list[Address], Field(min_length=1)] = "127.0.0.1:8000"
    backlog: Annotated[PositiveInt, Field(lt=2**31)] = 2048
    timeout: NonNegativeInt = 30
    graceful_timeout: PositiveInt = 30
    keepalive: PositiveInt = 5
    send_timeout: PositiveInt = 10
    max_requests_per_connection: NonNegativeInt = 1000
    max_requests: NonNegativeInt = 0
    max_requests_jitter: NonNegativeInt = 0
    certfile: PathText = ""
    keyfile: PathText = ""


class ModelSettings(SettingsTable):
    path: Annotated[PathText, Field(min_length=1)] = "model/iris.skops"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "iris"
    runtime: Literal["sklearn", "onnx"] = "sklearn"
    sha256: Annotated[str, AfterValidator(_check_hash)] = ""
    trusted_types: list[str] = []
    outputs: Annotated[list[Annotated[str, Field(min_length=1)]], AfterValidator(_check_each_once)] = []
    strict_versions: bool = False
    load_timeout_s: Annotated[float, Field(ge=0.1, le=86_400)] = 120.0


class FeatureSettings(SettingsTable):
    """One feature; of what is None here the estimator says what it knows."""

    type: Literal["float", "int", "bool", "str"] | None = None
    ge: Finite | None = None
    le: Finite | None = None
    choices: Annotated[list[Cell], Field(min_length=1), AfterValidator(_check_each_once)] | None = None
    missing: bool | None = None
    unit: str | None = None
    example: Cell | None = None
    _is_variable: bool = PrivateAttr(default=False)  # the example comes from the environment, where all is text

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        bounds = [bound for bound in (self.ge, self.le) if bound is not None]
        limit = LIMITS.get(self.type or "float")
        if bounds and limit is None:
            raise ValueError(f"a {self.type} should have no bounds")
        if bounds and self.choices is not None:
            raise ValueError("a feature should have choices or bounds, not both")
        if self.type == "int" and not all(bound.is_integer() for bound in bounds):
            raise ValueError("an int should have whole numbers as bounds")
        if limit and any(abs(bound) > limit for bound in bounds):
            raise ValueError(f"a feature should have bounds within ±{limit:.8g}")
        if bounds != sorted(bounds):
            raise ValueError("bounds should have ge no greater than le")
        return self

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        choices = self.choices or []
        kinds = (float, int) if self.type == "float" else (FEATURE_TYPES.get(self.type or "", object),)
        wrong = [
            choice
            for choice in choices
            if not isinstance(choice, kinds) or isinstance(choice, bool) != (self.type == "bool")
        ]
        if wrong and self.type is not None:
            raise ValueError(f"choices should have the type {self.type!r}, unlike {wrong[0]!r}")
        return self


class LimitSettings(SettingsTable):
    max_body_bytes: PositiveInt = 8_388_608
    max_rows: PositiveInt = 10_000
    max_queued_rows: PositiveInt = 10_000
    request_timeout_s: Annotated[float, Field(ge=0.1, le=86_400)] = 10.0


class BatchingSettings(SettingsTable):
    max_rows: PositiveInt = 256
    max_wait_ms: Annotated[float, Field(ge=0, le=1000)] = 0.0


class LoggingSettings(SettingsTable):
    level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    format: Literal["auto", "json", "console"] = "auto"
    access: bool = True


class AuthSettings(SettingsTable):
    is_secret = True

    api_keys: list[Annotated[SecretStr, AfterValidator(_check_key)]] = []
    open_docs: bool = False


class SettingsFile(SettingsTable):
    """All tables of a settings file, with what gives the value of each key. `read_settings` reads it."""

    _file: Path = PrivateAttr(default=Path("settings.toml"))
    _sources: Sources = PrivateAttr(default_factory=dict)

    def source(self, *key: str) -> str:
        """Name what gives the value of a setting: the file, a variable of the environment, or its default."""
        return _source(key, self._sources)

    def place(self, *key: str) -> str:
        """Name the place of the value of a setting, for a message about it."""
        return _place(key, self._sources)

    @contextlib.contextmanager
    def locate(self) -> Iterator[None]:
        """Put the place of each setting in front of what is wrong with its value."""
        try:
            yield
        except MisfitError as error:
            lines = [f"{self.place(*key)} {problem}" for key, problem in error.problems]
            raise SettingsError("\n".join(lines)) from None

    @property
    def folder(self) -> Path:
        """The folder of the settings file, from which relative paths in it start."""
        return self._file.parent

    @property
    def sha256(self) -> str:
        """A hash of every value in force, by which two services can be compared; secrets are masked in it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


S = TypeVar("S", bound=SettingsFile)


class Environment(EnvSettingsSource):
    """The `SERVING_…` variables, nested like the file. Text that should be JSON and is not is left to validation."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except (ValueError, RecursionError):
            return value


@functools.cache
def _with_environment(kind: type[S]) -> type[S]:
    """Return the settings in which the environment wins over the values passed in, those of the file."""

    class WithEnvironment(BaseSettings, kind):  # type: ignore[misc, valid-type]
        model_config = SettingsConfigDict(env_prefix="SERVING_", env_nested_delimiter="__")

        @classmethod
        def settings_customise_sources(  # type: ignore[override]
            cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **others: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return Environment(settings_cls), init_settings

    return WithEnvironment


def read_settings(kind: type[S], file: Path) -> S:
    """Read the settings: the environment first, then the file, then defaults.

    Raises `SettingsError` with every mistake: place, value seen, what is allowed.
    """
    values = _read_toml(file)
    _refuse_unknown_variables(kind)
    sources: Sources = dict.fromkeys(leaves(values), file.name)
    try:
        # TOML has types, so its values are held to them; a variable is text, which is parsed.
        kind.model_validate(values, strict=True)
        given = leaves(Environment(cast(Any, _with_environment(kind)))())
        environment = {key: f"environment: {_variable_of(key)}" for key in given}
        sources = environment | sources | environment  # it comes first, and its values win
        settings: S = _with_environment(kind)(**values)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(kind, error, sources))) from None
    settings._file, settings._sources = file, sources
    return settings


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        hint = "set SERVING_SETTINGS to the path of a settings file"
        raise SettingsError(f"settings file {str(file)!r} cannot be read: {error.strerror}; {hint}") from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{file.name}: not valid TOML: {error}") from None


def _refuse_unknown_variables(kind: type[BaseModel]) -> None:
    """Refuse a `SERVING_…` variable that is no setting, which pydantic-settings would ignore (its issue 985)."""
    known = {key[:end] for key in setting_keys(kind) for end in range(1, len(key) + 1)}
    lines: list[str] = []
    for variable in map(str.upper, os.environ):
        key = tuple(variable.removeprefix("SERVING_").lower().split("__"))
        ours = variable.startswith("SERVING_") and variable != "SERVING_SETTINGS"
        if ours and key not in known and _row_model(kind, key[0]) is None:
            hint = nearest(variable, map(_variable, setting_keys(kind)))
            lines.append(f"environment: {variable} is not a setting; {hint}")
    if lines:
        raise SettingsError("\n".join(lines))


def setting_keys(model: type[BaseModel], prefix: Key = ()) -> Iterator[Key]:
    """Yield every setting as its path of keys, such as `("server", "workers")`."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from setting_keys(info.annotation, (*prefix, name))
        else:
            yield (*prefix, name)


def _row_model(kind: type[BaseModel], name: str) -> type[BaseModel] | None:
    """Return the model of the rows of a table whose keys the operator chooses, such as [features]; None for others."""
    annotation = kind.model_fields[name].annotation if name in kind.model_fields else None
    inner = [part for part in get_args(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
    return inner[0] if get_origin(annotation) is dict and inner else None


def leaves(values: Mapping[str, Any], prefix: Key = ()) -> Iterator[Key]:
    """Yield every value of nested tables as its path of keys; an empty table counts as a value."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*prefix, name))
        else:
            yield (*prefix, name)


def _variable(key: Iterable[str]) -> str:
    return "SERVING_" + "__".join(key).upper()


def _variable_of(key: Key) -> str:
    """Return the variable that gives a value of the environment: its own, or one with a table that it is in."""
    names = [_variable(key[:end]) for end in range(len(key), 0, -1)]
    return next(name for name in names if name in map(str.upper, os.environ))


def _source(key: Key, sources: Sources) -> str:
    return next((source for known, source in sources.items() if known[: len(key)] == key), "default")


def _place(key: Key, sources: Sources) -> str:
    source = _source(key, sources)
    return source if source == f"environment: {_variable(key)}" else f"{source}: {'.'.join(map(toml_key, key))}"


def toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml_value(name)


def toml_value(value: Any) -> str:
    """Return a text, number, truth or list of them in TOML: as in JSON, but that TOML wants DEL escaped too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _explain(kind: type[BaseModel], error: ValidationError, sources: Sources) -> list[str]:
    """Describe each mistake in a line: place, value seen, what is allowed."""
    shoulds: dict[str, list[str]] = {}
    lines: list[str] = []
    for problem in error.errors(include_url=False):
        key = _setting_of(kind, [str(part) for part in problem["loc"]])
        place = _place(key, sources)
        if problem["type"] == "extra_forbidden":
            level = len(key) - 1
            siblings = [known[level] for known in setting_keys(kind) if known[:level] == key[:level]]
            row = _row_model(kind, key[0])
            names = dict.fromkeys(siblings) if row is None else row.model_fields
            lines.append(f"{place} is not a setting; {nearest(key[-1], names)}")
        else:
            seen = "**********" if _is_secret(kind, key[0]) else repr(shorten(problem["input"]))
            as_json = " (as JSON)" if isinstance(problem["input"], str) and problem["type"] in NESTED else ""
            shoulds.setdefault(f"{place} is {seen}", []).append(should(problem) + as_json)
    return lines + [f"{what}; it should {' or '.join(options)}" for what, options in shoulds.items()]


def _setting_of(kind: type[BaseModel], loc: list[str]) -> Key:
    """Return the setting that pydantic's `loc` is about; it goes on into the branches of a union."""
    lengths = [len(key) for key in setting_keys(kind) if list(key) == loc[: len(key)]]
    if _row_model(kind, loc[0]) is not None:
        return tuple(loc[:3])
    return tuple(loc[: lengths[0]] if lengths else loc)


def _is_secret(kind: type[BaseModel], name: str) -> bool:
    table = kind.model_fields[name].annotation if name in kind.model_fields else None
    return isinstance(table, type) and issubclass(table, SettingsTable) and table.is_secret


NESTED = {"model_type": "be a table of keys", "dict_type": "be a table of keys", "list_type": "be a list"}


def should(problem: Any) -> str:
    """Return what one of pydantic's problems says that a value should be."""
    kinds = NESTED | {"extra_forbidden": "not be there", "missing": "be there", "json_invalid": "be JSON"}
    said: str = kinds.get(problem["type"], re.sub(r"^.* should ", "", problem["msg"]))
    return said.partition(", unable to")[0]


def print_settings(settings: SettingsFile) -> None:
    """Print the settings in force as TOML, each with where it comes from; secrets are masked."""
    table: tuple[str, ...] = ()
    values = settings.model_dump(mode="json")
    for key in sorted(leaves(values), key=len):
        if key[:-1] != table:
            table = key[:-1]
            print(f"\n[{'.'.join(map(toml_key, table))}]")
        value = functools.reduce(lambda level, part: level[part], key, values)
        name, shown = toml_key(key[-1]), toml_value(value)
        print(f"# {name} is not set" if value is None else f"{name} = {shown}  # {settings.source(*key)}")


class Settings(SettingsFile):
    """Every choice of the service, read once at the start by `load_settings`."""

    framework: Literal["flask", "fastapi"] = "fastapi"
    server: ServerSettings = ServerSettings()
    model: ModelSettings = ModelSettings()
    features: dict[str, FeatureSettings] = {}
    batching: BatchingSettings = BatchingSettings()
    limits: LimitSettings = LimitSettings()
    logging: LoggingSettings = LoggingSettings()
    auth: AuthSettings = AuthSettings()

    _file: Path = PrivateAttr(default=PROJECT / "settings.toml")

    @property
    def model_path(self) -> Path:
        """The artifact's place."""
        return self.folder / self.model.path

    @property
    def artifact(self) -> str:
        """The artifact as the subject of a message."""
        return f"{self.place('model', 'path')} is {str(self.model_path)!r}, which"

    @property
    def worker_class(self) -> Literal["uvicorn", "gevent"]:
        """The worker that `server.worker_class` means: by default the one of the framework's own interface."""
        if self.server.worker_class == "auto":
            return "uvicorn" if self.framework == "fastapi" else "gevent"
        return self.server.worker_class

    @functools.cached_property
    def cores(self) -> int:
        """The number of cores that affinity and cgroup quota leave to this process."""
        return int(joblib.cpu_count())

    @property
    def workers(self) -> int:
        """The number of workers that `server.workers` means: by default one for each core."""
        return self.cores if self.server.workers == "auto" else self.server.workers

    @property
    def threads(self) -> int:
        """The number of threads of OpenMP and BLAS in a worker: its share of the cores."""
        return max(1, self.cores // self.workers)


def load_settings(path: str | os.PathLike[str] | None = None) -> Settings:
    """Return the settings: the environment over the file over defaults.

    `path` is the file; without it `SERVING_SETTINGS`, and without that the `settings.toml` beside this module. Raises
    `SettingsError` with every mistake: place, value seen, what is allowed.
    """
    file = Path(path or os.environ.get("SERVING_SETTINGS") or PROJECT / "settings.toml").absolute()
    settings = read_settings(Settings, file)
    for name, feature in settings.features.items():
        feature._is_variable = settings.source("features", name, "example").startswith("environment")
    return settings


# Logging --------------------------------------------------------------------------------------------------------------

REQUEST_ID: contextvars.ContextVar[str] = contextvars.ContextVar("request_id")
ANSI_STYLE = re.compile(r"\x1b\[[0-9;]*m")
SERVER_LOGGERS = ("gunicorn.error", "uvicorn", "uvicorn.error", "uvicorn.asgi", "werkzeug", "py.warnings")
SERVER_ACCESS_LOGGERS = ("gunicorn.access", "uvicorn.access")
MAX_PENDING_BYTES = 262_144  # bytes of lines that wait for a slow reader
LAST_LINES_S = 0.2  # seconds that it has for them when the process ends


class LossyOutput(io.RawIOBase):
    """Standard output or error whose writes never wait and never raise.

    What the reader cannot take yet waits, up to a bound; the rest is lost and counted, and the log says how much once
    lines are taken again. The descriptor is a copy: code of the user's may close the standard one, whose number the
    next connection of a client would get.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._send, self._close = _open_output(fd)
        self._start_anew()
        os.register_at_fork(after_in_child=self._start_anew)
        atexit.register(self.finish)

    def reopen(self) -> None:
        """Write from now on to what the standard descriptor is now, and let go of what it was."""
        self._close()
        self._send, self._close = _open_output(self._fd)

    def _start_anew(self) -> None:
        """Forget what waits, which after a fork is the parent's to write, and a lock that another thread may hold."""
        self._lock = threading.RLock()  # a signal's handler may log in the middle of a line: see `_is_writing`
        self._is_writing = False
        self._pending: collections.deque[bytes] = collections.deque()
        self._pending_bytes = 0
        self._is_begun = False  # the first of them is written in part
        self._is_cut = False  # a line was written in part, and will not be continued
        self._lost = 0  # lines

    def write(self, data: Any) -> int:
        line = bytes(data)
        with self._lock:
            n_bytes = 0 if self._pending or self._lost or self._is_cut or self._is_writing else self._try(line)
            if n_bytes < len(line):
                self._keep(line[n_bytes:], is_begun=n_bytes > 0)
        if n_bytes < len(line):
            self.flush()
        return len(line)

    def _try(self, line: bytes) -> int:
        """Write a line, as most are, beside which none waits, and return how much of it was taken."""
        try:
            return self._send(line)
        except OSError:
            return 0

    def _keep(self, line: bytes, is_begun: bool) -> None:
        if is_begun or self._pending_bytes + len(line) <= MAX_PENDING_BYTES:
            self._pending.append(line)
            self._pending_bytes += len(line)
            self._is_begun = self._is_begun or is_begun
        else:
            self._lost += line.count(b"\n")

    def flush(self) -> None:
        """Write what waits, as far as it is taken."""
        with self._lock:
            lost = self._write_pending()
        if lost:
            log.warning("log_lines_lost", lines=lost)

    def _write_pending(self) -> int:
        """Write lines as far as they are taken, and return how many were lost before, once all that waited are."""
        if self._is_writing:
            return 0
        self._is_writing, is_taken = True, False
        try:
            while self._pending:
                if self._is_cut:
                    self._send(b"\n")
                    self._is_cut = False
                line = self._pending[0]
                n_bytes = self._send(line)
                self._pending[0] = line[n_bytes:]
                self._pending_bytes -= n_bytes
                is_taken, self._is_begun = is_taken or n_bytes > 0, n_bytes < len(line)
                if not self._is_begun:
                    self._pending.popleft()
        except BlockingIOError:  # the reader is slow
            pass
        except OSError:  # there is no reader, or no space
            is_taken, self._is_cut = False, self._is_cut or self._is_begun
            self._lost += sum(line.count(b"\n") for line in self._pending)
            self._pending.clear()
            self._pending_bytes, self._is_begun = 0, False
        finally:
            self._is_writing = False
        lost = self._lost if is_taken and not self._pending else 0
        self._lost -= lost
        return lost

    def finish(self) -> None:
        """Give a slow reader a moment for the last lines."""
        end = time.monotonic() + LAST_LINES_S
        while self._pending and time.monotonic() < end:
            self.flush()
            time.sleep(LAST_LINES_S / 20)

    def close(self) -> None:
        """Stay open: whoever closes `sys.stderr` closes it for the whole process."""
        self.flush()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)


PROTECTED: list[LossyOutput] = []  # what this process writes to standard output and error


def _open_output(fd: int) -> tuple[Callable[[bytes], int], Callable[[], None]]:
    """Return what writes to a copy of a descriptor, as much as is taken at once, and what closes it.

    Whether a write waits is a flag that all processes share which have inherited the descriptor, so it is not set
    there. Opened anew, a pipe or terminal has a flag of its own. Where that is not allowed, as with a pipe of another
    user's, the kernel is asked not to wait for this one write. Only a terminal of another user's may still wait.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):  # as systemd's journal has it
        journal = socket.socket(fileno=os.dup(fd))
        return lambda data: journal.send(data, socket.MSG_DONTWAIT), journal.close
    own = -1
    write: Callable[[int, bytes], int] = os.write
    if stat.S_ISFIFO(mode) or os.isatty(fd):
        try:
            own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            write = _write_if_taken
    own = os.dup(fd) if own < 0 else own
    return functools.partial(write, own), functools.partial(os.close, own)


def _write_if_taken(fd: int, data: bytes, poll: Callable[[], Any] = select.poll) -> int:
    """Write what is taken now, where the kernel can be asked for that; else no more than a pipe that takes anything
    takes whole. `poll` is not gevent's, which would switch."""
    try:
        return os.pwritev(fd, [data], -1, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
    except (AttributeError, NotImplementedError):  # not Linux
        pass
    poller = poll()
    poller.register(fd, select.POLLOUT)
    if not poller.poll(0):
        raise BlockingIOError
    return os.write(fd, data[: select.PIPE_BUF])


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


def protect_output() -> None:
    """Make standard output and error of this process take every line without waiting or raising; once is enough."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # it is closed, and the next file would get its number
            os.open(os.devnull, os.O_RDWR)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _protect(stream, fd))


def flush_output() -> None:
    """Write the lines that wait for a slow reader, as far as it takes them now."""
    for output in PROTECTED:
        output.flush()


def finish_output() -> None:
    """Write the last lines of a process that ends at once, without what Python does at its end."""
    for output in PROTECTED:
        output.finish()


def reopen_output() -> None:
    """Write to what standard output and error are by now."""
    for output in PROTECTED:
        output.reopen()


def _protect(stream: Any, fd: int) -> io.TextIOWrapper:
    """Return a text stream in the place of one of Python's own, which is None where its descriptor was closed."""
    if stream is None:
        fd = os.open(os.devnull, os.O_WRONLY)
    else:
        with contextlib.suppress(OSError):
            stream.flush()
    output = LossyOutput(fd)
    PROTECTED.append(output)
    encoding = getattr(stream, "encoding", "utf-8")
    return io.TextIOWrapper(cast(Any, output), encoding, errors="backslashreplace", line_buffering=True)


def configure_logging(settings: LoggingSettings) -> None:
    """Send every event of the process, ours, the servers' and Python's warnings, to stderr as one line each."""
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    console = settings.format == "console" or (settings.format == "auto" and sys.stderr.isatty())
    renderer = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if console
        else structlog.processors.JSONRenderer(_write_event)
    )
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        _add_process_and_request,
        _add_time,
    ]
    rendering = [_escape_controls if console else structlog.processors.format_exc_info, renderer]
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
    logging.captureWarnings(True)
    logging.root.handlers = [handler]
    logging.root.setLevel(level)
    for name in SERVER_LOGGERS:
        _take_over(name, [handler]).setLevel(level)
    for name in SERVER_ACCESS_LOGGERS:
        _take_over(name, [])
    logging.getLogger("werkzeug").filters = [_is_no_access_line]


def _write_event(event: MutableMapping[str, Any], **_: Any) -> str:
    """Write an event as JSON, which in ASCII is safe on every terminal; pydantic does it in a quarter of the time."""
    with contextlib.suppress(ValueError):  # of text that is no Unicode, or bytes that are no text
        text = to_json(event, fallback=repr).decode()
        if text.isascii():
            return text
    return json.dumps(event, default=repr, separators=(",", ":"))


def _is_no_access_line(record: logging.LogRecord) -> bool:
    return record.levelno != logging.INFO or " - - [" not in str(record.msg)


def _take_over(name: str, handlers: list[logging.Handler]) -> logging.Logger:
    """Replace a logger's handlers. Without any it is silent: the access line is `Service.respond`'s alone."""
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


def _escape_controls(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Keep a client's control characters from the terminal; in JSON they are escaped anyway."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = value.encode("unicode_escape").decode()
    return event


def _fold_event(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Put a message that brings its own lines and colours (werkzeug, warnings) on one plain line."""
    event["event"] = " ".join(ANSI_STYLE.sub("", str(event["event"])).split())
    return event


# Inputs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """What an estimator, or one part of it, says of one feature that it takes."""

    type: str | None = None  # one of FEATURE_TYPES; None where it does not say
    choices: tuple[Cell, ...] | None = None  # the only values that it knows
    missing: bool | None = None  # True: it takes a missing value; False: it fails on one; None: it hands it on
    null: Any = math.nan  # a missing value as it was fitted with
    is_object: bool = False  # it was fitted on Python's own values, and takes no others
    is_category: bool = False  # where all values are known, they are a category of pandas' to it
    example: Cell | None = None
    is_text: bool = False  # it is the whole input, which is then one-dimensional
    is_opaque: bool = False  # it goes into code of which nothing is known
    is_idle: bool = False  # nothing looks at it
    known: tuple[Cell, ...] | None = None  # the values besides which all others become missing

    def beside(self, other: Column) -> Column:
        """Say of a feature what two parts say that both get it."""
        choices = self.choices if other.choices is None else other.choices
        if self.choices is not None and other.choices is not None:
            choices = tuple(choice for choice in self.choices if choice in other.choices)
        missing = False if False in (self.missing, other.missing) else self.missing and other.missing
        kind = "str" if "str" in (self.type, other.type) else self.type or other.type
        kind = type_of(choices) if choices else kind
        return replace(self._or(other), type=kind, choices=choices, missing=missing)

    def before(self, other: Column) -> Column:
        """Say of a feature what two parts say of which the second gets it from the first."""
        if self.is_opaque:
            return self
        missing = other.missing if self.missing is None else self.missing
        kind = other.type if other.choices is not None else self.type or other.type
        others = self.known if other.choices is None and other.missing is False else other.choices
        choices = others if self.choices is None else self.choices
        known = other.known or (self.known if other.missing is None else None)
        return replace(self._or(other), type=kind, choices=choices, missing=missing, known=known)

    def _or(self, other: Column) -> Column:
        return replace(
            self,
            null=other.null if is_nan(self.null) else self.null,
            example=other.example if self.example is None else self.example,
            known=self.known or other.known,
            is_object=self.is_object or other.is_object,
            is_opaque=self.is_opaque or other.is_opaque,
        )


Columns = dict[int, Column]  # by their position in X; one that is not used is left out


@dataclass(frozen=True, slots=True)
class Inputs:
    """The features of a fitted estimator, in its order: their names if it knows them, and what it says of each.

    `form` is what its methods take: an array of shape (n_samples, n_features), a DataFrame of as many columns, or
    n_samples texts.
    """

    names: list[str] | None
    columns: list[Column | None] | None  # None in it for a column that the estimator drops
    form: Literal["array", "frame", "texts"]


def _is_catboost(part: Any) -> bool:
    """Whether a part is one of CatBoost's, which once loaded has an `n_features_in_` of 0 and names of its own."""
    return hasattr(part, "get_cat_feature_indices")


def read_inputs(estimator: Any) -> Inputs:
    """Read the features off a fitted estimator and its parts. Raises `ModelError` when their names make no sense."""
    if isinstance(inputs := getattr(estimator, "inputs", None), Inputs):
        return inputs
    first = _find_first(estimator)
    names = [str(name) for name in getattr(first, "feature_names_in_", ())] or None
    width: int | None = getattr(first, "n_features_in_", len(names) if names else _given_width(first))
    if _is_catboost(first):
        names, width = first.feature_names_, len(first.feature_names_)
        names = None if names == [str(position) for position in range(width)] else names
    if names and (width != len(names) or len(set(names)) < len(names)):
        raise ModelError(f"has {len(names)} names for {width} features, {len(set(names))} of them different")
    try:
        read = read_columns(estimator, width)
    except AttributeError as error:
        raise ModelError(f"is not as this version of scikit-learn fits it: {error}; save it with this one") from error
    if any(column.is_text for column in read.values()):
        return Inputs(None, [replace(read[0], is_text=False)], "texts")
    columns = [read.get(position) for position in range(width)] if width is not None else None
    named = names is not None and any(map(_needs_names, find_parts(estimator)))
    return Inputs(names, columns, "frame" if named else "array")


def _find_first(estimator: Any) -> Any:
    """Give the part that knows its features: what holds others may not, where a pipeline begins with "passthrough"."""
    steps = [step for _, step in getattr(estimator, "steps", ()) if hasattr(step, "fit")]
    held = [getattr(estimator, name, None) for name in ("best_estimator_", "estimator_", "estimators_")]
    inner = [part[0] if isinstance(part, list | tuple) else part for part in held if part is not None]
    if hasattr(estimator, "n_features_in_") or not (steps or inner):
        return estimator
    return _find_first((steps or inner)[0])


def _given_width(estimator: Any) -> int | None:
    """Give the width of an estimator of one feature, which does not keep it."""
    if not isinstance(estimator, BaseEstimator):
        return None
    tags = sklearn.utils.get_tags(estimator).input_tags
    return 1 if tags.one_d_array and not tags.two_d_array and not tags.string else None


def read_columns(part: Any, width: int | None) -> Columns:
    """Read what a part of an estimator, fitted on `width` features, says of each of them."""
    if isinstance(part, str) or part is None:
        return {} if part == "drop" else dict.fromkeys(range(width or 0), Column())
    if _is_catboost(part):
        return _read_catboost(part)
    own = [kind.__name__ for kind in type(part).__mro__ if kind.__module__.startswith("sklearn.")]
    read = next((READERS[name] for name in own if name in READERS), _read_plain)
    return read(part, width)


def _read_steps(pipeline: Any, width: int | None) -> Columns:
    """Read the steps of a pipeline: what one does not say is asked of the next, while values stay what they were."""
    steps = [step for _, step in pipeline.steps if step is not None and not isinstance(step, str)]
    columns: Columns = {} if steps else dict.fromkeys(range(width or 0), Column())
    same = True
    for step in steps:
        if not columns:
            columns = read_columns(step, width)
        else:
            read = read_columns(step, getattr(step, "n_features_in_", None))
            rest = Column(missing=_all_missing(read))
            columns = {
                position: column.before(read[position] if same and position in read else rest)
                for position, column in columns.items()
            }
        same = same and _keeps_values(step)
    return columns


def _all_missing(columns: Columns) -> bool | None:
    answers = [column.missing for column in columns.values()]
    return False if False in answers else True if answers and all(answers) else None


def _keeps_values(step: Any) -> bool:
    """Whether the columns that a step gives begin with those that it takes, but for missing values the same."""
    if not hasattr(step, "statistics_"):
        return isinstance(step, FunctionTransformer) and step.func is None
    names = getattr(step, "feature_names_in_", [f"x{column}" for column in range(step.n_features_in_)])
    return list(step.get_feature_names_out()[: len(names)]) == list(names)


def _read_branches(transformer: Any, width: int | None) -> Columns:
    """Read a ColumnTransformer, of which each branch gets some of the columns."""
    positions = transformer._transformer_to_input_indices
    return _join(
        {
            positions[name][inner]: replace(column, is_text=False)
            for inner, column in read_columns(part, len(positions[name])).items()
        }
        for name, part, _ in transformer.transformers_
    )


def _read_union(union: Any, width: int | None) -> Columns:
    return _join(read_columns(part, width) for _, part in union.transformer_list)


def _read_inner(part: Any, width: int | None, attribute: str) -> Columns:
    """Read the estimators inside one that hands its input to them as it is."""
    inner = getattr(part, attribute)
    return _join(read_columns(item, width) for item in (inner if isinstance(inner, list | tuple) else [inner]))


def _read_stack(stack: Any, width: int | None) -> Columns:
    """Read a stacking estimator, whose final one may get X too, after the answers of the others."""
    columns = _read_inner(stack, width, "estimators_")
    if not stack.passthrough or width is None:
        return columns
    final, n_inputs = stack.final_estimator_, stack.final_estimator_.n_features_in_
    read = read_columns(final, n_inputs)
    answers = n_inputs - width
    return _join([columns, {position - answers: read[position] for position in read if position >= answers}])


def _read_bag(bag: Any, width: int | None) -> Columns:
    """Read a bagging estimator, which may give each of its own some of the columns only."""
    pairs = zip(bag.estimators_, bag.estimators_features_, strict=True)
    return _join(
        {int(positions[inner]): column for inner, column in read_columns(part, len(positions)).items()}
        for part, positions in pairs
    )


def _join(readings: Iterable[Columns]) -> Columns:
    """Say of each column what all parts say that get it, but for those that look at none, if others do."""
    readings = list(readings)
    busy = [reading for reading in readings if not all(column.is_idle for column in reading.values())]
    columns: Columns = {}
    for reading in busy or readings:
        for position, column in reading.items():
            columns[position] = columns[position].beside(column) if position in columns else column
    return columns


def _read_histogram(boosting: Any, width: int | None) -> Columns:
    """Read a HistGradientBoosting estimator, for which missing values and unknown categories are like any other."""
    columns = _read_plain(boosting, width)
    if boosting._preprocessor is not None:
        columns |= _read_branches(boosting._preprocessor, width)
    return {
        position: replace(column, type=column.type or "float", missing=True) for position, column in columns.items()
    }


def _read_encoder(encoder: Any, width: int | None) -> Columns:
    """Read the categories of a OneHotEncoder, OrdinalEncoder or TargetEncoder."""
    takes_unknown = getattr(encoder, "handle_unknown", "ignore") != "error"
    columns: Columns = {}
    for position, categories in enumerate(encoder.categories_):
        values = categories.tolist()
        nulls = [value for value in values if value is None or is_nan(value)]
        known = tuple(value for value in values if value is not None and not is_nan(value))
        if known and type_of(known) is None:
            raise ModelError(f"has categories of the type {type(known[0]).__name__}, which JSON does not have")
        columns[position] = Column(
            type=type_of(known),
            choices=None if takes_unknown else known,
            known=known if is_nan(getattr(encoder, "unknown_value", None)) else None,
            missing=_takes_missing(encoder, nulls, takes_unknown),
            null=nulls[0] if nulls else math.nan,
            is_object=categories.dtype == object,
            example=known[0] if known else None,
        )
    return columns


def _takes_missing(encoder: Any, nulls: list[Any], takes_unknown: bool) -> bool | None:
    """Whether an encoder takes the missing values among its categories, or hands them on; only NaN it does."""
    if not nulls:
        return None if takes_unknown else False
    hands_on = is_nan(getattr(encoder, "encoded_missing_value", None))
    return None if hands_on and is_nan(nulls[0]) else True


def _refuse_dicts(part: Any, width: int | None) -> Columns:
    raise ModelError(f"has a {type(part).__name__} in it, which takes dictionaries; fit a ColumnTransformer on columns")


def _read_nothing(part: Any, width: int | None) -> Columns:
    """Read an estimator that does not look at its input."""
    return dict.fromkeys(range(width or 0), Column(missing=True, is_idle=True))


def _read_adaboost(boosting: Any, width: int | None) -> Columns:
    """Read an AdaBoost estimator, which hands its input on but refuses missing values by itself."""
    columns = _read_inner(boosting, width, "estimators_")
    return {position: replace(column, missing=False) for position, column in columns.items()}


def _read_category_counts(bayes: Any, width: int | None) -> Columns:
    """Read a CategoricalNB, which takes the numbers of categories."""
    counts = bayes.n_categories_.tolist()
    return {j: Column("int", tuple(range(count)), missing=False, example=0) for j, count in enumerate(counts)}


def type_of(values: Iterable[Any]) -> str | None:
    """Name the one type of feature that all values are of, if there is one."""
    kinds = {type(value) for value in values}
    if kinds == {int, float}:
        return "float"
    return kinds.pop().__name__ if len(kinds) == 1 and kinds <= set(FEATURE_TYPES.values()) else None


def _read_imputer(imputer: Any, width: int | None) -> Columns:
    are_objects = getattr(imputer, "_fit_dtype", np.dtype(float)).kind in "OU"
    column = Column(None if are_objects else "float", missing=True, null=imputer.missing_values)
    columns = dict.fromkeys(range(imputer.n_features_in_), column)
    if getattr(imputer, "strategy", "") == "constant":  # which is typical of nothing
        return columns
    columns = _with_examples(imputer, columns)
    if not are_objects:
        return columns
    kinds = {position: type_of([column.example]) for position, column in columns.items()}
    wider = {"int": "float"}  # of which the most frequent may be whole
    return {j: replace(column, type=wider.get(kinds[j] or "", kinds[j])) for j, column in columns.items()}


def _read_plain(part: Any, width: int | None) -> Columns:
    """Read a part by its tags alone: scikit-learn's own take numbers, or texts; of others nothing is known."""
    tags = sklearn.utils.get_tags(part).input_tags if isinstance(part, BaseEstimator) else None
    if tags is not None and tags.string and not tags.two_d_array:
        return {0: Column(type="str", missing=False, is_text=True)}
    if tags is None or _is_opaque(part):
        predicts = hasattr(part, "predict")  # as LightGBM and XGBoost do
        takes = tags is not None and tags.allow_nan and predicts
        column = Column(missing=True if takes else None, is_category=predicts, is_opaque=True)
    else:
        hands_on = isinstance(part, FunctionTransformer)
        column = Column(None if hands_on else "float", missing=None if tags.allow_nan or hands_on else False)
    return _with_examples(part, dict.fromkeys(range(width or 0), column))


def _read_catboost(part: Any) -> Columns:
    """Read an estimator of CatBoost's, which takes texts, its own or not, where it has categories."""
    categories = part.get_cat_feature_indices()
    number, category = Column(is_opaque=True), Column("str", missing=False, is_object=True, is_opaque=True)
    return {position: category if position in categories else number for position in range(len(part.feature_names_))}


def _with_examples(part: Any, columns: Columns) -> Columns:
    """Add a value that is typical of each column, where the part has learnt one."""
    for attribute in ("statistics_", "mean_", "center_", "data_min_"):
        values = getattr(part, attribute, None)
        if isinstance(values, np.ndarray) and values.shape == (len(columns),):
            examples = [float(f"{value:.4g}") if isinstance(value, float) else value for value in values.tolist()]
            return {
                position: replace(column, example=None if is_nan(example) else example)
                for (position, column), example in zip(columns.items(), examples, strict=True)
            }
    return columns


def is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _is_opaque(part: Any) -> bool:
    """Whether a part may do anything with its input: it is not scikit-learn's, or runs a function of the user's."""
    function = getattr(part, "func", None)
    own = type(part).__module__.partition(".")[0] == "sklearn"
    if not own or not isinstance(part, TransformerMixin) or isinstance(function, np.ufunc | None):
        return not own
    return not getattr(function, "func", function).__module__.startswith("sklearn.")  # a partial of its own check_array


def _needs_names(part: Any) -> bool:
    """Whether a part may ask for the names of columns, or hand on a DataFrame."""
    output = getattr(part, "_sklearn_output_config", {}).get("transform", "default")
    return output != "default" or (hasattr(part, "fit") and _is_opaque(part))


def find_parts(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Give an estimator and every object of scikit-learn's or of the user's inside it, each once."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, type | str | bytes | int | float | None):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        inner: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object):
        inner = value
    elif hasattr(value, "__dict__") and (hasattr(value, "fit") or type(value).__module__.startswith("sklearn.")):
        yield value
        inner = vars(value).values()
    else:
        return
    for item in inner:
        yield from find_parts(item, seen)


Reader = Callable[[Any, int | None], Columns]


def _inside(attribute: str) -> Reader:
    return functools.partial(_read_inner, attribute=attribute)


READERS: dict[str, Reader] = {  # by the name of a class of scikit-learn's; of the others the tags are read
    "Pipeline": _read_steps,
    "ColumnTransformer": _read_branches,
    "FeatureUnion": _read_union,
    "DictVectorizer": _refuse_dicts,
    "FeatureHasher": _refuse_dicts,
    "_BaseEncoder": _read_encoder,
    "_BaseImputer": _read_imputer,
    "MissingIndicator": _read_imputer,
    "CategoricalNB": _read_category_counts,
    "BaseHistGradientBoosting": _read_histogram,
    "BaseWeightBoosting": _read_adaboost,
    "_BaseStacking": _read_stack,
    "BaseBagging": _read_bag,
    "DummyClassifier": _read_nothing,
    "DummyRegressor": _read_nothing,
    "_ConstantPredictor": _read_nothing,
    # Those that give their input unchecked to what they keep under this name.
    "BaseSearchCV": _inside("best_estimator_"),
    "CalibratedClassifierCV": _inside("calibrated_classifiers_"),
    "_CalibratedClassifier": _inside("estimator"),
    "BaseThresholdClassifier": _inside("estimator_"),
    "SelfTrainingClassifier": _inside("estimator_"),
    "RANSACRegressor": _inside("estimator_"),
    "FrozenEstimator": _inside("estimator"),
    "TransformedTargetRegressor": _inside("regressor_"),
    "_BaseVoting": _inside("estimators_"),
    "OneVsRestClassifier": _inside("estimators_"),
    "OneVsOneClassifier": _inside("estimators_"),
    "OutputCodeClassifier": _inside("estimators_"),
    "_MultiOutputEstimator": _inside("estimators_"),
}


# Contract -------------------------------------------------------------------------------------------------------------

Rows = list[dict[str, Any]]  # of checked cells by the names of features
make_typed_dict: Any = TypedDict  # called with names known only at run time, which type checkers do not allow
MAX_PROBLEMS = 1000  # bad cells named in one answer
MAX_DETAIL_BYTES = 131_072  # of its JSON; a thousand problems without a long name or value take about as much
MAX_HINTS = 10  # suggestions in one answer
JSON_TYPES: dict[Any, str] = {float: "number", int: "integer", bool: "boolean", str: "string"}


class Contract:
    """The types of input: which features a row has, and of which type each is.

    `inputs` come from the estimator; `given` completes them, and `row`, one that the model is known to answer, gives
    examples. Raises `MisfitError` where settings and estimator contradict each other.
    """

    def __init__(
        self, inputs: Inputs, given: Mapping[str, FeatureSettings], row: Mapping[str, Any] | None = None
    ) -> None:
        columns = name_columns(inputs, given)
        used = {name: column for name, column in columns.items() if column is not None}
        _refuse_contradictions(used, given)
        self.inputs = inputs
        self.columns = columns  # those that the estimator drops too
        self.names = list(used)
        self.features = {
            name: _complete(name, column, given.get(name, FeatureSettings()), row or {})
            for name, column in used.items()
        }
        self.nullable = [name for name, feature in self.features.items() if feature.missing]
        cells = {name: _cell_type(feature) for name, feature in self.features.items()}
        left_out = {name: NotRequired[cells[name]] for name in self.nullable}
        row_type, query_type = (_row_type(types) for types in (cells, cells | left_out))
        rows: Any = Annotated[list[row_type], FailFast()]  # type: ignore[valid-type]
        self.row: TypeAdapter[dict[str, Any]] = TypeAdapter(row_type)
        self.rows: TypeAdapter[list[dict[str, Any]]] = TypeAdapter(rows)
        self.query_row: TypeAdapter[dict[str, Any]] = TypeAdapter(query_type)

    @property
    def example(self) -> dict[str, Any]:
        """One row that fits, of the features' examples; a feature without one has a value within its bounds."""
        return {name: _some_value(feature) for name, feature in self.features.items()}

    @property
    def is_known(self) -> bool:
        """Whether every cell of the example comes from the operator or the model, and none is made up."""
        return all(feature.example is not None for feature in self.features.values())

    def parse_query(self, query: str) -> list[dict[str, Any]]:
        """Read one row from a query string, in which every value is text, and one that may be missing can be left out
        or empty. Raises `BadRequest`, `Unprocessable`."""
        try:
            pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, errors="strict")
        except ValueError:
            raise BadRequest("the query is not percent-encoded UTF-8") from None
        cells = dict(pairs)
        if len(cells) < len(pairs):
            raise self._refusal(_find_repeated(pairs))
        for name in self.nullable:
            if cells.get(name) == "":
                del cells[name]
        try:
            row = self.query_row.validate_strings(cells, strict=False)
        except ValidationError as error:
            raise self._refusal(self._problems(["query"], error, Hints())) from None
        return [dict.fromkeys(self.nullable) | row]

    def parse_payload(self, payload: Any) -> list[dict[str, Any]]:
        """Check one row, or a list of rows, as decoded from JSON. Raises `Unprocessable`."""
        if (rows := self.check(payload)) is None:
            raise self._refusal(self._find_problems(payload))
        return rows

    def check(self, payload: Any) -> Rows | None:
        """Return the rows of a payload, or None if one does not fit, in less time than it takes to say why."""
        if self._has_long_row(payload if isinstance(payload, list) else [payload]):
            return None
        with contextlib.suppress(ValidationError):
            if isinstance(payload, list):
                return self.rows.validate_python(payload, strict=True)
            return [self.row.validator.validate_python(payload, strict=True)]
        return None

    def _has_long_row(self, rows: list[Any]) -> bool:
        """Whether a row has more unknown names than an answer has room for, each of which pydantic would note."""
        with contextlib.suppress(TypeError):  # of a number, which is no row at all
            return max(map(len, rows), default=0) > len(self.names) + MAX_PROBLEMS
        return False

    def _refusal(self, problems: Iterable[dict[str, Any]]) -> Unprocessable:
        """Return the error with the first problems, as many as an answer may have, and one at least."""
        detail: list[dict[str, Any]] = []
        left = MAX_DETAIL_BYTES
        for problem in itertools.islice(problems, MAX_PROBLEMS):
            problem["loc"] = [part if part in self.features else shorten(part) for part in problem["loc"]]
            left -= len(to_json(problem, inf_nan_mode="strings", fallback=str)) + len(",")
            if left < 0 and detail:
                break
            detail.append(problem)
        return Unprocessable(detail)

    def _find_problems(self, payload: Any) -> Iterator[dict[str, Any]]:
        """Check row by row, so that an answer of bounded length costs a bounded time."""
        hints = Hints()
        rows = enumerate(payload) if isinstance(payload, list) else [(None, payload)]
        for index, row in rows:
            place = ["body"] if index is None else ["body", index]
            if isinstance(row, dict) and self._has_long_row([row]):
                message = f"Object should have at most {len(self.names)} features, not {len(row)}"
                yield _problem("too_long", place, message, None)
                continue
            try:
                self.row.validate_python(row, strict=True)
            except ValidationError as error:
                yield from self._problems(place, error, hints)

    def _problems(self, place: list[Any], error: ValidationError, hints: Hints) -> Iterator[dict[str, Any]]:
        """Say pydantic's errors in the words of JSON; `place` goes in front of each `loc`."""
        for problem in error.errors(include_url=False, include_context=False):
            kind, message, given = problem["type"], problem["msg"], problem["input"]
            if kind == "extra_forbidden":
                message = hints.add("Unknown feature", str(problem["loc"][-1]), self.names)
            elif kind == "literal_error":
                choices = self.features[str(problem["loc"][-1])].choices or []
                message = hints.add("Input is none of the choices", given, choices)
            elif kind == "dict_type":
                message = "Input should be an object" + (" or an array of objects" if place == ["body"] else "")
            elif kind == "missing":
                given = None  # not the whole row, once for each feature that it lacks
            yield _problem(kind, [*place, *problem["loc"]], message, given)


class Hints:
    """The suggestions of one answer, of which only its first problems get one, and each name is looked up once."""

    def __init__(self) -> None:
        self._left = MAX_HINTS
        self._nearest = functools.cache(nearest)

    def add(self, message: str, name: Any, names: Sequence[Any]) -> str:
        """Return a message with what `name` should have been, as long as there are suggestions left."""
        if self._left == 0:
            return message
        self._left -= 1
        return f"{message}; {self._nearest(name, tuple(names))}"


def name_columns(inputs: Inputs, features: Iterable[str], row: Iterable[str] = ()) -> dict[str, Column | None]:
    """Name the estimator's columns: as it was fitted, else x0, x1, …, or else in the order of the settings.

    `row` has the names for an estimator that does not even say how many it takes.
    """
    given = list(features) or (list(row) if inputs.columns is None else [])
    if inputs.columns is None:
        if not given:
            raise ModelError("does not say how many features it takes; name them in [features], in its order")
        return dict.fromkeys(given, Column())
    made = ["text"] if inputs.form == "texts" else [f"x{column}" for column in range(len(inputs.columns))]
    names = inputs.names or made
    if inputs.names is None and not set(given) <= set(made):
        used = [name for name, column in zip(made, inputs.columns, strict=True) if column is not None]
        if len(given) != len(used):
            problem = f"names {len(given)} features, {listed(given)}; the model takes {len(used)}: {listed(used)}"
            raise MisfitError((("features",), problem))
        new = dict(zip(used, given, strict=True))
        names = [new.get(name, name) for name in made]
    return dict(zip(names, inputs.columns, strict=True))


def _refuse_contradictions(columns: Mapping[str, Column], features: Mapping[str, FeatureSettings]) -> None:
    """Raise `MisfitError` where settings and estimator differ, and `ModelError` where its own parts do."""
    for name in features.keys() - columns.keys():
        raise MisfitError((("features", name), f"is not about a feature of the model; {nearest(name, columns)}"))
    for name in [name for name, column in columns.items() if column.choices == ()]:
        raise ModelError(f"has parts that know no category of {name!r} in common, so that it can answer none")
    problems = [
        (("features", name, key), f"is {shorten(getattr(given, key))!r}; the model takes {allowed} there")
        for name, given in features.items()
        for key, allowed in _find_contradictions(given, columns[name])
    ]
    if problems:
        raise MisfitError(*problems)


def _find_contradictions(given: FeatureSettings, column: Column) -> Iterator[tuple[str, str]]:
    """Give each key of a feature's settings that the estimator contradicts, with what it takes."""
    if given.type and column.type and given.type != column.type and "str" in (given.type, column.type):
        yield "type", f"{column.type!r}"
    if given.missing and column.missing is False:
        yield "missing", "no missing value"
    if column.choices is None:
        return
    for key in ("ge", "le"):
        if getattr(given, key) is not None:
            yield key, f"only {listed(column.choices)}"
    if not set(given.choices or ()) <= set(column.choices):
        yield "choices", f"only {listed(column.choices)}"


def _complete(name: str, column: Column, given: FeatureSettings, row: Mapping[str, Any]) -> FeatureSettings:
    """Put together what settings, estimator and a known row say of a feature. Raises `MisfitError`."""
    texts = bool(given.choices) and all(isinstance(choice, str) for choice in given.choices or ())
    said = {
        "type": column.type or ("str" if texts else "float"),
        "choices": _choices_of(column, given.type),
        "missing": bool(column.missing),
        **given.model_dump(exclude_none=True, exclude={"example"}),
    }
    try:
        feature = FeatureSettings.model_validate(said)
    except ValidationError as error:
        problem = f"does not fit the model: it should {should(error.errors()[0])}"
        raise MisfitError((("features", name), problem)) from None
    if given.example is not None:
        example = _check_example(name, given, feature)
    else:
        example = next(_fitting([row.get(name), column.example, *(feature.choices or ())], feature), None)
    return feature.model_copy(update={"example": example})


def _cells_getter(names: Sequence[str]) -> Callable[[dict[str, Any]], Sequence[Any]]:
    """Give what takes the cells out of a row; of one alone `itemgetter` makes no tuple."""
    return operator.itemgetter(*names) if len(names) > 1 else lambda row: [row[name] for name in names]


def _find_bounds(features: Sequence[FeatureSettings]) -> tuple[Array, Array] | None:
    """Give the bounds of features, (n_features,) each, if all are floats between bounds."""
    if any(feature.type != "float" or feature.choices is not None for feature in features):
        return None
    limit = LIMITS["float"]
    low = [-limit if feature.ge is None else feature.ge for feature in features]
    return np.array(low), np.array([limit if feature.le is None else feature.le for feature in features])


def _choices_of(column: Column, kind: str | None) -> list[Cell] | None:
    """Give the values that the estimator knows, as truths where the settings say that 0 and 1 are."""
    if column.choices is None:
        return None
    truths = kind == "bool" and set(column.choices) <= {0, 1}
    return [bool(choice) if truths else choice for choice in column.choices]


def _check_example(name: str, given: FeatureSettings, feature: FeatureSettings) -> Any:
    cell: TypeAdapter[Any] = TypeAdapter(_cell_type(feature))
    example: Any = given.example
    is_text = isinstance(example, str) and given._is_variable
    try:
        return cell.validate_strings(example) if is_text else cell.validate_python(example, strict=True)
    except ValidationError as error:
        problem = f"is {example!r}; it should {should(error.errors()[0])}"
        raise MisfitError((("features", name, "example"), problem)) from None


def _fitting(values: Iterable[Any], feature: FeatureSettings) -> Iterator[Any]:
    for value in values:
        with contextlib.suppress(ValidationError):
            if value is not None:
                yield TypeAdapter(_cell_type(feature)).validate_python(value, strict=True)


def _some_value(feature: FeatureSettings) -> Cell:
    """Give a feature's example, or the value nearest to nothing that its bounds admit."""
    kind = FEATURE_TYPES[feature.type or "float"]
    value: Cell = kind()
    if feature.example is not None:
        value = feature.example
    elif feature.ge is not None and feature.ge > 0:
        value = kind(feature.ge)
    elif feature.le is not None and feature.le < 0:
        value = kind(feature.le)
    return value


def _import_pandas() -> Any:
    """Import pandas, which only estimators fitted on named, mixed columns need. Raises `ModelError`."""
    try:
        import pandas
    except ImportError:
        hint = "install pandas: pip install -r requirements-pandas.txt"
        problem = (
            "takes a DataFrame: it was fitted on one, with more than numbers in it or code that is not scikit-learn's"
        )
        raise ModelError(f"{problem}; {hint}") from None
    return pandas


def _find_repeated(pairs: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    given: dict[str, list[str]] = {}
    for name, value in pairs:
        given.setdefault(name, []).append(value)
    for name, values in given.items():
        if len(values) > 1:
            yield _problem("repeated", ["query", name], "Give this parameter once", values)


def _problem(kind: str, loc: list[Any], message: str, given: Any) -> dict[str, Any]:
    return {"type": kind, "loc": loc, "msg": message, "input": shorten(given)}


def _row_type(cells: dict[str, Any]) -> Any:
    row = make_typed_dict("Features", cells)
    row.__pydantic_config__ = ConfigDict(extra="forbid")
    return row


def _cell_type(feature: FeatureSettings) -> Any:
    """Give the pydantic type of one feature's value."""
    kind = FEATURE_TYPES[feature.type or "float"]
    extra: dict[str, Any] = {"unit": feature.unit} if feature.unit else {}
    cell: dict[str, Any] = {"examples": [feature.example]} if feature.example is not None else {}
    if limit := LIMITS.get(feature.type or "float"):
        cell["ge"] = -limit if feature.ge is None else feature.ge
        cell["le"] = limit if feature.le is None else feature.le
    if kind is float:
        cell["allow_inf_nan"] = False
    if feature.choices is not None:
        cell = {"examples": cell["examples"]} if "examples" in cell else {}
        kind = _choice_type(kind, feature.choices)
    return Annotated[kind | None if feature.missing else kind, Field(**cell, json_schema_extra=extra)]


def _choice_type(kind: type, choices: list[Cell]) -> Any:
    """Give the type of one of some values. Python's `Literal` knows no floats, nor 1 from true, and lists all choices
    in each of its errors."""
    known, shown = frozenset(choices), listed(choices)

    def check(value: Any) -> Any:
        if value not in known:
            raise PydanticCustomError("literal_error", "Input should be one of {choices}", {"choices": shown})
        return value

    return Annotated[kind, AfterValidator(check), WithJsonSchema({"type": JSON_TYPES[kind], "enum": choices})]


class Arrays:
    """Checked rows as the estimator takes them: X of shape (n_samples, n_features), a DataFrame, or texts.

    Raises `ModelError` where a DataFrame is needed without pandas.
    """

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.order = list(contract.columns)  # the columns of X
        features = contract.features
        used = {name: column for name, column in contract.columns.items() if column is not None}
        objects = any(features[name].type == "str" or column.is_object for name, column in used.items())
        inputs = contract.inputs
        self.form = "frame" if objects and inputs.names and inputs.form == "array" else inputs.form
        self.are_numbers = not objects and not contract.nullable and contract.names == self.order
        self._dtype = object if objects else np.float64
        self._bounds = _find_bounds([*features.values()]) if self.are_numbers else None
        names = b"".join(b'"%b"' % name.encode() for name in self.order)
        self._marks = {mark: names.count(mark) for mark in b'"uf'}  # which strings, true and false have
        self._cells = _cells_getter(self.order)
        self._nulls = {name: column.null for name, column in used.items()}
        if self.form == "frame":
            self._pandas = _import_pandas()
            self._dtypes = {name: self._column_dtype(name, column) for name, column in contract.columns.items()}
        elif not objects:  # None becomes NaN by itself, which any null is but a number
            numbers = {name: null for name, null in self._nulls.items() if isinstance(null, int | float)}
            self._nulls = {name: null for name, null in numbers.items() if not is_nan(null)}

    def of_rows(self, rows: Rows) -> Any:
        """Return X for checked rows, with a column for each of `order`; or a list of texts."""
        if self.are_numbers:
            return self._of_numbers(rows)
        if self.form == "texts":
            return [row[self.order[0]] for row in rows]
        if self._nulls:
            rows = [row | {name: null for name, null in self._nulls.items() if row[name] is None} for row in rows]
        if self.form == "frame":
            columns = {name: [row.get(name) for row in rows] for name in self.order}
            series = {name: self._pandas.Series(columns[name], dtype=self._dtypes[name]) for name in self.order}
            return self._pandas.DataFrame(series)
        X = np.array([[row.get(name) for name in self.order] for row in rows], dtype=self._dtype)
        return X.reshape(len(rows), len(self.order))

    def of_numbers_in(self, body: bytes) -> Array | None:
        """Return X for a JSON array of rows, where all that a row may have is floats; None if one may not fit.

        It takes half the time of checking each cell, because it counts bytes: if every row has all features, and the
        body has exactly as many quotes and letters "u" and "f" as their names need, then it holds no other key, no
        repeated key, no string and no boolean.
        """
        if self._bounds is None or b"\\" in body:
            return None
        try:
            rows = jiter.from_json(body, allow_inf_nan=False, cache_mode="keys")
            if len(rows) * len(self.order) > len(body):
                return None  # which would have room made for more cells than there can be
            X = self._of_numbers(rows)
        except (ValueError, TypeError, KeyError, OverflowError):
            return None
        marks = np.frombuffer(body, np.uint8)
        if any(np.count_nonzero(marks == mark) != len(X) * number for mark, number in self._marks.items()):
            return None
        low, high = self._bounds
        return X if ((low <= X) & (high >= X)).all() else None

    def _of_numbers(self, rows: Rows) -> Array:
        cells = itertools.chain.from_iterable(map(self._cells, rows))
        return np.fromiter(cells, np.float64, len(rows) * len(self.order)).reshape(len(rows), len(self.order))

    def join(self, parts: list[Any]) -> Any:
        """Return the X of all rows, which are in parts."""
        if self.form == "texts":
            return [*itertools.chain.from_iterable(parts)]
        return self._pandas.concat(parts, ignore_index=True) if self.form == "frame" else np.concatenate(parts)

    def _column_dtype(self, name: str, column: Column | None) -> Any:
        """Return the type of a DataFrame's column, as the estimator was fitted; one that it drops can be of any."""
        if column is None or column.is_object:
            return "object"
        feature = self.contract.features[name]
        kind = column.type or feature.type
        if column.null is self._pandas.NA:
            return {"float": "Float64", "int": "Int64", "bool": "boolean"}.get(kind or "", "object")
        if column.is_category and feature.choices is not None:
            return self._pandas.CategoricalDtype(feature.choices)
        if feature.missing and is_nan(column.null) and kind == "int":
            return "float64"
        return {"float": "float64", "int": "int64", "bool": "object" if feature.missing else "bool"}.get(
            kind or "", "object"
        )


def vary(rows: Rows, contract: Contract, n_rows: int, edges: Mapping[str, list[float]] | None = None) -> Rows:
    """Make up rows around some, which are the same each time, and all within what the contract admits.

    A third of them has numbers with as many decimals as the known rows have, and a third with one more, for on such a
    grid distances are equal and thresholds are met; `edges` are numbers at which the estimator may turn.
    """
    edges = edges or {}
    random = np.random.default_rng(0)
    varied = [dict(rows[random.integers(len(rows))]) for _ in range(n_rows)]
    for name, feature in contract.features.items():
        cells = feature.choices or [row[name] for row in rows if row[name] is not None] or [_some_value(feature)]
        for index, row in enumerate(varied):
            drawn = random.random()
            if feature.missing and drawn < 0.1:
                row[name] = None
            elif name in edges and drawn < 0.3:
                row[name] = _within(edges[name][random.integers(len(edges[name]))], feature)
            elif drawn < 0.8:
                row[name] = _vary_cell(cells, feature, random, index % 3)
    return varied


def _vary_cell(cells: list[Any], feature: FeatureSettings, random: np.random.Generator, rounding: int) -> Any:
    """Give a choice of a feature, or a text that may be unknown, or a number near those that are known."""
    cell = cells[random.integers(len(cells))]
    if feature.choices is not None:
        return cell
    if feature.type == "bool":
        return bool(random.integers(2))
    if feature.type == "str":
        return cell + "?" * int(random.integers(2))
    # Of one row alone it is not known how far its numbers spread.
    spread = float(np.std(np.array(cells, float))) or (abs(cell) or 1.0) * 10 ** random.uniform(-1, 3)
    decimals = len(repr(float(cell)).partition(".")[2])
    value = float(cell + spread * random.normal())
    return _within(round(value, decimals + rounding - 1) if rounding else value, feature)


def _within(value: float, feature: FeatureSettings) -> float:
    limit = LIMITS[feature.type or "float"]
    low, high = -limit if feature.ge is None else feature.ge, limit if feature.le is None else feature.le
    value = min(max(value, low), high)
    return int(value) if feature.type == "int" else value


# Predictor ------------------------------------------------------------------------------------------------------------

Tree = Any  # of an answer: dicts by name and lists, with a column of shape (n_samples,) at each end


def prepare(estimator: Any, arrays: Arrays, outputs: Sequence[str] = ()) -> Predictor:
    """Return the predictor of a fitted estimator, which is changed to take rows as `arrays` makes them.

    `outputs` names the outputs of an estimator that has several, which else are y0, y1, …
    """
    for part in find_parts(estimator):
        if getattr(part, "n_jobs", None) is not None or _takes_all_cores(part):
            part.n_jobs = 1  # the cores are the workers'
    if arrays.contract.inputs.names is not None and arrays.form != "frame":
        strip_feature_names(estimator)
    predictor = Predictor(estimator, outputs, assume_finite=arrays.are_numbers and _keeps_numbers(estimator))
    return predictor.with_graph(estimator.open) if isinstance(estimator, GraphFile) else predictor


def strip_feature_names(estimator: Any) -> None:
    """Make an estimator take X without names, of which scikit-learn would warn at each call."""
    for part in find_parts(estimator):
        vars(part).pop("feature_names_in_", None)
        if positions := vars(part).get("_transformer_to_input_indices"):  # a ColumnTransformer selects by name
            part.transformers_ = [(name, branch, positions[name]) for name, branch, _ in part.transformers_]


def _keeps_numbers(estimator: Any) -> bool:
    """Return whether no part of an estimator could make NaN or infinity of numbers before another one checks them."""
    return not any(hasattr(part, "transform") or _is_opaque(part) for part in find_parts(estimator))


class Graph(Protocol):
    """What answers X in an estimator's place."""

    how: str  # the way in which it was made

    def __call__(self, X: Any) -> tuple[Any, Any]:
        """Return predictions and scores as the estimator would."""


class GraphFile:
    """A graph that came as a file, in an estimator's place.

    `inputs` are its features, and `score` is what its scores are, if it has any.
    """

    inputs: Inputs
    score: str | None = None

    def open(self, predictor: Predictor, takes_one: bool = False) -> Graph:
        """Return what answers for a predictor; `takes_one` row at a time, or many."""
        raise NotImplementedError

    def judge(self, predictor: Predictor, arrays: Arrays, known: Rows) -> tuple[str | None, bool]:
        """Return what its scores are, and whether it takes one row at a time. Raises `ModelError`."""
        raise NotImplementedError


class Predictor:
    """A fitted estimator that answers rows, as `prepare` makes it. Nothing changes it.

    `assume_finite` tells scikit-learn not to look for NaN and infinity in X.
    """

    graph: Graph | None = None  # what answers in the estimator's place

    def __init__(self, estimator: Any, outputs: Sequence[str] = (), assume_finite: bool = False) -> None:
        self.estimator = estimator
        self.outputs = list(outputs)
        by_output = _find_classes(estimator)
        self.classes = by_output[0] if len(by_output) == 1 else None
        self.classes_by_output = by_output if len(by_output) > 1 else []
        self.score, self.method = self._find_score()
        self._decides_by_pair = self.score == "decision" and _decides_by_pair(estimator)
        is_plain = type_of(self.classes or ()) is not None and not any(
            "\0" in str(label) for label in self.classes or ()
        )
        self._labels = np.array(self.classes, dtype=None if is_plain else object)  # numpy's texts lose a last NUL
        self._keys = [_as_key(label) for label in self.classes or []]
        self._tie = _find_tie(estimator) if self.score == "probabilities" and self.classes is not None else None
        self._assume_finite = assume_finite
        self._templates: dict[int, bytes] = {}  # of an answer's JSON, by the number of its values

    def with_graph(self, make: Callable[[Predictor], Graph], score: str | None = None) -> Predictor:
        """Return a predictor that answers by a graph, which is made for it.

        `score` is what the graph's scores are, where only its values say it. Raises `ModelError`.
        """
        other = copy.copy(self)
        other._templates = {}
        other.score = score or self.score
        other.graph = make(other)
        return other

    def _find_score(self) -> tuple[str | None, str]:
        """Name what the estimator says besides its prediction, and the method for it."""
        if isinstance(self.estimator, GraphFile):
            return self.estimator.score, ""
        if kind_of(self.estimator) == "outlier_detector":
            scores = {"score": "decision_function"}
        else:
            scores = {"probabilities": "predict_proba", "decision": "decision_function"}
        found = ((name, method) for name, method in scores.items() if hasattr(self.estimator, method))
        return next(found, (None, ""))

    def predict(self, X: Any) -> Predictions:
        """Give the answers to the rows of X, n_samples of them, in their order.

        Raises `ModelError` when the settings name another number of outputs than there are.
        """
        with _contained():
            y, scores = self.ask(X)
        y = as_array(y)
        answer: Tree = {"prediction": self._name_outputs(y)}
        if self.score is not None:
            answer[self.score] = self._name_scores(scores, several=y.ndim == 2)
        columns = [*_leaves(answer)]
        lengths = {*map(len, columns)}
        if lengths != {len(X)}:
            raise ModelError(f"gives {listed([*lengths])} answers to {len(X)} rows")
        # The same columns are named alike in each call.
        if len(columns) not in self._templates:
            self._templates[len(columns)] = _write_template(answer)
        return Predictions(self._templates[len(columns)], columns)

    def ask(self, X: Any) -> tuple[Any, Any]:
        """Return what the estimator, or a graph in its place, predicts for X, and its scores, or None without any."""
        if self.graph is not None:
            return self.graph(X)
        if not self._assume_finite:
            return self._ask(X)
        before = sklearn.get_config()["assume_finite"]
        sklearn.set_config(assume_finite=True)  # of this thread, in a fraction of the time of `config_context`
        try:
            return self._ask(X)
        finally:
            sklearn.set_config(assume_finite=before)

    def _ask(self, X: Any) -> tuple[Any, Any]:
        scores: Any = getattr(self.estimator, self.method)(X) if self.score else None
        labels = None if self._tie is None else _likeliest(scores, self._tie)
        return self.estimator.predict(X) if labels is None else self._labels[labels], scores

    def _name_outputs(self, y: Array) -> Tree:
        """Give y, of shape (n_samples,) or (n_samples, n_outputs), with the names of several outputs."""
        n_outputs = y.shape[1] if y.ndim == 2 else 1
        if self.outputs and y.ndim == 1:
            raise ModelError("has a single output, which goes without a name; set model.outputs = []")
        if self.outputs and len(self.outputs) != n_outputs:
            raise ModelError(f"has {n_outputs} outputs, but model.outputs names {len(self.outputs)}")
        return _name_columns_of(y, self.outputs or [f"y{output}" for output in range(n_outputs)])

    def _name_scores(self, scores: Any, several: bool) -> Tree:
        """Give what `predict_proba` or `decision_function` gave, with the names of outputs or classes."""
        if isinstance(scores, list) and len(scores) == len(self.classes_by_output):
            return self._name_outputs_scores([as_array(output, squeeze=False) for output in scores])
        scores = scores[0] if isinstance(scores, list) else scores
        scores = as_array(scores, squeeze=several or self.score != "probabilities")
        if several:
            return self._name_outputs(scores)
        if scores.ndim == 2 and (len(self._keys or scores.T) != scores.shape[1] or self._decides_by_pair):
            return list(scores.T)
        return _name_columns_of(scores, self._keys or [str(column) for column in range(scores.shape[-1])])

    def _name_outputs_scores(self, scores: list[Array]) -> Tree:
        """Give for each output: of a label that is there or not its probability, else those of each class."""
        is_multilabel = all(set(labels) <= {0, 1} for labels in self.classes_by_output)
        tree: dict[str, Tree] = {}
        for output, (columns, labels) in enumerate(zip(scores, self.classes_by_output, strict=True)):
            name = self.outputs[output] if self.outputs else f"y{output}"
            if is_multilabel:
                tree[name] = columns[:, labels.index(1)] if 1 in labels else np.zeros(len(columns))
            else:
                tree[name] = _name_columns_of(columns, [_as_key(label) for label in labels])
        return tree


ALL = slice(None)


class Predictions:
    """The answers to n_samples rows, or to a part of the rows of a call.

    `template` is the JSON of one answer, with a hole for a value of each of the columns, (n_samples,) each.
    """

    __slots__ = ("_all_columns", "_rendered", "_rows", "template")

    def __init__(self, template: bytes, columns: list[Array], of: Predictions | None = None, rows: slice = ALL) -> None:
        self.template = template
        self._all_columns = columns
        self._rows = rows
        self._rendered: list[bytes] = of._rendered if of else []  # of all rows of the call, once any is rendered

    def part(self, start: int, stop: int) -> Predictions:
        """Return the answers to some of the rows. All parts share what is rendered."""
        return Predictions(self.template, self._all_columns, self, slice(start, stop))

    @property
    def columns(self) -> list[Array]:
        """The values of each hole, (n_samples,) each."""
        return [column[self._rows] for column in self._all_columns]

    def render(self) -> list[bytes]:
        """Return the JSON of each answer."""
        if not self._rendered:
            try:
                self._rendered += self._write(self._all_columns)
            except ValueError:  # a text of another part is no Unicode
                return self._write(self.columns)
        return self._rendered[self._rows]

    def render_array(self, n_rows: int) -> list[bytes]:
        """Return the JSON of an array of the answers, in pieces of `PIECE_ROWS` rows each."""
        pieces: list[bytes] = []
        for start in range(0, n_rows, PIECE_ROWS):
            answers = self._write([column[start : start + PIECE_ROWS] for column in self.columns])
            answers[0] = (b"," if pieces else b"[") + answers[0]
            if start + PIECE_ROWS >= n_rows:
                answers[-1] += b"]"
            pieces.append(b",".join(answers))
        return pieces

    def _write(self, columns: list[Array]) -> list[bytes]:
        return [self.template % row for row in zip(*map(_write_values, columns), strict=True)]


def _leaves(answer: Tree) -> Iterator[Array]:
    """Yield the columns of an answer in the order of its template's holes."""
    if isinstance(answer, dict | list):
        for inner in answer.values() if isinstance(answer, dict) else answer:
            yield from _leaves(inner)
    else:
        yield answer


def _write_template(answer: Tree) -> bytes:
    if isinstance(answer, dict):
        items = [_write_text(name).replace(b"%", b"%%") + b":" + _write_template(item) for name, item in answer.items()]
        return b"{" + b",".join(items) + b"}"
    if isinstance(answer, list):
        return b"[" + b",".join(map(_write_template, answer)) + b"]"
    return b"%b"


def _write_values(column: Array) -> list[bytes]:
    """Give the JSON of each value; what JSON cannot say of a float becomes null."""
    values = column.tolist()
    if column.dtype.kind in "biuf":
        return to_json(values, inf_nan_mode="null", fallback=str)[1:-1].split(b",")
    if column.dtype.kind == "U" and column.itemsize <= 4 * MAX_NAME:
        return [*map(_write_text, values)]
    return [
        _write_text(value)
        if type(value) is str and len(value) <= MAX_NAME
        else to_json(value, inf_nan_mode="null", fallback=str)
        for value in values
    ]


@functools.lru_cache(maxsize=10_000)
def _write_text(text: str) -> bytes:
    return to_json(text)


LIKELIEST: dict[str, float] = {
    # Classifiers whose `predict` gives the class of the highest probability, by the names in scikit-learn 1.9: some by
    # that very comparison, the others by one of what probabilities are made of, so that rounding may decide those that
    # are nearer to each other than this.
    "BaseDecisionTree": 0.0,
    "ForestClassifier": 0.0,
    "BaggingClassifier": 0.0,
    "CalibratedClassifierCV": 0.0,
    "LogisticRegression": 1e-9,
    "LinearDiscriminantAnalysis": 1e-9,
    "QuadraticDiscriminantAnalysis": 1e-9,
    "GradientBoostingClassifier": 1e-9,
    "HistGradientBoostingClassifier": 1e-9,
    "_BaseNB": 1e-9,
}


def _find_tie(estimator: Any) -> float | None:
    """Give how near two probabilities may be that `predict` may tell apart; None where it does not go by them."""
    if not type(estimator).__module__.startswith("sklearn."):
        return None
    inner = estimator.steps[-1][1] if hasattr(estimator, "steps") else getattr(estimator, "best_estimator_", None)
    if inner is not None:
        return _find_tie(inner)
    own = [kind.__name__ for kind in type(estimator).__mro__]
    return next((LIKELIEST[name] for name in own if name in LIKELIEST), None)


def _likeliest(scores: Any, tie: float) -> Any:
    """Give the column with the highest score of each row, (n_samples,); None if in one of them two are a tie."""
    likeliest = scores.argmax(axis=1)
    if tie:
        highest = scores[np.arange(len(scores)), likeliest]
        if np.count_nonzero(scores >= highest[:, None] - tie) != len(scores):
            return None
    return likeliest


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Make a plain error of what would end the process, the task or the iteration in which an estimator runs."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            raise
        raise RuntimeError(f"it raised {reason_of(error)}") from error


_limited = threading.local()


def limit_threads(n_threads: int) -> None:
    """Give OpenMP and BLAS so many threads. OpenMP counts them for each thread that calls it, so each must ask."""
    if getattr(_limited, "n_threads", None) != n_threads:
        threadpoolctl.threadpool_limits(n_threads)
        _limited.n_threads = n_threads


def _takes_all_cores(part: Any) -> bool:
    """Whether an `n_jobs` of None, which is 1 to scikit-learn, is every core: to LightGBM and XGBoost."""
    return hasattr(part, "n_jobs") and not type(part).__module__.startswith("sklearn.")


def kind_of(estimator: Any) -> str | None:
    """Name the kind of an estimator as scikit-learn does: "classifier", "regressor", "clusterer", …"""
    return sklearn.utils.get_tags(estimator).estimator_type if isinstance(estimator, BaseEstimator) else None


def _find_classes(estimator: Any) -> list[list[Any]]:
    """Give the classes of each output; none of an estimator that is no classifier."""
    classes = getattr(estimator, "classes_", None)
    if classes is None:
        return []
    several = isinstance(classes, list) and all(np.ndim(labels) == 1 for labels in classes)
    return [as_array(labels).tolist() for labels in (classes if several else [classes])]


def _decides_by_pair(estimator: Any) -> bool:
    """Whether decision values are those of a support vector machine for each pair of its classes."""
    if hasattr(estimator, "steps"):
        return _decides_by_pair(estimator.steps[-1][1])
    inner = [getattr(estimator, name) for name in ("best_estimator_", "estimator_") if hasattr(estimator, name)]
    return _decides_by_pair(inner[0]) if inner else getattr(estimator, "decision_function_shape", "ovr") == "ovo"


def refuse_no_predictor(estimator: Any) -> None:
    if isinstance(estimator, type):
        raise ModelError(f"holds the class {estimator.__name__}; fit an instance of it, then save that")
    kind = type(estimator).__name__
    if not callable(getattr(estimator, "predict", None)):
        raise ModelError(f"holds a {kind}, which has no predict(); save a fitted estimator that has")
    try:
        check_is_fitted(estimator)
    except NotFittedError:
        if hasattr(estimator, "__sklearn_tags__"):  # without which scikit-learn 1.6 takes anything for not fitted
            raise ModelError(f"holds a {kind} that is not fitted; fit it, then save it") from None
    except (TypeError, AttributeError):
        pass  # something that predicts without having been fitted by scikit-learn's rules


def as_array(values: Any, squeeze: bool = True) -> Array:
    """Give what an estimator returned, pandas and sparse too, as an array whose `tolist` JSON can say."""
    array = np.asarray(values.toarray() if hasattr(values, "toarray") else values)
    if array.dtype.kind == "M":
        array = array.astype("datetime64[us]")  # in nanoseconds tolist gives integers
    if array.dtype.kind == "O":
        plain = np.empty(array.shape, dtype=object)
        for index, item in np.ndenumerate(array):
            plain[index] = item if type(item) is str else _as_plain(item)
        array = plain
    return array[:, 0] if squeeze and array.ndim == 2 and array.shape[1] == 1 else array


def _as_key(label: Any) -> str:
    """Write a class as a key of a JSON object: as in a value, without the quotes."""
    return label if isinstance(label, str) else to_json(label, fallback=str).decode().strip('"')


def _as_plain(item: Any) -> Any:
    pandas = sys.modules.get("pandas")  # without which there are no missing values of its own
    if pandas is not None and pandas.isna(item) is True:
        return None
    return item.item() if isinstance(item, np.generic) else item


def _name_columns_of(array: Array, names: Sequence[str]) -> Tree:
    return array if array.ndim == 1 else dict(zip(names, array.T, strict=True))


# ONNX -----------------------------------------------------------------------------------------------------------------

USE_SKLEARN = 'set model.runtime = "sklearn"'
ONNX_TYPES: dict[str, tuple[str, Any]] = {  # of an input: the feature's type, and numpy's
    "tensor(double)": ("float", np.float64),
    "tensor(float)": ("float", np.float32),
    "tensor(int64)": ("int", np.int64),
    "tensor(bool)": ("bool", np.bool_),
    "tensor(string)": ("str", object),
}
OPSETS = {"": 21, "ai.onnx.ml": 3}  # the newest that each converter of skl2onnx 1.20 keeps to
TOLERANCE = 1e-5  # within which numbers agree, and two classes are tied
N_VARIED = 400  # made-up rows with which the runtimes are compared


def _import_onnx(name: str) -> Any:
    """Import one of the packages that only ONNX needs. Raises `ModelError`.

    From 1.29 on ONNX Runtime starts a thread when it is imported, which reports to its makers, and for which a worker
    that is forked later waits without end when it exits.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        hint = "pip install -r requirements-onnx.txt"
        raise ModelError(f"needs {package} to run in ONNX Runtime, which fails to import ({error}); {hint}") from None


def open_session(graph: bytes) -> Any:
    """Open a graph in ONNX Runtime, without any thread: one made in gunicorn's master then answers in its workers."""
    onnxruntime = _import_onnx("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # fatal: what goes wrong is raised too
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class OnnxModel:
    """An ONNX graph in a predictor's service: called with X, it gives y and scores as the estimator would.

    `how` says which inputs it takes; one that `takes_one` row is asked row by row. Raises `ModelError` when it lacks an
    output.
    """

    def __init__(self, session: Any, predictor: Predictor, how: str = "", takes_one: bool = False) -> None:
        outputs = getattr(predictor.estimator, "outputs", None)  # of a file, in whatever order they are
        outputs = outputs or [output.name for output in session.get_outputs()][: 1 if predictor.score is None else 2]
        if predictor.score is not None and len(outputs) < 2:
            raise ModelError(f"has no {predictor.score} in its graph")
        self.how = how
        self._run = session.run
        self._outputs = outputs
        self._inputs = [(item.name, ONNX_TYPES[item.type][1]) for item in session.get_inputs()]
        self._takes_one = takes_one
        self._is_file = isinstance(predictor.estimator, OnnxArtifact)
        classes = None if self._is_file else getattr(predictor.estimator, "classes_", None)
        self._by_output = [len(labels) for labels in predictor.classes_by_output]
        self._labels = None if classes is None else np.asarray(classes[0] if self._by_output else classes).dtype
        self._is_pair = predictor.score == "decision" and len(predictor.classes or ()) == 2
        self._is_share = predictor.score == "probabilities"

    def __call__(self, X: Any) -> tuple[Any, Any]:
        y, scores = self.ask(X)
        y = y[:, 0] if y.shape[1] == 1 else y
        return self._to_labels(y), None if scores is None else self._to_scores(scores)

    def ask(self, X: Any) -> tuple[Any, Any]:
        """Return predictions and scores as the graph gives them, (n_samples, n) each; scores are None without any.

        A graph that was made for one row is asked row by row.
        """
        if not self._takes_one:
            return self._ask(X)
        answers = [self._ask(X[row : row + 1]) for row in range(len(X))]
        y, scores = zip(*answers, strict=True)
        return np.concatenate(y), None if scores[0] is None else np.concatenate(scores)

    def _ask(self, X: Any) -> tuple[Any, Any]:
        y, *scores = self._run(self._outputs, self._feed(X))
        if self._by_output or not scores:
            return _by_row(y, len(X)), scores[0] if scores else None
        columns = [_by_row(output, len(X)) for output in scores]
        return _by_row(y, len(X)), columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)

    def _feed(self, X: Any) -> dict[str, Any]:
        if len(self._inputs) == 1:
            name, dtype = self._inputs[0]
            return {name: np.asarray(X, dtype)}
        columns = X.T if isinstance(X, np.ndarray) else [column for _, column in X.items()]
        pairs = zip(self._inputs, columns, strict=True)
        return {name: np.asarray(column, dtype).reshape(-1, 1) for (name, dtype), column in pairs}

    def _to_labels(self, y: Any) -> Any:
        """Give predictions in the type of the classes, which ONNX knows as integers or strings only."""
        if self._labels is not None:
            return y.astype(self._labels, copy=False)
        return y.astype(np.float64) if y.dtype == np.float32 else y

    def _to_scores(self, scores: Any) -> Any:
        if self._by_output:
            pairs = zip(scores, self._by_output, strict=True)
            return [np.minimum(output[:, :n_classes], 1.0, dtype=np.float64) for output, n_classes in pairs]
        scores = np.asarray(scores, np.float64)
        if self._is_share:
            scores = np.minimum(scores, 1.0)  # above which the float32 sum over a forest's trees may be
            if self._is_file:  # in which nothing but this says of a row that float32 made nothing of its probabilities
                scores = np.maximum(scores, 0.0)
                scores[np.abs(scores.sum(axis=1) - 1) > SHARES_TOLERANCE] = np.nan
            return scores
        return scores[:, -1] if scores.shape[1] == (2 if self._is_pair else 1) else scores


def _by_row(values: Any, n_rows: int) -> Any:
    """Return an output with one row for each of X: some operators lay it down. Raises `ModelError` if it has not."""
    if values.ndim == 2 and len(values) == n_rows:
        return values
    if values.size % n_rows or sum(size != 1 for size in values.shape) > (1 if n_rows == 1 else 2):
        raise ModelError(f"gives an output of shape {values.shape} for {n_rows} rows")
    return values.reshape(n_rows, -1)


def convert_to_onnx(predictor: Predictor, arrays: Arrays) -> list[Predictor]:
    """Return a predictor for each way to convert an estimator that ONNX Runtime can run, the most exact first.

    Raises `ModelError` if there is none.
    """
    if arrays.form == "texts":  # which ONNX Runtime splits into words by rules of its own, seen in few texts only
        raise ModelError(f"takes texts, which are not run in ONNX Runtime; {USE_SKLEARN}")
    for name in ("onnx", "onnxruntime", "skl2onnx"):
        _import_onnx(name)
    graphs, reasons = [], []
    for how, float_type, estimator in _ways_to_convert(predictor.estimator):
        try:
            with warnings.catch_warnings(action="ignore"):  # of what scikit-learn deprecates and skl2onnx reads
                graph = _convert(estimator, predictor, arrays, float_type)
            graphs.append(predictor.with_graph(functools.partial(OnnxModel, open_session(graph), how=how)))
        except (Exception, SystemExit) as error:  # what converters and ONNX Runtime raise has no bounds
            reasons.append(f"with {how}, {reason_of(error)}")
    if not graphs:
        raise ModelError(f"cannot be converted to ONNX: {'; '.join(reasons)}; {USE_SKLEARN}")
    return graphs


def _ways_to_convert(estimator: Any) -> Iterator[tuple[str, str, Any]]:
    """Give the ways to convert an estimator, most exact first: a name, the type of floats, and what to convert.

    scikit-learn's trees round X to float32 and compare it with float64 thresholds, of which skl2onnx makes float32 ones
    that part all float32 alike. With float64 inputs they would part other rows, so what is before them is rounded.
    Those of histogram boosting do not round X, so that with float32 inputs they would part other rows.
    """
    estimator = getattr(estimator, "best_estimator_", estimator)  # what a search hands everything to
    parts = list(find_parts(estimator))
    if not any(hasattr(part, "tree_") for part in parts):
        yield "float64 inputs", "DoubleTensorType", estimator
    elif steps := getattr(estimator, "steps", ()):
        cast = _import_onnx("skl2onnx.sklapi").CastTransformer(dtype=np.float32)
        rounded = type(estimator)([*steps[:-1], ("cast", cast), steps[-1]])
        yield "float64 inputs and a last step in float32", "DoubleTensorType", rounded
    if not any(hasattr(part, "_predictors") for part in parts):
        yield "float32 inputs", "FloatTensorType", estimator


def _input_types(arrays: Arrays, float_type: str) -> list[tuple[str, Any]]:
    """Give names and types of inputs: one tensor of all features, or one for each where they are not alike."""
    types = _import_onnx("skl2onnx.common.data_types")
    features = arrays.contract.features
    names = {
        name: _tensor_type(features[name], float_type) if name in features else float_type for name in arrays.order
    }
    kinds = {*names.values()}
    if arrays.form == "frame" or len(kinds) > 1:
        return [(name, getattr(types, kind)([None, 1])) for name, kind in names.items()]
    return [("X", getattr(types, kinds.pop())([None, len(names)]))]


def _tensor_type(feature: FeatureSettings, float_type: str) -> str:
    if feature.type == "str":
        return "StringTensorType"
    return "Int64TensorType" if feature.type == "int" and feature.choices is not None else float_type


def _convert(estimator: Any, predictor: Predictor, arrays: Arrays, float_type: str) -> bytes:
    """Convert an estimator with skl2onnx."""
    last = estimator.steps[-1][1] if hasattr(estimator, "steps") else estimator
    wanted = {"zipmap": False} | ({"raw_scores": True} if predictor.score == "decision" else {})
    options = {key: value for key, value in wanted.items() if key in _known_options(last)}
    model = _import_onnx("skl2onnx").to_onnx(
        estimator,
        initial_types=_input_types(arrays, float_type),
        options={id(last): options},
        target_opset=OPSETS,
    )
    _refuse_trees(model.graph)
    if hasattr(last, "_predictors") and float_type == "DoubleTensorType":
        _widen_thresholds(model, last)
    graph: bytes = model.SerializeToString()
    return graph


def _known_options(estimator: Any) -> Iterable[str]:
    """Name the options of a converter, which refuses all others."""
    names = _import_onnx("skl2onnx._supported_operators").sklearn_operator_name_map
    converter = _import_onnx("skl2onnx.common._registration")._converter_pool.get(names.get(type(estimator)))
    return (converter and converter.get_allowed_options()) or ()


def _widen_thresholds(model: Any, boosting: Any) -> None:
    """Put float64 thresholds in the place of skl2onnx's float32 ones: histogram boosting does not round X."""
    onnx = _import_onnx("onnx")
    trees = [tree.nodes for trees in boosting._predictors for tree in trees]
    thresholds = np.concatenate([np.where(nodes["is_leaf"], 0.0, nodes["num_threshold"]) for nodes in trees])
    (node,) = (node for node in model.graph.node if node.op_type.startswith("TreeEnsemble"))
    for attribute in list(node.attribute):
        if attribute.type == onnx.AttributeProto.FLOATS:
            is_threshold = attribute.name == "nodes_values"
            values = thresholds if is_threshold else np.array(attribute.floats, np.float64)
            tensor = onnx.numpy_helper.from_array(values)
            node.attribute.remove(attribute)
            node.attribute.append(onnx.helper.make_attribute(f"{attribute.name}_as_tensor", tensor))
    for opset in model.opset_import:
        if opset.domain == node.domain:
            opset.version = OPSETS[node.domain]  # the first that has such tensors
    for output in model.graph.output:  # which are float32 all the same
        if output.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE:
            output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def find_learnt(estimator: Any, contract: Contract) -> list[dict[str, Any]]:
    """Give rows of those that an estimator keeps of its training, as one of neighbours does."""
    if any(feature.type != "float" for feature in contract.features.values()):
        return []
    kept = [getattr(part, name, None) for part in find_parts(estimator) for name in ("_fit_X", "support_vectors_")]
    rows = [X for X in kept if isinstance(X, np.ndarray) and X.shape[1] == len(contract.names)]
    return [
        {name: _within(cell, contract.features[name]) for name, cell in zip(contract.names, row, strict=True)}
        for X in rows
        for row in X[:: len(X) // N_VARIED + 1].tolist()
    ]


def find_edges(estimator: Any, contract: Contract) -> dict[str, list[float]]:
    """Give the thresholds of trees by the feature that they part, with the float32 on either side of each."""
    edges: dict[str, set[float]] = {}
    order = list(contract.columns)
    for part in find_parts(estimator):
        if (tree := getattr(part, "tree_", None)) is not None and tree.n_features == len(contract.columns):
            for position, threshold in zip(tree.feature.tolist(), tree.threshold.tolist(), strict=True):
                name = order[position]
                if position >= 0 and contract.features[name].type == "float" and math.isfinite(threshold):
                    near = np.float32(threshold)
                    beside = (np.nextafter(near, np.float32(end)) for end in (-np.inf, np.inf))
                    edges.setdefault(name, set()).update((threshold, float(near), *map(float, beside)))
    return {name: sorted(values) for name, values in edges.items()}


def choose_graph(graphs: Sequence[Predictor], predictor: Predictor, arrays: Arrays, known: list[dict[str, Any]]) -> int:
    """Return the position of the first graph that answers known rows, and others around them, as the estimator does.

    Raises `ModelError` if none does, with the row.
    """
    reasons = []
    contract = arrays.contract
    with warnings.catch_warnings(action="ignore"):  # a made-up row may well be worth one
        near = [*known, *find_learnt(predictor.estimator, contract)]
        made_up = near[len(known) :] + vary(near, contract, N_VARIED, find_edges(predictor.estimator, contract))
        rows = [*known, *keep_answered(made_up, predictor, arrays)]
        inputs = [arrays.of_rows(some) for some in (rows, rows[:1])]  # one row goes its own way in some operators
        cases = [(X, predictor.ask(X)) for X in inputs]
        for position, graph in enumerate(graphs):
            way = graph.graph.how if graph.graph else ""
            try:
                found = next(filter(None, (find_disagreement(graph, *case) for case in cases)), None)
            except Exception as error:  # what ONNX Runtime raises has no bounds
                reasons.append(f"with {way} it fails: {reason_of(error)}")
                continue
            if found is None:
                return position
            index, how = found
            reasons.append(f"with {way} it answers row {toml_value(rows[index])} {how}")
    raise ModelError(f"does not agree with scikit-learn in ONNX Runtime: {'; '.join(reasons)}; {USE_SKLEARN}")


def keep_answered(rows: list[dict[str, Any]], predictor: Predictor, arrays: Arrays) -> list[dict[str, Any]]:
    """Leave out the rows for which the estimator fails, as a step of it may for a number that it cannot take."""
    try:
        predictor.ask(arrays.of_rows(rows))
    except Exception:  # what an estimator raises has no bounds
        halves = (rows[: len(rows) // 2], rows[len(rows) // 2 :]) if len(rows) > 1 else ()
        return [row for half in halves for row in keep_answered(half, predictor, arrays)]
    return rows


def find_disagreement(predictor: Predictor, X: Any, expected: tuple[Any, Any]) -> tuple[int, str] | None:
    """Return the first row of X that is not answered as expected, classes exactly and numbers to 1e-5, and how.

    A row to which the estimator itself gives two classes alike may get either: between them decides rounding, which in
    scikit-learn too depends on the order of its sums. Golden rows are held to their class all the same, by `agrees`.
    """
    y, scores = as_array(expected[0]), expected[1]
    given, given_scores = predictor.ask(X)
    if given.shape != y.shape:
        return 0, f"in the shape {given.shape}, scikit-learn in {y.shape}"
    differs = _differs(given, y, None)
    if scores is not None:
        scale = 1.0 if predictor.score == "probabilities" else None
        differs = (differs & ~_are_tied(scores)) | _differs(given_scores, scores, scale)
    if not differs.any():
        return None
    index = int(differs.argmax())
    ours, theirs = _show(given, given_scores, index), _show(y, scores, index)
    return index, f"with {ours}, scikit-learn with {theirs}"


def _differs(given: Any, expected: Any, scale: float | None) -> Any:
    """Say which rows differ, in numbers of which the largest, or `scale`, gives what is nothing but rounding."""
    if isinstance(expected, list):
        pairs = zip(given, expected, strict=True)
        return np.logical_or.reduce([_differs(*pair, scale) for pair in pairs])
    if np.shape(given) != np.shape(expected):
        return np.ones(len(expected), bool)
    differs = np.asarray(given != expected)
    if expected.dtype.kind == "f":
        if scale is None:
            scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
        differs = ~np.isclose(given, expected, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True)
    return differs.reshape(len(expected), -1).any(axis=1)


def _are_tied(scores: Any) -> Any:
    """Say in which rows the two highest scores, or the only one and 0, are alike."""
    if isinstance(scores, list):
        return np.logical_or.reduce([_are_tied(output) for output in scores])
    if scores.ndim == 1 or scores.shape[1] == 1:
        return np.abs(scores).reshape(-1) <= TOLERANCE
    highest = np.sort(scores, axis=1)
    return highest[:, -1] - highest[:, -2] <= TOLERANCE


def _show(y: Any, scores: Any, index: int) -> str:
    """Write the answer to a row for a message."""
    answer = as_array(y)[index : index + 1].tolist()
    if isinstance(scores, list):
        answer += [output[index].tolist() for output in scores]
    elif scores is not None:
        answer += scores[index : index + 1].tolist()
    return repr(shorten(answer))


LABELS = ("label", "output_label")  # names that exporters give to a class, a cluster, or what is an outlier
NUMBERS = ("variable", "GPmean", "predictions", "prediction")  # to what a regressor predicts
SHARES = ("probabilities", "output_probability", "probability")  # to scores of classes, which may be anything
EXTRAS = ("class_labels", "decision_path", "decision_leaf", "score_samples", "GPcovstd", "std")  # to what no answer has
PASSING = {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}  # operators that leave values as they are
LINEAR = PASSING | {"Add", "Sub", "Sum", "Mul", "Neg", "Concat", "Slice", "Split", "Gather", "ArrayFeatureExtractor"}
COMPARING = {"Sign", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"}
DISTRIBUTING = {"Softmax", "Sigmoid", "LogSoftmax", "Normalizer", "LpNormalization"}  # what they give is no prediction
SHARES_TOLERANCE = 1e-3  # within which float32 probabilities of many classes or trees sum to 1
SAVE_ITSELF = "it was not converted as it should be; serve the estimator itself"
LEAVE_OUT = "leave it out, as skl2onnx.helpers.onnx_helper.select_model_inputs_outputs does"


class OnnxArtifact(GraphFile):
    """An ONNX graph that came in an estimator's place. `outputs` names its prediction, and the scores that go with it:
    one output, or one for each class."""

    is_raw = False  # its scores of classes are sums of weights, of which nothing has made probabilities
    is_sure = False  # of which class each score is: its name says so, or one operator gives both labels and scores

    def __init__(self, session: Any, outputs: list[str], classes: Any = None) -> None:
        self.session = session
        self.inputs = _read_graph_inputs(session)
        self.takes_one = any(item.shape[0] == 1 for item in session.get_inputs())  # row, and no more
        self.outputs = outputs
        if classes is not None:
            self.classes_ = classes

    def open(self, predictor: Predictor, takes_one: bool = False) -> Graph:
        return OnnxModel(self.session, predictor, takes_one=takes_one or self.takes_one)

    def judge(self, predictor: Predictor, arrays: Arrays, known: Rows) -> tuple[str | None, bool]:
        """Name its scores by their values for known rows and others around them, and find out whether it answers many
        rows at once. Raises `ModelError` where the values fit no name."""
        model = OnnxModel(self.session, predictor, takes_one=self.takes_one)
        with warnings.catch_warnings(action="ignore"):  # a made-up row may well be worth one
            made_up = vary(known, arrays.contract, N_VARIED)
            X = arrays.of_rows([*known, *keep_answered(made_up, predictor, arrays)])
        takes_one = self.takes_one or not _answers_many(model, X)
        if takes_one != self.takes_one:
            model = OnnxModel(self.session, predictor, takes_one=True)
        y, scores = model.ask(X)
        _refuse_unknown_label(self, y, scores)
        if scores is None:
            return None, takes_one
        named = " and ".join(map(repr, self.outputs[1:]))
        is_number = np.isfinite(scores).all(axis=1) & scores.any(axis=1)  # float32 makes nothing of small ones
        if not is_number.any():
            raise ModelError(f"gives no number as {named} for any row; {LEAVE_OUT}")
        return _name_by_values(self, y[is_number], scores[is_number].astype(np.float64), named), takes_one


class OnnxClassifier(OnnxArtifact):
    """One with scores of classes. Only values say whether they are probabilities: `judge` finds out."""

    score = "probabilities"


class OnnxDetector(OnnxArtifact):
    """One that tells outliers by a score."""

    score = "score"


def open_artifact(data: bytes) -> OnnxArtifact:
    """Open a graph that came as a file. Raises `ModelError`."""
    model = _import_onnx("onnx").load_model_from_string(data)
    if any(tensor.data_location == tensor.EXTERNAL for tensor in _find_tensors(model.graph)):
        raise ModelError("keeps numbers in other files, which no hash covers; save it whole")
    _refuse_trees(model.graph)
    zipped = _unzip(model)
    session = open_session(model.SerializeToString() if zipped else data)
    return _read_outputs(session, OnnxGraph(model.graph), zipped)


def _refuse_trees(graph: Any) -> None:
    """Raise `ModelError` for trees to which ONNX Runtime gives wrong answers, or for which it ends the process."""
    for node in graph.node:
        values = {attribute.name: attribute for attribute in node.attribute}
        labels = _read_labels(node) if node.op_type == "TreeEnsembleClassifier" else None
        if labels is not None and len(labels) == 1:
            raise ModelError(
                "has trees of a single class, which ONNX Runtime does not answer; serve the estimator itself"
            )
        n_outputs = values["n_targets"].i if node.op_type == "TreeEnsembleRegressor" and "n_targets" in values else 1
        if n_outputs > 1 and len(found := {*values["target_ids"].ints}) != n_outputs:  # the others would always be 0
            raise ModelError(f"has trees for {len(found)} of its {n_outputs} outputs; convert a model for each output")


def _unzip(model: Any) -> dict[str, Any]:
    """Have each ZipMap give the tensor that it makes maps of, whose columns are its classes, and return these by the
    names of the outputs."""
    onnx = _import_onnx("onnx")
    zipped: dict[str, Any] = {}
    names = [output.name for output in model.graph.output]
    for node in (node for node in model.graph.node if node.op_type == "ZipMap" and node.output[0] in names):
        zipped[node.output[0]] = _read_labels(node)
        node.op_type, node.domain = "Identity", ""
        del node.attribute[:]
    for output in model.graph.output:
        if output.name in zipped:
            output.type.CopyFrom(onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None))
    if zipped and all(opset.domain for opset in model.opset_import):  # which has no operator yet but those of trees
        model.opset_import.append(onnx.helper.make_opsetid("", 8))
    return zipped


def _read_labels(node: Any) -> Any:
    """Return the classes that are an attribute of a node, or None."""
    for attribute in node.attribute:
        if attribute.name.startswith("classlabels_") and (attribute.ints or attribute.strings):
            return _as_classes(list(attribute.ints) or [label.decode() for label in attribute.strings])
    return None


def _as_classes(labels: list[Any]) -> Any:
    return np.array(labels, object if isinstance(labels[0], str) else None)  # numpy's texts lose a last NUL


class OnnxGraph:
    """The nodes and constants of a graph, for the way back from an output to what makes it."""

    def __init__(self, graph: Any) -> None:
        self._makers = {name: node for node in graph.node for name in node.output}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in (node for node in graph.node if node.op_type == "Constant"):
            self._constants[node.output[0]] = next((item.t for item in node.attribute if item.name == "value"), None)

    def constant(self, name: str) -> Any:
        """Return the array of a constant, or None."""
        tensor = self._constants.get(name)
        return None if tensor is None else _import_onnx("onnx").numpy_helper.to_array(tensor)

    def source(self, name: str, passing: Iterable[str] = PASSING) -> tuple[Any, str]:
        """Return the node that makes a tensor, and under which name, before operators that pass it on; None for an
        input or a constant."""
        while (node := self._makers.get(name)) is not None and node.op_type in passing:
            name = next((item for item in node.input if item not in self._constants), "")
        return node, name

    def depends(self, name: str) -> bool:
        """Whether a tensor is no constant."""
        node, name = self.source(name)
        return node is not None or (bool(name) and name not in self._constants)

    def sources(self, name: str) -> list[Any]:
        """Return the nodes of which a tensor is a weighted sum; None for an input."""
        found: dict[str, Any] = {}
        names = [name]
        for name in names:  # which grows on the way
            node, name = self.source(name)
            given = [item for item in node.input if item and item not in self._constants] if node is not None else []
            if node is None or node.op_type not in LINEAR or (node.op_type == "Mul" and len(given) > 1):
                found[name] = node
            else:
                names += [item for item in given if item not in names]
        return [*found.values()]

    def classes(self, label: str) -> Any:
        """Return the classes of which a tensor has one for each row, in the order of the scores; None if unknown."""
        node, name = self.source(label)
        if node is None or node.op_type not in ("ArrayFeatureExtractor", "Gather"):
            is_label = node is not None and node.op_type.endswith("Classifier") and name == node.output[0]
            return _read_labels(node) if is_label else None
        labels = self.constant(node.input[0])
        known = None if labels is None else [_as_text(label) for label in labels.ravel().tolist()]
        return _as_classes(known) if known and len({*known}) == len(known) else None

    def is_label(self, name: str) -> bool:
        """Whether a tensor has the class of each row, or its cluster, by the operator that makes it."""
        node, _ = self.source(name)
        return self.classes(name) is not None or (node is not None and node.op_type in ("ArgMax", "ArgMin"))

    def is_distribution(self, name: str) -> bool:
        """Whether a tensor has scores of classes, by the operator that makes it."""
        node, name = self.source(name)
        is_score = node is not None and node.op_type.endswith("Classifier") and name != node.output[0]
        return is_score or (node is not None and node.op_type in DISTRIBUTING)

    def is_raw(self, label: str, scores: list[str]) -> bool:
        """Whether scores of classes are plain sums of weights, as decisions are."""
        node, _ = self.source(label)
        if node is not None and node.op_type == "SVMClassifier":
            labels = _read_labels(node)
            is_by_pair = labels is None or (len(labels) > 2 and any(self.source(name)[0] is node for name in scores))
            return not is_by_pair and not any(item.name == "prob_a" and item.floats for item in node.attribute)
        return all(map(_is_sum, itertools.chain(*map(self.sources, scores))))

    def is_vote(self, scores: str) -> bool:
        """Whether scores of classes count what each of several estimators predicts, as in hard voting."""
        return all(node is not None and node.op_type == "Where" for node in self.sources(scores))

    def is_detector(self, label: str, score: str) -> bool:
        """Whether a label says on which side of a limit a score is."""
        node, _ = self.source(label, PASSING | {"Add", "Mul", "Where", "Not"})
        if node is None or node.op_type not in COMPARING:
            return False
        compared = [item for item in node.input if item not in self._constants]
        return len(compared) == 1 and self.source(compared[0])[1] == self.source(score)[1]


def _as_text(label: Any) -> Any:
    return label.decode() if isinstance(label, bytes) else label


def _is_sum(node: Any) -> bool:
    """Whether a node gives sums of weights."""
    if node is None or node.op_type not in ("MatMul", "Gemm", "LinearClassifier", "TreeEnsembleClassifier"):
        return False
    return all(item.s == b"NONE" for item in node.attribute if item.name == "post_transform")


def _read_outputs(session: Any, graph: OnnxGraph, zipped: Mapping[str, Any]) -> OnnxArtifact:
    """Tell the outputs of a graph by their names, types and operators. Raises `ModelError` where these do not tell."""
    given = session.get_outputs()
    types = {item.name: item.type for item in given}
    prediction = _find_prediction(types, graph)
    shape = next(item.shape for item in given if item.name == prediction)
    is_several = len(shape) == 2 and isinstance(shape[1], int) and shape[1] > 1
    is_number = _is_float(types[prediction])
    rest = [name for name, kind in types.items() if name != prediction and name not in EXTRAS and _is_float(kind)]
    node, _ = graph.source(prediction)
    if is_number or is_several or (node is not None and node.op_type == "ArgMin"):  # distances, deviations, …
        rest = []
    rest = [name for name in rest if not graph.is_vote(name)]
    classes = None if is_number or is_several else graph.classes(prediction)
    if rest:
        artifact = _read_scores(session, graph, [prediction, *rest], classes, zipped)
    else:
        artifact = OnnxArtifact(session, [prediction], classes)
    if left_out := [name for name in types if name not in artifact.outputs]:
        log.info("onnx_outputs_left_out", served=artifact.outputs, left_out=left_out)
    return artifact


def _find_prediction(types: Mapping[str, str], graph: OnnxGraph) -> str:
    """Return the name of the output that is the prediction. Raises `ModelError` where nothing tells."""
    known = [name for name in types if name not in EXTRAS and graph.depends(name)]
    if not known:
        raise ModelError(f"gives {listed([*types])}, of which none is a prediction that depends on its inputs")
    labels = [name for name in known if not _is_float(types[name]) and graph.is_label(name)]
    for found in ([name for name in known if name in (*LABELS, *NUMBERS)], labels, known):
        if len(found) == 1:
            break
    else:
        cure = f"name the prediction {listed([LABELS[0], NUMBERS[0]])}, or leave the others out"
        raise ModelError(f"gives {listed(known)}, and its graph does not say which is the prediction; {cure}")
    (name,) = found
    if not types[name].startswith("tensor"):
        hint = "convert it with options={'zipmap': False}"
        raise ModelError(f"gives {name!r} as {types[name]}, not as a tensor; {hint}")
    if name not in NUMBERS and (name in SHARES or (_is_float(types[name]) and graph.is_distribution(name))):
        raise ModelError(
            f"gives {name!r}, which has scores of classes, and no prediction; keep the output of labels too"
        )
    return name


def _is_float(kind: str) -> bool:
    return kind in ("tensor(float)", "tensor(double)", "tensor(float16)")


def _read_scores(
    session: Any, graph: OnnxGraph, outputs: list[str], classes: Any, zipped: Mapping[str, Any]
) -> OnnxArtifact:
    """Tell what scores go with a label, the first of the outputs. Raises `ModelError`."""
    label, *rest = outputs
    if len(rest) == 1 and rest[0] in ("scores", "score") and graph.is_detector(label, rest[0]):
        return OnnxDetector(session, outputs)
    columns = _order_columns(rest, classes)
    scores = columns or _find_scores(rest)
    node, _ = graph.source(label)
    others = zipped.get(scores[0])
    if classes is None and others is None and (node is None or node.op_type != "ArgMax"):
        raise ModelError(f"gives {scores[0]!r}, and its graph does not say of which classes; {LEAVE_OUT}")
    if classes is not None and others is not None and classes.tolist() != others.tolist():
        differ = f"{shorten(others.tolist())!r}, but {label!r} has the classes {shorten(classes.tolist())!r}"
        raise ModelError(f"gives {scores[0]!r} for the classes {differ}; {SAVE_ITSELF}")
    artifact = OnnxClassifier(session, [label, *scores], others if classes is None else classes)
    artifact.is_raw = graph.is_raw(label, scores)
    artifact.is_sure = bool(columns) or graph.source(scores[0])[0] is node
    return artifact


def _find_scores(names: list[str]) -> list[str]:
    """Return the output that has scores of classes, alone in a list. Raises `ModelError` where names do not tell."""
    found = [name for name in names if name in SHARES] or names
    if len(found) > 1:
        cure = f"name one of them {SHARES[0]!r}, or leave the others out"
        raise ModelError(f"gives {listed(found)}, and its graph does not say which has the scores of classes; {cure}")
    return found


def _order_columns(names: list[str], classes: Any) -> list[str]:
    """Return outputs in the order of the classes that they are named after, as skl2onnx does with zipmap="columns";
    none if they are not."""
    if classes is None or len(classes) < 2:
        return []
    ways = ([f"{prefix}{_as_key(label)}" for label in classes.tolist()] for prefix in ("", "s", "i"))
    return next((ordered for ordered in ways if set(ordered) == set(names)), [])


def _answers_many(model: OnnxModel, X: Any) -> bool:
    """Whether a graph answers rows together as it answers each alone, in numbers up to rounding."""
    try:
        model.ask(X)
        y, scores = model.ask(X[:MAX_COMPARED])
    except Exception:  # what ONNX Runtime raises has no bounds
        return False
    alone = [model.ask(X[row : row + 1]) for row in range(len(y))]
    if _differs(np.concatenate([some for some, _ in alone]), y, None).any():
        return False
    return scores is None or not _differs(np.concatenate([some for _, some in alone]), scores, None).any()


def _known_classes(artifact: OnnxArtifact, scores: Any) -> list[Any]:
    """Return the classes that a graph names, or without names their positions among the scores."""
    classes = getattr(artifact, "classes_", None)
    return [*range(scores.shape[1])] if classes is None else classes.tolist()


def _refuse_unknown_label(artifact: OnnxArtifact, y: Any, scores: Any) -> None:
    """Raise `ModelError` where a label is none of the classes."""
    if not hasattr(artifact, "classes_") and not isinstance(artifact, OnnxClassifier):
        return
    classes = _known_classes(artifact, scores)
    unknown = {*y.ravel().tolist()} - {*classes}
    if unknown or y.shape[1] > 1:
        given = repr(shorten(unknown.pop() if unknown else y[0].tolist()))
        raise ModelError(f"gives {given} as {artifact.outputs[0]!r}, with the classes {listed(classes)}; {SAVE_ITSELF}")


def _name_by_values(artifact: OnnxArtifact, y: Any, scores: Any, named: str) -> str:
    """Return what scores, (n_samples, n_columns), are called beside the labels y. Raises `ModelError`."""
    labels = y[:, 0].tolist()
    if isinstance(artifact, OnnxDetector):
        is_side = (y == np.sign(scores)) | ((scores == 0) & (np.abs(y) == 1))
        if y.shape[1] == 1 == scores.shape[1] and is_side.all():
            return "score"
        raise ModelError(f"gives {named}, which is not below 0 for outliers, whose label is -1; {LEAVE_OUT}")
    classes = _known_classes(artifact, scores)
    if scores.shape[1] != len(classes) and not (scores.shape[1] == 1 and len(classes) == 2 and artifact.is_raw):
        raise ModelError(f"gives {scores.shape[1]} columns as {named}, for {len(classes)} classes; {LEAVE_OUT}")
    position = np.array([classes.index(label) for label in labels])
    if _are_shares(scores):
        if artifact.is_sure or _is_highest(position, scores) or _is_beyond(position, scores):
            return "probabilities"
    elif artifact.is_raw and _is_decision(position, scores):
        return "decision"
    hint = f"convert a support vector machine with options={{'raw_scores': True}}, else {LEAVE_OUT}"
    if not hasattr(artifact, "classes_"):  # its labels are positions, which need not be the classes
        hint = SAVE_ITSELF
    shown = f"{shorten(scores[0].tolist())!r} where {artifact.outputs[0]!r} is {labels[0]!r}"
    raise ModelError(f"gives {named}, such as {shown}, which are no probabilities, nor known decisions; {hint}")


def _are_shares(scores: Any) -> bool:
    """Whether the scores of each row are shares of 1."""
    is_within = (scores >= -SHARES_TOLERANCE) & (scores <= 1 + SHARES_TOLERANCE)
    return bool(is_within.all() and (np.abs(scores.sum(axis=1) - 1) <= SHARES_TOLERANCE).all())


def _is_beyond(position: Any, scores: Any) -> bool:
    """Whether the second of two classes is the label where its score is beyond some threshold."""
    second = position == 1
    is_both = scores.shape[1] == 2 and second.any() and not second.all()
    return bool(is_both and scores[second, 1].min() >= scores[~second, 1].max() - TOLERANCE)


def _is_decision(position: Any, scores: Any) -> bool:
    """Whether the highest score, or the sign of the only one, decides on the position of each row's label.

    Of two classes the scores are each other's opposite, for an answer has the second one only.
    """
    pair = np.column_stack([-scores, scores]) if scores.shape[1] == 1 else scores
    is_opposite = pair.shape[1] != 2 or np.allclose(pair[:, 0], -pair[:, 1], rtol=TOLERANCE, atol=TOLERANCE)
    return is_opposite and _is_highest(position, pair)


def _is_highest(position: Any, scores: Any) -> bool:
    """Whether the score at the position of each row's label is its highest, up to rounding."""
    highest = scores.max(axis=1)
    return bool(
        (scores[np.arange(len(scores)), position] >= highest - TOLERANCE * np.maximum(1, np.abs(highest))).all()
    )


def _find_tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _find_tensors(inner) if inner.node else ()


def _read_graph_inputs(session: Any) -> Inputs:
    """Read the features off a graph: the columns of its one input, or several inputs of one column each."""
    given = session.get_inputs()
    for item in given:
        if item.type not in ONNX_TYPES or len(item.shape) != 2:
            problem = f"takes {item.name!r} as {item.type} of shape {item.shape}"
            raise ModelError(f"{problem}; it should take rows of {', '.join(ONNX_TYPES)}")
        if isinstance(item.shape[0], int) and item.shape[0] != 1:
            hint = f"convert it for any number of rows, as of shape {[None, *item.shape[1:]]}"
            raise ModelError(f"takes {item.name!r} as {item.shape[0]} rows at a time; {hint}")
    kinds: list[Column | None] = [Column(ONNX_TYPES[item.type][0]) for item in given]
    width = given[0].shape[1]
    if len(given) == 1:
        return Inputs(None, kinds * width if isinstance(width, int) else None, "array")
    return Inputs([item.name for item in given], kinds, "array")


# Artifact -------------------------------------------------------------------------------------------------------------


def load_artifact(settings: ModelSettings, path: Path) -> tuple[Any, str]:
    """Load what an artifact holds by the suffix of its name, and return it with the artifact's hash.

    Raises `ModelError`.
    """
    data = read_artifact(path)
    sha256 = hashlib.sha256(data).hexdigest()
    _refuse_untrusted(path, sha256, settings.sha256.lower())
    return load_estimator(path, data, settings.trusted_types), sha256


def read_artifact(path: Path) -> bytes:
    """Read an artifact whose bytes are of the format that its suffix names. Raises `ModelError`."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ModelError(f"has the suffix {path.suffix!r}; use one of {listed([*FORMATS])}")
    try:
        data = _read_regular(path)
    except FileNotFoundError:
        others = [file.name for file in path.parent.glob("*") if file.suffix in FORMATS]
        hint = f"; {nearest(path.name, others)}" if others else ""
        raise ModelError(f"does not exist{hint}") from None
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}") from None
    if not data:
        raise ModelError("is empty")
    _, kinds = FORMATS[suffix]
    found = _format_of(data)
    if found is not None and found not in kinds:
        right = [suffix for suffix, (_, kinds) in FORMATS.items() if kinds[0] == found]
        raise ModelError(f"is no {kinds[0]} file but {found}" + (f"; name it {right[0]}" if right else ""))
    return data


def _read_regular(path: Path) -> bytes:
    """Return the bytes of a regular file. Raises `OSError` for others: a pipe or a device may have no end."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a regular file")
        return file.read()


def _format_of(data: bytes) -> str | None:
    """Name the format of a file by its first bytes, where they tell."""
    found = next((kind for start, kind in STARTS.items() if data.startswith(start)), None)
    if found == "skops" and b"schema.json" not in data:
        return "a zip archive, or part of one"
    return "joblib" if found == "pickle" and b"joblib.numpy_pickle" in data else found


def _refuse_untrusted(path: Path, sha256: str, trusted: str) -> None:
    if trusted and trusted != sha256:
        raise ModelError(f"has the sha256 {sha256}, but model.sha256 is {trusted}: it is not the file that you trusted")
    if not trusted and path.suffix.lower() not in CODELESS:
        hint = "set model.sha256 to the hash of a file that you trust; `python -m model.describe PATH` prints it"
        raise ModelError(f"runs code when it is loaded; {hint}")


OLDEST_SKLEARN = (1, 6)  # the first with `get_tags`


def refuse_old_sklearn(version: str) -> None:
    """Raise `StartupError` for a version of scikit-learn whose estimators are not read here."""
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_SKLEARN:
        oldest = ".".join(map(str, OLDEST_SKLEARN))
        hint = "pip install -r requirements.txt"
        raise StartupError(f"scikit-learn is {version}, but {oldest} is the oldest that is supported; {hint}")


def load_estimator(path: Path, data: bytes, trusted_types: list[str]) -> Any:
    """Load what an artifact's bytes hold, which may run code that is inside.

    Raises `StartupError`, also where it is not a fitted predictor.
    """
    refuse_old_sklearn(sklearn.__version__)
    load, _ = FORMATS[path.suffix.lower()]
    estimator = load(data, trusted_types)
    if not isinstance(estimator, GraphFile):
        refuse_no_predictor(estimator)
    return estimator


def _load_skops(data: bytes, trusted_types: list[str]) -> Any:
    """Load a skops file in which all types are trusted, by skops or by the list. Raises `ModelError`."""
    import skops.io  # here, for it takes with it the whole of scikit-learn: a second that other formats can do without

    untrusted = find_untrusted_types(data) - set(trusted_types)
    if untrusted:
        types = json.dumps(sorted({*untrusted, *trusted_types}))
        raise ModelError(f"holds types that are not trusted; if you trust them, set model.trusted_types = {types}")
    with _loading("skops"):
        return skops.io.loads(data, trusted=trusted_types)


def find_untrusted_types(data: bytes) -> set[str]:
    """Name the types in a skops file that skops does not trust by itself, without loading it. Raises `ModelError`."""
    import skops.io

    with _loading("skops"):
        return set(skops.io.get_untrusted_types(data=data))


def _load_joblib(data: bytes, trusted_types: list[str]) -> Any:
    with _loading("joblib"):
        return joblib.load(io.BytesIO(data))


def _load_pickle(data: bytes, trusted_types: list[str]) -> Any:
    with _loading("pickle"):
        return pickle.loads(data)


def _load_onnx(data: bytes, trusted_types: list[str]) -> Any:
    """Load an ONNX graph, which runs no code: custom operators are in libraries that only settings could name."""
    with _loading("onnx"):
        return open_artifact(data)


@contextlib.contextmanager
def _loading(kind: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except ModuleNotFoundError as error:
        raise ModelError(f"needs the module {error.name!r}, which is not installed") from error
    except AttributeError as error:  # pickle names classes and functions by module; those of a script are in __main__
        raise ModelError(f"needs what is not there: {error}; have it in a module that can be imported") from error
    except (Exception, SystemExit) as error:  # what a damaged or foreign artifact raises has no bounds
        raise ModelError(f"cannot be loaded as {kind}, and may be cut short or damaged: {reason_of(error)}") from error


FORMATS: dict[str, tuple[Callable[[bytes, list[str]], Any], tuple[str, ...]]] = {  # with what the bytes may be
    ".skops": (_load_skops, ("skops",)),
    ".joblib": (_load_joblib, ("joblib", "pickle")),
    ".pickle": (_load_pickle, ("pickle",)),
    ".pkl": (_load_pickle, ("pickle",)),
    ".onnx": (_load_onnx, ("onnx",)),
}
CODELESS = (".skops", ".onnx")  # formats that run no code when they are loaded
STARTS = {
    b"PK": "skops",
    b"\x80": "pickle",
    b"\x78": "joblib",  # compressed by zlib, and by others in what follows
    b"\x1f\x8b": "joblib",
    b"BZh": "joblib",
    b"\xfd7zXZ": "joblib",
    b"\x5d\0\0": "joblib",
    b"\x04\x22\x4d\x18": "joblib",
    b"\x08": "onnx",  # the number of the format's version comes first
    b"\x89HDF": "HDF5",
    b"version https://git-lfs": "a Git LFS pointer, whose file was not fetched",
}


# Golden rows ----------------------------------------------------------------------------------------------------------


class Golden(SettingsTable):
    """Rows that the artifact answered when it was made, what it answered, and with which versions."""

    versions: dict[str, str]
    rows: Annotated[list[dict[str, Any]], Field(min_length=1)]
    predictions: list[dict[str, Any]]

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if len(self.rows) != len(self.predictions):
            raise ValueError("a golden file should have as many predictions as rows")
        return self


def golden_path(artifact: Path) -> Path:
    return artifact.with_suffix(".golden.json")


def running_versions() -> dict[str, str]:
    """Give the versions of numpy and scikit-learn, on which an artifact's answers depend, and of Python."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"python": python, "numpy": np.__version__, "scikit-learn": sklearn.__version__}


def load_golden(artifact: Path, is_strict: bool = False) -> Golden | None:
    """Read the golden rows beside the artifact, if there are any. Raises `ModelError`.

    Those of another numpy or scikit-learn are a warning, or where they must be the same, an error.
    """
    path = golden_path(artifact)
    if not os.path.lexists(path):
        if is_strict:
            raise ModelError(
                f"has no {path.name} beside it, and so no versions to compare, but model.strict_versions is true"
            )
        return None
    if not path.is_file():
        raise ModelError(f"has {path.name} beside it, which is no file, or a link to none")
    try:
        golden = Golden.model_validate_json(_read_regular(path))
    except OSError as error:
        raise ModelError(f"has {path.name} beside it, which cannot be read: {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        what = f"in which {where}" if where else "which"
        raise ModelError(f"has {path.name} beside it, {what} should {should(problem)}") from None
    running = running_versions()
    if golden.versions | {"python": running["python"]} != running:
        if is_strict:
            both = f"{golden.versions}, but {running} run here"
            raise ModelError(f"was made with {both}, and model.strict_versions is true")
        log.warning("versions_differ", golden=golden.versions, running=running)
    return golden


@dataclass(frozen=True, slots=True)
class Rounding:
    """How far two floats may be apart: by a part of them, or by one of the largest around."""

    relative: float
    of_scale: float


OF_LIBRARIES = Rounding(1e-6, 1e-9)
OF_FLOAT32 = Rounding(1e-5, 1e-5)  # in which ONNX computes some probabilities


def agrees(answer: Any, golden: Any, scale: float = 1.0, rounding: Rounding = OF_LIBRARIES) -> bool:
    """Whether two answers in JSON are the same, floats up to the rounding of another processor or library.

    `scale` is the size of numbers against which one may be nothing but rounding.
    """
    same = functools.partial(agrees, scale=scale, rounding=rounding)
    if isinstance(answer, dict) and isinstance(golden, dict):
        return answer.keys() == golden.keys() and all(same(answer[key], golden[key]) for key in golden)
    if isinstance(answer, list) and isinstance(golden, list):
        return len(answer) == len(golden) and all(itertools.starmap(same, zip(answer, golden, strict=True)))
    if isinstance(answer, float) and isinstance(golden, float | int) and not isinstance(golden, bool):
        golden = max(min(golden, sys.float_info.max), -sys.float_info.max)  # an integer may be larger
        return math.isclose(answer, golden, rel_tol=rounding.relative, abs_tol=rounding.of_scale * scale)
    return bool(answer == golden) and isinstance(answer, bool) == isinstance(golden, bool)


def rename(answer: Any, names: Mapping[str, str]) -> Any:
    """Give the outputs in an answer other names."""
    return {names.get(key, key): value for key, value in answer.items()} if isinstance(answer, dict) else answer


def largest(answer: Any) -> float:
    """Give the largest float in an answer, or 0."""
    inner = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, list) else ()
    return abs(answer) if isinstance(answer, float) else max(map(largest, inner), default=0.0)


# Model ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proof:
    """What a model turned out to be when it predicted: plain values, which a child process can send."""

    graph: int | None = None  # the position of the converted graph that answers as the estimator does
    score: str | None = None  # what the scores of a graph are that came as a file
    takes_one: bool = False  # such a graph answers one row at a time
    call_s: float = 0.0  # seconds that a call takes
    row_s: float = 0.0  # seconds that each row of a call takes
    never_batched: str | None = None  # why the rows of several requests cannot share a call


@dataclass(frozen=True)
class Model:
    """A loaded predictor with the contract of its rows, and the golden rows that it must reproduce.

    `graphs` are predictors that answer by a converted graph, of which a proof chooses one. `report` is told what is
    done now and may take long. `n_threads` are those of OpenMP and BLAS in a call.
    """

    path: Path
    arrays: Arrays
    predictor: Predictor
    golden: Golden | None = None
    sha256: str = ""  # of the artifact
    n_threads: int = 1
    graphs: Sequence[Predictor] = ()
    report: Callable[[str], None] = lambda doing: None

    @property
    def contract(self) -> Contract:
        """The types of a row."""
        return self.arrays.contract

    def proven(self, proof: Proof) -> Model:
        """Return the model that a proof is about."""
        predictor = self.predictor
        if proof.graph is not None:
            predictor = self.graphs[proof.graph]
        elif isinstance(predictor.estimator, GraphFile):
            make = functools.partial(predictor.estimator.open, takes_one=proof.takes_one)
            predictor = predictor.with_graph(make, proof.score)
        return replace(self, predictor=predictor, graphs=())

    def predict(self, X: Any) -> Predictions:
        """Return the answers to X, as `arrays` makes it. Raises what the estimator raises."""
        limit_threads(self.n_threads)
        return self.predictor.predict(X)

    def predict_rows(self, rows: Rows) -> Predictions:
        """Return the answers to checked rows. Raises what the estimator raises."""
        return self.predict(self.arrays.of_rows(rows))

    def answer(self, rows: Rows, what: str) -> list[dict[str, Any]]:
        """Return the answers to rows that are no request's. Raises `EstimatorError`, which says on `what` it fails."""
        self.report(f"answering {what.partition(',')[0]}")
        try:
            return [json.loads(answer) for answer in self.predict_rows(rows).render()] if rows else []
        except ModelError:
            raise
        except Exception as error:  # what an estimator raises has no bounds
            raise EstimatorError(f"fails on {what}: {reason_of(error)}") from error

    @functools.cached_property
    def known_rows(self) -> Rows:
        """The golden rows, or without them the contract's example."""
        if self.golden is None:
            return [self.contract.example]
        return [self._rename(row, index) for index, row in enumerate(self.golden.rows)]

    @property
    def golden_file(self) -> str:
        """The name of the file of golden rows."""
        return golden_path(self.path).name

    def _rename(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        names = self.contract.names
        if row.keys() == set(names):
            return row
        if self.contract.inputs.names is None and len(row) == len(names):
            return dict(zip(names, row.values(), strict=True))
        problem = f"has {self.golden_file} beside it, of which row {index} has the features {listed([*row])}"
        raise ModelError(f"{problem}; it should have {listed(names)}")

    @functools.cached_property
    def example_answer(self) -> dict[str, Any]:
        """The answer to the contract's example."""
        made_up = listed([name for name, feature in self.contract.features.items() if feature.example is None])
        hint = f", of which {made_up} is made up; give examples in [features], or golden rows" if made_up else ""
        return self.answer([self.contract.example], f"its example row{hint}")[0]

    def warm_up(self) -> None:
        """Answer the known rows, and the example of the API's description, before the first request does."""
        self.answer(self.known_rows, "its known rows")
        _ = self.example_answer


def load_model(
    settings: ModelSettings,
    features: Mapping[str, FeatureSettings],
    folder: Path,
    n_threads: int = 1,
    report: Callable[[str], None] = lambda doing: None,
) -> Model:
    """Load an artifact, whose path is relative to a folder, and its golden rows, without predicting.

    Raises `ModelError`, and `MisfitError` where features do not fit it.
    """
    report("loading it")
    path = folder / settings.path
    estimator, sha256 = load_artifact(settings, path)
    model = make_model(estimator, path, features, load_golden(path, settings.strict_versions), settings.outputs)
    graphs: Sequence[Predictor] = ()
    if settings.runtime == "onnx" and model.predictor.graph is None:
        report("converting it to ONNX")
        graphs = convert_to_onnx(model.predictor, model.arrays)
    return replace(model, sha256=sha256, n_threads=n_threads, graphs=graphs, report=report)


def make_model(
    estimator: Any,
    path: Path,
    features: Mapping[str, FeatureSettings],
    golden: Golden | None = None,
    outputs: Sequence[str] = (),
) -> Model:
    """Return the model of an estimator that was loaded from `path`. Raises `ModelError`, `MisfitError`."""
    contract = Contract(read_inputs(estimator), features, golden.rows[0] if golden else None)
    arrays = Arrays(contract)
    return Model(path, arrays, prepare(estimator, arrays, outputs), golden)


def prove(model: Model) -> Proof:
    """Make a model reproduce its golden rows, and answer its example, without each value that may be missing.

    It is not part of loading: predicting may start threads, which a process that forks later must not have. Raises
    `ModelError`.
    """
    what = "its golden rows" if model.golden else "its example row"
    proof = _prove_graph(model, what) if model.graphs else prove_scores(model, model.known_rows, what)
    model = model.proven(proof)
    if model.golden is not None:
        _reproduce(model, model.golden)
    _ = model.example_answer
    _try_missing(model)
    model.report("timing its answers")
    try:
        call_s, row_s = measure(model.predict_rows, model.known_rows[0])
        reason = find_dependence(model)
    except Exception as error:  # what an estimator raises has no bounds
        call_s, row_s, reason = 0.0, 0.0, f"rows that are answered alone fail together: {reason_of(error)}"
    if reason is not None:
        log.warning("never_batched", reason=reason)
    return replace(proof, call_s=call_s, row_s=row_s, never_batched=reason)


def _prove_graph(model: Model, what: str) -> Proof:
    """Find the first graph that answers as the estimator does. Raises `ModelError`."""
    model.answer(model.known_rows, what)
    model.report("comparing it with ONNX Runtime")
    return Proof(graph=choose_graph(model.graphs, model.predictor, model.arrays, model.known_rows))


def prove_scores(model: Model, rows: Rows, what: str) -> Proof:
    """Find what the scores are of a graph that came as a file, by its answers to rows; of an estimator it is known.

    Raises `ModelError`.
    """
    estimator = model.predictor.estimator
    if not isinstance(estimator, GraphFile):
        return Proof()
    model.answer(rows, what)
    score, takes_one = estimator.judge(model.predictor, model.arrays, rows)
    return Proof(score=score, takes_one=takes_one)


def _reproduce(model: Model, golden: Golden) -> None:
    """Compare by the names that the estimator has by itself: the settings may have given it others since."""
    outputs = {f"y{output}": name for output, name in enumerate(model.predictor.outputs)}
    answers = model.answer(model.known_rows, f"the rows of {model.golden_file}")
    scale = largest(golden.predictions)
    for index, (answer, prediction) in enumerate(zip(answers, golden.predictions, strict=True)):
        expected = {key: rename(value, outputs) for key, value in prediction.items()} if outputs else prediction
        if not agrees(answer, expected, scale, _rounding_of(model)):
            wanted = f"as {model.golden_file} has it"
            raise ModelError(f"answers row {index} with {toml_value(answer)}, not {toml_value(expected)} {wanted}")


def _rounding_of(model: Model) -> Rounding:
    return OF_LIBRARIES if model.predictor.graph is None else OF_FLOAT32


def _try_missing(model: Model) -> None:
    example = model.contract.example
    rows = {name: example | {name: None} for name in model.contract.nullable}
    with contextlib.suppress(EstimatorError):
        model.answer([*rows.values()], "missing values")
        return
    for name, row in rows.items():
        model.answer([row], f"a missing {name!r}; set {'.'.join(map(toml_key, ('features', name)))}.missing = false")


def find_dependence(model: Model) -> str | None:
    """Return why rows of several requests cannot share a call, by asking rows alone and together; None if they can."""
    rows = model.known_rows[:MAX_COMPARED]
    rows += vary(rows, model.contract, MAX_COMPARED - len(rows))
    alone: list[tuple[dict[str, Any], Any]] = []
    end = time.monotonic() + MAX_COMPARING_S
    with warnings.catch_warnings(action="ignore"):  # a made-up row may well be worth one
        for row in rows:
            with contextlib.suppress(EstimatorError):  # as well as fail
                alone.append((row, model.answer([row], "a row")[0]))
            if len(alone) > 1 and time.monotonic() > end:
                break
        together = model.answer([row for row, _ in alone], "rows")
    answers = [answer for _, answer in alone]
    if len(alone) < 2:
        return "too few rows have an answer to be compared; give golden rows, or examples in [features]"
    is_same = agrees(together, answers, largest(answers), _rounding_of(model))
    return None if is_same else "the answer to a row depends on the other rows of the call"


# Batcher --------------------------------------------------------------------------------------------------------------
#
# Most of what a call of an estimator costs is the same for one row and for many. So the rows of requests that wait at
# the same moment are predicted in one call. There is one call at a time: an estimator may keep what it works on. How a
# request waits depends on what runs it: an asyncio loop or a thread, which may be a greenlet of gevent's.

INLINE_S = 0.01  # the longest call that runs in an event loop, in seconds
SURPRISE_FACTOR = 10.0  # a call that takes so many times as long as expected is what later ones are expected to take
SMOOTHING = 0.1  # the part of a difference by which an expectation is corrected
STUCK_AFTER_TIMEOUTS = 2.0  # time-outs of a request after which a call is taken never to end
MIN_STUCK_S = 1.0
LOOK_S = 0.25  # seconds between two looks at a call that runs beside a loop, and at what waits for it
QUIET_TURNS = 2  # turns of other threads without a row: after one, gevent has not yet looked for what came meanwhile
MANY_ROWS = 64  # rows of a call by which the cost of one more is measured
MAX_COMPARED = 16  # rows that are answered both alone and together
MAX_COMPARING_S = 1.0


@dataclass(slots=True, eq=False)
class Job:
    """The rows of one request, from the moment when they wait for a call until they are answered.

    Rows that take long to decode or to write have both done in the call: `decode` returns X, or None if there is
    nothing to predict, and `encode` makes the result of its predictions. Such a job shares its call with no other.
    """

    n_rows: int
    rows: Rows = field(default_factory=list)
    decode: Callable[[], Any] | None = None
    encode: Callable[[Predictions | None], Any] | None = None
    is_long: bool = False  # decoding takes longer than an event loop should be kept busy
    waiter: Any = None  # a future of the loop, or a lock
    answer: Any = None  # predictions, or what `encode` made of them
    error: Exception | None = None
    deadline: float = math.inf  # by the monotonic clock
    has_left: bool = False  # the queue, for a call or for good
    is_given_up: bool = False  # nobody waits for it any more
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def result(self) -> Any:
        """Return the predictions, or what `encode` made of them. Raises what the call raised."""
        if self.error is not None:
            raise self.error
        return self.answer


def count_rows(jobs: Iterable[Job]) -> int:
    return sum([job.n_rows for job in jobs])


@dataclass(slots=True)
class CallCost:
    """The time that a call is expected to take, in seconds: some by itself, and some for each row."""

    call_s: float = 0.0
    row_s: float = 0.0

    def seconds_for(self, n_rows: int) -> float:
        return self.call_s + self.row_s * n_rows

    def learn(self, n_rows: int, took_s: float) -> None:
        """Correct the expectation by a call: at once if it took far longer, else by a part of the difference.

        The time of a call is an upper bound of both its fixed cost and its cost per row.
        """
        expected_s = self.seconds_for(n_rows)
        if took_s > SURPRISE_FACTOR * max(INLINE_S, expected_s):
            self.call_s = took_s
        elif took_s < expected_s:
            self.call_s = max(self.call_s * (1 - SMOOTHING), min(self.call_s, took_s))
            self.row_s = max(self.row_s * (1 - SMOOTHING), min(self.row_s, took_s / n_rows))
        elif took_s > INLINE_S and n_rows >= MANY_ROWS:
            self.row_s += SMOOTHING * (took_s - expected_s) / n_rows
        elif took_s > INLINE_S:
            self.call_s += SMOOTHING * (took_s - expected_s)


def measure(predict: Callable[[Rows], Any], row: dict[str, Any]) -> tuple[float, float]:
    """Return the seconds of a call and of each of its rows, by calls for one row and, if that is quick, for many."""
    call_s = _time(predict, [row])
    if call_s > INLINE_S:
        return call_s, 0.0
    return call_s, max(0.0, _time(predict, [row] * MANY_ROWS) - call_s) / MANY_ROWS


def _time(predict: Callable[[Rows], Any], rows: Rows) -> float:
    """Return the seconds of a call that nothing disturbs, as the start of other processes does."""
    times: list[float] = []
    while len(times) < 5 and sum(times) < 10 * INLINE_S:
        started = time.perf_counter()
        predict(rows)
        times.append(time.perf_counter() - started)
    return min(times)


@dataclass(slots=True)
class BatchQueue:
    """Who may wait for a model, which jobs share a call, and the call itself.

    `predict_rows` answers checked rows, and `predict` what a job has decoded by itself.
    """

    predict_rows: Callable[[Rows], Predictions]
    predict: Callable[[Any], Predictions]
    max_rows: int  # of a call that several jobs share
    max_wait_s: float
    max_queued_rows: float = math.inf
    timeout_s: float = math.inf
    can_share: bool = True  # the answer to a row does not depend on the others of its call
    cost: CallCost = field(default_factory=CallCost)
    queued_jobs: int = 0  # that no call has taken
    queued_rows: int = 0
    called_at: float | None = None  # by the monotonic clock, while a call is made
    _lock: Any = field(default_factory=threading.Lock)  # of the queue's counts

    def admit(self, job: Job) -> None:
        """Let a job wait until its deadline. Raises `TooManyRequests`: a queue that is not empty has its limit."""
        with self._lock:
            if self.queued_rows and self.queued_rows + job.n_rows > self.max_queued_rows:
                raise TooManyRequests(f"{self.queued_rows} rows wait already", self.seconds_left())
            self.queued_jobs += 1
            self.queued_rows += job.n_rows
        job.deadline = time.monotonic() + self.timeout_s

    def give_up(self, job: Job) -> None:
        """Predict a job no more: its client has left, or waited too long."""
        with self._lock:
            job.is_given_up = True
            self._leave(job)

    def _leave(self, job: Job) -> None:
        if not job.has_left:
            job.has_left = True
            self.queued_jobs -= 1
            self.queued_rows -= job.n_rows

    def seconds_left(self) -> float:
        """Return the expected time until all jobs that wait are answered."""
        calls = math.ceil(self.queued_rows / self.max_rows) if self.can_share else self.queued_jobs
        return calls * self.cost.call_s + self.queued_rows * self.cost.row_s

    def is_late(self, job: Job) -> bool:
        """Return whether a job has waited too long, or waits for a call that does not end."""
        return time.monotonic() > job.deadline or self.is_stuck()

    @property
    def stuck_s(self) -> float:
        """The time after which a call is taken never to end, in seconds."""
        return max(STUCK_AFTER_TIMEOUTS * self.timeout_s, MIN_STUCK_S)

    def is_stuck(self) -> bool:
        """Return whether a call is made that does not end."""
        called_at = self.called_at
        return called_at is not None and time.monotonic() - called_at > self.stuck_s

    def too_late(self) -> Unavailable:
        return Unavailable("the prediction took too long", self.seconds_left())

    def needs_thread(self, jobs: Sequence[Job]) -> bool:
        """Return whether a call takes so long that it should not run in an event loop."""
        is_long = bool(jobs) and jobs[0].is_long  # and then alone
        return is_long or self.cost.seconds_for(count_rows(jobs)) > INLINE_S

    def is_full(self, waiting: Iterable[Job]) -> bool:
        """Return whether the jobs that wait have the rows of a call already."""
        return not self.can_share or count_rows(waiting) >= self.max_rows

    def take(self, waiting: collections.deque[Job]) -> list[Job]:
        """Take the jobs of the next call from those that wait; none if nobody waits for them any more."""
        jobs: list[Job] = []
        n_rows = 0
        while waiting and (not jobs or self._can_join(waiting[0], jobs[0], n_rows)):
            job = waiting.popleft()
            with self._lock:
                self._leave(job)
            if not job.is_given_up:
                jobs.append(job)
                n_rows += job.n_rows
        return jobs

    def _can_join(self, job: Job, first: Job, n_rows: int) -> bool:
        is_shared = self.can_share and first.decode is None and job.decode is None
        return is_shared and n_rows + job.n_rows <= self.max_rows

    def call(self, jobs: list[Job]) -> list[list[Job]]:
        """Answer jobs in one call. If it fails, return their halves, which isolates an error in the job that causes it.

        A job that would be answered too late gets an error instead.
        """
        called = self._refuse_late(jobs)
        if not called:
            return []
        self.called_at = time.monotonic()
        try:
            if len(called) == 1:
                (job,) = called
                job.answer = job.context.run(self._answer, job)
            else:
                contextvars.Context().run(self._answer_together, called)
        except Exception as error:  # what an estimator raises has no bounds
            if len(called) > 1:
                return [jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]]
            called[0].error = error
        finally:
            self.called_at = None
        return []

    def _answer(self, job: Job) -> Any:
        if job.decode is None:
            return self._timed(self.predict_rows, job.rows, job.n_rows)
        decode, job.decode = job.decode, None  # which holds the body, as large as the rest
        X = decode()
        del decode
        predictions = None if X is None else self._timed(self.predict, X, len(X))
        del X
        return predictions if job.encode is None else job.encode(predictions)

    def _answer_together(self, jobs: list[Job]) -> None:
        rows = [row for job in jobs for row in job.rows]
        predictions = self._timed(self.predict_rows, rows, len(rows))
        start = 0
        for job in jobs:
            job.answer = predictions.part(start, start + job.n_rows)
            start += job.n_rows

    def _timed(self, predict: Callable[[Any], Predictions], rows: Any, n_rows: int) -> Predictions:
        started = time.perf_counter()
        predictions = predict(rows)
        self.cost.learn(n_rows, time.perf_counter() - started)
        return predictions

    def _refuse_late(self, jobs: list[Job]) -> list[Job]:
        """Return the jobs that can be answered in time.

        The expected time of the call is ignored when it exceeds half of the time-out: refusing everything would never
        correct the expectation.
        """
        takes_s = self.cost.seconds_for(count_rows(jobs))
        end = time.monotonic() + (takes_s if takes_s < self.timeout_s / 2 else 0.0)
        if not jobs or jobs[0].deadline >= end:  # which came first
            return jobs
        for job in jobs:
            job.error = self.too_late() if job.deadline < end else None
        return [job for job in jobs if job.deadline >= end]


class LoopBatcher:
    """Batches requests of an asyncio loop: those of one turn of it, and those that came while a call ran beside it."""

    def __init__(self, queue: BatchQueue, loop: asyncio.AbstractEventLoop) -> None:
        self.queue = queue
        self.loop = loop
        self._waiting: collections.deque[Job] = collections.deque()
        self._halves: list[list[Job]] = []  # of calls that failed
        self._timer: asyncio.TimerHandle | None = None  # of a call that waits for more rows
        self._is_due = False  # a call is scheduled, or runs
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "predict")  # which starts when it is first used

    async def predict(self, job: Job) -> Any:
        """Return the result of a job. Raises what its call raised."""
        self.queue.admit(job)
        job.waiter = self.loop.create_future()
        self._waiting.append(job)
        if not self._is_due:
            self._is_due = True
            self._schedule()
        elif self._timer is not None and self.queue.is_full(self._waiting):
            self._timer.cancel()
            self._call()
        try:
            await job.waiter
        except asyncio.CancelledError:
            self.queue.give_up(job)
            raise
        return job.result()

    def _schedule(self) -> None:
        if self.queue.max_wait_s and not self.queue.is_full(self._waiting):
            self._timer = self.loop.call_later(self.queue.max_wait_s, self._call)
        else:
            self.loop.call_soon(self._call)

    def _call(self, n_before: int = 0) -> None:
        self._timer = None
        if n_before < len(self._waiting) < self.queue.max_rows:  # this turn brought some, and so may the next
            self.loop.call_soon(self._call, len(self._waiting))
            return
        jobs = self._halves.pop() if self._halves else self.queue.take(self._waiting)
        if self.queue.needs_thread(jobs):
            call = _beside_loop(functools.partial(self.queue.call, jobs))
            done = self.loop.run_in_executor(self._thread, call)
            done.add_done_callback(lambda done: self._hand_out(jobs, done.result()))
            self.loop.call_later(LOOK_S, self._look, jobs, done)
        else:
            self._hand_out(jobs, self.queue.call(jobs))

    def _look(self, jobs: list[Job], done: asyncio.Future[Any]) -> None:
        """Answer the jobs that wait too long for a call, or behind it."""
        if done.done():
            return
        for job in (*jobs, *self._waiting, *itertools.chain(*self._halves)):
            if not job.waiter.done() and self.queue.is_late(job):
                self.queue.give_up(job)
                job.error = self.queue.too_late()
                job.waiter.set_result(None)
        self.loop.call_later(LOOK_S, self._look, jobs, done)

    def _hand_out(self, jobs: list[Job], halves: list[list[Job]]) -> None:
        self._halves += halves
        for job in jobs if not halves else ():
            if not job.waiter.done():  # as it is when its task was cancelled, or it was told that it is late
                job.waiter.set_result(None)
        self._is_due = bool(self._waiting or self._halves)
        if self._is_due:
            self.loop.call_soon(self._call, len(self._waiting))


class ThreadBatcher:
    """Batches requests of threads, which may be greenlets, in a thread of its own, in which every call is made.

    It starts with the first request of a process: one that runs before does not live on in those that are forked.
    """

    def __init__(self, queue: BatchQueue) -> None:
        self.queue = queue
        self._arrived: queues.SimpleQueue[Job] = queues.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    async def predict(self, job: Job) -> Any:
        """Return the result of a job; it blocks. Raises what its call raised."""
        self.queue.admit(job)
        try:
            self._start()
        except RuntimeError:  # no thread more
            self.queue.give_up(job)
            raise
        return self._wait_for(job)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                self._arrived = queues.SimpleQueue()
                self._thread = threading.Thread(target=self._serve, args=[self._arrived], name="predict", daemon=True)
                self._thread.start()

    def _wait_for(self, job: Job) -> Any:
        job.waiter = threading.Lock()
        job.waiter.acquire()
        self._arrived.put(job)
        while not job.waiter.acquire(timeout=LOOK_S):  # until its release
            if self.queue.is_late(job):
                self.queue.give_up(job)
                raise self.queue.too_late()
        return job.result()

    def _serve(self, arrived: queues.SimpleQueue[Job]) -> None:
        waiting: collections.deque[Job] = collections.deque()
        while True:
            if not waiting:
                waiting.append(arrived.get())
                self._wait_for_more(arrived, waiting)
            n_quiet = 0
            while n_quiet < QUIET_TURNS and len(waiting) < self.queue.max_rows:
                time.sleep(0)  # lets others that are ready come in
                n_quiet = n_quiet + 1 if arrived.empty() else 0
                waiting += [arrived.get() for _ in range(arrived.qsize())]
            groups = [self.queue.take(waiting)]
            while groups:
                groups += self._call(groups.pop())

    def _wait_for_more(self, arrived: queues.SimpleQueue[Job], waiting: collections.deque[Job]) -> None:
        end = time.monotonic() + self.queue.max_wait_s
        while not self.queue.is_full(waiting) and (left_s := end - time.monotonic()) > 0:
            with contextlib.suppress(queues.Empty):
                waiting.append(arrived.get(timeout=left_s))

    def _call(self, jobs: list[Job]) -> list[list[Job]]:
        call = functools.partial(self.queue.call, jobs)
        halves = (_beside_loop(call) if self.queue.needs_thread(jobs) else call)()
        for job in jobs if not halves else ():
            job.waiter.release()
        return halves


def _beside_loop(call: Callable[[], T]) -> Callable[[], T]:
    """Have a call made in a thread of the system's, also where gevent has made greenlets of Python's own."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return call
    return functools.partial(_gevent_thread().apply, call)


@functools.cache
def _gevent_thread() -> Any:
    import gevent.threadpool

    return gevent.threadpool.ThreadPool(1)


# Endpoints ------------------------------------------------------------------------------------------------------------

SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
LINGER_S = 2.0
PIECE_BYTES = 65_536
MAX_PIECE_BYTES = 16 * PIECE_BYTES  # of a piece that ends with a long row
PIECE_ROWS = 1000
LONG_BYTES = 262_144  # of a body that is decoded beside the event loop
DECODING = threading.Lock()  # of one long body at a time, as Python's own lock has it anyway
ARRAY_OF_OBJECTS = re.compile(rb"[ \t\r\n]*\[[ \t\r\n]*\{")
BETWEEN_OBJECTS = re.compile(rb"\}[ \t\r\n]*,[ \t\r\n]*\{")


IDS = random.Random()  # noqa: S311 — no secrets, and a system call less each; of our own, which nobody else seeds
os.register_at_fork(after_in_child=IDS.seed)


def make_request_id() -> str:
    return f"{IDS.getrandbits(128):032x}"


@dataclass(slots=True)
class Request:
    """One request, whichever framework received it."""

    method: str
    path: str
    query: str  # percent-encoded
    header: Callable[[str], str | None]  # by lower-case name; repeated fields are joined by commas
    read: Callable[[int], Awaitable[bytes]]  # the next piece of the body, of about so many bytes; b"" at its end
    batcher: LoopBatcher | ThreadBatcher
    body: bytes | ServingError | None = None  # what reading it gave
    rows: int = 0

    @property
    def announces_body(self) -> bool:
        """Whether the head says that a body follows."""
        return self.header("content-length") not in (None, "0") or self.header("transfer-encoding") is not None

    async def read_body(self, limit: int, keeps: bool = True) -> bytes | ServingError:
        """Read the whole body, but no more than `limit` bytes, into `body`; or the error that it ends with.

        A body that nobody needs is not kept: it is read so that the connection can go on.
        """
        if self.body is None:
            try:
                self.body = await self._read_body(limit, keeps)
            except ServingError as error:
                self.body = error
        return self.body

    async def _read_body(self, limit: int, keeps: bool) -> bytes:
        length = self._content_length()
        if length is None and self.header("transfer-encoding") is None:
            return b""
        if length is not None and length > limit:
            raise BodyTooLarge(f"the body is {length} bytes", limit)
        size = 0
        pieces: list[bytes] = []
        while size != length:
            piece = await self.read(PIECE_BYTES if length is None else min(length - size, PIECE_BYTES))
            if not piece:
                break
            if keeps:
                pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise BodyTooLarge("the body is longer", limit)
        if length is not None and size < length:
            raise BodyCutShort
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _content_length(self) -> int | None:
        given = self.header("content-length")
        # More digits are no length that could be, and Python refuses to read more than 4300 of them.
        if given is not None and not (given.isascii() and given.isdigit() and len(given.lstrip("0")) <= 18):
            detail = f"Content-Length is {shorten(given)!r}; it should be a number of bytes"
            raise BadRequest(detail, {"Connection": "close"})
        return None if given is None else int(given[-18:])


@dataclass(slots=True)
class Response:
    """One answer in JSON, whichever framework sends it. Its body is in pieces, so that a long one is never copied."""

    pieces: list[bytes]
    status: int = 200
    more_headers: Mapping[str, str] = field(default_factory=dict)
    request_id: str = ""
    lingers: bool = False  # the client may still be sending

    @classmethod
    def of(cls, payload: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        """Render a payload as JSON; what JSON cannot say of a float becomes a string."""
        return cls([to_json(payload, inf_nan_mode="strings", fallback=str)], status, headers or {})

    @classmethod
    def of_error(cls, error: ServingError) -> Response:
        response = cls.of({"detail": error.detail}, error.status, error.headers)
        response.lingers = error.lingers
        return response

    @property
    def status_line(self) -> str:
        """The status as WSGI and HTTP/1.1 write it."""
        return f"{self.status} {HTTPStatus(self.status).phrase}"

    @property
    def length(self) -> int:
        """The bytes of the body."""
        return sum(map(len, self.pieces))

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The headers as WSGI and HTTP/1.1 write them."""
        own = [("Content-Type", "application/json"), ("Content-Length", str(self.length))]
        return [*own, *self.more_headers.items(), ("X-Request-ID", self.request_id)]

    @property
    def start_message(self) -> dict[str, Any]:
        """The status and the headers as ASGI sends them."""
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % self.length)]
        for name, value in self.more_headers.items():
            headers.append((name.lower().encode(), value.encode("latin-1")))
        headers.append((b"x-request-id", self.request_id.encode()))
        return {"type": "http.response.start", "status": self.status, "headers": headers}


@dataclass(frozen=True, slots=True)
class Operation:
    """A row of the table from which routes, answers and the OpenAPI document are made."""

    method: str
    path: str
    name: str
    summary: str
    endpoint: Callable[[Service, Request], Awaitable[Response]]
    takes: Literal["query", "body", None] = None
    gives: str = "Status"
    errors: tuple[int, ...] = ()
    access: Literal["key", "docs", "open"] = "key"  # "docs": as `auth.open_docs` says


def needs_key(operation: Operation, settings: Settings) -> bool:
    """Whether an operation answers only to an API key."""
    is_closed = operation.access == "key" or (operation.access == "docs" and not settings.auth.open_docs)
    return is_closed and bool(settings.auth.api_keys)


async def predict_query(service: Service, request: Request) -> Response:
    rows = service.contract.parse_query(request.query)
    return Response((await service.predict(request, rows)).render())


async def predict_body(service: Service, request: Request) -> Response:
    _check_media_type(request)
    body = cast(bytes, request.body)
    limit = service.settings.limits.max_rows
    if len(body) > PIECE_BYTES:
        request.body = b""  # the job holds it
        return Response(await service.predict_long(request, LongBody(service.model.arrays, body, limit)))
    rows, is_array = read_rows(service.contract, body, limit)
    answers = (await service.predict(request, rows)).render() if rows else []
    return Response([b"[%b]" % b",".join(answers)] if is_array else answers)


def read_rows(contract: Contract, body: bytes, max_rows: int) -> tuple[Rows, bool]:
    """Return the rows of a body, and whether they are an array. Raises `ServingError`."""
    payload = parse_json(body)
    is_array = isinstance(payload, list)
    if is_array and len(payload) > max_rows:
        raise ContentTooLarge(f"the body has {len(payload)} rows; send at most {max_rows} rows")
    return contract.parse_payload(payload), is_array


class LongBody:
    """A body that takes long to decode. It is decoded, and its answers are written, in the call that predicts them."""

    def __init__(self, arrays: Arrays, body: bytes, max_rows: int) -> None:
        self.n_rows = max(1, body.count(b"{"))  # or fewer, where braces are in texts
        self.is_long = len(body) > LONG_BYTES
        self._arrays, self._body, self._max_rows = arrays, body, max_rows
        self._is_array = True

    def decode(self) -> Any:
        """Return X, or None for an empty array. Raises `ServingError`."""
        body, self._body = self._body, b""
        inputs = read_long_array(self._arrays, body, self._max_rows)
        if inputs is not None:
            X = self._arrays.join(inputs)
        else:
            with collector_off():
                try:
                    rows, self._is_array = read_rows(self._arrays.contract, body, self._max_rows)
                except ServingError as error:
                    # They hold what was decoded, which should end before the collector sees it.
                    error.__traceback__ = error.__context__ = None
                    raise
                X = self._arrays.of_rows(rows) if rows else None
        self.n_rows = 0 if X is None else len(X)
        return X

    def encode(self, predictions: Predictions | None) -> list[bytes]:
        """Return the pieces of the answer."""
        if predictions is None:
            return [b"[]"]
        return predictions.render_array(self.n_rows) if self._is_array else predictions.render()


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Keep the garbage collector from what is decoded: there is no garbage in it, and it may be millions of objects,
    which the collector would go through again and again."""
    with DECODING:
        was_on = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_on:
                gc.enable()


def read_long_array(arrays: Arrays, body: bytes, max_rows: int) -> list[Any] | None:
    """Return X for an array of rows, in parts: decoded as a whole it takes many times its size.

    Return None for all else, and for rows that should be refused: the whole says why.
    """
    if not ARRAY_OF_OBJECTS.match(body):
        return None
    inputs: list[Any] = []
    n_rows = 0
    with contextlib.suppress(ServingError):
        for part in split_array(body):
            if len(part) > MAX_PIECE_BYTES:
                return None  # or what may be no row at all would be decoded twice
            X = arrays.of_numbers_in(part)
            if X is None:
                rows = arrays.contract.check(parse_json(part))
                if rows is None:
                    return None
                X = arrays.of_rows(rows)
            inputs.append(X)
            n_rows += len(X)
            if n_rows > max_rows:
                return None
        return inputs
    return None


def split_array(body: bytes) -> Iterator[bytes]:
    """Split a JSON array of objects into arrays of some of them each.

    A cut inside a string or inside another value leaves a part that is no JSON, so valid parts make up the whole.
    """
    match = re.match(rb"[ \t\r\n]*\[", body)
    start = match.end() if match else len(body)
    while cut := BETWEEN_OBJECTS.search(body, start + PIECE_BYTES):
        yield b"[%b}]" % body[start : cut.start()]
        start = cut.end() - 1
    yield b"[%b" % body[start:]


RESTART_S = 5.0  # that a service that ends may need to be there again


async def live(service: Service, request: Request) -> Response:
    return Response.of({"status": "live"})


async def ready(service: Service, request: Request) -> Response:
    if service.is_ending:
        raise Unavailable("the service is ending", RESTART_S)
    return Response.of({"status": "ready", **service.identity})


async def openapi(service: Service, request: Request) -> Response:
    return Response([service.openapi_json])


def _check_media_type(request: Request) -> None:
    encoding = request.header("content-encoding")
    if encoding not in (None, "identity"):
        raise UnsupportedMediaType(f"Content-Encoding is {shorten(encoding)!r}; send the body as it is")
    given = request.header("content-type")
    if given == "application/json":
        return
    media_type, _, parameters = (given or "").lower().partition(";")
    charset = parameters.strip().removeprefix("charset=").strip('"')
    if media_type.strip() != "application/json" or charset not in ("", "utf-8"):
        seen = "missing" if given is None else repr(shorten(given))
        raise UnsupportedMediaType(f"Content-Type is {seen}; use 'application/json'")


def parse_json(body: Any) -> Any:
    """Decode a JSON body as RFC 8259 has it: no NaN, no Infinity, no key twice. Raises `BadRequest`."""
    if not body:
        raise BadRequest("the body is empty; send a JSON object or an array of them")
    try:
        return jiter.from_json(body, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="keys")
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {shorten(str(error))}") from None


PREDICTIONS = "/predictions"
OPERATIONS = (
    Operation(
        "GET",
        PREDICTIONS,
        "predict_query",
        "Predict one row, given as query parameters",
        predict_query,
        takes="query",
        gives="Prediction",
        errors=(400, 401, 408, 413, 422, 429, 500, 503),
    ),
    Operation(
        "POST",
        PREDICTIONS,
        "predict_body",
        "Predict one row, or each row of an array in its order",
        predict_body,
        takes="body",
        gives="Prediction",
        errors=(400, 401, 408, 413, 415, 422, 429, 500, 503),
    ),
    Operation("GET", "/ping", "ping", "Whether the process answers", live, access="open"),
    Operation("GET", "/health/live", "live", "Whether the process answers", live, access="open"),
    Operation("GET", "/health/ready", "ready", "Whether the model is usable", ready, errors=(503,), access="open"),
    Operation(
        "GET", "/openapi.json", "openapi", "This document", openapi, gives="Document", errors=(401,), access="docs"
    ),
)


# OpenAPI --------------------------------------------------------------------------------------------------------------


class Status(BaseModel):
    status: str
    model: str | None = None
    model_sha256: str | None = None  # of the artifact's bytes
    settings_sha256: str | None = None  # of every value in force but the secrets


class Problem(BaseModel):
    detail: str


class BadCell(BaseModel):
    type: str
    loc: list[str | int]
    msg: str
    input: Any


class ValidationProblem(BaseModel):
    detail: list[BadCell]


NUMBER = {"type": ["number", "null"]}  # what is no number in JSON is null


def describe_api(
    settings: Settings, contract: Contract, predictor: Predictor, sample: dict[str, Any]
) -> dict[str, Any]:
    """Make the OpenAPI 3.1 document from the table of operations; `sample` is the answer to the contract's example."""
    schemas = _schemas(contract) | {"Prediction": _describe_prediction(predictor, sample)}
    example = (contract.example, sample) if contract.is_known else (None, None)
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        secured = needs_key(operation, settings)
        described = _describe(operation, schemas, example, contract.nullable, secured)
        paths.setdefault(operation.path, {})[operation.method.lower()] = described
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": settings.model.name, "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if settings.auth.api_keys:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
    return document


def _schemas(contract: Contract) -> dict[str, Any]:
    types: dict[str, Any] = {
        "Features": contract.row,
        "Status": TypeAdapter(Status),
        "Problem": TypeAdapter(Problem),
        "ValidationProblem": TypeAdapter(ValidationProblem),
    }
    inputs: list[Any] = [(name, "validation", adapter) for name, adapter in types.items()]
    references, definitions = TypeAdapter.json_schemas(inputs, ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = definitions.get("$defs", {})
    for (name, _), schema in references.items():
        schemas.setdefault(name, schema)
    schemas["Document"] = {"type": "object"}
    return schemas


def _describe_prediction(predictor: Predictor, sample: dict[str, Any]) -> dict[str, Any]:
    """Give the JSON Schema of an answer: that of the sample, with the classes that there are."""
    prediction = sample["prediction"]
    if isinstance(prediction, dict):
        unknown: list[Any] = [None] * len(prediction)
        outputs = zip(prediction.items(), predictor.classes_by_output or unknown, strict=True)
        described = _describe_object({name: _describe_output(value, known) for (name, value), known in outputs})
    else:
        described = _describe_output(prediction, predictor.classes)
    properties = {"prediction": described}
    if predictor.score is not None:
        properties[predictor.score] = _describe_like(sample[predictor.score], NUMBER)
    return {"title": "Prediction"} | _describe_object(properties)


def _describe_output(value: Any, classes: list[Any] | None) -> dict[str, Any]:
    if classes is not None and all(isinstance(label, str | int) for label in classes):
        return {"enum": classes}
    if isinstance(value, int | float | None) and not isinstance(value, bool):
        return NUMBER
    return {"type": {bool: "boolean", str: "string"}[type(value)]} if type(value) in (bool, str) else {}


def _describe_like(value: Any, leaf: dict[str, Any]) -> dict[str, Any]:
    if isinstance(value, dict):
        return _describe_object({name: _describe_like(item, leaf) for name, item in value.items()})
    return {"type": "array", "items": leaf} if isinstance(value, list) else leaf


def _describe_object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _describe(
    operation: Operation, schemas: Mapping[str, Any], example: Any, nullable: list[str], secured: bool
) -> dict[str, Any]:
    """Describe an operation; `example` is a row and its prediction, `nullable` names what a query can leave out."""
    described: dict[str, Any] = {"operationId": operation.name, "summary": operation.summary}
    row, answer = example if operation.gives == "Prediction" else (None, None)
    schema: dict[str, Any] = _reference(operation.gives)
    if operation.takes == "query":
        described["parameters"] = [
            {"name": name, "in": "query", "required": name not in nullable, "schema": cell}
            for name, cell in schemas["Features"]["properties"].items()
        ]
    if operation.takes == "body":
        schema = _one_or_many(schema)
        content = _content(_one_or_many(_reference("Features")), row)
        described["requestBody"] = {"required": True, "content": content}
    described["responses"] = {"200": _answer_described(200, _content(schema, answer))}
    for status in operation.errors:
        if status != 401 or secured:
            content = _content(_reference("ValidationProblem" if status == 422 else "Problem"))
            described["responses"][str(status)] = _answer_described(status, content)
    if secured:
        described["security"] = [{"bearer": []}, {"api_key": []}]
    return described


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _one_or_many(schema: dict[str, Any]) -> dict[str, Any]:
    return {"oneOf": [schema, {"type": "array", "items": schema}]}


def _content(schema: dict[str, Any], example: Any = None) -> dict[str, Any]:
    media = {"schema": schema} if example is None else {"schema": schema, "example": example}
    return {"application/json": media}


def _answer_described(status: int, content: dict[str, Any]) -> dict[str, Any]:
    headers = {"X-Request-ID": {"schema": {"type": "string"}}}
    return {"description": HTTPStatus(status).phrase, "headers": headers, "content": content}


# Service --------------------------------------------------------------------------------------------------------------


class Service:
    """Everything the two frameworks share: settings, contract, predictor, and the answer to a request."""

    is_ending: ClassVar[bool] = False  # with this process no other one takes over

    def __init__(self, settings: Settings, model: Model, proof: Proof) -> None:
        self.settings = settings
        self.model = model.proven(proof)
        self.contract = model.contract
        self.routes: dict[str, dict[str, Operation]] = {}
        for operation in OPERATIONS:
            self.routes.setdefault(operation.path, {})[operation.method] = operation
        max_wait_s, limits = settings.batching.max_wait_ms / 1000, settings.limits
        self.queue = BatchQueue(
            self.model.predict_rows,
            self.model.predict,
            settings.batching.max_rows,
            max_wait_s,
            limits.max_queued_rows,
            limits.request_timeout_s,
            proof.never_batched is None,
            CallCost(proof.call_s, proof.row_s),
        )
        self._api_keys = [key.get_secret_value().encode() for key in settings.auth.api_keys]

    @functools.cached_property
    def _log(self) -> Any:
        return log.bind()  # once, for a proxy would do it for each line; but not before logging is configured

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What is served: the model's name and the hashes of artifact and settings, for readiness and the log."""
        hashes = {"model_sha256": self.model.sha256, "settings_sha256": self.settings.sha256}
        return {"model": self.settings.model.name, **hashes}

    def note_python(self) -> None:
        """Log whether the golden rows are of another Python. Answers do not depend on it, so it is no warning."""
        golden, running = self.model.golden and self.model.golden.versions.get("python"), running_versions()["python"]
        if golden not in (None, running):
            log.info("python_differs", golden=golden, running=running)

    async def respond(self, request: Request) -> Response:
        """Answer one request, good or bad, and log it."""
        started = time.perf_counter()
        given = request.header("x-request-id")
        request_id = given if given and SANE_REQUEST_ID.fullmatch(given) else make_request_id()
        token = REQUEST_ID.set(request_id)
        try:
            response = await self._answer(request)
            response.request_id = request_id
            if self.settings.logging.access:
                self._log.info(
                    "request",
                    method=request.method,
                    path=request.path,
                    status=response.status,
                    duration_ms=round((time.perf_counter() - started) * 1000, 3),
                    rows=request.rows,
                )
            return response
        finally:
            REQUEST_ID.reset(token)

    async def _answer(self, request: Request) -> Response:
        try:
            found = self.judge_head(request)
            if isinstance(found, Unauthorized):
                raise found
            keeps = isinstance(found, Operation) and found.takes == "body"
            await request.read_body(self.settings.limits.max_body_bytes, keeps)
            if isinstance(request.body, ServingError):
                raise request.body
            if isinstance(found, ServingError):
                raise found
            return await found.endpoint(self, request)
        except ServingError as error:
            return Response.of_error(error)
        except Exception:  # the outermost edge: whatever failed, the client learns no internals
            log.exception("request_failed", method=request.method, path=request.path)
            return Response.of({"detail": "internal error; the log has it under this X-Request-ID"}, 500)

    def judge_head(self, request: Request) -> Operation | ServingError:
        """Return the operation that a request asks for, or why it gets none, before its body is read."""
        try:
            operation = self._find(request)
            self._authorize(operation, request)
        except ServingError as error:
            return error
        return operation

    def takes_body(self, request: Request) -> bool:
        """Return whether a request is for an operation that takes its body."""
        found = self.judge_head(request)
        return isinstance(found, Operation) and found.takes == "body"

    def lacks_key(self, request: Request) -> bool:
        """Return whether a request with a body is refused for want of a key, so that the body is not to be read."""
        return request.announces_body and isinstance(self.judge_head(request), Unauthorized)

    def _find(self, request: Request) -> Operation:
        methods = self.routes.get(request.path)
        if methods is None:
            raise NotFound(f"there is no {shorten(request.path)!r}; {nearest(request.path, self.routes)}")
        operation = methods.get("GET" if request.method == "HEAD" else request.method)
        if operation is None:
            allowed = ", ".join(methods).replace("GET", "GET, HEAD")
            detail = f"{shorten(request.method)} is not allowed on {request.path}; use one of {allowed}"
            raise MethodNotAllowed(detail, {"Allow": allowed})
        return operation

    def _authorize(self, operation: Operation, request: Request) -> None:
        """Compare the key in constant time with every key, so that the time taken tells nothing."""
        if not needs_key(operation, self.settings):
            return
        scheme, _, token = (request.header("authorization") or "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else request.header("x-api-key") or ""
        matches = [hmac.compare_digest(key.encode("latin-1"), known) for known in self._api_keys]
        if not any(matches):
            detail = "no valid API key; send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
            raise Unauthorized(detail, lingers=request.announces_body)

    def predict(self, request: Request, rows: Rows) -> Awaitable[Predictions]:
        """Return the answers to some rows, of which there is one at least."""
        request.rows = len(rows)
        return request.batcher.predict(Job(len(rows), rows))

    async def predict_long(self, request: Request, body: LongBody) -> list[bytes]:
        """Return the pieces of the answer to a long body. Raises `ServingError`."""
        job = Job(body.n_rows, decode=body.decode, encode=body.encode, is_long=body.is_long)
        body.n_rows = 0
        try:
            return await request.batcher.predict(job)  # type: ignore[no-any-return]
        finally:
            request.rows = body.n_rows

    @functools.cached_property
    def openapi(self) -> dict[str, Any]:
        return describe_api(self.settings, self.contract, self.model.predictor, self.model.example_answer)

    @functools.cached_property
    def openapi_json(self) -> bytes:
        """The document as it is sent, rendered once: a model of many features makes it long."""
        return to_json(self.openapi, inf_nan_mode="strings", fallback=str)


# Flask ----------------------------------------------------------------------------------------------------------------


def build_flask(service: Service) -> flask.Flask:
    """Bind the service to Flask: a route for each path of the table; what no route matches is answered by it too."""
    import flask
    from werkzeug.exceptions import HTTPException

    app = flask.Flask(__name__, static_folder=None)
    app.extensions["serving"] = service
    app.url_map.merge_slashes = False

    endpoint = WSGIEndpoint(service)

    def view() -> flask.Response:
        response = run_now(service.respond(wsgi_request(flask.request.environ, endpoint.batcher)))
        return flask.Response(response.pieces, response.status_line, response.headers)

    def unmatched(error: Any) -> Any:
        return view() if flask.request.routing_exception else error

    for path, operations in service.routes.items():
        name = next(iter(operations.values())).name
        app.add_url_rule(path, name, view, methods=[*operations], provide_automatic_options=False)
    app.register_error_handler(HTTPException, unmatched)
    inner = app.wsgi_app

    def is_ours(path: str, method: str) -> bool:
        """Whether a request is for the service."""
        operations = service.routes.get(path, {})
        name = next((operation.name for operation in operations.values()), "")
        return (method in operations or method == "HEAD") and app.view_functions.get(name) is view

    def is_ours_alone(path: str, method: str) -> bool:
        """Whether a request is for the service, and Flask is to do nothing for it."""
        return is_ours(path, method) and not _has_hooks(app)

    def predictions_first(environ: Any, start_response: Any) -> Any:
        """Answer predictions before Flask's router, which takes longer than the service does."""
        first = environ["PATH_INFO"] == PREDICTIONS and is_ours_alone(PREDICTIONS, environ["REQUEST_METHOD"])
        return (endpoint if first else inner)(environ, start_response)

    app.extensions["serving.is_ours"] = is_ours
    app.extensions["serving.is_ours_alone"] = is_ours_alone
    app.wsgi_app = predictions_first  # type: ignore[method-assign]
    before = _count_parts(app)

    def is_bare() -> bool:
        """Whether a user has added nothing that could read a body."""
        is_ours = app.wsgi_app is predictions_first and all(each is view for each in app.view_functions.values())
        return is_ours and _count_parts(app) == before

    app.extensions["serving.is_bare"] = is_bare
    return app


def _count_parts(app: flask.Flask) -> tuple[int, int, bool]:
    """Return how many rules and handlers of errors a Flask has, and whether it has hooks: a user adds to these."""
    n_handlers = sum(len(kinds) for codes in app.error_handler_spec.values() for kinds in codes.values())
    return len([*app.url_map.iter_rules()]), n_handlers, _has_hooks(app)


def _has_hooks(app: flask.Flask) -> bool:
    """Whether a user has given a Flask something to do for each request."""
    from flask import Request, signals

    hooks = (app.before_request_funcs, app.after_request_funcs, app.teardown_request_funcs)
    more = (app.url_value_preprocessors, app.teardown_appcontext_funcs)
    of_request = (signals.request_started, signals.request_finished, signals.request_tearing_down)
    of_context = (signals.appcontext_pushed, signals.appcontext_popped, signals.appcontext_tearing_down)
    listened = any(signal.receivers for signal in (*of_request, *of_context))
    return any(hooks) or any(more) or listened or app.request_class is not Request


class WSGIEndpoint:
    """The service as a WSGI app."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.batcher = ThreadBatcher(service.queue)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        return self.answer(wsgi_request(environ, self.batcher), start_response)

    def answer(self, request: Request, start_response: Any) -> list[bytes]:
        response = run_now(self.service.respond(request))
        start_response(response.status_line, response.headers)
        return [] if request.method == "HEAD" else response.pieces


def wsgi_request(environ: dict[str, Any], batcher: ThreadBatcher) -> Request:
    """Make a `Request` of a WSGI environ."""

    def header(name: str) -> str | None:
        key = name.upper().replace("-", "_")
        return environ.get(key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}") or None

    stream = environ["wsgi.input"]
    has_end = environ.get("wsgi.input_terminated") or "CONTENT_LENGTH" in environ

    async def read(size: int) -> bytes:
        try:
            return stream.read(size) if has_end else b""
        except _stream_errors():
            raise BodyCutShort from None

    path = environ["PATH_INFO"].encode("latin-1").decode(errors="replace")
    query = environ.get("QUERY_STRING", "")
    return Request(environ["REQUEST_METHOD"], path, query, header, read, batcher)


def _stream_errors() -> tuple[type[Exception], ...]:
    """Return what a server's stream raises for a body that is cut short or malformed."""
    gunicorn = sys.modules.get("gunicorn.http.errors")
    return (OSError, gunicorn.ParseException) if gunicorn else (OSError,)


def run_now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits: under WSGI, what it awaits blocks instead."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    coroutine.close()
    raise RuntimeError("a coroutine waited where nothing can wake it")


# FastAPI --------------------------------------------------------------------------------------------------------------


def build_fastapi(service: Service) -> fastapi.FastAPI:
    """Bind the service to FastAPI: a route for each path of the table; what no route matches is answered by it too."""
    import fastapi

    endpoint = ASGIEndpoint(service)
    methods = {*service.routes[PREDICTIONS], "HEAD"}

    class App(fastapi.FastAPI):
        """A FastAPI that answers predictions before its router, which takes longer than the service does, unless
        middleware is to do something for each request."""

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            is_ours = scope["type"] == "http" and scope["path"] == PREDICTIONS and scope["method"] in methods
            if is_ours and not self.user_middleware and "build_middleware_stack" not in vars(self):
                await endpoint.answer(asgi_request(scope, receive, endpoint.batcher), receive, send)
            else:
                await super().__call__(scope, functools.partial(receive_unless_cut, scope, receive), send)

    app = App(title=service.settings.model.name, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.serving = service
    app.router.redirect_slashes = False
    not_found = app.router.default

    async def unmatched(scope: Any, receive: Any, send: Any) -> None:
        await (endpoint if scope["type"] == "http" else not_found)(scope, receive, send)

    for path, operations in service.routes.items():
        name = next(iter(operations.values())).name
        app.add_route(path, cast(Any, endpoint), name=name)  # without methods: the table knows them
    app.router.default = unmatched
    before = len(app.routes), len(app.exception_handlers)

    def is_bare() -> bool:
        """Whether a user has added nothing that could read a body."""
        is_more = app.user_middleware or "build_middleware_stack" in vars(app) or app.router.default is not unmatched
        return not is_more and (len(app.routes), len(app.exception_handlers)) == before

    app.state.is_bare = is_bare
    app.openapi = lambda: service.openapi  # type: ignore[method-assign]
    return app


CUT_SHORT = "serving.cut_short"  # in a scope: the error by which a body ended before its end


async def receive_unless_cut(scope: Any, receive: Any) -> Any:
    """Tell an app of a body that was cut short as of a client that left, but which can still be answered."""
    message = await receive()
    return {"type": "http.disconnect"} if CUT_SHORT in scope else message


class ASGIEndpoint:
    """The service as an ASGI endpoint; a class, because Starlette would wrap a function."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._batcher: LoopBatcher | None = None

    @property
    def batcher(self) -> LoopBatcher:
        """The batcher of the running loop; in tests an app may see several, one after the other."""
        loop, batcher = asyncio.get_running_loop(), self._batcher
        if batcher is None or batcher.loop is not loop:
            batcher = self._batcher = LoopBatcher(self.service.queue, loop)
        return batcher

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.answer(asgi_request(scope, receive, self.batcher), receive, send)

    async def answer(self, request: Request, receive: Any, send: Any) -> None:
        response = await self.service.respond(request)
        *pieces, last = [b""] if request.method == "HEAD" else response.pieces
        await send(response.start_message)
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if response.lingers:
            await send({"type": "http.response.body", "body": last, "more_body": True})
            await linger(receive)
            last = b""
        await send({"type": "http.response.body", "body": last})


def asgi_request(scope: Any, receive: Any, batcher: LoopBatcher) -> Request:
    """Make a `Request` of an ASGI scope."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    if len(headers) < len(scope["headers"]):
        values: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            values.setdefault(name, []).append(value)
        headers = {name: b",".join(several) for name, several in values.items()}

    def header(name: str) -> str | None:
        value = headers.get(name.encode())
        return value.strip(b" \t").decode("latin-1") if value else None

    more = True

    async def read(size: int) -> bytes:
        nonlocal more
        piece = b""
        while more and size and not piece:
            message = await receive()
            if CUT_SHORT in scope or message["type"] == "http.disconnect":
                raise scope.get(CUT_SHORT, BodyCutShort)()
            piece, more = message.get("body", b""), message.get("more_body", False)
        return piece

    path = scope["path"].removeprefix(scope.get("root_path", ""))
    query = urllib.parse.quote(scope["query_string"], safe=string.punctuation) if scope["query_string"] else ""
    return Request(scope["method"], path, query, header, read, batcher)


async def linger(receive: Any) -> None:
    """Discard what the client still sends, for a moment: closing on unread bytes would reset the connection, and the
    client might lose the answer (RFC 9112, section 9.6)."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            message = await receive()
            while message.get("more_body"):
                message = await receive()


# Bridges --------------------------------------------------------------------------------------------------------------
#
# a2wsgi carries a framework over to the other interface. Left to itself it loses chunked bodies, spins on a body that
# is cut short, abandons the task of a client that left, and runs no lifespan. So the body is read in front of it.


def as_asgi(app: Any) -> Any:
    """Give the app that `create_app` built as an ASGI app."""
    return FlaskOverASGI(app) if hasattr(app, "wsgi_app") else app


def as_wsgi(app: Any) -> Any:
    """Give the app that `create_app` built as a WSGI app."""
    return app if hasattr(app, "wsgi_app") else FastAPIOverWSGI(app)


def send_and_close(receive: Any, send: Any) -> Any:
    """Return a `send` with whose answer the connection ends, since a body that was announced was not read."""

    async def send_last(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
        elif not message.get("more_body"):
            await send({**message, "more_body": True})
            await linger(receive)
            message = {"type": "http.response.body", "body": b""}
        await send(message)

    return send_last


def start_and_close(start_response: Any) -> Any:
    """Return a `start_response` with whose answer the connection ends, as `send_and_close` does."""

    def start_last(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        return start_response(status, [*headers, ("Connection", "close")], exc_info)

    return start_last


class FlaskOverASGI:
    """A Flask app behind ASGI: it runs in a2wsgi's threads, of which waiting predictions would leave none for health;
    so what needs no Flask is answered in the loop."""

    def __init__(self, app: flask.Flask) -> None:
        from a2wsgi import WSGIMiddleware

        self.service: Service = app.extensions["serving"]
        self.endpoint = ASGIEndpoint(self.service)
        self.is_ours: Callable[[str, str], bool] = app.extensions["serving.is_ours"]
        self.is_ours_alone: Callable[[str, str], bool] = app.extensions["serving.is_ours_alone"]
        self.is_bare: Callable[[], bool] = app.extensions["serving.is_bare"]  # no code of a user's may read a body
        self.bridge: Any = WSGIMiddleware(app)  # type: ignore[arg-type]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.bridge(scope, receive, send)
            return
        request = asgi_request(scope, receive, self.endpoint.batcher)
        if self.is_ours_alone(request.path, request.method):
            await self.endpoint.answer(request, receive, send)
            return
        if self.is_ours(request.path, request.method) and self.service.lacks_key(request):
            request.body, send = b"", send_and_close(receive, send)
        body = await request.read_body(self.service.settings.limits.max_body_bytes, keeps=not self.is_bare())
        if isinstance(body, ServingError):
            await self.endpoint.answer(request, receive, send)
            return
        # As gunicorn does it: white space ends with the field; names with "_", which WSGI takes for "-", are left out.
        framing = (b"content-length", b"transfer-encoding")
        kept = [pair for pair in scope["headers"] if pair[0] not in framing and b"_" not in pair[0]]
        headers = [(name, value.strip(b" \t")) for name, value in kept]
        headers.append((b"content-length", b"%d" % len(body)))

        async def receive_body() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        await self.bridge({**scope, "headers": headers, "query_string": request.query.encode()}, receive_body, send)


class FastAPIOverWSGI:
    """A FastAPI app behind WSGI: it runs in one event loop, in a thread that starts with the first request.

    Nothing starts before that, for a thread does not live on in the workers forked from its process. `start` is for
    a server that wants the app's start-up events before the first request, `stop` for one that says when it ends.
    """

    def __init__(self, app: fastapi.FastAPI) -> None:
        self.app = app
        self.service: Service = app.state.serving
        self._bridge: Any = None
        self._end: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._endpoint = WSGIEndpoint(self.service)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        self.start()
        request = wsgi_request(environ, self._endpoint.batcher)
        if self.service.lacks_key(request):
            request.body, start_response = b"", start_and_close(start_response)
        keeps = not self.app.state.is_bare() or self.service.takes_body(request)
        body = run_now(request.read_body(self.service.settings.limits.max_body_bytes, keeps))
        if isinstance(body, ServingError):
            return self._endpoint.answer(request, start_response)
        changed = {
            "PATH_INFO": request.path.encode().decode("latin-1"),
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": io.BytesIO(body),
        }
        environ = {key: value for key, value in environ.items() if key != "HTTP_TRANSFER_ENCODING"} | changed
        return list(self._bridge(environ, start_response))  # whole, or a client that leaves would strand its task

    def start(self) -> None:
        """Start the loop and run the app's start-up events, once. Raises what they raise."""
        with self._lock:
            if self._bridge is None:
                self._bridge = self._start()

    def stop(self) -> None:
        """Run the app's shut-down events, once. Raises what they raise."""
        with self._lock:
            end, self._end = self._end, lambda: None
        end()

    def _start(self) -> Any:
        from a2wsgi import ASGIMiddleware

        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="asgi", daemon=True).start()
        started: concurrent.futures.Future[Any] = concurrent.futures.Future()
        stopping = asyncio.Event()
        lifespan: concurrent.futures.Future[Any] = asyncio.run_coroutine_threadsafe(self._live(started, stopping), loop)
        concurrent.futures.wait([started, lifespan], return_when=concurrent.futures.FIRST_COMPLETED)
        if lifespan.done():
            lifespan.result()

        def end() -> None:
            loop.call_soon_threadsafe(stopping.set)
            lifespan.result()

        self._end = end
        # Where the server does not call it. Not by `atexit`, which comes after `concurrent.futures.thread` has ended
        # its threads in the same way as here: an event could not use them.
        threading._register_atexit(self.stop)  # type: ignore[attr-defined]
        return ASGIMiddleware(functools.partial(self._asgi, started.result()), loop=loop)

    async def _live(self, started: concurrent.futures.Future[Any], stopping: asyncio.Event) -> None:
        async with self.app.router.lifespan_context(self.app) as state:
            started.set_result(state or {})
            await stopping.wait()

    async def _asgi(self, state: Mapping[str, Any], scope: Any, receive: Any, send: Any) -> None:
        """Run the app, and see to it that an answer comes: without one a2wsgi would wait for ever."""
        last: dict[str, Any] = {}
        request_id = make_request_id()

        async def note(message: Any) -> None:
            nonlocal last
            last = message
            await send(message)

        try:
            await self.app({**scope, "state": dict(state)}, receive, note)
        except BaseException:  # of a route that a user added; SystemExit would end the loop
            log.exception("request_failed", method=scope["method"], path=scope["path"], request_id=request_id)
        if not last:
            response = Response.of({"detail": "internal error"}, 500)
            response.request_id = request_id
            await send(response.start_message)
            await send({"type": "http.response.body", "body": b"".join(response.pieces)})
        elif last["type"] == "http.response.start" or last.get("more_body"):
            raise RuntimeError("the answer ended early")


# Factory --------------------------------------------------------------------------------------------------------------

FRAMEWORKS: dict[str, Callable[[Service], Any]] = {"flask": build_flask, "fastapi": build_fastapi}


_current: list[Service] = []  # the service of this process, once there is one


def current_service() -> Service | None:
    """Return the service of this process: gunicorn's workers get that of their master."""
    return _current[0] if _current else None


def set_current_service(service: Service) -> None:
    """Make a service that of this process, and log as it says."""
    configure_logging(service.settings.logging)
    _current[:] = [service]


def start_service() -> Service:
    """Return the service of this process, which is loaded and proven the first time. Raises `StartupError`."""
    service = current_service()
    if service is None:
        protect_output()
        settings = load_settings()
        configure_logging(settings.logging)
        service = make_service(settings)
        set_current_service(service)
        service.note_python()
    return service


def make_service(settings: Settings) -> Service:
    """Load the model that the settings describe, and prove it in this process. Raises `StartupError`."""
    model = load(settings)
    return Service(settings, model, prove_here(settings, model))


def load(settings: Settings, report: Callable[[str], None] = lambda doing: None) -> Model:
    """Load the model that the settings describe, and name in each error the place of what is wrong.

    Raises `StartupError`.
    """
    with about(settings.artifact), settings.locate():
        return load_model(settings.model, settings.features, settings.folder, settings.threads, report)


def prove_here(settings: Settings, model: Model) -> Proof:
    """Prove a model in this process. Raises `ModelError`."""
    with about(settings.artifact):
        return prove(model)


def create_app(settings: Settings | None = None) -> flask.Flask | fastapi.FastAPI:
    """Build the app of the framework that the settings name: a `Flask` or a `FastAPI`, to extend as either is."""
    if settings is not None:
        configure_logging(settings.logging)
    service = start_service() if settings is None else make_service(settings)
    app: flask.Flask | fastapi.FastAPI = FRAMEWORKS[service.settings.framework](service)
    return app


@functools.cache
def native_app() -> flask.Flask | fastapi.FastAPI:
    """Build the app for a server that asks this module for it; a mistake in the settings ends the process."""
    with exit_on_startup_error():
        return create_app()


def app_for_command() -> flask.Flask | fastapi.FastAPI:
    """Give the app as it is, unless the command that asks for it runs only the other framework's apps."""
    script = Path(sys.argv[0])
    command = script.parent.name if script.stem == "__main__" else script.stem
    with exit_on_startup_error():
        settings = start_service().settings
        needed, cure = COMMANDS.get(command, (settings.framework, ""))
        if settings.framework != needed:
            place = settings.place("framework")
            raise SettingsError(f"{place} is {settings.framework!r}, but `{command}` takes {needed!r}; {cure}")
    return native_app()


COMMANDS = {
    "flask": ("flask", "set SERVING_FRAMEWORK=flask, or run `uvicorn app:app`"),
    "uvicorn": ("fastapi", "set SERVING_FRAMEWORK=fastapi, or run `uvicorn app:asgi`"),
}
MODULE_ATTRIBUTES: dict[str, Callable[[], Any]] = {
    "app": app_for_command,
    "asgi": lambda: as_asgi(native_app()),
    "wsgi": lambda: as_wsgi(native_app()),
}


def __getattr__(name: str) -> Any:
    """Make `app`, `asgi` and `wsgi` when a server first asks for them, so that importing this module does nothing."""
    if name not in MODULE_ATTRIBUTES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = MODULE_ATTRIBUTES[name]()
    return globals()[name]


STARTUP_STATUS = 4


@contextlib.contextmanager
def exit_on_startup_error() -> Iterator[None]:
    """End the process with the message alone: an operator's mistake is not worth a traceback.

    Its status is gunicorn's "app failed to load", on which its master stops instead of starting worker after worker;
    3, uvicorn's, would make Flask's reloader start over without end.
    """
    try:
        yield
    except StartupError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(STARTUP_STATUS)


if __name__ == "__main__":
    with exit_on_startup_error():
        print_settings(load_settings())

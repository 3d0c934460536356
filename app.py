"""Serve one scikit-learn predictor over HTTP, through Flask or FastAPI, as `settings.toml` says.

The path of a request, the same under both frameworks:

1. the framework's route hands it to the binding, which makes a `Request` of it;
2. `Service.respond` gives it an id, reads its body up to the limit and finds its `Operation`;
3. the operation's endpoint turns bytes into an array, by the `Contract`;
4. the `Predictor` turns the array into predictions;
5. the `Response` goes back through the binding, byte for byte the same under each.

Run it with `gunicorn -c gunicorn.conf.py`, or while developing with `flask --app app run --debug` or
`uvicorn app:app --reload`; `python app.py` prints the settings in force. `app:app` is the framework's own object,
`app:asgi` and `app:wsgi` are the same service behind either interface.

Sections: errors, settings, logging, contract, predictor, endpoints, OpenAPI, service, Flask, FastAPI, bridges,
factory.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import difflib
import functools
import hmac
import io
import itertools
import json
import logging
import os
import pickle
import re
import reprlib
import string
import sys
import threading
import time
import tomllib
import urllib.parse
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

import jiter
import joblib
import numpy as np
import structlog
from gunicorn.http.errors import ParseException
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
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import to_json
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from typing_extensions import TypedDict

if TYPE_CHECKING:
    import fastapi
    import flask

T = TypeVar("T")
Key = tuple[str, ...]  # of a setting, such as ("server", "workers")
Sources = dict[Key, str]  # what gives the value of a setting
HERE = Path(__file__).resolve().parent
log = structlog.get_logger()
MAX_NAME = 100  # characters up to which a name is compared with the right ones, which takes their product's time


def nearest(name: str, names: Iterable[str]) -> str:
    """Say what `name` should have been: the one name close to it, or else all of `names`."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1) if len(name) <= MAX_NAME else []
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(map(repr, names))}"


# Errors ---------------------------------------------------------------------------------------------------------------


class StartupError(Exception):
    """A mistake of the operator's, found before the service listens; its text is the whole message."""


class SettingsError(StartupError):
    """The settings file or a `SERVING_…` variable is wrong."""


class ModelError(StartupError):
    """The artifact is missing, cannot be loaded, or is not a fitted predictor."""


class ServingError(Exception):
    """An answer other than success. `detail` is what the client reads, so it holds no internals."""

    status: ClassVar[int] = 500

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


class Unauthorized(ServingError):
    status = 401


class NotFound(ServingError):
    status = 404


class MethodNotAllowed(ServingError):
    status = 405


class ContentTooLarge(ServingError):
    status = 413


class BodyTooLarge(ContentTooLarge):
    """The body is longer than the limit, and the rest of it may be on its way: the connection ends here."""

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(f"{what}; send at most {limit} bytes", {"Connection": "close"})


class UnsupportedMediaType(ServingError):
    status = 415


class Unprocessable(ServingError):
    """Well-formed input that the contract refuses; `detail` lists `{type, loc, msg, input}`, one for each bad cell."""

    status = 422


# Settings -------------------------------------------------------------------------------------------------------------


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


ADDRESS = re.compile(r"(?:[\w.-]*|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})|unix:[^\x00-\x1f]+|fd://[0-9]+", re.ASCII)
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


Address = Annotated[str, AfterValidator(_check_address)]


class ServerSettings(Section):
    """Gunicorn's own names and units; `gunicorn.conf.py` hands them on."""

    worker_class: Literal["auto", "uvicorn", "gevent"] = "auto"
    workers: PositiveInt | Literal["auto"] = "auto"
    bind: Address | Annotated[list[Address], Field(min_length=1)] = "127.0.0.1:8000"
    backlog: Annotated[PositiveInt, Field(lt=2**31)] = 2048
    timeout: NonNegativeInt = 30
    graceful_timeout: PositiveInt = 30
    keepalive: PositiveInt = 5
    max_requests: NonNegativeInt = 0
    max_requests_jitter: NonNegativeInt = 0


class ModelSettings(Section):
    path: Annotated[str, Field(pattern=r"^[^\x00]+$")] = "model/iris.skops"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "iris"
    trusted_types: list[str] = []


class FeatureSettings(Section):
    """What the estimator cannot say of one feature."""

    type: Literal["float", "int", "bool"] = "float"
    ge: Annotated[float, Field(allow_inf_nan=False)] | None = None
    le: Annotated[float, Field(allow_inf_nan=False)] | None = None
    missing: bool = False
    unit: str | None = None
    example: int | Annotated[float, Field(allow_inf_nan=False)] | bool | None = None

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        bounds = [bound for bound in (self.ge, self.le) if bound is not None]
        if bounds and self.type == "bool":
            raise ValueError("a bool should have no bounds")
        if self.type == "int" and not all(bound.is_integer() for bound in bounds):
            raise ValueError("an int should have whole numbers as bounds")
        if any(abs(bound) > LIMITS[self.type] for bound in bounds):
            raise ValueError(f"a feature should have bounds within ±{LIMITS[self.type]:.8g}")
        if bounds != sorted(bounds):
            raise ValueError("bounds should have ge no greater than le")
        return self


class LimitSettings(Section):
    max_body_bytes: PositiveInt = 8_388_608
    max_rows: PositiveInt = 10_000


class LoggingSettings(Section):
    level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    format: Literal["auto", "json", "console"] = "auto"
    access: bool = True


class AuthSettings(Section):
    api_keys: list[Annotated[SecretStr, AfterValidator(_check_key)]] = []


class Settings(Section):
    """Every choice of the service, read once at the start by `load_settings`."""

    framework: Literal["flask", "fastapi"] = "fastapi"
    server: ServerSettings = ServerSettings()
    model: ModelSettings = ModelSettings()
    features: dict[str, FeatureSettings] = {}
    limits: LimitSettings = LimitSettings()
    logging: LoggingSettings = LoggingSettings()
    auth: AuthSettings = AuthSettings()

    _file: Path = PrivateAttr(default=HERE / "settings.toml")
    _sources: Sources = PrivateAttr(default_factory=dict)

    def source(self, *key: str) -> str:
        """Say what gives the value of a setting: the file, a variable of the environment, or its default."""
        return _source(key, self._sources)

    def place(self, *key: str) -> str:
        """Say where the value of a setting stands, for a message about it."""
        return _place(key, self._sources)

    @property
    def model_path(self) -> Path:
        """The artifact's place; `model.path` is relative to the settings file."""
        return self._file.parent / self.model.path

    @property
    def worker_class(self) -> Literal["uvicorn", "gevent"]:
        """The worker that `server.worker_class` means: by default the one of the framework's own interface."""
        if self.server.worker_class == "auto":
            return "uvicorn" if self.framework == "fastapi" else "gevent"
        return self.server.worker_class

    @property
    def workers(self) -> int:
        """How many workers `server.workers` means: by default the cores left by affinity and cgroup quota."""
        return joblib.cpu_count() if self.server.workers == "auto" else self.server.workers


class Environment(EnvSettingsSource):
    """The `SERVING_…` variables, nested like the file. Text that should be JSON and is not is left to validation."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except (ValueError, RecursionError):
            return value


class SettingsWithEnvironment(BaseSettings, Settings):
    """`Settings` in which the environment wins over the values passed in, those of the file."""

    model_config = SettingsConfigDict(env_prefix="SERVING_", env_nested_delimiter="__")

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **others: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return Environment(settings_cls), init_settings


def load_settings(path: str | os.PathLike[str] | None = None) -> Settings:
    """Read the settings: the environment first, then the file, then defaults.

    `path` is the file; without it `SERVING_SETTINGS`, and without that the `settings.toml` beside this module.
    Raises `SettingsError` with every mistake: place, value seen, what is allowed.
    """
    file = Path(path or os.environ.get("SERVING_SETTINGS") or HERE / "settings.toml").absolute()
    values = _read_toml(file)
    _refuse_unknown_variables()
    sources: Sources = dict.fromkeys(leaves(values), file.name)
    try:
        # TOML has types, so its values are held to them; a variable is text, which is parsed.
        Settings.model_validate(values, strict=True)
        given = leaves(Environment(SettingsWithEnvironment)())
        environment = {key: f"environment: {_variable_of(key)}" for key in given}
        sources = environment | sources | environment  # it comes first, and its values win
        settings = SettingsWithEnvironment(**values)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(error, sources))) from None
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


def _refuse_unknown_variables() -> None:
    """Refuse a `SERVING_…` variable that is no setting, which pydantic-settings would ignore (its issue 985)."""
    known = {key[:end] for key in setting_keys() for end in range(1, len(key) + 1)}
    lines: list[str] = []
    for variable in map(str.upper, os.environ):
        key = tuple(variable.removeprefix("SERVING_").lower().split("__"))
        ours = variable.startswith("SERVING_") and variable != "SERVING_SETTINGS"
        if ours and key not in known and key[0] != "features":
            hint = nearest(variable, map(_variable, setting_keys()))
            lines.append(f"environment: {variable} is not a setting; {hint}")
    if lines:
        raise SettingsError("\n".join(lines))


def setting_keys(model: type[BaseModel] = Settings, prefix: Key = ()) -> Iterator[Key]:
    """Name every setting as its path of keys, such as `("server", "workers")`."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from setting_keys(info.annotation, (*prefix, name))
        else:
            yield (*prefix, name)


def leaves(values: Mapping[str, Any], prefix: Key = ()) -> Iterator[Key]:
    """Name every value of nested tables as its path of keys; an empty table counts as a value."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*prefix, name))
        else:
            yield (*prefix, name)


def _variable(key: Iterable[str]) -> str:
    return "SERVING_" + "__".join(key).upper()


def _variable_of(key: Key) -> str:
    """Name the variable that gives a value of the environment: its own, or one with a table that it is in."""
    names = [_variable(key[:end]) for end in range(len(key), 0, -1)]
    return next(name for name in names if name in map(str.upper, os.environ))


def _source(key: Key, sources: Sources) -> str:
    return next((source for known, source in sources.items() if known[: len(key)] == key), "default")


def _place(key: Key, sources: Sources) -> str:
    source = _source(key, sources)
    return source if source == f"environment: {_variable(key)}" else f"{source}: {'.'.join(map(_toml_key, key))}"


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_value(name)


def _toml_value(value: Any) -> str:
    """Write a text, number, truth or list of them: as in JSON, but that TOML wants DEL escaped too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _explain(error: ValidationError, sources: Sources) -> list[str]:
    """Say each mistake in a line: place, value seen, what is allowed."""
    shoulds: dict[str, list[str]] = {}
    lines: list[str] = []
    for problem in error.errors(include_url=False):
        key = _setting_of([str(part) for part in problem["loc"]])
        place = _place(key, sources)
        if problem["type"] == "extra_forbidden":
            level = len(key) - 1
            siblings = [known[level] for known in setting_keys() if known[:level] == key[:level]]
            names = FeatureSettings.model_fields if key[0] == "features" else dict.fromkeys(siblings)
            lines.append(f"{place} is not a setting; {nearest(key[-1], names)}")
        else:
            seen = "**********" if key[0] == "auth" else reprlib.repr(problem["input"])
            shoulds.setdefault(f"{place} is {seen}", []).append(_should(problem))
    return lines + [f"{what}; it should {' or '.join(options)}" for what, options in shoulds.items()]


def _setting_of(loc: list[str]) -> Key:
    """Give the setting that pydantic's `loc` is about; it goes on into the branches of a union."""
    lengths = [len(key) for key in setting_keys() if list(key) == loc[: len(key)]]
    return tuple(loc[:3] if loc[0] == "features" else loc[: lengths[0]] if lengths else loc)


def _should(problem: Any) -> str:
    kinds = {
        "model_type": "be a table of keys",
        "dict_type": "be a table of keys",
        "list_type": "be a list (in a variable, as JSON)",
    }
    said: str = kinds.get(problem["type"], re.sub(r"^.* should ", "", problem["msg"]))
    return said.partition(", unable to")[0]


# Logging --------------------------------------------------------------------------------------------------------------

REQUEST_ID: ContextVar[str] = ContextVar("request_id")
ANSI_STYLE = re.compile(r"\x1b\[[0-9;]*m")
SERVER_LOGGERS = ("gunicorn.error", "uvicorn", "uvicorn.error", "uvicorn.asgi", "werkzeug", "py.warnings")
SERVER_ACCESS_LOGGERS = ("gunicorn.access", "uvicorn.access")


def configure_logging(settings: LoggingSettings) -> None:
    """Send every event of the process, ours, the servers' and Python's warnings, to stderr as one line each."""
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    console = settings.format == "console" or (settings.format == "auto" and sys.stderr.isatty())
    renderer = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if console
        else structlog.processors.JSONRenderer()
    )
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        _add_process_and_request,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering = [_escape_controls if console else structlog.processors.format_exc_info, renderer]
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
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


def _is_no_access_line(record: logging.LogRecord) -> bool:
    return record.levelno != logging.INFO or " - - [" not in str(record.msg)


def _take_over(name: str, handlers: list[logging.Handler]) -> logging.Logger:
    """Replace a logger's handlers. Without any it is silent: the access line is `Service.respond`'s alone."""
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = handlers, False
    return logger


def _add_process_and_request(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["pid"] = os.getpid()
    request_id = REQUEST_ID.get(None)
    if request_id is not None:
        event["request_id"] = request_id
    return event


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


# Contract -------------------------------------------------------------------------------------------------------------

make_typed_dict: Any = TypedDict  # called with names known only at run time, which type checkers do not allow
FEATURE_TYPES: dict[str, Any] = {"float": float, "int": int, "bool": bool}
MAX_PROBLEMS = 1000  # bad cells named in one answer


class Contract:
    """The types of input: which features a row has, in the order in which the estimator takes them.

    `names` come from the estimator; `settings.features` completes them. Raises `SettingsError` for a feature that
    the estimator does not have.
    """

    def __init__(self, names: list[str], settings: Settings) -> None:
        for name in settings.features.keys() - set(names):
            place = settings.place("features", name)
            raise SettingsError(f"{place} is not about a feature of the model; {nearest(name, names)}")
        self.names = names
        self.features = {name: settings.features.get(name, FeatureSettings()) for name in names}
        cells = {name: _cell_type(feature) for name, feature in self.features.items()}
        for name, example in self.example.items():
            try:
                TypeAdapter(cells[name]).validate_python(example, strict=True)
            except ValidationError as error:
                place = settings.place("features", name, "example")
                raise SettingsError(f"{place} is {example!r}; it should {_should(error.errors()[0])}") from None
        row = make_typed_dict("Features", cells)
        row.__pydantic_config__ = ConfigDict(extra="forbid")
        rows: Any = Annotated[list[row], FailFast()]  # type: ignore[valid-type]
        self.row: TypeAdapter[dict[str, Any]] = TypeAdapter(row)
        self.rows: TypeAdapter[list[dict[str, Any]]] = TypeAdapter(rows)

    @property
    def example(self) -> dict[str, Any]:
        """One row as the settings' examples give it; the features without one are left out."""
        return {name: cell.example for name, cell in self.features.items() if cell.example is not None}

    def parse_query(self, query: str) -> list[dict[str, Any]]:
        """Read one row from a query string, in which every value is text. Raises `BadRequest`, `Unprocessable`."""
        try:
            pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, errors="strict")
        except ValueError:
            raise BadRequest("the query is not percent-encoded UTF-8") from None
        cells = dict(pairs)
        if len(cells) < len(pairs):
            raise Unprocessable(list(_find_repeated(pairs)))
        try:
            return [self.row.validate_strings(cells, strict=False)]
        except ValidationError as error:
            raise Unprocessable(list(self._problems(["query"], error))) from None

    def parse_payload(self, payload: Any) -> list[dict[str, Any]]:
        """Check one row, or a list of rows, as decoded from JSON. Raises `Unprocessable`."""
        try:
            if isinstance(payload, list):
                return self.rows.validate_python(payload, strict=True)
            return [self.row.validate_python(payload, strict=True)]
        except ValidationError:
            raise Unprocessable(list(itertools.islice(self._find_problems(payload), MAX_PROBLEMS))) from None

    def _find_problems(self, payload: Any) -> Iterator[dict[str, Any]]:
        """Check row by row, so that an answer of bounded length costs a bounded time."""
        rows = enumerate(payload) if isinstance(payload, list) else [(None, payload)]
        for index, row in rows:
            place = ["body"] if index is None else ["body", index]
            if isinstance(row, dict) and len(row) > len(self.names) + MAX_PROBLEMS:
                message = f"Object should have at most {len(self.names)} features, not {len(row)}"
                yield _problem("too_long", place, message, None)
                continue
            try:
                self.row.validate_python(row, strict=True)
            except ValidationError as error:
                yield from self._problems(place, error)

    def _problems(self, place: list[Any], error: ValidationError) -> Iterator[dict[str, Any]]:
        """Say pydantic's errors in the words of JSON; `place` goes in front of each `loc`."""
        for problem in error.errors(include_url=False, include_context=False):
            kind, message, given = problem["type"], problem["msg"], problem["input"]
            if kind == "extra_forbidden":
                message = f"Unknown feature; {nearest(str(problem['loc'][-1]), self.names)}"
            elif kind == "dict_type":
                message = "Input should be an object" + (" or an array of objects" if place == ["body"] else "")
            elif kind == "missing":
                given = None  # not the whole row, once for each feature that it lacks
            yield _problem(kind, [*place, *problem["loc"]], message, given)

    def to_array(self, rows: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
        """Give checked rows as X, float64 of shape (len(rows), len(names)); a missing value is NaN."""
        X = np.array([[row[name] for name in self.names] for row in rows], dtype=np.float64)
        return X.reshape(len(rows), len(self.names))


def _find_repeated(pairs: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    given: dict[str, list[str]] = {}
    for name, value in pairs:
        given.setdefault(name, []).append(value)
    for name, values in given.items():
        if len(values) > 1:
            yield _problem("repeated", ["query", name], "Give this parameter once", values)


def _problem(kind: str, loc: list[Any], message: str, given: Any) -> dict[str, Any]:
    return {"type": kind, "loc": loc, "msg": message, "input": given}


def _cell_type(feature: FeatureSettings) -> Any:
    """Give the pydantic type of one feature's value."""
    kind = FEATURE_TYPES[feature.type]
    extra: dict[str, Any] = {"unit": feature.unit} if feature.unit else {}
    cell: dict[str, Any] = {"examples": [feature.example]} if feature.example is not None else {}
    if limit := LIMITS.get(feature.type):
        cell["ge"] = -limit if feature.ge is None else feature.ge
        cell["le"] = limit if feature.le is None else feature.le
    if kind is float:
        cell["allow_inf_nan"] = False
    return Annotated[kind | None if feature.missing else kind, Field(**cell, json_schema_extra=extra)]


# Predictor ------------------------------------------------------------------------------------------------------------


class Predictor:
    """A fitted estimator that answers arrays. Raises `ModelError` when it is not a fitted predictor."""

    def __init__(self, estimator: Any) -> None:
        if isinstance(estimator, type):
            raise ModelError(f"holds the class {estimator.__name__}; fit an instance of it, then save that")
        kind = type(estimator).__name__
        if not callable(getattr(estimator, "predict", None)):
            raise ModelError(f"holds a {kind}, which has no predict(); save a fitted estimator")
        try:
            check_is_fitted(estimator)
        except NotFittedError:
            raise ModelError(f"holds a {kind} that is not fitted; fit it, then save it") from None
        except TypeError:
            pass  # something that predicts without having been fitted by scikit-learn's rules
        self.estimator = estimator
        self.feature_names: list[str] | None = list(map(str, getattr(estimator, "feature_names_in_", ()))) or None
        self.n_features: int | None = getattr(estimator, "n_features_in_", None)
        self.classes: list[Any] | None = self._find_classes()
        self.has_probabilities = self.classes is not None and hasattr(estimator, "predict_proba")
        self._labels = [str(label) for label in self.classes or ()]
        # The contract puts the columns in order, so X comes without names, of which scikit-learn would warn each time.
        for part in (estimator, *getattr(estimator, "named_steps", {}).values()):
            getattr(part, "__dict__", {}).pop("feature_names_in_", None)

    def _find_classes(self) -> list[Any] | None:
        classes = getattr(self.estimator, "classes_", ())
        if isinstance(classes, list) and classes and np.ndim(classes[0]):
            kind = type(self.estimator).__name__
            raise ModelError(f"holds a {kind} of {len(classes)} outputs; save one that predicts a single output")
        return np.asarray(classes).tolist() or None

    def predict(self, X: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
        """Give one answer for each row of X, shape (n_samples, n_features), in their order."""
        if not len(X):
            return []
        predictions = np.asarray(self.estimator.predict(X)).tolist()
        if not self.has_probabilities:
            return [{"prediction": prediction} for prediction in predictions]
        probabilities = np.asarray(self.estimator.predict_proba(X)).tolist()
        return [
            {"prediction": prediction, "probabilities": dict(zip(self._labels, row, strict=True))}
            for prediction, row in zip(predictions, probabilities, strict=True)
        ]


def load_predictor(settings: Settings) -> Predictor:
    """Load the artifact of the settings, by the suffix of its name. Raises `ModelError`."""
    path = settings.model_path
    load = LOADERS.get(path.suffix.lower())
    try:
        if load is None:
            raise ModelError(f"has the suffix {path.suffix!r}; use one of {', '.join(map(repr, LOADERS))}")
        return Predictor(load(path.read_bytes(), settings.model))
    except FileNotFoundError:
        others = [file.name for file in path.parent.glob("*") if file.suffix in LOADERS]
        hint = f"; {nearest(path.name, others)}" if others else ""
        problem = f"does not exist{hint}"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except ModelError as error:
        problem = str(error)
    raise ModelError(f"{settings.place('model', 'path')} is {str(path)!r}, which {problem}")


def _load_skops(data: bytes, settings: ModelSettings) -> Any:
    import skops.io  # here, for it takes with it the whole of scikit-learn: a second that other formats can do without

    with _loading("skops"):
        untrusted = set(skops.io.get_untrusted_types(data=data)) - set(settings.trusted_types)
    if untrusted:
        types = json.dumps(sorted({*untrusted, *settings.trusted_types}))
        raise ModelError(f"holds types that are not trusted; if you trust them, set model.trusted_types = {types}")
    with _loading("skops"):
        return skops.io.loads(data, trusted=settings.trusted_types)


def _load_joblib(data: bytes, settings: ModelSettings) -> Any:
    with _loading("joblib"):
        return joblib.load(io.BytesIO(data))


def _load_pickle(data: bytes, settings: ModelSettings) -> Any:
    with _loading("pickle"):
        return pickle.loads(data)


@contextlib.contextmanager
def _loading(kind: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # what a damaged or foreign artifact raises has no bounds
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ModelError(f"cannot be loaded as {kind}: {reason}") from error


LOADERS: dict[str, Callable[[bytes, ModelSettings], Any]] = {
    ".skops": _load_skops,
    ".joblib": _load_joblib,
    ".pickle": _load_pickle,
    ".pkl": _load_pickle,
}


# Endpoints ------------------------------------------------------------------------------------------------------------

SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
LINGER_S = 2.0
PIECE_BYTES = 65_536


def make_request_id() -> str:
    return os.urandom(16).hex()


@dataclass(slots=True)
class Request:
    """One request, whichever framework received it."""

    method: str
    path: str
    query: str  # percent-encoded
    header: Callable[[str], str | None]  # by lower-case name; repeated fields are joined by commas
    read: Callable[[int], Awaitable[bytes]]  # the next piece of the body, of about so many bytes; b"" at its end
    body: bytes | ServingError | None = None  # what reading it gave
    rows: int = 0

    async def read_body(self, limit: int) -> bytes | ServingError:
        """Read the whole body, but no more than `limit` bytes, into `body`; or the error that it ends with."""
        if self.body is None:
            try:
                self.body = await self._read_body(limit)
            except ServingError as error:
                self.body = error
        return self.body

    async def _read_body(self, limit: int) -> bytes:
        length = self._content_length()
        if length is None and self.header("transfer-encoding") is None:
            return b""
        if length is not None and length > limit:
            raise BodyTooLarge(f"the body is {length} bytes", limit)
        body = bytearray()
        while piece := await self.read(PIECE_BYTES if length is None else min(length - len(body), PIECE_BYTES)):
            body += piece
            if len(body) > limit:
                raise BodyTooLarge("the body is longer", limit)
        if length is not None and len(body) < length:
            raise BodyCutShort
        return bytes(body)

    def _content_length(self) -> int | None:
        given = self.header("content-length")
        # More digits are no length that could be, and Python refuses to read more than 4300 of them.
        if given is not None and not re.fullmatch("0*[0-9]{1,18}", given):
            detail = f"Content-Length is {given!r}; it should be a number of bytes"
            raise BadRequest(detail, {"Connection": "close"})
        return None if given is None else int(given[-18:])


@dataclass(slots=True)
class Response:
    """One answer, whichever framework sends it."""

    status: int
    body: bytes
    headers: dict[str, str]
    lingers: bool = False  # the client may still be sending

    @classmethod
    def of(cls, payload: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        """Render a payload as JSON; what JSON cannot say of a float becomes null, in an error's `input` a string."""
        body = to_json(payload, inf_nan_mode="null" if status == 200 else "strings")
        return cls(
            status, body, {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        )

    @property
    def status_line(self) -> str:
        """The status as WSGI and HTTP/1.1 write it."""
        return f"{self.status} {HTTPStatus(self.status).phrase}"

    @property
    def start_message(self) -> dict[str, Any]:
        """The status and the headers as ASGI sends them."""
        headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in self.headers.items()]
        return {"type": "http.response.start", "status": self.status, "headers": headers}

    @classmethod
    def of_error(cls, error: ServingError) -> Response:
        response = cls.of({"detail": error.detail}, error.status, error.headers)
        response.lingers = isinstance(error, BodyTooLarge)
        return response


@dataclass(frozen=True, slots=True)
class Operation:
    """A row of the table from which routes, answers and the OpenAPI document are made."""

    method: str
    path: str
    name: str
    summary: str
    endpoint: Callable[[Service, Request], Awaitable[Any]]
    takes: Literal["query", "body", None] = None
    gives: str = "Status"
    errors: tuple[int, ...] = ()
    open: bool = False  # answers without an API key


async def predict_query(service: Service, request: Request) -> dict[str, Any]:
    rows = service.contract.parse_query(request.query)
    return (await service.predict(request, rows))[0]


async def predict_body(service: Service, request: Request) -> Any:
    _check_media_type(request)
    payload = parse_json(request.body)
    if isinstance(payload, list) and len(payload) > service.settings.limits.max_rows:
        limit = service.settings.limits.max_rows
        raise ContentTooLarge(f"the body has {len(payload)} rows; send at most {limit} rows")
    rows = service.contract.parse_payload(payload)
    predictions = await service.predict(request, rows)
    return predictions if isinstance(payload, list) else predictions[0]


async def live(service: Service, request: Request) -> dict[str, Any]:
    return {"status": "live"}


async def ready(service: Service, request: Request) -> dict[str, Any]:
    return {"status": "ready", "model": service.settings.model.name}


async def openapi(service: Service, request: Request) -> dict[str, Any]:
    return service.openapi


def _check_media_type(request: Request) -> None:
    encoding = request.header("content-encoding")
    if encoding not in (None, "identity"):
        raise UnsupportedMediaType(f"Content-Encoding is {encoding!r}; send the body as it is")
    given = request.header("content-type")
    media_type, _, parameters = (given or "").lower().partition(";")
    charset = parameters.strip().removeprefix("charset=").strip('"')
    if media_type.strip() != "application/json" or charset not in ("", "utf-8"):
        seen = "missing" if given is None else repr(given)
        raise UnsupportedMediaType(f"Content-Type is {seen}; use 'application/json'")


def parse_json(body: Any) -> Any:
    """Decode a JSON body as RFC 8259 has it: no NaN, no Infinity, no key twice. Raises `BadRequest`."""
    if not body:
        raise BadRequest("the body is empty; send a JSON object or an array of them")
    try:
        return jiter.from_json(body, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="keys")
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None


OPERATIONS = (
    Operation(
        "GET",
        "/predictions",
        "predict_query",
        "Predict one row, given as query parameters",
        predict_query,
        takes="query",
        gives="Prediction",
        errors=(400, 401, 413, 422, 500),
    ),
    Operation(
        "POST",
        "/predictions",
        "predict_body",
        "Predict one row, or each row of an array in its order",
        predict_body,
        takes="body",
        gives="Prediction",
        errors=(400, 401, 413, 415, 422, 500),
    ),
    Operation("GET", "/ping", "ping", "Whether the process answers", live, open=True),
    Operation("GET", "/health/live", "live", "Whether the process answers", live, open=True),
    Operation("GET", "/health/ready", "ready", "Whether the model is usable", ready, open=True),
    Operation("GET", "/openapi.json", "openapi", "This document", openapi, gives="Document", errors=(401,)),
)


# OpenAPI --------------------------------------------------------------------------------------------------------------


class Status(BaseModel):
    status: str
    model: str | None = None


class Problem(BaseModel):
    detail: str


class BadCell(BaseModel):
    type: str
    loc: list[str | int]
    msg: str
    input: Any


class ValidationProblem(BaseModel):
    detail: list[BadCell]


def describe_api(settings: Settings, contract: Contract, predictor: Predictor) -> dict[str, Any]:
    """Make the OpenAPI 3.1 document from the table of operations."""
    schemas = _schemas(contract, predictor)
    example = _example(contract, predictor)
    secured = bool(settings.auth.api_keys)
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        described = _describe(operation, schemas, example, secured)
        paths.setdefault(operation.path, {})[operation.method.lower()] = described
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": settings.model.name, "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if secured:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
    return document


def _schemas(contract: Contract, predictor: Predictor) -> dict[str, Any]:
    types: dict[str, Any] = {
        "Features": contract.row,
        "Prediction": TypeAdapter(_prediction_type(predictor)),
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


def _prediction_type(predictor: Predictor) -> Any:
    """Give the type of one answer: a class or a number, with a probability for each class where there are any."""
    if predictor.classes is None:
        return make_typed_dict("Prediction", {"prediction": float})
    literal = all(isinstance(label, str | int) for label in predictor.classes)
    label: Any = Literal[tuple(predictor.classes)] if literal else Any
    if not predictor.has_probabilities:
        return make_typed_dict("Prediction", {"prediction": label})
    probability = Annotated[float, Field(ge=0, le=1)]
    probabilities = make_typed_dict("Probabilities", {str(name): probability for name in predictor.classes})
    return make_typed_dict("Prediction", {"prediction": label, "probabilities": probabilities})


def _describe(operation: Operation, schemas: Mapping[str, Any], example: Any, secured: bool) -> dict[str, Any]:
    """Describe an operation; `example` is a row and its prediction."""
    described: dict[str, Any] = {"operationId": operation.name, "summary": operation.summary}
    row, answer = example if operation.gives == "Prediction" else (None, None)
    schema: dict[str, Any] = _reference(operation.gives)
    if operation.takes == "query":
        described["parameters"] = [
            {"name": name, "in": "query", "required": True, "schema": cell}
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
    if secured and not operation.open:
        described["security"] = [{"bearer": []}, {"api_key": []}]
    return described


def _example(contract: Contract, predictor: Predictor) -> tuple[Any, Any]:
    """Give the settings' example row and what the model says of it; without a whole row, neither."""
    row = contract.example
    if len(row) < len(contract.names):
        return None, None
    return row, predictor.predict(contract.to_array([row]))[0]


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

    def __init__(self, settings: Settings, predictor: Predictor) -> None:
        self.settings = settings
        self.predictor = predictor
        self.contract = Contract(_feature_names(settings, predictor), settings)
        self.routes: dict[str, dict[str, Operation]] = {}
        for operation in OPERATIONS:
            self.routes.setdefault(operation.path, {})[operation.method] = operation
        self._api_keys = [key.get_secret_value().encode() for key in settings.auth.api_keys]

    async def respond(self, request: Request) -> Response:
        """Answer one request, good or bad, and log it."""
        started = time.perf_counter()
        given = request.header("x-request-id")
        request_id = given if given and SANE_REQUEST_ID.fullmatch(given) else make_request_id()
        token = REQUEST_ID.set(request_id)
        try:
            response = await self._answer(request)
            response.headers["X-Request-ID"] = request_id
            if self.settings.logging.access:
                log.info(
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
            if isinstance(body := await request.read_body(self.settings.limits.max_body_bytes), ServingError):
                raise body
            operation = self._find(request)
            self._authorize(operation, request)
            return Response.of(await operation.endpoint(self, request))
        except ServingError as error:
            return Response.of_error(error)
        except Exception:  # the outermost edge: whatever failed, the client learns no internals
            log.exception("request_failed", method=request.method, path=request.path)
            return Response.of({"detail": "internal error; the log has it under this X-Request-ID"}, 500)

    def _find(self, request: Request) -> Operation:
        methods = self.routes.get(request.path)
        if methods is None:
            raise NotFound(f"there is no {request.path!r}; {nearest(request.path, self.routes)}")
        operation = methods.get("GET" if request.method == "HEAD" else request.method)
        if operation is None:
            allowed = ", ".join(methods).replace("GET", "GET, HEAD")
            detail = f"{request.method} is not allowed on {request.path}; use one of {allowed}"
            raise MethodNotAllowed(detail, {"Allow": allowed})
        return operation

    def _authorize(self, operation: Operation, request: Request) -> None:
        """Compare the key in constant time with every key, so that the time taken tells nothing."""
        if operation.open or not self._api_keys:
            return
        scheme, _, token = (request.header("authorization") or "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else request.header("x-api-key") or ""
        matches = [hmac.compare_digest(key.encode("latin-1"), known) for known in self._api_keys]
        if not any(matches):
            detail = "no valid API key; send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
            raise Unauthorized(detail, {"WWW-Authenticate": "Bearer"})

    async def predict(self, request: Request, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        request.rows = len(rows)
        return self.predictor.predict(self.contract.to_array(rows))

    @functools.cached_property
    def openapi(self) -> dict[str, Any]:
        return describe_api(self.settings, self.contract, self.predictor)


def _feature_names(settings: Settings, predictor: Predictor) -> list[str]:
    """Name the estimator's columns: as it was fitted, else in the order of the settings, else x0, x1, …"""
    if predictor.feature_names is not None:
        return predictor.feature_names
    if predictor.n_features is None:
        if settings.features:
            return list(settings.features)
        raise ModelError("the model does not say how many features it takes; name them in [features], in its order")
    if settings.features and len(settings.features) != predictor.n_features:
        raise SettingsError(f"features names {len(settings.features)} features; the model takes {predictor.n_features}")
    return list(settings.features) or [f"x{column}" for column in range(predictor.n_features)]


# Flask ----------------------------------------------------------------------------------------------------------------


def build_flask(service: Service) -> flask.Flask:
    """Bind the service to Flask: a route for each path of the table; what no route matches is answered by it too."""
    import flask
    from werkzeug.exceptions import HTTPException

    app = flask.Flask(__name__, static_folder=None)
    app.extensions["serving"] = service
    app.url_map.merge_slashes = False

    def view() -> flask.Response:
        response = run_now(service.respond(wsgi_request(flask.request.environ)))
        return flask.Response(response.body, response.status_line, response.headers)

    def unmatched(error: Any) -> Any:
        return view() if flask.request.routing_exception else error

    for path, operations in service.routes.items():
        name = next(iter(operations.values())).name
        app.add_url_rule(path, name, view, methods=[*operations], provide_automatic_options=False)
    app.register_error_handler(HTTPException, unmatched)
    return app


def wsgi_request(environ: dict[str, Any]) -> Request:
    """Make a `Request` of a WSGI environ."""

    def header(name: str) -> str | None:
        key = name.upper().replace("-", "_")
        return environ.get(key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}") or None

    stream = environ["wsgi.input"]
    has_end = environ.get("wsgi.input_terminated") or "CONTENT_LENGTH" in environ

    async def read(size: int) -> bytes:
        try:
            return stream.read(size) if has_end else b""
        except (OSError, ParseException):
            raise BodyCutShort from None

    path = environ["PATH_INFO"].encode("latin-1").decode(errors="replace")
    return Request(environ["REQUEST_METHOD"], path, environ.get("QUERY_STRING", ""), header, read)


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

    app = fastapi.FastAPI(title=service.settings.model.name, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.serving = service
    app.router.redirect_slashes = False
    endpoint: Any = ASGIEndpoint(service)
    not_found = app.router.default

    async def unmatched(scope: Any, receive: Any, send: Any) -> None:
        await (endpoint if scope["type"] == "http" else not_found)(scope, receive, send)

    for path, operations in service.routes.items():
        app.add_route(path, endpoint, name=next(iter(operations.values())).name)  # no methods: the table knows them
    app.router.default = unmatched
    app.openapi = lambda: service.openapi  # type: ignore[method-assign]
    return app


class ASGIEndpoint:
    """The service as an ASGI endpoint; a class, because Starlette would wrap a function."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.answer(asgi_request(scope, receive), receive, send)

    async def answer(self, request: Request, receive: Any, send: Any) -> None:
        response = await self.service.respond(request)
        body = b"" if request.method == "HEAD" else response.body
        await send(response.start_message)
        if response.lingers:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await linger(receive)
            body = b""
        await send({"type": "http.response.body", "body": body})


def asgi_request(scope: Any, receive: Any) -> Request:
    """Make a `Request` of an ASGI scope."""
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        headers[name] = headers[name] + b"," + value if name in headers else value

    def header(name: str) -> str | None:
        value = headers.get(name.encode())
        return value.strip(b" \t").decode("latin-1") if value else None

    more = True

    async def read(size: int) -> bytes:
        nonlocal more
        piece = b""
        while more and size and not piece:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise BodyCutShort
            piece, more = message.get("body", b""), message.get("more_body", False)
        return piece

    path = scope["path"].removeprefix(scope.get("root_path", ""))
    query = urllib.parse.quote(scope["query_string"], safe=string.punctuation)
    return Request(scope["method"], path, query, header, read)


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


class FlaskOverASGI:
    """A Flask app behind ASGI: it runs in a2wsgi's threads."""

    def __init__(self, app: flask.Flask) -> None:
        from a2wsgi import WSGIMiddleware

        self.service: Service = app.extensions["serving"]
        self.endpoint = ASGIEndpoint(self.service)
        self.bridge: Any = WSGIMiddleware(app)  # type: ignore[arg-type]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.bridge(scope, receive, send)
            return
        request = asgi_request(scope, receive)
        body = await request.read_body(self.service.settings.limits.max_body_bytes)
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

    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        self.start()
        request = wsgi_request(environ)
        body = run_now(request.read_body(self.service.settings.limits.max_body_bytes))
        if isinstance(body, ServingError):
            response = run_now(self.service.respond(request))
            start_response(response.status_line, [*response.headers.items()])
            return [] if request.method == "HEAD" else [response.body]
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
        atexit.register(self.stop)  # where the server does not call it
        return ASGIMiddleware(functools.partial(self._asgi, started.result()), loop=loop)

    async def _live(self, started: concurrent.futures.Future[Any], stopping: asyncio.Event) -> None:
        async with self.app.router.lifespan_context(self.app) as state:
            started.set_result(state or {})
            await stopping.wait()

    async def _asgi(self, state: Mapping[str, Any], scope: Any, receive: Any, send: Any) -> None:
        """Run the app, and see to it that an answer comes: without one a2wsgi would wait for ever."""
        last: dict[str, Any] = {}

        async def note(message: Any) -> None:
            nonlocal last
            last = message
            await send(message)

        try:
            await self.app({**scope, "state": dict(state)}, receive, note)
        except BaseException:  # of a route that a user added; SystemExit would end the loop
            log.exception("request_failed", method=scope["method"], path=scope["path"])
        if not last:
            response = Response.of({"detail": "internal error"}, 500)
            await send(response.start_message)
            await send({"type": "http.response.body", "body": response.body})
        elif last["type"] == "http.response.start" or last.get("more_body"):
            raise RuntimeError("the answer ended early")


# Factory --------------------------------------------------------------------------------------------------------------

FRAMEWORKS: dict[str, Callable[[Service], Any]] = {"flask": build_flask, "fastapi": build_fastapi}


@functools.cache
def load_service() -> Service:
    """Load settings, logging and predictor, once a process: gunicorn's workers get those of its master."""
    return make_service(load_settings())


def make_service(settings: Settings) -> Service:
    """Build the service that the settings describe. Raises `StartupError`."""
    configure_logging(settings.logging)
    return Service(settings, load_predictor(settings))


def create_app(settings: Settings | None = None) -> flask.Flask | fastapi.FastAPI:
    """Build the app of the framework that the settings name: a `Flask` or a `FastAPI`, to extend as either is."""
    service = load_service() if settings is None else make_service(settings)
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
        settings = load_service().settings
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


@contextlib.contextmanager
def exit_on_startup_error() -> Iterator[None]:
    """End the process with the message alone: an operator's mistake is not worth a traceback.

    Status 4 is gunicorn's "app failed to load", on which its master stops instead of starting worker after worker;
    3, uvicorn's, would make Flask's reloader start over without end.
    """
    try:
        yield
    except StartupError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(4)


def print_settings(settings: Settings) -> None:
    """Print the settings in force as TOML, each with where it comes from; secrets are masked."""
    table: tuple[str, ...] = ()
    values = settings.model_dump(mode="json")
    for key in sorted(leaves(values), key=len):
        if key[:-1] != table:
            table = key[:-1]
            print(f"\n[{'.'.join(map(_toml_key, table))}]")
        value = functools.reduce(lambda level, part: level[part], key, values)
        name, shown = _toml_key(key[-1]), _toml_value(value)
        print(f"# {name} is not set" if value is None else f"{name} = {shown}  # {settings.source(*key)}")


if __name__ == "__main__":
    with exit_on_startup_error():
        print_settings(load_settings())

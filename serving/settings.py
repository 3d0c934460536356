"""How settings are read: the environment over the file over defaults, and where each value came from.

It knows no setting: each table is declared by the part that it is about, and `app.py` puts the tables together.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, cast, get_args, get_origin

import structlog
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource

from serving.environment import BETWEEN, PREFIX, as_word, is_of_service, read_environment, two_values, variable_of
from serving.errors import Key, MisfitError, SettingsError, nearest, shorten

log = structlog.get_logger()

PROJECT = Path(__file__).resolve().parents[1]
INSIDE = "\0__\0"  # between the keys of nested tables; what a name of a row may hold is not
NESTED = {"model_type": "be a table of keys", "dict_type": "be a table of keys", "list_type": "be a list"}
IN_JSON = {"model_type": """'{"…": …}'""", "dict_type": """'{"…": …}'""", "list_type": """'["…"]'"""}

Sources = dict[Key, str]  # what gives the value of a setting, or of the first that is set in a table
OtherNames = Mapping[str, Sequence[str]]  # by a key what others call it, for a hint
PathText = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
S = TypeVar("S", bound="SettingsFile")
T = TypeVar("T")


class SettingsTable(BaseModel):
    """A table of the settings file. Its owner declares the keys, their types and their defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    secret_keys: ClassVar[Sequence[str]] = ()  # keys whose values stay out of messages
    other_names: ClassVar[OtherNames] = MappingProxyType({})

    @field_validator("*", mode="before")
    @classmethod
    def _ignore_case_of_words(cls, value: Any, info: ValidationInfo) -> Any:
        """Return a word of a fixed choice as it is spelt in the choice."""
        words = _words_of(cls.model_fields[cast(str, info.field_name)].annotation)
        return next((word for word in words if isinstance(value, str) and word.lower() == value.lower()), value)


def _words_of(annotation: Any) -> Iterator[str]:
    for part in get_args(annotation):
        if get_origin(annotation) is Literal and isinstance(part, str):
            yield part
        yield from _words_of(part)


class SettingsFile(SettingsTable):
    """All tables of a settings file, with what gives the value of each key. `read_settings` reads it."""

    _file: Path = PrivateAttr(default=Path("settings.toml"))
    _sources: Sources = PrivateAttr(default_factory=dict)
    _left_alone: list[str] = PrivateAttr(default_factory=list)  # variables of others

    def source(self, *key: str) -> str:
        """Return what gives the value of a setting: the file, a variable of the environment, or its default."""
        return _source(key, self._sources)

    def place(self, *key: str) -> str:
        """Return the place of the value of a setting, for a message about it."""
        return _place(key, self._sources)

    @contextlib.contextmanager
    def locate(self) -> Iterator[None]:
        """Put the place of each setting in front of what is wrong with its value, the same of several in one line."""
        try:
            yield
        except MisfitError as error:
            alike: dict[tuple[str, str], list[Key]] = {}
            for key, problem in error.problems:
                alike.setdefault((self.source(*key), problem + self.cure(key)), []).append(key)
            lines = [self._line(keys, source, problem) for (source, problem), keys in alike.items()]
            raise SettingsError("\n".join(lines)) from None

    def _line(self, keys: list[Key], source: str, problem: str) -> str:
        if len(keys) == 1:
            return f"{self.place(*keys[0])} {problem}"
        return f"{source}: {', '.join(map(_dotted, keys))} {re.sub('^is ', 'are ', problem)}"

    def cure(self, key: Key) -> str:
        """Return what to do about a setting that does not fit the model, for the end of a message."""
        return ""

    def note_left_alone(self) -> None:
        """Log which variables look like ours, but are Kubernetes'."""
        if self._left_alone:
            log.debug("variables_left_alone", names=self._left_alone)

    def with_value(self, key: Key, value: Any, source: str) -> Self:
        """Return the settings with another value of one setting. Raises `SettingsError` if it may not have that."""
        table, name = key
        try:
            checked = getattr(type(self).model_validate({table: {name: value}}), table)
        except ValidationError as error:
            raise SettingsError("\n".join(_explain(type(self), error, {key: source}))) from None
        changed = self.model_copy(
            update={table: getattr(self, table).model_copy(update={name: getattr(checked, name)})}
        )
        changed._sources = self._sources | _with_tables({key: source})
        return changed

    @property
    def folder(self) -> Path:
        """The folder of the settings file, from which relative paths in it start."""
        return self._file.parent

    @property
    def sha256(self) -> str:
        """A hash of every value in force, by which two services can be compared; secrets are masked in it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def read_settings(kind: type[S], file: Path) -> S:
    """Read the settings: the environment first, then the file, then defaults.

    Raises `SettingsError` with every mistake: place, value seen, what is allowed.
    """
    values = _read_toml(file)
    variables, left_alone = _read_variables(kind, values)
    sources = _with_tables(dict.fromkeys(leaves(values), file.name))
    try:
        # TOML has types, so its values are held to them; a variable is text, which is parsed.
        kind.model_validate(values, strict=True)
        given = Environment(kind, variables)()
        values = {
            name: table for name, table in values.items() if (name,) not in variables or not _has_rows(kind, name)
        }
        environment = {key: f"environment: {_variable_of(key, variables)}" for key in leaves(given)}
        sources = _with_tables(dict.fromkeys(leaves(values), file.name)) | _with_tables(environment)
        settings = kind.model_validate(_merge(values, given))
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(kind, error, sources))) from None
    for key in sources:
        if key[1:2] == ("",):
            raise SettingsError(f"{_place(key[:2], sources)} has an empty name; give it the name of a feature")
    settings._file, settings._sources, settings._left_alone = file, sources, left_alone
    return settings


def _merge(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with those that were given instead, table by table."""
    merged = {
        name: _merge(values[name], value) if isinstance(value, dict) and isinstance(values.get(name), dict) else value
        for name, value in given.items()
    }
    return {**values, **merged}


class Environment(EnvSettingsSource):
    """The texts of variables, nested like the file. Text that should be JSON and is not is left to validation."""

    def __init__(self, kind: type[SettingsFile], variables: Mapping[Key, str]) -> None:
        super().__init__(cast(Any, kind), env_prefix=PREFIX, env_nested_delimiter=INSIDE)
        # A whole table comes before single keys of it, which would be lost.
        self.env_vars = {PREFIX.lower() + INSIDE.join(key): variables[key] for key in sorted(variables, key=len)}

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            decoded = super().decode_complex_value(field_name, field, value)
        except (ValueError, RecursionError):
            return value
        return value if decoded is None else decoded  # null is no value of any setting


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        hint = "set SERVING_SETTINGS to the path of a settings file"
        raise SettingsError(f"settings file {str(file)!r} cannot be read: {error.strerror}; {hint}") from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{file.name}: not valid TOML: {error}") from None


def _read_variables(kind: type[SettingsFile], values: Mapping[str, Any]) -> tuple[dict[Key, str], list[str]]:
    """Return the text of each `SERVING_…` variable by its key, and the names of those that are Kubernetes'.

    One that is empty counts as not set. `values` are those of the file, among which a variable may complete a row.
    Raises `SettingsError` for a variable that is no setting, which pydantic-settings would ignore (its issue 985).
    """
    ours = read_environment()
    ours.pop(variable_of(["settings"]), None)
    known = {key[:end] for key in setting_keys(kind) for end in range(1, len(key) + 1)}
    variables: dict[Key, str] = {}
    names: dict[Key, str] = {}
    left_alone, lines = [], []
    for variable, text in sorted(ours.items()):
        key = tuple(variable.removeprefix(PREFIX).lower().split(BETWEEN))
        if len(key) > 1 and _has_rows(kind, key[0]) and all(key):
            whole = ours.get(variable_of(key[:1]))
            key = _match_row(key, values.get(key[0]) if whole is None else _from_json(whole))
        elif key not in known:
            if is_of_service(variable, text) and (len(key) == 1 or key[:1] not in known):
                left_alone.append(variable)
            else:
                lines.append(f"environment: {variable} is not a setting; {_hint(kind, variable, key)}")
            continue
        if variables.setdefault(key, text) != text:
            raise two_values(names[key], variable)
        names.setdefault(key, variable)
    if lines:
        raise SettingsError("\n".join(lines))
    return variables, left_alone


def _hint(kind: type[SettingsFile], variable: str, key: Key) -> str:
    """Return what a variable that is no setting should have been."""
    if len(key) > 1 and _has_rows(kind, key[0]):
        return f"write {variable_of([key[0]])}__NAME or {variable_of([key[0]])}__NAME__KEY, without an empty name"
    last = key[-1].rpartition("_")[2]  # of `log_level`
    places = (key, (*key[:-1], last), (last,))
    if right := next(filter(None, (_find_by_other_name(kind, place) for place in places)), None):
        return f"did you mean {variable_of(right)!r}?"
    return nearest(variable, map(variable_of, setting_keys(kind)))


def _match_row(key: Key, rows: Any) -> Key:
    """Return the key of a variable with the name of its row as it is spelt in a table, which has capitals and blanks.

    A row that is not there yet has its name in small letters.
    """
    names = [name for name in rows if as_word(name) == as_word(key[1])] if isinstance(rows, dict) else []
    return (key[0], key[1] if key[1] in names or not names else names[0], *key[2:])


def _from_json(text: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


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


def _find_by_other_name(kind: type[BaseModel], key: Key) -> Key | None:
    """Return the setting that others call as a key that is none: in its own table, or, for a key without a table, in
    any, where its right name counts too."""
    name = key[-1].lower().replace("-", "_")
    for place in [key[:-1]] if len(key) > 1 else [(), *((table,) for table in kind.model_fields)]:
        table = _table_at(kind, place)
        if table is None:
            continue
        if len(key) == len(place) and name in table.model_fields:
            return (*place, name)
        for right, others in table.other_names.items():
            if name in others:
                return (*place, right)
    return None


def _table_at(kind: type[BaseModel], place: Key) -> type[SettingsTable] | None:
    """Return the type of a table, or of a row of [features], by its place in the file; None if there is none."""
    found: Any = kind
    if place:
        info = kind.model_fields.get(place[0])
        tables = {1: info.annotation if info else None, 2: _row_model(kind, place[0])}
        found = tables.get(len(place))
    return found if isinstance(found, type) and issubclass(found, SettingsTable) else None


def _has_rows(kind: type[BaseModel], name: str) -> bool:
    return _row_model(kind, name) is not None


def leaves(values: Mapping[str, Any], prefix: Key = ()) -> Iterator[Key]:
    """Yield every value of nested tables as its path of keys; an empty table counts as a value."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*prefix, name))
        else:
            yield (*prefix, name)


def _variable_of(key: Key, variables: Iterable[Key]) -> str:
    """Return the variable that gives a value of the environment: its own, or one with a table that it is in."""
    return next(variable_of(key[:end]) for end in range(len(key), 0, -1) if key[:end] in variables)


def _with_tables(sources: Sources) -> Sources:
    """Return what gives values, and beside it what gives the first of each table that they are in."""
    tables: Sources = {}
    for key, source in sources.items():
        for end in range(len(key)):
            tables.setdefault(key[:end], source)
    return tables | sources


def _source(key: Key, sources: Sources) -> str:
    return sources.get(key, "default")


def _place(key: Key, sources: Sources) -> str:
    source = _source(key, sources)
    return source if source == f"environment: {variable_of(key)}" else f"{source}: {_dotted(key)}"


def _dotted(key: Key) -> str:
    return ".".join(map(toml_key, key))


def toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml_value(name)


def toml_value(value: Any) -> str:
    """Return a text, number, truth or list of them in TOML: as in JSON, but that TOML wants DEL escaped too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _explain(kind: type[BaseModel], error: ValidationError, sources: Sources) -> list[str]:
    """Describe each mistake in a line: place, value seen, what is allowed."""
    shoulds: dict[str, list[str]] = {}
    lines: list[str] = []
    problems = [(_setting_of(kind, [*map(str, each["loc"])]), each) for each in error.errors(include_url=False)]
    # Of a list its items are wrong.
    lists = {key for key, problem in problems if not isinstance(problem["input"], list)}
    for key, problem in problems:
        given = problem["input"]
        if key in lists and isinstance(given, list):
            continue
        place = _place(key, sources)
        is_variable = place.startswith("environment") and place == _source(key, sources)
        if problem["type"] == "extra_forbidden":
            lines.append(f"{place} is not a setting; {_hint_for_key(kind, key, is_variable)}")
        else:
            as_json = is_variable and isinstance(given, str) and problem["type"] in NESTED
            seen = _masked(given, problem["loc"]) if _is_secret(kind, key) else repr(shorten(given))
            said = should(problem) + (f" as JSON, such as {IN_JSON[problem['type']]}" if as_json else "")
            shoulds.setdefault(f"{place} is {seen}", []).append(said)
    return lines + [f"{what}; it should {' or '.join(options)}" for what, options in shoulds.items()]


def _hint_for_key(kind: type[BaseModel], key: Key, is_variable: bool) -> str:
    """Return what a key that is no setting, of the file or in a variable of its own, should have been."""
    level = len(key) - 1
    row = _row_model(kind, key[0])
    names = [known[level] for known in setting_keys(kind) if known[:level] == key[:level]]
    siblings = dict.fromkeys(names) if row is None else row.model_fields
    if right := _find_by_other_name(kind, key):
        return f"did you mean {variable_of(right) if is_variable else '.'.join(right[level:])!r}?"
    return nearest(as_word(key[-1]), map(as_word, siblings)) if is_variable else nearest(key[-1], siblings)


def _setting_of(kind: type[BaseModel], loc: list[str]) -> Key:
    """Return the setting that pydantic's `loc` is about; it goes on into the branches of a union."""
    lengths = [len(key) for key in setting_keys(kind) if list(key) == loc[: len(key)]]
    if _row_model(kind, loc[0]) is not None:
        return tuple(loc[:3])
    return tuple(loc[: lengths[0]] if lengths else loc)


def _is_secret(kind: type[BaseModel], key: Key) -> bool:
    """Whether a value is a secret, or a table that may have one."""
    table = _table_at(kind, key[:1])
    return table is not None and bool(table.secret_keys) and (len(key) == 1 or key[1] in table.secret_keys)


def _masked(value: Any, loc: Iterable[int | str]) -> str:
    """Return what kind of value a secret is, and the number of an item of a list, without the secret."""
    kinds = {str: "text" if value else "empty text", bool: "true or false", list: "a list", dict: "a table"}
    kinds |= {int: "a number", float: "a number", type(None): "null"}
    items = [f", item {part + 1}" for part in loc if isinstance(part, int)]
    return f"********** ({kinds.get(type(value), 'a date or a time')}{''.join(items)})"


def should(problem: Any) -> str:
    """Return what one of pydantic's problems says that a value should be."""
    kinds = NESTED | {"extra_forbidden": "not be there", "missing": "be there", "json_invalid": "be JSON"}
    said: str = kinds.get(problem["type"], re.sub(r"^.* should ", "", problem["msg"]))
    return said.partition(", unable to")[0]


def explain_relative(path: str) -> str:
    """Return what to do about a path of the settings at which no file is, for the end of a message."""
    if Path(path).is_absolute():
        return ""
    found = next((str(folder / path) for folder in (Path.cwd(), PROJECT) if (folder / path).is_file()), None)
    cure = f"write {found!r}, where there is one" if found else "write an absolute path for another one"
    return f"; {path!r} starts from the folder of the settings file, {cure}"


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


def check_each_once(values: list[T]) -> list[T]:
    if len(set(values)) < len(values):
        raise ValueError("a list should have each value once")
    return values

"""The settings file, the environment over it, and what each mistake is answered with."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

import app
from serving.environment import as_word
from serving.errors import SettingsError, StartupError
from serving.predictor.features import FeatureSettings
from serving.server import ServerSettings
from serving.settings import SettingsTable, setting_keys
from tests.lib.artifacts import save
from tests.lib.servers import GUNICORN, PROJECT, run, run_gunicorn

CHANGED: dict[tuple[str, ...], tuple[str, Any]] = {
    ("framework",): ("flask", "flask"),
    ("server", "worker_class"): ("gevent", "gevent"),
    ("server", "workers"): ("3", 3),
    ("server", "bind"): ("127.0.0.1:1", "127.0.0.1:1"),
    ("server", "backlog"): ("11", 11),
    ("server", "timeout"): ("12", 12),
    ("server", "graceful_timeout"): ("13", 13),
    ("server", "keepalive"): ("14", 14),
    ("server", "send_timeout"): ("21", 21),
    ("server", "max_requests_per_connection"): ("22", 22),
    ("server", "max_requests"): ("15", 15),
    ("server", "max_requests_jitter"): ("16", 16),
    ("server", "certfile"): ("a.pem", "a.pem"),
    ("server", "keyfile"): ("b.pem", "b.pem"),
    ("server", "root_path"): ("/models/iris", "/models/iris"),
    ("server", "cors_origins"): ('["http://page.example"]', ["http://page.example"]),
    ("model", "path"): ("other.joblib", "other.joblib"),
    ("model", "name"): ("123", "123"),
    ("model", "version"): ("2024-05", "2024-05"),
    ("model", "runtime"): ("onnx", "onnx"),
    ("model", "sha256"): ("0" * 64, "0" * 64),
    ("model", "trusted_types"): ('["a.B"]', ["a.B"]),
    ("model", "outputs"): ('["a", "b"]', ["a", "b"]),
    ("model", "strict_versions"): ("true", True),
    ("model", "load_timeout_s"): ("2.5", 2.5),
    ("features",): ('{"Of Two Words": {"unit": "m"}}', {"Of Two Words": {"unit": "m"}}),
    ("batching", "max_rows"): ("19", 19),
    ("batching", "max_wait_ms"): ("2.5", 2.5),
    ("limits", "max_body_bytes"): ("17", 17),
    ("limits", "max_rows"): ("18", 18),
    ("limits", "max_queued_rows"): ("20", 20),
    ("limits", "request_timeout_s"): ("2.5", 2.5),
    ("logging", "level"): ("debug", "debug"),
    ("logging", "format"): ("console", "console"),
    ("logging", "access"): ("false", False),
    ("auth", "api_keys"): ('["key"]', ["key"]),
    ("auth", "open_docs"): ("true", True),
    ("auth", "open_paths"): ('["/hello"]', ["/hello"]),
    ("routes", "predict"): ("/predict", "/predict"),
    ("routes", "health"): ("/health", "/health"),
    ("docs", "enabled"): ("false", False),
}


def variable(key: tuple[str, ...]) -> str:
    return "SERVING_" + "__".join(key).upper()


def value_of(settings: app.Settings, key: tuple[str, ...]) -> Any:
    value: Any = settings
    for part in key:
        value = getattr(value, part)
    return value


def test_shipped_file_shows_every_default() -> None:
    """Each key of the file has its default as value, and no key but those of [features] is left out."""
    shipped = tomllib.loads((PROJECT / "settings.toml").read_text())
    shipped.pop("features")
    defaults = app.Settings().model_dump()
    defaults.pop("features")
    assert shipped == defaults


@pytest.mark.parametrize("key", list(setting_keys(app.Settings)), ids=".".join)
def test_environment_wins_over_file(monkeypatch: pytest.MonkeyPatch, key: tuple[str, ...]) -> None:
    """Every key can be set by its variable, over the value of the shipped file."""
    text, expected = CHANGED[key]
    monkeypatch.setenv(variable(key), text)
    settings = app.load_settings()
    value = value_of(settings, key)
    if key[-1] == "api_keys":
        value = [secret.get_secret_value() for secret in value]
    elif key[0] == "features":
        value = {name: feature.model_dump(exclude_unset=True) for name, feature in value.items() if name in expected}
    assert value == expected
    assert settings.place(*key) == f"environment: {variable(key)}" or key[0] == "features"


def test_environment_completes_a_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    """One key of one feature can be set by a variable; its other keys stay as in the file."""
    monkeypatch.setenv("SERVING_FEATURES__SEPAL_LENGTH__GE", "0.5")
    feature = app.load_settings().features["sepal_length"]
    assert (feature.ge, feature.unit) == (0.5, "cm")


def test_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    """A file as Windows' editor saves it is read like any other."""
    (tmp_path / "other.toml").write_text('framework = "flask"', encoding="utf-8-sig")
    assert app.load_settings(tmp_path / "other.toml").framework == "flask"


def test_file_wins_over_default(tmp_path: Path) -> None:
    """A key of the file counts; one that it leaves out has its default."""
    file = tmp_path / "other.toml"
    file.write_text('framework = "flask"')
    settings = app.load_settings(file)
    assert (settings.framework, settings.server.timeout) == ("flask", 30)


def test_serving_settings_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`SERVING_SETTINGS` points elsewhere, and `model.path` is relative to where it points."""
    (tmp_path / "other.toml").write_text('[model]\npath = "a/b.skops"')
    monkeypatch.setenv("SERVING_SETTINGS", str(tmp_path / "other.toml"))
    assert app.load_settings().model_path == tmp_path / "a/b.skops"


@pytest.mark.parametrize(
    ("framework", "worker_class", "expected"),
    [
        ("fastapi", "auto", "uvicorn"),
        ("flask", "auto", "gevent"),
        ("fastapi", "gevent", "gevent"),
        ("flask", "uvicorn", "uvicorn"),
    ],
)
def test_worker_class_follows_framework(framework: Any, worker_class: Any, expected: str) -> None:
    """By default each framework gets the worker of its own interface."""
    settings = app.Settings(framework=framework, server=ServerSettings(worker_class=worker_class))
    assert settings.worker_class == expected


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"WEB_CONCURRENCY": "5"}, "workers = 5  # environment: WEB_CONCURRENCY"),
        (
            {"WEB_CONCURRENCY": "5", "SERVING_SERVER__WORKERS": "2"},
            "workers = 2  # environment: SERVING_SERVER__WORKERS",
        ),
        ({"WEB_CONCURRENCY": "5", "GUNICORN_CMD_ARGS": "-w 3"}, "workers = 3  # gunicorn's options"),
        ({"WEB_CONCURRENCY": "0", "GUNICORN_CMD_ARGS": "-w 3"}, "workers = 3  # gunicorn's options"),
        ({"GUNICORN_CMD_ARGS": "--keep-alive 7 -w 3"}, "keepalive = 7  # gunicorn's options"),
        ({"GUNICORN_CMD_ARGS": "--log-level DEBUG"}, 'level = "debug"  # gunicorn\'s options'),
    ],
    ids=["platform", "settings", "options", "ignored", "another", "level"],
)
def test_gunicorns_options_and_the_platform_are_printed(variables: dict[str, str], line: str) -> None:
    """What `python app.py` prints is what gunicorn runs with: its options first, and the platform's number last."""
    done = run("python app.py", **variables)
    assert line in done.stdout.splitlines()


WRONG_VARIABLES = {
    "WEB_CONCURRENCY": ("0", "WEB_CONCURRENCY is '0'; it should be a number of workers, 1000 at most"),
    "Web_Concurrency": ("5000", "WEB_CONCURRENCY is '5000'; it should be a number of workers, 1000 at most"),
    "web_concurrency": ("many", "WEB_CONCURRENCY is 'many': invalid literal for int() with base 10: 'many'"),
    "GUNICORN_CMD_ARGS": ("--bind 'x", 'GUNICORN_CMD_ARGS is "--bind \'x": No closing quotation'),
}


@pytest.mark.parametrize("name", WRONG_VARIABLES)
def test_variables_of_the_platform_are_checked(name: str) -> None:
    """A variable that gunicorn could not read ends in one line."""
    value, message = WRONG_VARIABLES[name]
    done = run("python app.py", **{name.upper(): value})
    assert done.stderr == f"SettingsError: environment: {message}\n"


def test_auto_workers_count_the_cores_of_this_process() -> None:
    """`workers = "auto"` is one for each core that affinity leaves."""
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import app; print(app.Settings().workers)"
    )
    done = run(["python", "-c", code])
    assert done.stdout == "1\n"


FILES = [
    ("not-toml", "framework = ", ["not valid TOML", "line 1"]),
    ("unknown-key", 'framwork = "flask"', ["framwork is not a setting", "did you mean 'framework'?"]),
    ("unknown-table", "[srever]\nworkers = 1", ["srever is not a setting", "did you mean 'server'?"]),
    ("unknown-nested-key", "[server]\nworkrs = 1", ["server.workrs is not a setting", "did you mean 'workers'?"]),
    ("unknown-feature-key", "[features.x]\nunits = 1", ["features.x.units is not a setting", "did you mean 'unit'?"]),
    ("other-name-of-ge", "[features.x]\nmin = 1", ["features.x.min is not a setting; did you mean 'ge'?"]),
    ("other-name-of-le", "[features.x]\nMaximum = 1", ["features.x.Maximum is not a setting; did you mean 'le'?"]),
    ("other-name-of-choices", "[features.x]\nenum = [1]", ["features.x.enum is not a setting", "'choices'?"]),
    ("other-name-of-missing", "[features.x]\nnullable = true", ["x.nullable is not a setting", "'missing'?"]),
    ("no-name-of-a-feature", "[features.x]\nworkers = 1", ["features.x.workers is not", "use one of 'type', 'ge'"]),
    ("other-name-of-bind", "[server]\nport = 1", ["server.port is not a setting; did you mean 'bind'?"]),
    ("other-name-of-workers", "[server]\nworker = 1", ["server.worker is not a setting; did you mean 'workers'?"]),
    ("other-name-of-level", '[logging]\nlog-level = "info"', ["logging.log-level is not", "did you mean 'level'?"]),
    ("no-table", "workers = 1", ["workers is not a setting; did you mean 'server.workers'?"]),
    ("other-name-without-a-table", "port = 1", ["port is not a setting; did you mean 'server.bind'?"]),
    ("other-name-of-a-table", "[gunicorn]\nworkers = 1", ["gunicorn is not a setting; did you mean 'server'?"]),
    ("wrong-choice", 'framework = "django"', ["framework is 'django'; it should be 'flask' or 'fastapi'"]),
    ("number-as-text", '[server]\nworkers = "4"', ["server.workers is '4'", "valid integer or be 'auto'"]),
    ("truth-as-text", '[logging]\naccess = "true"', ["logging.access is 'true'", "valid boolean"]),
    ("negative", "[limits]\nmax_rows = -1", ["limits.max_rows is -1; it should be greater than 0"]),
    ("fraction", "[limits]\nmax_rows = 1.5", ["limits.max_rows is 1.5; it should be a valid integer"]),
    ("table-as-number", "server = 3", ["server is 3; it should be a table of keys"]),
    ("list-as-text", '[model]\ntrusted_types = "a"', ["model.trusted_types is 'a'; it should be a list"]),
    ("name-for-url", '[model]\nname = "a/b"', ["model.name is 'a/b'; it should match pattern"]),
    ("two-mistakes", "framework = 1\nserver = 2", ["framework is 1", "server is 2"]),
    ("feature-of-no-model", "[features.x]\nunit='m'", ["features.x", "is not about a feature", "'sepal_length'"]),
    ("empty-feature", "[features.x]", ["features.x is not about a feature"]),
    ("feature-without-a-name", '[features.""]\nge = 1', ['features."" has an empty name; give it the name of a']),
    ("path-is-no-secret", '[auth]\nopen_paths = ["hello"]', ["auth.open_paths is 'hello'; it should begin with '/'"]),
    ("key-of-today", "[auth]\napi_keys = 2026-01-01", ["auth.api_keys is ********** (a date or a time); it should"]),
    ("auth-as-text", 'auth = "secret"', ["auth is ********** (text); it should be a table of keys"]),
    ("bounds-crossed", "[features.x]\nge = 2\nle = 1", ["features.x is", "'ge': 2", "have ge no greater than le"]),
    ("bound-of-nan", "[features.x]\nge = nan", ["features.x.ge is nan; it should be a finite number"]),
    ("bound-of-bool", '[features.x]\ntype = "bool"\nge = 0', ["features.x is", "have no bounds"]),
    ("fraction-as-bound", '[features.x]\ntype = "int"\nge = 0.5', ["features.x is", "whole numbers as bounds"]),
    ("bind-no-port", '[server]\nbind = "x:http"', ["bind is 'x:http'; it should be 'host:port' or 'unix:path'"]),
    ("bind-port-too-large", '[server]\nbind = ["127.0.0.1:70000"]', ["is '127.0.0.1:70000'", "'host:port'"]),
    ("bind-descriptor", '[server]\nbind = "fd://3"', ["bind is 'fd://3'; it should be 'host:port' or 'unix:path'"]),
    ("too-many-workers", "[server]\nworkers = 5000", ["workers is 5000; it should be less than or equal to 1000"]),
    ("bind-empty", '[server]\nbind = ""', ["server.bind is ''"]),
    ("bind-empty-path", '[server]\nbind = "unix:"', ["server.bind is 'unix:'"]),
    ("backlog-too-large", "[server]\nbacklog = 9999999999", ["backlog is 9999999999; it should be less than"]),
    ("null-in-path", '[model]\npath = "a\\u0000b.skops"', ["model.path is 'a\\x00b.skops'; it should match"]),
    ("number-of-5000-digits", f"[server]\nworkers = {'9' * 5000}", ["not valid TOML"]),
    ("nested-5000-deep", f"framework = {'[' * 5000}{']' * 5000}", ["not valid TOML"]),
    ("bind-a-number", '[server]\nbind = "8000"', ["server.bind is '8000'; it should be 'host:port'"]),
    ("bind-two-lines", '[server]\nbind = "x:80\\n"', ["server.bind is 'x:80\\n'"]),
    ("bounds-too-wide", '[features.x]\ntype = "int"\nle = 9.3e18', ["features.x is", "bounds within ±9.0071993e+15"]),
    ("example-of-nan", "[features.x]\nexample = nan", ["features.x.example is nan"]),
    ("key-of-two-lines", '"a\\nb" = 1', ['"a\\nb" is not a setting']),
    ("bind-nowhere", "[server]\nbind = []", ["server.bind is []", "have at least 1 item"]),
    (
        "list-with-a-number",
        '[model]\ntrusted_types = ["a", 1]',
        ["model.trusted_types is 1; it should be a valid string"],
    ),
    ("example-of-wrong-type", '[features.petal_width]\ntype = "int"\nexample = 0.5', ["example is 0.5", "integer"]),
    ("example-out-of-bounds", "[features.petal_width]\nge = 1\nexample = 0.5", ["example is 0.5", "equal to 1"]),
    (
        "missing-model",
        '[model]\npath = "irs.skops"',
        ["model.path is", "irs.skops', which does not exist", "'iris.skops'?"],
    ),
    ("hash", '[model]\nsha256 = "abc"', ["model.sha256 is 'abc'", "should be 64 hexadecimal digits, or empty"]),
    ("outputs-twice", '[model]\noutputs = ["a", "a"]', ["model.outputs is ['a', 'a']", "have each value once"]),
    ("wrong-suffix", '[model]\npath = "x.h5"', ["model.path is", "the suffix '.h5'; use one of '.skops', '.joblib'"]),
    ("truncated-model", '[model]\npath = "cut.skops"', ["model.path is", "cannot be loaded as skops"]),
    ("folder-as-model", '[model]\npath = "folder.skops"', ["model.path is", "cannot be read: Is a directory"]),
]

VARIABLES = [
    ("unknown-section", "SERVING_FRAMEWROK", "flask", ["SERVING_FRAMEWROK is not a setting", "'SERVING_FRAMEWORK'?"]),
    ("key-with-a-space", "SERVING_AUTH__API_KEYS", '["a b"]', ["API_KEYS is ****", "text without white space"]),
    ("key-of-bytes", "SERVING_AUTH__API_KEYS", '["\udce9"]', ["API_KEYS is ****", "text without white space"]),
    ("unknown-key", "SERVING_SERVER__WORKRS", "4", ["SERVING_SERVER__WORKRS", "mean 'SERVING_SERVER__WORKERS'?"]),
    ("one-underscore", "SERVING_SERVER_WORKERS", "4", ["SERVING_SERVER_WORKERS", "'SERVING_SERVER__WORKERS'?"]),
    (
        "other-name",
        "SERVING_SERVER__HOST",
        "x",
        ["SERVER__HOST is not a setting; did you mean 'SERVING_SERVER__BIND'?"],
    ),
    ("key-twice", "SERVING_AUTH__API_KEYS", '["a", "a"]', ["API_KEYS is ********** (a list); it should have each"]),
    ("address-twice", "SERVING_SERVER__BIND", '["x:1", "x:1"]', ["BIND is ['x:1', 'x:1']; it", "have each value once"]),
    (
        "one-letter-of-a-key",
        "SERVING_AUTH__API_KEY",
        "x",
        ["API_KEY is not a setting; did you mean 'SERVING_AUTH__API_K"],
    ),
    ("other-name-without-a-table", "SERVING_LOG_LEVEL", "info", ["LOG_LEVEL is not", "mean 'SERVING_LOGGING__LEVEL'?"]),
    (
        "other-name-in-a-row",
        "SERVING_FEATURES__X__MIN",
        "1",
        ["FEATURES__X__MIN is not a setting; did you mean 'SERVING_FEATURES__X__GE'?"],
    ),
    (
        "unknown-key-in-a-row",
        "SERVING_FEATURES__X__UNITS",
        "1",
        ["FEATURES__X__UNITS is not a setting; did you mean 'UNIT'?"],
    ),
    ("a-number-among-keys", "SERVING_AUTH__API_KEYS", '["key", 3]', ["API_KEYS is ********** (a number, item 2); it"]),
    ("below-a-value", "SERVING_FRAMEWORK__X", "1", ["SERVING_FRAMEWORK__X is not a setting", "'SERVING_FRAMEWORK'?"]),
    ("below-a-number", "SERVING_SERVER__WORKERS__X", "1", ["SERVING_SERVER__WORKERS__X is not a setting"]),
    ("unknown-key-in-table", "SERVING_SERVER", '{"workrs": 1}', ["SERVING_SERVER: server.workrs is not", "'workers'?"]),
    ("wrong-value-in-table", "SERVING_SERVER", '{"workers": 0}', ["SERVING_SERVER: server.workers is 0; it should"]),
    ("not-a-table", "SERVING_SERVER", "5", ["environment: SERVING_SERVER is 5; it should be a table of keys"]),
    ("wrong-choice", "SERVING_FRAMEWORK", "django", ["SERVING_FRAMEWORK is 'django'; it should be 'flask'"]),
    ("not-a-number", "SERVING_SERVER__WORKERS", "many", ["SERVING_SERVER__WORKERS is 'many'", "or be 'auto'"]),
    ("not-truth", "SERVING_LOGGING__ACCESS", "maybe", ["SERVING_LOGGING__ACCESS is 'maybe'", "valid boolean"]),
    ("not-json", "SERVING_MODEL__TRUSTED_TYPES", "a.B", ["SERVING_MODEL__TRUSTED_TYPES is 'a.B'", "as JSON"]),
    ("empty-table", "SERVING_FEATURES", "null", ["SERVING_FEATURES is 'null'; it should be a table of keys as JSON"]),
    ("key-as-text", "SERVING_AUTH__API_KEYS", "k1,k2", ["** (text); it should be a list as JSON, such as '[\"…\"]'"]),
    ("key-as-number", "SERVING_AUTH__API_KEYS", "[1]", ["** (a number, item 1); it should be a valid string"]),
    ("key-that-is-empty", "SERVING_AUTH__API_KEYS", '[""]', ["** (empty text, item 1)"]),
    ("keys-as-null", "SERVING_AUTH", '{"api_keys": null}', ["auth.api_keys is ********** (null); it should be a list"]),
    ("truth-is-no-secret", "SERVING_AUTH__OPEN_DOCS", "maybe", ["OPEN_DOCS is 'maybe'; it should be a valid boolean"]),
    ("empty-name", "SERVING_FEATURES__", "{}", ["SERVING_FEATURES__ is not a setting; write SERVING_FEATURES__NAME"]),
    ("empty-name-of-a-row", "SERVING_FEATURES____GE", "1", ["SERVING_FEATURES____GE is not a setting; write SERVING"]),
    ("empty-name-in-json", "SERVING_FEATURES", '{"": {"ge": 1}}', ["environment: SERVING_FEATURES", "an empty name"]),
    ("keys-as-table", "SERVING_AUTH__API_KEYS", '{"a": 1}', ["** (a table); it should be a list"]),
    ("port-alone", "SERVING_SERVER__BIND", "8000", ["SERVING_SERVER__BIND is 8000; it should be 'host:port' or"]),
    ("port-of-a-person", "SERVING_PORT", "8000", ["SERVING_PORT is not a setting", "'SERVING_SERVER__BIND'"]),
    ("host-of-a-person", "SERVING_SERVER__HOST", "::", ["SERVING_SERVER__HOST is not", "'SERVING_SERVER__BIND'"]),
    ("key-like-a-service", "SERVING_SERVER__SERVICE_PORT", "80", ["SERVICE_PORT is not a setting", "SERVER__BIND"]),
    ("setting-like-a-service", "SERVING_SERVER_WORKERS_PORT", "3", ["SERVING_SERVER_WORKERS_PORT is not a setting"]),
    (
        "missing-model",
        "SERVING_MODEL__PATH",
        "/nope.skops",
        ["SERVING_MODEL__PATH is '/nope.skops', which does not exist"],
    ),
    (
        "missing-file",
        "SERVING_SETTINGS",
        "/nope.toml",
        ["'/nope.toml' cannot be read: No such file", "SERVING_SETTINGS"],
    ),
    (
        "feature-of-no-model",
        "SERVING_FEATURES__WIDHT__GE",
        "1",
        ["SERVING_FEATURES__WIDHT__GE: features.widht is not about a feature"],
    ),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with artifacts that are good, cut, and none."""
    data = (PROJECT / "model/iris.skops").read_bytes()
    (tmp_path / "iris.skops").write_bytes(data)
    (tmp_path / "cut.skops").write_bytes(data[:1000])
    (tmp_path / "folder.skops").mkdir()
    return tmp_path


@pytest.mark.parametrize(("text", "expected"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_mistake_in_file_is_explained(folder: Path, text: str, expected: list[str]) -> None:
    """The message names the file's key, the value seen and what is allowed."""
    file = folder / "mine.toml"
    file.write_text(text if "[model]" in text else text + '\n[model]\npath = "iris.skops"')
    with pytest.raises(StartupError) as caught:
        app.make_service(app.load_settings(file))
    assert [part for part in ["mine.toml", *expected] if part not in str(caught.value)] == []


@pytest.mark.parametrize(("name", "value", "expected"), [case[1:] for case in VARIABLES], ids=[c[0] for c in VARIABLES])
def test_mistake_in_environment_is_explained(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: list[str]
) -> None:
    """The message names the variable, the value seen and what is allowed."""
    monkeypatch.setenv(name, value)
    with pytest.raises(StartupError) as caught:
        app.make_service(app.load_settings())
    assert [part for part in expected if part not in str(caught.value)] == []


def test_empty_variables_count_as_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of nothing or of blanks leaves each value as the file has it: keys that close it stay closed."""
    file = tmp_path / "mine.toml"
    file.write_text('[auth]\napi_keys = ["key"]\n[features.x]\nunit = "cm"\n[server]\nworkers = 3')
    expected = app.load_settings(file)
    tables = [*app.Settings.model_fields, "features__x", "features__x__ge"]
    for number, name in enumerate([*tables, *("__".join(key) for key in setting_keys(app.Settings)), "settings"]):
        monkeypatch.setenv(f"SERVING_{name.upper()}", " \t" * (number % 2))
    assert app.load_settings(file) == expected
    assert app.load_settings(file).source("auth", "api_keys") == "mine.toml"
    monkeypatch.setenv("SERVING_AUTH__API_KEYS", "[]")  # which is no empty variable, but a list
    assert app.load_settings(file).auth.api_keys == []


def test_blanks_around_a_variable_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a shell or a file of variables leaves around a value is no part of it."""
    monkeypatch.setenv("SERVING_MODEL__NAME", " other ")
    monkeypatch.setenv("SERVING_SERVER__WORKERS", "3\n")
    settings = app.load_settings()
    assert (settings.model.name, settings.server.workers) == ("other", 3)


WORDS = {
    "framework": ("FastAPI", "fastapi"),
    "server__worker_class": ("Gevent", "gevent"),
    "server__workers": ("AUTO", "auto"),
    "model__runtime": ("ONNX", "onnx"),
    "features__sepal_length__type": ("Int", "int"),
    "logging__level": ("INFO", "info"),
    "logging__format": ("JSON", "json"),
}


@pytest.mark.parametrize("name", WORDS)
def test_words_have_any_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A word of a fixed choice may be written in capitals, in the file and in the environment."""
    (given, expected), key = WORDS[name], tuple(name.split("__"))
    (tmp_path / "mine.toml").write_text(f'{".".join(key)} = "{given}"')
    settings = app.load_settings(tmp_path / "mine.toml")
    monkeypatch.setenv(variable(key), given)
    for value in (settings.model_dump(), app.load_settings().model_dump()):
        for part in key:
            value = value[part]
        assert value == expected


@pytest.mark.parametrize(("word", "level"), [("WARN", "warning"), ("fatal", "critical"), ("Debug", "debug")])
def test_levels_have_pythons_other_words(monkeypatch: pytest.MonkeyPatch, word: str, level: str) -> None:
    """A level may be one of Python's other words for it, in gunicorn's options too."""
    assert app.load_settings(options={"loglevel": word}).logging.level == level
    monkeypatch.setenv("SERVING_LOGGING__LEVEL", word)
    assert app.load_settings().logging.level == level


def test_features_of_the_environment_replace_those_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """`SERVING_FEATURES` is the whole table; other tables, and each feature, have keys that are set one by one."""
    monkeypatch.setenv("SERVING_FEATURES", '{"petal_width": {"unit": "mm"}}')
    monkeypatch.setenv("SERVING_FEATURES__SEPAL_LENGTH__GE", "1")
    monkeypatch.setenv("SERVING_FEATURES__PETAL_WIDTH__LE", "9")
    monkeypatch.setenv("SERVING_LIMITS", '{"max_rows": 7}')
    settings = app.load_settings()
    features = {name: feature.model_dump(exclude_none=True) for name, feature in settings.features.items()}
    assert features == {"petal_width": {"unit": "mm", "le": 9.0}, "sepal_length": {"ge": 1.0}}
    assert (settings.limits.max_rows, settings.limits.max_queued_rows) == (7, 10_000)
    assert (
        settings.place("features", "petal_width", "unit") == "environment: SERVING_FEATURES: features.petal_width.unit"
    )
    assert settings.place("features", "sepal_length", "ge") == "environment: SERVING_FEATURES__SEPAL_LENGTH__GE"
    monkeypatch.delenv("SERVING_FEATURES__SEPAL_LENGTH__GE")
    monkeypatch.delenv("SERVING_FEATURES__PETAL_WIDTH__LE")
    monkeypatch.setenv("SERVING_FEATURES", "{}")
    assert app.load_settings().features == {}
    assert "features = {}  # environment: SERVING_FEATURES" in run("python app.py", SERVING_FEATURES="{}").stdout


def test_a_variable_finds_features_with_capitals_and_blanks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable is about the feature whose name it has but for case, with _ for other characters."""
    (tmp_path / "mine.toml").write_text('[features]\nX = {unit = "m"}\n"Sepal Length (cm)" = {unit = "cm"}')
    for name, value in {"X": "1", "SEPAL_LENGTH_CM": "2", "y": "3"}.items():
        monkeypatch.setenv(f"SERVING_FEATURES__{name}__GE", value)
    settings = app.load_settings(tmp_path / "mine.toml")
    assert {name: (feature.ge, feature.unit) for name, feature in settings.features.items()} == {
        "X": (1.0, "m"),
        "Sepal Length (cm)": (2.0, "cm"),
        "y": (3.0, None),
    }
    assert settings.place("features", "X", "ge") == "environment: SERVING_FEATURES__X__GE"
    assert (
        settings.source("features", "Sepal Length (cm)", "ge") == "environment: SERVING_FEATURES__SEPAL_LENGTH_CM__GE"
    )


@pytest.mark.parametrize("name", ["my__col", "a_", "_a", "a__b__c", "Ä_ ß__", "a.b"])
@pytest.mark.parametrize("place", ["file", "variable"])
def test_a_variable_finds_a_feature_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    """Underscores at the ends of a name, and several in a row, count as one or none in its variable."""
    (tmp_path / "mine.toml").write_text(f'[features]\n"{name}" = {{ge = 1}}' if place == "file" else "")
    if place == "variable":
        monkeypatch.setenv("SERVING_FEATURES", json.dumps({name: {"ge": 1}}))
    variable = f"SERVING_FEATURES__{as_word(name)}__LE"
    monkeypatch.setenv(variable, "5")
    settings = app.load_settings(tmp_path / "mine.toml")
    assert {key: (feature.ge, feature.le) for key, feature in settings.features.items()} == {name: (1.0, 5.0)}
    assert settings.place("features", name, "le") == f"environment: {variable}"
    monkeypatch.setenv(f"SERVING_FEATURES__{as_word(name)}", '{"unit": "m"}')
    feature = app.load_settings(tmp_path / "mine.toml").features[name]
    assert (feature.ge, feature.le, feature.unit) == (1.0, 5.0, "m")


def test_an_empty_variable_changes_no_other_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of variables have any case: an empty one counts as not set, two values for one key are refused."""
    monkeypatch.setenv("SERVING_AUTH__API_KEYS", '["hidden"]')
    monkeypatch.setenv("serving_auth__api_keys", "")
    assert len(app.load_settings().auth.api_keys) == 1
    monkeypatch.setenv("serving_auth__api_keys", '["hidden"]')
    assert len(app.load_settings().auth.api_keys) == 1
    monkeypatch.setenv("serving_auth__api_keys", "[]")
    with pytest.raises(SettingsError) as caught:
        app.load_settings()
    names = "SERVING_AUTH__API_KEYS and serving_auth__api_keys"
    assert str(caught.value) == f"environment: {names} set one key to two values; unset one of them"


def test_two_variables_of_one_feature_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two would count, nobody can say."""
    (tmp_path / "mine.toml").write_text('[features]\n"a b" = {}')
    monkeypatch.setenv("SERVING_FEATURES__A_B__GE", "1")
    monkeypatch.setenv("SERVING_FEATURES__A-B__GE", "2")
    with pytest.raises(SettingsError, match="FEATURES__A-B__GE and SERVING_FEATURES__A_B__GE set one key to two"):
        app.load_settings(tmp_path / "mine.toml")


def test_serving_settings_has_any_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings file is found by its variable as any setting is."""
    (tmp_path / "mine.toml").write_text('framework = "flask"')
    monkeypatch.setenv("serving_settings", str(tmp_path / "mine.toml"))
    monkeypatch.setenv("SERVING_SETTINGS", " ")
    assert app.load_settings().framework == "flask"
    monkeypatch.setenv("serving_settings", "/nope/x.toml")
    with pytest.raises(SettingsError, match=r"settings file '/nope/x.toml' cannot be read"):
        app.load_settings()
    monkeypatch.setenv("SERVING_SETTINGS", str(tmp_path / "mine.toml"))
    with pytest.raises(SettingsError, match="SERVING_SETTINGS and serving_settings set one key to two values"):
        app.load_settings()


def test_all_features_of_another_model_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that the environment chooses: one line names the file's features in their order, and the way out."""
    estimator = LogisticRegression().fit(pd.DataFrame({"petal_width": [0.0, 1.0], "Height": [1.0, 0.0]}), [0, 1])
    for key, value in save(estimator, tmp_path / "other.joblib").items():
        monkeypatch.setenv(f"SERVING_MODEL__{key.upper()}", value)
    with pytest.raises(SettingsError) as caught:
        app.load(app.load_settings())
    assert str(caught.value) == (
        "settings.toml: features.sepal_length, features.sepal_width, features.petal_length are not about a feature of"
        " the model; use one of 'petal_width', 'Height'; SERVING_FEATURES='{}' leaves out [features] of settings.toml"
    )
    monkeypatch.setenv("SERVING_FEATURES", "{}")
    assert app.load(app.load_settings()).contract.names == ["petal_width", "Height"]
    monkeypatch.setenv("SERVING_FEATURES__HEIGHT__GE", "0")
    with pytest.raises(SettingsError, match="a name with capitals goes into SERVING_FEATURES, as JSON"):
        app.load(app.load_settings())
    monkeypatch.setenv("SERVING_FEATURES", '{"Height": {}}')
    assert app.load(app.load_settings()).contract.features["Height"].ge == 0.0


OF_SERVICES = {
    "SERVING_SERVICE_HOST": "10.0.171.239",
    "SERVING_SERVICE_PORT": "80",
    "SERVING_SERVICE_PORT_HTTP": "80",
    "SERVING_PORT": "tcp://10.0.171.239:80",
    "SERVING_PORT_80_TCP": "tcp://10.0.171.239:80",
    "SERVING_PORT_80_TCP_PROTO": "tcp",
    "SERVING_PORT_80_TCP_PORT": "80",
    "SERVING_PORT_80_TCP_ADDR": "10.0.171.239",
    "SERVING_SERVER_SERVICE_HOST": "fd00::a",
    "SERVING_MODEL_PORT": "udp://[fd00::a]:53",
    "SERVING_MODEL_PORT_53_UDP": "udp://[fd00::a]:53",
    "SERVING_MODEL_PORT_9_SCTP_ADDR": "fd00::a",
    "SERVING_SERVICE_SERVICE_PORT": "80",  # of one that is called serving-service
    "SERVING_SERVICE_PORT_81_TCP": "tcp://10.0.171.239:81",
}


def test_variables_of_kubernetes_are_left_alone() -> None:
    """What Kubernetes sets for Services called serving or serving-… is no mistake, and one line at debug level."""
    code = "import app; app.create_app()"
    done = run(["python", "-c", code], **OF_SERVICES, SERVING_LOGGING__LEVEL="debug", SERVING_LOGGING__FORMAT="json")
    lines = [line for line in map(json.loads, done.stderr.splitlines()) if line["event"] == "variables_left_alone"]
    assert [line["names"] for line in lines] == [sorted(OF_SERVICES)]
    assert (done.returncode, lines[0]["level"]) == (0, "debug")


@pytest.mark.parametrize("name", OF_SERVICES)
def test_variables_like_those_of_kubernetes_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Such a name with another value is a person's mistake."""
    monkeypatch.setenv(name, "many")
    with pytest.raises(SettingsError, match=f"^environment: {name} is not a setting; "):
        app.load_settings()


def test_relative_path_starts_from_the_settings_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is not beside a settings file of another folder: the message has the rule, and where one is."""
    (folder / "config").mkdir()
    (file := folder / "config" / "mine.toml").write_text('[model]\npath = "model/iris.skops"')
    there = f"mine.toml: model.path is '{folder}/config/model/iris.skops', which does not exist; 'model/iris.skops'"
    with pytest.raises(StartupError) as of_project:
        app.load(app.load_settings(file))
    assert str(of_project.value) == (
        f"{there} starts from the folder of the settings file, write '{PROJECT}/model/iris.skops', where there is one"
    )
    monkeypatch.setenv("SERVING_MODEL__PATH", "iris.skops")
    monkeypatch.chdir(folder)
    with pytest.raises(StartupError, match=re.escape(f"write '{folder}/iris.skops', where there is one")):
        app.load(app.load_settings(file))
    monkeypatch.setenv("SERVING_MODEL__PATH", "none.skops")
    with pytest.raises(StartupError, match=r"settings file, write an absolute path for another one$"):
        app.load(app.load_settings(file))
    monkeypatch.setenv("SERVING_MODEL__PATH", f"{folder}/iris.skops")
    assert app.load(app.load_settings(file)).path == folder / "iris.skops"


def test_mistake_is_placed_where_it_stands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that gives other keys of a table, or overrides the wrong value, is not blamed for the file."""
    file = folder / "mine.toml"
    file.write_text('framework = "django"\n[server]\ntimeout = -1')
    monkeypatch.setenv("SERVING_FRAMEWORK", "flask")
    monkeypatch.setenv("SERVING_SERVER", '{"workers": 2}')
    with pytest.raises(SettingsError) as caught:
        app.load_settings(file)
    framework, timeout = str(caught.value).splitlines()
    assert framework.startswith("mine.toml: framework is 'django'")
    assert timeout.startswith("mine.toml: server.timeout is -1")
    file.write_text("[server]\ntimeout = 1\nworkers = 1")
    settings = app.load_settings(file)
    assert (settings.source("server", "workers"), settings.server.workers) == ("environment: SERVING_SERVER", 2)
    assert settings.source("server", "timeout") == "mine.toml"
    assert settings.source("server", "backlog") == "default"


def test_every_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two mistakes are two lines."""
    monkeypatch.setenv("SERVING_FRAMEWROK", "flask")
    monkeypatch.setenv("SERVING_SERVER__WORKRS", "2")
    with pytest.raises(SettingsError) as caught:
        app.load_settings()
    assert len(str(caught.value).splitlines()) == 2


def test_odd_names_are_printed_as_toml(tmp_path: Path) -> None:
    """`python app.py` prints valid TOML whatever the features are called."""
    features = {"😀": {"unit": "\u007f"}, 'a "b"\n': {"example": 1.5}}
    done = run("python app.py", SERVING_FEATURES=json.dumps(features))
    printed = tomllib.loads(done.stdout)["features"]
    assert printed["😀"]["unit"] == "\u007f"
    assert printed['a "b"\n']["example"] == 1.5


@pytest.mark.parametrize("text", ["hunter2", '["hunter2", 2]', '["hunter2", ""]', '{"hunter2": 1}'])
def test_secret_is_in_no_message(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A wrong value of a secret setting is not repeated."""
    monkeypatch.setenv("SERVING_AUTH__API_KEYS", text)
    with pytest.raises(SettingsError) as caught:
        app.load_settings()
    assert "SERVING_AUTH__API_KEYS is **********" in str(caught.value)
    assert "hunter2" not in str(caught.value)


COMMANDS = {
    "gunicorn": GUNICORN,
    "check-config": f"{GUNICORN} --check-config",
    "flask": "flask --app app run --debug --port 0",
    "uvicorn": "uvicorn app:app --port 0",
    "uvicorn-asgi": "uvicorn app:asgi --port 0",
    "gunicorn-wsgi": "gunicorn app:wsgi --bind 127.0.0.1:0 --workers 2 --worker-class gevent",
    "gunicorn-asgi": "gunicorn app:asgi --bind 127.0.0.1:0 --worker-class uvicorn_worker.UvicornWorker",
}


def test_other_names_lead_to_settings() -> None:
    """What others call a key leads to one that there is, and is none itself."""
    tables = [info.annotation for info in app.Settings.model_fields.values()]
    for table in (app.Settings, FeatureSettings, *tables):
        if isinstance(table, type) and issubclass(table, SettingsTable):
            others = {other for names in table.other_names.values() for other in names}
            assert table.other_names.keys() <= table.model_fields.keys()
            assert not others & table.model_fields.keys()


MISTAKES = {
    "setting": {"SERVING_LOGGING__LEVEL": "loud"},
    "variable": {"SERVING_LOGING__LEVEL": "info"},
    "file": {"SERVING_SETTINGS": "/nope.toml"},
    "model": {"SERVING_MODEL__PATH": "/nope.skops"},
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_stops_gunicorn_before_it_listens(mistake: dict[str, str]) -> None:
    """One message, a status that is not zero, no traceback, and no socket."""
    done = run_gunicorn(SERVING_SERVER__BIND="127.0.0.1:0", **mistake)
    assert done.returncode != 0
    assert re.fullmatch(r"(Settings|Model)Error: [^\n]+\n", done.stderr)
    assert done.stdout == ""


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_mistake_stops_every_command(command: str) -> None:
    """However the service is started, a mistake ends it with the message and without a traceback."""
    done = run(
        command, SERVING_MODEL__PATH="/nope.skops", SERVING_FRAMEWORK="flask" if "flask" in command else "fastapi"
    )
    assert done.returncode != 0
    assert "ModelError: environment: SERVING_MODEL__PATH is '/nope.skops', which does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_config_accepts_the_shipped_settings() -> None:
    """`--check-config` says nothing and ends with 0 when there is nothing to say."""
    done = run(COMMANDS["check-config"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_printed_settings_are_toml_with_sources() -> None:
    """`python app.py` prints every key in force, each with where it comes from, and masks secrets."""
    environment = {"SERVING_SERVER__WORKERS": "3", "SERVING_AUTH__API_KEYS": '["hunter2"]'}
    done = run("python app.py", **environment)
    printed = tomllib.loads(done.stdout)
    assert (printed["server"]["workers"], printed["framework"]) == (3, "fastapi")
    assert printed["auth"]["api_keys"] == ["**********"]
    assert "workers = 3  # environment: SERVING_SERVER__WORKERS" in done.stdout
    assert 'framework = "fastapi"  # settings.toml' in done.stdout
    assert "# missing is not set" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr


def test_import_does_nothing() -> None:
    """Importing `app` reads no settings, loads neither framework and changes no logging."""
    code = """
import logging, sys
import app
print(sorted({'flask', 'fastapi', 'gevent', 'uvicorn', 'skops', 'a2wsgi'} & sys.modules.keys()), logging.root.handlers)
"""
    environment = os.environ | {"SERVING_SETTINGS": "/nope.toml"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[] []\n"


def test_only_the_chosen_framework_is_loaded() -> None:
    """An app of one framework leaves the other unimported."""
    code = "import sys, app; app.create_app(); print(sorted({'flask', 'fastapi'} & sys.modules.keys()))"
    for framework in app.FRAMEWORKS:
        environment = os.environ | {"SERVING_FRAMEWORK": framework}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == f"['{framework}']\n"

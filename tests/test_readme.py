"""The README's commands give what it shows, and its tables list what there is."""

import json
import re
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from conftest import COMBINATIONS, PROJECT, Server, gunicorn_environment
from test_development import SERVING

import app

README = (PROJECT / "README.md").read_text()
EXAMPLES = re.findall(r"^\$ (curl [^\n]+)\n([^\n]+)$", README, re.MULTILINE)


def rounded(value: Any) -> Any:
    """Round the floats in a JSON value: their last digits are the processor's."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize(("command", "shown"), EXAMPLES, ids=[str(number) for number in range(len(EXAMPLES))])
def test_examples_give_what_is_shown(
    servers: dict[tuple[str, str], Server], combination: tuple[str, str], command: str, shown: str
) -> None:
    """Each curl command, run by a shell as it stands but for the port, prints what stands below it."""
    command = command.replace("localhost:8000", f"127.0.0.1:{servers[combination].port}")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert rounded(json.loads(done.stdout)) == rounded(json.loads(shown))


def test_examples_are_there() -> None:
    """The examples are found: a query, arrays, errors and health."""
    assert len(EXAMPLES) >= 6


def test_settings_table_lists_every_key() -> None:
    """The table of settings has each key with its default, in the file's order."""
    rows = re.findall(r"^\| `([a-z_.]+)` \| `([^`]+)` \|", README, re.MULTILINE)
    defaults = app.Settings().model_dump()
    expected = []
    for key in app.setting_keys():
        value: Any = defaults
        for part in key:
            value = value[part]
        expected.append((".".join(key), value))
    assert [(key, json.loads(default)) for key, default in rows] == expected


def test_feature_keys_are_listed() -> None:
    """The row of `features`, and the shipped file, name every key that a feature has."""
    (row,) = re.findall(r"^\| `features` .*$", README, re.MULTILINE)
    shipped = (PROJECT / "settings.toml").read_text()
    for name in app.FeatureSettings.model_fields:
        assert f"`{name}`" in row
        assert re.search(rf"#.*\b{name}\b", shipped)


def test_status_table_lists_every_error() -> None:
    """Every status that an operation can answer with is explained."""
    rows = re.findall(r"^\| ([\d, ]+) \|", README, re.MULTILINE)
    listed = {int(status) for row in rows for status in row.split(",")}
    assert {status for operation in app.OPERATIONS for status in operation.errors} <= listed


def test_layout_table_lists_the_house() -> None:
    """The layout names what is there, and every top-level module and folder of code is in it."""
    table = README.partition("| file | holds |")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert [name for name in listed if not (PROJECT / name).exists()] == []
    assert {path.name for path in PROJECT.glob("*.py")} <= set(listed)


def test_development_commands_are_tested() -> None:
    """Each command of the README is one that the tests run, but for host and port."""

    def plain(command: str) -> str:
        return re.sub(r"--(port|host|bind) \S+|#.*", "", command).replace("  ", " ").strip()

    block = README.partition("## Develop")[2].partition("```console\n")[2].partition("```")[0]
    commands = {plain(line.removeprefix("$ ")) for line in block.splitlines()}
    run = {plain(command) for command, _ in SERVING}
    run |= {"flask --app app run --debug", "uvicorn app:app --reload"}
    assert {" ".join(command.split()) for command in commands} <= {" ".join(command.split()) for command in run}


def test_make_serve_serves(serve: Callable[..., Server]) -> None:
    """`make serve` starts gunicorn with the shipped settings."""
    server = serve("make serve", **gunicorn_environment("fastapi", "auto"))
    assert server.get("/health/ready").json == {"status": "ready", "model": "iris"}
    server.stop(signal.SIGTERM)

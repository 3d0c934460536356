"""The commands of README and docs give what is shown, and the tables list what there is."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import app
from serving import VERSION
from serving.predictor.artifact import OLDEST_SKLEARN
from serving.predictor.features import FeatureSettings
from tests.lib.apps import make_settings
from tests.lib.artifacts import copy_project
from tests.lib.pages import HASH, console_steps, paste, rounded
from tests.lib.servers import BIN, PROJECT, SERVE_COMMANDS, Server, Starter, gunicorn_environment, run
from tests.lib.sizes import each_combination, each_worker

README = (PROJECT / "README.md").read_text()
PAGES = {
    name: (PROJECT / "docs" / name).read_text()
    for name in ("examples.md", "http.md", "operate.md", "models.md", "speed.md", "design.md")
}
SHIPPED = README.partition("## Serve your own model")[0] + PAGES["http.md"]
EXAMPLES = re.findall(r"^\$ (curl [^\n]+)\n([^\n]+)$", SHIPPED, re.MULTILINE)


@each_combination()
@pytest.mark.parametrize(("command", "shown"), EXAMPLES, ids=[str(number) for number in range(len(EXAMPLES))])
def test_examples_give_what_is_shown(
    servers: dict[tuple[str, str], Server], combination: tuple[str, str], command: str, shown: str
) -> None:
    """Each curl command, run by a shell as it stands but for the port, prints what stands below it."""
    command = command.replace("localhost:8000", f"127.0.0.1:{servers[combination].port}")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    answer, expected = (rounded(json.loads(text)) for text in (done.stdout, shown))
    if "settings_sha256" in expected:  # which names framework and port
        expected["settings_sha256"] = answer["settings_sha256"]
    assert answer == expected


def test_examples_are_there() -> None:
    """The examples are found: a query, arrays, errors and health."""
    assert len(EXAMPLES) >= 6


def test_feature_keys_are_listed() -> None:
    """The shipped settings file, which documents itself, names every key that a feature has."""
    shipped = (PROJECT / "settings.toml").read_text()
    for name in FeatureSettings.model_fields:
        assert re.search(rf"#.*\b{name}\b", shipped)


def test_readme_is_short() -> None:
    """The README is for whoever meets the project; the rest stands in pages of its own, each of which it names."""
    assert len(README.splitlines()) <= 130
    assert {path.name for path in (PROJECT / "docs").glob("*.md")} == {*PAGES}
    for name in PAGES:
        assert f"(docs/{name})" in README


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{name}" for name in PAGES)])
def test_links_lead_somewhere(page: str) -> None:
    """Each link between the pages is to a file that is there."""
    file = PROJECT / page
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", file.read_text()) if not link.startswith("http")]
    assert [link for link in links if not (file.parent / link).exists()] == []


def test_versions_are_those_that_are_run() -> None:
    """The Pythons are those of `.ci/run`; the oldest scikit-learn is what is tried, and refused below."""
    (pythons,) = re.findall(r"^for version in (.*); do$", (PROJECT / ".ci/run").read_text(), re.MULTILINE)
    text = " ".join(README.split())
    (named,) = re.findall(r"run on Python (3\.[^(]*) \(", text)
    assert re.findall(r"\b(3\.\d+)\.\d+\b", named) == pythons.split()
    (oldest,) = re.findall(r"oldest scikit-learn that is supported is ([\d.]+),", text)
    assert f"scikit-learn=={oldest}\n" in (PROJECT / "tests/requirements-oldest.txt").read_text()
    assert f"# {oldest} is the oldest scikit-learn that is supported." in (PROJECT / "requirements.txt").read_text()
    assert oldest == ".".join(map(str, OLDEST_SKLEARN)) + ".0"


def test_status_table_lists_every_error() -> None:
    """Every status that an operation can answer with is explained."""
    rows = re.findall(r"^\| ([\d, ]+) \|", PAGES["http.md"], re.MULTILINE)
    listed = {int(status) for row in rows for status in row.split(",")}
    assert {status for operation in [*app.operations(make_settings())] for status in operation.errors} <= listed


def test_version_is_the_newest_of_the_changelog() -> None:
    """CHANGELOG.md has what is not released yet first, then the version that the service shows, then older ones."""
    text = (PROJECT / "CHANGELOG.md").read_text()
    unreleased, *releases = re.findall(r"^## \[(.*?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert unreleased == ("Unreleased", "")
    assert releases[0][0] == VERSION
    numbers = [tuple(map(int, number.split("."))) for number, _ in releases]
    assert numbers == sorted(numbers, reverse=True)
    assert all(date for _, date in releases)
    shown = run("python app.py")
    assert shown.stdout.splitlines()[0] == f"# version {VERSION}"


def test_make_lists_its_targets() -> None:
    """`make` alone does nothing but print each target with what it does."""
    done = subprocess.run(["make", "--no-print-directory"], cwd=PROJECT, capture_output=True, text=True, check=True)
    listed = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    (targets,) = re.findall(r"^\.PHONY: (help .*)$", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert [target for target, _ in listed] == targets.split()
    assert all(what for _, what in listed)


def test_speed_is_what_the_bench_wrote() -> None:
    """The table of figures is the bench's own, with date, machine and command."""
    written = (PROJECT / "bench" / "results.md").read_text().strip()
    assert written.replace("(results.png)", "(../bench/results.png)") in PAGES["speed.md"]


def test_speed_of_the_readme_is_that_of_the_bench() -> None:
    """Each figure of the README stands in the bench's table, and every goal that was missed is among them."""
    measured = re.findall(r"^\| (.*?) \|.*\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGES["speed.md"], re.MULTILINE)
    shown = re.findall(r"^\| (.*?) \| ([^|]+) \| ([^|]+) \| (yes|\*\*no\*\*) \|$", README, re.MULTILINE)
    assert shown
    assert {*shown} <= {*measured}
    assert {row for row in measured if row[3] == "**no**"} <= {*shown}


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

    block = (
        (PROJECT / "CONTRIBUTING.md")
        .read_text()
        .partition("## Run it while developing")[2]
        .partition("```console\n")[2]
        .partition("```")[0]
    )
    commands = {plain(line.removeprefix("$ ")) for line in block.splitlines()}
    tested = {plain(command) for command, _ in SERVE_COMMANDS}
    tested |= {"flask --app app run --debug", "uvicorn app:app --reload"}
    assert {" ".join(command.split()) for command in commands} <= {" ".join(command.split()) for command in tested}


def test_make_serve_serves(serve: Starter) -> None:
    """`make serve` starts gunicorn with the shipped settings."""
    server = serve("make serve", is_shipped=True, **gunicorn_environment("fastapi", "auto"))
    ready = server.get("/health/ready").json
    assert ready | {"settings_sha256": ""} == shown_ready() | {"settings_sha256": ""}
    server.stop(signal.SIGTERM)


def shown_ready() -> dict[str, str]:
    return json.loads(re.search(r"^\{\"status\":\"ready\".*", README, re.MULTILINE)[0])


def test_shown_hash_of_settings_is_that_of_the_shipped_file() -> None:
    """What the README shows of `/health/ready` is what `make serve` gives."""
    assert shown_ready()["settings_sha256"] == app.load_settings(PROJECT / "settings.toml").sha256


OWN = README.partition("## Serve your own model")[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def penguins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is deployed, in which the model of the README was trained, described, and pasted in."""
    folder = tmp_path_factory.mktemp("own")
    copy_project(folder)
    shutil.copy(PROJECT / "requirements-pandas.txt", folder)
    (folder / "penguins.py").write_text(OWN.partition("```python\n")[2].partition("```")[0])
    activate, *commands = console_steps(OWN)
    assert activate[0] == ". .venv/bin/activate"
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    for command, shown in commands[:3]:
        done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert HASH.sub("…", done.stdout.strip()) == HASH.sub("…", shown)
    paste(done.stdout, folder / "settings.toml")
    assert (folder / "model/penguins.golden.json").exists()
    return folder


@pytest.mark.xdist_group("penguins")
@each_worker()
def test_own_model_is_served_as_shown(serve: Starter, penguins: Path, combination: tuple[str, str]) -> None:
    """The transcript for a model of one's own holds: train, describe, paste, serve, predict."""
    _, _, _, _, (start, _), *requests = console_steps(OWN)
    server = serve(start, penguins, is_shipped=True, **gunicorn_environment(*combination))
    assert len(requests) == 2
    for command, shown in requests:
        command = command.replace("localhost:8000", f"127.0.0.1:{server.port}")
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert rounded(json.loads(done.stdout)) == rounded(json.loads(shown))

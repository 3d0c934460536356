"""The commands of a developer, as real processes: each serves, and the reloading ones reload."""

import http.client
import re
import signal
from pathlib import Path

import pytest

from tests.lib.artifacts import edit
from tests.lib.clients import ROW
from tests.lib.servers import PROJECT, SERVE_COMMANDS, Server, Starter, run, wait_until


@pytest.mark.parametrize(("command", "framework"), SERVE_COMMANDS)
def test_command_serves(serve: Starter, command: str, framework: str) -> None:
    """Good and bad requests are answered, and each has one access line."""
    server = serve(command, SERVING_FRAMEWORK=framework)
    assert server.post(ROW).json["prediction"] == "setosa"
    assert server.post({}, X_Request_ID="bad").status == 422
    wait_until(lambda: '"request_id":"bad"' in server.text, "the access line")
    server.stop(signal.SIGKILL)  # gunicorn's worker, without our configuration, may miss a TERM while it boots
    assert server.text.count('"request_id":"bad"') == 1
    assert server.text.count("POST") == 2


@pytest.mark.parametrize(
    ("command", "framework"),
    [
        ("flask --app app run --debug --port {port}", "flask"),
        ("uvicorn app:app --reload --port {port}", "fastapi"),
        ("uvicorn app:asgi --reload --port {port}", "flask"),
    ],
)
def test_command_reloads(serve: Starter, project: Path, free_port: int, command: str, framework: str) -> None:
    """A change of the source is served without a restart."""
    module = project / "serving/web/endpoints.py"
    source = module.read_text()
    server = serve(command.format(port=free_port), project, free_port, SERVING_FRAMEWORK=framework)
    assert server.get("/ping").json == {"status": "live"}
    changed = source.replace('{"status": "live"}', '{"status": "changed"}')
    assert changed != source
    module.write_text(changed)
    try:
        wait_until(lambda: ping(server) == b'{"status":"changed"}', "the change to be served")
    finally:
        module.write_text(source)
    server.stop()


@pytest.mark.parametrize(
    ("command", "framework"),
    [
        ("flask --app app run --debug --port {port}", "flask"),
        ("uvicorn app:app --reload --port {port}", "fastapi"),
    ],
)
def test_command_reloads_settings(
    serve: Starter, project: Path, file: Path, free_port: int, command: str, framework: str
) -> None:
    """A change of the settings in force counts without a restart: a mistake is named, and what is mended is served."""
    edit(file, ('framework = "fastapi"', f'framework = "{framework}"'))
    server = serve(command.format(port=free_port), project, free_port, SERVING_SETTINGS=str(file))
    edit(file, ('name = "iris"', 'name = "li ly"'))
    wait_until(lambda: "SettingsError: settings.toml: model.name is 'li ly'" in server.text, "the mistake to be named")
    edit(file, ('name = "li ly"', 'name = "rose"'))
    wait_until(lambda: name_of(server) == "rose", "what was mended to be served")
    assert "Traceback" not in server.text
    server.stop()


def name_of(server: Server) -> str | None:
    try:
        return str(server.get("/health/ready").json["model"])
    except (OSError, http.client.HTTPException):
        return None  # between the old process and the new


def ping(server: Server) -> bytes | None:
    try:
        return server.get("/ping").body
    except (OSError, http.client.HTTPException):
        return None  # between the old process and the new


def test_flask_lists_the_routes() -> None:
    """`flask routes` knows the operations."""
    done = run("flask --app app routes", SERVING_FRAMEWORK="flask")
    routes = [tuple(re.split(r"  +", line.strip())) for line in done.stdout.splitlines() if "/" in line]
    assert ("predict_query", "GET, POST", "/predictions") in routes
    assert ("ready", "GET", "/health/ready") in routes


@pytest.mark.parametrize(
    ("command", "framework", "cure"),
    [
        ("flask --app app run --port 0", "fastapi", "set SERVING_FRAMEWORK=flask"),
        ("python -m flask --app app run --port 0", "fastapi", "set SERVING_FRAMEWORK=flask"),
        ("uvicorn app:app --port 0", "flask", "run `uvicorn app:asgi`"),
    ],
)
def test_command_of_the_other_framework_says_so(command: str, framework: str, cure: str) -> None:
    """A command that cannot run the chosen framework's app ends with what would have been right."""
    done = run(command, SERVING_FRAMEWORK=framework)
    assert done.returncode == 4
    assert f"SettingsError: environment: SERVING_FRAMEWORK is {framework!r}, but" in done.stderr
    assert cure in done.stderr
    assert "Traceback" not in done.stderr


def test_commands_listen_to_this_machine_alone() -> None:
    """No command that is shown, or run here, listens at all interfaces: a debugger there is a hole."""
    shown = (PROJECT / "CONTRIBUTING.md").read_text()
    for text in (shown, *(command for command, _ in SERVE_COMMANDS)):
        assert not re.search(r"0\.0\.0\.0|\[::\]|--host", text)

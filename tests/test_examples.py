"""The examples of docs/examples.md: each model is trained and asked, each client run, each check sent."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

import app
import model.describe
from tests.lib.apps import call
from tests.lib.artifacts import deploy
from tests.lib.cases import Case
from tests.lib.clients import post_case
from tests.lib.estimators import Gated
from tests.lib.pages import HASH, console_steps, named_files, paste, rounded
from tests.lib.servers import (
    BIN,
    PROJECT,
    Server,
    Starter,
    gunicorn_environment,
    gunicorn_with,
    wait_until,
)
from tests.lib.sizes import each_combination, each_worker

PAGE = (PROJECT / "docs/examples.md").read_text()
PARTS = dict(zip(*[iter(re.split(r"^## (.*)\n", PAGE, flags=re.M)[1:])] * 2, strict=True))
RECIPES = PARTS["Models"].split("\n### ")[1:]
FILES = dict(named_files(PARTS["Clients"] + PARTS["Checks"]))
KEY = re.search(r"export API_KEY=(\S+)", PAGE)[1]
SCRIPTS = {command: shown for command, shown in console_steps(PARTS["Clients"]) if shown}
BY_R = "Rscript client.R"  # not run, for R may not be there
DIGITS = 5  # on which boosters of all processors agree
NUMBER = re.compile(r"\d+\.\d+(?:e-\d+)?")


def prepare(recipe: str, folder: Path) -> tuple[str, str]:
    """Train and describe a model in a folder, paste its settings there, and return its request and answer."""
    ((name, text),) = named_files(recipe)
    (train, _), (describe, shown), (curl, answer) = console_steps(recipe)
    assert train == f"python {name}"
    (folder / name).write_text(text)
    (folder / "model").mkdir()
    file = folder / "settings.toml"
    shutil.copy(PROJECT / "settings.toml", file)
    printed = io.StringIO()
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVING_SETTINGS", str(file))
        runpy.run_path(name)
        with contextlib.redirect_stdout(printed):
            model.describe.main(describe.removeprefix("python -m model.describe ").split())
    assert HASH.sub("…", printed.getvalue().strip()) == HASH.sub("…", shown)
    paste(printed.getvalue(), file)
    (body,) = re.findall(r"^curl -s localhost:8000/predictions --json '(.*)'$", curl)
    return body, answer


def same(text: str) -> list[str]:
    """Return the words of a text, with its floats rounded."""
    return NUMBER.sub(lambda found: f"{float(found[0]):.{DIGITS}g}", text).split()


@pytest.mark.in_turn
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.partition("\n")[0])
def test_model_is_served_as_shown(tmp_path: Path, framework: str, recipe: str) -> None:
    """The script trains, `model.describe` prints what is shown, and its settings serve the answer that is shown."""
    body, shown = prepare(recipe, tmp_path)
    settings = app.load_settings(tmp_path / "settings.toml").model_copy(update={"framework": framework})
    answer = call(app.create_app(settings), post_case(json.loads(body)))
    assert rounded(answer.json, DIGITS) == rounded(json.loads(shown), DIGITS)


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory, serve_module: Starter) -> tuple[Path, Server]:
    """A folder with the scripts of clients, and the server that they ask, of the model that the page says."""
    folder = tmp_path_factory.mktemp("clients")
    (served,) = re.findall(r"the model of `(.*)`, served with a key", PARTS["Clients"])
    (recipe,) = [recipe for recipe in RECIPES if f"$ python {served}\n" in recipe]
    prepare(recipe, folder)
    variables = {"SERVING_SETTINGS": str(folder / "settings.toml"), "SERVING_AUTH__API_KEYS": json.dumps([KEY])}
    server = serve_module(is_shipped=True, **gunicorn_environment("fastapi", "auto", **variables))
    for name, text in FILES.items():
        (folder / name).write_text(text.replace("localhost:8000", f"127.0.0.1:{server.port}"))
    return folder, server


@pytest.mark.xdist_group("clients")
@pytest.mark.parametrize("command", [command for command in SCRIPTS if command != BY_R])
def test_client_prints_what_is_shown(clients: tuple[Path, Server], command: str) -> None:
    """Each script gets good answers, and says what is wrong with bad rows."""
    environment = os.environ | {"API_KEY": KEY, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], cwd=clients[0], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert same(done.stdout) == same(SCRIPTS[command])


@pytest.mark.xdist_group("clients")
def test_rows_of_r_are_taken(clients: tuple[Path, Server]) -> None:
    """What R sends, of which it leaves out what is `NA`, gets the probabilities that R prints."""
    (sent,) = re.findall(r"^```json\n(.*)\n```$", PARTS["Clients"], re.M)
    answers = clients[1].post(json.loads(sent), Authorization=f"Bearer {KEY}").json
    got = [probability for answer in answers for probability in answer["probabilities"].values()]
    assert got == pytest.approx([float(number) for number in NUMBER.findall(SCRIPTS[BY_R])], rel=10**-DIGITS)


@pytest.mark.xdist_group("clients")
def test_clients_say_the_key(clients: tuple[Path, Server]) -> None:
    """Without the key that the clients send there is no answer."""
    assert clients[1].post({}).status == 401
    assert clients[1].get("/health/ready").status == 200


def test_session_comes_back_when_it_is_told(serve: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A POST that is refused for those that wait is sent again after `Retry-After`, and answered."""
    monkeypatch.setenv("API_KEY", KEY)
    limits = {"SERVING_LIMITS__MAX_QUEUED_ROWS": "1", "SERVING_BATCHING__MAX_ROWS": "1", "PYTHONPATH": str(PROJECT)}
    file = deploy(tmp_path, Gated(0.1, tmp_path))
    server = serve(**gunicorn_environment("fastapi", "auto", SERVING_SETTINGS=file, **limits))
    (tmp_path / "session.py").write_text(FILES["session.py"])
    session = runpy.run_path(str(tmp_path / "session.py"))["session"]
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(server.post, {"x0": 666.0})
        wait_until((tmp_path / "begun").exists, "the call to begin")
        others = [
            pool.submit(session.post, f"http://127.0.0.1:{server.port}/predictions", json={"x0": number}, timeout=60)
            for number in (1.0, 2.0)
        ]
        try:
            wait_until(lambda: '"status":429' in server.text, "the refusal")
        finally:
            (tmp_path / "open").touch()
        assert first.result().status == 200
        assert [other.result().json() for other in others] == [{"prediction": 1.0}, {"prediction": 2.0}]
    server.stop()


@each_worker()
def test_page_of_another_origin_may_ask(serve: Starter, tmp_path: Path, combination: tuple[str, str]) -> None:
    """With the file for its framework, a browser's preflight gets leave, and so does its request."""
    framework, worker = combination
    by_framework = {"fastapi" if "fastapi" in text else "flask": text for text in mine_files()}
    assert by_framework.keys() == {"fastapi", "flask"}
    (tmp_path / "mine.py").write_text(by_framework[framework])
    server = serve(gunicorn_with("mine", worker), **gunicorn_environment(*combination, PYTHONPATH=str(tmp_path)))
    fields = [
        ("Origin", "https://page.example"),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "authorization, content-type"),
    ]
    asked = [("OPTIONS", fields), ("GET", fields[:1])]
    for method, sent in asked:
        with server.connect() as client:
            client.sendall(Case("page", method, "/predictions", (*sent, ("Connection", "close"))).raw())
            text = b"".join(iter(lambda: client.recv(65536), b"")).lower()
        assert b"access-control-allow-origin: https://page.example\r\n" in text
    server.stop()


def mine_files() -> list[str]:
    return [text for name, text in named_files(PARTS["Clients"]) if name == "mine.py"]


@each_combination()
def test_haproxy_gets_what_it_expects(servers: dict[tuple[str, str], Server], combination: tuple[str, str]) -> None:
    """The check of the file is answered as the file expects it; the other two, as the page says."""
    server = servers[combination]
    asked, path = re.findall(r"option httpchk (\S+) (\S+)", FILES["haproxy.cfg"])[0]
    (expected,) = re.findall(r"http-check expect status (\d+)", FILES["haproxy.cfg"])
    for method, target, status in [(asked, path, int(expected)), ("OPTIONS", "/", 204), ("OPTIONS", path, 204)]:
        answer = server.exchange(f"{method} {target} HTTP/1.0\r\n\r\n".encode(), method)
        assert answer.status == status


@each_combination()
def test_probes_are_answered(servers: dict[tuple[str, str], Server], combination: tuple[str, str]) -> None:
    """Each path that Kubernetes asks is answered 200, at the port that the service binds to."""
    (container,) = yaml.safe_load(FILES["pod.yaml"])["spec"]["containers"]
    (bind,) = [variable["value"] for variable in container["env"] if variable["name"] == "SERVING_SERVER__BIND"]
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container[name]["httpGet"]
        assert bind == f"0.0.0.0:{asked['port']}"
        assert servers[combination].get(asked["path"]).status == 200


def test_times_of_checks_fit_the_settings() -> None:
    """A start may take what the settings allow before it is given up, and so may an end before it is cut off."""
    settings = app.load_settings(PROJECT / "settings.toml")
    pod = yaml.safe_load(FILES["pod.yaml"])["spec"]
    (container,) = pod["containers"]
    probe, stop = container["startupProbe"], container["lifecycle"]["preStop"]["exec"]["command"]
    service = yaml.safe_load(FILES["compose.yaml"])["services"]["serving"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > settings.model.load_timeout_s
    assert seconds(service["healthcheck"]["start_period"]) > settings.model.load_timeout_s
    assert pod["terminationGracePeriodSeconds"] > int(stop[1]) + 1 + settings.server.graceful_timeout
    assert seconds(service["stop_grace_period"]) > 1 + settings.server.graceful_timeout


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def test_check_of_docker_tells_who_answers(servers: dict[tuple[str, str], Server], free_port: int) -> None:
    """The command of the file, and curl's of the page, succeed where the service is ready and fail where nobody is."""
    check: dict[str, Any] = yaml.safe_load(FILES["compose.yaml"])["services"]["serving"]["healthcheck"]
    (by_curl,) = re.findall(r"the test is `(.*)`", PARTS["Checks"])
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    for command in (check["test"], by_curl):
        for port, succeeds in [(next(iter(servers.values())).port, True), (free_port, False)]:
            words = ["sh", "-c", command.replace(":8000", f":{port}")]
            done = subprocess.run(words, env=environment, capture_output=True, timeout=60)
            assert (done.returncode == 0) == succeeds

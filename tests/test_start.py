"""Whatever an artifact does, and wherever nothing can be written, a start and a reload end in time, with one line."""

import functools
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import trustme
from catboost import CatBoostClassifier
from lightgbm import LGBMClassifier, LGBMRegressor
from sklearn.compose import make_column_transformer
from sklearn.ensemble import VotingClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from xgboost import XGBClassifier, XGBRegressor

from serving.errors import STARTUP_STATUS
from tests.lib.artifacts import choose, deploy, edit, lay_out, save
from tests.lib.clients import ROW
from tests.lib.estimators import Deadly, Endless, Table, Unpatched, Waiting
from tests.lib.outward import Pooling, Secured, Starting
from tests.lib.proc import is_alive
from tests.lib.servers import (
    BIN,
    COMBINATIONS,
    GUNICORN,
    PROJECT,
    Server,
    Starter,
    gunicorn_environment,
    gunicorn_with,
    run,
    run_gunicorn,
    wait_until,
)
from tests.lib.sizes import TWINS, each_worker, scale

LIMIT_S = scale(3, 10)  # seconds, in which an artifact comes to what it never finishes
LIMIT = {"SERVING_MODEL__LOAD_TIMEOUT_S": str(LIMIT_S), "PYTHONPATH": str(PROJECT)}
LATE = f"which takes longer than model.load_timeout_s = {LIMIT_S} s while"

quiet = functools.partial(LGBMClassifier, n_estimators=20, verbosity=-1)
BOOSTERS: dict[str, Callable[[], Any]] = {  # with as many threads as they take by themselves
    "LightGBM": quiet,
    "XGBoost": functools.partial(XGBClassifier, n_estimators=20),
    "CatBoost": functools.partial(CatBoostClassifier, iterations=20, verbose=0, allow_writing_files=False),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "LightGBM regressor": functools.partial(LGBMRegressor, n_estimators=20, verbosity=-1),
    "XGBoost regressor": functools.partial(XGBRegressor, n_estimators=20),
    "pipeline": lambda: make_pipeline(StandardScaler(), quiet()),
    "columns": lambda: make_pipeline(
        make_column_transformer((StandardScaler(), ["width"]), remainder="passthrough"), XGBClassifier(n_estimators=20)
    ),
    "vote": lambda: VotingClassifier([("a", quiet()), ("b", XGBClassifier(n_estimators=20))], voting="soft"),
}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.DataFrame(np.random.default_rng(0).normal(size=(300, 2)), columns=["width", "height"])


def check_answers(server: Server, estimator: Any, table: pd.DataFrame) -> None:
    """Compare what a server says of rows, in one request and in many, with what the estimator does."""
    rows = table[:50].to_dict("records")
    answers = server.post(rows).json
    assert [answer["prediction"] for answer in answers] == pytest.approx(estimator.predict(table[:50]).tolist())
    if hasattr(estimator, "predict_proba"):
        given = [[*answer["probabilities"].values()] for answer in answers]
        assert np.array(given) == pytest.approx(estimator.predict_proba(table[:50]))
    assert server.post(rows[7]).json["prediction"] == pytest.approx(answers[7]["prediction"])


def fit(make: Callable[[], Any], table: pd.DataFrame) -> Any:
    return make().fit(table, (table["width"] > table["height"]).astype(int))


@pytest.mark.in_turn
@pytest.mark.parametrize("name", BOOSTERS)
@each_worker()
def test_boosters_are_served(serve: Starter, tmp_path: Path, table: pd.DataFrame, combination: Any, name: str) -> None:
    """LightGBM, XGBoost and CatBoost, with all their threads: at the start, by HUP, and one after the other."""
    first, second = name, [*BOOSTERS][[*BOOSTERS].index(name) - 1]
    estimators = {booster: fit(BOOSTERS[booster], table) for booster in (first, second)}
    models = {booster: save(estimators[booster], tmp_path / f"{booster}.joblib") for booster in estimators}
    file = lay_out(tmp_path, *combination)
    choose(file, models[first])
    server = serve(SERVING_SETTINGS=str(file))
    check_answers(server, estimators[first], table)
    assert server.reload()["event"] == "reloaded"
    choose(file, models[second])
    old = server.worker_pids
    assert server.reload()["event"] == "reloaded"
    wait_until(lambda: not set(old) & set(server.worker_pids), "the old workers to end")
    check_answers(server, estimators[second], table)
    assert server.stop() == 0


@pytest.mark.parametrize("name", OTHERS)
def test_boosters_are_served_inside_others(serve: Starter, tmp_path: Path, table: pd.DataFrame, name: str) -> None:
    """A booster in a pipeline, behind a transformer of columns or in a vote is served from its first start."""
    estimator = fit(OTHERS[name], table)
    combination = COMBINATIONS[[*OTHERS].index(name) % len(COMBINATIONS)]
    server = serve(**gunicorn_environment(*combination, SERVING_SETTINGS=deploy(tmp_path, estimator)))
    check_answers(server, estimator, table)
    assert server.stop() == 0


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_catboost_says_its_features(serve: Starter, tmp_path: Path, named: bool, classes: int) -> None:
    """Names and categories of a loaded CatBoost, which says that it has none, are known; alone it is served by them."""
    cells = np.array([["a", 1.0], ["b", 2.0], ["c", 3.0]] * 20, dtype=object)
    table = pd.DataFrame({"city": cells[:, 0], "age": cells[:, 1].astype(float)}) if named else cells
    y = [f"class {number % classes}" for number in range(len(cells))]
    category = "city" if named else 0
    estimator = CatBoostClassifier(iterations=5, verbose=0, cat_features=[category], allow_writing_files=False)
    estimator.fit(table, y)
    server = serve(**gunicorn_environment("fastapi", "uvicorn", SERVING_SETTINGS=deploy(tmp_path, estimator)))
    names = ["city", "age"] if named else ["x0", "x1"]
    rows = [dict(zip(names, row, strict=True)) for row in cells.tolist()]
    answers = server.post(rows).json
    assert [answer["prediction"] for answer in answers] == estimator.predict(table).ravel().tolist()
    assert server.post(rows[0] | {names[0]: 1}).json["detail"][0]["type"] == "string_type"
    server.stop()


CHECKS = ("", "--check-config")


def start_and_check(
    options: str, ways: Sequence[str] = CHECKS, **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """Start gunicorn and check its configuration, and return how each ended."""
    with ThreadPoolExecutor() as pool:
        checks = [f"{options} {option}" for option in ways]
        return [*pool.map(lambda check: run_gunicorn(check, **environment), checks)]


ENDLESS = {
    "loads and waits": (Endless("load", "wait"), f"{LATE} loading it"),
    "loads and computes": (Endless("load", "compute"), f"{LATE} loading it"),
    "loads and computes in C": (Endless("load", "compute in C"), f"{LATE} loading it"),
    "predicts and waits": (Endless("predict", "wait"), f"{LATE} answering its example row"),
    "predicts and computes": (Endless("predict", "compute"), f"{LATE} answering its example row"),
    "predicts and computes in C": (Endless("predict", "compute in C"), f"{LATE} answering its example row"),
    "has native threads": (Table("load"), r"answering its example row; loading it left \d+ native threads behind"),
    "has a thread": (Waiting(), "which starts threads when it is loaded, which forked workers lack: 'of the model'"),
    "kills": (Deadly("kill"), "ended the process that tried it, with status -11"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_start_ends_with_one_line(tmp_path: Path, name: str) -> None:
    """An artifact that never ends, or starts threads, ends a start and a check with one line that says what it did."""
    estimator, message = ENDLESS[name]
    estimator.n_features_in_ = 1
    environment = gunicorn_environment("fastapi", "uvicorn", SERVING_SETTINGS=deploy(tmp_path, estimator), **LIMIT)
    for done in start_and_check("", **environment):
        # What never gives the interpreter back cannot end itself.
        assert done.returncode == (-signal.SIGKILL if name == "loads and computes in C" else STARTUP_STATUS)
        assert re.fullmatch(r"ModelError: settings.toml: model.path is '.*model.joblib', which [^\n]+\n", done.stderr)
        assert re.search(message, done.stderr)


def choose_bad(file: Path, estimator: Any) -> None:
    """Make a settings file name an estimator that never gets ready, and has little time for it."""
    choose(file, save(estimator, file.parent / "model.joblib"))
    edit(file, ("[model]\n", f"[model]\nload_timeout_s = {LIMIT_S}\n"))


@pytest.mark.parametrize("combination", scale(TWINS[:1], TWINS), ids="-".join)
def test_reload_ends_with_one_line(serve: Starter, tmp_path: Path, combination: Any) -> None:
    """The same artifacts by HUP: one line, no process left behind, the old model goes on, and the next HUP is taken."""
    file = lay_out(tmp_path, *combination)
    server = serve(SERVING_SETTINGS=str(file), PYTHONPATH=str(PROJECT))
    good = file.read_text()
    for name, (estimator, message) in [*ENDLESS.items()][:: scale(2, 1)]:
        estimator.n_features_in_ = 1
        choose_bad(file, estimator)
        line = server.reload()
        assert line["event"] == "reload_refused", name
        assert re.search(message.replace("which takes", "takes"), line["reason"]), (name, line)
        assert len(server.worker_pids) == 2, name
        assert server.post(ROW).json["prediction"] == "setosa", name
        file.write_text(good)
        assert server.reload()["event"] == "reloaded", name
        server.wait_for_workers(2)
    assert server.stop() == 0


@pytest.mark.parametrize("combination", TWINS, ids="-".join)
def test_load_that_cannot_be_stopped_is_told(serve: Starter, tmp_path: Path, combination: Any) -> None:
    """A model that never ends only where the master loads it is refused, and told as long as it goes on; workers that
    are killed meanwhile are replaced."""
    file = lay_out(tmp_path, *combination)
    server = serve(SERVING_SETTINGS=str(file), PYTHONPATH=str(PROJECT))
    good = file.read_text()
    choose_bad(file, Endless("load beside workers", "wait"))
    assert re.search(f"{LATE} loading it".replace("which ", ""), server.reload()["reason"])
    file.write_text(good)
    assert "the model of an earlier reload is still being loaded" in server.reload()["reason"]
    killed, _ = server.wait_for_workers(2)
    server.replace(killed, signal.SIGKILL)
    assert server.post(ROW).json["prediction"] == "setosa"
    assert server.stop() == 0


def test_model_with_threads_of_polars_is_served(serve: Starter, tmp_path: Path) -> None:
    """One that has polars compute only when it predicts is served, and each worker has threads of its own."""
    file = deploy(tmp_path, Table("predict"))
    server = serve(**gunicorn_environment("flask", "gevent", SERVING_SETTINGS=file, PYTHONPATH=str(PROJECT)))
    assert server.post({"x0": 1.0}).json == {"prediction": 600.0}
    assert server.reload()["event"] == "reloaded"
    assert server.post({"x0": 1.0}).json == {"prediction": 600.0}
    server.stop()


@pytest.mark.parametrize("framework", ["fastapi", "flask"])
def test_tls_client_is_served_under_gevent(serve: Starter, tmp_path: Path, framework: str) -> None:
    """An estimator that makes a context for TLS now and then is served, though gevent patches a worker after the load.

    So it is after a HUP to uvicorn, and back, and clients come by TLS all the while.
    """
    authority, context = trustme.CA(), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    authority.configure_trust(context)
    file = lay_out(tmp_path, framework, "gevent")
    edit(file, ("workers = 2\n", 'workers = 2\ncertfile = "both.pem"\n'))
    choose(file, save(Secured(), tmp_path / "model.joblib"))
    server = serve(SERVING_SETTINGS=str(file), PYTHONPATH=str(PROJECT), tls=context)
    assert server.post({"x0": 9.0}).json == {"prediction": 9.0}
    for old, new in (("gevent", "uvicorn"), ("uvicorn", "gevent")):
        edit(file, (f'"{old}"', f'"{new}"'))
        before = server.worker_pids
        assert server.reload()["event"] == "reloaded"
        wait_until(lambda before=before: not {*before} & {*server.worker_pids}, "the old workers to end")
        assert server.post({"x0": 9.0}).json == {"prediction": 9.0}
    assert server.stop() == 0


def test_hup_comes_too_late_for_gevent(serve: Starter, tmp_path: Path) -> None:
    """A HUP to gevent is refused where the model served so far has taken names from `ssl`; other models may have it."""
    file = lay_out(tmp_path, "fastapi", "uvicorn")
    iris = file.read_text()
    server = serve(SERVING_SETTINGS=str(file), PYTHONPATH=str(PROJECT))
    edit(file, ('"uvicorn"', '"gevent"'))
    assert server.reload()["event"] == "reloaded"
    file.write_text(iris)
    assert server.reload()["event"] == "reloaded"
    server.stop()

    choose(file, save(Secured(), tmp_path / "model.joblib"))
    server = serve(SERVING_SETTINGS=str(file), PYTHONPATH=str(PROJECT))
    edit(file, ('"uvicorn"', '"gevent"'))
    reason = server.reload()["reason"]
    assert re.match("'urllib3.*' took names from Python's ssl, which gevent has to patch before; restart, or", reason)
    assert server.post({"x0": 9.0}).json == {"prediction": 9.0}
    server.stop()


BLAME = "; without gevent it does not: gevent patches .* server.worker_class = 'uvicorn', or have names of "
PATCHED = {
    "fails": (Starting(True), rf"TypeError: .*{BLAME}"),
    "fails in a thread": (Starting(False), rf"fails on a known row in a thread: TypeError: .*{BLAME}"),
    "waits": (Pooling(), rf"{LATE} answering its example row; gevent, which patches .* may be why; see whether it "),
}


@pytest.mark.parametrize("name", PATCHED)
def test_estimator_that_gevent_breaks_is_refused(serve: Starter, tmp_path: Path, name: str) -> None:
    """The proof runs patched as the worker does: what breaks there ends the start, and the line says what to choose."""
    estimator, message = PATCHED[name]
    limit = LIMIT if name == "waits" else {"PYTHONPATH": str(PROJECT)}
    environment = gunicorn_environment("flask", "gevent", SERVING_SETTINGS=deploy(tmp_path, estimator), **limit)
    done = run_gunicorn(**environment)
    assert done.returncode == STARTUP_STATUS
    assert re.fullmatch(r"ModelError: settings.toml: model.path is '.*model.joblib', which [^\n]+\n", done.stderr)
    assert re.search(message, done.stderr)
    assert "'x0'" not in done.stderr  # for no row and no type of a feature is to blame
    server = serve(**environment | {"SERVING_SERVER__WORKER_CLASS": "uvicorn"})
    assert server.post({"x0": 1.0}).json == {"prediction": 1}
    server.stop()


TELLING = """
import ssl
import app
import structlog

asgi = app.as_asgi(app.create_app())
structlog.get_logger().info("loaded", ssl=ssl.SSLContext.__module__)
"""


def test_refused_gevent_leaves_the_master_as_it_was(serve: Starter, tmp_path: Path) -> None:
    """A HUP to gevent that the proof refuses patches nothing in the master, nor in workers that are forked later."""
    file = lay_out(tmp_path, "fastapi", "uvicorn")
    choose(file, save(Unpatched(), tmp_path / "model.joblib"))
    (tmp_path / "telling.py").write_text(TELLING)
    path = f"{PROJECT}:{tmp_path}"
    server = serve(gunicorn_with("telling", "uvicorn"), SERVING_SETTINGS=str(file), PYTHONPATH=path)
    edit(file, ('"uvicorn"', '"gevent"'))
    assert re.search(BLAME, server.reload()["reason"])
    killed, _ = server.wait_for_workers(2)
    server.replace(killed, signal.SIGKILL)
    told = wait_until(lambda: found if len(found := told_ssl(server)) == 3 else [], "the new worker's line")
    assert told == ["ssl"] * 3
    server.stop()


def told_ssl(server: Server) -> list[str]:
    return [line["ssl"] for line in server.lines if line["event"] == "loaded"]


def test_what_takes_long_is_told(tmp_path: Path) -> None:
    """While a model takes long, a line says every ten seconds what it does, for how long, and until when it may."""
    file = deploy(tmp_path, Endless("predict", "wait"))
    environment = gunicorn_environment("fastapi", "uvicorn", SERVING_SETTINGS=file, **LIMIT)
    done = run_gunicorn(**environment | {"SERVING_MODEL__LOAD_TIMEOUT_S": "11"})
    progress, _ = done.stderr.splitlines()
    assert re.search(r'"doing":"answering its example row","for_s":10\.\d,"limit_s":11\.0', progress)
    assert '"event":"model_takes_long","level":"warning"' in progress


REPORTING = """
import os, signal
from processes import loading

deadline = loading.Deadline(3600.0)
parent = os.getpid()
child = os.fork()
while child == 0:
    deadline.report("answering its example row")
    if os.getppid() != parent:
        os._exit(0)
for _ in range(100_000):
    deadline.check()
os.kill(child, signal.SIGKILL)
"""


def test_limit_holds_while_a_child_reports() -> None:
    """What a child notes of its progress does not shake the limit for a moment, or a good model would be refused."""
    done = run(["python", "-c", REPORTING])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_pipe_and_device_end_the_start(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A path that names a pipe or a device is refused at once."""
    make(tmp_path / "model.skops")
    environment = gunicorn_environment("fastapi", "uvicorn", SERVING_MODEL__PATH=str(tmp_path / "model.skops"))
    done = run_gunicorn(**environment)
    assert done.returncode == STARTUP_STATUS
    assert re.fullmatch(r"ModelError: .*it is a pipe, a socket or a device, not a regular file\n", done.stderr)


@pytest.mark.parametrize("folder", ["/proc", "no/such/folder"])
def test_nowhere_to_write_ends_the_start(folder: str) -> None:
    """A folder that takes no file for the workers' signs of life ends a start before it listens, and a check."""
    environment = gunicorn_environment("flask", "gevent", GUNICORN_CMD_ARGS=f"--worker-tmp-dir {folder}")
    for done in start_and_check("", **environment):
        assert done.returncode == STARTUP_STATUS
        assert re.fullmatch(f"StartupError: worker_tmp_dir is '{folder}', where no file can be made: .*\n", done.stderr)


def test_pid_file_nowhere_ends_the_start() -> None:
    """A folder that takes no file for gunicorn's own number ends a start before it listens, and a check."""
    for done in start_and_check("--pid /proc/gunicorn.pid", **gunicorn_environment("flask", "gevent")):
        assert done.returncode == STARTUP_STATUS
        assert re.fullmatch(
            "StartupError: pidfile is '/proc/gunicorn.pid', where no file can be made: .*\n", done.stderr
        )


def test_daemon_lets_go_of_what_started_it(tmp_path: Path, free_port: int) -> None:
    """With `--daemon` nobody who waits for the end of standard error waits for the daemon's."""
    pid = tmp_path / "pid"
    environment = gunicorn_environment("fastapi", "uvicorn", SERVING_SERVER__BIND=f"127.0.0.1:{free_port}")
    done = run_gunicorn(f"--daemon --pid {pid}", **environment)
    assert done.returncode == 0
    number = int(wait_until(lambda: pid.exists() and pid.read_text(), "the number of the daemon"))
    try:
        assert wait_until(lambda: pings(free_port), "an answer")
    finally:
        os.kill(number, signal.SIGTERM)
    wait_until(lambda: not is_alive(number), "its end")


def pings(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping") as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


READ_ONLY = """
mount -o remount,bind,ro /
for folder in /tmp /var/tmp /dev/shm; do mount -t tmpfs -o ro none $folder; done
cd {project} && exec {command}
"""


@pytest.mark.parametrize("option", ["", " --check-config"], ids=["start", "check"])
def test_read_only_root_ends_the_start(option: str) -> None:
    """With a root that is read only, and no folder for temporary files, a start ends before it listens, and a check."""
    command = f"{BIN}/{GUNICORN}{option}"
    script = READ_ONLY.format(project=PROJECT, command=command)
    done = subprocess.run(
        ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"]), "sh", "-c", script],
        env=os.environ | gunicorn_environment("fastapi", "uvicorn"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == STARTUP_STATUS, done.stderr
    assert "StartupError: no temporary file can be made: No usable temporary directory" in done.stderr
    assert "Listening" not in done.stderr


def test_folder_that_vanishes_harms_nobody(serve: Starter, tmp_path: Path) -> None:
    """Once the service has served, a worker for which there is nowhere to write is tried again until there is."""
    folder = tmp_path / "folder"
    folder.mkdir()
    command = f"{GUNICORN} --worker-tmp-dir {folder}"
    workers = {"SERVING_SERVER__WORKERS": "2", "SERVING_LOGGING__LEVEL": "debug"}
    server = serve(command, **gunicorn_environment("fastapi", "uvicorn", **workers))
    killed, _ = server.wait_for_workers(2)
    wait_until(lambda: server.text.count('"event":"Application startup complete."') == 2, "both workers to serve")
    shutil.rmtree(folder)
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: '"event":"worker_not_started"' in server.text, "the failure")
    assert server.post(ROW).status == 200
    folder.mkdir()
    server.wait_for_workers(2)
    assert server.stop() == 0


REFUSED = {
    "--worker-class sync": "gunicorn's worker_class is 'sync'; leave it out, and set server.worker_class to",
    "--worker-class gthread": "gunicorn's worker_class is 'gthread'",
    "--worker-class tornado": "gunicorn's worker_class is 'tornado'",
    "--worker-class gevent": "the app is 'app:asgi', which gevent's worker cannot run; use 'app:wsgi'",
    "--preload": "preload_app would have the master predict; leave it out",
    "--protocol uwsgi": "gunicorn's protocol is 'uwsgi'; leave it out",
    "--http-parser fast": "gunicorn's http_parser is 'fast'; leave it out",
    "--workers 0": "gunicorn's workers is 0; use 1 or more",
    "--keep-alive 0": "gunicorn's keepalive is 0; use 1 or more",
    "--log-level loud": "gunicorn's options: logging.level is 'loud'; it should be 'debug', 'info', 'warning'",
    "--workers 1001": "gunicorn's options: server.workers is 1001; it should be less than or equal to 1000",
    "--bind fd://3": "gunicorn's options: server.bind is 'fd://3'; it should be 'host:port' or 'unix:path'",
    "--proxy-protocol": "proxy_protocol is not known to uvicorn's worker; leave it out, or use gevent's",
    "--worker-connections 100": "worker_connections is not known to uvicorn's worker; leave it out, or use gevent's",
    "--header-map refuse": "header_map is not known to uvicorn's worker; leave it out, or use gevent's",
    "--threads 2": "threads is not used: each worker has a share of the cores",
    "--http-protocols h2": "http_protocols is not used by this service; leave it out",
    "--dirty-app mine:App": "dirty_apps is not used by this service; leave it out",
    "--env SERVING_FRAMEWORK=flask": "raw_env sets SERVING_FRAMEWORK, which is read before; set it in the environment",
    "--worker-connections 0": "gunicorn's worker_connections is 0; use 1 or more",
    "--reload": "reload would not see a change, since workers share the master's code; leave it out, and restart",
    "--access-logfile -": "accesslog is not used: every line of the log goes to standard error; leave it out",
    "--log-file errors.log": "errorlog is not used: every line of the log goes to standard error; leave it out",
    "--log-config logging.ini": "logconfig is not used: every line of the log goes to standard error; leave it out",
    "--statsd-host localhost:1": "statsd_host is not used: every line of the log goes to standard error; leave it out",
    "app:wsgi": "the app is 'app:wsgi', which uvicorn's worker cannot run; use 'app:asgi'",
}


@pytest.mark.parametrize("given", REFUSED)
def test_option_that_cannot_work_is_refused(given: str) -> None:
    """An option with which every request would be an error, or none be answered, ends a start and a check.

    Without --full one of the two has its turn.
    """
    turn = [*REFUSED].index(given) % 2
    for done in start_and_check(
        given, scale(CHECKS[turn : turn + 1], CHECKS), **gunicorn_environment("fastapi", "uvicorn")
    ):
        assert done.returncode == STARTUP_STATUS
        assert re.fullmatch(f"(Startup|Settings)Error: {re.escape(REFUSED[given])}.*\n", done.stderr)


def test_option_that_cannot_work_is_refused_by_hup(serve: Starter, project: Path) -> None:
    """Such an option in gunicorn.conf.py is one line at HUP, and at a start."""
    file = project / "gunicorn.conf.py"
    text = file.read_text()
    server = serve(cwd=project, **gunicorn_environment("fastapi", "uvicorn"))
    try:
        file.write_text(f'{text}proxy_protocol = "auto"\n')
        assert server.reload()["reason"].startswith("proxy_protocol is not known to uvicorn's worker; leave it out")
        file.write_text(f'{text}worker_class = "sync"\n')
        assert server.reload()["reason"].startswith("gunicorn's worker_class is 'sync'; leave it out")
        with pytest.raises(AssertionError, match=r"(?s)exited with 4: .*StartupError: gunicorn's worker_class"):
            serve(cwd=project, **gunicorn_environment("fastapi", "uvicorn"))
    finally:
        file.write_text(text)
    assert server.post(ROW).status == 200
    server.stop()


def test_taken_port_is_one_line(tmp_path: Path) -> None:
    """A port that another program has ends the start at once, with the place of the address, and no file stays."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        environment = gunicorn_environment("fastapi", "uvicorn", SERVING_LOGGING__LEVEL="error")
        file = tmp_path / "serving.pid"
        by_variable = run_gunicorn(f"--pid {file}", **environment | {"SERVING_SERVER__BIND": address})
        by_option = run_gunicorn(f"--bind {address}", **environment)
    problem = f"cannot listen at '{address}': Address already in use; choose another server.bind\n"
    assert by_variable.stderr == f"SettingsError: environment: SERVING_SERVER__BIND: {problem}"
    assert by_option.stderr == f"SettingsError: gunicorn's options: server.bind: {problem}"
    assert (by_variable.returncode, by_option.returncode) == (STARTUP_STATUS, STARTUP_STATUS)
    assert not file.exists()


WITHOUT = """
import sys

sys.modules[{missing!r}] = None
sys.argv = {command}.split()
from gunicorn.app.wsgiapp import run

run()
"""


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            "gevent",
            "means gevent's worker, and gevent cannot be imported: .*; run pip install 'gunicorn\\[gevent\\]'",
        ),
        ("flask", "ModuleNotFoundError: .*flask"),
    ],
)
def test_missing_package_is_one_line(missing: str, message: str) -> None:
    """A start without a package that the choice of framework and worker needs ends with one line."""
    code = WITHOUT.format(missing=missing, command=repr(GUNICORN))
    done = run(["python", "-c", code], **gunicorn_environment("flask", "gevent"))
    assert done.returncode == STARTUP_STATUS
    assert re.fullmatch(f"StartupError: .*{message}.*\n", done.stderr)

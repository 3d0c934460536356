"""The option `--full`, which tests run beside which, and the fixtures that more than one file of tests uses."""

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier

from tests.lib import prefork, sizes
from tests.lib.artifacts import copy_project, lay_out, load_shipped, save, variables
from tests.lib.clients import ROW
from tests.lib.servers import CHOICES, COMBINATIONS, PROJECT, Server, Starter, find_free_port


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="more requests, reloads and cases, and each combination")


def pytest_configure(config: pytest.Config) -> None:
    sizes.is_full = config.getoption("--full")
    for name in [name for name in os.environ if name.startswith(CHOICES)]:
        del os.environ[name]


# Files whose servers are programs of their own with `--full`: their subject is the start, or what a program inherits.
# Of the four combinations two are.
PROGRAMS = {"test_development", "test_examples", "test_readme", "test_reload", "test_start"}


@pytest.hookimpl(tryfirst=True)  # before the servers of a session are started
def pytest_runtest_setup(item: pytest.Item) -> None:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    is_twin = parameters.get("combination", sizes.TWINS[0]) in sizes.TWINS
    prefork.is_on = not (sizes.is_full and item.path.stem in PROGRAMS and is_twin)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, which then reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep tests that share servers in one process, which has them started once; let those that start any go first."""
    if not sizes.is_full and not any("[" in argument for argument in config.args):  # asked for by its id
        config.hook.pytest_deselected(items=sizes.take_turns(items))
    for item in items:
        names: list[str] = getattr(item, "fixturenames", [])
        if shared := [name for name in names if name.endswith(("servers", "_server"))]:
            item.add_marker(pytest.mark.xdist_group(shared[0]))
    items.sort(key=lambda item: "serve" not in getattr(item, "fixturenames", []))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported: it would go through it a hundred times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def quick_model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shipped model as .joblib, which is loaded a second faster than .skops, in the settings' variables."""
    folder = tmp_path_factory.mktemp("quick")
    shutil.copy(PROJECT / "model/iris.golden.json", folder)
    return variables(save(load_shipped(), folder / "iris.joblib"))


def start_servers(tmp_path_factory: pytest.TempPathFactory, quick_model: dict[str, str]) -> Iterator[Starter]:
    """Start servers, of the quick model unless the environment names another, and end them with who asked for them."""
    starter = Starter(tmp_path_factory.mktemp("servers"), quick_model)
    yield starter
    starter.stop()


serve = pytest.fixture(start_servers)
serve_module = pytest.fixture(start_servers, scope="module")
serve_session = pytest.fixture(start_servers, scope="session")


@pytest.fixture(scope="session")
def servers(serve_session: Starter) -> dict[tuple[str, str], Server]:
    """The four combinations of framework and worker, run by gunicorn from the shipped settings."""
    return serve_session.each(COMBINATIONS, is_shipped=True)


@pytest.fixture(params=COMBINATIONS, ids="-".join)
def server(request: pytest.FixtureRequest, servers: dict[tuple[str, str], Server]) -> Server:
    return servers[request.param]


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is deployed, for tests that edit it."""
    target = tmp_path_factory.mktemp("project")
    copy_project(target)
    return target


@pytest.fixture(params=["fastapi", "flask"])
def framework(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def forest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model that takes missing values, as the settings of [model] name it."""
    iris = load_iris(as_frame=True)
    estimator = RandomForestClassifier(n_estimators=2).fit(iris.data.set_axis(list(ROW), axis="columns"), iris.target)
    return save(estimator, tmp_path_factory.mktemp("forest") / "model.joblib")


@pytest.fixture
def free_port() -> int:
    """A port that was free a moment ago, for commands that cannot be asked which they took."""
    return find_free_port()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A settings file with the shipped model beside it, both to be edited."""
    return lay_out(tmp_path, "fastapi", "auto")

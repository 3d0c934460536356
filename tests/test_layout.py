"""The house: which file may import which, and how long a file and a function may be."""

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.servers import PROJECT

# Each line may import what stands before it, and within `serving` a file only those in front of it.
FLOORS = [
    "serving.errors serving.cores serving.environment serving.settings serving.server serving.platforms",
    "serving.output serving.console serving.logs serving.watch",
    "serving.predictor.boosters serving.predictor.inputs serving.predictor.features",
    "serving.predictor.contract serving.predictor.predictions serving.predictor.failures",
    "serving.predictor.arrays serving.predictor.columns serving.predictor.bodies serving.predictor.samples",
    "serving.predictor.predictor",
    "serving.predictor.onnx_runtime serving.predictor.onnx_boosting serving.predictor.onnx_convert",
    "serving.predictor.onnx_graph serving.predictor.onnx_file",
    "serving.predictor.skops_file serving.predictor.modules serving.predictor.artifact serving.predictor.golden",
    "serving.predictor.model serving.predictor.calls serving.predictor.batcher serving.predictor.proof",
    "serving.web.messages serving.web.accept serving.web.prefix serving.web.cors serving.web.encodings",
    "serving.web.operation serving.web.service serving.web.decoding serving.web.lines serving.web.endpoints",
    "serving.web.openapi serving.web.tables serving.web.envelopes serving.web.clouds",
    "serving.web.documentation serving.web.wsgi serving.web.asgi serving.web.relay",
    "serving.web.long_numbers serving.web.tensors serving.web.output_tensors serving.web.oip_schema serving.web.oip",
    "serving.web.added serving.web.bridges",
    "app",
    "processes.early processes.tls processes.patches processes.handshake processes.listeners processes.sending",
    "processes.presence",
    "processes.refusals processes.worker processes.options processes.trial processes.loading processes.transport",
    "processes.uvicorn_protocol processes.uvicorn_worker processes.gevent_worker",
    "processes.reload processes.master processes.boot processes.hooks",
    "gunicorn.conf",
]
ORDER = [name for floor in FLOORS for name in floor.split()]
FRAMEWORKS = {"flask", "fastapi", "starlette", "werkzeug"}
SOURCES = {name: PROJECT / f"{name.replace('.', '/') if name != 'gunicorn.conf' else name}.py" for name in ORDER}


def imported_by(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that are imported, wherever it is done but for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in ORDER else str(node.module) for name in names)
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from imported_by(node)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_down(name: str) -> None:
    """No file imports one that stands above it; `serving` knows neither gunicorn nor a framework when imported."""
    tree = ast.parse(SOURCES[name].read_text())
    for module in imported_by(tree):
        assert module not in ORDER or ORDER.index(module) < ORDER.index(name), module
        assert not (name.startswith("serving") and module.partition(".")[0] == "gunicorn")
    first = [
        module.partition(".")[0]
        for node in tree.body
        for module in imported_by(ast.Module([node], []))
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    assert not FRAMEWORKS & {*first}


def test_every_file_has_its_floor() -> None:
    """No module of the service is left out of the order."""
    found = itertools.chain(*((PROJECT / folder).rglob("*.py") for folder in ("serving", "processes")))
    assert {path for path in found if path.name != "__init__.py"} <= {*SOURCES.values()}


LIMITS = {"app.py": 600, "gunicorn.conf.py": 80}


@pytest.mark.parametrize("path", SOURCES.values(), ids=lambda path: path.name)
def test_files_and_functions_are_short(path: Path) -> None:
    """A file has at most 500 lines, and a function 40."""
    text = path.read_text()
    assert len(text.splitlines()) <= LIMITS.get(path.name, 500)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, functions):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 40, f"{node.name} has {length} lines"


def test_configuration_only_assigns() -> None:
    """Gunicorn executes its configuration at each reload, so nothing in it may hold state."""
    tree = ast.parse((PROJECT / "gunicorn.conf.py").read_text())
    docstring, *statements = tree.body
    assert isinstance(docstring, ast.Expr)
    others = [
        ast.unparse(node) for node in statements if not isinstance(node, ast.Import | ast.ImportFrom | ast.Assign)
    ]
    assert others == ["early.handle_signals()"]
    values = [node.value for node in statements if isinstance(node, ast.Assign)]
    assert not [value for value in values if isinstance(value, ast.List | ast.Dict | ast.Set | ast.Lambda)]

"""Clients of others, in an environment of their own, ask all four combinations of framework and worker."""

import json
import os
import subprocess
from typing import Any

import pytest

from tests.lib.servers import COMBINATIONS, PROJECT, Server

PYTHON = PROJECT / ".venv-clients/bin/python"
MISSING = '{"type":"missing","loc":["body",0,"petal_width"],"msg":"Field required","input":null}'
TOLD: dict[str, dict[str, Any]] = {  # what each client returns
    "kserve": {
        "live": True,
        "ready": True,
        "lists": {"predictions": ["setosa", "setosa"]},
        "objects": {"predictions": ["setosa"]},
        "unknown_model": 404,
        "bad_row": 422,
    },
    "kserve_v2": {
        "live": True,
        "ready": True,
        "model_ready": True,
        "unknown_model_ready": False,
        "json": ["7", ["setosa", "virginica"], [2, 3]],
        "binary": ["7", ["setosa", "virginica"], [2, 3]],
        "three_columns": 400,
    },
    "mlflow": {
        "frame": {"0": ["setosa", "setosa"]},
        "array": ["setosa", "setosa"],
        "list": ["setosa"],
        "full": ["prediction", "probabilities"],
        "csv": {"predictions": ["setosa", "setosa"]},
    },
    "vetiver": {
        "frame": ["setosa", "setosa"],
        "series": ["setosa"],
        "dict": ["setosa"],
        "invocations": ["setosa", "setosa"],
        "bad_frame": f'{{"detail":[{MISSING},{MISSING.replace("0", "1", 1)}]}}',
    },
}


@pytest.mark.parametrize("client", TOLD)
def test_client_gets_predictions(servers: dict[tuple[str, str], Server], client: str) -> None:
    """A client as its library ships it predicts, and sees errors as such, whichever combination answers."""
    assert PYTHON.exists(), "run `make .venv-clients/clients`"
    urls = [f"http://127.0.0.1:{server.port}" for server in servers.values()]
    script = PROJECT / f"tests/outside/ask_by_{client}.py"
    quiet = os.environ | {"DO_NOT_TRACK": "1"}  # or MLflow's would tell its makers
    done = subprocess.run([PYTHON, script, *urls], env=quiet, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [TOLD[client]] * len(COMBINATIONS)

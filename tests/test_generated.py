"""A client that a public generator, `openapi-python-client`, makes from the document of a running service."""

import importlib
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeClassifier
from sklearn.tree import DecisionTreeRegressor

from serving.web.documentation import document_json_of
from serving.web.service import Service
from tests.lib.apps import make_service, make_settings
from tests.lib.artifacts import save, variables
from tests.lib.clients import ROW
from tests.lib.pipelines import ISLANDS, PENGUINS, fitted, rows_of
from tests.lib.servers import BIN, Server, Starter, gunicorn_environment
from tests.lib.sizes import each_worker

# Of several kinds of body that the generator knows it makes a module that fails to import, so it is to know JSON alone.
CONFIG = {"post_hooks": [], "content_type_overrides": {"application/octet-stream": "application/octets"}}
WARNING = re.compile(r"^WARNING parsing .*\n\n(.*)$", re.MULTILINE)


class Generated:
    """A client that was made from a document, as a package that is imported from a folder.

    Of the document nothing is left out but bodies of other types than JSON.
    """

    def __init__(self, folder: Path, name: str, *source: str) -> None:
        config = folder / "config.json"
        config.write_text(json.dumps(CONFIG))
        target = ["--output-path", str(folder / name), "--meta", "none", "--config", str(config)]
        command = [str(BIN / "openapi-python-client"), "generate", *source, *target]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert [reason for reason in WARNING.findall(said) if "Unsupported content" not in reason] == [], said
        assert "Unable to process" not in said
        self.name = name
        for file in (folder / name / "api").rglob("*.py"):
            self.module(".".join(file.relative_to(folder / name).with_suffix("").parts))

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.name}.{name}")

    def ask(self, operation: str, client: Any, **given: Any) -> Any:
        """Call an operation, and return its answer as an object of the client's own."""
        return self.module(f"api.default.{operation}").sync(client=client, **given)


def generate(server: Server, folder: Path, name: str) -> Generated:
    return Generated(folder, name, "--url", f"http://127.0.0.1:{server.port}/openapi.json")


def url_of(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which packages are imported."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@each_worker()
def test_generated_client_predicts(serve: Starter, folder: Path, combination: tuple[str, str]) -> None:
    """A row by query and by body, a batch, and what is wrong with a row, by objects with attributes."""
    server = serve(is_shipped=True, **gunicorn_environment(*combination))
    made = generate(server, folder, f"of_{combination[0]}")
    models = made.module("models")
    with made.module("client").Client(url_of(server)) as client:
        one = made.ask("predict_body", client, body=models.Features(**ROW))
        assert (one.prediction.value, one.to_dict()) == ("setosa", server.post(ROW).json)
        assert one.probabilities["setosa"] > 0.9
        rows = [ROW, {**ROW, "petal_length": 5.5, "petal_width": 2.1}]
        batch = made.ask("predict_body", client, body=[models.Features(**row) for row in rows])
        assert [answer.prediction.value for answer in batch] == ["setosa", "virginica"]
        assert made.ask("predict_query", client, **ROW).to_dict() == server.post(ROW).json
        problem = made.ask("predict_body", client, body=models.Features(**(ROW | {"petal_width": 1e300})))
        assert problem.detail[0].loc == ["body", "petal_width"]
        assert made.ask("ready", client).model == "iris"
        assert "/predictions" in made.ask("openapi", client)["paths"]
        assert "<title>iris</title>" in made.ask("api_page", client)


@each_worker()
def test_generated_client_has_strings_and_missing_values(
    serve: Starter, folder: Path, combination: tuple[str, str]
) -> None:
    """A pipeline's choices are enumerations, and what may be missing is None, or is left out."""
    model = variables(save(fitted("boosting")[0], folder / "model.joblib"))
    keys = {"SERVING_AUTH__API_KEYS": '["one"]', "SERVING_AUTH__OPEN_DOCS": "true", "SERVING_FEATURES": "{}"}
    server = serve(**gunicorn_environment(*combination), **model, **keys)
    made = generate(server, folder, f"of_penguins_{combination[0]}")
    models, client_module = made.module("models"), made.module("client")
    islands, rows = models.FeaturesIslandType0, rows_of(PENGUINS)[:5]
    assert [island.value for island in islands] == ISLANDS
    assert None in rows[3].values()
    with client_module.AuthenticatedClient(url_of(server), token="one") as client:
        batch = made.ask("predict_body", client, body=[models.Features.from_dict(row) for row in rows])
        assert [answer.to_dict() for answer in batch] == server.post(rows, X_API_Key="one").json
        few = made.ask("predict_body", client, body=models.Features(island=islands.BISCOE, sex=None))
        assert few.to_dict() == server.post({"island": "Biscoe"}, X_API_Key="one").json
        asked = made.ask("predict_query", client, island=made.module("models").PredictQueryIslandType0.BISCOE)
        assert asked == few
    with client_module.Client(url_of(server)) as client:
        refused = made.ask("predict_body", client, body=models.Features())
        assert refused.detail.startswith("no valid API key")


X = np.random.default_rng(0).random((60, 3))
THIRDS = (X[:, 0] * 3).astype(int)


def classify(labels: list[Any]) -> Any:
    return LogisticRegression().fit(X, np.array(labels)[THIRDS % len(labels)])


def regress(*names: str) -> Any:
    return LinearRegression().fit(pd.DataFrame(X, columns=names), X[:, 0])


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {  # estimators, and the settings of their features
    "classes-of-symbols": (classify(["<=50K", ">50K", "=50K"]), {}),
    "integers": (classify([-1, 0, 1]), {}),
    "booleans": (classify([False, True]), {}),
    "floats": (classify([1.0, 2.0]), {}),
    "decision": (RidgeClassifier().fit(X, np.array(["a", "b", "ö"])[THIRDS]), {}),
    "names": (regress("class", "Of Two Words", "1st (x)"), {}),
    "names-of-the-client": (regress("client", "body", "self"), {}),
    "booleans-as-numbers": (DecisionTreeRegressor().fit(X, X[:, 0]), {"x0": {"type": "bool", "missing": True}}),
    "whole-choices": (regress("a", "b", "c"), {"a": {"choices": [1.0, 2.0]}, "b": {"type": "int", "choices": [1, 2]}}),
    "other-choices": (regress("a", "b", "c"), {"a": {"choices": [0.5, 1.5]}}),
    "several-outputs": (fitted("several-outputs")[0], {}),
    "numbers": (fitted("log-target")[0], {}),
    "categories": (fitted("native-categories")[0], {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_client_is_generated_for_each_kind_of_model(folder: Path, name: str) -> None:
    """Nothing of the document is left out, and the example of a row and its answer pass through the client as is."""
    estimator, features = MODELS[name]
    service: Service[Any] = make_service(make_settings(features=features), estimator)
    (folder / "openapi.json").write_bytes(document_json_of(service))
    made = Generated(folder, f"of_{name.replace('-', '_')}", "--path", str(folder / "openapi.json"))
    row, answer = service.model.contract.example, service.model.answer_example()
    sent = made.module("models").Features.from_dict(dict(row))
    assert made.module("api.default.predict_body")._get_kwargs(body=[sent])["json"] == [row]
    told = made.module("models").Prediction.from_dict(answer)
    assert told.to_dict() == answer

"""The cases from the field, each under both frameworks."""

import json
from pathlib import Path
from typing import Any

import pytest

import app
from serving.errors import StartupError
from tests.lib.apps import call, make_settings
from tests.lib.artifacts import save
from tests.lib.cases import Case
from tests.lib.clients import post_case
from tests.lib.field import MODELS, ModelCase


def build(case: ModelCase, folder: Path, framework: str) -> Any:
    tables = {name: dict(table) for name, table in case.settings.items()}
    model = save(case.make(), folder / f"model{case.suffix}") | tables.pop("model", {})
    return app.create_app(make_settings(framework=framework, model=model, **({"features": {}} | tables)))


@pytest.mark.in_turn
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_model_from_the_field(tmp_path: Path, framework: str, case: ModelCase) -> None:
    """A model is served as its owner expects, or refused in words that lead on."""
    if case.refused:
        with pytest.raises(StartupError) as error:
            build(case, tmp_path, framework)
        assert case.refused in str(error.value)
        return
    is_query = isinstance(case.asked, str)
    request = Case(case.id, "GET", f"/predictions?{case.asked}") if is_query else post_case(case.asked)
    answer = call(build(case, tmp_path, framework), request)
    if isinstance(case.expected, tuple):
        assert answer.status == case.expected[0]
        assert case.expected[1] in answer.body.decode()
    else:
        assert answer.status == 200, answer.body
        answers = json.loads(answer.body)
        rows = answers if isinstance(answers, list) else [answers]
        predictions = [row["prediction"] for row in rows]
        assert (predictions if isinstance(case.asked, list) else predictions[0]) == case.expected

"""Golden rows: what an artifact answered when it was made, and when two answers are the same."""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import sklearn.utils
import structlog
from pydantic import Field, ValidationError, model_validator

from serving.errors import ModelError
from serving.predictor.artifact import read_regular
from serving.settings import SettingsTable, should

log = structlog.get_logger()


class Golden(SettingsTable):
    """Rows that the artifact answered when it was made, what it answered, and with which versions."""

    versions: dict[str, str]
    rows: Annotated[list[dict[str, Any]], Field(min_length=1)]
    predictions: list[dict[str, Any]]

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if len(self.rows) != len(self.predictions):
            raise ValueError("a golden file should have as many predictions as rows")
        return self


def golden_path(artifact: Path) -> Path:
    return artifact.with_suffix(".golden.json")


def running_versions() -> dict[str, str]:
    """Return the versions of numpy and scikit-learn, on which an artifact's answers depend, and of Python."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"python": python, "numpy": np.__version__, "scikit-learn": sklearn.__version__}


def load_golden(artifact: Path, is_strict: bool = False) -> Golden | None:
    """Read the golden rows beside the artifact, if there are any. Raises `ModelError`.

    Those of another numpy or scikit-learn are a warning, or where they must be the same, an error.
    """
    path = golden_path(artifact)
    if not os.path.lexists(path):
        if is_strict:
            raise ModelError(
                f"has no {path.name} beside it, and so no versions to compare, but model.strict_versions is true"
            )
        return None
    if not path.is_file():
        raise ModelError(f"has {path.name} beside it, which is no file, or a link to none")
    try:
        golden = Golden.model_validate_json(read_regular(path))
    except OSError as error:
        raise ModelError(f"has {path.name} beside it, which cannot be read: {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        what = f"in which {where}" if where else "which"
        raise ModelError(f"has {path.name} beside it, {what} should {should(problem)}") from None
    running = running_versions()
    if golden.versions | {"python": running["python"]} != running:
        if is_strict:
            both = f"{golden.versions}, but {running} run here"
            raise ModelError(f"was made with {both}, and model.strict_versions is true")
        log.warning("versions_differ", golden=golden.versions, running=running)
    return golden


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The difference that two floats may have: a part of the expected one, or of the scale of those around."""

    rtol: float  # of the expected value
    atol: float  # of the scale


TOLERANCE_OF_LIBRARIES = Tolerance(1e-6, 1e-9)
TOLERANCE_OF_FLOAT32 = Tolerance(1e-5, 1e-5)  # in which ONNX computes some probabilities


def is_close(answer: Any, golden: Any, scale: Any = 1.0, tolerance: Tolerance = TOLERANCE_OF_LIBRARIES) -> bool:
    """Whether two answers in JSON are the same, floats up to the rounding of another processor or library.

    `scale` is the size by which the absolute tolerance is measured: one for all floats, or as `sizes_of` returns it.
    """
    if isinstance(answer, dict) and isinstance(golden, dict):
        scales = scale if isinstance(scale, dict) else dict.fromkeys(golden, scale)
        return answer.keys() == golden.keys() and all(
            is_close(answer[key], golden[key], scales[key], tolerance) for key in golden
        )
    if isinstance(answer, list) and isinstance(golden, list):
        columns = scale if isinstance(scale, list) else [scale] * len(golden)
        return len(answer) == len(golden) and all(
            itertools.starmap(is_close, zip(answer, golden, columns, [tolerance] * len(golden), strict=False))
        )
    if isinstance(answer, float) and isinstance(golden, float | int) and not isinstance(golden, bool):
        golden = max(min(golden, sys.float_info.max), -sys.float_info.max)  # an integer may be larger
        size = scale if isinstance(scale, float) else 0.0  # other golden answers are no numbers there
        return math.isclose(answer, golden, rel_tol=tolerance.rtol, abs_tol=tolerance.atol * size)
    return bool(answer == golden) and isinstance(answer, bool) == isinstance(golden, bool)


def rename(answer: Any, names: Mapping[str, str]) -> Any:
    """Return an answer with other names of outputs."""
    return {names.get(key, key): value for key, value in answer.items()} if isinstance(answer, dict) else answer


def sizes_of(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the size of the largest float at each place of answers, nested as they are: outputs differ in size.

    It is of all answers, for one alone may have a number near 0. That of probabilities is 1, which they add up to.
    """
    sizes: dict[str, Any] = _sizes_of(answers)
    return sizes | {"probabilities": 1.0}


def _sizes_of(values: Sequence[Any]) -> Any:
    tables = [value for value in values if isinstance(value, dict)]
    if tables:
        keys = dict.fromkeys(itertools.chain(*tables))
        return {key: _sizes_of([table[key] for table in tables if key in table]) for key in keys}
    lists = [value for value in values if isinstance(value, list)]
    if lists:
        return [*map(_sizes_of, itertools.zip_longest(*lists))]
    return max((abs(value) for value in values if isinstance(value, float)), default=0.0)

"""Golden rows: what an artifact answered when it was made, and when two answers are the same."""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
from collections.abc import Mapping
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


def is_close(answer: Any, golden: Any, scale: float = 1.0, tolerance: Tolerance = TOLERANCE_OF_LIBRARIES) -> bool:
    """Whether two answers in JSON are the same, floats up to the rounding of another processor or library.

    `scale` is the size of the numbers around, by which the absolute tolerance is measured.
    """
    same = functools.partial(is_close, scale=scale, tolerance=tolerance)
    if isinstance(answer, dict) and isinstance(golden, dict):
        return answer.keys() == golden.keys() and all(same(answer[key], golden[key]) for key in golden)
    if isinstance(answer, list) and isinstance(golden, list):
        return len(answer) == len(golden) and all(itertools.starmap(same, zip(answer, golden, strict=True)))
    if isinstance(answer, float) and isinstance(golden, float | int) and not isinstance(golden, bool):
        golden = max(min(golden, sys.float_info.max), -sys.float_info.max)  # an integer may be larger
        return math.isclose(answer, golden, rel_tol=tolerance.rtol, abs_tol=tolerance.atol * scale)
    return bool(answer == golden) and isinstance(answer, bool) == isinstance(golden, bool)


def rename(answer: Any, names: Mapping[str, str]) -> Any:
    """Return an answer with other names of outputs."""
    return {names.get(key, key): value for key, value in answer.items()} if isinstance(answer, dict) else answer


def largest(answer: Any) -> float:
    """Return the largest float in an answer, or 0."""
    inner = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, list) else ()
    return abs(answer) if isinstance(answer, float) else max(map(largest, inner), default=0.0)

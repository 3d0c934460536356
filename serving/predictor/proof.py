"""What a model turns out to be when it predicts: whether it reproduces its golden rows, and what a call costs."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from serving.errors import EstimatorError, ModelError, reason_of, shorten
from serving.predictor.calls import measure
from serving.predictor.contract import Rows
from serving.predictor.golden import (
    TOLERANCE_OF_FLOAT32,
    TOLERANCE_OF_LIBRARIES,
    Golden,
    Tolerance,
    is_close,
    largest,
    rename,
)
from serving.predictor.model import Model
from serving.predictor.predictor import GraphFile
from serving.predictor.samples import MAX_COMPARED, make_up_rows
from serving.settings import toml_key, toml_value

log = structlog.get_logger()
MAX_COMPARING_S = 1.0


@dataclass(frozen=True)
class Proof:
    """What a model turned out to be when it predicted: plain values, which a child process can send."""

    graph: int | None = None  # the position of the converted graph that answers as the estimator does
    score: str | None = None  # what the scores of a graph are that came as a file
    takes_one: bool = False  # such a graph answers one row at a time
    call_s: float = 0.0  # seconds that a call takes
    row_s: float = 0.0  # seconds that each row of a call takes
    never_batched: str | None = None  # why the rows of several requests cannot share a call

    def applied_to(self, model: Model) -> Model:
        """Return the model that answers as it was proven."""
        predictor = model.predictor
        if self.graph is not None:
            predictor = model.graphs[self.graph]
        elif isinstance(predictor.estimator, GraphFile):
            make = functools.partial(predictor.estimator.open, takes_one=self.takes_one)
            predictor = predictor.with_graph(make, self.score)
        return replace(model, predictor=predictor, graphs=())


def prove(model: Model) -> Proof:
    """Make a model reproduce its golden rows, and answer its example, without each value that may be missing.

    It is not part of loading: predicting may start threads, which a process that forks later must not have. Raises
    `ModelError`.
    """
    what = "its golden rows" if model.golden else "its example row"
    proof = _prove_graph(model, what) if model.graphs else prove_scores(model, model.known_rows, what)
    model = proof.applied_to(model)
    if model.golden is not None:
        _reproduce(model, model.golden)
    model.answer_example()
    _try_missing(model, model.contract.nullable)
    model.report("timing its answers")
    try:
        call_s, row_s = measure(lambda rows: model.predict_rows(rows).render(), model.known_rows[0])
        reason = find_dependence(model)
    except Exception as error:  # what an estimator raises has no bounds
        call_s, row_s, reason = 0.0, 0.0, f"rows that are answered alone fail together: {shorten(reason_of(error))}"
    if reason is not None:
        log.warning("never_batched", reason=reason)
    return replace(proof, call_s=call_s, row_s=row_s, never_batched=reason)


def _prove_graph(model: Model, what: str) -> Proof:
    """Find the first graph that answers as the estimator does. Raises `ModelError`."""
    model.answer(model.known_rows, what)
    model.report("comparing it with ONNX Runtime")
    from serving.predictor.onnx_runtime import choose_graph

    return Proof(graph=choose_graph(model.graphs, model.predictor, model.arrays, model.known_rows))


def prove_scores(model: Model, rows: Rows, what: str) -> Proof:
    """Find what the scores are of a graph that came as a file, by its answers to rows; of an estimator it is known.

    Raises `ModelError`.
    """
    estimator = model.predictor.estimator
    if not isinstance(estimator, GraphFile):
        return Proof()
    model.answer(rows, what)
    score, takes_one = estimator.judge(model.predictor, model.arrays, rows)
    return Proof(score=score, takes_one=takes_one)


def _reproduce(model: Model, golden: Golden) -> None:
    """Compare by the names that the estimator has by itself: the settings may have given it others since."""
    outputs = {f"y{output}": name for output, name in enumerate(model.predictor.outputs)}
    answers = model.answer(model.known_rows, f"the rows of {model.golden_file}")
    scale = largest(golden.predictions)
    for index, (answer, prediction) in enumerate(zip(answers, golden.predictions, strict=True)):
        expected = {key: rename(value, outputs) for key, value in prediction.items()} if outputs else prediction
        if not is_close(answer, expected, scale, _tolerance_of(model)):
            wanted = f"as {model.golden_file} has it"
            raise ModelError(f"answers row {index} with {toml_value(answer)}, not {toml_value(expected)} {wanted}")


def _tolerance_of(model: Model) -> Tolerance:
    return TOLERANCE_OF_LIBRARIES if model.predictor.graph is None else TOLERANCE_OF_FLOAT32


def _try_missing(model: Model, names: Sequence[str]) -> None:
    """Make a model answer its example without some values: each alone if they are few, else in a few groups, of which
    one that fails is tried in parts, down to a value alone. So it takes a few rows, however many values there are.

    Raises `EstimatorError`, which names the value.
    """
    length = max(1, math.ceil(len(names) / MAX_COMPARED))
    groups = [names[start : start + length] for start in range(0, len(names), length)]
    rows = [model.contract.example | dict.fromkeys(group) for group in groups]
    with contextlib.suppress(EstimatorError):
        model.answer(rows, "missing values")
        return
    for group, row in zip(groups, rows, strict=True):
        hint = f"set {'.'.join(map(toml_key, ('features', group[0])))}.missing = false"
        try:
            model.answer([row], f"a missing {group[0]!r}; {hint}")
        except EstimatorError:
            if len(group) == 1:
                raise
            _try_missing(model, group)


def find_dependence(model: Model) -> str | None:
    """Return why rows of several requests cannot share a call, by asking rows alone and together; None if they can."""
    rows = model.known_rows[:MAX_COMPARED]
    rows += make_up_rows(rows, model.contract, MAX_COMPARED - len(rows))
    alone: list[tuple[dict[str, Any], Any]] = []
    end = time.monotonic() + MAX_COMPARING_S
    with warnings.catch_warnings(action="ignore"):  # a made-up row may well be worth one
        for row in rows:
            with contextlib.suppress(EstimatorError):  # as well as fail
                alone.append((row, model.answer([row], "a row")[0]))
            if len(alone) > 1 and time.monotonic() > end:
                break
        together = model.answer([row for row, _ in alone], "rows")
    answers = [answer for _, answer in alone]
    if len(alone) < 2:
        return "too few rows have an answer to be compared; give golden rows, or examples in [features]"
    is_same = is_close(together, answers, largest(answers), _tolerance_of(model))
    return None if is_same else "the answer to a row depends on the other rows of the call"

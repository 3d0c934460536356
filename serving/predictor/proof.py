"""What a model turns out to be when it predicts: whether it reproduces its golden rows, and what a call costs."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from serving.errors import EstimatorError, ModelError, reason_of, shorten
from serving.predictor.calls import measure
from serving.predictor.contract import Rows
from serving.predictor.failures import tell
from serving.predictor.golden import (
    TOLERANCE_OF_FLOAT32,
    TOLERANCE_OF_LIBRARIES,
    Golden,
    Tolerance,
    is_close,
    rename,
    sizes_of,
)
from serving.predictor.model import Model
from serving.predictor.predictor import GraphFile
from serving.predictor.samples import MAX_COMPARED, make_up_rows
from serving.settings import toml_key, toml_value

log = structlog.get_logger()
MAX_COMPARING_S = 1.0
NAMES_DIFFER = "X (does not have valid|has) feature names"  # the beginning of scikit-learn's warnings


@dataclass(frozen=True)
class Proof:
    """What a model turned out to be when it predicted: plain values, which a child process can send."""

    way: int = 0  # the position among the model's ways of the one in which the estimator takes rows
    graph: int | None = None  # the position of the converted graph that answers as the estimator does
    score: str | None = None  # what the scores of a graph are that came as a file
    takes_one: bool = False  # such a graph answers one row at a time
    call_s: float = 0.0  # seconds that a call takes
    row_s: float = 0.0  # seconds that each row of a call takes
    never_batched: str | None = None  # why the rows of several requests cannot share a call

    def applied_to(self, model: Model) -> Model:
        """Return the model that answers as it was proven."""
        model = model.asked(self.way)
        predictor = model.predictor
        if self.graph is not None:
            predictor = model.graphs[self.graph]
        elif isinstance(predictor.estimator, GraphFile):
            make = functools.partial(predictor.estimator.open, takes_one=self.takes_one)
            predictor = predictor.with_graph(make, self.score)
        is_same = predictor is model.predictor and not model.graphs
        return model if is_same else replace(model, predictor=predictor, graphs=())


def prove(model: Model) -> Proof:
    """Make a model reproduce its golden rows, and answer its example, without each value that may be missing.

    It is not part of loading: predicting may start threads, which a process that forks later must not have. Raises
    `ModelError`.
    """
    proof = prove_answers(model, model.known_rows, lambda asked: asked.known_answers)
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


def prove_answers(model: Model, rows: Rows, answer: Callable[[Model], Any]) -> Proof:
    """Find how a model answers rows: in which way it is asked, by which graph, and what its scores are.

    `answer` has a model answer the rows. What the scores are of a graph that came as a file is found by its answers; of
    an estimator it is known. Raises `ModelError`.
    """
    proof = Proof(way=find_way(model, answer))
    estimator = model.predictor.estimator
    if model.graphs:
        model.report("comparing it with ONNX Runtime")
        from serving.predictor.onnx_runtime import choose_graph

        model = model.asked(proof.way)
        return replace(proof, graph=choose_graph(model.graphs, model.predictor, model.arrays, rows))
    if not isinstance(estimator, GraphFile):
        return proof
    score, takes_one = estimator.judge(model.predictor, model.arrays, rows)
    return replace(proof, score=score, takes_one=takes_one)


def find_way(model: Model, answer: Callable[[Model], Any]) -> int:
    """Return the position of the first way of asking a model in which it answers, if possible without a warning that
    names are not as they were fitted. Raises `ModelError`, which says how it fails in each form."""
    if len(model.ways) == 1:
        answer(model)
        return 0
    errors: dict[str, ModelError] = {}
    warned: list[int] = []
    for position, way in enumerate(model.ways):
        try:
            with warnings.catch_warnings():
                if position:  # which nobody has asked for
                    warnings.simplefilter("ignore")
                warnings.filterwarnings("error", NAMES_DIFFER)
                answer(model.asked(position))
            return position
        except ModelError as error:  # also where it gives another number of answers
            errors.setdefault(str(way), error)
            warned += [position] if isinstance(error.__cause__, Warning) else []
    if warned:
        return warned[0]
    first = next(iter(errors.values()))
    problem = str(first)
    for name, failure in errors.items():
        told = tell(failure.__cause__) if failure.__cause__ else str(failure)
        problem += "" if told in problem else f"; given {name} instead: {told}"
    raise type(first)(problem) from first.__cause__


def _reproduce(model: Model, golden: Golden) -> None:
    """Compare by the names that the estimator has by itself: the settings may have given it others since."""
    outputs = {f"y{output}": name for output, name in enumerate(model.predictor.outputs)}
    predictions = [
        {key: rename(value, outputs) for key, value in prediction.items()} if outputs else prediction
        for prediction in golden.predictions
    ]
    scale = sizes_of([*predictions, *_answers_around(model)])
    for index, (answer, expected) in enumerate(zip(model.known_answers, predictions, strict=True)):
        if not is_close(answer, expected, scale, _tolerance_of(model)):
            wanted = f"as {model.golden_file} has it"
            raise ModelError(f"answers row {index} with {toml_value(answer)}, not {toml_value(expected)} {wanted}")


def _answers_around(model: Model) -> list[dict[str, Any]]:
    """Return a graph's answers to rows around the known ones, which alone may have numbers near 0."""
    if model.predictor.graph is None:
        return []
    with contextlib.suppress(EstimatorError), warnings.catch_warnings(action="ignore"):  # they are made up
        return model.answer(make_up_rows(model.known_rows, model.contract, MAX_COMPARED), "rows")
    return []


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
    is_same = is_close(together, answers, [sizes_of(answers)] * len(answers), _tolerance_of(model))
    return None if is_same else "the answer to a row depends on the other rows of the call"

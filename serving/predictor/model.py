"""A loaded model: contract, arrays, predictor and golden rows together. Loading predicts nothing."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from serving.errors import EstimatorError, ModelError, listed
from serving.predictor.arrays import Arrays, Words, is_installed, list_forms, list_words
from serving.predictor.artifact import ModelSettings, load_artifact
from serving.predictor.contract import Contract, Rows
from serving.predictor.failures import is_fault_of_code, tell
from serving.predictor.features import FeatureSettings
from serving.predictor.golden import Golden, golden_path, load_golden, running_versions
from serving.predictor.inputs import Form, find_parts, read_inputs
from serving.predictor.modules import find_misfit
from serving.predictor.predictions import Predictions
from serving.predictor.predictor import Predictor, limit_threads, prepare

log = structlog.get_logger()
Report = Callable[[str], None]  # told what is done now and may take long

_n_forks = 0  # by which this process came from the first one


def _count_fork() -> None:
    global _n_forks
    _n_forks += 1


os.register_at_fork(after_in_child=_count_fork)


@dataclass(frozen=True)
class Way:
    """How an estimator is asked, where only trying can tell."""

    form: Form
    words: Words  # the type of a DataFrame's columns of texts
    output: str = "default"  # what transformers hand on: arrays, or else DataFrames of "pandas" or "polars"

    def __str__(self) -> str:
        """Return what the message about a failure calls it."""
        return {"frame": "a DataFrame", "array": "an array", "texts": "a list of texts"}[self.form]


@dataclass(frozen=True)
class Model:
    """A loaded predictor with the contract of its rows, and the golden rows that it must reproduce.

    `graphs` are predictors that answer by a converted graph, of which a proof chooses one. `report` is told what is
    done now and may take long. `n_threads` are those of OpenMP and BLAS in a call.
    """

    path: Path
    arrays: Arrays
    predictor: Predictor
    golden: Golden | None = None
    sha256: str = ""  # of the artifact
    n_threads: int = 1
    graphs: Sequence[Predictor] = ()
    report: Report = lambda doing: None

    @property
    def contract(self) -> Contract:
        """The types of a row."""
        return self.arrays.contract

    @functools.cached_property
    def ways(self) -> list[Way]:
        """The ways in which the estimator may have to be asked, the likeliest first, which is how it is asked."""
        forms = list_forms(self.contract)
        words: list[Words] = list_words(self.contract) if "frame" in forms else ["object"]
        outputs = ["default"]
        if any(hasattr(part, "set_output") for part in find_parts(self.predictor.estimator)):
            outputs += [name for name in ("pandas", "polars") if is_installed(name)]
        every = itertools.product(outputs, words, forms)
        ways = (Way(form, word if form == "frame" else "object", output) for output, word, form in every)
        return [*dict.fromkeys(ways)]

    def asked(self, way: int) -> Model:
        """Return the model that is asked in one of the ways."""
        if way == 0:
            return self
        form, words, output = dataclasses.astuple(self.ways[way])
        predictor = self.predictor if output == "default" else self.predictor.with_output(output)
        return replace(self, arrays=Arrays(self.contract, form, words), predictor=predictor)

    def predict(self, X: Any) -> Predictions:
        """Return the answers to X, as `arrays` makes it. Raises what the estimator raises.

        A process that the estimator forks, and that comes back here, ends: it would answer a second time.
        """
        limit_threads(self.n_threads)
        n_forks = _n_forks
        try:
            return self.predictor.predict(X)
        finally:
            if _n_forks != n_forks:
                os._exit(0)

    def predict_rows(self, rows: Rows) -> Predictions:
        """Return the answers to checked rows. Raises what the estimator raises."""
        return self.predict(self.arrays.of_rows(rows))

    def answer(self, rows: Rows, what: str, hint: str = "") -> list[dict[str, Any]]:
        """Return the answers to rows that are no request's.

        Raises `EstimatorError`, which says on `what` it fails, with a hint where that may be the fault of the rows.
        """
        self.report(f"answering {what.partition(',')[0]}")
        try:
            return [json.loads(answer) for answer in self.predict_rows(rows).render()] if rows else []
        except ModelError:
            raise
        except Exception as error:  # what an estimator raises has no bounds
            if is_fault_of_code(error, rows):
                texts = self._texts if "categor" in str(error) else ""
                problem = f"has code that fails on {what}: {tell(error)}{self._misfit}{self._guesses}{texts}"
                raise EstimatorError(problem) from error
            raise EstimatorError(f"fails on {what}{hint}: {tell(error)}{self._misfit}") from error

    @functools.cached_property
    def _misfit(self) -> str:
        return find_misfit(self.path)

    @functools.cached_property
    def _guesses(self) -> str:
        """The features that are taken for numbers because nothing says what they are, for a message."""
        columns, untyped = self.contract.columns, self.contract.untyped
        features = [(name, feature) for name, feature in self.contract.features.items() if name in untyped]
        numbers = [name for name, feature in features if (feature.type, feature.example) == ("float", None)]
        guesses = [name for name in numbers if (column := columns[name]) and column.type is None]
        what, are = ("numbers", "are") if guesses[1:] else ("a number", "is")
        return f"; {listed(guesses)} {are} taken for {what}, and other types go into [features]" if guesses else ""

    @functools.cached_property
    def _texts(self) -> str:
        """The texts that might be categories to code of the user's, for a message."""
        features = self.contract.features
        texts = [name for name, feature in features.items() if (feature.type, feature.choices) == ("str", None)]
        what, are = ("texts", "are") if texts[1:] else ("a text", "is")
        return f"; {listed(texts)} {are} {what}: with choices in [features], categories" if texts else ""

    def without_hints(self, problem: str) -> str:
        """Return a message of `answer` without what it says of rows and types, which are not to blame."""
        for hint in (self._example_hint, self._guesses, self._texts):
            problem = problem.replace(hint, "")
        return problem

    @functools.cached_property
    def known_rows(self) -> Rows:
        """The golden rows, checked as a request's, or without them the contract's example.

        Rows that only the settings refuse are taken as they are. Raises `ModelError` for others that do not fit.
        """
        if self.golden is None:
            return [self.contract.example]
        rows = [self._rename(row, index) for index, row in enumerate(self.golden.rows)]
        checked = self.contract.check(rows)
        if checked is not None:
            return checked
        ordered = {name: rows[0][name] for name in self.contract.names}
        widest = Contract(self.contract.inputs, _without_limits(self.contract), ordered)
        for problem in widest.find_problems(rows):
            index, *names = problem["loc"][1:]
            where = f"row {index} does not fit: {listed(names)}: {problem['msg']}"
            raise ModelError(f"has {self.golden_file} beside it, of which {where}")
        return rows

    @property
    def golden_file(self) -> str:
        """The name of the file of golden rows."""
        return golden_path(self.path).name

    def _rename(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        names = self.contract.names
        whole = dict.fromkeys(self.contract.nullable) | row
        if whole.keys() == set(names):
            return whole
        if self.contract.inputs.names is None and len(row) == len(names):
            return dict(zip(names, row.values(), strict=True))
        problem = f"has {self.golden_file} beside it, of which row {index} has the features {listed([*row])}"
        raise ModelError(f"{problem}; it should have {listed(names)}")

    @functools.cached_property
    def known_answers(self) -> list[dict[str, Any]]:
        """The answers to the known rows. Raises `EstimatorError`."""
        if self.golden is None:
            return [self.answer_example()]
        return self.answer(self.known_rows, f"the rows of {self.golden_file}")

    def answer_example(self) -> dict[str, Any]:
        """Return the answer to the contract's example, which is predicted once. Raises `EstimatorError`."""
        return self._example_answer

    @functools.cached_property
    def _example_answer(self) -> dict[str, Any]:
        return self.answer([self.contract.example], "its example row", self._example_hint)[0]

    @property
    def _example_hint(self) -> str:
        made_up = [name for name, feature in self.contract.features.items() if feature.example is None]
        are = "are" if made_up[1:] else "is"
        cure = "give examples in [features], or golden rows"
        return f", of which {listed(made_up)} {are} made up; {cure}" if made_up else ""

    def note_python(self) -> None:
        """Log whether the golden rows are of another Python. Answers do not depend on it, so it is no warning."""
        golden, running = self.golden and self.golden.versions.get("python"), running_versions()["python"]
        if golden not in (None, running):
            log.info("python_differs", golden=golden, running=running)

    def warm_up(self) -> None:
        """Answer the known rows, and the example of the API's description, before the first request does."""
        self.answer(self.known_rows, "its known rows")
        self.answer_example()


def _without_limits(contract: Contract) -> dict[str, FeatureSettings]:
    """Return features without what the settings may have narrowed: bounds, choices, and whole numbers."""
    features: dict[str, FeatureSettings] = {}
    for name, feature in contract.features.items():
        column = contract.columns[name]
        said = column.type if column else None
        kind = "float" if feature.type == "int" else feature.type
        missing = feature.missing or bool(column and column.missing)
        features[name] = FeatureSettings(type=None if said else kind, missing=missing)
    return features


def load_model(
    settings: ModelSettings,
    features: Mapping[str, FeatureSettings],
    folder: Path,
    n_threads: int = 1,
    report: Report = lambda doing: None,
) -> Model:
    """Load an artifact, whose path is relative to a folder, and its golden rows, without predicting.

    Raises `ModelError`, and `MisfitError` where features do not fit it.
    """
    report("loading it")
    path = folder / settings.path
    estimator, sha256 = load_artifact(settings, path, folder)
    model = make_model(estimator, path, features, load_golden(path, settings.strict_versions), settings.outputs)
    graphs: Sequence[Predictor] = ()
    if settings.runtime == "onnx" and model.predictor.graph is None:
        from serving.predictor.onnx_convert import convert_to_onnx

        report("converting it to ONNX")
        graphs = convert_to_onnx(model.predictor, model.arrays)
    return replace(model, sha256=sha256, n_threads=n_threads, graphs=graphs, report=report)


def make_model(
    estimator: Any,
    path: Path,
    features: Mapping[str, FeatureSettings],
    golden: Golden | None = None,
    outputs: Sequence[str] = (),
) -> Model:
    """Return the model of an estimator that was loaded from `path`. Raises `ModelError`, `MisfitError`."""
    row = golden.rows[0] if golden else {}
    contract = Contract(read_inputs(estimator, [*features, *row]), features, row)
    arrays = Arrays(contract)
    return Model(path, arrays, prepare(estimator, arrays, outputs), golden)

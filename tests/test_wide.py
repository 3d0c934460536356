"""Models of thousands of features: time and rows asked grow as their number does, not as its square."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic_core import to_json
from sklearn.feature_selection import SelectKBest
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import app
from serving.errors import ModelError, Unprocessable
from serving.predictor.arrays import Arrays
from serving.predictor.bodies import MAX_CELLS, MIN_PART_BYTES, LongBody, is_long, parse_json
from serving.predictor.calls import MANY_ROWS
from serving.predictor.contract import Contract
from serving.predictor.model import Model, make_model
from serving.predictor.proof import Proof, prove
from serving.web import openapi
from serving.web.envelopes import SHORT_BYTES, Envelope
from tests.lib.apps import make_settings

FEW, MANY = 1000, 4000


class NotingImputer(SimpleImputer):  # type: ignore[misc]
    """Notes the rows of each call, and fails where the values of some columns are missing together."""

    calls: list[int]
    fails_on: tuple[int, ...] = ()

    def transform(self, X: Any) -> Any:
        self.calls.append(len(X))
        if self.fails_on and np.isnan(X[:, self.fails_on]).all(axis=1).any():
            raise ArithmeticError("as it was told to")
        return super().transform(X)


def wide_model(n_features: int, fails_on: tuple[int, ...] = ()) -> Model:
    X, y = np.random.default_rng(0).normal(size=(60, n_features)), [0, 1] * 30
    imputer = NotingImputer()
    imputer.calls, imputer.fails_on = [], ()
    estimator = make_pipeline(imputer, SelectKBest(k=5), LogisticRegression()).fit(X, y)
    imputer.calls.clear()
    imputer.fails_on = fails_on
    return make_model(estimator, Path("model.joblib"), {})


def refuse(model: Model, payload: Any) -> None:
    with pytest.raises(Unprocessable):
        model.contract.parse_payload(payload)


def row_of(n_features: int) -> dict[str, Any]:
    return {f"x{column}": 0.5 for column in range(n_features)}


def load(n_features: int) -> Callable[[], Any]:
    estimator = wide_model(n_features).predictor.estimator
    return lambda: make_model(estimator, Path("model.joblib"), {})


def describe(n_features: int) -> Callable[[], Any]:
    model = wide_model(n_features)
    model.answer_example()
    return lambda: openapi.describe_api(app.make_service(make_settings(features={}), model, Proof()))


def answer(n_features: int) -> Callable[[], Any]:
    model, row = wide_model(n_features), row_of(n_features)
    rows = [row, row | {"x3": None}, {}]
    return lambda: model.predict_rows(model.contract.parse_payload(rows)).render()


def refuse_all(n_features: int) -> Callable[[], Any]:
    model = wide_model(n_features)
    names = row_of(n_features)
    payloads = [dict.fromkeys(names, "a"), {f"a{name}": 1 for name in [*names][:900]}, names | {"x": 1}]
    return lambda: [refuse(model, payload) for payload in payloads]


def prove_it(n_features: int) -> Callable[[], Any]:
    return functools.partial(prove, wide_model(n_features))


@pytest.mark.parametrize("step", [load, prove_it, describe, answer, refuse_all])
def test_four_times_the_features_cost_four_times_as_much(step: Callable[[int], Callable[[], Any]]) -> None:
    """Loading, proving, describing, answering and refusing take time in proportion to the number of features."""
    few_s, many_s = (least_s(step(n_features)) for n_features in (FEW, MANY))
    assert many_s < 8 * few_s


def test_settings_of_many_features_are_read_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of 4000 features, as `model.describe` prints it, takes four times as long as one of 1000."""

    def read(file: Path) -> None:
        settings = app.load_settings(file)
        app.print_settings(settings)
        assert settings.source("features", "x9", "example") == file.name

    times: list[float] = []
    for n_features in (FEW, MANY):
        file = tmp_path / f"{n_features}.toml"
        lines = [f'{name} = {{ type = "float", example = 0.5 }}\n' for name in row_of(n_features)]
        file.write_text("[features]\n" + "".join(lines))
        times.append(least_s(functools.partial(read, file)))
    assert times[1] < 8 * times[0]


def least_s(work: Callable[[], Any]) -> float:
    times: list[float] = []
    while len(times) < 3 and sum(times) < 0.5:
        began_s = time.process_time()
        work()
        times.append(time.process_time() - began_s)
    return min(times)


def test_missing_values_are_tried_in_few_rows() -> None:
    """Of 300 values that may be missing several are left out at once: there is no row for each of them."""
    model = wide_model(300)
    prove(model)
    assert max(calls_of(model)) <= MANY_ROWS


@pytest.mark.parametrize("column", [0, 217, 299])
def test_value_that_cannot_be_missing_is_found(column: int) -> None:
    """Among 300 values the one without which the model fails is named, after a few rows."""
    model = wide_model(300, fails_on=(column,))
    with pytest.raises(ModelError, match=f"a missing 'x{column}'; set features.x{column}.missing = false: Arithmetic"):
        prove(model)
    assert sum(calls_of(model)) < 150


@pytest.mark.parametrize("columns", [(0, 1), (3, 250), (7, 8, 9)])
def test_values_that_fail_only_together_are_taken(columns: tuple[int, ...]) -> None:
    """A model that fails without several values, but not without any one of them, is served."""
    assert prove(wide_model(300, fails_on=columns)).never_batched is None


def calls_of(model: Model) -> list[int]:
    calls: list[int] = model.predictor.estimator[0].calls
    return calls


@pytest.mark.parametrize("last", [b"{}", b'{"x0": "a"}', b'{"x": 1}'])
def test_rows_that_say_nothing_are_read_in_parts(monkeypatch: pytest.MonkeyPatch, last: bytes) -> None:
    """`{}` is a row where all may be missing, so few bytes have many cells, of which a part has only some."""
    model = wide_model(MANY)
    n_rows = 2000
    body = b"[" + b"{}," * n_rows + last + b"]"
    parts: list[int] = []
    check = Contract.check

    def note(contract: Contract, payload: Any) -> Any:
        parts.append(len(payload))
        return check(contract, payload)

    monkeypatch.setattr(Contract, "check", note)
    assert is_long(model.contract, body)
    long_body = LongBody(model.arrays, body, max_rows=10_000)
    assert long_body.takes_long
    if last == b"{}":
        assert len(long_body.decode()) == n_rows + 1
    else:
        with pytest.raises(Unprocessable) as refused:
            long_body.decode()
        assert [problem["loc"] for problem in refused.value.detail] == [["body", n_rows, *parse_json(last)]]
    assert len(parts) > 10
    assert max(parts) < 2 * max(MAX_CELLS // MANY, MIN_PART_BYTES // len(b"{},"))


FEW_BYTES = {
    "rows": b'{"instances":[' + b"{}," * 1200 + b"{}]}",
    "bare-rows": b"[" + b"{}," * 1200 + b"{}]",
    "columns": b'{"inputs":{"x0":[' + b"1," * 1200 + b"1]}}",
    "columns-under-an-escaped-key": b'{"\\u0069nputs":{"x0":[' + b"1," * 1200 + b"1]}}",
    "split": b'{"dataframe_split":{"columns":[],"data":[' + b"[]," * 1200 + b"[]]}}",
    "csv": b"x0\n" + b"1\n" * 1201,
}


@pytest.mark.parametrize("form", FEW_BYTES)
def test_envelopes_of_few_bytes_are_read_in_parts(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """However rows that say little are written, those of few bytes are checked beside the loop, some at a time."""
    model = wide_model(FEW)
    parts: list[int] = []
    of_rows = Arrays.of_rows

    def note(arrays: Arrays, rows: Any) -> Any:
        parts.append(len(rows))
        return of_rows(arrays, rows)

    monkeypatch.setattr(Arrays, "of_rows", note)
    assert len(FEW_BYTES[form]) < SHORT_BYTES
    envelope = Envelope(model.arrays, FEW_BYTES[form], 10_000, is_csv=form == "csv")
    assert (envelope.is_long, envelope.takes_long) == (True, True)
    assert len(envelope.decode()) == 1201
    assert max(parts) < 2 * MAX_CELLS // FEW


@pytest.mark.parametrize("row", [row_of(300), {}, [0.5] * 300], ids=["object", "empty", "list"])
def test_envelope_of_one_wide_row_shares_calls(row: Any) -> None:
    """One row, however many features may be missing, is no long body."""
    body = to_json({"instances": [row]})
    assert not Envelope(wide_model(300).arrays, body, 10_000).is_long

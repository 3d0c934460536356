"""Columns become the same X as rows do, whatever the estimator takes, and are refused for the same reasons."""

import tracemalloc
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LinearRegression
from sklearn.preprocessing import OrdinalEncoder

from serving.errors import Unprocessable
from serving.predictor.arrays import Arrays
from serving.predictor.columns import Columns
from serving.predictor.contract import Contract
from serving.predictor.features import FeatureSettings
from serving.predictor.inputs import read_inputs
from tests.lib.pipelines import ESTIMATORS, fitted, rows_of

NAMES = ["a", "b"]
POINTS = pd.DataFrame([[0.0, 1.0], [1.0, 3.0], [2.0, 5.0]], columns=NAMES)


def arrays_of(estimator: Any, **features: Any) -> Arrays:
    given = {name: FeatureSettings(**settings) for name, settings in features.items()}
    return Arrays(Contract(read_inputs(estimator), given))


def linear(**features: Any) -> Arrays:
    return arrays_of(LinearRegression().fit(POINTS, [0, 1, 2]), **features)


def boosting(**features: Any) -> Arrays:
    """Return the arrays of an estimator that takes missing values."""
    return arrays_of(HistGradientBoostingClassifier(max_iter=1).fit(POINTS, [0, 1, 0]), **features)


def assert_same(X: Any, other: Any) -> None:
    """Hold one X to another: their types, too."""
    if isinstance(other, pd.DataFrame):
        pd.testing.assert_frame_equal(X, other)
    else:
        assert (type(X), X.dtype, X.shape) == (type(other), other.dtype, other.shape)
        assert [*map(repr, X.ravel().tolist())] == [*map(repr, other.ravel().tolist())]


def columns_by_name(contract: Contract, table: Any) -> dict[str, Any]:
    """Return a table as a client would send it: floats with NaN, integers, truths, texts with None."""
    cells: dict[str, Any] = {}
    for name in contract.names:
        kind = contract.features[name].type
        column = table[name]
        if kind == "str":
            cells[name] = [None if pd.isna(cell) else cell for cell in column]
        else:
            cells[name] = column.to_numpy(np.float64 if column.isna().any() or kind != "bool" else bool)
    return cells


@pytest.mark.parametrize("name", ESTIMATORS)
def test_columns_become_what_their_rows_do(name: str) -> None:
    """Of every pipeline: missing values, texts, categories, columns that are dropped, DataFrames and arrays."""
    estimator, table = fitted(name)
    contract = Contract(read_inputs(estimator), {})
    arrays = Arrays(contract)
    rows = contract.parse_payload([{key: row[key] for key in contract.names} for row in rows_of(table)])
    columns = Columns(contract, len(table), columns_by_name(contract, table))
    assert contract.parse_payload(columns.rows()) == rows
    assert_same(columns.read(arrays), arrays.of_rows(rows))


@pytest.mark.parametrize(
    ("features", "cells"),
    [
        ({"a": {"type": "int"}}, [2.0, -0.0]),
        ({"a": {"type": "int"}}, np.array([2, 3], np.int32)),
        ({"a": {"type": "int", "missing": True}}, [2.0, np.nan]),
        ({"a": {"type": "int", "missing": True, "ge": 2**52}}, [2.0**52, np.nan]),
        ({"a": {"type": "int", "choices": [1, 5], "missing": True}}, [5.0, np.nan]),
        ({"a": {"choices": [1.5, 2]}}, np.array([1.5, 2], np.float32)),
        ({"a": {"type": "bool"}}, [1.0, 0.0]),
        ({"a": {"type": "bool"}}, [True, False]),
        ({"a": {"type": "bool", "missing": True}}, [1.0, np.nan]),
        ({"a": {"type": "bool", "choices": [True]}}, [True, True]),
        ({"a": {"missing": True}}, np.array([np.nan, 1e30], np.float32)),
        ({"a": {"ge": 0, "le": 2}}, np.array([0, 2])),
    ],
    ids=str,
)
def test_column_of_each_type_is_read(features: dict[str, Any], cells: Any) -> None:
    """Whole numbers as floats, truths as numbers, NaN where a value may be missing, bounds and choices."""
    arrays = boosting(**features, b={})
    by_name = {"a": np.asarray(cells), "b": np.array([1.0, 2.0])}
    columns = Columns(arrays.contract, 2, by_name)
    assert_same(columns.read(arrays), arrays.of_rows(arrays.contract.parse_payload(columns.rows())))


@pytest.mark.parametrize(
    ("features", "cells", "says"),
    [
        ({}, [1.0, np.nan], "finite number"),
        ({}, [1.0, np.inf], "finite number"),
        ({}, [1.0, 3.5e38], "less than or equal to 3402823"),
        ({}, [True, True], "valid number"),
        ({}, ["x", "y"], "valid number"),
        ({"a": {"ge": 0}}, [1.0, -1.0], "greater than or equal to 0"),
        ({"a": {"ge": 0}}, [1, -1], "greater than or equal to 0"),
        ({"a": {"type": "int"}}, [1.0, 2.5], "valid integer"),
        ({"a": {"type": "int"}}, [1.0, np.nan], "valid integer"),
        ({"a": {"type": "int", "missing": True}}, [np.nan, np.inf], "valid integer"),
        ({"a": {"type": "int"}}, [1, 2**53 + 1], "less than or equal to"),
        ({"a": {"type": "int"}}, [1.0, 2.0**54], "less than or equal to"),
        ({"a": {"choices": [1, 2]}}, [1.0, 3.0], "none of the choices"),
        ({"a": {"type": "bool"}}, [1.0, 2.0], "valid boolean"),
        ({"a": {"type": "bool"}}, [0.0, np.nan], "valid boolean"),
        ({"a": {"type": "bool", "choices": [True]}}, [True, False], "none of the choices"),
    ],
    ids=str,
)
def test_bad_cell_is_named(features: dict[str, Any], cells: Any, says: str) -> None:
    """The contract says what is wrong with a cell, by its row, as it does of a row in JSON."""
    arrays = boosting(a={"missing": False, **features.get("a", {})}, b={})
    by_name = {"a": cells if isinstance(cells[0], str) else np.array(cells), "b": np.array([1.0, 2.0])}
    with pytest.raises(Unprocessable) as error:
        Columns(arrays.contract, 2, by_name).read(arrays)
    problem = error.value.detail[-1]
    assert problem["loc"] == ["body", 1, "a"]
    assert says in problem["msg"]


def test_largest_integers_are_those_that_were_meant() -> None:
    """2⁵³ is the largest, also as a float; one more, which as a float would be the same, is refused."""
    arrays = linear(a={"type": "int"})
    ones = np.array([1.0])
    assert Columns(arrays.contract, 1, {"a": np.array([2.0**53]), "b": ones}).read(arrays)[0, 0] == 2**53
    with pytest.raises(Unprocessable):
        Columns(arrays.contract, 1, {"a": [2**53 + 1], "b": ones}).read(arrays)


def test_matrix_is_read_as_columns_are() -> None:
    """A matrix has the features in the model's order, and X is a copy of it, which an estimator may change."""
    for arrays, X in ((linear(), [[1.0, 2.0], [3.0, 4.0]]), (boosting(), [[1.0, np.nan], [3.0, 4.0]])):
        flat = np.array(X, np.float32).ravel()
        flat.flags.writeable = False
        read = Columns(arrays.contract, 2, flat=flat).read(arrays)
        np.testing.assert_array_equal(read, X)
        assert read.dtype == np.float64
        assert read.flags.writeable
    assert Columns(linear().contract, 2, flat=[1, 2.5, 3, 4]).rows() == [{"a": 1, "b": 2.5}, {"a": 3, "b": 4}]


def test_bad_row_far_behind_is_named() -> None:
    """Rows are checked part by part, and numbered from the first."""
    arrays, flat = linear(), np.zeros(10_000)
    flat[-1] = flat[4001] = np.nan
    with pytest.raises(Unprocessable) as error:
        Columns(arrays.contract, 5000, flat=flat).read(arrays)
    assert [problem["loc"] for problem in error.value.detail] == [["body", 2000, "b"], ["body", 4999, "b"]]


def test_column_that_is_left_out_is_missing() -> None:
    """A feature that may be missing needs no column, in an array and in a DataFrame."""
    arrays = boosting()
    read = Columns(arrays.contract, 2, {"b": np.array([1.0, 2.0])}).read(arrays)
    np.testing.assert_array_equal(read, [[np.nan, 1], [np.nan, 2]])
    estimator, table = fitted("native-categories")
    arrays = Arrays(Contract(read_inputs(estimator), {}))
    years = Columns(arrays.contract, 1, {"year": np.array([2007])})
    assert_same(years.read(arrays), arrays.of_rows(arrays.contract.parse_payload([{"year": 2007}])))
    assert [*years.read(arrays)] == [*table]


def test_texts_are_checked_as_a_column() -> None:
    """Texts of an array of objects have to be among those that are known."""
    encoder = OrdinalEncoder().fit([["x"], ["y"]])
    arrays = arrays_of(encoder)
    (name,) = arrays.contract.names
    assert Columns(arrays.contract, 2, {name: ["y", "x"]}).read(arrays).tolist() == [["y"], ["x"]]
    for wrong in ("z", None, 1):
        with pytest.raises(Unprocessable):
            Columns(arrays.contract, 2, {name: ["y", wrong]}).read(arrays)


@pytest.mark.parametrize("arrays", [linear(), boosting(), linear(a={"type": "int"})], ids=["floats", "missing", "int"])
def test_numbers_need_no_object_each(arrays: Arrays) -> None:
    """A million cells take the memory of a few arrays, far less than as many objects, which have 24 bytes and more."""
    flat = np.ones(1_000_000)
    columns = Columns(arrays.contract, len(flat) // 2, flat=flat)
    tracemalloc.start()
    columns.read(arrays)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3.5 * flat.nbytes

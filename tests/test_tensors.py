"""The wire format of /v2: bytes of a request to cells, and columns of predictions to JSON and bytes."""

import json
import struct
from typing import Any

import numpy as np
import pytest

from serving.errors import BadRequest
from serving.predictor.predictions import Predictions, Template
from serving.web.output_tensors import COPIED_BYTES, Output, pack_ascii, write_answer, write_row
from serving.web.tensors import Wanted, header_length, read_header, read_inference, read_plain_row
from tests.lib.infer import CELLS, tensor, texts

HEAD = b'{"model_name":"m","outputs":['


def read(payload: Any, binary: bytes = b"") -> Any:
    return read_inference(payload, memoryview(binary))


def cells_of(binary: bytes, **changes: Any) -> Any:
    """Return the cells of a tensor of two elements in bytes."""
    changes = {"shape": [2], "data": None, "parameters": {"binary_data_size": len(binary)}} | changes
    (only,) = read({"inputs": [tensor(**changes)]}, binary).inputs
    return only.cells


@pytest.mark.parametrize(
    ("datatype", "packed", "cells"),
    [
        ("BOOL", b"\1\0", [True, False]),
        ("INT32", struct.pack("<2i", -1, 2**31 - 1), [-1, 2**31 - 1]),
        ("INT64", struct.pack("<2q", -(2**63), 7), [-(2**63), 7]),
        ("FP32", struct.pack("<2f", 0.5, -1e30), [0.5, float(np.float32(-1e30))]),
        ("FP64", struct.pack("<2d", 0.1, 1e300), [0.1, 1e300]),
        ("BYTES", texts("é".encode(), b""), ["é", ""]),
    ],
)
def test_datatype_is_little_endian(datatype: str, packed: bytes, cells: list[Any]) -> None:
    """Each datatype is read from its bytes, as Triton's extension has them; texts are UTF-8 behind their lengths."""
    found = cells_of(packed, datatype=datatype)
    assert (found if isinstance(found, list) else found.tolist()) == cells


def test_numbers_are_no_copy_of_the_body() -> None:
    """Numbers are a view of the bytes that came."""
    assert not cells_of(np.arange(2.0).tobytes()).flags.owndata


def test_tensors_follow_each_other() -> None:
    """The bytes of tensors are in the order of the inputs, and those that are in JSON have none."""
    sizes = [{"binary_data_size": size} for size in (16, 8)]
    first = tensor(name="a", shape=[2], data=None, parameters=sizes[0])
    last = tensor(name="c", shape=[2, 1], datatype="INT32", data=None, parameters=sizes[1])
    inputs = [first, tensor(name="b", shape=[2], data=[1, None]), last]
    found = read({"inputs": inputs}, np.array([1.5, 2.5]).tobytes() + np.array([3, 4], np.int32).tobytes()).inputs
    assert [[*one.cells] for one in found] == [[1.5, 2.5], [1, None], [3, 4]]
    assert [one.shape for one in found] == [[2], [2], [2, 1]]


def test_large_claims_take_no_memory() -> None:
    """A shape and a size are held to the bytes that came before room is made for anything."""
    for claim in (
        {"shape": [2**40]},
        {"parameters": {"binary_data_size": 2**62}},
        {"shape": [2**40], "datatype": "BYTES"},
    ):
        with pytest.raises(BadRequest):
            cells_of(b"\0" * 16, **claim)


@pytest.mark.parametrize("given", ["", "x", "-1", "+1", "1.0", "٣", "9" * 19, "0", "11"])
def test_length_that_is_none_is_refused(given: str) -> None:
    """The length of the JSON is a plain number, of 1 to the bytes that there are."""
    with pytest.raises(BadRequest, match="Inference-Header-Content-Length is"):
        header_length(given, 10)


def test_length_is_that_of_the_json() -> None:
    """Without the header all of the body is JSON; what follows it is not looked at as JSON."""
    assert (header_length(None, 10), header_length("010", 10), header_length("2", 10)) == (10, 10, 2)
    assert read_header(b'{"a":1}\0\0', 7) == {"a": 1}


def test_outputs_are_as_they_are_asked_for() -> None:
    """An output's own parameter counts more than that of the request, and outputs keep their order."""
    ask = {"inputs": [tensor()], "parameters": {"binary_data_output": True}}
    named = [{"name": "b"}, {"name": "a", "parameters": {"binary_data": False}}]
    assert (read(ask).outputs, read(ask).is_binary) == (None, True)
    assert read(ask | {"outputs": named}).outputs == (Wanted("b", True), Wanted("a", False))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [2, 4]},
        {"shape": [1.0, 4]},
        {"shape": [True, 4]},
        {"shape": [4]},
        {"datatype": "INT64"},
        {"name": 1},
        {"parameters": {}},
        {"data": [*CELLS, 1]},
        {"data": [1, 2, 3, True]},
        {"data": [1, 2, 3, "4"]},
        {"data": [CELLS, CELLS]},
        {"data": {"0": 1}},
        {"data": None},
    ],
    ids=str,
)
def test_plain_row_is_nothing_else(changes: dict[str, Any]) -> None:
    """One row in one tensor of floats has a way of its own, which whatever is more or wrong does not take."""
    plain = {"inputs": [tensor()]}
    assert read_plain_row(plain, 4) == read_plain_row({"inputs": [tensor(data=[CELLS])]}, 4) == CELLS
    assert read_plain_row({"inputs": [tensor(**changes)]}, 4) is None
    others: list[Any] = [
        plain | {"id": "1"},
        {"inputs": [tensor(), tensor()]},
        {"inputs": []},
        {"inputs": {}},
        [],
        None,
    ]
    assert [read_plain_row(other, 4) for other in others] == [None] * len(others)


def predictions_of(**answer: Any) -> Predictions:
    """Return predictions whose parts are columns, or lists of columns."""
    columns = [column for part in answer.values() for column in (part if isinstance(part, list) else [part])]
    return Predictions(Template.of(answer), [*map(np.asarray, columns)])


def write(predictions: Predictions, n_rows: int, **binary: bool) -> tuple[dict[str, Any], bytes]:
    """Return the JSON of an answer, and the bytes behind it."""
    wanted = tuple(Wanted(name, binary.get(name, False)) for name in predictions.template.parts)
    pieces, length = write_answer(HEAD, wanted, predictions, n_rows)
    whole = b"".join(pieces)
    return json.loads(whole[:length]), whole[length:]


@pytest.mark.parametrize(
    ("column", "datatype", "data", "packed"),
    [
        (np.array([True, False]), "BOOL", [True, False], b"\1\0"),
        (np.array([1, -1], np.int32), "INT64", [1, -1], struct.pack("<2q", 1, -1)),
        (np.array([1, 2], np.uint8), "INT64", [1, 2], struct.pack("<2q", 1, 2)),
        (np.array([1.5, np.inf], np.float32), "FP64", [1.5, None], struct.pack("<2d", 1.5, np.inf)),
        (np.array(["a", "bcd"]), "BYTES", ["a", "bcd"], texts(b"a", b"bcd")),
        (np.array(["é", "b"]), "BYTES", ["é", "b"], texts("é".encode(), b"b")),
        (np.array(["a", "x\0"], object), "BYTES", ["a", "x\0"], texts(b"a", b"x\0")),
        (np.array([True, False], object), "BOOL", [True, False], b"\1\0"),
        (np.array([1, 2], object), "INT64", [1, 2], struct.pack("<2q", 1, 2)),
        (np.array([1, None], object), "FP64", [1, None], struct.pack("<2d", 1, np.nan)),
        (np.array(["a", None], object), "BYTES", ["a", "null"], texts(b"a", b"null")),
        (np.array(["2024-01-02", "2024-01-03"], "M8[us]"), "BYTES", None, None),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_column_is_written_as_a_tensor(column: Any, datatype: str, data: Any, packed: bytes | None) -> None:
    """Each type of prediction has its datatype, in JSON, where what is no number is null, and in bytes."""
    answers = predictions_of(prediction=column)
    (output,) = write(answers, 2)[0]["outputs"]
    assert (output["datatype"], output["shape"]) == (datatype, [2])
    head, rest = write(answers, 2, prediction=True)
    assert head["outputs"][0]["parameters"] == {"binary_data_size": len(rest)}
    if data is not None:
        assert (output["data"], rest) == (data, packed)
    else:
        assert rest == texts(*[text.encode() for text in output["data"]])


@pytest.mark.parametrize("kind", ["?", "i8", "u2", "f4", "U3", "O"])
def test_row_is_written_as_among_many(kind: str) -> None:
    """The short way for one row gives the bytes of the long one, whatever the type, and with `%` in texts."""
    cells: dict[str, list[Any]] = {"U3": ["a%b", "c"], "O": ["a%b", "c"]}
    column = np.array(cells.get(kind, [1, 0]), kind)
    answers = predictions_of(prediction=column, scores=[np.array([0.5, np.nan]), np.array([0.5, 1.0])])
    wanted = (Wanted("prediction", False), Wanted("scores", False))
    for number in range(2):
        part = answers.part(number, number + 1)
        pieces, _ = write_answer(HEAD, wanted, part, 1)
        assert b"".join(write_row(HEAD, part)) == b"".join(pieces)


def test_tensor_of_two_dimensions_is_row_major() -> None:
    """The columns of an output are side by side in each row."""
    answers = predictions_of(scores=[np.array([1.0, 3.0]), np.array([2.0, 4.0])])
    assert write(answers, 2)[0]["outputs"][0] == {
        "name": "scores",
        "shape": [2, 2],
        "datatype": "FP64",
        "data": [1, 2, 3, 4],
    }
    assert write(answers, 2, scores=True)[1] == struct.pack("<4d", 1, 2, 3, 4)


def test_long_answer_is_in_pieces() -> None:
    """JSON is written part by part, and long parts are not copied."""
    numbers = np.random.default_rng(0).random(50_000)
    pieces, length = write_answer(HEAD, (Wanted("scores", False),), predictions_of(scores=numbers), len(numbers))
    assert length == sum(map(len, pieces))
    assert max(map(len, pieces)) < 2 * COPIED_BYTES
    assert json.loads(b"".join(pieces))["outputs"][0]["data"] == numbers.tolist()


@pytest.mark.parametrize("names", [["a"], ["setosa", "versicolor", ""], ["x\0y", "z"], ["0123456789" * 9] * 3])
def test_texts_are_packed_at_once_as_one_by_one(names: list[str]) -> None:
    """What numpy does for all texts is what is done for each."""
    assert pack_ascii(np.array(names * 5)) == texts(*[name.encode() for name in names * 5])
    assert pack_ascii(np.array([*names, "é"])) is None


def test_texts_of_a_column_that_is_a_view_are_packed() -> None:
    """A column may have gaps between its values, as one of several has."""
    table = np.array([["a", "b"], ["cc", "d"]])
    assert Output("prediction", [table[:, 0]], False, 2).pack() == texts(b"a", b"cc")

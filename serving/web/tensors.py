"""The tensors of a request to /v2, as JSON or as bytes behind it.

Sections of the Open Inference Protocol over REST (kserve/open-inference-protocol, inference_rest.md) are named where
a shape comes from there, and Triton's binary tensor data extension (extension_binary_data.md) as "Triton's extension".
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic_core import to_json

from serving.errors import BadRequest, listed, nearest, shorten
from serving.predictor.bodies import LONG_BYTES, parse_json
from serving.predictor.columns import Cells, Columns
from serving.predictor.contract import Contract
from serving.predictor.inputs import Array
from serving.web.long_numbers import parse_long

HEADER_LENGTH = "Inference-Header-Content-Length"  # bytes of JSON in front of binary tensors (Triton's extension)
MAX_SIZE = 2**63  # of a dimension, and no array is larger
TEXT_LENGTH = struct.Struct("<I")  # in front of each element of BYTES (Triton's extension)

# "Tensor Data Types", those that features have, little-endian as Triton's extension sends them.
DTYPES: dict[str, Any] = {"BOOL": "|u1", "INT32": "<i4", "INT64": "<i8", "FP32": "<f4", "FP64": "<f8", "BYTES": None}
PLAIN_KEYS = {"name", "shape", "datatype", "data"}
NUMBERS = {int, float, type(None)}
KINDS: dict[str, set[type]] = {  # of what JSON may have as elements; null is a missing value
    "BOOL": {bool, type(None)},
    "INT32": NUMBERS,
    "INT64": NUMBERS,
    "FP32": NUMBERS,
    "FP64": NUMBERS,
    "BYTES": {str, type(None)},
}
INTEGER_BITS = {"INT32": 31, "INT64": 63}


@dataclass(slots=True)
class Tensor:
    """An input tensor, whose elements are flat, in row-major order."""

    where: str  # its place in the request, for messages
    name: str
    datatype: str
    shape: list[int]
    cells: Cells
    is_json: bool  # in which NaN is no element, and becomes what null was

    def compact(self) -> Cells:
        """Return numbers as an array, which for few takes longer than it saves; as they are if an array has no room."""
        if not isinstance(self.cells, list) or self.datatype == "BYTES":
            return self.cells
        try:
            if self.datatype in ("FP32", "FP64"):
                return np.array(self.cells, np.float64)
            if None not in self.cells:
                return np.array(self.cells, bool if self.datatype == "BOOL" else np.int64)
        except OverflowError:  # an integer of hundreds of digits
            pass
        return self.cells


@dataclass(frozen=True, slots=True)
class Wanted:
    """An output tensor that a request asks for."""

    name: str
    is_binary: bool


@dataclass(slots=True)
class Inference:
    """A request for inference ("Inference Request JSON Object")."""

    inputs: list[Tensor]
    outputs: tuple[Wanted, ...] | None = None  # None: all that there are
    is_binary: bool = False  # outputs of which the request does not say it
    id: bytes = b""  # in JSON


def header_length(given: str | None, size: int) -> int:
    """Return how many of a body's bytes are JSON, by `HEADER_LENGTH`. Raises `BadRequest`."""
    if given is None:
        return size
    if not (given.isascii() and given.isdigit() and len(given) <= 18):
        raise BadRequest(f"{HEADER_LENGTH} is {shorten(given)!r}; it should be a number of bytes")
    length = int(given)
    if length == 0:
        raise BadRequest(f"{HEADER_LENGTH} is 0; send JSON that describes the tensors in front of their bytes")
    if length > size:
        raise BadRequest(f"{HEADER_LENGTH} is {length}; the body has {size} bytes")
    return length


def read_header(body: bytes, length: int) -> Any:
    """Return the JSON of a body, which so many bytes of it are. Raises `BadRequest`."""
    if not body:
        raise BadRequest("the body is empty; send a JSON object with 'inputs'")
    header = body if length == len(body) else body[:length]
    return parse_long(header) if length > LONG_BYTES else parse_json(header)


def read_inference(payload: Any, binary: bytes | memoryview) -> Inference:
    """Return what is asked for in JSON, with the bytes that follow it. Raises `BadRequest`."""
    if type(payload) is not dict:
        raise BadRequest(f"the body is {_show(payload)}; it should be an object with 'inputs'")
    inputs = payload.get("inputs")
    if type(inputs) is not list or not inputs:
        raise BadRequest(f"inputs is {_show(inputs)}; it should be an array of one tensor or more")
    request = Inference(_read_inputs(inputs, binary))
    if "parameters" in payload:
        parameters = _object(payload, "parameters", "parameters")
        request.is_binary = _flag(parameters, "binary_data_output", "parameters")
    if payload.get("outputs"):
        request.outputs = _read_outputs(payload["outputs"], request.is_binary)
    given_id = payload.get("id")
    if given_id is not None:
        if type(given_id) is not str:
            raise BadRequest(f"id is {_show(given_id)}; it should be a text")
        request.id = to_json(given_id)
    return request


def read_plain_row(payload: Any, width: int) -> list[Any] | None:
    """Return the cells of a request for one row in one tensor of floats, and nothing else: what is asked most.

    None: it is anything else, or wrong. `read_inference` takes longer for it than the rest of the service does.
    """
    if type(payload) is not dict or len(payload) != 1 or type(inputs := payload.get("inputs")) is not list:
        return None
    given = inputs[0] if len(inputs) == 1 else None
    if type(given) is not dict or given.keys() != PLAIN_KEYS or given["datatype"] not in ("FP64", "FP32"):
        return None
    shape, cells = given["shape"], given["data"]
    if shape != [1, width] or {*map(type, shape)} != {int} or type(given["name"]) is not str:
        return None
    if type(cells) is list and len(cells) == 1 and type(cells[0]) is list:
        cells = cells[0]
    return cells if type(cells) is list and len(cells) == width and NUMBERS.issuperset(map(type, cells)) else None


def _read_inputs(inputs: list[Any], binary: bytes | memoryview) -> list[Tensor]:
    """Return the input tensors, of which those in `binary` follow each other (Triton's extension)."""
    tensors: list[Tensor] = []
    names: set[str] = set()
    begin = 0
    for number, given in enumerate(inputs):
        where = f"inputs[{number}]"
        name, datatype, shape = _read_head(where, given)
        if name in names:
            raise BadRequest(f"{where}.name is {shorten(name)!r}, which an input before it has; give each once")
        names.add(name)
        n_elements = _count(where, shape)
        n_bytes = _binary_size(where, given) if "parameters" in given else None
        if n_bytes is None:
            cells: Cells = _read_data(where, datatype, shape, n_elements, given)
        else:
            if n_bytes > len(binary) - begin:
                left = f"{len(binary) - begin} bytes are left behind the JSON"
                raise BadRequest(f"{where}.parameters.binary_data_size is {n_bytes}; {left}")
            cells = _read_bytes(where, datatype, n_elements, binary[begin : begin + n_bytes])
            begin += n_bytes
        tensors.append(Tensor(where, name, datatype, shape, cells, n_bytes is None))
    if begin != len(binary):
        rule = "the inputs' parameters.binary_data_size add up to"
        raise BadRequest(f"{len(binary)} bytes follow the JSON; {rule} {begin}")
    return tensors


def _read_head(where: str, given: Any) -> tuple[str, str, Any]:
    """Return name, datatype and shape of an input, and that not checked."""
    if type(given) is not dict:
        raise BadRequest(f"{where} is {_show(given)}; it should be an object")
    name: Any = given.get("name")
    datatype: Any = given.get("datatype")
    if type(name) is not str:
        raise BadRequest(f"{where}.name is {_show(name)}; it should be a text")
    if type(datatype) is not str or datatype not in DTYPES:
        raise BadRequest(f"{where}.datatype is {_show(datatype)}; use one of {listed([*DTYPES])}")
    return name, datatype, given.get("shape")


def _count(where: str, shape: Any) -> int:
    """Return the number of elements of a shape, which may have two dimensions at most."""
    if type(shape) is not list or not 1 <= len(shape) <= 2:
        raise BadRequest(f"{where}.shape is {_show(shape)}; it should be an array of one or two dimensions")
    for size in shape:
        if type(size) is not int or not 0 < size < MAX_SIZE:
            raise BadRequest(f"{where}.shape is {_show(shape)}; each dimension should be 1 or more, below 2⁶³")
    n_elements: int = shape[0] * shape[1] if len(shape) == 2 else shape[0]
    return n_elements


def _binary_size(where: str, given: dict[str, Any]) -> int | None:
    """Return the bytes of an input behind the JSON, or None of one that is in it."""
    parameters = _object(given, "parameters", f"{where}.parameters")
    _refuse_shared_memory(parameters, where)
    if "binary_data_size" not in parameters:
        return None
    size = parameters["binary_data_size"]
    if type(size) is not int or not 0 <= size < MAX_SIZE:
        raise BadRequest(f"{where}.parameters.binary_data_size is {_show(size)}; it should be a number of bytes")
    if "data" in given:
        raise BadRequest(f"{where} has data and parameters.binary_data_size; give one of them")
    return size


def _read_data(where: str, datatype: str, shape: list[int], n_elements: int, given: dict[str, Any]) -> Cells:
    """Return the elements of an input that is in JSON, flat or in the nesting of its shape ("Tensor Data")."""
    data = given.get("data")
    if isinstance(data, np.ndarray):  # by `parse_long`, which has counted its elements
        return data
    if type(data) is not list:
        cure = "an array, or parameters.binary_data_size the size of its bytes behind the JSON"
        raise BadRequest(f"{where}.data is {_show(data)}; it should be {cure}")
    if data and type(data[0]) is list:
        width = shape[1] if len(shape) == 2 else None
        if {*map(type, data)} != {list} or len(data) != shape[0] or {*map(len, data)} != {width}:
            raise BadRequest(f"{where}.data has another nesting than its shape {_show(shape)}; nest it so, or not")
        data = data[0] if len(data) == 1 else [*itertools.chain.from_iterable(data)]
    if len(data) != n_elements:
        raise BadRequest(f"{where}.data has {len(data)} elements; its shape {_show(shape)} has {n_elements}")
    kinds = {*map(type, data)}
    if not kinds <= KINDS[datatype]:
        wrong = next(place for place, value in enumerate(data) if type(value) not in KINDS[datatype])
        raise BadRequest(f"{where}.data has {_show(data[wrong])} at {wrong}, which is no {datatype}")
    return _as_integers(where, datatype, data, kinds == {int}) if datatype in INTEGER_BITS else data


def _as_integers(where: str, datatype: str, data: list[Any], are_whole: bool) -> list[Any]:
    """Return elements of an integer datatype, of which `2.0` is one. Raises `BadRequest` for those that do not fit."""
    limit = 1 << INTEGER_BITS[datatype]
    if are_whole and -limit <= min(data) and max(data) < limit:
        return data
    for place, value in enumerate(data):
        is_whole = type(value) is not float or value.is_integer()
        if value is not None and not (is_whole and -limit <= value < limit):
            raise BadRequest(f"{where}.data has {_show(value)} at {place}, which is no {datatype}")
    return [int(value) if type(value) is float else value for value in data]


def _read_bytes(where: str, datatype: str, n_elements: int, data: bytes | memoryview) -> Cells:
    """Return the elements of an input that is in bytes (Triton's extension)."""
    dtype = DTYPES[datatype]
    if dtype is None:
        return [*_read_texts(where, n_elements, bytes(data))]
    n_bytes = n_elements * np.dtype(dtype).itemsize
    if len(data) != n_bytes:
        has = f"{n_elements} elements of {datatype} have {n_bytes} bytes"
        raise BadRequest(f"{where}.parameters.binary_data_size is {len(data)}; {has}")
    array: Array = np.frombuffer(data, dtype)
    if datatype != "BOOL":
        return array
    if array.max() > 1:
        raise BadRequest(f"{where} has the byte {int(array.max())}; a BOOL is 0 or 1")
    return array.astype(bool)


def _read_texts(where: str, n_elements: int, data: bytes) -> Iterator[str]:
    """Yield the elements of BYTES, which each have their length in front. Raises `BadRequest`."""
    begin, size = 0, len(data)
    if n_elements * TEXT_LENGTH.size > size:
        raise BadRequest(f"{where} has {size} bytes; {n_elements} elements of BYTES have 4 bytes each and their texts")
    for place in range(n_elements):
        if begin + TEXT_LENGTH.size > size:
            raise BadRequest(f"{where} has {size} bytes, which end before element {place} of {n_elements}")
        (length,) = TEXT_LENGTH.unpack_from(data, begin)
        begin += TEXT_LENGTH.size
        if begin + length > size:
            left = f"{size - begin} bytes are left"
            raise BadRequest(f"{where} has element {place} with a length of {length} bytes; {left}")
        try:
            yield data[begin : begin + length].decode()
        except UnicodeDecodeError:
            raise BadRequest(f"{where} has element {place}, which is not UTF-8") from None
        begin += length
    if begin != size:
        raise BadRequest(f"{where} has {size} bytes; its {n_elements} elements end at {begin}")


def _read_outputs(outputs: Any, is_binary: bool) -> tuple[Wanted, ...]:
    """Return the outputs that are asked for ("Request Output"), without a look at which there are."""
    if type(outputs) is not list:
        raise BadRequest(f"outputs is {_show(outputs)}; it should be an array of objects with a 'name'")
    wanted: dict[str, Wanted] = {}
    for number, given in enumerate(outputs):
        where = f"outputs[{number}]"
        if type(given) is not dict or type(given.get("name")) is not str:
            raise BadRequest(f"{where} is {_show(given)}; it should be an object with a 'name'")
        name = given["name"]
        if name in wanted:
            raise BadRequest(f"{where}.name is {shorten(name)!r}, which one before it has; give each once")
        parameters = _object(given, "parameters", f"{where}.parameters")
        _refuse_shared_memory(parameters, where)
        if parameters.get("classification"):
            raise BadRequest(f"{where}.parameters.classification is not offered; leave it out")
        wanted[name] = Wanted(name, _flag(parameters, "binary_data", f"{where}.parameters", is_binary))
    return tuple(wanted.values())


def _object(given: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    value = given.get(name)
    if value is None:
        return {}
    if type(value) is not dict:
        raise BadRequest(f"{where} is {_show(value)}; it should be an object")
    return value


def _flag(parameters: dict[str, Any], name: str, where: str, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise BadRequest(f"{where}.{name} is {_show(value)}; it should be true or false")
    return value


def _refuse_shared_memory(parameters: dict[str, Any], where: str) -> None:
    if "shared_memory_region" in parameters:
        raise BadRequest(f"{where}.parameters.shared_memory_region is not offered; send the tensor in the body")


def _show(value: Any) -> str:
    """Return a value from outside as a message shows it: in JSON."""
    return to_json(shorten(value), inf_nan_mode="strings", fallback=str).decode()


def gather(contract: Contract, inputs: list[Tensor], is_large: bool) -> Columns:
    """Return the columns that input tensors are: one tensor [n, n_features], or one for each feature by its name.

    Raises `BadRequest`.
    """
    first, width = inputs[0], len(contract.names)
    if len(inputs) == 1 and (first.shape[1:] == [width] or width == len(first.shape) == 1):
        flat = first.compact() if is_large else first.cells
        return Columns(contract, first.shape[0], flat=flat, nulls=contract.names if first.is_json else ())
    by_name: dict[str, Cells] = {}
    for tensor in inputs:
        _check_column(contract, tensor, first)
        by_name[tensor.name] = tensor.compact() if is_large else tensor.cells
    missing = [name for name in contract.names if name not in by_name and not contract.features[name].missing]
    if missing:
        raise BadRequest(f"inputs lack {listed(missing)}; send a tensor [n] or [n, 1] for each feature")
    return Columns(contract, first.shape[0], by_name, nulls=[tensor.name for tensor in inputs if tensor.is_json])


def _check_column(contract: Contract, tensor: Tensor, first: Tensor) -> None:
    """Raise `BadRequest` unless a tensor is the column of a feature, with as many rows as the first one."""
    names = contract.names
    if tensor.name not in contract.features:
        rule = f"send one tensor [n, {len(names)}], or for each feature a tensor [n] or [n, 1] of its name"
        problem = f"{tensor.where} is {shorten(tensor.name)!r} of shape {_show(tensor.shape)}"
        raise BadRequest(f"{problem}, which is no feature; {rule}: {nearest(tensor.name, names)}")
    if tensor.shape[1:] not in ([], [1]):
        raise BadRequest(f"{tensor.where}.shape is {_show(tensor.shape)}; it should be [n] or [n, 1]")
    if tensor.shape[0] != first.shape[0]:
        raise BadRequest(f"{tensor.where} has {tensor.shape[0]} rows; {first.where} has {first.shape[0]}")

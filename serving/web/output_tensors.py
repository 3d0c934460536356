"""The tensors of an answer of /v2, as JSON or as bytes behind it.

Sections of the Open Inference Protocol over REST (kserve/open-inference-protocol, inference_rest.md) are named where
a shape comes from there, and Triton's binary tensor data extension (extension_binary_data.md) as "Triton's extension".
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pydantic_core import to_json

from serving.errors import MAX_NAME
from serving.predictor.inputs import Array
from serving.predictor.predictions import PIECE_ROWS, Predictions, Template
from serving.web.tensors import DTYPES, NUMBERS, TEXT_LENGTH, Wanted

COPIED_BYTES = 65_536  # of the largest piece of an answer that is joined with others
PLAIN = {"b": "?", "i": "i8", "u": "u8", "f": "f8", "U": "U1"}  # numpy's kinds that say what the values are, as a type
DATATYPES_BY_KIND = {"b": "BOOL", "i": "INT64", "u": "INT64", "f": "FP64"}  # of outputs, by numpy's kinds


def write_answer(
    head: bytes, wanted: tuple[Wanted, ...], predictions: Predictions, n_rows: int
) -> tuple[list[bytes], int]:
    """Return the pieces of an answer ("Inference Response JSON Object"), of whose JSON `head` is the beginning.

    Binary tensors follow the JSON, which has as many bytes as are returned with the pieces (Triton's extension).
    """
    json, binary, columns = [head], [], predictions.columns
    for number, one in enumerate(wanted):
        output = Output(one.name, *_select(predictions.template, columns, one), n_rows)
        json.append(output.begin(b"," if number else b""))
        if one.is_binary:
            binary.append(output.pack())
            json.append(b'"parameters":{"binary_data_size":%d}}' % len(binary[-1]))
        else:
            json += [b'"data":[', *output.write(), b"]}"]
    json.append(b"]}")
    return [*_merge([*json, *binary])], sum(map(len, json))


def _merge(pieces: list[bytes]) -> Iterator[bytes]:
    """Yield pieces that are worth a system call each, of which long ones are not copied."""
    joined: list[bytes] = []
    for piece in pieces:
        if len(piece) > COPIED_BYTES or sum(map(len, joined)) > COPIED_BYTES:
            yield from filter(None, [b"".join(joined)])
            joined = []
        joined.append(piece)
    yield b"".join(joined)


def _select(template: Template, columns: Sequence[Any], one: Wanted) -> tuple[list[Any], bool]:
    """Return the columns of an output, and whether it has a second dimension."""
    inner, place = template.parts[one.name]
    return list(columns[place]), inner != b"%b"


def write_row(head: bytes, predictions: Predictions) -> list[bytes]:
    """Return the answer to one row as `write_answer` does, all outputs in JSON, by work that those of a call share."""
    if row := predictions.render(_choose_row):
        return [head + row[0]]
    wanted = tuple(Wanted(name, False) for name in predictions.template.parts)
    return write_answer(head, wanted, predictions, n_rows=1)[0]


def _choose_row(predictions: Predictions) -> bytes | None:
    kinds = predictions.kinds
    return _row_template(predictions.template, kinds) if PLAIN.keys() >= {*kinds} else None


@functools.lru_cache(maxsize=100)
def _row_template(template: Template, kinds: str) -> bytes:
    """Return the JSON of an answer of one row, behind its head, with a hole for each column."""
    columns = [np.empty(1, PLAIN[kind]) for kind in kinds]
    wanted = [Wanted(name, False) for name in template.parts]
    outputs = [Output(one.name, *_select(template, columns, one), 1) for one in wanted]
    holes = [b",".join([b"%b"] * output.width) for output in outputs]
    pairs = zip(outputs, holes, strict=True)
    tensors = [output.begin(b"").replace(b"%", b"%%") + b'"data":[' + hole + b"]}" for output, hole in pairs]
    return b",".join(tensors) + b"]}"


class Output:
    """An output tensor: columns of n_rows, of which several make it `is_wide`, [n_rows, n_columns]."""

    def __init__(self, name: str, columns: list[Array], is_wide: bool, n_rows: int) -> None:
        self.name, self.n_rows, self.width = name, n_rows, len(columns)
        self._columns, self._is_wide = columns, is_wide
        kind = columns[0].dtype.kind
        self._is_plain = kind in PLAIN  # else the values say what they are
        self.datatype = DATATYPES_BY_KIND.get(kind, "BYTES") if self._is_plain else self._find_datatype()

    def _find_datatype(self) -> str:
        kinds = {type(value) for column in self._columns for value in column.tolist()}
        self._is_plain = kinds == {str}
        if kinds == {bool}:
            return "BOOL"
        if kinds == {int}:
            return "INT64"
        return "FP64" if kinds <= NUMBERS else "BYTES"

    def begin(self, comma: bytes) -> bytes:
        """Return the JSON in front of the elements ("Response Output")."""
        shape = b"%d,%d" % (self.n_rows, self.width) if self._is_wide else b"%d" % self.n_rows
        start = comma, to_json(self.name), shape, self.datatype.encode()
        return b'%b{"name":%b,"shape":[%b],"datatype":"%b",' % start

    def write(self) -> list[bytes]:
        """Return the elements in JSON, in pieces; what is no number is null."""
        flat, step = self._flat(), PIECE_ROWS * self.width
        pieces = (self._tell(flat[start : start + step]) for start in range(0, len(flat), step))
        made = [to_json(piece, inf_nan_mode="null", fallback=str)[1:-1] for piece in pieces]
        return [made[0], *itertools.chain.from_iterable((b",", piece) for piece in made[1:])]

    def pack(self) -> bytes:
        """Return the elements in bytes."""
        flat = self._flat()
        if self.datatype != "BYTES":
            return flat.astype(DTYPES[self.datatype]).tobytes()
        packed = pack_ascii(flat) if flat.dtype.kind == "U" else None
        return b"".join(map(_pack_text, self._tell(flat))) if packed is None else packed

    def _flat(self) -> Array:
        return self._columns[0] if self.width == 1 else np.column_stack(self._columns).ravel()

    def _tell(self, flat: Array) -> list[Any]:
        values: list[Any] = flat.tolist()
        return values if self._is_plain or self.datatype != "BYTES" else [*map(_as_text, values)]


def pack_ascii(texts: Array) -> bytes | None:
    """Return texts of numpy's own type as BYTES, in a quarter of the time of one by one; None if they are not ASCII."""
    width = texts.dtype.itemsize // 4
    if not width or width > MAX_NAME:
        return None
    codes = np.ascontiguousarray(texts).view(np.uint32).reshape(len(texts), width)
    if codes.max() > ord("\x7f"):
        return None
    lengths: Array = np.strings.str_len(texts)
    packed: Array = np.zeros((len(texts), TEXT_LENGTH.size + width), np.uint8)
    packed[:, 0] = lengths  # the lowest byte of four, which is enough
    packed[:, TEXT_LENGTH.size :] = codes
    kept: Array = np.tri(width + 1, TEXT_LENGTH.size + width, TEXT_LENGTH.size - 1, dtype=bool)  # by length
    cut: bytes = packed[kept[lengths]].tobytes()
    return cut


def _as_text(value: Any) -> str:
    return value if type(value) is str else to_json(value, inf_nan_mode="null", fallback=str).decode()


@functools.lru_cache(maxsize=10_000)
def _pack_text(text: str) -> bytes:
    encoded = text.encode()
    return TEXT_LENGTH.pack(len(encoded)) + encoded

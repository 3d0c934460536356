"""The answers of a call, and their JSON: a template with holes, filled from columns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from serving.errors import MAX_NAME
from serving.predictor.inputs import Array

Answer = Any  # dicts by name and lists, with a column of shape (n_samples,) at each end
PIECE_ROWS = 1000
ALL = slice(None)


@dataclass(frozen=True, eq=False)  # equal to itself alone, as a key that costs little
class Template:
    """The JSON of one answer, with a hole for a value of each column, and the same of each part of it, by name."""

    whole: bytes
    parts: Mapping[str, tuple[bytes, slice]]  # with the columns of it

    @classmethod
    def of(cls, answer: dict[str, Answer]) -> Template:
        """Return the template of an answer."""
        parts: dict[str, tuple[bytes, slice]] = {}
        begin = 0
        for name, part in answer.items():
            end = begin + len([*leaves_of(part)])
            parts[name] = write_template(part), slice(begin, end)
            begin = end
        return cls(write_template(answer), parts)


class Predictions:
    """The answers to n_samples rows, or to a part of the rows of a call.

    `template` has a hole for a value of each of the columns, (n_samples,) each.
    """

    __slots__ = ("_all_columns", "_rendered", "_rows", "_written", "template")

    def __init__(
        self, template: Template, columns: list[Array], of: Predictions | None = None, rows: slice = ALL
    ) -> None:
        self.template = template
        self._all_columns = columns
        self._rows = rows
        # Of all rows of the call, by what chose the template, once any is rendered.
        self._rendered: dict[Choose | None, list[bytes]] = of._rendered if of else {}
        self._written: list[list[bytes]] = of._written if of else []  # each value, column by column

    def part(self, start: int, stop: int) -> Predictions:
        """Return the answers to some of the rows. All parts share what is rendered."""
        return Predictions(self.template, self._all_columns, self, slice(start, stop))

    def only(self, name: str) -> Predictions:
        """Return one part of the answers, such as "prediction"."""
        template, columns = self.template.parts[name]
        return Predictions(Template(template, {}), self._all_columns[columns], rows=self._rows)

    @property
    def columns(self) -> list[Array]:
        """The values of each hole, (n_samples,) each."""
        return [column[self._rows] for column in self._all_columns]

    @property
    def kinds(self) -> str:
        """The kinds of numpy that the columns have, a letter each."""
        return "".join([column.dtype.kind for column in self._all_columns])

    def render(self, choose: Choose | None = None) -> list[bytes]:
        """Return the JSON of each answer, by its own template or by one that is chosen for a call, if there is one."""
        if (rendered := self._rendered.get(choose)) is None:
            template = self.template.whole if choose is None else choose(self)
            rendered = self._rendered[choose] = [] if template is None else self._fill(template)
        return rendered[self._rows]

    def _fill(self, template: bytes) -> list[bytes]:
        if not self._written:
            self._written += map(_write_values, self._all_columns)
        return [template % row for row in zip(*self._written, strict=True)]

    def render_array(self, n_rows: int) -> list[bytes]:
        """Return the JSON of an array of the answers, in pieces of `PIECE_ROWS` rows each."""
        pieces: list[bytes] = []
        for start in range(0, n_rows, PIECE_ROWS):
            answers = self._write([column[start : start + PIECE_ROWS] for column in self.columns])
            answers[0] = (b"," if pieces else b"[") + answers[0]
            if start + PIECE_ROWS >= n_rows:
                answers[-1] += b"]"
            pieces.append(b",".join(answers))
        return pieces

    def _write(self, columns: list[Array]) -> list[bytes]:
        template = self.template.whole
        return [template % row for row in zip(*map(_write_values, columns), strict=True)]


Choose = Callable[[Predictions], bytes | None]  # a template with a hole for each column


def leaves_of(answer: Any) -> Iterator[Array]:
    """Yield the columns of an answer in the order of its template's holes."""
    if isinstance(answer, dict | list):
        for inner in answer.values() if isinstance(answer, dict) else answer:
            yield from leaves_of(inner)
    else:
        yield answer


def write_template(answer: Answer) -> bytes:
    if isinstance(answer, dict):
        items = [_write_text(name).replace(b"%", b"%%") + b":" + write_template(item) for name, item in answer.items()]
        return b"{" + b",".join(items) + b"}"
    if isinstance(answer, list):
        return b"[" + b",".join(map(write_template, answer)) + b"]"
    return b"%b"


def _write_values(column: Array) -> list[bytes]:
    """Return the JSON of each value; what JSON cannot say of a float becomes null."""
    values = column.tolist()
    if column.dtype.kind in "biuf":
        return to_json(values, inf_nan_mode="null", fallback=str)[1:-1].split(b",")
    if column.dtype.kind == "U" and column.itemsize <= 4 * MAX_NAME:
        return [*map(_write_text, values)]
    return [
        _write_text(value)
        if type(value) is str and len(value) <= MAX_NAME
        else to_json(value, inf_nan_mode="null", fallback=str)
        for value in values
    ]


@functools.lru_cache(maxsize=10_000)
def _write_text(text: str) -> bytes:
    return to_json(text)


def as_key(label: Any) -> str:
    """Write a class as a key of a JSON object: as in a value, without the quotes."""
    return label if isinstance(label, str) else to_json(label, fallback=str).decode().strip('"')

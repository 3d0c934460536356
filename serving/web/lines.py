"""JSON lines: a stream of rows, one a line, whose answers go out while later rows come in.

A row that is wrong is answered by its own error, in its place. What is held in memory is a part of the stream, however
long it is.
"""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

import structlog
from pydantic_core import to_json

from serving.errors import BadRequest, ClientLeft, ContentTooLarge, InternalError, ServingError, TooManyRequests
from serving.predictor.arrays import Arrays, count_byte
from serving.predictor.bodies import (
    MAX_CELLS,
    PART_BYTES,
    PLACE,
    QUICK_BYTES,
    collector_off,
    parse_json,
    refuse_too_large,
)
from serving.predictor.calls import Job
from serving.predictor.contract import Hints
from serving.predictor.predictions import Predictions
from serving.web.encodings import IDENTITY, MAX_RATIO, Inflater, encoding_of
from serving.web.messages import JSONL, Request, Response
from serving.web.service import Service

log = structlog.get_logger()

BETWEEN_ROWS = b"}\n{"
NEWLINE, OPEN = b"\n{"
FAILED = "internal error; the log has it under this X-Request-ID"
PAUSE_S = 0.25  # seconds until a part that found the queue full tries again
CLOSE = {"Connection": "close"}  # of a stream, whose end nobody knows when its answer begins


async def predict_lines(service: Service[Any], request: Request) -> Response:
    """Answer each line of a body. One that is announced with a length within the limit is read before it is answered:
    some clients send all of a body before they read."""
    is_read = request.body is not None or not request.may_stream or request.is_within(limit_of(service))
    lines = Lines(service, request, is_read)
    if is_read:
        body = await request.read_body(limit_of(service))
        if isinstance(body, ServingError):
            raise body
        await service.inflate(request)
        request.body = request.take_body().rstrip() + b"\n"  # so that the last line is in a part with those before it
    answers = lines.answer()
    try:
        first = await anext(answers, b"")
    except ServingError as error:
        if not is_read:  # more of it may be on its way: the connection ends here
            error.headers, error.lingers = error.headers | CLOSE, True
        raise
    response = lines.response = Response([first], media_type=JSONL)
    if not is_read:
        response.more_headers, response.rest = CLOSE, answers
    elif (second := await anext(answers, None)) is not None:
        response.pieces.append(second)
        response.rest = answers
    return response


def describe_lines(service: Service[Any]) -> dict[str, Any]:
    """Return the content of a body in OpenAPI, which has no word for the type of a line."""
    return _describe_text(service.model.contract.example)


def describe_answers(service: Service[Any]) -> dict[str, Any]:
    """Return the content of an answer in OpenAPI."""
    return _describe_text(service.model.answer_example())


def _describe_text(line: Any) -> dict[str, Any]:
    rendered = to_json(line, inf_nan_mode="null", fallback=str).decode()
    return {JSONL: {"schema": {"type": "string"}, "example": f"{rendered}\n{rendered}\n"}}


def limit_of(service: Service[Any]) -> int:
    limit: int = service.settings.limits.max_body_bytes
    return limit


class Lines:
    """The lines of one request."""

    response: Response | None = None  # once it has begun

    def __init__(self, service: Service[Any], request: Request, is_read: bool) -> None:
        self.service, self.request = service, request
        self._encoding = IDENTITY if is_read else encoding_of(request.header("content-encoding"))
        self._timeout_s = service.settings.limits.request_timeout_s
        self._max_line_bytes = limit_of(service)
        contract = service.model.contract
        self._max_lines = max(1, MAX_CELLS // len(contract.names))
        self._hints = Hints()
        self._n_lines = 0  # that are answered
        self._has_failed = False  # a call, of which the log has the traceback

    async def answer(self) -> AsyncGenerator[bytes]:
        """Yield the answers of part after part. Raises what ends the stream before any of it is answered."""
        try:
            async for block in self._read_blocks():
                for part in self._cut(block):
                    yield await self._answer_part(part)
                await self.request.batcher.pause(0)  # others have their turn, also where nothing was waited for
        except ClientLeft:
            raise
        except Exception as error:  # whatever it is, the stream ends with it
            if not self._n_lines:
                raise
            yield self._end_early(error)
        finally:
            self.request.rows = self._n_lines

    def _end_early(self, error: Exception) -> bytes:
        """Return what stands in place of the line that was not whole, and of all that follow."""
        if not isinstance(error, ServingError):
            self._note_failure()
            error = InternalError(FAILED)
        if self.response is not None:
            self.response.lingers = True  # the client may still send
        return write_error(error) + b"\n"

    async def _read_blocks(self) -> AsyncIterator[bytes]:
        """Yield what comes, in blocks of whole lines."""
        rest = bytearray()  # of a line
        async for piece in self._read_pieces():
            head, newline, tail = piece.rpartition(b"\n")
            if newline:
                yield bytes(rest + head)
                rest.clear()
            rest += tail
            if len(rest) > self._max_line_bytes:
                raise ContentTooLarge(f"a line is longer than {self._max_line_bytes} bytes; send a row in each")
        if rest:
            yield bytes(rest)

    async def _read_pieces(self) -> AsyncIterator[bytes]:
        """Yield the body in pieces, inflated if it is compressed."""
        if self._encoding == IDENTITY:
            async for piece in self.request.pieces(QUICK_BYTES):
                yield piece
            return
        inflater, n_bytes = Inflater(self._encoding), self._max_line_bytes
        async for piece in self.request.pieces(QUICK_BYTES):
            n_bytes += MAX_RATIO * len(piece)
            for inflated in inflater.inflate(piece):
                if inflater.n_bytes > n_bytes:
                    raise ContentTooLarge(f"the body is more than {MAX_RATIO} times as long once it is inflated")
                yield inflated
        inflater.end()

    def _cut(self, block: bytes) -> Iterator[Part]:
        """Yield the lines of a block in parts, without empty ones."""
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n")
        arrays = self.service.model.arrays
        for text in cut_between_lines(block.strip(), QUICK_BYTES):
            part = Part(arrays, text, self._n_lines)
            if part.is_plain and part.n_lines <= self._max_lines:
                yield part
                continue
            lines = [line for line in text.split(b"\n") if line and not line.isspace()]
            for start in range(0, len(lines), self._max_lines):
                yield Part(arrays, b"\n".join(lines[start : start + self._max_lines]), self._n_lines)

    async def _answer_part(self, part: Part) -> bytes:
        if self.request.client_has_left is not None and self.request.client_has_left():
            raise ClientLeft
        if not part.read_quickly():
            await self.request.batcher.beside(functools.partial(part.read, self._hints))
        if part.n_rows:
            await self._predict(part, 0, part.n_rows)
        written = part.write()
        self._n_lines += part.n_lines
        return written

    async def _predict(self, part: Part, start: int, stop: int) -> None:
        """Predict some rows of a part. If that fails, its halves are tried, until the row that fails is alone."""
        X = part.X if (start, stop) == (0, part.n_rows) else part.X[start:stop]
        job = Job(stop - start, X=X, encode=functools.partial(part.take, start), is_alone=True)
        try:
            await self._call(job)
        except ClientLeft:
            raise
        except ServingError as error:
            if not self._n_lines and isinstance(error, TooManyRequests):
                raise
            part.refuse(start, stop, error)
            return
        except Exception:  # what an estimator raises has no bounds
            if stop - start == 1:
                self._note_failure()
                part.refuse(start, stop, InternalError(FAILED))
                return
        else:
            return
        middle = (start + stop) // 2
        await self._predict(part, start, middle)
        await self._predict(part, middle, stop)

    def _note_failure(self) -> None:
        if not self._has_failed:
            self._has_failed = True
            log.exception("request_failed", method=self.request.method, path=self.request.path)

    async def _call(self, job: Job) -> None:
        """Have a job predicted. In the middle of a stream it waits where the queue is full, as long as a call may."""
        end = time.monotonic() + self._timeout_s
        while True:
            try:
                await self.service.predict(self.request, job)
                return
            except TooManyRequests:
                if not self._n_lines or time.monotonic() > end:
                    raise
            await self.request.batcher.pause(PAUSE_S)


class Part:
    """Some lines, their rows, and the answers to both: the rows of X, or errors."""

    def __init__(self, arrays: Arrays, text: bytes, first: int) -> None:
        self._arrays, self._text, self._first = arrays, text, first
        self.n_lines = count_byte(text, NEWLINE) + 1
        # Each line begins and ends with a brace, and as many of them open one as there are lines: none is two rows, a
        # part of one, or empty.
        is_framed = text.startswith(b"{") and text.endswith(b"}") and text.count(BETWEEN_ROWS) == self.n_lines - 1
        self.is_plain = is_framed and count_byte(text, OPEN) == self.n_lines
        self._answers: list[bytes] = [b""] * self.n_lines
        self._places: list[int] | range = range(self.n_lines)  # of the rows among the lines
        self.X: Any = None  # (n_rows, n_features), or what else the estimator takes

    @property
    def n_rows(self) -> int:
        """The number of lines that are rows."""
        return len(self._places)

    def read_quickly(self) -> bool:
        """Read all lines at once, and return whether that could be done: each is a row, and fits."""
        if not self.is_plain or len(self._text) > 2 * QUICK_BYTES:  # more than parts have, but for a line that is long
            return False
        body = b"[%b]" % self._text.replace(b"\n", b",")
        with collector_off():
            X = self._arrays.of_numbers_in(body)
            if X is None:
                X = self._of_rows_in(body)
        self.X = X
        return X is not None

    def _of_rows_in(self, body: bytes) -> Any:
        try:
            rows = self._arrays.contract.check(parse_json(body))
        except BadRequest:
            return None
        return None if rows is None or len(rows) != self.n_lines else self._arrays.of_rows(rows)

    def read(self, hints: Hints) -> None:
        """Read line by line, and note what is wrong."""
        contract = self._arrays.contract
        rows: list[dict[str, Any]] = []
        self._places = places = []
        with collector_off():
            for place, line in enumerate(self._text.split(b"\n")):
                try:
                    if len(line) > PART_BYTES:
                        refuse_too_large(contract, line, ["body", self._first + place])
                    payload = _parse_line(line)
                    checked = None if isinstance(payload, list) else contract.check(payload)
                    if checked is None:
                        # As the one row of an array would be, with the number of its line.
                        misshapen = contract.find_shape([payload])
                        problems = [misshapen] if misshapen else contract.find_problems([payload], 0, hints)
                        raise contract.refusal(self._numbered(problems, place))
                except ServingError as error:
                    self._answers[place] = write_error(error)
                else:
                    places.append(place)
                    rows += checked
            self.X = self._arrays.of_rows(rows) if rows else None

    def _numbered(self, problems: Any, place: int) -> Iterator[dict[str, Any]]:
        for problem in problems:
            body, _, *names = problem["loc"]
            yield problem | {"loc": [body, self._first + place, *names]}

    def take(self, start: int, predictions: Predictions) -> None:
        """Take the answers to some rows of X."""
        answers = predictions.render()
        if len(answers) == self.n_lines:
            self._answers = answers
            return
        for place, answer in zip(self._places[start:], answers, strict=False):
            self._answers[place] = answer

    def refuse(self, start: int, stop: int, error: ServingError) -> None:
        """Answer some rows of X by an error."""
        for place in self._places[start:stop]:
            self._answers[place] = write_error(error)

    def write(self) -> bytes:
        """Return the answers, each with its newline."""
        return b"\n".join(self._answers) + b"\n"


def cut_between_lines(text: bytes, size: int) -> Iterator[bytes]:
    """Yield parts of whole lines, of about so many bytes each; one with a line that is longer has more."""
    n_parts = max(1, round(len(text) / size))
    start = seen = 0
    for number in range(1, n_parts):
        before, seen = seen, len(text) * number // n_parts
        end = text.rfind(b"\n", max(start, before), seen)
        if end >= 0:
            yield text[start:end]
            start = end + 1
    yield text[start:]


def _parse_line(line: bytes) -> Any:
    try:
        return parse_json(line, lambda text: PLACE.sub(r"at column \2", text))
    except BadRequest as error:
        raise BadRequest(error.detail.replace("the body", "the line", 1)) from None


def write_error(error: ServingError) -> bytes:
    """Return the answer to a line that is an error."""
    return to_json({"detail": error.detail}, inf_nan_mode="strings", fallback=str)

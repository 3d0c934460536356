"""From a body that takes long to decode to its answer, whatever dialect it is in."""

from __future__ import annotations

from typing import Any, Protocol

from serving.predictor.calls import Job
from serving.predictor.predictions import Predictions
from serving.web.messages import JSON, Request, Response
from serving.web.service import Service


class Body(Protocol):
    """A body of many rows, as a dialect reads it and writes its answer."""

    takes_long: bool  # to be decoded, so that it is done beside other requests

    @property
    def max_rows_in_it(self) -> int:
        """The number of rows that it may have, before it is decoded."""

    def decode(self) -> Any:
        """Return X, or None where there is nothing to predict. Raises `ServingError`."""

    def encode(self, predictions: Predictions | None) -> list[bytes]:
        """Return the pieces of the answer to the rows of X, or to none."""


async def predict_decoded(service: Service[Any], request: Request, body: Body, media_type: str = JSON) -> Response:
    """Answer a body by a call of its own."""
    if body.takes_long:
        job = Job(body.max_rows_in_it, encode=body.encode, decode=body.decode, is_alone=True)
    else:
        X = body.decode()
        if X is None:
            return Response(body.encode(None), media_type=media_type)
        job = Job(len(X), encode=body.encode, X=X, is_alone=True)
    try:
        return Response(await service.predict(request, job), media_type=media_type)
    finally:
        request.rows = job.n_rows

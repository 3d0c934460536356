"""Where the time of a request goes inside of the service: its parts by themselves, each in a tight loop.

`python -m bench.parts` prints microseconds of the shipped model. A server takes longer for the same: between the parts
of one request are those of others, or a wait, which leave less of it in the processor's caches.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any, cast

import app
from bench.wrk import flowers, make_bodies
from serving.logs import configure_logging
from serving.predictor.bodies import LongArray
from serving.predictor.calls import Job
from serving.web.asgi import ASGIEndpoint, asgi_request
from serving.web.service import Service
from serving.web.wsgi import run_now

LOOP_S = 0.002  # so short that some are without a turn of another process


def main() -> None:
    """Time the parts, and print them as a table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.parts", description=__doc__)
    parser.add_argument("--loops", type=int, default=350, help="of each part; the fastest counts")
    loops = parser.parse_args().loops
    with tempfile.TemporaryFile("w", buffering=1) as log, contextlib.redirect_stderr(log):
        rows = [f"| {name} | {measure_us(call, loops):.3g} |" for name, call in make_parts()]
    print("\n".join(["| part | µs |", "|---|---|", *rows]))


def make_parts() -> list[tuple[str, Callable[[], Any]]]:
    """Return the parts by name, of services that log to where stderr goes."""
    service, logging_service = make_service("false"), make_service("true")
    one, many, body = flowers()[:1], flowers()[:64], make_bodies(1000)[0].encode()
    X, X_1000 = (service.model.arrays.of_rows(rows) for rows in (one, json.loads(body)))
    model = service.model
    predictions = model.predict(X_1000)
    return [
        ("a request without its prediction", make_request(service, json.dumps(one[0]).encode())),
        ("the same with its access line", make_request(logging_service, json.dumps(one[0]).encode())),
        ("`predict_proba`, 1 row", lambda: model.predictor.estimator.predict_proba(X)),
        ("a call for 1 row: input, `predict_proba`, JSON", lambda: model.predict_rows(one).render()),
        ("a call for 64 rows", lambda: model.predict_rows(many).render()),
        ("1000 rows: JSON to numbers, checked", lambda: LongArray(model.arrays, body, 1000).read()),
        ("1000 rows: `predict_proba` and classes", lambda: model.predictor.predict(X_1000)),
        ("1000 rows: numbers to JSON", lambda: predictions.render_array(1000)),
    ]


def make_service(access: str) -> Service[app.Settings]:
    """Load the shipped model into a service with or without access lines."""
    os.environ["SERVING_LOGGING__ACCESS"] = access
    settings = app.load_settings()
    configure_logging(settings.logging)
    return app.make_service(settings)


def make_request(service: Service[app.Settings], body: bytes) -> Callable[[], Any]:
    """Return a call that has a request read, checked and answered, as uvicorn does, with an answer that is there."""

    class Answered:
        async def predict(self, job: Job) -> list[bytes]:
            return [b"{}"]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        pass

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "method": "POST", "path": "/predictions", "query_string": b"", "headers": headers}
    endpoint, batcher = ASGIEndpoint(service), cast(Any, Answered())
    return lambda: run_now(endpoint.respond(asgi_request(scope, receive, batcher), receive, send))


def measure_us(call: Callable[[], Any], loops: int) -> float:
    """Return the least time of a call over loops, when nothing disturbs it."""
    times_s = []
    for _ in range(loops):
        n_calls, spent_s, begun_s = 0, 0.0, time.perf_counter()
        while spent_s < LOOP_S:
            call()
            n_calls += 1
            spent_s = time.perf_counter() - begun_s
        times_s.append(spent_s / n_calls)
    return min(times_s) * 1e6


if __name__ == "__main__":
    main()

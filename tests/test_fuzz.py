"""Whatever is sent: no crash, no hang, no dead worker."""

import contextlib
import re
import socket
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import strategies
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.lib.cases import BAD, GOOD
from tests.lib.cloud_cases import CLOUD_BAD, CLOUD_GOOD, PREDICT_V1
from tests.lib.servers import Starter, gunicorn_environment
from tests.lib.sizes import TWINS, each_worker, scale

N_BYTES = scale(250, 1000)  # requests of bytes to each combination
N_CASES = scale(50, 250)  # requests of the document to each operation of each framework
SETTINGS = hypothesis.settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[*hypothesis.HealthCheck],
)
ENVELOPES = ("/invocations", PREDICT_V1)
WHOLE = [case.raw() for case in GOOD + BAD + CLOUD_GOOD + CLOUD_BAD if len(case.raw()) < 2000 and not case.cut]


@strategies.composite
def spoilt(draw: strategies.DrawFn) -> bytes:
    """One request or two of the tables with some bytes replaced, left out, repeated or put in."""
    raw = b"".join(draw(strategies.lists(strategies.sampled_from(WHOLE), min_size=1, max_size=2)))
    for _ in range(draw(strategies.integers(1, 4))):
        start = draw(strategies.integers(0, len(raw)))
        end = start + draw(strategies.integers(0, 8))
        new = draw(
            strategies.binary(max_size=8) | strategies.sampled_from([b"\r\n", b"\0", b": ", b"\xff", raw[start:]])
        )
        raw = raw[:start] + new + raw[end:]
    return raw


@each_worker()
def test_no_bytes_are_a_crash(serve: Starter, combination: tuple[str, str]) -> None:
    """Spoilt requests, and bytes that never were one, get an answer below 500 or the connection's end, in time."""
    server = serve(**gunicorn_environment(*combination, SERVING_SERVER__KEEPALIVE="1"))
    workers = server.worker_pids

    @hypothesis.settings(SETTINGS, max_examples=N_BYTES)
    @hypothesis.given(spoilt() | strategies.binary(max_size=200))
    def send(raw: bytes) -> None:
        answer = b""
        with server.connect() as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(raw)
                client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                answer = b"".join(iter(lambda: client.recv(65_536), b""))
        assert not [status for status in re.findall(rb"^HTTP/1\.1 (\d+)", answer, re.MULTILINE) if status >= b"500"]

    send()
    assert server.worker_pids == workers
    assert not [line for line in server.lines if line["level"] in ("error", "critical")]
    server.stop()


def beyond(path: str) -> list[Any]:
    """Return the checks that a path cannot pass: no schema says that a tensor has as many elements as its shape, that
    columns have one length, or what CSV is."""
    return [positive_data_acceptance] if path.endswith("/infer") or path in ENVELOPES else []


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("combination", TWINS, ids="-".join)
def test_document_is_kept_to(serve: Starter, combination: tuple[str, str]) -> None:
    """What schemathesis makes of `/openapi.json`, good and bad, is answered as the document says."""
    server = serve(**gunicorn_environment(*combination))
    url = f"http://127.0.0.1:{server.port}"
    schema = schemathesis.openapi.from_dict(requests.get(f"{url}/openapi.json", timeout=10).json())
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    n_requests = 0
    with requests.Session() as session:
        for operation in schema.get_all_operations():
            strategy = strategies.one_of(*(operation.ok().as_strategy(generation_mode=mode) for mode in modes))

            @hypothesis.settings(SETTINGS, max_examples=N_CASES)
            @hypothesis.given(strategy)
            def send(case: schemathesis.Case) -> None:
                nonlocal n_requests
                n_requests += 1
                case.call_and_validate(
                    base_url=url, session=session, timeout=20, excluded_checks=beyond(case.operation.path)
                )

            send()
    assert n_requests > N_CASES
    assert not [line for line in server.lines if line["level"] in ("error", "critical")]
    server.stop()

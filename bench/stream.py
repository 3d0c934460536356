"""A stream of JSON lines beside arrays of the same rows over one connection: their times, and the stream's memory."""

import functools
import http.client
import itertools
import json
import statistics
import subprocess
import time
from contextlib import closing
from pathlib import Path

from bench.judge import Result
from bench.servers import BenchError, MeasuredServer
from bench.wrk import flowers
from serving.web.messages import JSON, JSONL
from tests.lib.proc import peak_mb, resident_mb

STREAM_ROWS = 1_000_000
READ_BYTES = 1 << 20
ARRAY_ROWS = 10_000  # of one request: the default of `limits.max_rows`
CURL = ["curl", "--silent", "--show-error", "--fail", "--request", "POST", "--header", f"Content-Type: {JSONL}"]
CHUNKED = ["--header", "Transfer-Encoding: chunked", "--upload-file"]


class Stream:
    """Rows of iris over and over, as a file of JSON lines and as the bodies of requests."""

    def __init__(self, rows: int, folder: Path) -> None:
        lines = [json.dumps(row) for row in flowers()]
        self.rows, self.file = rows, folder / f"{rows}.jsonl"
        with self.file.open("w") as file:
            file.writelines(f"{line}\n" for line in itertools.islice(itertools.cycle(lines), rows))
        endless = itertools.cycle(lines)
        sizes = [min(ARRAY_ROWS, rows - start) for start in range(0, rows, ARRAY_ROWS)]
        self.arrays = [f"[{','.join(itertools.islice(endless, size))}]".encode() for size in sizes]

    def send(self, server: MeasuredServer) -> float:
        """Have curl send the lines, and return the seconds until the last answer; BenchError if one is missing."""
        begun_s = time.perf_counter()
        command = [*CURL, *CHUNKED, str(self.file), f"{server.url}/predictions"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as curl:
            assert curl.stdout
            read = functools.partial(curl.stdout.read, READ_BYTES)
            n_answers = sum(chunk.count(b"\n") for chunk in iter(read, b""))
        self._check(server, n_answers)
        return time.perf_counter() - begun_s

    def send_arrays(self, server: MeasuredServer) -> float:
        """Send the arrays one after the other, and return the seconds until the last answer."""
        begun_s, n_answers = time.perf_counter(), 0
        with closing(http.client.HTTPConnection("127.0.0.1", server.port)) as client:
            for array in self.arrays:
                client.request("POST", "/predictions", array, {"Content-Type": JSON})
                n_answers += client.getresponse().read().count(b'{"prediction"')
        self._check(server, n_answers)
        return time.perf_counter() - begun_s

    def _check(self, server: MeasuredServer, n_answers: int) -> None:
        if n_answers != self.rows:
            raise BenchError(f"{server.deployment.label} answered {n_answers} of {self.rows} rows")


def stream_results(
    stream: Stream, framework: str, server: MeasuredServer | None, rounds: int, why: str
) -> list[Result]:
    """Return what a stream adds to a worker that has answered single rows, and how fast it is beside arrays.

    Without a server, `why` says why there is none.
    """
    ratio_title = f"{stream.rows:,} rows as a stream of JSON lines / as arrays of {ARRAY_ROWS:,}, {framework}"
    memory_title = f"memory of a worker that such a stream takes, {framework}"
    ratio, added_mb, told, against, size = None, None, why, "", why
    if server is not None:
        (pid,) = server.worker_pids
        before_mb = resident_mb(pid)
        stream.send(server)
        added_mb, size = peak_mb(pid) - before_mb, f"{stream.file.stat().st_size / 1e6:.0f} MB of lines"
        times_s = [(stream.send(server), stream.send_arrays(server)) for _ in range(rounds)]
        ratio = statistics.median(arrays_s / stream_s for stream_s, arrays_s in times_s)
        told, against = (f"{stream.rows / statistics.median(each):,.0f} rows/s" for each in zip(*times_s, strict=True))
    return [
        Result(ratio_title, told, against, ratio, 0.9),
        Result(memory_title, size, "", added_mb, 16, "MB", at_most=True),
    ]

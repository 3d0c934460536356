"""Load from wrk: the requests it sends, and what it measured."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_iris

from bench.references import IRIS_FEATURES
from serving.web.messages import JSON, JSONL

INSTALL = "wrk, which makes the load, is not installed: `apt-get install wrk` (Debian, Ubuntu), `brew install wrk`"
ANSWER_TIMEOUT_S = 60  # beyond the slowest server's queue
SCRIPT = """
local requests, sent = {}, 0
function init(args)
  for i, body in ipairs({BODIES}) do
    requests[i] = wrk.format("POST", "PATH", {HEADERS}, body)
  end
end
function request()
  sent = sent + 1
  return requests[sent % #requests + 1]
end
function done(summary, latency)
  local e = summary.errors
  local n_failed = e.connect + e.read + e.write + e.status + e.timeout
  io.write(string.format('\\n{"requests_s": %f, "p50_us": %f, "p99_us": %f, "n_failed": %d}\\n',
    summary.requests / summary.duration * 1e6, latency:percentile(50), latency:percentile(99), n_failed))
end
"""


@dataclass(frozen=True)
class Sample:
    """One measurement; `n_failed` counts answers of 400 and above, and what went wrong with connections."""

    requests_s: float
    p50_us: float
    p99_us: float
    n_failed: int


def flowers() -> list[dict[str, float]]:
    """Return the 150 rows of iris in their order: fifty of each species."""
    return [dict(zip(IRIS_FEATURES, row, strict=True)) for row in load_iris().data.tolist()]


def make_bodies(rows: int) -> list[str]:
    """Return bodies to cycle over, no two alike in a row: an object for one row, an array for more."""
    instances = flowers()
    if rows == 1:
        return [json.dumps(row) for row in instances]
    shifted = [[instances[(start + place) % len(instances)] for place in range(rows)] for start in (0, 50, 100)]
    return [json.dumps(batch) for batch in shifted]


def as_tensor(body: str, is_binary: bool = False) -> tuple[bytes, int | None]:
    """Return rows in JSON as a tensor of numbers, and how many bytes are JSON if it follows in bytes."""
    rows = json.loads(body)
    cells = [[*row.values()] for row in (rows if isinstance(rows, list) else [rows])]
    tensor: dict[str, Any] = {"name": "flowers", "shape": [len(cells), len(cells[0])], "datatype": "FP64"}
    if not is_binary:
        flat = [cell for row in cells for cell in row]  # as `tritonclient` sends them
        return json.dumps({"inputs": [tensor | {"data": flat}]}).encode(), None
    data = np.array(cells).tobytes()
    tensor["parameters"] = {"binary_data_size": len(data)}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + data, len(head)


def as_lines(body: str) -> tuple[bytes, int | None]:
    """Return rows in JSON as JSON lines."""
    return "\n".join(map(json.dumps, json.loads(body))).encode(), None


FORMS: dict[str, Callable[[str], tuple[bytes, int | None]]] = {
    "rows": lambda body: (body.encode(), None),
    "lines": as_lines,
    "tensor": as_tensor,
    "binary tensor": lambda body: as_tensor(body, is_binary=True),
}


def write_script(path: str, rows: int, file: Path, form: str = "rows") -> None:
    """Write what has wrk POST such bodies to a path, each request made before the first is sent."""
    made = [FORMS[form](body) for body in make_bodies(rows)]
    bodies = ",".join('"' + "".join(f"\\{byte:03d}" for byte in body) + '"' for body, _ in made)
    lengths = {length for _, length in made}
    headers = f'["Content-Type"] = "{JSONL if form == "lines" else JSON}"'
    if lengths != {None}:
        (length,) = lengths
        headers = f'["Content-Type"] = "application/octet-stream", ["Inference-Header-Content-Length"] = "{length}"'
    file.write_text(SCRIPT.replace("BODIES", bodies).replace("HEADERS", headers).replace("PATH", path))


def run_wrk(url: str, script: Path, connections: int, seconds: int = 1) -> Sample:
    """Load a server for whole seconds, the only ones that wrk takes."""
    options = ["-t1", f"-c{connections}", f"-d{seconds}s", f"--timeout={ANSWER_TIMEOUT_S}s", "-s", str(script)]
    done = subprocess.run(["wrk", *options, url], capture_output=True, text=True, check=True)
    return parse(done.stdout)


def parse(output: str) -> Sample:
    """Read the line that the script has wrk print at its end."""
    return Sample(**json.loads(output.splitlines()[-1]))

"""Load from wrk: the requests it sends, and what it measured."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sklearn.datasets import load_iris

from bench.references import IRIS_FEATURES

INSTALL = "wrk, which makes the load, is not installed: `apt-get install wrk` (Debian, Ubuntu), `brew install wrk`"
ANSWER_TIMEOUT_S = 60  # beyond the slowest server's queue
SCRIPT = """
local requests, sent = {}, 0
function init(args)
  for i, body in ipairs({BODIES}) do
    requests[i] = wrk.format("POST", "PATH", {["Content-Type"] = "application/json"}, body)
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


def write_script(path: str, rows: int, file: Path) -> None:
    """Write what has wrk POST such bodies to a path, each request made before the first is sent."""
    bodies = ",".join(f"[==[{body}]==]" for body in make_bodies(rows))
    file.write_text(SCRIPT.replace("BODIES", bodies).replace("PATH", path))


def run_wrk(url: str, script: Path, connections: int, seconds: int = 1) -> Sample:
    """Load a server for whole seconds, the only ones that wrk takes."""
    options = ["-t1", f"-c{connections}", f"-d{seconds}s", f"--timeout={ANSWER_TIMEOUT_S}s", "-s", str(script)]
    done = subprocess.run(["wrk", *options, url], capture_output=True, text=True, check=True)
    return parse(done.stdout)


def parse(output: str) -> Sample:
    """Read the line that the script has wrk print at its end."""
    return Sample(**json.loads(output.splitlines()[-1]))

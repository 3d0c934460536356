"""A log that cannot be written: its reader is gone or stopped, its disk is full, or there is none at all."""

import contextlib
import errno
import fcntl
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serving import output
from serving.logs import LoggingSettings, configure_logging
from serving.output import MAX_PENDING_BYTES, LossyOutput
from tests.lib.artifacts import edit, lay_out
from tests.lib.clients import ROW, post_case
from tests.lib.load import Load, pause_s
from tests.lib.servers import BIN, GUNICORN, PROJECT, Server, find_free_port, wait_for_model, wait_until
from tests.lib.sizes import TWINS, scale

F_SETPIPE_SZ = 1031  # fcntl(2)
GRACEFUL_S = 30


class Pipe:
    """A pipe of one page, which few lines fill, read by nobody."""

    def __init__(self, blocking: bool) -> None:
        self.reading, self.writing = os.pipe()
        fcntl.fcntl(self.writing, F_SETPIPE_SZ, 4096)
        os.set_blocking(self.writing, blocking)
        os.set_blocking(self.reading, False)

    def read(self) -> bytes:
        """Return what there is to read now."""
        with contextlib.suppress(BlockingIOError):
            return os.read(self.reading, 65_536)
        return b""


@contextlib.contextmanager
def reader_that_leaves(tmp_path: Path) -> Iterator[dict[str, Any]]:
    pipe = Pipe(blocking=True)
    left = threading.Event()

    def read() -> None:
        while not left.wait(0.01):
            pipe.read()
        os.close(pipe.reading)

    reader = threading.Thread(target=read)
    reader.start()

    def leave() -> None:
        left.set()
        reader.join()

    yield {"stderr": pipe.writing, "break_it": leave}
    os.close(pipe.writing)
    leave()


@contextlib.contextmanager
def pipe_that_nobody_reads(tmp_path: Path, blocking: bool) -> Iterator[dict[str, Any]]:
    pipe = Pipe(blocking)
    yield {"stderr": pipe.writing, "pipe": pipe}
    os.close(pipe.reading)
    os.close(pipe.writing)


@contextlib.contextmanager
def file_that_reaches_its_limit(tmp_path: Path) -> Iterator[dict[str, Any]]:
    with (tmp_path / "log").open("wb") as stream:
        yield {"stderr": stream, "shell": f"ulimit -f 8; exec {GUNICORN}"}


@contextlib.contextmanager
def full_device(tmp_path: Path) -> Iterator[dict[str, Any]]:
    with open("/dev/full", "wb") as stream:
        yield {"stderr": stream}


@contextlib.contextmanager
def closed_output(tmp_path: Path) -> Iterator[dict[str, Any]]:
    yield {"shell": f"exec {GUNICORN} 2>&- >&-"}


WAYS: dict[str, Callable[[Path], contextlib.AbstractContextManager[dict[str, Any]]]] = {
    "reader leaves": reader_that_leaves,
    "nobody reads": lambda path: pipe_that_nobody_reads(path, blocking=True),
    "nobody reads, non-blocking": lambda path: pipe_that_nobody_reads(path, blocking=False),
    "disk full": file_that_reaches_its_limit,
    "device full": full_device,
    "closed": closed_output,
}


@pytest.mark.parametrize("way", WAYS)
def test_broken_log_costs_nothing(tmp_path: Path, way: str) -> None:
    """No request fails; HUP is taken, a broken one refused, a killed worker replaced; TERM drains as ever."""
    in_turn = [TWINS[[*WAYS].index(way) % 2]]
    with ThreadPoolExecutor(2) as pool:  # two side by side, so that reloads have a core beside the load
        pairs = scale(in_turn, TWINS)
        checks = [pool.submit(check_combination, tmp_path / "-".join(pair), pair, WAYS[way]) for pair in pairs]
        for pair, check in zip(pairs, checks, strict=True):
            assert check.exception() is None, (pair, check.exception())


def check_combination(folder: Path, combination: tuple[str, str], break_log: Any) -> None:
    folder.mkdir()
    file, port = lay_out(folder, *combination), find_free_port()
    edit(file, ("access = false", ""), (":0", f":{port}"))
    with break_log(folder) as log:
        command = ["bash", "-c", log["shell"]] if "shell" in log else GUNICORN
        environment = {"SERVING_SETTINGS": str(file), "PYTHONUNBUFFERED": ""}
        server = Server(command, folder / "out", PROJECT, port, stderr=log.get("stderr"), **environment).wait()
        try:
            log.get("break_it", lambda: None)()
            check_all_works(server, file)
        finally:
            server.stop(signal.SIGKILL)


def reload_unseen(server: Server, name: str) -> None:
    """Send HUP, and wait until all workers have the model of that name and those before have ended: no log tells.

    Before that another HUP would give the reload up, although new workers answer already.
    """
    before = {*server.worker_pids}
    os.kill(server.process.pid, signal.SIGHUP)
    wait_for_model(server, name)
    wait_until(lambda: before.isdisjoint(server.worker_pids), "the workers from before to end")


def check_all_works(server: Server, file: Path) -> None:
    requests = scale(200, 500)
    with Load(server, post_case(ROW), clients=2, pause_s=pause_s()) as load:
        load.wait_for(requests)
        edit(file, ('"iris"', '"second"'))
        reload_unseen(server, "second")
        edit(file, ("name", "nmae"))
        os.kill(server.process.pid, signal.SIGHUP)
        load.wait_for(requests)
        wait_for_model(server, "second")
        edit(file, ("nmae", "name"), ('"second"', '"third"'))
        reload_unseen(server, "third")
        load.wait_for(requests)
    assert (load.failures, [*load.answers]) == ([], [200])
    assert server.exchange(b"nonsense\r\n\r\n").status == 400
    killed, *_ = server.wait_for_workers(2)
    server.replace(killed, signal.SIGKILL)
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < GRACEFUL_S / 2


@pytest.mark.parametrize("name", ["check-config", "print-config"])
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_broken_log_does_not_stop_a_check(quick_model: dict[str, str], name: str, redirection: str) -> None:
    """Without a log to write to, gunicorn's checks end with the status that they would have."""
    command, environment = f"{BIN}/{GUNICORN} --{name} {redirection}", os.environ | quick_model
    done = subprocess.run(command, shell=True, cwd=PROJECT, env=environment, stdout=subprocess.PIPE)
    assert done.returncode == 0


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe(blocking=True)
    yield pipe
    os.close(pipe.reading)
    os.close(pipe.writing)


def test_lost_lines_are_counted_and_told_once(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a reader that pauses all lines are whole, and those that it did not get are told once it reads again."""
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(LossyOutput(pipe.writing), line_buffering=True))
    configure_logging(LoggingSettings(format="json"))
    number = 20_000
    for index in range(number):
        output.log.info("line", index=index)
    text = b""
    while b"log_lines_lost" not in text:
        text += pipe.read()
        sys.stderr.flush()
    sys.stderr.flush()
    events = [json.loads(line) for line in (text + pipe.read()).splitlines()]
    lost = [event["lines"] for event in events if event["event"] == "log_lines_lost"]
    indices = [event["index"] for event in events if event["event"] == "line"]
    assert indices == list(range(len(indices)))
    assert len(lost) == 1
    assert len(indices) + lost[0] == number
    assert 4096 < len(text) < 2 * MAX_PENDING_BYTES  # which is all that was kept


def test_last_lines_are_waited_for(pipe: Pipe) -> None:
    """A process that ends gives a slow reader a moment for the lines that wait."""
    code = """
from serving import logs, output
output.protect_output()
logs.configure_logging(logs.LoggingSettings(format="json"))
output.LAST_LINES_S = 10  # for which a busy machine may take long
for index in range(100):
    output.log.info("line", index=index)
print("all are logged")
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=pipe.writing) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"all are logged\n"
        text = b""
        while process.poll() is None:
            text += pipe.read()
            time.sleep(0.01)
    events = [json.loads(line) for line in (text + pipe.read()).splitlines()]
    assert [event["index"] for event in events] == [*range(100)]


def test_line_that_was_cut_ends_before_the_next(tmp_path: Path) -> None:
    """A line of which a full disk took a part is ended before the next, and counted."""
    code = """
import os, resource, sys
from serving import logs, output
output.protect_output()
logs.configure_logging(logs.LoggingSettings(format="json"))
output.log.info("x" * 400)
output.log.info("y" * 400)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
output.log.info("z")
"""
    log = tmp_path / "log"
    with log.open("wb") as stream:
        limit = (600, resource.RLIM_INFINITY)
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=PROJECT,
            stderr=stream,
            check=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        )
    whole, cut, *later = log.read_bytes().splitlines()
    assert json.loads(whole)["event"] == "x" * 400
    assert cut.startswith(b'{"event":"yyy')
    assert [json.loads(line)["event"] for line in later] == ["z", "log_lines_lost"]
    assert json.loads(later[1])["lines"] == 1


def test_code_that_closes_the_output_closes_nothing(tmp_path: Path) -> None:
    """After an estimator has closed `sys.stderr`, or the descriptor, the log has its lines, and no later file does."""
    code = """
import os, sys
from serving import logs, output
output.protect_output()
logs.configure_logging(logs.LoggingSettings(format="json"))
sys.stderr.close()
os.close(2)
assert os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT) == 2
output.log.info("kept")
print("kept too", file=sys.stderr)
"""
    log, other = tmp_path / "log", tmp_path / "other"
    with log.open("wb") as stream:
        subprocess.run([sys.executable, "-c", code, str(other)], cwd=PROJECT, stderr=stream, check=True)
    first, second = log.read_text().splitlines()
    assert json.loads(first)["event"] == "kept"
    assert second == "kept too"
    assert other.read_bytes() == b""


def test_journal_gets_lines_without_waiting() -> None:
    """Standard error may be a socket, as systemd's journal has it: it gets whole lines, and a full one stops nobody."""
    reading, writing = socket.socketpair()
    with reading, writing:
        output = LossyOutput(writing.fileno())
        for _ in range(20_000):
            output.write(b"x" * 99 + b"\n")
        assert reading.recv(100) == b"x" * 99 + b"\n"


@pytest.mark.parametrize("can_ask", [True, False], ids=["asked", "polled"])
def test_pipe_of_another_user_gets_lines_without_waiting(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch, can_ask: bool
) -> None:
    """Where a pipe cannot be opened anew, no write to it waits, and what is written is whole lines in order."""
    monkeypatch.setattr(os, "open", refuse_access)
    if not can_ask:
        monkeypatch.delattr(os, "pwritev")
    output = LossyOutput(pipe.writing)
    monkeypatch.undo()
    if not can_ask:
        monkeypatch.delattr(os, "pwritev")
    for index in range(10_000):
        output.write(b"%08d" % index + b"x" * 91 + b"\n")
    text = pipe.read()
    assert 0 < len(text) <= 4096
    assert [int(line[:8]) for line in text.splitlines()] == list(range(len(text) // 100))


def refuse_access(path: str, *_: Any, **__: Any) -> int:
    raise PermissionError(errno.EACCES, "Permission denied", path)


def test_line_in_the_middle_of_a_line_harms_neither(tmp_path: Path) -> None:
    """A signal's handler that logs while a line is written leaves both whole, each once."""
    log = (tmp_path / "log").open("wb")
    output = LossyOutput(log.fileno())
    send = output._send

    def send_and_log(line: bytes) -> int:
        if not line.startswith(b"inner"):
            output.write(b"inner\n")
        return send(line)

    output._send = send_and_log
    for _ in range(3):
        output.write(b"outer\n")
    output._keep(b"kept\n", is_begun=False)  # as beside a slow reader
    output.flush()
    lines = Path(log.name).read_bytes().split()
    assert sorted(lines) == [b"inner"] * 4 + [b"kept"] + [b"outer"] * 3
    assert (output._pending_bytes, output._lost) == (0, 0)
    log.close()


def test_lines_that_wait_are_not_written_twice(pipe: Pipe) -> None:
    """A process that is forked while lines wait does not write its parent's."""
    output = LossyOutput(pipe.writing)
    for index in range(1000):
        output.write(b"%08d\n" % index)
    pid = os.fork()
    if pid == 0:
        try:
            output.flush()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    text = b""
    while len(text) < 9000:
        text += pipe.read()
        output.flush()
    assert [int(line) for line in text.split()] == list(range(1000))

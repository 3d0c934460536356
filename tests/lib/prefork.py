"""Commands started by a process that has imported their libraries already, for a fifth of what a start costs otherwise.

Each has a session, an environment, a folder and an output of its own, and ends as a program does. Limits of resources
and the seed of hashes are those of the process that forks it. What a shell has to start (`2>&-`) is started by one, and
with `--full` commands of tests about the start are programs of their own.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

# Not gunicorn's own modules: they look at folder and environment when they are imported.
LIBRARIES = """
    a2wsgi fastapi flask.cli gevent.monkey httptools jiter joblib pydantic_settings skops.io sklearn.ensemble
    sklearn.linear_model sklearn.pipeline structlog threadpoolctl uvicorn.main uvicorn.protocols.http.httptools_impl
    uvloop tests.lib.preloaded
"""
PROGRAMS = {"flask", "gunicorn", "python", "uvicorn"}
REPLACED = {"--daemon", "--debug", "--reload"}  # with these others are started in place of the first
BIN = Path(sys.executable).parent
is_on = True  # set before each test


def takes(command: list[str]) -> bool:
    """Return whether a command is to be started in this way."""
    return is_on and command[0] in PROGRAMS and not REPLACED & {*command}


class Forked:
    """A command as a process: what the tests use of `subprocess.Popen`."""

    def __init__(self, command: list[str], cwd: Path, env: dict[str, str], stdout: int, stderr: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES.split())
        self.args = command
        self._process = context.Process(target=become, args=(command, str(cwd), env, DupFd(stdout), DupFd(stderr)))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and its status is on the way
                os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(command: list[str], cwd: Path, env: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and return how it ended and what it printed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = Forked(command, cwd, env, out.fileno(), err.fileno())
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, status, out.read(), err.read())


def become(command: list[str], cwd: str, env: dict[str, str], stdout: Any, stderr: Any) -> None:
    """Turn this process into the one that the command would be."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for stream, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(stream.detach(), descriptor)
    folders = [*filter(None, env.get("PYTHONPATH", "").split(":")), *library_folders()]
    try:
        execute(command, cwd, folders)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:  # in each process that it forks too, as in a program
        try:
            threading._shutdown()  # type: ignore[attr-defined]
        finally:  # whatever that raised
            atexit._run_exitfuncs()


def execute(command: list[str], cwd: str, folders: list[str]) -> None:
    """Run a program as Python would, with these folders behind the one that a program has for its modules."""
    if command[:2] == ["python", "-m"]:
        sys.argv[:], sys.path[:] = command[2:], [cwd, *folders]
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    elif command[:2] == ["python", "-c"]:
        sys.argv[:], sys.path[:] = command[1:2] + command[3:], ["", *folders]
        exec(command[2], {"__name__": "__main__"})
    else:
        sys.argv[:] = command[1:] if command[0] == "python" else [str(BIN / command[0]), *command[1:]]
        sys.path[:] = [str(Path(sys.argv[0]).absolute().parent), *folders]
        runpy.run_path(sys.argv[0], run_name="__main__")


def library_folders() -> list[str]:
    """Return where Python looks for modules when nobody has added anything."""
    return [folder for folder in sys.path if folder.startswith(sys.base_prefix) or folder.startswith(sys.prefix)]

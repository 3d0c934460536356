"""While developing: files that are no sources, such as the settings, are watched by the reloader as sources are.

`flask --debug` and `uvicorn --reload` run the app in a child, and start another when a source changes. Neither asks the
app for other files. So the child looks at them, and touches a source when one has changed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import structlog

from serving.errors import StartupError, exit_on_startup_error, print_error

log = structlog.get_logger()

Times = Mapping[Path, int | None]  # of the last change, in nanoseconds; None where there is no file
POLL_S = 0.5
START_ANEW = 3  # status with which a child has Flask's reloader start another


def is_reloaded() -> bool:
    """Return whether this process is the child of a reloader, Flask's or uvicorn's."""
    is_of_uvicorn = multiprocessing.parent_process() is not None and "--reload" in sys.argv
    return is_of_uvicorn or os.environ.get("WERKZEUG_RUN_MAIN") == "true"


def look_at(files: Iterable[Path]) -> Times:
    """Return when each file was changed."""
    return {file: _changed_at(file) for file in files}


def _changed_at(file: Path) -> int | None:
    with contextlib.suppress(OSError):  # an editor may put another in its place just now
        return file.stat().st_mtime_ns
    return None


def touch_after_change(seen: Times, source: Path) -> None:
    """Touch a source once one of the files is not as it was seen. It returns at once."""
    threading.Thread(target=_touch_after_change, args=(seen, source), name="watch", daemon=True).start()


@contextlib.contextmanager
def exit_or_wait(find: Callable[[], Iterable[Path]], project: Path) -> Iterator[None]:
    """End the process with the message of a `StartupError`, the child of a reloader when it may have been mended.

    `find` returns the files to watch beside the project's sources.
    """
    if not is_reloaded():
        with exit_on_startup_error():
            yield
        return
    seen = look_at([*find(), *project.glob("*.py"), *project.glob("serving/**/*.py")])
    try:
        yield
    except StartupError as error:
        print_error(error)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # uvicorn's would wait for a server that there is not
        _touch_after_change(seen, project / "app.py")
        sys.exit(START_ANEW)


def _touch_after_change(seen: Times, source: Path) -> None:
    while look_at(seen) == seen:
        time.sleep(POLL_S)
    try:
        source.touch()
    except OSError as error:  # it is another user's
        log.warning("not_reloaded", reason=f"{source} cannot be touched: {error.strerror}", hint="start it anew")

"""What an estimator's own code did when it failed: whether rows are to blame, and where it was."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

from serving.errors import reason_of
from serving.predictor.contract import Rows

# Errors that values seldom cause.
ERRORS_OF_CODE = (TypeError, AttributeError, LookupError, NameError, ImportError, RecursionError, NotImplementedError)
LIBRARIES = tuple(f"{Path(sysconfig.get_path(name)).resolve()}{os.sep}" for name in ("stdlib", "platlib", "purelib"))
SERVING = f"{Path(__file__).resolve().parents[1]}{os.sep}"


def is_fault_of_code(error: BaseException, rows: Rows) -> bool:
    """Whether an error says that code is wrong for all rows; a cell that is looked up in vain is a row's."""
    if not isinstance(error, ERRORS_OF_CODE):
        return False
    sought = error.args[0] if isinstance(error, LookupError) and error.args else None
    cells = [cell for row in rows for cell in row.values() if type(cell) is type(sought)]
    return sought is None or sought not in cells


def tell(error: BaseException) -> str:
    """Return an error in one line, with the place in code of the user's, or else the estimator, in which it was."""
    place = _find_place(error) or (_find_place(error.__cause__) if error.__cause__ else "")
    return f"{reason_of(error)} (in {place})" if place else reason_of(error)


def _find_place(error: BaseException) -> str:
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    for frame, line in reversed(frames):
        if _is_of_the_user(frame.f_code.co_filename):
            return f"{frame.f_code.co_qualname}, {frame.f_code.co_filename}:{line}"
    parts = [part for frame, _ in frames if hasattr(part := frame.f_locals.get("self"), "fit")]
    return type(parts[-1]).__name__ if parts else ""


def _is_of_the_user(filename: str) -> bool:
    """Whether a file is none of a library's, which compiled ones name without a folder, nor of the service's."""
    if filename.startswith("<"):
        return not filename.startswith(("<frozen", "<__array_function__"))
    return os.path.isabs(filename) and not os.path.realpath(filename).startswith((*LIBRARIES, SERVING))

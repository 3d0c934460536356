"""Modules that an artifact names: where they are looked for, and why an artifact that names them fails to load."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import importlib.metadata
import lzma
import pickle
import re
import struct
import sys
import traceback
import types
import zipfile
import zlib
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

import sklearn

from serving.errors import ModelError, reason_of
from serving.predictor import skops_file

OWN_SCRIPTS = ("model", "bench")  # the project's folders of scripts, which no artifact means
OWN_MODULES = ("app", "serving", "processes")
PASSING_ON = {*OWN_MODULES, "joblib", "skops", "cloudpickle"}  # what calls the code in which a load fails
DAMAGES = (EOFError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error)

# The version of scikit-learn that a pickle, or the schema of a skops file, has behind this name.
VERSION = re.compile(
    rb'_sklearn_version(?:": \{[^}]*?"content": "\\"|.{1,16}?)(\d+(?:\.\d+)+(?:\.?(?:a|b|rc|dev|post)\d+)*)', re.DOTALL
)

UNPACKERS: dict[bytes, Callable[[bytes], bytes]] = {  # by the first bytes of what joblib has compressed
    b"\x78": zlib.decompress,
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ": lzma.decompress,
    b"\x5d\0\0": lzma.decompress,
}


def add_module_folder(folder: Path) -> None:
    """Have Python look for modules in a folder too, after all others: none there shadows what the service needs."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()
    for name in filter(_is_folder, OWN_SCRIPTS):
        spec = PathFinder.find_spec(name)
        if spec is not None and spec.origin is not None:
            del sys.modules[name]  # a folder without `__init__.py` gives way to a module, once it is looked for


def find_sklearn_version(data: bytes) -> str | None:
    """Return another version of scikit-learn than this one with which an artifact says that it was made."""
    with contextlib.suppress(ModelError, OSError, ValueError, RuntimeError, *DAMAGES):
        unpackers = UNPACKERS | {b"PK": skops_file.unpack}
        data = next((unpack(data) for start, unpack in unpackers.items() if data.startswith(start)), data)
    found = (match.group(1).decode() for match in VERSION.finditer(data))
    return next((version for version in found if version != sklearn.__version__), None)


def find_misfit(path: Path) -> str:
    """Return that an artifact is of another scikit-learn, which may be why it fails, to follow what it fails with."""
    with contextlib.suppress(OSError):
        if version := find_sklearn_version(path.read_bytes()):
            return f"; it was made with another scikit-learn ({version}), here {sklearn.__version__}; save it anew"
    return ""


def explain(error: BaseException, data: bytes, folder: Path) -> str | None:
    """Return why an artifact of these bytes fails to load, where its bytes are whole; None where they may not be."""
    if isinstance(error, DAMAGES):
        return None
    module, place = _find_failing(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return _explain_module(error.name, data, folder, f" for {place}" if module else "")
    if module is None and (missing := _find_missing(error)):
        if _is_folder(missing[0]):
            return _explain_module(missing[0], data, folder)
        return _explain_lack(missing[0], f"{missing[1]!r} of the module {missing[0]!r}", data, folder)
    if isinstance(error, SyntaxError):
        line = f" in line {error.lineno}" if error.lineno else ""
        return f"needs {error.filename or 'a module'}, which is no Python{line}: {error.msg}"
    if isinstance(error, UnicodeDecodeError):
        return "was made by Python 2; save it anew"
    if module is not None:
        return _of_another(module, data, reason_of(error)) or f"runs code that fails: {place}: {reason_of(error)}"
    is_refusal = isinstance(error, TypeError | KeyError | AttributeError)  # of a constructor that is no Python
    return _of_another("sklearn", data, reason_of(error)) if is_refusal and find_sklearn_version(data) else None


def _explain_module(name: str, data: bytes, folder: Path, user: str = "") -> str:
    parent = name.rpartition(".")[0]
    if name.partition(".")[0] in OWN_MODULES or _file_of(parent):
        return _explain_lack(parent or name, f"the module {name!r}", data, folder)
    where = f"neither installed, nor in the settings file's folder {folder}"
    return (
        f"needs the module {name!r}{user}, which is {where}; install it, put it there, or name its folder in PYTHONPATH"
    )


def _explain_lack(module: str, what: str, data: bytes, folder: Path) -> str:
    """Describe what a module lacks of what an artifact needs."""
    package = module.partition(".")[0]
    if package in OWN_MODULES:
        return f"needs {what}, but {package!r} is the service's own here; give yours another name, and save it anew"
    if module == "__main__":
        what = what.partition(" of ")[0]
        cure = f"move it to a module in the settings file's folder {folder}, or of PYTHONPATH, and save it anew"
        return f"needs {what}, which a notebook or a script has defined; {cure}"
    other = _of_another(module, data, f"it needs {what}")
    place = _file_of(module) or "part of Python"
    order = f"modules are looked for in PYTHONPATH, then among installed ones, then in {folder}"
    return other or f"needs {what}, but {module!r} is {place} here, which lacks it; {order}"


def _file_of(module: str) -> str | None:
    """Return the file of a module, if it is imported and is neither built in nor a plain folder."""
    return getattr(sys.modules.get(module), "__file__", None)


def _is_folder(module: str) -> bool:
    """Whether a module is a folder without `__init__.py`, which has nothing of its own."""
    return _file_of(module) is None and hasattr(sys.modules.get(module), "__path__")


def _find_missing(error: BaseException) -> tuple[str, str] | None:
    """Return the module and the name that it lacks, where an error is about that."""
    if not isinstance(error, AttributeError):
        return None
    if isinstance(error.obj, types.ModuleType):
        return error.obj.__name__, str(error.name)
    match = re.match(r"Can't get attribute '([^']+)' on <module '([^']+)'", str(error))
    if match is None:
        return None
    # Python shows a module that `python -m` runs by another name than it has.
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return "__main__" if spec is not None and spec.name == match[2] else match[2], match[1]


def _find_failing(error: BaseException) -> tuple[str | None, str]:
    """Return the module whose code the load called, if an error came from there, and the place in it."""
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] not in PASSING_ON | sys.stdlib_module_names:
            return module, f"{frame.f_code.co_filename}, line {line}"
    return None, ""


def _of_another(module: str, data: bytes, reason: str) -> str | None:
    """Return that an artifact is of another version of the library that a module is of; None where it is of none."""
    library = module.partition(".")[0]
    packages = importlib.metadata.packages_distributions().get(library)
    if not packages:
        return None
    made = (find_sklearn_version(data) if library == "sklearn" else None) or "of an unknown version"
    here = importlib.metadata.version(packages[0])
    return f"was made with another {packages[0]} ({made}), here {here}; save it anew ({reason.rstrip(':')})"

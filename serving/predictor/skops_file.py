"""What a .skops file holds, before anything in it is loaded: how far it unpacks, and which types it names."""

from __future__ import annotations

import importlib
import io
import sys
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np

from serving.errors import ModelError

MIN_UNPACKED_BYTES = 64 << 20  # that any file may unpack to
MAX_RATIO = 100  # of the unpacked size to the file's; forests reach 10, arrays of nothing but zeros 1000
PIECE_BYTES = 1 << 20

# What runs code, or opens what it is told: all of these modules, and a few names of others.
CODE_MODULES = frozenset(
    [
        *("os", "posix", "nt", "subprocess", "sys", "shutil", "importlib", "runpy", "socket", "ctypes", "code"),
        *("codeop", "pty", "pdb", "timeit", "webbrowser", "pickle", "_pickle", "marshal"),
    ]
)
CODE_NAMES = frozenset(
    [
        *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__", "builtins.open"),
        *("builtins.input", "builtins.breakpoint", "builtins.getattr", "builtins.setattr"),
        *("joblib.load", "joblib.numpy_pickle.load", "numpy.load"),
    ]
)

# Libraries whose types hold numbers, and what of them is no such type:
KNOWN_LIBRARIES = (
    *("sklearn.", "numpy.", "scipy.sparse.", "scipy.interpolate.", "scipy.spatial.", "scipy.special."),
    *("lightgbm.", "xgboost.", "catboost.", "imblearn.", "category_encoders.", "quantile_forest."),
)
UNKNOWN_PARTS = (
    *("sklearn.datasets.", "sklearn.externals.", "sklearn.utils._testing.", "sklearn.tests."),
    *("numpy.lib.", "numpy.testing.", "numpy.ctypeslib.", "numpy.f2py."),
    *("lightgbm.basic.Dataset.", "xgboost.core.DMatrix.", "xgboost.core.QuantileDMatrix.", "catboost.core.Pool."),
)
# Functions that estimators keep, and that compute: any other may open files.
KNOWN_FUNCTIONS = (
    *(
        "sklearn.metrics.",
        "sklearn.feature_selection._univariate_selection.",
        "sklearn.feature_selection._mutual_info.",
    ),
    *("sklearn.feature_extraction.text.strip_", "sklearn.preprocessing._data.", "sklearn.neighbors._kde."),
    *("sklearn.gaussian_process.kernels.", "sklearn.decomposition._fastica.", "sklearn.neural_network._base."),
    "sklearn.cluster._kmeans._kmeans_single_",
)
KNOWN_NAMES = (
    *("collections.OrderedDict", "collections.Counter", "collections.deque"),
    "scipy._lib.array_api_compat.numpy._aliases.asarray",  # in splines
)


def unpack(data: bytes) -> bytes:
    """Return a skops file without compression, which unpacks to a bounded size whatever its directory says.

    Raises `ModelError` where the size is beyond the bound, and what `zipfile` raises.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        parts = packed.infolist()
        _refuse_bomb(parts, len(data))
        if all(part.compress_type == zipfile.ZIP_STORED for part in parts):
            return data
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w") as plain:
            for part in parts:
                with packed.open(part) as source, plain.open(part.filename, "w", force_zip64=True) as sink:
                    while piece := source.read(PIECE_BYTES):  # in pieces, of which none unpacks to more than its size
                        sink.write(piece)
    return target.getvalue()


def _refuse_bomb(parts: list[zipfile.ZipInfo], size: int) -> None:
    unpacked, limit = sum(part.file_size for part in parts), max(MIN_UNPACKED_BYTES, MAX_RATIO * size)
    if unpacked > limit:
        raise ModelError(
            f"unpacks to {unpacked} bytes, more than {limit}, which is {MAX_RATIO} times its size or "
            f"{MIN_UNPACKED_BYTES >> 20} MB; save it without compression"
        )
    if any(part.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for part in parts):
        raise ModelError("is compressed by bzip2 or LZMA; save it with compression=zipfile.ZIP_DEFLATED, or without")


def runs_code(name: str) -> bool:
    """Whether a type is one that runs code, or opens what it is told, whoever names it."""
    return name.partition(".")[0] in CODE_MODULES or name in CODE_NAMES


def sort_types(
    names: Iterable[str], known: Iterable[str] = (), may_import: bool = False
) -> tuple[list[str], list[str]]:
    """Return which types, but for known ones, hold nothing but values, as far as one can tell, and all others.

    To find out, only well-known libraries are imported, and others where they may be: importing runs code too. Raises
    `ModelError` for types that run code.
    """
    names = sorted(names)
    if bad := [name for name in names if runs_code(name)]:
        raise ModelError(f"names {bad[0]!r}, which runs code or opens files for whoever made it; do not load it")
    names = [name for name in names if name not in known]
    offered = [name for name in names if name in KNOWN_NAMES or _is_known(name) or (may_import and _is_estimator(name))]
    return offered, [name for name in names if name not in offered]


def _is_known(name: str) -> bool:
    """Whether a name stands for a class of a well-known library that opens no file, or for a function that computes.

    What it stands for is judged by its own name: it may be another's, imported there.
    """
    if not _is_of_library(name):
        return False
    found = _find(name)
    if isinstance(found, np.ufunc):
        return True
    own = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    if isinstance(found, type):
        return _is_of_library(own) and not issubclass(found, np.memmap) and not runs_code(own)
    return callable(found) and own.startswith(KNOWN_FUNCTIONS)


def _is_of_library(name: str) -> bool:
    return f"{name}.".startswith(KNOWN_LIBRARIES) and not f"{name}.".startswith(UNKNOWN_PARTS)


def _is_estimator(name: str) -> bool:
    found = _find(name)
    return isinstance(found, type) and hasattr(found, "fit")


def _find(name: str) -> Any:
    """Return what a name of a module's stands for, or None."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(sys.modules.get(module) or importlib.import_module(module), attribute, None)
    except Exception:  # what a module raises has no bounds
        return None

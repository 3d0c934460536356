"""From the bytes of an artifact to an estimator: formats, hashes, and types that are trusted."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import joblib
import sklearn.utils
import structlog
from pydantic import AfterValidator, Field

from serving.errors import ModelError, StartupError, listed, nearest, reason_of
from serving.predictor.inputs import find_parts
from serving.predictor.modules import UNPACKERS, add_module_folder, explain
from serving.predictor.predictor import GraphFile, refuse_no_predictor
from serving.predictor.skops_file import runs_code, sort_types, unpack
from serving.settings import OtherNames, PathText, SettingsTable, check_each_once, explain_relative

log = structlog.get_logger()


class ModelSettings(SettingsTable):
    other_names: ClassVar[OtherNames] = {
        "path": ("file", "filename", "location"),
        "sha256": ("hash", "checksum", "digest"),
    }

    path: Annotated[PathText, Field(min_length=1)] = "model/iris.skops"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "iris"
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "1"
    runtime: Literal["sklearn", "onnx"] = "sklearn"
    sha256: Annotated[str, AfterValidator(_check_hash)] = ""
    trusted_types: Annotated[list[str], AfterValidator(_check_types)] = Field(default_factory=list)
    outputs: Annotated[list[Annotated[str, Field(min_length=1)]], AfterValidator(check_each_once)] = Field(
        default_factory=list
    )
    strict_versions: bool = False
    load_timeout_s: Annotated[float, Field(ge=0.1, le=86_400)] = 120.0


def _check_hash(text: str) -> str:
    if not re.fullmatch(r"([0-9a-fA-F]{64})?", text):
        raise ValueError("a hash should be 64 hexadecimal digits, or empty")
    return text


def _check_types(names: list[str]) -> list[str]:
    for name in filter(runs_code, names):
        raise ValueError(f"trusted types should be without {name!r}, which runs code or opens files for whoever asks")
    return names


def load_artifact(settings: ModelSettings, path: Path, folder: Path) -> tuple[Any, str]:
    """Load what an artifact holds by the suffix of its name, and return it with the artifact's hash.

    Modules that it needs may be in a folder. Raises `ModelError`.
    """
    data = read_artifact(path, explain_relative(settings.path))
    sha256 = hashlib.sha256(data).hexdigest()
    _refuse_untrusted(path, sha256, settings.sha256.lower())
    return load_estimator(path, data, settings.trusted_types, folder), sha256


def read_artifact(path: Path, cure: str = "") -> bytes:
    """Read an artifact whose bytes are of the format that its suffix names.

    Raises `ModelError`, for one that is not there with what to do about it.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ModelError(f"has the suffix {path.suffix!r}; use one of {listed([*FORMATS])}")
    try:
        data = read_regular(path)
    except FileNotFoundError:
        others = [file.name for file in path.parent.glob("*") if file.suffix in FORMATS]
        hint = f"; {nearest(path.name, others)}" if others else ""
        raise ModelError(f"does not exist{hint}{cure}") from None
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}") from None
    if not data:
        raise ModelError("is empty")
    _, kinds = FORMATS[suffix]
    found = _format_of(data)
    if found is not None and found not in kinds:
        right = [suffix for suffix, (_, kinds) in FORMATS.items() if kinds[0] == found]
        raise ModelError(f"is no {kinds[0]} file but {found}" + (f"; name it {right[0]}" if right else ""))
    return data


def read_regular(path: Path) -> bytes:
    """Return the bytes of a regular file. Raises `OSError` for others: a pipe or a device may have no end."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a regular file")
        return file.read()


def _format_of(data: bytes) -> str | None:
    """Return the format of a file by its first bytes, where they tell."""
    found = next((kind for start, kind in MAGIC_NUMBERS.items() if data.startswith(start)), None)
    if found == "skops" and b"schema.json" not in data:
        return "a zip archive, or part of one"
    return "joblib" if found == "pickle" and b"joblib.numpy_pickle" in data else found


def _refuse_untrusted(path: Path, sha256: str, trusted: str) -> None:
    if trusted and trusted != sha256:
        raise ModelError(f"has the sha256 {sha256}, but model.sha256 is {trusted}: it is not the file that you trusted")
    if not trusted and path.suffix.lower() not in SAFE_FORMATS:
        hint = "set model.sha256 to the hash of a file that you trust; `python -m model.describe PATH` prints it"
        raise ModelError(f"runs code when it is loaded; {hint}")


OLDEST_SKLEARN = (1, 6)  # the first with `get_tags`


def refuse_old_sklearn(version: str) -> None:
    """Raise `StartupError` for a version of scikit-learn whose estimators are not read here."""
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_SKLEARN:
        oldest = ".".join(map(str, OLDEST_SKLEARN))
        hint = "pip install -r requirements.txt"
        raise StartupError(f"scikit-learn is {version}, but {oldest} is the oldest that is supported; {hint}")


def load_estimator(path: Path, data: bytes, trusted_types: list[str], folder: Path) -> Any:
    """Load what an artifact's bytes hold, which may run code that is inside, and modules in a folder.

    Raises `StartupError`, also where it is not a fitted predictor.
    """
    refuse_old_sklearn(sklearn.__version__)
    load, (kind, *_) = FORMATS[path.suffix.lower()]
    add_module_folder(folder)
    with _loading(kind, data, folder):
        estimator = load(data, trusted_types)
    if not isinstance(estimator, GraphFile):
        refuse_no_predictor(estimator)
        _refuse_file_readers(estimator)
    return estimator


def _refuse_file_readers(estimator: Any) -> None:
    """Raise `ModelError` for a text vectorizer that takes names of files, which clients would choose."""
    for part in find_parts(estimator):
        if hasattr(part, "build_analyzer") and (given := getattr(part, "input", "content")) != "content":
            what = f"has a {type(part).__name__} with input={given!r}, for which clients would name files to open"
            raise ModelError(f"{what}; make it with input='content'")


def _load_skops(data: bytes, trusted_types: list[str]) -> Any:
    """Load a skops file in which all types are trusted, by skops or by the list. Raises `ModelError`."""
    import skops.io  # here, for it imports all of scikit-learn: a second that other formats can do without

    data = unpack(data)
    named = find_untrusted_types(data)
    offered, others = sort_types(named, known=trusted_types)
    if offered or others:
        raise ModelError(f"holds types that are not trusted; {_how_to_trust(offered, others, trusted_types)}")
    if unused := sorted({*trusted_types} - named):
        log.warning("trusted_types_unused", types=unused)
    return skops.io.loads(data, trusted=trusted_types)


def _how_to_trust(offered: list[str], others: list[str], trusted_types: list[str]) -> str:
    types = json.dumps(sorted({*offered, *trusted_types}))
    setting = f"if you trust them, set model.trusted_types = {types}" if offered else ""
    more = f"add {listed(others)} to model.trusted_types only if you know what it does" if others else ""
    return ", and ".join(filter(None, (setting, more)))


def find_untrusted_types(data: bytes) -> set[str]:
    """Return the types in a skops file that skops does not trust by itself, without loading it. Raises `ModelError`."""
    import skops.io

    with _loading("skops", data):
        return set(skops.io.get_untrusted_types(data=unpack(data)))


def _load_joblib(data: bytes, trusted_types: list[str]) -> Any:
    return joblib.load(io.BytesIO(data))


def _load_pickle(data: bytes, trusted_types: list[str]) -> Any:
    return pickle.loads(data)


def _load_onnx(data: bytes, trusted_types: list[str]) -> Any:
    """Load an ONNX graph, which runs no code: custom operators are in libraries that only settings could name."""
    from serving.predictor.onnx_file import open_artifact

    return open_artifact(data)


@contextlib.contextmanager
def _loading(kind: str, data: bytes, folder: Path = Path()) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except (Exception, SystemExit) as error:  # what a damaged or foreign artifact raises has no bounds
        damaged = f"cannot be loaded as {kind}, and may be cut short or damaged: {reason_of(error)}"
        raise ModelError((kind != "onnx" and explain(error, data, folder)) or damaged) from error


FORMATS: dict[str, tuple[Callable[[bytes, list[str]], Any], tuple[str, ...]]] = {  # with what the bytes may be
    ".skops": (_load_skops, ("skops",)),
    ".joblib": (_load_joblib, ("joblib", "pickle")),
    ".pickle": (_load_pickle, ("pickle",)),
    ".pkl": (_load_pickle, ("pickle",)),
    ".onnx": (_load_onnx, ("onnx",)),
}

SAFE_FORMATS = (".skops", ".onnx")  # formats that run no code when they are loaded

MAGIC_NUMBERS = {
    b"PK": "skops",
    b"\x80": "pickle",
    **dict.fromkeys(UNPACKERS, "joblib"),
    b"\x04\x22\x4d\x18": "joblib",  # compressed by LZ4, which is not installed
    b"\x08": "onnx",  # the number of the format's version comes first
    b"\x89HDF": "HDF5",
    b"version https://git-lfs": "a Git LFS pointer, whose file was not fetched",
}

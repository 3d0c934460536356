"""Print the settings that an artifact needs, ready to paste: `python -m model.describe PATH`.

What is inside an artifact may run code when it is loaded, so its features are read only with `--trust`; an .onnx file,
and a .skops file of which skops trusts every type, is read without. `--golden ROWS.json` has the estimator answer the
rows of a JSON array and writes them, with its answers, beside the artifact, which must reproduce them whenever it is
served; such rows also say what the estimator does not, as the types that code of the user's takes. For the artifact
that the settings in force are about, their `[features]` count too.

Where a module of one's own is named `model`, in the folder of the project, run `python model/describe.py PATH`.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: the project's folder takes the place of this one
    FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(FOLDER.parent), *(path for path in sys.path if path != str(FOLDER))]

import app
from serving.errors import (
    ModelError,
    ServingError,
    SettingsError,
    Unprocessable,
    errors_about,
    exit_on_startup_error,
    listed,
)
from serving.logs import configure_logging
from serving.predictor.artifact import SAFE_FORMATS, ModelSettings, find_untrusted_types, load_estimator, read_artifact
from serving.predictor.bodies import parse_json
from serving.predictor.contract import Contract, name_columns
from serving.predictor.features import FeatureSettings
from serving.predictor.golden import golden_path, load_golden, running_versions
from serving.predictor.inputs import Column, Inputs, read_inputs, type_of
from serving.predictor.model import Model, make_model
from serving.predictor.modules import add_module_folder
from serving.predictor.proof import prove_answers
from serving.predictor.skops_file import sort_types
from serving.settings import toml_key, toml_value


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m model.describe", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("path", type=Path, metavar="PATH", help="the artifact: .skops, .joblib, .pickle, .pkl or .onnx")
    parser.add_argument("--trust", action="store_true", help="load it, though it may run code that is inside")
    parser.add_argument("--golden", type=Path, metavar="ROWS.json", help="rows to answer and keep beside the artifact")
    arguments = parser.parse_args(words)
    with exit_on_startup_error(), errors_about(repr(str(arguments.path))):
        describe(arguments.path, arguments.trust, arguments.golden)


def describe(path: Path, trust: bool, golden: Path | None) -> None:
    """Print the tables of an artifact; with a file of rows, make them golden. Raises `StartupError`."""
    settings = app.load_settings()
    configure_logging(settings.logging)
    data = read_artifact(path)
    suffix = path.suffix.lower()
    untrusted = find_untrusted_types(data) if suffix == ".skops" else set()
    trusted = trust or (suffix in SAFE_FORMATS and not untrusted)
    if golden and not trusted:
        raise ModelError("can answer golden rows only with --trust")
    add_module_folder(settings.folder)
    offered, others = sort_types(untrusted, may_import=trust)
    print_model(path, data, offered, settings)
    if others:
        print(f"# and {listed(others)}, only if you know what it does")
    if not trusted:
        print("\n# Its features can be read only by loading it, which may run code that is inside.")
        print("# If you trust it, add --trust.")
        return
    estimator = load_estimator(path, data, sorted(untrusted), settings.folder)
    known = load_golden(path) if golden is None else None
    rows = read_rows(golden) if golden else known.rows if known else []
    inputs = read_inputs(estimator, [*settings.features, *(rows[0] if rows else ())])
    own = choose_settings(settings, path, inputs)
    try:
        columns = name_columns(inputs, own.features, dict.fromkeys(name for row in rows for name in row))
    except ModelError as error:
        rule = f"those of {settings.source('features')} count only for the artifact that model.path names there"
        raise ModelError(f"{error}; {rule}" if settings.features and not own.features else str(error)) from None
    rows = [{name: cell for name, cell in row.items() if columns.get(name, Column()) is not None} for row in rows]
    features = complete(columns, own.features, rows)
    with own.locate():
        if golden:
            write_golden(make_model(estimator, path, features), rows)
        contract = Contract(inputs, features, rows[0] if rows else None)
    print_features(contract, columns, features)
    if golden:
        print(f"# wrote {golden_path(path)}")


def choose_settings(settings: app.Settings, path: Path, inputs: Inputs) -> app.Settings:
    """Return the settings for an artifact: with the [features] in force where these are about it, and still fit it."""
    own = settings.model_copy(update={"model": ModelSettings(path=str(path.absolute())), "features": {}})
    current = own.model_copy(update={"features": settings.features})
    if settings.model_path.absolute() != path.absolute():
        return own
    try:
        with current.locate():
            Contract(inputs, current.features)
    except SettingsError as error:
        print("\n# Left out, for the artifact has changed:")
        print("\n".join(f"# {line}" for line in str(error).splitlines()))
        return own
    return current


def complete(
    columns: Mapping[str, Column | None], given: Mapping[str, FeatureSettings], rows: list[dict[str, Any]]
) -> dict[str, FeatureSettings]:
    """Add to the settings of features what the estimator does not say, but rows that it takes do."""
    features: dict[str, FeatureSettings] = {}
    for name, column in columns.items():
        if column is None:
            continue
        cells = [row.get(name) for row in rows]
        kind = type_of(cell for cell in cells if cell is not None)
        feature = given.get(name, FeatureSettings())
        said: dict[str, Any] = {}
        is_open = column.type is None or (column.type == "float" and kind == "bool")
        if feature.type is None and (is_open or (column.takes_int and kind == "int")):
            said["type"] = kind
        if feature.missing is None and column.missing is None and None in cells:
            said["missing"] = True
        features[name] = feature.model_copy(update=said)  # which the contract checks, and names its place
    return features


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON array of rows. Raises `ModelError`."""
    try:
        rows = parse_json(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot have the golden rows of {path}, which cannot be read: {error.strerror}") from None
    except ServingError as error:
        raise ModelError(f"cannot have the golden rows of {path}: {error}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ModelError(f"cannot have the golden rows of {path}, which should be a JSON array of objects")
    return rows


def write_golden(model: Model, rows: list[dict[str, Any]]) -> None:
    """Write rows, the answers to them and the running versions beside the artifact. Raises `ModelError`."""
    try:
        checked = model.contract.parse_payload(rows)
    except Unprocessable as error:
        problem = error.detail[0]
        raise ModelError(f"does not take golden row {problem['loc'][1:]}: {problem['msg']}") from None
    proof = prove_answers(model, checked, lambda asked: asked.answer(checked, "the golden rows"))
    answers = proof.applied_to(model).answer(checked, "the golden rows")
    document = {"versions": running_versions(), "rows": checked, "predictions": answers}
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    golden_path(model.path).write_text(text, encoding="utf-8")


def print_model(path: Path, data: bytes, trusted_types: list[str], settings: app.Settings) -> None:
    """Print the [model] table of an artifact, none of which needs it to be loaded."""
    print("[model]")
    place, folder = Path(os.path.abspath(path)), Path(os.path.abspath(settings.folder))
    print_key("path", (place.relative_to(folder) if place.is_relative_to(folder) else place).as_posix())
    print_key("name", re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)[:64])
    print_key("sha256", hashlib.sha256(data).hexdigest())
    print_key("trusted_types", trusted_types)


def print_features(
    contract: Contract,
    columns: Mapping[str, Column | None],
    features: Mapping[str, FeatureSettings],
) -> None:
    """Print the [features] table: what settings, rows and estimator together say of each feature."""
    print("\n[features]")
    for name, feature in contract.features.items():
        said = feature.model_dump(exclude_none=True) | {"missing": feature.missing or None}
        pairs = ", ".join(f"{key} = {toml_value(value)}" for key, value in said.items() if value is not None)
        column = columns[name]
        is_guess = column is not None and column.type is None and features[name].type is None
        print(f"{toml_key(name)} = {{ {pairs} }}" + ("  # of what type the estimator does not say" if is_guess else ""))


def print_key(name: str, value: Any) -> None:
    print(f"{name} = {toml_value(value)}")


if __name__ == "__main__":
    main()

"""Print the settings that an artifact needs, ready to paste: `python -m model.describe PATH`.

What is inside an artifact may run code when it is loaded, so its features are read only with `--trust`; a .skops file
of which skops trusts every type is read without. `--golden ROWS.json` has the estimator answer the rows of a JSON array
and writes them, with its answers, beside the artifact, which must reproduce them whenever it is served.
"""

import argparse
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import app


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.describe", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("path", type=Path, metavar="PATH", help="the artifact: .skops, .joblib, .pickle or .pkl")
    parser.add_argument("--trust", action="store_true", help="load it, though it may run code that is inside")
    parser.add_argument("--golden", type=Path, metavar="ROWS.json", help="rows to answer and keep beside the artifact")
    arguments = parser.parse_args()
    with app.exit_on_startup_error(), app.about(repr(str(arguments.path))):
        describe(arguments.path, arguments.trust, arguments.golden)


def describe(path: Path, trust: bool, rows: Path | None) -> None:
    """Print the tables of an artifact; with a file of rows, make them golden. Raises `StartupError`."""
    settings = app.load_settings()
    app.configure_logging(settings.logging)
    data = app.read_artifact(path)
    is_skops = path.suffix.lower() == ".skops"
    untrusted = app.find_untrusted_types(data) if is_skops else set()
    if rows and not trust and (untrusted or not is_skops):
        raise app.ModelError("can answer golden rows only with --trust")
    print_model(path, data, untrusted, settings)
    if not trust and (untrusted or not is_skops):
        print("\n# Its features can be read only by loading it, which may run code that is inside.")
        print("# If you trust it, add --trust.")
        return
    service = load(path, data, untrusted, settings)
    golden = write_golden(path, service, read_rows(rows)) if rows else app.load_golden(service.settings)
    known = golden.rows[0] if golden else None
    print_features(app.Contract(service.predictor.inputs, service.settings, known))
    if rows:
        print(f"# wrote {app.golden_path(path)}")


def load(path: Path, data: bytes, trusted_types: set[str], settings: app.Settings) -> app.Service:
    """Build the service around an artifact; where the settings are about it, with their features."""
    is_current = settings.model_path.absolute() == path.absolute()
    changes = {
        "model": app.ModelSettings(path=str(path.absolute())),
        "features": settings.features if is_current else {},
    }
    load_format, _ = app.FORMATS[path.suffix.lower()]
    predictor = app.Predictor(load_format(data, sorted(trusted_types)))
    return app.Service(settings.model_copy(update=changes), predictor)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON array of rows. Raises `ModelError`."""
    try:
        rows = app.parse_json(path.read_bytes())
    except OSError as error:
        raise app.ModelError(f"cannot have the golden rows of {path}, which cannot be read: {error.strerror}") from None
    except app.ServingError as error:
        raise app.ModelError(f"cannot have the golden rows of {path}: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise app.ModelError(f"cannot have the golden rows of {path}, which should be a JSON array of objects")
    return rows


def write_golden(artifact: Path, service: app.Service, rows: list[dict[str, Any]]) -> app.Golden:
    """Write rows, the answers to them and the running versions beside the artifact. Raises `ModelError`."""
    try:
        checked = service.contract.parse_payload(rows)
    except app.Unprocessable as error:
        problem = error.detail[0]
        raise app.ModelError(f"does not take golden row {problem['loc'][1:]}: {problem['msg']}") from None
    answers = app.parse_json(app.Response.of(service.answer(checked, "the golden rows")).body)
    rows = [
        {name: row[name] for name in service.contract.names} for row in rows
    ]  # in the order of a nameless estimator
    golden = app.Golden(versions=app.running_versions(), rows=rows, predictions=answers)
    text = json.dumps(golden.model_dump(), indent=1, ensure_ascii=False)
    app.golden_path(artifact).write_text(text + "\n", encoding="utf-8")
    return golden


def print_model(path: Path, data: bytes, untrusted: set[str], settings: app.Settings) -> None:
    """Print the [model] table of an artifact, none of which needs it to be loaded."""
    print("[model]")
    print_key("path", Path(os.path.relpath(path, settings.folder)).as_posix())
    print_key("name", re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)[:64])
    print_key("sha256", hashlib.sha256(data).hexdigest())
    print_key("trusted_types", sorted(untrusted))


def print_features(contract: app.Contract) -> None:
    """Print the [features] table: what settings and estimator together say of each feature."""
    print("\n[features]")
    for name, feature in contract.features.items():
        said = feature.model_dump(exclude_none=True) | {"missing": feature.missing or None}
        pairs = ", ".join(f"{key} = {app.toml_value(value)}" for key, value in said.items() if value is not None)
        print(f"{app.toml_key(name)} = {{ {pairs} }}")


def print_key(name: str, value: Any) -> None:
    print(f"{name} = {app.toml_value(value)}")


if __name__ == "__main__":
    main()

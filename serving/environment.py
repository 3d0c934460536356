"""Variables of the environment: which are the service's, which key each is about, and which Kubernetes makes.

It knows no setting.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from serving.errors import SettingsError

PREFIX = "SERVING_"
BETWEEN = "__"  # the names of tables and keys in a variable
PROTOCOL, URL, NUMBER, ADDRESS = "(?:TCP|UDP|SCTP)", r"(?:TCP|UDP|SCTP)://\S+:\d+", r"\d+", r"[\dA-F.:]+"
OF_SERVICES = {  # ends of the variables that Kubernetes makes for a Service, and their values
    "SERVICE_HOST": ADDRESS,
    "SERVICE_PORT(?:_[A-Z0-9_]+)?": NUMBER,
    "PORT": URL,
    rf"PORT_\d+_{PROTOCOL}": URL,
    rf"PORT_\d+_{PROTOCOL}_PROTO": PROTOCOL,
    rf"PORT_\d+_{PROTOCOL}_PORT": NUMBER,
    rf"PORT_\d+_{PROTOCOL}_ADDR": ADDRESS,
}


def read_environment() -> dict[str, str]:
    """Return the texts of the `SERVING_…` variables by their names in capitals, without those that are empty.

    Raises `SettingsError` for one that is written in two ways with two values.
    """
    found: dict[str, tuple[str, str]] = {}
    for variable, value in sorted(os.environ.items()):
        name, text = variable.upper(), value.strip()
        if name.startswith(PREFIX) and text:
            other, before = found.setdefault(name, (variable, text))
            if before != text:
                raise two_values(other, variable)
    return {name: text for name, (_, text) in found.items()}


def two_values(variable: str, other: str) -> SettingsError:
    """Return the error about two variables for one key, which says no value: it may be a secret."""
    return SettingsError(f"environment: {variable} and {other} set one key to two values; unset one of them")


def settings_file() -> str | None:
    """Return the path of the settings file that `SERVING_SETTINGS` names, if it is set. Raises `SettingsError`."""
    return read_environment().get(f"{PREFIX}SETTINGS")


def is_of_service(variable: str, text: str) -> bool:
    """Return whether a variable is one that Kubernetes makes for a Service named `serving` or `serving-…`."""
    return any(
        re.fullmatch(rf"{PREFIX}(?:\w+_)?{end}={value}", f"{variable}={text}", re.IGNORECASE)
        for end, value in OF_SERVICES.items()
    )


def variable_of(key: Iterable[str]) -> str:
    """Return the variable that sets a key."""
    return PREFIX + BETWEEN.join(map(as_word, key))


def as_word(name: str) -> str:
    """Return a name as it stands in a variable: in capitals, with one underscore for what is no letter or digit."""
    return re.sub(r"[\W_]+", "_", name).strip("_").upper()

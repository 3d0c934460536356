"""What hosting platforms say by variables of their own: Vertex AI's routes and port, and SageMaker's port.

Such a variable takes effect only where it is set, and only where the operator has set nothing else.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator

from serving.environment import two_values
from serving.errors import Key, SettingsError, shorten
from serving.settings import OtherNames, SettingsFile, SettingsTable

PORTS = ("AIP_HTTP_PORT", "SAGEMAKER_BIND_TO_PORT")  # variables with the port at which the platform calls
ROUTES = {"AIP_PREDICT_ROUTE": ("routes", "predict"), "AIP_HEALTH_ROUTE": ("routes", "health")}
BIND = ("server", "bind")

S = TypeVar("S", bound=SettingsFile)


def _check_route(path: str) -> str:
    if not re.fullmatch(r"(?:/[^\s?#%]*)?", path):
        raise ValueError("a route should begin with '/' and have no '?', '#', '%' or blank")
    return path


Route = Annotated[str, AfterValidator(_check_route)]


class RoutesSettings(SettingsTable):
    """Further paths of predictions and of readiness, as a platform asks for them."""

    other_names: ClassVar[OtherNames] = {
        "predict": ("predict_route", "prediction", "predictions", "invocations"),
        "health": ("health_route", "ready", "ping"),
    }

    predict: Route = ""
    health: Route = ""


def with_platform(settings: S) -> S:
    """Return the settings with what a platform's variables say. Raises `SettingsError` for one that says nothing."""
    for variable, key in {**dict.fromkeys(PORTS, BIND), **ROUTES}.items():
        if os.environ.get(variable) and not _is_chosen(settings, key):
            value = f"0.0.0.0:{_read_port()}" if key == BIND else os.environ[variable]
            settings = settings.with_value(key, value, f"environment: {variable}")
    return settings


def _read_port() -> int:
    """Return the port that the platform's variables say. Raises `SettingsError` if they say several, or none."""
    variable, *others = [name for name in PORTS if os.environ.get(name)]
    text = os.environ[variable]
    if others and os.environ[others[0]] != text:
        raise two_values(variable, *others)
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65_535:
        raise SettingsError(f"environment: {variable} is {shorten(text)!r}; it should be a port, 1 to 65535")
    return int(text)


def _is_chosen(settings: SettingsFile, key: Key) -> bool:
    """Return whether the operator has set a value: by a variable, or to another one than the shipped file has."""
    table: Any = getattr(settings, key[0])
    is_default = getattr(table, key[1]) == type(table).model_fields[key[1]].default
    return settings.source(*key).startswith("environment") or not is_default

"""The settings of gunicorn, in its own names, which `gunicorn.conf.py` and `processes` read, and two that the service
itself reads."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveInt

from serving.settings import OtherNames, PathText, SettingsTable, check_each_once

MAX_WORKERS = 1000  # each is a process
MAX_PORT = 65_535
ADDRESS = re.compile(r"(?:[\w.-]*|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})|unix:[^\x00-\x1f]+", re.ASCII)

SEGMENT = r"(?!\.{1,2}(?:/|$))[A-Za-z0-9._~!$&'()*+,;=:@-]+"  # of a path (RFC 3986, section 3.3), but "." and ".."
ROOT_PATH = re.compile(rf"(?:/{SEGMENT})*")
ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([1-9][0-9]{0,4}))?")
OWN_PORTS = {"http": "80", "https": "443"}  # which browsers leave out: they compare letters (RFC 6454, section 6.2)
EVERY_ORIGIN = "*"


def _check_address(address: str) -> str:
    match = ADDRESS.fullmatch(address)
    if match is None or int(match[1] or 0) > MAX_PORT:
        raise ValueError("an address should be 'host:port' or 'unix:path'")
    return address


def _as_text(address: Any) -> Any:
    return str(address) if isinstance(address, int) else address


Address = Annotated[str, BeforeValidator(_as_text), AfterValidator(_check_address)]


def _check_root_path(path: str) -> str:
    if not ROOT_PATH.fullmatch(path):
        rule = "begin with '/', not end with it, and have no '?', '#', '%', '//', '..' or blank"
        raise ValueError(f"a path should {rule}")
    return path


def _check_origin(origin: str) -> str:
    match = ORIGIN.fullmatch(origin)
    if origin != EVERY_ORIGIN and (
        match is None or int(match[2] or 0) > MAX_PORT or match[2] == OWN_PORTS.get(match[1], "")
    ):
        form = "'scheme://host' or 'scheme://host:port', or '*' for all"
        raise ValueError(f"an origin should be {form}; in small letters, without a path, and without the usual port")
    return origin


def _check_origins(origins: list[str]) -> list[str]:
    if EVERY_ORIGIN in origins and len(origins) > 1:
        raise ValueError("a list should have '*' alone, or not at all")
    return check_each_once(origins)


Origin = Annotated[str, AfterValidator(_check_origin)]


class ServerSettings(SettingsTable):
    """Gunicorn's own names and units, which `gunicorn.conf.py` hands on, two for connections, and two for proxies
    and browsers."""

    other_names: ClassVar[OtherNames] = {
        "bind": ("host", "port", "address", "listen"),
        "workers": ("worker", "num_workers", "processes"),
        "certfile": ("cert", "ssl_certfile"),
        "keyfile": ("key", "ssl_keyfile"),
        "root_path": ("prefix", "path_prefix", "script_name", "base_path"),
        "cors_origins": ("cors", "allow_origins", "allowed_origins", "origins"),
    }

    worker_class: Literal["auto", "uvicorn", "gevent"] = "auto"
    workers: Annotated[PositiveInt, Field(le=MAX_WORKERS)] | Literal["auto"] = "auto"
    bind: Address | Annotated[list[Address], Field(min_length=1), AfterValidator(check_each_once)] = "127.0.0.1:8000"
    backlog: Annotated[PositiveInt, Field(lt=2**31)] = 2048
    timeout: NonNegativeInt = 30
    graceful_timeout: PositiveInt = 30
    keepalive: PositiveInt = 5
    send_timeout: PositiveInt = 10
    max_requests_per_connection: NonNegativeInt = 1000
    max_requests: NonNegativeInt = 0
    max_requests_jitter: NonNegativeInt = 0
    certfile: PathText = ""
    keyfile: PathText = ""
    root_path: Annotated[str, AfterValidator(_check_root_path)] = ""
    cors_origins: Annotated[list[Origin], AfterValidator(_check_origins)] = Field(default_factory=list)

"""The settings of gunicorn, in its own names: `gunicorn.conf.py` and `processes` read them."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveInt

from serving.settings import OtherNames, PathText, SettingsTable, check_each_once

MAX_WORKERS = 1000  # each is a process
ADDRESS = re.compile(r"(?:[\w.-]*|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})|unix:[^\x00-\x1f]+", re.ASCII)


def _check_address(address: str) -> str:
    match = ADDRESS.fullmatch(address)
    if match is None or int(match[1] or 0) > 65_535:
        raise ValueError("an address should be 'host:port' or 'unix:path'")
    return address


def _as_text(address: Any) -> Any:
    return str(address) if isinstance(address, int) else address


Address = Annotated[str, BeforeValidator(_as_text), AfterValidator(_check_address)]


class ServerSettings(SettingsTable):
    """Gunicorn's own names and units, which `gunicorn.conf.py` hands on, and two for connections."""

    other_names: ClassVar[OtherNames] = {
        "bind": ("host", "port", "address", "listen"),
        "workers": ("worker", "num_workers", "processes"),
        "certfile": ("cert", "ssl_certfile"),
        "keyfile": ("key", "ssl_keyfile"),
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

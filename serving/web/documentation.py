"""The service's description of itself: its OpenAPI document, and the page on which one tries it.

The page is Swagger UI, whose files `flask-swagger-ui` ships, though not as its template has them: nothing in it is
inline, and every URL is relative, so that it works below any prefix and under a strict Content-Security-Policy.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import string
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

from pydantic_core import to_json

from serving.errors import StartupError
from serving.settings import OtherNames, SettingsTable
from serving.web.accept import prefers
from serving.web.messages import JSON, Request, Response
from serving.web.openapi import describe_api
from serving.web.operation import Operation
from serving.web.service import Service, ServiceSettings

OWN_FILES = Path(__file__).parent / "page"
PACKAGE = "flask_swagger_ui"  # which is not imported, for it imports Flask
FILES = {  # of the page, by their names below /docs
    "index.css": "text/css",
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "init.js": "text/javascript",
    "favicon-32x32.png": "image/png",
}
HTML = "text/html"
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = MappingProxyType({"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"})
PAGE_HEADERS = MappingProxyType(
    {"Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()), **HEADERS}
)


class DocsSettings(SettingsTable):
    """The page on which one tries the service."""

    other_names: ClassVar[OtherNames] = {"enabled": ("enable", "on", "active")}

    enabled: bool = True


class DocumentedSettings(ServiceSettings, Protocol):
    """The tables of the settings that this part reads."""

    @property
    def docs(self) -> DocsSettings: ...


class File(NamedTuple):
    """What is sent of a file, and the tag by which a client tells whether it has the same already."""

    content: bytes
    tag: str

    @classmethod
    def of(cls, content: bytes) -> File:
        return cls(content, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


async def openapi(service: Service[Any], request: Request) -> Response:
    document = document_json_of(service)
    if request.root_path != service.root_path:  # what the server says, where the settings do not
        servers = to_json([{"url": request.link_to("")}])
        return Response([b'{"servers":%b,' % servers, document[1:]])
    return Response([document])


async def page(service: Service[Any], request: Request) -> Response:
    if "page" not in service.made_once:
        template = string.Template((OWN_FILES / "index.html").read_text())
        text = template.substitute(title=service.settings.model.name)  # which has nothing to be escaped
        service.made_once["page"] = File.of(text.encode())
    return _answer_file(request, service.made_once["page"], f"{HTML}; charset=utf-8", PAGE_HEADERS)


async def page_file(name: str, service: Service[Any], request: Request) -> Response:
    if (made := f"page/{name}") not in service.made_once:
        own = OWN_FILES / name
        service.made_once[made] = File.of((own if own.exists() else _swagger_ui() / name).read_bytes())
    media_type = FILES[name]
    charset = "; charset=utf-8" if media_type.startswith("text/") else ""
    return _answer_file(request, service.made_once[made], media_type + charset, HEADERS)


def _answer_file(request: Request, file: File, media_type: str, headers: MappingProxyType[str, str]) -> Response:
    """Answer with a file, unless the client has it. It asks each time, for a new version has the same URL."""
    more = {"ETag": file.tag, "Cache-Control": "no-cache", **headers}
    tags = [tag.strip(" \t").removeprefix("W/") for tag in (request.header("if-none-match") or "").split(",")]
    if file.tag in tags or tags == ["*"]:
        return Response([b""], 304, more, media_type="")
    return Response([file.content], 200, more, media_type)


async def to_page(service: Service[Any], request: Request) -> Response:
    location = request.link_to("/docs") if request.root_path else "docs"  # right below a prefix that nobody told us too
    return Response([b""], 307, {"Location": location, "Vary": "Accept", **HEADERS}, f"{HTML}; charset=utf-8")


def prefers_html(request: Request) -> bool:
    """Return whether a client would rather have HTML than JSON, as a browser does."""
    return prefers(request, HTML, JSON)


def operations(settings: DocumentedSettings) -> Iterator[Operation]:
    """Yield the rows of the table for the description. Raises `StartupError` where the page's files are missing."""
    yield Operation(
        "GET",
        "/openapi.json",
        "openapi",
        "This document",
        openapi,
        answer_schema="Document",
        errors=(401,),
        access="docs",
    )
    if settings.docs.enabled:
        _swagger_ui()
        yield from _page_operations()


def _page_operations() -> Iterator[Operation]:
    yield Operation(
        "GET",
        "/docs",
        "api_page",
        "The page on which one tries all this",
        page,
        answer_media_type=HTML,
        answer_content=lambda service: {HTML: {"schema": {"type": "string"}}},
        errors=(401,),
        access="docs",
    )
    summary, redirect = "A file of the page", "The way to the page"
    for name in FILES:
        endpoint, made = functools.partial(page_file, name), f"api_page_{name}"
        yield Operation("GET", f"/docs/{name}", made, summary, endpoint, access="docs", is_described=False)
    yield Operation(
        "GET", "/", "to_api_page", redirect, to_page, access="open", is_described=False, only_for=prefers_html
    )


def _swagger_ui() -> Path:
    """Return the folder of Swagger UI's files. Raises `StartupError`."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        return Path(folder) / "dist"
    raise StartupError("docs.enabled needs flask-swagger-ui; pip install -r requirements.txt, or set it to false")


def document_of(service: Service[Any]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a service, which is made once."""
    if "openapi" not in service.made_once:
        service.made_once["openapi"] = describe_api(service)
    document: dict[str, Any] = service.made_once["openapi"]
    return document


def document_json_of(service: Service[Any]) -> bytes:
    """Return the document as it is sent, rendered once: a model of many features makes it long."""
    if "openapi.json" not in service.made_once:
        rendered = to_json(document_of(service), inf_nan_mode="strings", fallback=str)
        service.made_once["openapi.json"] = rendered
    document: bytes = service.made_once["openapi.json"]
    return document

"""The service's description of itself: its OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic_core import to_json

from serving.web.messages import Request, Response
from serving.web.openapi import describe_api
from serving.web.operation import Operation
from serving.web.service import Service, ServiceSettings


async def openapi(service: Service[Any], request: Request) -> Response:
    document = document_json_of(service)
    if request.root_path != service.root_path:  # what the server says, where the settings do not
        servers = to_json([{"url": request.link_to("")}])
        return Response([b'{"servers":%b,' % servers, document[1:]])
    return Response([document])


def operations(settings: ServiceSettings) -> Iterator[Operation]:
    """Yield the rows of the table for the description."""
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

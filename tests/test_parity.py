"""The same request gives the same bytes under both frameworks, by either interface, without a server."""

import asyncio
import functools
from typing import Any

import pytest

import app
from tests.lib.apps import call, call_asgi, call_wsgi, make_settings
from tests.lib.cases import BAD, GOOD, JSON, Case
from tests.lib.clients import check


@pytest.fixture(scope="module")
def apps() -> dict[str, Any]:
    return {name: app.create_app(make_settings(framework=name)) for name in app.FRAMEWORKS}


@pytest.mark.parametrize("case", GOOD + BAD, ids=lambda case: case.id)
def test_frameworks_answer_alike(apps: dict[str, Any], case: Case) -> None:
    """Flask and FastAPI give the same status, headers and body."""
    flask, fastapi = call(apps["flask"], case), call(apps["fastapi"], case)
    assert flask == fastapi
    check(case, flask)


@pytest.mark.parametrize("case", GOOD + BAD, ids=lambda case: case.id)
def test_bridges_answer_alike(apps: dict[str, Any], case: Case) -> None:
    """FastAPI behind WSGI and Flask behind ASGI give what each gives by its own interface."""
    over_asgi = call(app.as_asgi(apps["flask"]), case)
    over_wsgi = call_wsgi(app.as_wsgi(apps["fastapi"]), case)
    assert over_asgi == over_wsgi
    check(case, over_asgi)


@pytest.mark.parametrize("length", ["ten", "-5", "+82", "8_2", "82, 82", "٨"])
def test_length_that_is_no_number_is_refused(apps: dict[str, Any], length: str) -> None:
    """A server that passes on a wrong `Content-Length`, as Flask's own does, makes a bad request of it, not a crash."""
    case = Case("length", "POST", "/predictions", (*JSON, ("Content-Length", length)), b"[]", 400, "Content-Length is")
    answers = [call(native, case) for native in apps.values()]
    assert answers[0] == answers[1]
    check(case, answers[0])


def test_root_path_is_no_part_of_the_route(apps: dict[str, Any]) -> None:
    """Behind `uvicorn --root-path`, paths are those that the proxy's clients see."""
    case = Case("ping", "GET", "/ping")
    assert asyncio.run(call_asgi(apps["fastapi"], case, "/api")) == call(apps["fastapi"], case)


@pytest.mark.parametrize("root_path", ["/", "/pi", "/ping/", "/api"])
@pytest.mark.parametrize("path", ["/ping", "/nope", "/pin"])
def test_root_path_ends_with_a_segment(apps: dict[str, Any], root_path: str, path: str) -> None:
    """A path that has the root path's letters alone is not below it, as Starlette's router sees it."""
    case = Case("ping", "GET", path)

    async def under_root(asgi: Any, scope: Any, receive: Any, send: Any) -> None:
        await asgi({**scope, "root_path": root_path}, receive, send)

    for native in apps.values():
        under = functools.partial(under_root, app.as_asgi(native))
        assert asyncio.run(call_asgi(under, case)) == call(apps["fastapi"], case)


def test_table_is_large_enough() -> None:
    """At least 60 bad requests are in the table, each under its own name."""
    assert len(BAD) >= 60
    assert len({case.id for case in GOOD + BAD}) == len(GOOD + BAD)

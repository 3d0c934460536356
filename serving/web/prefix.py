"""The path below which a proxy offers the service: a request is the same with it and without it.

It is put where each interface has it, `root_path` of a scope and `SCRIPT_NAME` of an environ, once at the entry of an
app. What comes after knows only that.
"""

from __future__ import annotations

from typing import Any


def below(path: str, root_path: str) -> str:
    """Return what a path has below a root path, or the path if it is not below it. Its letters alone do not count."""
    if path == root_path or path.startswith(f"{root_path}/"):
        return path[len(root_path) :] or "/"
    return path


def without(path: str, root_path: str) -> str:
    """Return a path without a root path, however often it stands in front: then to do it twice is the same."""
    while (rest := below(path, root_path)) != path:
        path = rest
    return path


def put_scope_below(scope: Any, root_path: str) -> None:
    """Make a root path that of an ASGI scope, whose path then begins with it.

    The scope stays the same object, for a server tells more by it while it waits for the answer.
    """
    path = scope.get("path", "")
    if path.startswith("/"):  # neither `*` of OPTIONS, nor a start or an end, which has none
        scope["path"] = root_path + without(below(path, scope.get("root_path") or root_path), root_path)
        scope["root_path"] = root_path


def put_environ_below(environ: dict[str, Any], root_path: str) -> None:
    """Make a root path the `SCRIPT_NAME` of a WSGI environ, whose path then is without it."""
    path = environ["PATH_INFO"] or "/"
    if path.startswith("/"):
        environ["PATH_INFO"], environ["SCRIPT_NAME"] = without(path, root_path), root_path

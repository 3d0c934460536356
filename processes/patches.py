"""gevent's patches of Python's standard library: those that have to come early, and all that a worker has.

gevent is imported where it is used, so that uvicorn does without it.
"""

from __future__ import annotations

import atexit
import logging
import os
import ssl
import sys

from serving.errors import StartupError, listed


def patch_ssl() -> None:
    """Let code that is loaded from now on take gevent's names from `ssl`, which do their work unpatched as well.

    A worker is patched when it has been forked. Contexts of the class that `ssl` had before call themselves without end
    from then on (gevent's issue 1016). Call it in the main thread: gevent takes the one that imports it for that.
    """
    from gevent import monkey

    if not monkey.is_module_patched("ssl"):
        monkey.patch_ssl()


def check_ssl() -> None:
    """Raise `StartupError` if it is too late for `patch_ssl`, which would harm what has taken names from `ssl`."""
    kind = ssl.SSLContext
    if kind.__module__ == "ssl" and (
        late := [name for name in sys.modules if name != "ssl" and _has_taken(kind, name)]
    ):
        rule = "restart, or leave server.worker_class 'uvicorn'"
        raise StartupError(f"{listed(late)} took names from Python's ssl, which gevent has to patch before; {rule}")


def _has_taken(kind: type, name: str) -> bool:
    values = [*getattr(sys.modules[name], "__dict__", {}).values()]
    return any(value is kind or type(value) is kind for value in values)


def spare_end() -> None:
    """Let this process, which is patched, end without tracebacks.

    Where Flask is there, its handler of `logging` is one of the last things to go. `logging` then asks for its lock,
    whose functions are gevent's and have gone by then.
    """
    atexit.register(_forget_handlers)


def _forget_handlers() -> None:
    logging.shutdown()
    logging._handlerList.clear()  # type: ignore[attr-defined]  # of references that tell when a handler goes


def patch_as_worker() -> None:
    """Patch this process as a worker is (`gunicorn.workers.ggevent.GeventWorker.init_process`)."""
    from gevent import hub, monkey

    monkey.patch_all()
    patch_fork()
    hub.reinit()


def patch_fork() -> None:
    """Let a native thread fork, for whose child gevent has no watcher: it raises TypeError there."""
    import gevent
    from gevent.os import fork, fork_gevent

    os.fork = lambda: (fork if gevent.get_hub().loop.default else fork_gevent)()

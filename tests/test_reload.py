"""HUP: new settings and a new model are taken as a whole or not at all, and no request is lost by it."""

import os
import signal
from collections.abc import Callable

import pytest
from conftest import COMBINATIONS, ROW, Server, gunicorn_environment, post_case, wait_until
from load import Load


def reload(server: Server) -> None:
    """Send HUP, and wait until the reload has come to its end, good or bad."""
    before = ends(server)
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: ends(server) > before, "the reload to end")


def ends(server: Server) -> int:
    return sum(server.text.count(f'"event":"{event}"') for event in ("reloaded", "reload_refused"))


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize("keep_alive", [True, False], ids=["keep-alive", "close"])
def test_reloads_lose_nothing(serve: Callable[..., Server], combination: tuple[str, str], keep_alive: bool) -> None:
    """Ten HUPs under load: every request is answered 200, and none waits for a second."""
    server = serve(**gunicorn_environment(*combination, SERVING_SERVER__WORKERS="2", SERVING_LOGGING__ACCESS="false"))
    with Load(server, post_case(ROW), keep_alive=keep_alive) as load:
        for _ in range(10):
            reload(server)
            load.wait_for(2000)
    print(load.answers, max(load.took_s), len(load.took_s), load.failures[:5])
    assert load.failures == []
    assert load.answers.keys() == {200}
    assert load.count >= 20_000
    assert max(load.took_s) < 1
    assert server.text.count('"event":"reloaded"') == 10
    server.stop()

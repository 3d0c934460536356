"""How much the tests do: `make test` and `make test-full` run the same functions in two sizes."""

from typing import TypeVar

import pytest

from tests.lib.servers import COMBINATIONS

T = TypeVar("T")
TWINS = [("fastapi", "uvicorn"), ("flask", "gevent")]  # each framework on the worker made for it
is_full = False  # set by --full, before tests are collected


def scale(usual: T, full: T) -> T:
    """Return the value that fits the size of this run."""
    return full if is_full else usual


def each_combination() -> pytest.MarkDecorator:
    """Run a test with each framework on each worker."""
    return pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)


def each_worker() -> pytest.MarkDecorator:
    """Run a test whose subject is the worker with each of them; a full run crosses them with the frameworks."""
    return pytest.mark.parametrize("combination", scale(TWINS, COMBINATIONS), ids="-".join)

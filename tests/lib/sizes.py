"""How much the tests do: `make test` and `make test-full` run the same functions in two sizes."""

import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest

from tests.lib.servers import COMBINATIONS

T = TypeVar("T")
CROSSED = {"framework", "combination", "patient", "labels"}  # parameters that stand for who serves, or what any may say
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


def share(cases: Sequence[T], combination: tuple[str, str]) -> Sequence[T]:
    """Return the cases that a combination takes in a loop: every other one, so that the twins have all of them."""
    return scale(cases[COMBINATIONS.index(combination) % 2 :: 2], cases)


def take_turns(items: list[pytest.Item]) -> list[pytest.Item]:
    """Leave each case of tests marked `in_turn` to one of what is crossed with it, and return what is left out.

    Which one does not depend on what else is collected, so that a case that fails among all is there in its file alone.
    """
    functions: dict[str, dict[Any, list[pytest.Item]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        if item.get_closest_marker("in_turn") and hasattr(item, "callspec"):
            case = tuple(id(value) for name, value in item.callspec.params.items() if name not in CROSSED)
            functions[item.nodeid.partition("[")[0]][case].append(item)
    for function, cases in functions.items():
        for number, group in enumerate(cases.values(), zlib.crc32(function.encode())):
            del group[number % len(group)]
    left = [item for cases in functions.values() for group in cases.values() for item in group]
    items[:] = [item for item in items if item not in left]
    return left

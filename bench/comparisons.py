"""What is measured: the table of the design, and the curves of how cost grows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.judge import Case, Load, added_us, rate_ratio, tail_ratio
from bench.servers import GEVENT, UVICORN, Models, Server, reference, service

SLOW_S = 3  # for answers that take 0.4 s: those under way when wrk stops are not counted
ALLOWED_US = 100
LR, TREES = "logistic regression", "100-tree forest"


@dataclass(frozen=True)
class Panel:
    """A curve for each label: the load that is measured at each x."""

    title: str
    x_label: str
    curves: dict[str, list[tuple[int, Load]]]
    cores: Sequence[int] = ()

    @property
    def loads(self) -> list[Load]:
        """Give each load once."""
        return list(dict.fromkeys(load for points in self.curves.values() for _, load in points))


def textbook(models: Models, framework: str, model: str) -> Server:
    """Give a framework's textbook endpoint around a model."""
    worker_class = UVICORN if framework == "fastapi" else GEVENT
    label = f"textbook {'FastAPI' if framework == 'fastapi' else 'Flask'}"
    return reference(label, f"textbook_{framework}", worker_class, models.artifact(model), "/predictions/list")


def forest(models: Models, framework: str, runtime: str, trees: int = 100) -> Server:
    """Give the service around a forest."""
    environment = models.settings(f"forest-{trees}")
    if runtime != "sklearn":
        environment["SERVING_MODEL__RUNTIME"] = runtime
    return service(framework, f"{trees}-tree forest, {runtime}", **environment)


def make_cases(models: Models, predict_us: float) -> list[list[Case]]:
    """Give the cases in groups, one for each worker class; a group's servers are up at the same time."""
    asgi = Load(reference("bare ASGI hello", "asgi_hello", UVICORN))
    fastapi = Load(reference("FastAPI hello", "fastapi_hello", UVICORN))
    flask = Load(reference("Flask hello", "flask_hello", GEVENT))
    textbook_lr = textbook(models, "fastapi", "iris")
    textbook_trees = Load(textbook(models, "fastapi", "forest-100"), seconds=SLOW_S)
    textbook_flask = Load(textbook(models, "flask", "forest-100"), seconds=SLOW_S)
    served = service("fastapi")
    lr, lr_flask = Load(served), Load(service("flask"))
    logged = Load(service("fastapi", f"{LR}, access logs", SERVING_LOGGING__ACCESS="true"))
    onnx, onnx_flask = Load(forest(models, "fastapi", "onnx")), Load(forest(models, "flask", "onnx"))
    plain = Load(forest(models, "fastapi", "sklearn"))
    lists, textbook_lists = (Load(server, connections=4, rows=1000) for server in (served, textbook_lr))
    alone, asgi_alone = (Load(server, connections=1) for server in (served, asgi.server))
    added = f"one connection, added latency; goal: predict's {predict_us:.0f} µs + {ALLOWED_US} µs"
    uvicorn = [
        Case(f"fastapi + uvicorn, {LR}", lr, asgi, 0.6, rate_ratio),
        Case(f"fastapi + uvicorn, {LR}", lr, fastapi, 2.5, rate_ratio),
        Case(f"fastapi + uvicorn, {LR}", lr, Load(textbook_lr), 8, rate_ratio),
        Case(f"fastapi + uvicorn, {LR}, access logs", logged, asgi, 0.45, rate_ratio),
        Case(f"fastapi + uvicorn, {TREES}, sklearn", plain, textbook_trees, 20, rate_ratio),
        Case(f"fastapi + uvicorn, {TREES}, onnx", onnx, asgi, 0.55, rate_ratio),
        Case(f"fastapi + uvicorn, {TREES}, onnx", onnx, textbook_trees, 80, rate_ratio),
        Case(f"1000 rows a request, 4 connections, {LR}", lists, textbook_lists, 5, rate_ratio),
        Case("p99 over p50, 64 connections", lr, None, 3, tail_ratio, at_most=True),
        Case(added, alone, asgi_alone, predict_us + ALLOWED_US, added_us, "µs", at_most=True),
    ]
    gevent = [
        Case(f"flask + gevent, {LR}", lr_flask, flask, 0.9, rate_ratio),
        Case(f"flask + gevent, {TREES}, onnx", onnx_flask, flask, 0.9, rate_ratio),
        Case(f"flask + gevent, {TREES}, onnx", onnx_flask, textbook_flask, 20, rate_ratio),
    ]
    return [uvicorn, gevent]


def make_panels(models: Models, cores: Sequence[int]) -> list[Panel]:
    """Give the curves; a panel's servers are up at the same time, those of the workers on all of the cores."""
    asgi = reference("bare ASGI hello", "asgi_hello", UVICORN)
    wsgi = reference("bare WSGI hello", "wsgi_hello", GEVENT)
    flask_hello = reference("Flask hello", "flask_hello", GEVENT)
    served, served_flask = service("fastapi"), service("flask")
    textbook_lr = textbook(models, "fastapi", "iris")

    def workers(framework: str, number: int) -> Load:
        return Load(service(framework, f"{number} workers", SERVING_SERVER__WORKERS=str(number)))

    def textbook_trees(number: int) -> Load:
        return Load(textbook(models, "fastapi", f"forest-{number}"), 16, seconds={100: SLOW_S, 1000: 12}.get(number, 1))

    connections = {
        "bare ASGI hello": lambda x: Load(asgi, x),
        "service, fastapi + uvicorn": lambda x: Load(served, x),
        "bare WSGI hello": lambda x: Load(wsgi, x),
        "Flask hello": lambda x: Load(flask_hello, x),
        "service, flask + gevent": lambda x: Load(served_flask, x),
    }
    rows = {
        "service, fastapi + uvicorn": lambda x: Load(served, 4, x),
        "textbook FastAPI": lambda x: Load(textbook_lr, 4, x),
    }
    processes = {
        "service, fastapi + uvicorn": lambda x: workers("fastapi", x),
        "service, flask + gevent": lambda x: workers("flask", x),
    }
    trees = {
        "service, onnx": lambda x: Load(forest(models, "fastapi", "onnx", x), 16),
        "service, sklearn": lambda x: Load(forest(models, "fastapi", "sklearn", x), 16),
        "textbook FastAPI": textbook_trees,
    }
    return [
        draw(f"connections, {LR}", "connections", (1, 4, 16, 64, 256, 512), connections),
        draw(f"rows in a request, {LR}, 4 connections", "rows in a request", (1, 10, 100, 1000, 10_000), rows),
        draw(f"workers on two cores, {LR}, 64 connections", "workers", (1, 2), processes, cores),
        draw("trees of a forest, 16 connections", "trees", (1, 10, 100, 1000), trees),
    ]


def draw(
    title: str, x_label: str, xs: Sequence[int], loads: dict[str, Callable[[int], Load]], cores: Sequence[int] = ()
) -> Panel:
    """Give a panel with each load at each x."""
    return Panel(title, x_label, {label: [(x, make(x)) for x in xs] for label, make in loads.items()}, cores)

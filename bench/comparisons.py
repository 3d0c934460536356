"""What is measured: the table of the design, and the curves of how cost grows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.judge import Comparison, Workload, added_us, rate_ratio, tail_ratio
from bench.servers import GEVENT, UVICORN, Deployment, Models, reference, service

SLOW_S = 3  # for answers that take 0.4 s: those under way when wrk stops are not counted
ALLOWED_US = 100
LR, TREES = "logistic regression", "100-tree forest"


@dataclass(frozen=True)
class Panel:
    """A curve for each label: the workload that is measured at each x."""

    title: str
    x_label: str
    curves: dict[str, list[tuple[int, Workload]]]
    cores: Sequence[int] = ()

    @property
    def workloads(self) -> list[Workload]:
        """Return each workload once."""
        return list(dict.fromkeys(workload for points in self.curves.values() for _, workload in points))


def textbook(models: Models, framework: str, model: str) -> Deployment:
    """Return a framework's textbook endpoint around a model."""
    worker_class = UVICORN if framework == "fastapi" else GEVENT
    label = f"textbook {'FastAPI' if framework == 'fastapi' else 'Flask'}"
    return reference(label, f"textbook_{framework}", worker_class, models.artifact(model), "/predictions/list")


def forest_service(models: Models, framework: str, runtime: str, trees: int = 100) -> Deployment:
    """Return the service around a forest."""
    environment = models.environment(f"forest-{trees}")
    if runtime != "sklearn":
        environment["SERVING_MODEL__RUNTIME"] = runtime
    return service(framework, f"{trees}-tree forest, {runtime}", **environment)


def make_comparisons(models: Models, predict_us: float) -> list[list[Comparison]]:
    """Return the comparisons in groups, one for each worker class; a group's servers are up at the same time."""
    asgi = Workload(reference("bare ASGI hello", "asgi_hello", UVICORN))
    fastapi = Workload(reference("FastAPI hello", "fastapi_hello", UVICORN))
    flask = Workload(reference("Flask hello", "flask_hello", GEVENT))
    textbook_lr = textbook(models, "fastapi", "iris")
    textbook_trees = Workload(textbook(models, "fastapi", "forest-100"), seconds=SLOW_S)
    textbook_flask = Workload(textbook(models, "flask", "forest-100"), seconds=SLOW_S)
    served = service("fastapi")
    lr, lr_flask = Workload(served), Workload(service("flask"))
    logged = Workload(service("fastapi", f"{LR}, access logs", SERVING_LOGGING__ACCESS="true"))
    onnx, onnx_flask = (Workload(forest_service(models, each, "onnx")) for each in ("fastapi", "flask"))
    plain = Workload(forest_service(models, "fastapi", "sklearn"))
    one_tensor = Workload(served, form="tensor")
    tensor, binary = (Workload(served, connections=4, rows=1000, form=form) for form in ("tensor", "binary tensor"))
    lines = Workload(served, connections=4, rows=1000, form="lines")
    lists, textbook_lists = (Workload(each, connections=4, rows=1000) for each in (served, textbook_lr))
    alone, asgi_alone = (Workload(each, connections=1) for each in (served, asgi.deployment))
    added = f"one connection, added latency; goal: predict's {predict_us:.0f} µs + {ALLOWED_US} µs"
    uvicorn = [
        Comparison(f"fastapi + uvicorn, {LR}", lr, asgi, 0.6, rate_ratio),
        Comparison(f"fastapi + uvicorn, {LR}", lr, fastapi, 2.5, rate_ratio),
        Comparison(f"fastapi + uvicorn, {LR}", lr, Workload(textbook_lr), 8, rate_ratio),
        Comparison(f"fastapi + uvicorn, {LR}, access logs", logged, asgi, 0.45, rate_ratio),
        Comparison(f"fastapi + uvicorn, {TREES}, sklearn", plain, textbook_trees, 20, rate_ratio),
        Comparison(f"fastapi + uvicorn, {TREES}, onnx", onnx, asgi, 0.55, rate_ratio),
        Comparison(f"fastapi + uvicorn, {TREES}, onnx", onnx, textbook_trees, 80, rate_ratio),
        Comparison(f"1000 rows a request, 4 connections, {LR}", lists, textbook_lists, 5, rate_ratio),
        Comparison("1 row as a tensor / as an object", one_tensor, lr, 0.9, rate_ratio),
        Comparison("1000 rows as a tensor / as objects", tensor, lists, 1.5, rate_ratio),
        Comparison("1000 rows as a binary tensor / as objects", binary, lists, 5, rate_ratio),
        Comparison("1000 rows as JSON lines / as objects", lines, lists, 0.9, rate_ratio),
        Comparison("p99 over p50, 64 connections", lr, None, 3, tail_ratio, at_most=True),
        Comparison(added, alone, asgi_alone, predict_us + ALLOWED_US, added_us, "µs", at_most=True),
    ]
    gevent = [
        Comparison(f"flask + gevent, {LR}", lr_flask, flask, 0.9, rate_ratio),
        Comparison(f"flask + gevent, {TREES}, onnx", onnx_flask, flask, 0.9, rate_ratio),
        Comparison(f"flask + gevent, {TREES}, onnx", onnx_flask, textbook_flask, 20, rate_ratio),
    ]
    return [uvicorn, gevent]


def workers_workload(framework: str, number: int) -> Workload:
    """Return the workload of a service of so many workers."""
    return Workload(service(framework, f"{number} workers", SERVING_SERVER__WORKERS=str(number)))


def textbook_workload(models: Models, trees: int) -> Workload:
    """Return the workload of a textbook endpoint around a forest, for longer the slower it is."""
    seconds = {100: SLOW_S, 1000: 12}.get(trees, 1)
    return Workload(textbook(models, "fastapi", f"forest-{trees}"), 16, seconds=seconds)


def make_panels(models: Models, cores: Sequence[int]) -> list[Panel]:
    """Return the curves; a panel's servers are up at the same time, those of the workers on all of the cores."""
    asgi = reference("bare ASGI hello", "asgi_hello", UVICORN)
    wsgi = reference("bare WSGI hello", "wsgi_hello", GEVENT)
    flask_hello = reference("Flask hello", "flask_hello", GEVENT)
    served, served_flask = service("fastapi"), service("flask")
    patient = service("fastapi", f"{LR}, a longer queue", SERVING_LIMITS__MAX_QUEUED_ROWS="40000")
    textbook_lr = textbook(models, "fastapi", "iris")

    connections = {
        "bare ASGI hello": lambda x: Workload(asgi, x),
        "service, fastapi + uvicorn": lambda x: Workload(served, x),
        "bare WSGI hello": lambda x: Workload(wsgi, x),
        "Flask hello": lambda x: Workload(flask_hello, x),
        "service, flask + gevent": lambda x: Workload(served_flask, x),
    }
    rows = {
        "service, fastapi + uvicorn": lambda x: Workload(patient, 4, x),
        "textbook FastAPI": lambda x: Workload(textbook_lr, 4, x),
    }
    processes = {
        "service, fastapi + uvicorn": lambda x: workers_workload("fastapi", x),
        "service, flask + gevent": lambda x: workers_workload("flask", x),
    }
    trees = {
        "service, onnx": lambda x: Workload(forest_service(models, "fastapi", "onnx", x), 16),
        "service, sklearn": lambda x: Workload(forest_service(models, "fastapi", "sklearn", x), 16),
        "textbook FastAPI": lambda x: textbook_workload(models, x),
    }
    return [
        draw(f"connections, {LR}", "connections", (1, 4, 16, 64, 256, 512), connections),
        draw(f"rows in a request, {LR}, 4 connections", "rows in a request", (1, 10, 100, 1000, 10_000), rows),
        draw(f"workers on two cores, {LR}, 64 connections", "workers", (1, 2), processes, cores),
        draw("trees of a forest, 16 connections", "trees", (1, 10, 100, 1000), trees),
    ]


def draw(
    title: str,
    x_label: str,
    xs: Sequence[int],
    workloads: dict[str, Callable[[int], Workload]],
    cores: Sequence[int] = (),
) -> Panel:
    """Return a panel with each workload at each x."""
    return Panel(title, x_label, {label: [(x, make(x)) for x in xs] for label, make in workloads.items()}, cores)

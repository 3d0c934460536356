"""What the service is measured against: bare apps, each framework's hello, and the endpoints that its tutorials show.

Each function is a factory for `gunicorn references:NAME()`, and imports only what its app needs.
"""

import os
from typing import Any

IRIS_FEATURES = ["sepal_length", "sepal_width", "petal_length", "petal_width"]  # cm
HELLO = b'{"hello":"world"}'


def asgi_hello() -> Any:
    """Make the least that uvicorn can serve."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(HELLO))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": HELLO})

    return app


def wsgi_hello() -> Any:
    """Make the least that gunicorn can serve."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(HELLO)))])
        return [HELLO]

    return app


def fastapi_hello() -> Any:
    """Make FastAPI's first example, for POST."""
    from fastapi import FastAPI

    app = FastAPI()

    @app.post("/predictions")
    async def hello() -> dict[str, str]:
        return {"hello": "world"}

    return app


def flask_hello() -> Any:
    """Make Flask's first example, for POST and in JSON."""
    from flask import Flask, Response, jsonify

    app = Flask(__name__)

    @app.post("/predictions")
    def hello() -> Response:
        return jsonify(hello="world")

    return app


def textbook_fastapi() -> Any:
    """Serve the estimator of $MODEL, a file, as tutorials do: a pydantic model, `def`, a predict for each request."""
    import joblib
    from fastapi import FastAPI
    from pydantic import BaseModel

    app = FastAPI()
    estimator = joblib.load(os.environ["MODEL"])

    class Iris(BaseModel):
        sepal_length: float
        sepal_width: float
        petal_length: float
        petal_width: float

    def cells(iris: Iris) -> list[float]:
        return [iris.sepal_length, iris.sepal_width, iris.petal_length, iris.petal_width]

    @app.post("/predictions")
    def predict(iris: Iris) -> dict[str, str]:
        return {"prediction": estimator.predict([cells(iris)])[0]}

    @app.post("/predictions/list")
    def predict_list(rows: list[Iris]) -> list[dict[str, str]]:
        return [{"prediction": label} for label in estimator.predict([cells(iris) for iris in rows])]

    return app


def textbook_flask() -> Any:
    """Serve the estimator of $MODEL, a file, as tutorials do: what the JSON has, a predict for each request."""
    import joblib
    from flask import Flask, Response, jsonify, request

    app = Flask(__name__)
    estimator = joblib.load(os.environ["MODEL"])

    @app.post("/predictions")
    def predict() -> Response:
        iris = request.get_json()
        return jsonify(prediction=estimator.predict([[iris[name] for name in IRIS_FEATURES]])[0])

    return app

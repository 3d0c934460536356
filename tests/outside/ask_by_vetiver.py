"""Ask services by vetiver's `predict`, and print what it returns for each, as JSON."""

import json
import sys
from typing import Any

import pandas as pd
from vetiver import predict, vetiver_endpoint

FLOWER = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}
FRAME = pd.DataFrame([FLOWER, FLOWER])


def ask(url: str) -> dict[str, Any]:
    endpoint = vetiver_endpoint(f"{url}/predictions")
    told = {
        "frame": predict(endpoint, FRAME)["prediction"].tolist(),
        "series": predict(endpoint, FRAME.iloc[0])["prediction"].tolist(),
        "dict": predict(endpoint, FLOWER)["prediction"].tolist(),
        "invocations": predict(vetiver_endpoint(f"{url}/invocations"), FRAME)["predictions"].tolist(),
    }
    try:
        predict(endpoint, FRAME.drop(columns="petal_width"))
    except TypeError as error:  # vetiver's own for a 422
        told["bad_frame"] = str(error)
    return told


print(json.dumps([ask(url) for url in sys.argv[1:]]))

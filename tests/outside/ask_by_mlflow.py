"""Ask services as MLflow asks a model that it serves, and print what it returns for each, as JSON."""

import json
import sys
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import requests
from mlflow.pyfunc.scoring_server import CONTENT_TYPE_CSV
from mlflow.pyfunc.scoring_server.client import ScoringServerClient

FLOWER = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}
FRAME = pd.DataFrame([FLOWER, FLOWER])


def ask(url: str) -> dict[str, Any]:
    address = urlsplit(url)
    client = ScoringServerClient(address.hostname, address.port)
    client.wait_server_ready()
    headers = {"Content-Type": CONTENT_TYPE_CSV}
    posted = requests.post(f"{url}/invocations", FRAME.to_csv(index=False), headers=headers, timeout=60)
    return {
        "frame": client.invoke(FRAME).get_predictions().to_dict("list"),
        "array": client.invoke(FRAME.to_numpy()).get_predictions("ndarray").tolist(),
        "list": client.invoke([FLOWER]).get_predictions("ndarray", dtype=np.str_).tolist(),
        "full": client.invoke(FRAME, params={"full": True}).get_predictions().columns.tolist(),
        "csv": posted.json(),
    }


print(json.dumps([ask(url) for url in sys.argv[1:]]))

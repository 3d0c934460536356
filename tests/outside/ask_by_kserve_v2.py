"""Ask services by KServe's REST client in its V2 protocol, and print what it returns for each, as JSON."""

import asyncio
import json
import sys
from typing import Any

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

FLOWERS = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]])


def request_of(rows: np.ndarray, is_binary: bool) -> InferRequest:
    flowers = InferInput("flowers", [*rows.shape], "FP64")
    flowers.set_data_from_numpy(rows, binary_data=is_binary)
    return InferRequest(model_name="iris", infer_inputs=[flowers], request_id="7")


async def ask(url: str) -> dict[str, Any]:
    async with InferenceRESTClient(RESTConfig(protocol="v2", retries=0)) as client:
        told: dict[str, Any] = {
            "live": await client.is_server_live(url),
            "ready": await client.is_server_ready(url),
            "model_ready": await client.is_model_ready(url, "iris"),
            "unknown_model_ready": await client.is_model_ready(url, "other"),
        }
        for name, is_binary in (("json", False), ("binary", True)):
            answer = await client.infer(url, request_of(FLOWERS, is_binary), model_name="iris")
            prediction, probabilities = answer.outputs
            told[name] = [answer.id, prediction.as_numpy().tolist(), [*probabilities.as_numpy().shape]]
        try:
            await client.infer(url, request_of(FLOWERS[:, :3], is_binary=True), model_name="iris")
        except httpx.HTTPStatusError as error:
            told["three_columns"] = error.response.status_code
        return told


print(json.dumps([asyncio.run(ask(url)) for url in sys.argv[1:]]))

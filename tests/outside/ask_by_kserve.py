"""Ask services by KServe's REST client in its V1 protocol, and print what it returns for each, as JSON."""

import asyncio
import json
import sys
from typing import Any

import httpx
from kserve import InferenceRESTClient, RESTConfig

FLOWER = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}


async def ask(url: str) -> dict[str, Any]:
    async with InferenceRESTClient(RESTConfig(protocol="v1", retries=0)) as client:
        told = {
            "live": await client.is_server_live(url),
            "ready": await client.is_model_ready(url, "iris"),
            "lists": await client.infer(url, {"instances": [[*FLOWER.values()]] * 2}, model_name="iris"),
            "objects": await client.infer(url, {"instances": [FLOWER]}, model_name="iris"),
        }
        for name, model, instances in (("unknown_model", "other", [FLOWER]), ("bad_row", "iris", [{}])):
            try:
                await client.infer(url, {"instances": instances}, model_name=model)
            except httpx.HTTPStatusError as error:
                told[name] = error.response.status_code
        return told


print(json.dumps([asyncio.run(ask(url)) for url in sys.argv[1:]]))

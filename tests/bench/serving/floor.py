"""The floor: a bare uvicorn ASGI application around the model, with a batch loop written by hand; nothing is checked.

python -m tests.bench.serving.floor MODEL_FOLDER PORT
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import numpy as np
import orjson
import torch
import uvicorn

from deepseek_ray.models import load

MAX_BATCH = 64
JSON_HEADERS = (b"content-type", b"application/json")


class Floor:
    """ASGI: POST anything with ``features`` and ``sequence``, get ``probability``."""

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        self._model = load(folder)
        self._queue: asyncio.Queue[tuple[dict[str, Any], asyncio.Future[float]]] = asyncio.Queue()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        body = (await receive())["body"]
        future = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((orjson.loads(body), future))
        answer = orjson.dumps({"probability": await future})
        headers = [JSON_HEADERS, (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _lifespan(self, receive: Any, send: Any) -> None:
        await receive()
        task = asyncio.create_task(self._batches())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        task.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    async def _batches(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while len(batch) < MAX_BATCH and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            features = np.array([item["features"] for item, _ in batch])
            sequence = np.array([item["sequence"] for item, _ in batch])
            # in a thread: torch lets the interpreter go meanwhile, which gave 1.2x at 64 connections on two cores
            scores = await asyncio.get_running_loop().run_in_executor(
                None, self._model.predict_proba, features, sequence
            )
            for (_, future), value in zip(batch, scores.tolist(), strict=True):
                future.set_result(value)


def main() -> None:
    """Serve on 127.0.0.1."""
    folder, port = sys.argv[1], int(sys.argv[2])
    uvicorn.run(Floor(folder), host="127.0.0.1", port=port, log_level="warning", access_log=False, backlog=2_048)


if __name__ == "__main__":
    main()

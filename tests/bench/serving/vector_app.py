"""The product's fast path without feature state and prediction log: HTTP, checks, batch, model, answer.

python -m tests.bench.serving.vector_app MODEL_FOLDER PORT
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from deepseek_ray.config import ServingConfig
from deepseek_ray.serving.asgi import AsgiApp, Receive, Response, Scope, read_body
from deepseek_ray.serving.auth import Keyring
from deepseek_ray.serving.batching import Batcher
from deepseek_ray.serving.monitor import HttpMonitor
from deepseek_ray.serving.problem import FieldErrors, field_errors
from deepseek_ray.serving.slow_clients import ConnectionLimits, guard
from serve_apps import ingress

MAX_BODY_BYTES = 4 << 20


class Row(BaseModel):
    """One row of model inputs."""

    model_config = ConfigDict(extra="forbid")
    features: list[float]
    sequence: list[list[float]]


@dataclass(frozen=True)
class _Checked:
    features: np.ndarray
    sequence: np.ndarray


class VectorApp(AsgiApp):
    """ASGI: POST /v1/score."""

    def __init__(self, folder: str, key: str) -> None:
        import torch

        from deepseek_ray.models import load

        torch.set_num_threads(1)
        self._model = load(folder)
        self._shape = (self._model.config.sequence_len, 6)
        monitor = HttpMonitor("rows")
        self._batcher: Batcher[_Checked, float] = Batcher(self._score_batch, max_batch_size=64, max_queued=2_000)
        routes = {"/v1/score": {"POST": self._score}}
        guard(ConnectionLimits.of(ServingConfig()), lambda reason: monitor.shed.labels(reason).inc())
        super().__init__(routes, Keyring(key), monitor, document=dict, shutdown=self._batcher.close)

    async def _score(self, scope: Scope, receive: Receive) -> Response:
        body = await read_body(scope, receive, MAX_BODY_BYTES)
        try:
            row = Row.model_validate_json(body)
        except ValidationError as error:
            raise FieldErrors(field_errors(error)) from None
        checked = _Checked(np.array(row.features), np.array(row.sequence))
        probability = await self._batcher.submit(checked)
        return Response(200, orjson.dumps({"probability": probability}))

    def _score_batch(self, rows: Sequence[_Checked]) -> list[float]:
        features = np.stack([row.features for row in rows])
        sequence = np.stack([row.sequence for row in rows])
        scores: list[float] = self._model.predict_proba(features, sequence).tolist()
        return scores


def main() -> None:
    """Serve until killed."""
    folder, port = sys.argv[1], int(sys.argv[2])
    ingress.prepare("127.0.0.1", port)
    try:
        ingress.start(VectorApp, folder, os.environ["DEEPSEEK_RAY_API_KEY"], host="127.0.0.1")
        threading.Event().wait()
    finally:
        ingress.stop()


if __name__ == "__main__":
    main()

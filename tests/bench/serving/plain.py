"""Ray Serve as its quick start shows it: the default proxy, with or without ``@serve.batch``.

python -m tests.bench.serving.plain MODEL_FOLDER PORT [--batch]
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from deepseek_ray.logs import QUIET_ENVIRONMENT, silence_telemetry

silence_telemetry()

import numpy as np  # noqa: E402
import ray  # noqa: E402
from ray import serve  # noqa: E402
from starlette.requests import Request  # noqa: E402


class Plain:
    """One request, one call of the model."""

    def __init__(self, folder: str) -> None:
        import torch

        from deepseek_ray.models import load

        torch.set_num_threads(1)
        self._model = load(folder)

    async def __call__(self, request: Request) -> dict[str, float]:
        return {"probability": self._score([await request.json()])[0]}

    def _score(self, rows: list[dict[str, Any]]) -> list[float]:
        features, sequence = (np.array([row[name] for row in rows]) for name in ("features", "sequence"))
        scores: list[float] = self._model.predict_proba(features, sequence).tolist()
        return scores


class Batched(Plain):
    """Requests that arrive together are scored together."""

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.001)
    async def score_batch(self, rows: list[dict[str, Any]]) -> list[float]:
        """One call of the model for all rows."""
        return self._score(rows)

    async def __call__(self, request: Request) -> dict[str, float]:
        return {"probability": await self.score_batch(await request.json())}


def main() -> None:
    """Serve on 127.0.0.1 until killed."""
    folder, port, batched = sys.argv[1], int(sys.argv[2]), "--batch" in sys.argv
    environment = {"env_vars": {**QUIET_ENVIRONMENT, "OMP_NUM_THREADS": "1"}}
    os.environ |= {
        "RAY_worker_niceness": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        num_cpus=4,
        object_store_memory=100 << 20,
        log_to_driver=False,
        configure_logging=False,
        runtime_env=environment,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deployment = serve.deployment(max_ongoing_requests=256)(Batched if batched else Plain)
    serve.run(deployment.bind(folder))
    threading.Event().wait()


if __name__ == "__main__":
    main()

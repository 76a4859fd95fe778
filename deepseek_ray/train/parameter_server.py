"""Gradients summed by a server instead of among the workers: one Ray actor for each shard of the model.

Every replica pushes its gradients and gets the sum back when all have pushed (synchronous, as in Li et al. 2014,
https://www.usenix.org/conference/osdi14/technical-sessions/presentation/li_mu). The server adds replica by replica, so
that the sum is the same whatever arrives first.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError

from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.parallel.exchange import Weights
from deepseek_ray.parallel.mesh import Mesh
from deepseek_ray.train.clip import local_part

Array = NDArray[Any]


class SumServer:
    """Adds what the replicas of one shard push in a round; runs as a Ray actor.

    Args:
        replicas: pushes that make a round complete.
    """

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._pushed: dict[int, dict[int, Array]] = {}
        self._sums: dict[int, asyncio.Future[Array]] = {}

    async def push(self, round_: int, replica: int, flat: Array) -> Array:
        """Give a replica's gradients of a round; returns the sum of all replicas."""
        ready = self._sums.setdefault(round_, asyncio.get_running_loop().create_future())
        pushed = self._pushed.setdefault(round_, {})
        pushed[replica] = flat
        if len(pushed) == self._replicas:
            total = pushed[0].copy()
            for number in range(1, self._replicas):
                total += pushed[number]
            del self._pushed[round_]
            self._sums.pop(round_ - 1, None)  # all have it: they pushed again
            ready.set_result(total)
        return await ready


class ParameterServer:
    """This worker's side of its shard's server.

    Args:
        mesh: tells the shard and the replica.
        job: makes the actors' names unique; a restart uses another one.
        timeout_s: longest wait for the other replicas.
    """

    delays = False

    def __init__(self, mesh: Mesh, job: str, timeout_s: float) -> None:
        shard = "-".join(str(mesh.rank(axis)) for axis in ("pp", "dp_shard", "tp"))
        self.replica, self.timeout_s, self._round = mesh.rank("dp_replicate"), timeout_s, 0
        actor = ray.remote(num_cpus=0)(SumServer)
        self._server = actor.options(name=f"{job}-{shard}", get_if_exists=True, max_concurrency=1000).remote(
            mesh.degrees.dp_replicate
        )

    @torch.no_grad()
    def sum_gradients(self, weights: Weights, *, flush: bool) -> None:
        """See GradientExchange; there is nothing to flush.

        Raises:
            EnvironmentProblemError: another replica did not push in time.
        """
        parts = [local_part(weight.grad) for _, weight in weights if weight.grad is not None]
        flat = torch.cat([part.flatten() for part in parts])
        pushed = self._server.push.remote(self._round, self.replica, flat.cpu().numpy())
        try:
            received = ray.get(pushed, timeout=self.timeout_s)
        except GetTimeoutError as error:
            raise EnvironmentProblemError(
                f"The other replicas sent no gradients of round {self._round} within {self.timeout_s:g} s.",
                fix="look for a worker that died or is slow, or raise cluster.timeout_s",
            ) from error
        total = torch.from_numpy(np.array(received)).to(flat.device)
        self._round += 1
        first = 0
        for part in parts:
            part.copy_(total[first : first + part.numel()].view_as(part))
            first += part.numel()

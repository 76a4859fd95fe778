"""How gradients cross dp_replicate when the backward pass does not sum them itself.

``top_k`` sends the largest elements and keeps the rest for later (error feedback: Stich et al. 2018, arXiv:1809.07599;
Lin et al. 2018, arXiv:1712.01887). What is kept is sent whole before every checkpoint, so that a checkpoint holds no
state of one replica only and can be resumed on any mesh.

Legend: N elements of a shard, K of them that are sent, R replicas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

Weights = Sequence[tuple[str, nn.Parameter]]


class GradientExchange(Protocol):
    """Sums the gradients of all replicas, in place.

    Attributes:
        delays: some of a gradient may come in a later step, unless told to flush.
    """

    delays: bool

    def sum_gradients(self, weights: Weights, *, flush: bool) -> None:
        """Make every replica hold the sum.

        Args:
            weights: name and weight, in the same order on every replica.
            flush: leave nothing for later.
        """
        ...


class TopK:
    """The K largest elements of each shard, with what was left out before added first.

    ``sent_bytes`` and ``dense_bytes`` count what this process sent, and what it would have sent without compression.

    Args:
        group: the processes that hold the same shards.
        fraction: K / N.
    """

    delays = True

    def __init__(self, group: dist.ProcessGroup, fraction: float) -> None:
        self.group, self.fraction = group, fraction
        self.sent_bytes = self.dense_bytes = 0
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def sum_gradients(self, weights: Weights, *, flush: bool) -> None:
        """See :class:`GradientExchange`."""
        for name, weight in weights:
            if weight.grad is None:
                continue
            gradient = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
            total_N = gradient.flatten() + self._kept.pop(name, 0.0)
            self.dense_bytes += total_N.numel() * total_N.element_size()
            if flush:
                dist.all_reduce(total_N, group=self.group)
                self.sent_bytes += total_N.numel() * total_N.element_size()
            else:
                total_N = self._sparse_sum(name, total_N)
            gradient.copy_(total_N.view_as(gradient))

    def _sparse_sum(self, name: str, total_N: Tensor) -> Tensor:
        count = math.ceil(total_N.numel() * self.fraction)
        index_K = total_N.abs().topk(count).indices
        value_K = total_N[index_K]
        self._kept[name] = total_N.index_fill(0, index_K, 0.0)
        short_K = index_K.to(torch.int32) if total_N.numel() < 2**31 else index_K
        self.sent_bytes += count * (short_K.element_size() + value_K.element_size())
        indices, values = _gather(short_K, self.group), _gather(value_K, self.group)
        summed_N = torch.zeros_like(total_N)
        for index, value in zip(indices, values, strict=True):  # replica by replica: the same order everywhere
            summed_N.index_add_(0, index.long(), value)
        return summed_N


def _gather(part: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts

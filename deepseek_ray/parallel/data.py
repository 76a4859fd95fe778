"""The data-parallel axis (dp_replicate): which rows a worker reads, how gradients and counts are joined.

Rows are dealt by the rank on this axis, never by the world rank: peers of other axes must see the same rows. The order
of an epoch depends on the seed and the epoch only, so that any number of workers walks through the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class DataAxis:
    """This process's place on the data-parallel axis. The default is a process on its own.

    Args:
        rank: 0 .. size - 1.
        size: processes that hold a replica.
        group: torch process group of the axis; None is the default group.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def current(cls) -> DataAxis:
        """The axis that spans the default process group, where there is one."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else cls()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Average gradients over the axis in backward; the model itself where there is one process.

        Buffers are not sent around: each replica computes the same ones from joined counts.
        """
        if self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, process_group=self.group, broadcast_buffers=False)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the axis, on every process; in place where there is more than one."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def barrier(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            dist.barrier(group=self.group)


@dataclass(frozen=True)
class Batch:
    """One step's rows on one worker.

    Args:
        rows: row numbers of this worker; may be empty.
        total: rows of the step over all workers.
    """

    rows: NDArray[np.int64]
    total: int


def epoch_order(label: NDArray[np.int8], seed: int, epoch: int, negative_rate: float) -> NDArray[np.int64]:
    """Rows of one epoch in shuffled order: every fraud, and a fresh share of the genuine rows.

    The number of rows is the same in every epoch; the same on every worker.
    """
    rng = np.random.default_rng([seed, epoch])
    fraud, genuine = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
    kept = rng.choice(genuine, size=round(len(genuine) * negative_rate), replace=False, shuffle=False)
    return rng.permutation(np.concatenate([fraud, kept]))


def num_batches(num_rows: int, batch_size: int) -> int:
    """Steps of an epoch: batches of nearly equal size, so that no step rests on a handful of rows."""
    return max(1, round(num_rows / batch_size))


def batches(order: NDArray[np.int64], batch_size: int, axis: DataAxis) -> Iterator[Batch]:
    """Deal the rows of an epoch: batch by batch, every ``size``-th row to this rank."""
    for rows in np.array_split(order, num_batches(len(order), batch_size)):
        yield Batch(rows[axis.rank :: axis.size], len(rows))


def gather_rows(local: NDArray[np.float64], num_rows: int, axis: DataAxis) -> NDArray[np.float64]:
    """Join values of rows ``rank::size`` into all rows, on every process."""
    joined = torch.zeros(num_rows, dtype=torch.float64)
    joined[axis.rank :: axis.size] = torch.from_numpy(local)
    return axis.sum(joined).numpy()

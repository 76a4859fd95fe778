"""Training samples by number: any process finds any sample, so the order of the data never depends on the mesh.

Legend: B samples, S positions, C channels, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from deepseek_ray.config_moe import BackboneConfig


class Samples(Protocol):
    """An endless data set in a fixed order."""

    def take(self, number_B: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of samples, by their number in the order of training."""
        ...


class RandomSamples:
    """Samples drawn from their number: for verification and benchmarks, where content does not matter.

    Tokens follow Zipf's law, so that routing is as uneven as on text.

    Args:
        shape: decides what a sample looks like.
        seq_len: S.
        seed: of all samples.
        dtype: of event vectors and voxels.
    """

    def __init__(self, shape: BackboneConfig, seq_len: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.seq_len, self.seed, self.dtype = shape, seq_len, seed, dtype

    def take(self, number_B: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Samples`."""
        pairs = [self._one(int(number)) for number in number_B]
        inputs, targets = zip(*pairs, strict=True)
        return torch.stack(inputs), torch.stack(targets)

    def _one(self, number: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        shape, length = self.shape, self.seq_len
        if shape.adapter == "tokens":
            weight_V = 1.0 / torch.arange(1, shape.vocab_size + 1, dtype=torch.float64)
            tokens = torch.multinomial(weight_V, length + 1, replacement=True, generator=draw)
            x, target = tokens[:-1], tokens[1:]
        elif shape.adapter == "events":
            x = torch.randn(length, shape.num_channels, generator=draw, dtype=torch.float32).to(self.dtype)
            target = torch.randint(shape.vocab_size, (length,), generator=draw)
        else:
            edge = round(length ** (1 / 3)) * shape.patch_size
            x = torch.randn(shape.num_channels, edge, edge, edge, generator=draw, dtype=torch.float32).to(self.dtype)
            target = torch.randint(shape.vocab_size, (length,), generator=draw)
        if shape.head == "classification":
            target = torch.randint(shape.num_classes, (), generator=draw)
        return x, target

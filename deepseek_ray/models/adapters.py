"""From input to model width: tokens, event vectors, three-dimensional patches.

Legend: B sequences, S positions, C channels, D model width, V vocabulary, Q edge of a patch, U = C * Q^3.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

from deepseek_ray.config_moe import BackboneConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.models.layers import Linear


class TokenAdapter(nn.Module):
    """One vector a token."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d_model)

    def forward(self, token_BS: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, D)."""
        x_BSD: Tensor = self.embed(token_BS)
        return x_BSD


class EventAdapter(nn.Module):
    """A linear map of each event's numbers."""

    def __init__(self, num_channels: int, d_model: int) -> None:
        super().__init__()
        self.project = Linear(num_channels, d_model)

    def forward(self, event_BSC: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, D)."""
        x_BSD: Tensor = self.project(event_BSC)
        return x_BSD


class PatchAdapter(nn.Module):
    """Cubic patches of a volume in raster order, each mapped linearly (the 3D form of arXiv:2010.11929)."""

    def __init__(self, num_channels: int, patch_size: int, d_model: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.project = Linear(num_channels * patch_size**3, d_model)

    def forward(self, voxel_BCZYX: Tensor) -> Tensor:
        """(B, C, Z, Y, X) -> (B, S, D), S = Z * Y * X / Q^3.

        Raises:
            ConfigError: an edge of the volume is not a multiple of Q.
        """
        size = self.patch_size
        if any(edge % size for edge in voxel_BCZYX.shape[2:]):
            edges = tuple(voxel_BCZYX.shape[2:])
            raise ConfigError(f"A volume of {edges} voxels has no whole patches of {size}.", fix="pad or crop it")
        patch_BCzyxQQQ = voxel_BCZYX.unfold(2, size, size).unfold(3, size, size).unfold(4, size, size)
        x_BSU = patch_BCzyxQQQ.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(1, 3)
        x_BSD: Tensor = self.project(x_BSU)
        return x_BSD


Adapter: TypeAlias = TokenAdapter | EventAdapter | PatchAdapter


def make_adapter(config: BackboneConfig) -> Adapter:
    """The adapter the config names."""
    if config.adapter == "tokens":
        return TokenAdapter(config.vocab_size, config.d_model)
    if config.adapter == "events":
        return EventAdapter(config.num_channels, config.d_model)
    return PatchAdapter(config.num_channels, config.patch_size, config.d_model)


def example_input(config: BackboneConfig, num_samples: int, seq_len: int, dtype: torch.dtype) -> Tensor:
    """An input of the right shape without data (on the meta device), for static shapes."""
    if config.adapter == "tokens":
        return torch.empty(num_samples, seq_len, dtype=torch.int64, device="meta")
    if config.adapter == "events":
        return torch.empty(num_samples, seq_len, config.num_channels, dtype=dtype, device="meta")
    edge = round(seq_len ** (1 / 3)) * config.patch_size
    return torch.empty(num_samples, config.num_channels, edge, edge, edge, dtype=dtype, device="meta")

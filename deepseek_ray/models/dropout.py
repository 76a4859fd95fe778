"""Dropout whose mask is a function of what is dropped, not of which process drops it.

The mask of (sample, layer, position, channel) is one hash of these numbers, so any mesh draws the same one, and a
recomputation draws it again (counter-based random numbers, Salmon et al. 2011, doi:10.1145/2063384.2063405).

Legend: B samples, S positions, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEP = -7046029254386353131  # 0x9E3779B97F4A7C15, of splitmix64
_MIX = (-4658895280553007687, -7723592293110705685)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(number: Tensor) -> Tensor:
    """Splitmix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195) of int64 numbers."""
    number = number + _STEP
    for shift, factor in zip((30, 27), _MIX, strict=True):
        number = (number ^ _shifted(number, shift)) * factor
    return number ^ _shifted(number, 31)


def sample_keys(seed: int, step: int, sample_B: Tensor) -> Tensor:
    """(B,) int64: what randomness of a sample in a step depends on."""
    start = torch.tensor([seed, step], dtype=torch.int64, device=sample_B.device)
    return mix(sample_B + mix(start[1] + mix(start[0])))


def dropout(x_BSD: Tensor, rate: float, key_B: Tensor, layer: int, first_position: int = 0) -> Tensor:
    """Zero each element with probability ``rate`` and scale the others by 1 / (1 - rate).

    Args:
        x_BSD: activations, of positions from ``first_position`` on.
        rate: probability.
        key_B: from :func:`sample_keys`.
        layer: distinguishes the places in a model.
        first_position: where a shard of the sequence begins.
    """
    _, length, width = x_BSD.shape
    key_B = mix(key_B + layer)
    position_S = torch.arange(first_position, first_position + length, device=x_BSD.device)
    place_SD = position_S[:, None] * width + torch.arange(width, device=x_BSD.device)
    uniform_BSD = _shifted(mix(key_B[:, None, None] + place_SD * _STEP), 11).to(torch.float64) * 2.0**-53
    return x_BSD * (uniform_BSD >= rate).to(x_BSD.dtype) / (1.0 - rate)


def _shifted(number: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: int64's own keeps the sign."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)

"""What row-wise ops share: checks of their arguments, rows in memory order, tiles and the grid of a backward pass.

Legend: M rows, N width of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_ray.kernels.tuning import Settings, bucket

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_WIDTH = 8192
"""A program holds a whole row in registers: wider rows, which no model here has, take the torch composition."""


def check_floats(**tensors: Tensor | None) -> None:
    """All are of a float type and on the first one's device.

    Raises:
        ValueError: one is not; the message names it.
    """
    present = {name: one for name, one in tensors.items() if one is not None}
    first, device = next((name, one.device) for name, one in present.items())
    for name, one in present.items():
        if one.dtype not in FLOATS:
            raise ValueError(f"{name} has type {one.dtype}: convert it to float16, bfloat16, float32 or float64")
        if one.device != device:
            raise ValueError(f"{name} is on {one.device}, {first} on {device}: move one of them")


class Rows:
    """Views of tensors of one shape as (M, N), rows in the order in which the first one holds them in memory.

    A row-wise op does not mind the order, so heads that were transposed, (B, H, S, P) over (B, S, H, P), need no copy.

    Args:
        like: any leading shape, last dimension N.
    """

    def __init__(self, like: Tensor) -> None:
        strides = like.stride()
        leading = sorted(range(like.ndim - 1), key=lambda dim: -strides[dim])
        self._order = [*leading, like.ndim - 1]
        self._back = [self._order.index(dim) for dim in range(like.ndim)]
        self._shape = [like.shape[dim] for dim in leading]

    def flat(self, x: Tensor) -> Tensor:
        """Contiguous (M, N)."""
        return x.permute(self._order).reshape(-1, x.shape[-1]).contiguous()

    def shaped(self, y_MN: Tensor) -> Tensor:
        """The way back for a result of M rows of any width."""
        return y_MN.view(*self._shape, y_MN.shape[-1]).permute(self._back)


def forward_tile(width: int) -> Settings:
    """Whole rows, several where they are narrow, 32 elements a thread: six programs of 8 KiB on a multiprocessor."""
    return _tile(width, 4096, per_thread=32)


def backward_tile(width: int) -> Settings:
    """Less of each, as sums of the weights' gradients stay in registers from row to row."""
    return _tile(width, 1024, per_thread=16)


def candidates(width: int) -> list[Settings]:
    """What is worth measuring for either pass."""
    tiles = [_tile(width, least, per_thread) for least in (1024, 2048, 4096) for per_thread in (8, 16, 32)]
    return [one for place, one in enumerate(tiles) if one not in tiles[:place]]


def _tile(width: int, least: int, per_thread: int) -> Settings:
    block_n = bucket(width)
    block_m = max(1, least // block_n)
    num_warps = min(32, max(4, block_m * block_n // per_thread // 32))
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps}


def programs(num_rows: int, settings: Settings) -> int:
    """Programs that share the rows of a backward pass, each with its own sum of the weights' gradients.

    As many as a Hopper GPU of 132 multiprocessors runs at once, on any GPU: another number would be another order of
    summation, and a row of float32 more to write and add for each.
    """
    at_once = 132 * min(8, max(1, MAX_WIDTH // settings["BLOCK_N"]))
    return min(-(-num_rows // settings["BLOCK_M"]), at_once)

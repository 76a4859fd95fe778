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

_TILE = 4096
_MAX_PROGRAMS = 528


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


def tile(width: int, per_thread: int) -> Settings:
    """Whole rows, several where they are narrow, and as many warps as give a thread ``per_thread`` elements."""
    block_n = bucket(width)
    block_m = max(1, _TILE // block_n)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": min(32, max(1, block_m * block_n // per_thread // 32))}


def programs(num_rows: int, block_m: int) -> int:
    """Programs that share the rows of a backward pass, each with its own sum of the weights' gradients.

    Four for each of a Hopper GPU's 132 multiprocessors, on any GPU: another number would be another order of summation.
    """
    return min(-(-num_rows // block_m), _MAX_PROGRAMS)

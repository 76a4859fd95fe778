"""Layers that every part of a model uses: linear maps, normalisation, the gated feed-forward layer.

Legend: ``...`` any leading shape, D model width, H hidden width, O outputs.

Weights may be sharded (DTensor): a layer computes with the shard it holds, and what runs before and after it
(parallel/tensor.py) makes the parts a whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from deepseek_ray.kernels.rms_norm import rms_norm
from deepseek_ray.kernels.swiglu import swiglu
from deepseek_ray.models.recompute import recomputed


def local(weight: Tensor) -> Tensor:
    """The shard of a weight that this process holds; the weight itself where it is whole.

    A weight that is replicated over an axis sees only a part of the tokens or of the heads there: its gradient is one
    summand of the whole.
    """
    if not isinstance(weight, DTensor):
        return weight
    placements = [Partial() if isinstance(one, Replicate) else one for one in weight.placements]
    return weight.to_local(grad_placements=placements)


class Linear(nn.Module):
    """x W^T without a bias, for a weight that may be sharded."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight_OD = nn.Parameter(torch.empty(d_out, d_in))
        nn.init.kaiming_uniform_(self.weight_OD, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O), or the outputs of this process's shard."""
        return F.linear(x, local(self.weight_OD))


class RMSNorm(nn.Module):
    """Scale to unit root-mean-square over the last dimension (kernels/rms_norm.py)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight_D = nn.Parameter(torch.ones(d_model))
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; same shape."""
        weight_D = local(self.weight_D)
        return recomputed(rms_norm, x, weight_D) if self.recompute else rms_norm(x, weight_D)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020, arXiv:2002.05202): (silu(x W1) * x W3) W2."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        up, down = Linear(d_model, 2 * d_hidden), Linear(d_hidden, d_model)
        # W1 and W3 stacked, so that a shard of H holds the same columns of both
        self.up_2HD = nn.Parameter(up.weight_OD.detach().view(2, d_hidden, d_model))
        self.down_DH = nn.Parameter(down.weight_OD.detach())
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D); a summand of it where H is sharded."""
        up = F.linear(x, local(self.up_2HD).flatten(0, 1))
        down_DH = local(self.down_DH)
        return recomputed(_gated, up, down_DH) if self.recompute else _gated(up, down_DH)


def _gated(up: Tensor, down_DH: Tensor) -> Tensor:
    return F.linear(swiglu(up), down_DH)

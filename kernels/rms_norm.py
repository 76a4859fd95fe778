"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467): y = x / rms(x) * weight.

Legend: M rows, N normalised width. Statistics are kept in float32 for half precision and in float64 for float64.
One program handles BLOCK_M rows at once, so that narrow rows still fill a warp. The backward pass adds the weight's
gradient per program and then over programs, in a fixed order: no atomics, hence the same bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; the reference then serves
    triton = None

EPS = 1e-6
_MAX_PROGRAMS = 256
_TILE = 4096


def rms_norm_ref(x_MN: Tensor, weight_N: Tensor, eps: float = EPS) -> Tensor:
    """Plain torch reference for any leading shape; differentiable in any float type."""
    wide = torch.promote_types(x_MN.dtype, torch.float32)
    h_MN = x_MN.to(wide)
    rstd_M1 = torch.rsqrt(h_MN.square().mean(-1, keepdim=True) + eps)
    return (h_MN * rstd_M1 * weight_N.to(wide)).to(x_MN.dtype)


def rms_norm(x_MN: Tensor, weight_N: Tensor, eps: float = EPS) -> Tensor:
    """Normalise the last dimension; Triton on CUDA, plain torch elsewhere.

    Args:
        x_MN: any leading shape, last dimension N.
        weight_N: scale.
        eps: added to the mean square.

    Raises:
        ValueError: weight_N does not match the last dimension.
    """
    if weight_N.shape != x_MN.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight_N.shape)}, x ends in {x_MN.shape[-1]}: they must match")
    if triton is not None and x_MN.is_cuda and x_MN.dtype != torch.float64 and x_MN.numel():
        y_MN: Tensor = RMSNormFunction.apply(x_MN, weight_N, eps)  # type: ignore[no-untyped-call]
        return y_MN
    return rms_norm_ref(x_MN, weight_N, eps)


class RMSNormFunction(torch.autograd.Function):
    """The Triton path; on CPU it needs TRITON_INTERPRET=1 before the first import of triton."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_N: Tensor, eps: float) -> Tensor:
        """Return y with x's shape and type; keeps x, the weight and one float32 a row."""
        x_MN = x.reshape(-1, x.shape[-1]).contiguous()
        num_rows, width = x_MN.shape
        y_MN = torch.empty_like(x_MN)
        rstd_M = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        block_n = triton.next_power_of_2(width)
        block_m = max(1, _TILE // block_n)
        _forward[(triton.cdiv(num_rows, block_m),)](
            x_MN, weight_N, y_MN, rstd_M, num_rows, width, eps, BLOCK_M=block_m, BLOCK_N=block_n
        )
        ctx.save_for_backward(x_MN, weight_N, rstd_M)
        return y_MN.reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of x and of the weight."""
        x_MN, weight_N, rstd_M = ctx.saved_tensors
        num_rows, width = x_MN.shape
        dy_MN = grads[0].reshape(num_rows, width).contiguous()
        dx_MN = torch.empty_like(x_MN)
        block_n = triton.next_power_of_2(width)
        block_m = max(1, _TILE // block_n // 2)
        tiles = triton.cdiv(num_rows, block_m)
        programs = min(tiles, _MAX_PROGRAMS)
        dw_PN = torch.empty(programs, width, dtype=torch.float32, device=x_MN.device)
        _backward[(programs,)](
            x_MN, weight_N, rstd_M, dy_MN, dx_MN, dw_PN, num_rows, width, triton.cdiv(tiles, programs),
            BLOCK_M=block_m, BLOCK_N=block_n,
        )  # fmt: skip
        return dx_MN.reshape(grads[0].shape), dw_PN.sum(0).to(weight_N.dtype), None


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _forward(x_ptr, w_ptr, y_ptr, rstd_ptr, num_rows, width, eps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def, name-defined, unused-ignore]
        rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tl.arange(0, BLOCK_N)
        inside = (rows < num_rows)[:, None] & (cols < width)[None, :]
        at = rows[:, None] * width + cols[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
        y = x * rstd[:, None] * w[None, :]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _backward(  # type: ignore[no-untyped-def, unused-ignore]
        x_ptr, w_ptr, rstd_ptr, dy_ptr, dx_ptr, dw_ptr, num_rows, width, tiles_each,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        # dx = rstd * (g - xhat * mean(g * xhat)) with g = dy * w and xhat = x * rstd; dw = sum over rows of dy * xhat.
        program = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK_N)
        w = tl.load(w_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
        dw = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for tile in range(tiles_each):
            rows = (program * tiles_each + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = (rows < num_rows)[:, None] & (cols < width)[None, :]
            at = rows[:, None] * width + cols[None, :]
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
            xhat = x * rstd[:, None]
            g = dy * w[None, :]
            dx = rstd[:, None] * (g - xhat * (tl.sum(g * xhat, axis=1) / width)[:, None])
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            dw += tl.sum(dy * xhat, axis=0)
        tl.store(dw_ptr + program * width + cols, dw, mask=cols < width)

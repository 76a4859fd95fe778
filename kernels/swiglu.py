"""SwiGLU activation (Shazeer 2020, arXiv:2002.05202): y = silu(gate) * up, with silu(z) = z * sigmoid(z).

Gate and up are the halves of one row, gate first, as one matrix product leaves them. The backward pass reads that row
and computes the activation again. Memory is the bound: torch.compile makes as fast a kernel, and a grouped product
with this in its epilogue (fused_moe.py) saves the pass altogether; this one serves dense layers without a compiler.

Legend: M rows, I width of gate and of up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_ray.kernels.aot import Variant
from deepseek_ray.kernels.dispatch import operator, use_triton
from deepseek_ray.kernels.rows import Rows, check_floats
from deepseek_ray.kernels.tuning import Settings, bucket, settings_for, tune_op

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; the reference then serves
    triton = None

_TILE = 2048
_WIDEST = 1024


def swiglu_ref(x: Tensor) -> Tensor:
    """Plain torch reference for any leading shape; differentiable in any float type."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, up = x.to(wide).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    """Gate one half of the last dimension by the other; Triton on a GPU, plain torch elsewhere.

    Args:
        x: any leading shape, last dimension 2 I, gate before up; float16, bfloat16, float32 or float64.

    Returns:
        The same leading shape, last dimension I, x's type; computed in float32 and rounded once on a GPU.

    Raises:
        ValueError: the last dimension is odd, or the type is wrong.
    """
    check_floats(x=x)
    if not x.ndim or x.shape[-1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: its last dimension must hold two halves, gate and up")
    if not use_triton(x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    rows = Rows(x)
    y: Tensor = rows.shaped(_forward_op(rows.flat(x)))
    return y


@operator("swiglu")
def _forward_op(x_M2I: Tensor) -> Tensor:
    num_rows, half = x_M2I.shape[0], x_M2I.shape[1] // 2
    y_MI = torch.empty(num_rows, half, dtype=x_M2I.dtype, device=x_M2I.device)
    settings = _settings(x_M2I.dtype, half)
    _forward[_grid(num_rows, half, settings)](x_M2I, y_MI, num_rows, half, **settings)
    return y_MI


@_forward_op.register_fake
def _(x_M2I: Tensor) -> Tensor:
    return x_M2I.new_empty(x_M2I.shape[0], x_M2I.shape[1] // 2)


@operator("swiglu_backward")
def _backward_op(x_M2I: Tensor, dy_MI: Tensor) -> Tensor:
    num_rows, half = dy_MI.shape
    dx_M2I = torch.empty_like(x_M2I)
    settings = _settings(x_M2I.dtype, half)
    _backward[_grid(num_rows, half, settings)](x_M2I, dy_MI, dx_M2I, num_rows, half, **settings)
    return dx_M2I


@_backward_op.register_fake
def _(x_M2I: Tensor, dy_MI: Tensor) -> Tensor:
    return torch.empty_like(x_M2I)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _gradient(ctx: Any, dy_MI: Tensor) -> Tensor:
    dx_M2I: Tensor = _backward_op(ctx.saved_tensors[0], dy_MI.contiguous())
    return dx_M2I


_forward_op.register_autograd(_gradient, setup_context=_keep)


def _settings(dtype: torch.dtype, half: int) -> Settings:
    block_i = min(bucket(half), _WIDEST)
    return settings_for("swiglu", (dtype, half), {"BLOCK_M": _TILE // block_i, "BLOCK_I": block_i, "num_warps": 4})


def tune_swiglu(x: Tensor) -> Settings:
    """Measure tiles of both passes together on rows that require a gradient; keep the fastest for their width."""
    half = x.shape[-1] // 2
    block_i = min(bucket(half), _WIDEST)
    tiles = [
        {"BLOCK_M": max(1, size // block_i), "BLOCK_I": block_i, "num_warps": warps}
        for size in (_TILE // 2, _TILE, 2 * _TILE)
        for warps in (4, 8)
    ]
    dy = torch.ones_like(swiglu(x))
    return tune_op("swiglu", (x.dtype, half), tiles, lambda: torch.autograd.grad(swiglu(x), x, dy))


def _grid(num_rows: int, half: int, settings: Settings) -> tuple[int, int]:
    return triton.cdiv(num_rows, settings["BLOCK_M"]), triton.cdiv(half, settings["BLOCK_I"])


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _tile(num_rows, half, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr):  # type: ignore[no-untyped-def, name-defined, unused-ignore]
        rows = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        cols = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
        return rows * half + cols, 2 * rows * half + cols, (rows < num_rows) & (cols < half)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _forward(x_ptr, y_ptr, num_rows, half, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr):  # type: ignore[no-untyped-def, name-defined, unused-ignore]
        at_y, at_gate, inside = _tile(num_rows, half, BLOCK_M, BLOCK_I)
        gate = tl.load(x_ptr + at_gate, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + half + at_gate, mask=inside, other=0.0).to(tl.float32)
        y = gate * tl.sigmoid(gate) * up
        tl.store(y_ptr + at_y, y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _backward(x_ptr, dy_ptr, dx_ptr, num_rows, half, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr):  # type: ignore[no-untyped-def, name-defined, unused-ignore]
        at_y, at_gate, inside = _tile(num_rows, half, BLOCK_M, BLOCK_I)
        gate = tl.load(x_ptr + at_gate, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + half + at_gate, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at_y, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        dgate = dy * up * s * (1.0 + gate * (1.0 - s))
        tl.store(dx_ptr + at_gate, dgate.to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(dx_ptr + half + at_gate, (dy * gate * s).to(dx_ptr.dtype.element_ty), mask=inside)


def aot_variants() -> list[Variant]:
    """Experts of Qwen3-30B-A3B, of DeepSeek-V3 and of Mixtral."""
    if triton is None:
        return []
    return [variant for half in (768, 2048, 14336) for variant in (_variant(half, False), _variant(half, True))]


def _variant(half: int, backward: bool) -> Variant:
    settings = _settings(torch.bfloat16, half)
    pointers = ("x_ptr", "dy_ptr", "dx_ptr") if backward else ("x_ptr", "y_ptr")
    return Variant(
        "swiglu", _backward if backward else _forward,
        {**dict.fromkeys(pointers, "*bf16"), "num_rows": "i32", "half": "i32"},
        {name: settings[name] for name in ("BLOCK_M", "BLOCK_I")},
        aligned=("num_rows", "half"), options={"num_warps": settings["num_warps"]},
        label=f"bf16 I{half}{' backward' if backward else ''}",
    )  # fmt: skip

"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467): y = x / rms(x) * weight.

With a residual it normalises h = x + residual and returns h too: one pass over memory instead of two.

Legend: M rows, N normalised width, P programs. Statistics are kept in float32 for half precision and in float64 for
float64. One program handles BLOCK_M rows at once, so that narrow rows still fill a warp. The backward pass adds the
weight's gradient per program and then over programs, in a fixed order: no atomics, hence the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from deepseek_ray.kernels.aot import Variant
from deepseek_ray.kernels.dispatch import operator, use_triton
from deepseek_ray.kernels.rows import MAX_WIDTH, Rows, backward_tile, candidates, check_floats, forward_tile, programs
from deepseek_ray.kernels.tuning import Settings, settings_for, tune

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; the reference then serves
    triton = None

EPS = 1e-6


@overload
def rms_norm_ref(x: Tensor, weight_N: Tensor, eps: float = EPS, residual: None = None) -> Tensor: ...
@overload
def rms_norm_ref(x: Tensor, weight_N: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm_ref(
    x: Tensor, weight_N: Tensor, eps: float = EPS, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain torch reference for any leading shape; differentiable in any float type."""
    if residual is not None:
        h = x + residual
        return rms_norm_ref(h, weight_N, eps), h
    wide = torch.promote_types(x.dtype, torch.float32)
    h_MN = x.to(wide)
    rstd_M1 = torch.rsqrt(h_MN.square().mean(-1, keepdim=True) + eps)
    return (h_MN * rstd_M1 * weight_N.to(wide)).to(x.dtype)


@overload
def rms_norm(x: Tensor, weight_N: Tensor, eps: float = EPS, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight_N: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight_N: Tensor, eps: float = EPS, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last dimension; Triton on a GPU, plain torch elsewhere.

    Args:
        x: any leading shape, last dimension N; float16, bfloat16, float32 or float64.
        weight_N: scale.
        eps: added to the mean square.
        residual: x's shape and type; added to x first, and rounded to that type.

    Returns:
        y with x's shape and type; with a residual (y, x + residual).

    Raises:
        ValueError: weight_N does not match the last dimension, residual does not match x, or a type or device is wrong.
    """
    check_floats(x=x, weight=weight_N, residual=residual)
    if not x.ndim or weight_N.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight_N.shape)}, x has {tuple(x.shape)}: its last must match")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        has = f"{tuple(residual.shape)} of {residual.dtype}"
        raise ValueError(f"residual is {has}, x {tuple(x.shape)} of {x.dtype}: they must match")
    if not use_triton(x, weight_N) or x.shape[-1] > MAX_WIDTH:
        return rms_norm_ref(x, weight_N, eps) if residual is None else rms_norm_ref(x, weight_N, eps, residual)
    rows = Rows(x)
    residual_MN = None if residual is None else rows.flat(residual)
    y_MN, h_MN, _ = _forward_op(rows.flat(x), weight_N.contiguous(), eps, residual_MN)
    return rows.shaped(y_MN) if residual is None else (rows.shaped(y_MN), rows.shaped(h_MN))


@operator("rms_norm")
def _forward_op(
    x_MN: Tensor, weight_N: Tensor, eps: float, residual_MN: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, x + residual (nothing without one) and one reciprocal root mean square a row."""
    return _run_forward(x_MN, weight_N, eps, residual_MN, _forward_settings(x_MN.dtype, x_MN.shape[1]))


def _run_forward(
    x_MN: Tensor, weight_N: Tensor, eps: float, residual_MN: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, width = x_MN.shape
    y_MN = torch.empty_like(x_MN)
    h_MN = torch.empty(0, dtype=x_MN.dtype, device=x_MN.device) if residual_MN is None else torch.empty_like(x_MN)
    rstd_M = torch.empty(num_rows, dtype=torch.float32, device=x_MN.device)
    _forward[(triton.cdiv(num_rows, settings["BLOCK_M"]),)](
        x_MN, residual_MN, weight_N, y_MN, h_MN, rstd_M, num_rows, width, eps,
        HAS_RESIDUAL=residual_MN is not None, **settings,
    )  # fmt: skip
    return y_MN, h_MN, rstd_M


@_forward_op.register_fake
def _(x_MN: Tensor, weight_N: Tensor, eps: float, residual_MN: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    h_MN = x_MN.new_empty(0) if residual_MN is None else torch.empty_like(x_MN)
    return torch.empty_like(x_MN), h_MN, x_MN.new_empty(x_MN.shape[0], dtype=torch.float32)


@operator("rms_norm_backward")
def _backward_op(
    h_MN: Tensor, weight_N: Tensor, rstd_M: Tensor, dy_MN: Tensor, dh_MN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of what was normalised and of the weight."""
    return _run_backward(h_MN, weight_N, rstd_M, dy_MN, dh_MN, _backward_settings(h_MN.dtype, h_MN.shape[1]))


def _run_backward(
    h_MN: Tensor, weight_N: Tensor, rstd_M: Tensor, dy_MN: Tensor, dh_MN: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    num_rows, width = h_MN.shape
    num_programs = programs(num_rows, settings)
    dx_MN = torch.empty_like(h_MN)
    dw_PN = torch.empty(num_programs, width, dtype=torch.float32, device=h_MN.device)
    _backward[(num_programs,)](
        h_MN, weight_N, rstd_M, dy_MN, dh_MN, dx_MN, dw_PN, num_rows, width,
        triton.cdiv(num_rows, settings["BLOCK_M"] * num_programs), HAS_DH=dh_MN is not None, **settings,
    )  # fmt: skip
    return dx_MN, dw_PN.sum(0).to(weight_N.dtype)


@_backward_op.register_fake
def _(h_MN: Tensor, weight_N: Tensor, rstd_M: Tensor, dy_MN: Tensor, dh_MN: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h_MN), torch.empty_like(weight_N)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    x_MN, weight_N, _, residual_MN = inputs
    ctx.save_for_backward(x_MN if residual_MN is None else output[1], weight_N, output[2])
    ctx.has_residual = residual_MN is not None


def _gradients(ctx: Any, dy_MN: Tensor | None, dh_MN: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    h_MN, weight_N, rstd_M = ctx.saved_tensors
    dy_MN = torch.zeros_like(h_MN) if dy_MN is None else dy_MN.contiguous()
    # Without a residual the second output is empty, and nobody's.
    dh_MN = dh_MN.contiguous() if dh_MN is not None and ctx.has_residual else None
    dx_MN, dw_N = _backward_op(h_MN, weight_N, rstd_M, dy_MN, dh_MN)
    return dx_MN, dw_N, None, dx_MN if ctx.has_residual else None


_forward_op.register_autograd(_gradients, setup_context=_keep)


def _forward_settings(dtype: torch.dtype, width: int) -> Settings:
    return settings_for("rms_norm", (dtype, width), forward_tile(width))


def _backward_settings(dtype: torch.dtype, width: int) -> Settings:
    return settings_for("rms_norm_backward", (dtype, width), backward_tile(width))


def tune_rms_norm(x_MN: Tensor, weight_N: Tensor) -> tuple[Settings, Settings]:
    """Measure tiles of both passes, with a residual, on this GPU; keep the fastest for rows of this width and type."""
    width, rstd_M = x_MN.shape[1], torch.ones(len(x_MN), device=x_MN.device)

    def seconds(launch: Callable[[], object]) -> float:
        return float(triton.testing.do_bench(launch, return_mode="median")) / 1e3

    return (
        tune("rms_norm", (x_MN.dtype, width), candidates(width),
             lambda s: seconds(lambda: _run_forward(x_MN, weight_N, EPS, x_MN, s))),
        tune("rms_norm_backward", (x_MN.dtype, width), candidates(width),
             lambda s: seconds(lambda: _run_backward(x_MN, weight_N, rstd_M, x_MN, x_MN, s))),
    )  # fmt: skip


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _forward(  # type: ignore[no-untyped-def, unused-ignore]
        x_ptr, residual_ptr, w_ptr, y_ptr, h_ptr, rstd_ptr, num_rows, width, eps,
        HAS_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tl.arange(0, BLOCK_N)
        inside = (rows < num_rows)[:, None] & (cols < width)[None, :]
        at = rows[:, None] * width + cols[None, :]
        h = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            total = h + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
            rounded = total.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + at, rounded, mask=inside)
            h = rounded.to(tl.float32)  # what the backward pass will read
        w = tl.load(w_ptr + cols[None, :], mask=cols[None, :] < width, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(h * h, axis=1) / width + eps)
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
        y = h * rstd[:, None] * w
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _backward(  # type: ignore[no-untyped-def, unused-ignore]
        h_ptr, w_ptr, rstd_ptr, dy_ptr, dh_ptr, dx_ptr, dw_ptr, num_rows, width, num_steps,
        HAS_DH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        # dx = rstd * (g - xhat * mean(g * xhat)) with g = dy * w and xhat = h * rstd; dw = sum over rows of dy * xhat.
        program = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK_N)
        dw = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(num_steps):
            rows = (step * tl.num_programs(0) + program) * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = (rows < num_rows)[:, None] & (cols < width)[None, :]
            at = rows[:, None] * width + cols[None, :]
            h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
            w = tl.load(w_ptr + cols[None, :], mask=cols[None, :] < width, other=0.0).to(tl.float32)
            xhat = h * rstd[:, None]
            g = dy * w
            dx = rstd[:, None] * (g - xhat * (tl.sum(g * xhat, axis=1) / width)[:, None])
            if HAS_DH:
                dx += tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            dw += dy * xhat
        tl.store(
            dw_ptr + program * width + cols[None, :], tl.sum(dw, axis=0, keep_dims=True), mask=cols[None, :] < width
        )


def aot_variants() -> list[Variant]:
    """Norms of Qwen3's heads, Qwen3-30B-A3B, Mixtral and DeepSeek-V3, and the widest row."""
    if triton is None:
        return []
    return [
        variant
        for width in (128, 2048, 4096, 7168, MAX_WIDTH)
        for has in (False, True)
        for variant in (_forward_variant(width, has), _backward_variant(width, has))
    ] + [_forward_variant(MAX_WIDTH, True, torch.float32), _backward_variant(MAX_WIDTH, True, torch.float32)]


def _forward_variant(width: int, has_residual: bool, dtype: torch.dtype = torch.bfloat16) -> Variant:
    settings, kind = _forward_settings(dtype, width), "fp32" if dtype == torch.float32 else "bf16"
    half = ("x_ptr", "w_ptr", "y_ptr", "h_ptr", *(("residual_ptr",) if has_residual else ()))
    sizes = {"rstd_ptr": "*fp32", "num_rows": "i32", "width": "i32", "eps": "fp32"}
    constants = {"HAS_RESIDUAL": has_residual, "BLOCK_M": settings["BLOCK_M"], "BLOCK_N": settings["BLOCK_N"]}
    return Variant(
        "rms_norm", _forward, {**dict.fromkeys(half, f"*{kind}"), **sizes},
        constants if has_residual else {"residual_ptr": None, **constants},
        aligned=("num_rows", "width"), options={"num_warps": settings["num_warps"]},
        label=f"{kind} N{width}{' residual' if has_residual else ''}",
    )  # fmt: skip


def _backward_variant(width: int, has_dh: bool, dtype: torch.dtype = torch.bfloat16) -> Variant:
    settings, kind = _backward_settings(dtype, width), "fp32" if dtype == torch.float32 else "bf16"
    half = ("h_ptr", "w_ptr", "dy_ptr", "dx_ptr", *(("dh_ptr",) if has_dh else ()))
    sizes = {"rstd_ptr": "*fp32", "dw_ptr": "*fp32", "num_rows": "i32", "width": "i32", "num_steps": "i32"}
    constants = {"HAS_DH": has_dh, "BLOCK_M": settings["BLOCK_M"], "BLOCK_N": settings["BLOCK_N"]}
    return Variant(
        "rms_norm", _backward, {**dict.fromkeys(half, f"*{kind}"), **sizes},
        constants if has_dh else {"dh_ptr": None, **constants},
        aligned=("num_rows", "width"), options={"num_warps": settings["num_warps"]},
        label=f"{kind} N{width} backward{' residual' if has_dh else ''}",
    )  # fmt: skip

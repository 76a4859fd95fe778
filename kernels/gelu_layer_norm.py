"""GELU, then layer norm, in one pass: y = (a - mean(a)) / sqrt(var(a) + eps) * weight + bias with a = gelu(x).

GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415) is exact, x Phi(x), or its tanh form; layer norm is that of Ba, Kiros
and Hinton 2016, arXiv:1607.06450, with the variance divided by N.

Legend: M rows, N normalised width, P programs. Statistics are in float32. The backward pass reads x and computes the
activation again; it adds the gradients of weight and bias per program and then over programs, in a fixed order: no
atomics, hence the same bits in every run.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_ray.kernels.aot import Variant
from deepseek_ray.kernels.dispatch import operator, use_triton
from deepseek_ray.kernels.rows import MAX_WIDTH, Rows, backward_tile, candidates, check_floats, forward_tile, programs
from deepseek_ray.kernels.tuning import Settings, settings_for, tune_op

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; the reference then serves
    triton = None

EPS = 1e-5
FORMS = ("none", "tanh")
_HALF_ROOT = 0.7071067811865476  # sqrt(1 / 2)
_DENSITY = 0.3989422804014327  # 1 / sqrt(2 pi), the normal density at 0
_TANH_SCALE, _TANH_CUBE = 0.7978845608028654, 0.044715  # sqrt(2 / pi) and the form's constant


def gelu_layer_norm_ref(
    x: Tensor, weight_N: Tensor, bias_N: Tensor, eps: float = EPS, approximate: Literal["none", "tanh"] = "none"
) -> Tensor:
    """Plain torch reference for any leading shape; differentiable in any float type."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    if approximate == "tanh":
        a = 0.5 * h * (1 + torch.tanh(_TANH_SCALE * (h + _TANH_CUBE * h**3)))
    else:
        a = 0.5 * h * (1 + torch.erf(h * _HALF_ROOT))
    centred = a - a.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * rstd * weight_N.to(wide) + bias_N.to(wide)).to(x.dtype)


def gelu_layer_norm(
    x: Tensor, weight_N: Tensor, bias_N: Tensor, eps: float = EPS, approximate: Literal["none", "tanh"] = "none"
) -> Tensor:
    """Activate and normalise the last dimension; Triton on a GPU, plain torch elsewhere.

    Args:
        x: any leading shape, last dimension N; float16, bfloat16, float32 or float64.
        weight_N: scale.
        bias_N: shift.
        eps: added to the variance.
        approximate: ``none`` for the exact GELU, ``tanh`` for its tanh form.

    Returns:
        y with x's shape and type; computed in float32 and rounded once.

    Raises:
        ValueError: weight_N or bias_N does not match the last dimension, or the form, a type or a device is wrong.
    """
    check_floats(x=x, weight=weight_N, bias=bias_N)
    for name, one in (("weight", weight_N), ("bias", bias_N)):
        if not x.ndim or one.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(one.shape)}, x has {tuple(x.shape)}: its last must match")
    if approximate not in FORMS:
        raise ValueError(f"approximate = {approximate!r} must be one of {', '.join(FORMS)}")
    if not use_triton(x, weight_N, bias_N) or x.shape[-1] > MAX_WIDTH:
        wide = torch.promote_types(x.dtype, torch.float32)
        a = F.gelu(x.to(wide), approximate=approximate)
        return F.layer_norm(a, x.shape[-1:], weight_N.to(wide), bias_N.to(wide), eps).to(x.dtype)
    rows = Rows(x)
    y_MN, _, _ = _forward_op(rows.flat(x), weight_N.contiguous(), bias_N.contiguous(), eps, approximate == "tanh")
    return rows.shaped(y_MN)


@operator("gelu_layer_norm")
def _forward_op(
    x_MN: Tensor, weight_N: Tensor, bias_N: Tensor, eps: float, tanh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and reciprocal standard deviation of each row."""
    num_rows, width = x_MN.shape
    y_MN = torch.empty_like(x_MN)
    mean_M, rstd_M = (torch.empty(num_rows, dtype=torch.float32, device=x_MN.device) for _ in range(2))
    settings = _forward_settings(x_MN.dtype, width)
    _forward[(triton.cdiv(num_rows, settings["BLOCK_M"]),)](
        x_MN, weight_N, bias_N, y_MN, mean_M, rstd_M, num_rows, width, eps, TANH=tanh, **settings
    )
    return y_MN, mean_M, rstd_M


@_forward_op.register_fake
def _(x_MN: Tensor, weight_N: Tensor, bias_N: Tensor, eps: float, tanh: bool) -> tuple[Tensor, Tensor, Tensor]:
    mean_M, rstd_M = (x_MN.new_empty(x_MN.shape[0], dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x_MN), mean_M, rstd_M


@operator("gelu_layer_norm_backward")
def _backward_op(
    x_MN: Tensor, weight_N: Tensor, mean_M: Tensor, rstd_M: Tensor, dy_MN: Tensor, tanh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and, in float32, of weight and bias."""
    num_rows, width = x_MN.shape
    settings = _backward_settings(x_MN.dtype, width)
    num_programs = programs(num_rows, settings)
    dx_MN = torch.empty_like(x_MN)
    sums_P2N = torch.empty(num_programs, 2, width, dtype=torch.float32, device=x_MN.device)
    _backward[(num_programs,)](
        x_MN, weight_N, mean_M, rstd_M, dy_MN, dx_MN, sums_P2N, num_rows, width,
        triton.cdiv(num_rows, settings["BLOCK_M"] * num_programs), TANH=tanh, **settings,
    )  # fmt: skip
    dweight_N, dbias_N = sums_P2N.sum(0)
    return dx_MN, dweight_N.clone(), dbias_N.clone()  # an operator's results are no views of each other


@_backward_op.register_fake
def _(
    x_MN: Tensor, weight_N: Tensor, mean_M: Tensor, rstd_M: Tensor, dy_MN: Tensor, tanh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dweight_N, dbias_N = (weight_N.new_empty(weight_N.shape, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x_MN), dweight_N, dbias_N


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_MN, weight_N, bias_N, _, ctx.tanh = inputs
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = bias_N.dtype
    ctx.save_for_backward(x_MN, weight_N, *output[1:])


def _gradients(ctx: Any, dy_MN: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x_MN, weight_N, mean_M, rstd_M = ctx.saved_tensors
    dx_MN, dweight_N, dbias_N = _backward_op(x_MN, weight_N, mean_M, rstd_M, dy_MN.contiguous(), ctx.tanh)
    return dx_MN, dweight_N.to(weight_N.dtype), dbias_N.to(ctx.bias_dtype), None, None


_forward_op.register_autograd(_gradients, setup_context=_keep)


def _forward_settings(dtype: torch.dtype, width: int) -> Settings:
    return settings_for("gelu_layer_norm", (dtype, width), forward_tile(width))


def _backward_settings(dtype: torch.dtype, width: int) -> Settings:
    default = backward_tile(width)
    if dtype == torch.float32:  # twice the bytes on their way: half as many numbers a thread, or the widest rows spill
        default = {**default, "num_warps": min(32, 2 * default["num_warps"])}
    return settings_for("gelu_layer_norm_backward", (dtype, width), default)


def tune_gelu_layer_norm(x: Tensor, weight_N: Tensor, bias_N: Tensor) -> tuple[Settings, Settings]:
    """Measure tiles of either pass on tensors that require gradients; keep the fastest for this width and type."""
    made = x, weight_N, bias_N
    shape, tiles = (x.dtype, x.shape[-1]), candidates(x.shape[-1])
    y = gelu_layer_norm(*made)
    dy = torch.ones_like(y)
    return (
        tune_op("gelu_layer_norm", shape, tiles, lambda: gelu_layer_norm(*made)),
        tune_op("gelu_layer_norm_backward", shape, tiles, lambda: torch.autograd.grad(y, made, dy, retain_graph=True)),
    )


if triton is not None:
    HALF_ROOT: tl.constexpr = tl.constexpr(_HALF_ROOT)  # type: ignore[name-defined, unused-ignore]
    DENSITY: tl.constexpr = tl.constexpr(_DENSITY)  # type: ignore[name-defined, unused-ignore]
    TANH_SCALE: tl.constexpr = tl.constexpr(_TANH_SCALE)  # type: ignore[name-defined, unused-ignore]
    TANH_CUBE: tl.constexpr = tl.constexpr(_TANH_CUBE)  # type: ignore[name-defined, unused-ignore]

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _gelu_and_slope(x, TANH: tl.constexpr):  # type: ignore[no-untyped-def, name-defined, unused-ignore]
        if TANH:
            # (1 + tanh(u)) / 2 is sigmoid(2 u), which does not cancel for large negative u
            u = 2.0 * TANH_SCALE * x * (1.0 + TANH_CUBE * x * x)
            share = tl.sigmoid(u)
            slope = share + x * share * (1.0 - share) * 2.0 * TANH_SCALE * (1.0 + 3.0 * TANH_CUBE * x * x)
        else:
            share = 0.5 * (1.0 + tl.erf(x * HALF_ROOT))
            slope = share + x * DENSITY * tl.exp(-0.5 * x * x)
        return x * share, slope

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _forward(  # type: ignore[no-untyped-def, unused-ignore]
        x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, num_rows, width, eps,
        TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tl.arange(0, BLOCK_N)[None, :]
        inside = (rows < num_rows)[:, None] & (cols < width)
        at = rows[:, None] * width + cols
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        a, _ = _gelu_and_slope(x, TANH)  # gelu(0) = 0: what lies outside adds nothing to the sum
        mean = tl.sum(a, axis=1) / width
        centred = tl.where(inside, a - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
        tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
        w = tl.load(w_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
        y = centred * rstd[:, None] * w + b
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _backward(  # type: ignore[no-untyped-def, unused-ignore]
        x_ptr, w_ptr, mean_ptr, rstd_ptr, dy_ptr, dx_ptr, sums_ptr, num_rows, width, num_steps,
        TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        # dx = gelu'(x) * rstd * (g - mean(g) - ahat * mean(g * ahat)) with g = dy * w, ahat = (a - mean) * rstd.
        program = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK_N)[None, :]
        dw = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        db = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(num_steps):
            rows = (step * tl.num_programs(0) + program) * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = (rows < num_rows)[:, None] & (cols < width)
            at = rows[:, None] * width + cols
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
            w = tl.load(w_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
            a, slope = _gelu_and_slope(x, TANH)
            ahat = (a - mean[:, None]) * rstd[:, None]
            g = dy * w  # 0 outside, so ahat needs no mask
            da = g - (tl.sum(g, axis=1) / width)[:, None] - ahat * (tl.sum(g * ahat, axis=1) / width)[:, None]
            dx = rstd[:, None] * da * slope
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            dw += dy * ahat
            db += dy
        sums_ptr += 2 * program * width
        tl.store(sums_ptr + cols, tl.sum(dw, axis=0, keep_dims=True), mask=cols < width)
        tl.store(sums_ptr + width + cols, tl.sum(db, axis=0, keep_dims=True), mask=cols < width)


def aot_variants() -> list[Variant]:
    """A narrow row, common model widths and the widest row, both forms of the activation."""
    if triton is None:
        return []
    return [
        _variant(width, tanh, backward)
        for width in (256, 2048, MAX_WIDTH)
        for tanh in (False, True)
        for backward in (False, True)
    ] + [_variant(MAX_WIDTH, tanh, True, torch.float32) for tanh in (False, True)]


def _variant(width: int, tanh: bool, backward: bool, dtype: torch.dtype = torch.bfloat16) -> Variant:
    settings = (_backward_settings if backward else _forward_settings)(dtype, width)
    kind = "fp32" if dtype == torch.float32 else "bf16"
    half = ("x_ptr", "w_ptr", "dy_ptr", "dx_ptr") if backward else ("x_ptr", "w_ptr", "b_ptr", "y_ptr")
    single = ("mean_ptr", "rstd_ptr", *(("sums_ptr",) if backward else ()))
    last = {"num_steps": "i32"} if backward else {"eps": "fp32"}
    sizes = {"num_rows": "i32", "width": "i32", **last}
    return Variant(
        "gelu_layer_norm", _backward if backward else _forward,
        {**dict.fromkeys(half, f"*{kind}"), **dict.fromkeys(single, "*fp32"), **sizes},
        {"TANH": tanh, "BLOCK_M": settings["BLOCK_M"], "BLOCK_N": settings["BLOCK_N"]},
        aligned=("num_rows", "width"), options={"num_warps": settings["num_warps"]},
        label=f"{kind} N{width} {'tanh' if tanh else 'exact'}{' backward' if backward else ''}",
    )  # fmt: skip

"""Cross-entropy of a linear map without its logits: loss_t = lse_t - logit_t[target_t] + z * lse_t^2, logit = x W^T.

Method: the vocabulary in chunks, with a running log-sum-exp (Milakov and Gimelshein 2018, arXiv:1805.02867); logits are
computed again in the backward pass (Wijmans et al. 2024, arXiv:2411.09009). z-loss: Chowdhery et al. 2022,
arXiv:2204.02311, section 5.

Legend: T tokens, D model width, V vocabulary, C columns of one chunk of it. ``aim`` is the logit of the target.

The matrix products are torch's (cuBLAS is faster than what Triton compiles to at these sizes); one Triton kernel folds
a chunk of logits into lse and aim, another turns a chunk into its gradient in place. Chunks of the vocabulary, not of
the tokens: a chunk of dW is then one product, summed in float32 inside it, and written once. Only dX is summed over
chunks, in float32 and in a fixed order: no atomics, the same bits in every run. One (T, C) buffer holds logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_ray.kernels import dispatch, tuning
from deepseek_ray.kernels.aot import Variant
from deepseek_ray.kernels.gradients import asked_for

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; the same chunks are then folded in plain torch
    triton = None

IGNORED = -100
REDUCTIONS = ("none", "sum", "mean")
CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 32 << 20}
LEAST_COLUMNS = 256  # a power of two: chunks start aligned
FEWEST_CHUNKS = 4  # even where the budget would hold all logits
CANDIDATES: list[tuning.Settings] = [{"COLUMNS": columns} for columns in (4096, 8192, 16384, 32768, 65536)]
_AS_TUNED = 0  # settings are looked up inside the operation: the compiler does not trace through their cache
_BLOCK = 4096
_WARPS = 8


def linear_cross_entropy_ref(
    x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, *, ignore_index: int = IGNORED, reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """Plain torch reference with all logits at once; differentiable in any float type."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    logit_TV = F.linear(x_TD.to(wide), weight_VD.to(wide))
    kept_T = target_T != ignore_index
    aim_T = logit_TV.gather(-1, target_T.long().where(kept_T, 0).unsqueeze(-1)).squeeze(-1)
    return _reduced(logit_TV.logsumexp(-1), aim_T, kept_T, reduction, z_loss)


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, *, ignore_index: int = IGNORED, reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """Cross-entropy of ``x W^T``; the logits never exist at once, forward or backward.

    Args:
        x_TD: (..., D), float.
        weight_VD: (V, D), of x's type.
        target_T: (...), int32 or int64, below V or ``ignore_index``; any other number makes the loss NaN.
        ignore_index: a token with this target has loss 0 and gradient 0, and does not count in the mean.
        reduction: ``none``, ``sum`` or ``mean`` (over the tokens that count; 0 where none does).
        z_loss: coefficient of lse^2.

    Returns:
        (...) or a scalar, in float32 for half precision, else in x's type.

    Raises:
        ValueError: a shape, type, device or option does not fit.
    """
    _check(x_TD, weight_VD, target_T, reduction, z_loss)
    lse_T, aim_T = linear_lse(x_TD, weight_VD, target_T)
    inside_T = (target_T >= 0) & (target_T < len(weight_VD))
    aim_T = aim_T.where(inside_T, float("nan"))
    return _reduced(lse_T, aim_T, target_T != ignore_index, reduction, z_loss)


def linear_lse(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """The two numbers a token that any such loss needs, both differentiable.

    Also of a shard of the vocabulary: subtract its first row from the targets, and combine over shards
    (log-sum-exp of lse, sum of aim).

    Args:
        x_TD: (..., D), float.
        weight_VD: (V, D), of x's type.
        target_T: (...), row of the weight; outside of it aim is 0.

    Returns:
        log-sum-exp of a token's logits, and the logit of its target; (...) each, float32 for half precision.
    """
    shape = target_T.shape
    x_TD, target_T = x_TD.reshape(-1, x_TD.shape[-1]), target_T.reshape(-1)
    lse_T, aim_T = torch.ops.deepseek_ray.linear_lse(x_TD, weight_VD, target_T, _AS_TUNED)
    return lse_T.view(shape), aim_T.view(shape)


def tune_linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuning.Settings:
    """Measure widths of a chunk, forward and backward, on tensors that require gradients; keep the fastest."""

    def seconds(settings: tuning.Settings) -> float:
        def step() -> None:
            lse_T, aim_T = torch.ops.deepseek_ray.linear_lse(x_TD, weight_VD, target_T, settings["COLUMNS"])
            torch.autograd.grad((lse_T - aim_T).sum(), (x_TD, weight_VD))

        return float(triton.testing.do_bench(step)) / 1e3

    return tuning.tune("linear_cross_entropy", _shape_class(x_TD, weight_VD), CANDIDATES, seconds)


def aot_variants() -> list[Variant]:
    """Both kernels as launched for the vocabularies of Qwen3 (151936), DeepSeek-V3 (129280) and Mixtral (32000)."""
    if triton is None:
        return []
    state = {"target_ptr": "*i64", "lse_ptr": "*fp32"}
    fold = {"logit_ptr": "*bf16", **state, "aim_ptr": "*fp32", "start": "i32", "width": "i32", "stride": "i32"}
    slope = {"logit_ptr": "*bf16", **state, "g_lse_ptr": "*fp32", "g_aim_ptr": "*fp32"}
    slope |= {"start": "i32", "width": "i32", "stride": "i32"}
    sizes, options = ("start", "width", "stride"), {"num_warps": _WARPS}
    return [
        *(
            Variant("linear_cross_entropy", _fold_kernel, fold, {"FIRST": first, "BLOCK": _BLOCK}, sizes, options,
                    f"fold bf16 {'first' if first else 'next'}")
            for first in (True, False)
        ),
        Variant("linear_cross_entropy", _slope_kernel, slope, {"BLOCK": _BLOCK}, sizes, options, "gradient bf16"),
    ]  # fmt: skip


def _check(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, reduction: str, z_loss: float) -> None:
    if weight_VD.ndim != 2 or not len(weight_VD) or x_TD.ndim < 1 or x_TD.shape[-1] != weight_VD.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight_VD.shape)}, x {tuple(x_TD.shape)}: "
            "weight must be (V, D) with V > 0, and x end in D"
        )
    if target_T.shape != x_TD.shape[:-1]:
        raise ValueError(
            f"target has shape {tuple(target_T.shape)}, x {tuple(x_TD.shape)}: give one target for each row of x"
        )
    if not x_TD.is_floating_point() or x_TD.dtype != weight_VD.dtype:
        raise ValueError(f"x is {x_TD.dtype}, weight {weight_VD.dtype}: cast both to one float type")
    if target_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"target is {target_T.dtype}: it must be int32 or int64")
    if not x_TD.device == weight_VD.device == target_T.device:
        raise ValueError(
            f"x is on {x_TD.device}, weight on {weight_VD.device}, target on {target_T.device}: move them to one device"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction = {reduction!r} must be one of {', '.join(REDUCTIONS)}")
    if z_loss < 0:
        raise ValueError(f"z_loss = {z_loss} must not be negative")


def _reduced(lse_T: Tensor, aim_T: Tensor, kept_T: Tensor, reduction: str, z_loss: float) -> Tensor:
    loss_T = lse_T - aim_T
    if z_loss:
        loss_T = loss_T + z_loss * lse_T.square()
    loss_T = loss_T.where(kept_T, 0.0)
    if reduction == "none":
        return loss_T
    return loss_T.sum() if reduction == "sum" else loss_T.sum() / kept_T.sum().clamp(min=1)


def _columns(x_TD: Tensor, weight_VD: Tensor) -> int:
    """Default width of a chunk: what the budget holds, in whole steps."""
    vocabulary = len(weight_VD)
    budget = CHUNK_BYTES["cpu" if x_TD.device.type == "cpu" else "cuda"]
    fit = budget // max(1, len(x_TD) * x_TD.element_size())
    fit = min(fit, vocabulary // FEWEST_CHUNKS) // LEAST_COLUMNS * LEAST_COLUMNS
    return max(fit, LEAST_COLUMNS)


def _shape_class(x_TD: Tensor, weight_VD: Tensor) -> tuple[object, ...]:
    return (x_TD.dtype, weight_VD.shape[1], len(weight_VD), tuning.bucket(len(x_TD)))


@dispatch.operator("linear_lse")
def _linear_lse(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    x_TD, weight_VD, target_T = x_TD.contiguous(), weight_VD.contiguous(), target_T.contiguous()
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    lse_T, aim_T = (torch.empty(len(x_TD), dtype=wide, device=x_TD.device) for _ in range(2))
    logit_TC = _buffer(x_TD, weight_VD, columns)
    for start in range(0, len(weight_VD), logit_TC.shape[1]):
        part_TC = _logits(x_TD, weight_VD, start, logit_TC)
        _fold(part_TC, target_T, start, lse_T, aim_T)
    return lse_T, aim_T


@_linear_lse.register_fake
def _(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    return x_TD.new_empty(x_TD.shape[0], dtype=wide), x_TD.new_empty(x_TD.shape[0], dtype=wide)


@dispatch.operator("linear_lse_backward")
def _linear_lse_backward(
    x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, lse_T: Tensor, g_lse_T: Tensor, g_aim_T: Tensor, columns: int,
    need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x_TD, weight_VD, target_T = x_TD.contiguous(), weight_VD.contiguous(), target_T.contiguous()
    g_lse_T, g_aim_T = g_lse_T.contiguous(), g_aim_T.contiguous()
    sum_TD = torch.zeros(x_TD.shape if need_x else (0,), dtype=lse_T.dtype, device=x_TD.device)
    dweight_VD = torch.empty(weight_VD.shape if need_weight else (0,), dtype=weight_VD.dtype, device=x_TD.device)
    logit_TC = _buffer(x_TD, weight_VD, columns)
    for start in range(0, len(weight_VD), logit_TC.shape[1]):
        part_TC = _logits(x_TD, weight_VD, start, logit_TC)
        _to_gradient(part_TC, target_T, start, lse_T, g_lse_T, g_aim_T)
        end = start + part_TC.shape[1]
        if need_weight:
            torch.mm(part_TC.T, x_TD, out=dweight_VD[start:end])
        if need_x:
            _add_product(sum_TD, part_TC, weight_VD[start:end])
    return sum_TD.to(x_TD.dtype), dweight_VD


@_linear_lse_backward.register_fake
def _(
    x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, lse_T: Tensor, g_lse_T: Tensor, g_aim_T: Tensor, columns: int,
    need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x_TD.new_empty(x_TD.shape if need_x else (0,)), weight_VD.new_empty(weight_VD.shape if need_weight else (0,))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TD, weight_VD, target_T, ctx.columns = inputs
    ctx.save_for_backward(x_TD, weight_VD, target_T, output[0])


def _backward(ctx: Any, g_lse_T: Tensor, g_aim_T: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x_TD, weight_VD, target_T, lse_T = ctx.saved_tensors
    need_x, need_weight, _ = asked_for(ctx)
    dx_TD, dweight_VD = torch.ops.deepseek_ray.linear_lse_backward(
        x_TD, weight_VD, target_T, lse_T, g_lse_T, g_aim_T, ctx.columns, need_x, need_weight
    )
    return dx_TD if need_x else None, dweight_VD if need_weight else None, None, None


_linear_lse.register_autograd(_backward, setup_context=_keep)


def _buffer(x_TD: Tensor, weight_VD: Tensor, columns: int) -> Tensor:
    """Room for a chunk; its width is the same forward and backward, hence so are the bits of the logits."""
    if columns == _AS_TUNED:
        default = {"COLUMNS": _columns(x_TD, weight_VD)}
        columns = tuning.settings_for("linear_cross_entropy", _shape_class(x_TD, weight_VD), default)["COLUMNS"]
    return torch.empty(len(x_TD), min(columns, -(-len(weight_VD) // 16) * 16), dtype=x_TD.dtype, device=x_TD.device)


def _logits(x_TD: Tensor, weight_VD: Tensor, start: int, logit_TC: Tensor) -> Tensor:
    """Logits of a chunk in the buffer; the last chunk keeps the stride of the others, which cuBLAS wants aligned."""
    weight_CD = weight_VD[start : start + logit_TC.shape[1]]
    part_TC = logit_TC[:, : len(weight_CD)]
    return torch.mm(x_TD, weight_CD.T, out=part_TC)


def _add_product(sum_TD: Tensor, slope_TC: Tensor, weight_CD: Tensor) -> None:
    """Add a chunk's part of dX without rounding it to half precision first, where torch can write a product so."""
    if slope_TC.dtype == sum_TD.dtype or not slope_TC.is_cuda:
        sum_TD.addmm_(slope_TC.to(sum_TD.dtype), weight_CD.to(sum_TD.dtype))
    elif torch.version.hip is None:
        sum_TD += torch.mm(slope_TC, weight_CD, out_dtype=sum_TD.dtype)
    else:
        sum_TD += torch.mm(slope_TC, weight_CD)


def _fold(logit_TC: Tensor, target_T: Tensor, start: int, lse_T: Tensor, aim_T: Tensor) -> None:
    """Bring lse and aim of the columns before ``start`` up to those of this chunk, in place."""
    rows, width = logit_TC.shape
    if dispatch.use_triton(logit_TC):
        _fold_kernel[(rows,)](
            logit_TC, target_T, lse_T, aim_T, start, width, logit_TC.stride(0), FIRST=start == 0, BLOCK=_BLOCK,
            num_warps=_WARPS,
        )  # fmt: skip
        return
    wide_TC = logit_TC.to(lse_T.dtype)
    lse_part_T = wide_TC.logsumexp(-1)
    column_T = target_T.long() - start
    here_T = (column_T >= 0) & (column_T < width)
    found_T = wide_TC.gather(-1, column_T.where(here_T, 0).unsqueeze(-1)).squeeze(-1)
    aim_T.copy_(found_T.where(here_T, 0.0 if start == 0 else aim_T))
    lse_T.copy_(lse_part_T if start == 0 else torch.logaddexp(lse_T, lse_part_T))


def _to_gradient(
    logit_TC: Tensor, target_T: Tensor, start: int, lse_T: Tensor, g_lse_T: Tensor, g_aim_T: Tensor
) -> None:
    """Replace logits by d/dlogit = g_lse * softmax + g_aim at the target, in place."""
    rows, width = logit_TC.shape
    if dispatch.use_triton(logit_TC):
        _slope_kernel[(rows, triton.cdiv(width, _BLOCK))](
            logit_TC, target_T, lse_T, g_lse_T, g_aim_T, start, width, logit_TC.stride(0), BLOCK=_BLOCK,
            num_warps=_WARPS,
        )  # fmt: skip
        return
    slope_TC = (logit_TC.to(lse_T.dtype) - lse_T[:, None]).exp_().mul_(g_lse_T[:, None])
    column_T = target_T.long() - start
    here_T = (column_T >= 0) & (column_T < width)
    slope_TC.scatter_add_(1, column_T.where(here_T, 0).unsqueeze(-1), g_aim_T.where(here_T, 0.0).unsqueeze(-1))
    logit_TC.copy_(slope_TC)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _fold_kernel(  # type: ignore[no-untyped-def, unused-ignore]
        logit_ptr, target_ptr, lse_ptr, aim_ptr, start, width, stride, FIRST: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        top = -3.0e38  # finite: -inf minus -inf is not a number
        total = tl.zeros((BLOCK,), dtype=tl.float32)  # a sum a lane: summed over lanes once, behind the loop
        for at in range(0, width, BLOCK):
            cols = at + tl.arange(0, BLOCK)
            x = tl.load(logit_ptr + row * stride + cols, mask=cols < width, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, axis=0))
            total = total * tl.exp(top - higher) + tl.exp(x - higher)
            top = higher
        lse = top + tl.log(tl.sum(total, axis=0))
        column = tl.load(target_ptr + row) - start
        here = (column >= 0) & (column < width)
        aim = tl.load(logit_ptr + row * stride + column, mask=here, other=0.0).to(tl.float32)
        if FIRST:
            tl.store(aim_ptr + row, aim)
        else:
            before = tl.load(lse_ptr + row)
            higher = tl.maximum(before, lse)
            lse = higher + tl.log(tl.exp(before - higher) + tl.exp(lse - higher))
            tl.store(aim_ptr + row, aim, mask=here)
        tl.store(lse_ptr + row, lse)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _slope_kernel(  # type: ignore[no-untyped-def, unused-ignore]
        logit_ptr, target_ptr, lse_ptr, g_lse_ptr, g_aim_ptr, start, width, stride, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        column = tl.load(target_ptr + row) - start
        lse = tl.load(lse_ptr + row)
        g_lse = tl.load(g_lse_ptr + row)
        g_aim = tl.load(g_aim_ptr + row)
        at = logit_ptr + row * stride + cols
        x = tl.load(at, mask=cols < width, other=0.0).to(tl.float32)
        slope = g_lse * tl.exp(x - lse) + tl.where(cols == column, g_aim, 0.0)
        tl.store(at, slope.to(logit_ptr.dtype.element_ty), mask=cols < width)

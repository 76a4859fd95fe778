"""Routed SwiGLU experts as one op: y_t = sum over k of g_tk * (silu(x_t U_e^gate) * (x_t U_e^up)) W_e with e = e_tk.

After ScatterMoE (Tan et al. 2024, arXiv:2403.08245) and SonicMoE (Guo et al. 2025, arXiv:2512.14080): rows are gathered
inside the first product, SwiGLU (Shazeer 2020, arXiv:2002.05202) is its epilogue, and the gates are applied where
each token adds up its rows. For the backward only x and the pre-activation stay in memory, so that many narrow experts
cost no more than a few wide ones. A gate's gradient needs no output of an expert: <dy_t, a W> = <dy_t W^T, a>.
No atomics, one order of summation, no copy to the host: the same bits in every run, and CUDA graphs can hold it.

Legend: T tokens, D model width, I width of an expert, E experts, K experts a token, S = T * K pairs; rows are pairs
sorted by expert (moe_routing.py). h = pre-activation, a = activation, g = gate of the router.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; the reference then serves
    triton = None

from deepseek_ray.kernels.aot import Variant
from deepseek_ray.kernels.dispatch import operator, use_triton
from deepseek_ray.kernels.gradients import asked_for
from deepseek_ray.kernels.grouped_gemm import (
    OUTER_CANDIDATES,
    ROW_CANDIDATES,
    block_rows,
    multiply_rows,
    outer_class,
    outer_products,
    row_class,
)
from deepseek_ray.kernels.moe_routing import Routing, empty_routing, route
from deepseek_ray.kernels.moe_swiglu import CANDIDATES as SWIGLU_CANDIDATES
from deepseek_ray.kernels.moe_swiglu import backward_of_activation, project_up
from deepseek_ray.kernels.tuning import Settings, tune

_COMBINE = 1024
_CHOICES = 8
_PAIRS = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fused_moe_ref(x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, up_ED2I: Tensor, down_EID: Tensor) -> Tensor:
    """Plain torch reference, expert by expert; differentiable in any float type. Arguments as ``fused_moe``."""
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for expert in range(len(up_ED2I)):
        token_s, choice_s = torch.where(expert_TK == expert)
        h_s2I = x_TD[token_s] @ up_ED2I[expert].flatten(1)
        y_sD = _swiglu(h_s2I) @ down_EID[expert]
        y_TD = y_TD.index_add(0, token_s, y_sD * gate_TK[token_s, choice_s].unsqueeze(1).to(y_TD.dtype))
    return y_TD.to(x_TD.dtype)


def fused_moe(x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, up_ED2I: Tensor, down_EID: Tensor) -> Tensor:
    """The gated sum of each token's experts; Triton on a GPU, grouped matrix products of torch elsewhere.

    Gradients flow to x, gates and both weights, once (no second derivatives on the Triton path).

    Args:
        x_TD: tokens.
        expert_TK: int32 or int64; a pair with a number outside 0 .. E - 1 (-1, say) adds nothing: an expert elsewhere.
        gate_TK: the router's weights, any float type.
        up_ED2I: (E, D, 2, I): gate and up matrices, of x's type.
        down_EID: (E, I, D), of x's type.

    Returns:
        y_TD of x's type.

    Raises:
        ValueError: shapes, types or devices do not fit, or there are more than 2**31 - 1 pairs.
    """
    _check(x_TD, expert_TK, gate_TK, up_ED2I, down_EID)
    if not use_triton(x_TD, gate_TK, up_ED2I, down_EID):
        return _composed(x_TD, expert_TK, gate_TK, up_ED2I, down_EID)
    floats = (x_TD, gate_TK, up_ED2I, down_EID)
    keep = torch.is_grad_enabled() and any(one.requires_grad for one in floats)
    y_TD: Tensor = _forward(x_TD, expert_TK, gate_TK, up_ED2I, down_EID, keep)[0]
    return y_TD


def _check(x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, up_ED2I: Tensor, down_EID: Tensor) -> None:
    if x_TD.ndim != 2 or x_TD.dtype not in _DTYPES:
        raise ValueError(f"x is {_text(x_TD)}: it must be (T, D) floats, flatten the leading dimensions")
    if expert_TK.ndim != 2 or len(expert_TK) != len(x_TD) or expert_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert is {_text(expert_TK)}: it must be ({len(x_TD)}, K) of int32 or int64")
    if gate_TK.shape != expert_TK.shape or gate_TK.dtype not in _DTYPES:
        raise ValueError(f"gate is {_text(gate_TK)}: it must be {tuple(expert_TK.shape)} floats, as expert")
    if up_ED2I.ndim != 4 or up_ED2I.shape[1] != x_TD.shape[1] or up_ED2I.shape[2] != 2:
        raise ValueError(f"up is {_text(up_ED2I)}: it must be (E, {x_TD.shape[1]}, 2, I)")
    wanted = (up_ED2I.shape[0], up_ED2I.shape[3], x_TD.shape[1])
    if tuple(down_EID.shape) != wanted:
        raise ValueError(f"down is {_text(down_EID)}: it must be {wanted}")
    for name, one in {"up": up_ED2I, "down": down_EID}.items():
        if one.dtype != x_TD.dtype:
            raise ValueError(f"{name} is {_text(one)}, x {x_TD.dtype}: cast one of them")
    for name, one in {"expert": expert_TK, "gate": gate_TK, "up": up_ED2I, "down": down_EID}.items():
        if one.device != x_TD.device:
            raise ValueError(f"{name} is on {one.device}, x on {x_TD.device}: move one of them")
    if expert_TK.numel() >= 2**31:
        raise ValueError(f"expert has {expert_TK.numel()} pairs: at most 2**31 - 1 a call, split the tokens")


def _text(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {x.dtype}"


def _swiglu(h_S2I: Tensor) -> Tensor:
    gate_SI, up_SI = h_S2I.chunk(2, dim=-1)
    return F.silu(gate_SI) * up_SI


def _composed(x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, up_ED2I: Tensor, down_EID: Tensor) -> Tensor:
    """Sorted rows through torch's grouped products where those are legal, else the reference."""
    if not _grouped_is_legal(x_TD, up_ED2I, down_EID) or not expert_TK.numel():
        fixed_shapes = torch.compiler.is_compiling() or x_TD.is_meta
        return (_dense if fixed_shapes else fused_moe_ref)(x_TD, expert_TK, gate_TK, up_ED2I, down_EID)
    num_experts, top_k = len(up_ED2I), expert_TK.shape[1]
    kept_TK = (expert_TK >= 0) & (expert_TK < num_experts)
    choice_S = torch.where(kept_TK, expert_TK, num_experts).flatten().long()
    order_S = choice_S.argsort(stable=True)
    count_E = (choice_S.unsqueeze(1) == torch.arange(num_experts, device=x_TD.device)).sum(0)
    offset_E = count_E.cumsum(0).to(torch.int32)
    # Dropped pairs come last, behind every group, where torch leaves what it found in memory: where, not times zero.
    kept_S1 = (choice_S[order_S] < num_experts).unsqueeze(1)
    x_SD = torch.where(kept_S1, x_TD[order_S // top_k], 0)
    a_SI = _swiglu(torch.where(kept_S1, F.grouped_mm(x_SD, up_ED2I.flatten(2), offs=offset_E), 0))
    y_SD = torch.where(kept_S1, F.grouped_mm(a_SI, down_EID, offs=offset_E), 0)
    y_TKD = y_SD[order_S.argsort()].view(*expert_TK.shape, -1)
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    gate_TK = torch.where(kept_TK, gate_TK, 0).to(wide)
    return (y_TKD * gate_TK.unsqueeze(-1)).sum(1).to(x_TD.dtype)


def _dense(x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, up_ED2I: Tensor, down_EID: Tensor) -> Tensor:
    """Every expert on every token: slow, but its shapes are known to a compiler."""
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for expert in range(len(up_ED2I)):
        gate_T1 = torch.where(expert_TK == expert, gate_TK, 0).sum(1, keepdim=True).to(y_TD.dtype)
        y_TD = y_TD + _swiglu(x_TD @ up_ED2I[expert].flatten(1)) @ down_EID[expert] * gate_T1
    return y_TD.to(x_TD.dtype)


def _grouped_is_legal(x_TD: Tensor, up_ED2I: Tensor, down_EID: Tensor) -> bool:
    known = (torch.float32, torch.float16, torch.bfloat16) if x_TD.is_cpu else (torch.bfloat16,)
    aligned = all(size * x_TD.element_size() % 16 == 0 for size in down_EID.shape[1:])
    full = x_TD.numel() > 0 and down_EID.numel() > 0
    return hasattr(F, "grouped_mm") and x_TD.dtype in known and aligned and full


@operator("fused_moe")
def _forward(
    x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, up_ED2I: Tensor, down_EID: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, pre-activation or nothing unless ``keep``, the four parts of Routing)."""
    x_TD, up_ED2I, down_EID = x_TD.contiguous(), up_ED2I.contiguous(), down_EID.contiguous()
    num_experts = len(up_ED2I)
    height = block_rows(expert_TK.numel(), num_experts, x_TD.dtype)
    routing = route(expert_TK, num_experts, height)
    h_S2I, a_SI = project_up(x_TD, up_ED2I, routing, height, keep=keep)
    y_SD = multiply_rows(a_SI, down_EID, routing, height, transposed=False)
    return combine(y_SD, routing, gate_TK.contiguous(), expert_TK.shape[1]), h_S2I, *routing


@_forward.register_fake
def _(
    x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, up_ED2I: Tensor, down_EID: Tensor, keep: bool
) -> tuple[Tensor, ...]:
    h_S2I = x_TD.new_empty((expert_TK.numel() if keep else 0, 2 * up_ED2I.shape[3]))
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format), h_S2I, *empty_routing(expert_TK, len(up_ED2I))


@operator("fused_moe_activation_backward")
def _backward_to_rows(
    dy_TD: Tensor, gate_TK: Tensor, down_EID: Tensor, h_S2I: Tensor,
    offset_E: Tensor, pair_S: Tensor, row_S: Tensor, tile_N2: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the pre-activation and of the gates, and the gated activation: what all gradients rest on."""
    routing = Routing(offset_E, pair_S, row_S, tile_N2)
    gate_TK, height = gate_TK.contiguous(), block_rows(len(h_S2I), len(down_EID), h_S2I.dtype)
    down_EID = down_EID.contiguous()
    dh_S2I, a_SI, part_SN = backward_of_activation(dy_TD.contiguous(), down_EID, h_S2I, gate_TK, routing, height)
    return dh_S2I, a_SI, sum_parts(part_SN, routing, gate_TK)


@_backward_to_rows.register_fake
def _(dy_TD: Tensor, gate_TK: Tensor, down_EID: Tensor, h_S2I: Tensor, *routing: Tensor) -> tuple[Tensor, ...]:
    a_SI = h_S2I.new_empty((len(h_S2I), down_EID.shape[1]))
    return torch.empty_like(h_S2I), a_SI, torch.empty_like(gate_TK, memory_format=torch.contiguous_format)


@operator("fused_moe_backward")
def _backward(
    dy_TD: Tensor, x_TD: Tensor, up_ED2I: Tensor, down_EID: Tensor, dh_S2I: Tensor, a_SI: Tensor,
    offset_E: Tensor, pair_S: Tensor, row_S: Tensor, tile_N2: Tensor, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, up and down; one that is not ``wanted`` is empty."""
    routing = Routing(offset_E, pair_S, row_S, tile_N2)
    top_k = len(dh_S2I) // len(x_TD)
    dx_TD, dup, ddown = (x_TD.new_empty(0) for _ in range(3))
    if wanted[0]:
        height = block_rows(len(dh_S2I), len(up_ED2I), x_TD.dtype)
        dx_SD = multiply_rows(dh_S2I, up_ED2I.contiguous().flatten(2), routing, height, transposed=True)
        dx_TD = combine(dx_SD, routing, None, top_k)
    if wanted[1]:
        dup = outer_products(x_TD.contiguous(), dh_S2I, routing, top_k, gather_left=True).view_as(up_ED2I)
    if wanted[2]:
        ddown = outer_products(a_SI, dy_TD.contiguous(), routing, top_k, gather_left=False)
    return dx_TD, dup, ddown


@_backward.register_fake
def _(
    dy_TD: Tensor, x_TD: Tensor, up_ED2I: Tensor, down_EID: Tensor, dh_S2I: Tensor, a_SI: Tensor,
    offset_E: Tensor, pair_S: Tensor, row_S: Tensor, tile_N2: Tensor, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        torch.empty_like(like, memory_format=torch.contiguous_format) if want else x_TD.new_empty(0)
        for like, want in zip((x_TD, up_ED2I, down_EID), wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, _, gate_TK, up_ED2I, down_EID, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.rows = None
    if keep:
        ctx.save_for_backward(x_TD, gate_TK, up_ED2I, down_EID, *output[1:])


def _differentiate(ctx: Any, dy_TD: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy_TD is None:
        return (None,) * 6
    x, _experts, gate, up, down = asked_for(ctx)
    dh_S2I, a_SI, dgate_TK = _rows_once(ctx, dy_TD, last=(up, down) == ctx.needs_input_grad[3:5])
    x_TD, _gates, up_ED2I, down_EID, _h, *routing = ctx.saved_tensors
    wanted = [x, up, down]
    found = _backward(dy_TD, x_TD, up_ED2I, down_EID, dh_S2I, a_SI, *routing, wanted)
    dx_TD, dup, ddown = (one if want else None for one, want in zip(found, wanted, strict=True))
    return dx_TD, None, dgate_TK if gate else None, dup, ddown, None


def _rows_once(ctx: Any, dy_TD: Tensor, *, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What a pass for the inputs found, kept for the one for the weights that follows with the same gradient of y."""
    kept, ctx.rows = ctx.rows, None
    if kept is not None and kept[0] is dy_TD and kept[1] == dy_TD._version:
        found: tuple[Tensor, Tensor, Tensor] = kept[2]
    else:
        _x, gate_TK, _up, down_EID, h_S2I, *routing = ctx.saved_tensors
        found = _backward_to_rows(dy_TD, gate_TK, down_EID, h_S2I, *routing)
    if not last:
        ctx.rows = dy_TD, dy_TD._version, found
    return found


_forward.register_autograd(_differentiate, setup_context=_save)


def combine(y_SD: Tensor, routing: Routing, gate_TK: Tensor | None, top_k: int) -> Tensor:
    """Each token's sum of its rows, times their gates if there are some, in the order of its choices."""
    num_tokens, width = len(y_SD) // top_k, y_SD.shape[1]
    y_TD = torch.empty((num_tokens, width), dtype=y_SD.dtype, device=y_SD.device)
    block = min(_COMBINE, max(16, triton.next_power_of_2(width)))
    _combine[(num_tokens, triton.cdiv(width, block))](
        y_SD, y_SD if gate_TK is None else gate_TK, y_TD, routing.row_S, top_k, width,
        GATED=gate_TK is not None, CHOICES=min(_CHOICES, triton.next_power_of_2(top_k)), BLOCK=block,
    )  # fmt: skip
    return y_TD


def sum_parts(part_SN: Tensor, routing: Routing, gate_TK: Tensor) -> Tensor:
    """Gradient of the gates; 0 for a pair that no expert takes."""
    dgate_TK = torch.empty_like(gate_TK)
    num_pairs, num_parts = part_SN.shape
    _sum_parts[(triton.cdiv(num_pairs, _PAIRS),)](part_SN, routing.row_S, dgate_TK, num_pairs, num_parts, BLOCK=_PAIRS)
    return dgate_TK


def tune_fused_moe(
    num_tokens: int, width: int, hidden: int, num_experts: int, top_k: int,
    dtype: torch.dtype = torch.bfloat16, device: str = "cuda",
) -> list[tuple[str, Settings]]:  # fmt: skip
    """Measure the products of a layer on this GPU with balanced routing and keep the fastest settings.

    Args:
        num_tokens: T.
        width: D.
        hidden: I.
        num_experts: E.
        top_k: K.
        dtype: of tokens and weights.
        device: a GPU.

    Returns:
        Kernel and settings, as kept in the file of tuning.py.
    """
    x_TD, up_ED2I, down_EID = (
        torch.randn(size, dtype=dtype, device=device) / width**0.5
        for size in ((num_tokens, width), (num_experts, width, 2, hidden), (num_experts, hidden, width))
    )
    gate_TK, expert_TK = torch.rand(num_tokens, num_experts, device=device).topk(top_k)
    num_pairs = expert_TK.numel()
    height = block_rows(num_pairs, num_experts, dtype)
    routing = route(expert_TK, num_experts, height)
    h_S2I, a_SI = project_up(x_TD, up_ED2I, routing, height, keep=True)
    up_EDC, narrow, wide = up_ED2I.flatten(2), (width, hidden, height), (hidden, width, height)
    outer = [outer_class(dtype, *size, num_pairs // num_experts) for size in ((width, 2 * hidden), (hidden, width))]
    works: list[tuple[str, tuple[object, ...], list[Settings], Callable[[Settings], object]]] = [
        ("moe_up", row_class(dtype, *wide), SWIGLU_CANDIDATES,
         lambda s: project_up(x_TD, up_ED2I, routing, height, keep=True, settings=s)),
        ("moe_activation", row_class(dtype, *wide), SWIGLU_CANDIDATES,
         lambda s: backward_of_activation(x_TD, down_EID, h_S2I, gate_TK, routing, height, settings=s)),
        ("moe_rows", row_class(dtype, *narrow), ROW_CANDIDATES,
         lambda s: multiply_rows(a_SI, down_EID, routing, height, transposed=False, settings=s)),
        ("moe_rows_transposed", row_class(dtype, width, 2 * hidden, height), ROW_CANDIDATES,
         lambda s: multiply_rows(h_S2I, up_EDC, routing, height, transposed=True, settings=s)),
        ("moe_outer", outer[0], OUTER_CANDIDATES,
         lambda s: outer_products(x_TD, h_S2I, routing, top_k, gather_left=True, settings=s)),
        ("moe_outer", outer[1], OUTER_CANDIDATES,
         lambda s: outer_products(a_SI, x_TD, routing, top_k, gather_left=False, settings=s)),
    ]  # fmt: skip
    return [(op, tune(op, shape, candidates, partial(_seconds, launch))) for op, shape, candidates, launch in works]


def _seconds(launch: Callable[[Settings], object], settings: Settings) -> float:
    try:
        return float(triton.testing.do_bench(lambda: launch(settings), return_mode="median")) / 1e3
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def aot_variants() -> list[Variant]:
    """The two small kernels of this file; the products are listed where they are."""
    combined = {"y_ptr": "*bf16", "router_ptr": "*fp32", "out_ptr": "*bf16", "row_ptr": "*i32", "top_k": "i32"}
    constants = {"GATED": True, "CHOICES": _CHOICES, "BLOCK": _COMBINE}
    parts = {"part_ptr": "*fp32", "row_ptr": "*i32", "out_ptr": "*fp32", "num_pairs": "i32", "num_parts": "i32"}
    return [
        Variant("fused_moe", _combine, {**combined, "width": "i32"}, constants, ("width",), label="combine"),
        Variant("fused_moe", _sum_parts, parts, {"BLOCK": _PAIRS}, label="gradient of gates"),
    ]


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _combine(  # type: ignore[no-untyped-def, unused-ignore]
        y_ptr, router_ptr, out_ptr, row_ptr, top_k, width,
        GATED: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # Several rows are on their way from memory at a time.
        token = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, top_k, CHOICES):
            choices = first + tl.arange(0, CHOICES)
            pairs = token * top_k + choices
            row = tl.load(row_ptr + pairs, mask=choices < top_k, other=-1)
            y_ptrs = y_ptr + row.to(tl.int64)[:, None] * width + columns[None, :]
            y = tl.load(y_ptrs, mask=(row >= 0)[:, None] & (columns < width)[None, :], other=0.0).to(tl.float32)
            if GATED:
                y *= tl.load(router_ptr + pairs, mask=row >= 0, other=0.0).to(tl.float32)[:, None]
            total += tl.sum(y, axis=0)
        tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=columns < width)

    @triton.jit(do_not_specialize=["num_pairs"])  # type: ignore[untyped-decorator, unused-ignore]
    def _sum_parts(part_ptr, row_ptr, out_ptr, num_pairs, num_parts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def, unused-ignore]
        pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(row_ptr + pairs, mask=pairs < num_pairs, other=-1)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for part in range(num_parts):
            total += tl.load(part_ptr + row.to(tl.int64) * num_parts + part, mask=row >= 0, other=0.0)
        tl.store(out_ptr + pairs, total.to(out_ptr.dtype.element_ty), mask=pairs < num_pairs)

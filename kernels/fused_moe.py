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
from deepseek_ray.kernels.dispatch import use_triton
from deepseek_ray.kernels.grouped_gemm import (
    block_rows,
    describable,
    describe,
    descriptor_type,
    multiply_rows,
    outer_products,
    row_settings,
    variant,
)
from deepseek_ray.kernels.moe_routing import Routing, empty_routing, num_tiles, route
from deepseek_ray.kernels.tuning import Settings

if triton is not None:
    from deepseek_ray.kernels.grouped_gemm import expert_tile, find_tile, row_tile

UP = {"BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 16, "TMA": 1, "num_warps": 8, "num_stages": 3}
ACTIVATION = {"BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 16, "TMA": 1, "num_warps": 8, "num_stages": 3}
_COMBINE = 1024
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
        return fused_moe_ref(x_TD, expert_TK, gate_TK, up_ED2I, down_EID)
    num_experts, top_k = len(up_ED2I), expert_TK.shape[1]
    choice_S = expert_TK.flatten().long()
    choice_S = torch.where((choice_S >= 0) & (choice_S < num_experts), choice_S, num_experts)
    order_S = choice_S.argsort(stable=True)
    count_E = (choice_S.unsqueeze(1) == torch.arange(num_experts, device=x_TD.device)).sum(0)
    offset_E = count_E.cumsum(0).to(torch.int32)
    # Dropped pairs come last, behind every group, where torch leaves what it found in memory: where, not times zero.
    kept_S1 = (choice_S[order_S] < num_experts).unsqueeze(1)
    x_SD = torch.where(kept_S1, x_TD[order_S // top_k], 0)
    a_SI = _swiglu(torch.where(kept_S1, F.grouped_mm(x_SD, up_ED2I.flatten(2), offs=offset_E), 0))
    y_SD = torch.where(kept_S1, F.grouped_mm(a_SI, down_EID, offs=offset_E), 0)
    y_TKD = y_SD[order_S.argsort()].unflatten(0, expert_TK.shape)
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    return (y_TKD * gate_TK.to(wide).unsqueeze(-1)).sum(1).to(x_TD.dtype)


def _grouped_is_legal(x_TD: Tensor, up_ED2I: Tensor, down_EID: Tensor) -> bool:
    known = (torch.bfloat16,) if x_TD.is_cuda else (torch.float32, torch.float16, torch.bfloat16)
    aligned = all(size * x_TD.element_size() % 16 == 0 for size in down_EID.shape[1:])
    full = x_TD.numel() > 0 and down_EID.numel() > 0
    return hasattr(F, "grouped_mm") and x_TD.dtype in known and aligned and full


@torch.library.custom_op("deepseek_ray::fused_moe", mutates_args=())
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


@torch.library.custom_op("deepseek_ray::fused_moe_backward", mutates_args=())
def _backward(
    dy_TD: Tensor, x_TD: Tensor, gate_TK: Tensor, up_ED2I: Tensor, down_EID: Tensor, h_S2I: Tensor,
    offset_E: Tensor, pair_S: Tensor, row_S: Tensor, tile_N2: Tensor, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, gates, up and down; one that is not ``wanted`` is empty."""
    routing = Routing(offset_E, pair_S, row_S, tile_N2)
    dy_TD, x_TD, gate_TK = dy_TD.contiguous(), x_TD.contiguous(), gate_TK.contiguous()
    up_EDC, down_EID = up_ED2I.contiguous().flatten(2), down_EID.contiguous()
    top_k = gate_TK.shape[1]
    height = block_rows(len(h_S2I), len(up_EDC), x_TD.dtype)
    dh_S2I, a_SI, part_SN = backward_of_activation(dy_TD, down_EID, h_S2I, gate_TK, routing, height)
    dx_TD, dgate_TK, dup, ddown = (x_TD.new_empty(0) for _ in range(4))
    if wanted[0]:
        dx_TD = combine(multiply_rows(dh_S2I, up_EDC, routing, height, transposed=True), routing, None, top_k)
    if wanted[1]:
        dgate_TK = sum_parts(part_SN, routing, gate_TK)
    if wanted[2]:
        dup = outer_products(x_TD, dh_S2I, routing, top_k, gather_left=True).view_as(up_ED2I)
    if wanted[3]:
        ddown = outer_products(a_SI, dy_TD, routing, top_k, gather_left=False)
    return dx_TD, dgate_TK, dup, ddown


@_backward.register_fake
def _(
    dy_TD: Tensor, x_TD: Tensor, gate_TK: Tensor, up_ED2I: Tensor, down_EID: Tensor, h_S2I: Tensor,
    offset_E: Tensor, pair_S: Tensor, row_S: Tensor, tile_N2: Tensor, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    likes = (x_TD, gate_TK, up_ED2I, down_EID)
    return tuple(
        torch.empty_like(like, memory_format=torch.contiguous_format) if want else x_TD.new_empty(0)
        for like, want in zip(likes, wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, _, gate_TK, up_ED2I, down_EID, keep = inputs
    ctx.set_materialize_grads(False)
    if keep:
        ctx.save_for_backward(x_TD, gate_TK, up_ED2I, down_EID, *output[1:])


def _differentiate(ctx: Any, dy_TD: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy_TD is None:
        return (None,) * 6
    x, _experts, gate, up, down, _keep = ctx.needs_input_grad
    wanted = [x, gate, up, down]
    found = _backward(dy_TD, *ctx.saved_tensors, wanted)
    dx_TD, dgate_TK, dup, ddown = (one if want else None for one, want in zip(found, wanted, strict=True))
    return dx_TD, None, dgate_TK, dup, ddown, None


_forward.register_autograd(_differentiate, setup_context=_save)


def project_up(
    x_TD: Tensor, up_ED2I: Tensor, routing: Routing, height: int, *, keep: bool, settings: Settings | None = None
) -> tuple[Tensor, Tensor]:
    """(h_S2I or nothing unless ``keep``, a_SI) of gathered rows; both undefined for rows that no expert takes."""
    num_experts, depth, _, width = up_ED2I.shape
    num_rows = len(routing.pair_S)
    settings = settings or row_settings("moe_up", x_TD.dtype, width, depth, height, UP)
    h_S2I = torch.empty((num_rows if keep else 0, 2 * width), dtype=x_TD.dtype, device=x_TD.device)
    a_SI = torch.empty((num_rows, width), dtype=x_TD.dtype, device=x_TD.device)
    block_n, block_k = settings["BLOCK_N"], settings["BLOCK_K"]
    up_EDC = up_ED2I.flatten(2)
    tma = bool(settings["TMA"]) and describable(up_EDC) and describable(a_SI)
    tiles, columns = num_tiles(num_rows, num_experts, height), triton.cdiv(width, block_n)
    _project_up[(tiles * columns,)](
        x_TD, describe(up_EDC, 1, block_k, block_n) if tma else up_EDC, h_S2I, a_SI,
        routing.offset_E, routing.pair_S, routing.tile_N2, tiles, num_rows // len(x_TD), width, depth,
        KEEP=keep, EVEN=width % block_n == 0 and depth % block_k == 0, BLOCK_M=height, **{**settings, "TMA": tma},
    )  # fmt: skip
    return h_S2I, a_SI


def backward_of_activation(
    dy_TD: Tensor, down_EID: Tensor, h_S2I: Tensor, gate_TK: Tensor, routing: Routing, height: int,
    settings: Settings | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dh_S2I, gate * a_SI, one summand of the gate's gradient for each row and tile of columns)."""
    num_experts, width, depth = down_EID.shape
    settings = settings or row_settings("moe_activation", dy_TD.dtype, width, depth, height, ACTIVATION)
    block_n, block_k = settings["BLOCK_N"], settings["BLOCK_K"]
    tiles, columns = num_tiles(len(h_S2I), num_experts, height), triton.cdiv(width, block_n)
    dh_S2I = torch.empty_like(h_S2I)
    a_SI = torch.empty((len(h_S2I), width), dtype=h_S2I.dtype, device=h_S2I.device)
    part_SN = torch.empty((len(h_S2I), columns), dtype=torch.float32, device=h_S2I.device)
    tma = bool(settings["TMA"]) and describable(down_EID)
    _backward_of_activation[(tiles * columns,)](
        dy_TD, describe(down_EID, 1, block_n, block_k) if tma else down_EID,
        h_S2I, gate_TK, dh_S2I, a_SI, part_SN,
        routing.offset_E, routing.pair_S, routing.tile_N2, tiles, gate_TK.shape[1], width, depth,
        EVEN=width % block_n == 0 and depth % block_k == 0, BLOCK_M=height, **{**settings, "TMA": tma},
    )  # fmt: skip
    return dh_S2I, a_SI, part_SN


def combine(y_SD: Tensor, routing: Routing, gate_TK: Tensor | None, top_k: int) -> Tensor:
    """Each token's sum of its rows, times their gates if there are some, in the order of its choices."""
    num_tokens, width = len(y_SD) // top_k, y_SD.shape[1]
    y_TD = torch.empty((num_tokens, width), dtype=y_SD.dtype, device=y_SD.device)
    block = min(_COMBINE, max(16, triton.next_power_of_2(width)))
    _combine[(num_tokens, triton.cdiv(width, block))](
        y_SD, y_SD if gate_TK is None else gate_TK, y_TD, routing.row_S, top_k, width,
        GATED=gate_TK is not None, BLOCK=block,
    )  # fmt: skip
    return y_TD


def sum_parts(part_SN: Tensor, routing: Routing, gate_TK: Tensor) -> Tensor:
    """Gradient of the gates; 0 for a pair that no expert takes."""
    dgate_TK = torch.empty_like(gate_TK)
    num_pairs, num_parts = part_SN.shape
    block = 256
    _sum_parts[(triton.cdiv(num_pairs, block),)](part_SN, routing.row_S, dgate_TK, num_pairs, num_parts, BLOCK=block)
    return dgate_TK


def aot_variants() -> list[Variant]:
    """The kernels of this file for bfloat16, with and without Hopper's copy engine; sizes are not compiled in."""
    found = [_tile_variant("up", _project_up, UP, tma, {"KEEP": keep}) for keep in (True, False) for tma in (1, 0)]
    found += [_tile_variant("backward of activation", _backward_of_activation, ACTIVATION, tma, {}) for tma in (1, 0)]
    combined = {"y_ptr": "*bf16", "router_ptr": "*fp32", "out_ptr": "*bf16", "row_ptr": "*i32", "top_k": "i32"}
    constants = {"GATED": True, "BLOCK": _COMBINE}
    found.append(Variant("fused_moe", _combine, {**combined, "width": "i32"}, constants, ("width",), label="combine"))
    parts = {"part_ptr": "*fp32", "row_ptr": "*i32", "out_ptr": "*fp32", "num_pairs": "i32", "num_parts": "i32"}
    return [*found, Variant("fused_moe", _sum_parts, parts, {"BLOCK": 256}, label="gradient of gates")]


def _tile_variant(label: str, kernel: Any, settings: Settings, tma: int, constants: dict[str, Any]) -> Variant:
    block_n, block_k = settings["BLOCK_N"], settings["BLOCK_K"]
    block = (1, block_k, block_n) if kernel is _project_up else (1, block_n, block_k)
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    integers = [name for name in kernel.arg_names if name in ("num_tiles", "top_k", "width", "depth")]
    kinds = {
        "router_ptr": "*fp32",
        "part_ptr": "*fp32",
        **dict.fromkeys(("offset_ptr", "pair_ptr", "tile_ptr"), "*i32"),
    }
    signature = {name: kinds.get(name, "*bf16") for name in pointers} | dict.fromkeys(integers, "i32")
    signature["w"] = descriptor_type("bf16", *block) if tma else "*bf16"
    label = " ".join([label, "TMA" if tma else "pointers", *(["inference"] if constants.get("KEEP") is False else [])])
    constants = {**constants, "EVEN": True, "BLOCK_M": 128}
    return variant("fused_moe", kernel, signature, constants, ("width", "depth"), {**settings, "TMA": tma}, label)


if triton is not None:

    @triton.jit(do_not_specialize=["num_tiles"])  # type: ignore[untyped-decorator, unused-ignore]
    def _project_up(  # type: ignore[no-untyped-def, unused-ignore]
        x_ptr, w, h_ptr, a_ptr, offset_ptr, pair_ptr, tile_ptr, num_tiles, top_k, width, depth,
        KEEP: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        # A program owns a tile of the gate's columns and the same tile of the up projection's: SwiGLU needs both.
        expert, first, column = find_tile(tile_ptr, num_tiles, tl.cdiv(width, BLOCK_N), GROUP)
        if expert < 0:
            return
        end = tl.load(offset_ptr + expert + 1)
        rows = first + tl.arange(0, BLOCK_M)
        tokens = tl.load(pair_ptr + tl.minimum(rows, end - 1)) // top_k
        gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        n = column * BLOCK_N
        for k in range(0, depth, BLOCK_K):
            x = row_tile(x_ptr, tokens, k, depth, BLOCK_K, EVEN)
            gate_w = expert_tile(w, expert, k, n, depth, 2 * width, BLOCK_K, BLOCK_N, EVEN, TMA)
            up_w = expert_tile(w, expert, k, width + n, depth, 2 * width, BLOCK_K, BLOCK_N, EVEN, TMA)
            gate = tl.dot(x, gate_w, gate, input_precision="ieee")
            up = tl.dot(x, up_w, up, input_precision="ieee")
        rows = tl.arange(0, BLOCK_M)[:, None]
        columns = n + tl.arange(0, BLOCK_N)[None, :]
        inside = (rows < end - first) & (columns < width)
        behind = first.to(tl.int64) * width
        # The backward recomputes a from the rounded h: round here too, so that it finds the same a.
        gate = gate.to(a_ptr.dtype.element_ty)
        up = up.to(a_ptr.dtype.element_ty)
        if KEEP:
            h_ptrs = h_ptr + 2 * behind + (rows * (2 * width) + columns)
            tl.store(h_ptrs, gate, mask=inside)
            tl.store(h_ptrs + width, up, mask=inside)
        gate = gate.to(tl.float32)
        a = gate * tl.sigmoid(gate) * up.to(tl.float32)
        tl.store(a_ptr + behind + (rows * width + columns), a.to(a_ptr.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["num_tiles"])  # type: ignore[untyped-decorator, unused-ignore]
    def _backward_of_activation(  # type: ignore[no-untyped-def, unused-ignore]
        dy_ptr, w, h_ptr, router_ptr, dh_ptr, a_ptr, part_ptr, offset_ptr, pair_ptr, tile_ptr, num_tiles,
        top_k, width, depth, EVEN: tl.constexpr, TMA: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        num_columns = tl.cdiv(width, BLOCK_N)
        expert, first, column = find_tile(tile_ptr, num_tiles, num_columns, GROUP)
        if expert < 0:
            return
        end = tl.load(offset_ptr + expert + 1)
        rows = first + tl.arange(0, BLOCK_M)
        pairs = tl.load(pair_ptr + tl.minimum(rows, end - 1))
        tokens = pairs // top_k
        n = column * BLOCK_N
        da = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, depth, BLOCK_K):
            dy = row_tile(dy_ptr, tokens, k, depth, BLOCK_K, EVEN)
            down = expert_tile(w, expert, n, k, width, depth, BLOCK_N, BLOCK_K, EVEN, TMA)
            da = tl.dot(dy, down.T, da, input_precision="ieee")
        router = tl.load(router_ptr + pairs).to(tl.float32)
        # By halves, so that less has to be in registers at a time.
        left, right = da.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        part = _halves(left, router, h_ptr, dh_ptr, a_ptr, first, end, n, width, BLOCK_M, BLOCK_N // 2)
        n += BLOCK_N // 2
        part += _halves(right, router, h_ptr, dh_ptr, a_ptr, first, end, n, width, BLOCK_M, BLOCK_N // 2)
        tl.store(part_ptr + rows.to(tl.int64) * num_columns + column, part, mask=rows < end)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _halves(  # type: ignore[no-untyped-def, unused-ignore]
        da, router, h_ptr, dh_ptr, a_ptr, first, end, n, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
    ):
        left, right = da.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        part = _through_swiglu(left, router, h_ptr, dh_ptr, a_ptr, first, end, n, width, BLOCK_M, BLOCK_N // 2)
        n += BLOCK_N // 2
        part += _through_swiglu(right, router, h_ptr, dh_ptr, a_ptr, first, end, n, width, BLOCK_M, BLOCK_N // 2)
        return part

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _through_swiglu(  # type: ignore[no-untyped-def, unused-ignore]
        da, router, h_ptr, dh_ptr, a_ptr, first, end, n, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
    ):
        """Store the gradient of h and the gated activation; return each row's <da, a>."""
        rows = tl.arange(0, BLOCK_M)[:, None]
        columns = n + tl.arange(0, BLOCK_N)[None, :]
        inside = (rows < end - first) & (columns < width)
        behind = first.to(tl.int64) * width
        dh_ptrs = dh_ptr + 2 * behind + (rows * (2 * width) + columns)
        h_ptrs = h_ptr + 2 * behind + (rows * (2 * width) + columns)
        gate = tl.load(h_ptrs, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h_ptrs + width, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        part = tl.sum(da * silu * up, axis=1)
        a_ptrs = a_ptr + behind + (rows * width + columns)
        tl.store(a_ptrs, (router[:, None] * silu * up).to(a_ptr.dtype.element_ty), mask=inside)
        da = da * router[:, None]
        dgate = da * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(dh_ptrs, dgate.to(dh_ptr.dtype.element_ty), mask=inside)
        tl.store(dh_ptrs + width, (da * silu).to(dh_ptr.dtype.element_ty), mask=inside)
        return part

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _combine(y_ptr, router_ptr, out_ptr, row_ptr, top_k, width, GATED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def, unused-ignore]
        token = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for choice in range(top_k):
            row = tl.load(row_ptr + token * top_k + choice)
            inside = (columns < width) & (row >= 0)
            y = tl.load(y_ptr + row.to(tl.int64) * width + columns, mask=inside, other=0.0).to(tl.float32)
            if GATED:
                y *= tl.load(router_ptr + token * top_k + choice).to(tl.float32)
            total += y
        tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=columns < width)

    @triton.jit(do_not_specialize=["num_pairs"])  # type: ignore[untyped-decorator, unused-ignore]
    def _sum_parts(part_ptr, row_ptr, out_ptr, num_pairs, num_parts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def, unused-ignore]
        pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(row_ptr + pairs, mask=pairs < num_pairs, other=-1)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for part in range(num_parts):
            total += tl.load(part_ptr + row.to(tl.int64) * num_parts + part, mask=row >= 0, other=0.0)
        tl.store(out_ptr + pairs, total.to(out_ptr.dtype.element_ty), mask=pairs < num_pairs)

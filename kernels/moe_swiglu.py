"""The two grouped products with SwiGLU attached: up-projection and the backward of the down-projection.

Both gather tokens while they multiply, so that rows sorted by expert are never written down, and both work on the
activation where the product still lies in registers (Guo et al. 2025, arXiv:2512.14080).

Legend: T tokens, D model width, I width of an expert, E experts, S rows (pairs of token and choice, sorted by expert),
N tiles of columns. h = pre-activation (gate and up side by side), a = silu(h_gate) * h_up.
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

from deepseek_ray.kernels.aot import Variant
from deepseek_ray.kernels.grouped_gemm import (
    KINDS,
    Kind,
    block_rows,
    describable,
    describe,
    fit,
    for_launch,
    row_class,
    tile_of,
    variant,
)
from deepseek_ray.kernels.moe_routing import Routing, num_tiles
from deepseek_ray.kernels.tuning import Settings, settings_for

if triton is not None:
    from deepseek_ray.kernels.grouped_gemm import expert_tile, find_tile, row_tile

UP = {"BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 16, "TMA": 1, "num_warps": 8, "num_stages": 4}
"""Two tiles of 128 columns (gate, up): as much work for a byte as one of 256."""
ACTIVATION = {"BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 16, "TMA": 1, "num_warps": 8, "num_stages": 3}
"""128 registers and 96 KiB: two programs a multiprocessor, since five tiles go through memory when one is done."""
CANDIDATES: list[Settings] = [
    {"BLOCK_N": n, "BLOCK_K": 64, "GROUP": group, "TMA": tma, "num_warps": warps, "num_stages": stages}
    for n, warps in ((128, 8), (128, 4), (64, 8), (64, 4), (256, 8))
    for stages in (3, 4)
    for tma in (1, 0)
    for group in (8, 16)
]


def project_up(
    x_TD: Tensor, up_ED2I: Tensor, routing: Routing, height: int, *, keep: bool, settings: Settings | None = None
) -> tuple[Tensor, Tensor]:
    """(h_S2I or nothing unless ``keep``, a_SI) of gathered rows; both undefined for rows that no expert takes."""
    num_experts, depth, _, width = up_ED2I.shape
    num_rows = len(routing.pair_S)
    shape = row_class(x_TD.dtype, width, depth, height)
    settings = settings or settings_for("moe_up", shape, for_launch(UP, x_TD, width, depth))
    settings = fit(settings, width, depth)
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
    shape = row_class(dy_TD.dtype, width, depth, height)
    settings = settings or settings_for("moe_activation", shape, for_launch(ACTIVATION, dy_TD, width, depth))
    settings = fit(settings, width, depth)
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


def aot_variants() -> list[Variant]:
    """Both kernels of every kind; sizes are not compiled in."""
    up, activation = (_project_up, UP), (_backward_of_activation, ACTIVATION)
    found = [_variant("up", *up, kind, {"KEEP": True}) for kind in KINDS]
    found += [_variant("up for inference", *up, kind, {"KEEP": False}) for kind in KINDS if kind.roomy]
    return found + [_variant("activation", *activation, kind, {}) for kind in KINDS]


def _variant(label: str, kernel: Any, default: Settings, kind: Kind, constants: dict[str, Any]) -> Variant:
    settings = tile_of(default, kind)
    block_n, block_k = settings["BLOCK_N"], settings["BLOCK_K"]
    described = {"w": (1, block_k, block_n) if kernel is _project_up else (1, block_n, block_k)}
    constants = {"BLOCK_M": block_rows(1 << 20, 1, kind.dtype), **constants}
    return variant("moe_swiglu", kernel, described, constants, settings, label, kind)


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
        # By quarters, so that the epilogue finds room in registers beside da.
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = _halves(da, BLOCK_M, BLOCK_N)
        part = _half_through_swiglu(left, router, h_ptr, dh_ptr, a_ptr, first, end, n, width, BLOCK_M, HALF)
        part += _half_through_swiglu(right, router, h_ptr, dh_ptr, a_ptr, first, end, n + HALF, width, BLOCK_M, HALF)
        tl.store(part_ptr + rows.to(tl.int64) * num_columns + column, part, mask=rows < end)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def, unused-ignore]
        return x.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _half_through_swiglu(  # type: ignore[no-untyped-def, unused-ignore]
        da, router, h_ptr, dh_ptr, a_ptr, first, end, n, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
    ):
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = _halves(da, BLOCK_M, BLOCK_N)
        part = _through_swiglu(left, router, h_ptr, dh_ptr, a_ptr, first, end, n, width, BLOCK_M, HALF)
        part += _through_swiglu(right, router, h_ptr, dh_ptr, a_ptr, first, end, n + HALF, width, BLOCK_M, HALF)
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

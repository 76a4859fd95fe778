"""Grouped product with quantised weights, for serving: y_r = x_r W_e for the rows r of expert e.

W = (q - zero) * scale, with q in int8 (Dettmers et al. 2022, arXiv:2208.07339) or in 4 bits with a scale a group of the
contraction dimension (Frantar et al. 2022, arXiv:2210.17323; Lin et al. 2023, arXiv:2306.00978).

Legend: R rows sorted by expert, E experts, D contraction width, N outputs, G groups along D, Q stored rows
(D, or D / 2 where a byte holds two).

The kernel computes the transposed tile W^T x^T: outputs fill the 64 rows that the tensor cores of Hopper want, and a
handful of tokens is enough for the other side. Weights stay small whole numbers, exact in 16 bits; a group's product is
scaled in float32. The tiles of an expert are found from the offsets on the device: no host synchronisation. Each output
is one program's: no atomics, the same bits in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from deepseek_ray.kernels import dispatch, tuning
from deepseek_ray.kernels.aot import Variant

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; experts are then multiplied one by one
    triton = None

GROUPS = (32, 64, 128)
MIDDLE = 8  # the zero of 4 bits that have no zero points
_ROW_TILES = (16, 32, 64, 128)


@dataclass(frozen=True)
class QuantisedWeight:
    """Weights (E, D, N) as ``quantise_int8`` or ``quantise_int4`` made them.

    Attributes:
        data_EQN: int8 (E, D, N); or uint8 (E, D / 2, N), where byte j of a group holds its row j in the low half and
            its row j + group / 2 in the high half, so that both are contiguous columns of x.
        scale_EGN: (E, G, N), in the type of the weights that were quantised.
        zero_EGN: uint8 (E, G, N), 4 bits only; None stands for 8.
        bits: 8 or 4.
        group: rows of D that share a scale; D where a scale is a whole output channel's.
    """

    data_EQN: Tensor
    scale_EGN: Tensor
    zero_EGN: Tensor | None
    bits: int
    group: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, D, N) of the weights."""
        experts, stored, width = self.data_EQN.shape
        return experts, stored * 8 // self.bits, width

    def to(self, device: torch.device | str) -> QuantisedWeight:
        """On another device."""
        zero_EGN = None if self.zero_EGN is None else self.zero_EGN.to(device)
        return QuantisedWeight(self.data_EQN.to(device), self.scale_EGN.to(device), zero_EGN, self.bits, self.group)


def quantise_int8(weight_EDN: Tensor, group: int | None = None) -> QuantisedWeight:
    """Round to -127 .. 127 times a scale.

    Args:
        weight_EDN: float.
        group: 32, 64 or 128 rows of D share a scale; None: all of an output channel.

    Raises:
        ValueError: the weights are not (E, D, N) floats, or the group is unknown or does not divide D.
    """
    group = _check_weight(weight_EDN, group)
    w_EGKN = torch.unflatten(weight_EDN, 1, (-1, group)).to(torch.promote_types(weight_EDN.dtype, torch.float32))
    scale_EGN = _scale(w_EGKN.abs().amax(2) / 127, weight_EDN.dtype)
    q_EGKN = (w_EGKN / scale_EGN.to(w_EGKN.dtype).unsqueeze(2)).round_().clamp_(-127, 127)
    return QuantisedWeight(q_EGKN.to(torch.int8).flatten(1, 2), scale_EGN, None, 8, group)


def quantise_int4(weight_EDN: Tensor, group: int = 128, *, zero_points: bool = False) -> QuantisedWeight:
    """Round to 16 levels and pack two a byte.

    Args:
        weight_EDN: float.
        group: 32, 64 or 128 rows of D share a scale.
        zero_points: levels from the group's lowest to its highest weight, instead of symmetric about 0.

    Raises:
        ValueError: the weights are not (E, D, N) floats, or the group is unknown or does not divide D.
    """
    if group not in GROUPS:
        raise ValueError(f"group = {group} must be one of {', '.join(map(str, GROUPS))} for 4 bits")
    _check_weight(weight_EDN, group)
    w_EGKN = torch.unflatten(weight_EDN, 1, (-1, group)).to(torch.promote_types(weight_EDN.dtype, torch.float32))
    if zero_points:
        low_EGN, high_EGN = w_EGKN.amin(2).clamp(max=0), w_EGKN.amax(2).clamp(min=0)
        scale_EGN = _scale((high_EGN - low_EGN) / 15, weight_EDN.dtype)
        zero_EGN = (-low_EGN / scale_EGN.to(low_EGN.dtype)).round_().clamp_(0, 15)
    else:
        scale_EGN = _scale(w_EGKN.abs().amax(2) / 7, weight_EDN.dtype)
        zero_EGN = torch.full_like(scale_EGN, MIDDLE, dtype=w_EGKN.dtype)
    level_EGKN = (w_EGKN / scale_EGN.to(w_EGKN.dtype).unsqueeze(2) + zero_EGN.unsqueeze(2)).round_().clamp_(0, 15)
    low_EGJN, high_EGJN = level_EGKN.to(torch.uint8).chunk(2, dim=2)
    data_EQN = (low_EGJN | high_EGJN << 4).flatten(1, 2)
    return QuantisedWeight(data_EQN, scale_EGN, zero_EGN.to(torch.uint8) if zero_points else None, 4, group)


def dequantise(weight: QuantisedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Weights (E, D, N) in a float type; without one, in that of the scales."""
    return _dequantised(weight.data_EQN, weight.scale_EGN, weight.zero_EGN, weight.group, dtype)


def quantised_grouped_gemm_ref(x_RD: Tensor, weight: QuantisedWeight, offsets_E1: Tensor) -> Tensor:
    """Plain torch reference; differentiable in x."""
    wide = torch.promote_types(x_RD.dtype, torch.float32)
    return _expert_by_expert(
        x_RD, weight.data_EQN, weight.scale_EGN.to(wide), weight.zero_EGN, offsets_E1, weight.group, wide
    )


def quantised_grouped_gemm(x_RD: Tensor, weight: QuantisedWeight, offsets_E1: Tensor) -> Tensor:
    """Multiply the rows of each expert by its weights. Forward only.

    Args:
        x_RD: rows sorted by expert, float16, bfloat16 or float32 (float64 in plain torch).
        weight: of E experts.
        offsets_E1: int32 (E + 1), not decreasing, from 0: expert e has rows ``offsets[e]`` up to ``offsets[e + 1]``.
            Rows from ``offsets[E]`` on are no expert's: 0.

    Returns:
        (R, N) in x's type, summed in float32.

    Raises:
        ValueError: a shape, type or device does not fit.
        NotImplementedError: in the backward pass.
    """
    _check(x_RD, weight, offsets_E1)
    y_RN: Tensor = torch.ops.deepseek_ray.quantised_grouped_gemm(
        x_RD, weight.data_EQN, weight.scale_EGN, weight.zero_EGN, offsets_E1, weight.group
    )
    return y_RN


def candidates(rows_an_expert: int) -> list[tuning.Settings]:
    """Settings worth measuring for so many rows an expert."""
    rows = next((tile for tile in _ROW_TILES if rows_an_expert <= tile), _ROW_TILES[-1])
    return [
        {"BLOCK_R": tile, "BLOCK_N": outputs, "BLOCK_K": depth, "num_warps": warps, "num_stages": stages}
        for tile in sorted({rows, min(2 * rows, _ROW_TILES[-1])})
        for outputs, warps in ((32, 4), (64, 4), (128, 4), (128, 8))
        for depth in (64, 128)
        for stages in (3, 5)
    ]


def tune_quantised_grouped_gemm(x_RD: Tensor, weight: QuantisedWeight, offsets_E1: Tensor) -> tuning.Settings:
    """Measure the candidates on these tensors; keep the fastest."""

    def seconds(settings: tuning.Settings) -> float:
        y_RN = x_RD.new_empty(len(x_RD), weight.shape[2])
        try:
            return float(triton.testing.do_bench(lambda: _launch(y_RN, x_RD, weight, offsets_E1, settings))) / 1e3
        except triton.runtime.errors.OutOfResources:
            return float("inf")

    shape, rows = _shape_class(x_RD, weight), max(1, len(x_RD) // weight.shape[0])
    return tuning.tune("quantised_grouped_gemm", shape, candidates(rows), seconds)


def aot_variants() -> list[Variant]:
    """Decoding and prefilling with the experts of Qwen3-30B-A3B, Mixtral-8x7B and DeepSeek-V3."""
    if triton is None:
        return []
    kinds = ((8, 2048, False), (8, 128, False), (4, 128, False), (4, 128, True), (4, 64, False), (4, 32, True))
    cases = [
        *(("Qwen3", (128, 2048, 1536), *kind, rows) for kind in kinds for rows in (16, 128)),
        *(("Qwen3", (128, 2048, 1536), 4, 128, True, rows) for rows in (32, 64)),
        *(("Mixtral", (8, 4096, 28672), 4, 128, False, rows) for rows in (16, 128)),
        *(("DeepSeek-V3", (256, 7168, 4096), 8, 7168, False, rows) for rows in (16, 128)),
    ]
    return [_variant(*case, amd=amd) for case in cases for amd in (False, True)]


def _variant(
    name: str, shape: tuple[int, int, int], bits: int, group: int, zeros: bool, rows: int, *, amd: bool
) -> Variant:
    experts, width, _ = shape
    settings = _default(rows, amd=amd)
    signature = {"x_ptr": "*bf16", "q_ptr": "*i8" if bits == 8 else "*u8", "scale_ptr": "*bf16", "offsets_ptr": "*i32"}
    signature |= {"zero_ptr": "*u8"} if zeros else {}
    signature |= {"y_ptr": "*bf16", "num_rows": "i32", "width": "i32", "outputs": "i32"}
    constants = _constants(bits, group, width, experts, torch.bfloat16, settings["BLOCK_K"])
    constants |= {name: settings[name] for name in ("BLOCK_R", "BLOCK_N")} | ({} if zeros else {"zero_ptr": None})
    kind = f"int{bits} group {group if group < width else 'D'}{' zeros' if zeros else ''}"
    options = {key: settings[key] for key in ("num_warps", "num_stages")}
    label, sizes = f"{name} {kind} {rows} rows", ("num_rows", "width", "outputs")
    consumer = ("sm_120",) if rows == 128 else ()
    targets = ("gfx942",) if amd else ("sm_80", "sm_90", *consumer)
    return Variant("quantised_grouped_gemm", _kernel, signature, constants, sizes, options, label, targets)


def _check_weight(weight_EDN: Tensor, group: int | None) -> int:
    if weight_EDN.ndim != 3 or not weight_EDN.is_floating_point() or not weight_EDN.shape[1]:
        raise ValueError(
            f"weight is {weight_EDN.dtype} {tuple(weight_EDN.shape)}: it must be float (experts, width, outputs)"
        )
    width = weight_EDN.shape[1]
    if group is None:
        return width
    if group not in GROUPS or width % group:
        raise ValueError(
            f"group = {group} must be one of {', '.join(map(str, GROUPS))} and divide the width {width}: pad the weight"
        )
    return group


def _scale(scale_EGN: Tensor, dtype: torch.dtype) -> Tensor:
    """In the weights' type, before anything is divided by it; 1 where all weights are 0 or too small for the type."""
    scale_EGN = scale_EGN.to(dtype)
    return scale_EGN.where(scale_EGN > 0, 1.0)


def _check(x_RD: Tensor, weight: QuantisedWeight, offsets_E1: Tensor) -> None:
    experts, width, _ = weight.shape
    if x_RD.ndim != 2 or x_RD.shape[1] != width:
        raise ValueError(f"x has shape {tuple(x_RD.shape)}, weight {weight.shape}: x must be (rows, {width})")
    if not x_RD.is_floating_point():
        raise ValueError(f"x is {x_RD.dtype}: cast it to a float type")
    if offsets_E1.shape != (experts + 1,) or offsets_E1.dtype != torch.int32:
        raise ValueError(
            f"offsets is {offsets_E1.dtype} {tuple(offsets_E1.shape)}: it must be torch.int32 ({experts + 1},)"
        )
    if not x_RD.device == weight.data_EQN.device == offsets_E1.device:
        raise ValueError(
            f"x is on {x_RD.device}, weight on {weight.data_EQN.device}, offsets on {offsets_E1.device}: "
            "move them to one device"
        )


@dispatch.operator("quantised_grouped_gemm")
def _quantised_grouped_gemm(
    x_RD: Tensor, data_EQN: Tensor, scale_EGN: Tensor, zero_EGN: Tensor | None, offsets_E1: Tensor, group: int
) -> Tensor:
    if not dispatch.use_triton(x_RD, data_EQN):
        return _expert_by_expert(x_RD, data_EQN, scale_EGN, zero_EGN, offsets_E1, group, x_RD.dtype)
    zero_EGN = None if zero_EGN is None else zero_EGN.contiguous()
    bits = 8 if data_EQN.dtype == torch.int8 else 4
    weight = QuantisedWeight(data_EQN.contiguous(), scale_EGN.contiguous(), zero_EGN, bits, group)
    y_RN = torch.empty(len(x_RD), weight.shape[2], dtype=x_RD.dtype, device=x_RD.device)
    default = _default(-(-len(x_RD) // weight.shape[0]), amd=torch.version.hip is not None)
    settings = tuning.settings_for("quantised_grouped_gemm", _shape_class(x_RD, weight), default)
    _launch(y_RN, x_RD.contiguous(), weight, offsets_E1.contiguous(), settings)
    return y_RN


@_quantised_grouped_gemm.register_fake
def _(
    x_RD: Tensor, data_EQN: Tensor, scale_EGN: Tensor, zero_EGN: Tensor | None, offsets_E1: Tensor, group: int
) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], data_EQN.shape[2])


def _no_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "quantised_grouped_gemm is for serving and has no backward pass: call it under torch.no_grad(), "
        "or train with the weights that were quantised"
    )


_quantised_grouped_gemm.register_autograd(_no_backward)


def _dequantised(
    data_QN: Tensor, scale_GN: Tensor, zero_GN: Tensor | None, group: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Of one expert, or with the experts as a leading dimension."""
    wide = torch.promote_types(dtype or scale_GN.dtype, torch.float32)
    if data_QN.dtype == torch.int8:
        level_GKN = torch.unflatten(data_QN, -2, (-1, group)).to(wide)
    else:
        byte_GJN = torch.unflatten(data_QN, -2, (-1, group // 2))
        level_GKN = torch.cat([byte_GJN & 15, byte_GJN >> 4], dim=-2).to(wide)
        level_GKN -= MIDDLE if zero_GN is None else zero_GN.to(wide).unsqueeze(-2)
    return (level_GKN * scale_GN.to(wide).unsqueeze(-2)).flatten(-3, -2).to(dtype or scale_GN.dtype)


def _expert_by_expert(
    x_RD: Tensor, data_EQN: Tensor, scale_EGN: Tensor, zero_EGN: Tensor | None, offsets_E1: Tensor, group: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The weights of one expert at a time exist as floats, of those alone that have rows."""
    bounds = offsets_E1.tolist()
    parts = []
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            zero_GN = None if zero_EGN is None else zero_EGN[expert]
            weight_DN = _dequantised(data_EQN[expert], scale_EGN[expert], zero_GN, group, dtype)
            parts.append(x_RD[start:end].to(dtype) @ weight_DN)
    rest = x_RD.new_zeros(len(x_RD) - bounds[-1], data_EQN.shape[2])
    return torch.cat([*(part.to(x_RD.dtype) for part in parts), rest])


def _shape_class(x_RD: Tensor, weight: QuantisedWeight) -> tuple[object, ...]:
    return (x_RD.dtype, weight.bits, weight.group, *weight.shape, tuning.bucket(len(x_RD)))


def _default(rows_an_expert: int, *, amd: bool) -> tuning.Settings:
    """Few rows: narrow tiles, so that many programs read weights at once. Many rows: wide ones that use them again."""
    stages = 2 if amd else 4  # four buffers of a wide tile are more than the 64 KiB that AMD's chips have
    rows = next((tile for tile in _ROW_TILES if rows_an_expert <= tile), _ROW_TILES[-1])
    if rows <= 32:
        return {"BLOCK_R": rows, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": stages}
    return {"BLOCK_R": rows, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": stages}


def _constants(bits: int, group: int, width: int, experts: int, dtype: torch.dtype, most_k: int) -> dict[str, Any]:
    """BLOCK_K counts stored rows, all of one group; 4 bits have half as many as contracted ones."""
    packed = bits == 4
    return {
        "EXPERTS": experts, "BLOCK_E": triton.next_power_of_2(experts + 1), "PACKED": packed,
        "GROUP": 0 if group == width and not packed else group,
        "BLOCK_K": min(most_k, group) // 2 if packed else most_k if group == width else min(most_k, group),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }  # fmt: skip


def _launch(y_RN: Tensor, x_RD: Tensor, weight: QuantisedWeight, offsets_E1: Tensor, settings: tuning.Settings) -> None:
    experts, width, outputs = weight.shape
    rows = len(x_RD)
    # an expert with rows has one tile that is not full at most, and so have the rows behind the last expert
    tiles = rows // settings["BLOCK_R"] + min(experts + 1, rows)
    rest = {name: value for name, value in settings.items() if name != "BLOCK_K"}
    _kernel[(tiles * triton.cdiv(outputs, settings["BLOCK_N"]),)](
        x_RD, weight.data_EQN, weight.scale_EGN, weight.zero_EGN, offsets_E1, y_RN, rows, width, outputs,
        **_constants(weight.bits, weight.group, width, experts, x_RD.dtype, settings["BLOCK_K"]), **rest,
    )  # fmt: skip


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _kernel(  # type: ignore[no-untyped-def, unused-ignore]
        x_ptr, q_ptr, scale_ptr, zero_ptr, offsets_ptr, y_ptr, num_rows, width, outputs,
        EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
        PACKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        # Which expert: the one whose tiles, counted over experts, begin at or before this tile. Behind the last expert
        # comes a pretended one without weights, for the rows that are no expert's.
        columns = tl.cdiv(outputs, BLOCK_N)
        tile = tl.program_id(0) // columns
        every = tl.arange(0, BLOCK_E)
        starts = tl.load(offsets_ptr + every, mask=every <= EXPERTS, other=num_rows)
        ends = tl.load(offsets_ptr + every + 1, mask=every < EXPERTS, other=num_rows)
        tiles = (ends - starts + BLOCK_R - 1) // BLOCK_R
        upto = tl.cumsum(tiles, axis=0)
        expert = tl.sum((upto <= tile).to(tl.int32), axis=0)
        if expert > EXPERTS:
            return
        mine = every == expert
        first = tl.sum(tl.where(mine, starts + (tile - upto + tiles) * BLOCK_R, 0), axis=0)
        end = tl.sum(tl.where(mine, ends, 0), axis=0)

        rows = first + tl.arange(0, BLOCK_R)
        cols = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        some_rows = rows < end
        some_cols = cols < outputs
        x_ptrs = x_ptr + rows.to(tl.int64)[None, :] * width + ks[:, None]
        kind = x_ptr.dtype.element_ty
        acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        if expert < EXPERTS:
            stored = width // 2 if PACKED else width
            q_ptrs = q_ptr + expert.to(tl.int64) * stored * outputs + ks[None, :] * outputs + cols[:, None]
            if GROUP == 0:
                for k in range(0, width, BLOCK_K):
                    inside = ks < width - k
                    q = tl.load(q_ptrs, mask=some_cols[:, None] & inside[None, :], other=0)
                    x = tl.load(x_ptrs + k, mask=inside[:, None] & some_rows[None, :], other=0.0)
                    acc = tl.dot(q.to(kind), x, acc, input_precision=PRECISION)
                    q_ptrs += BLOCK_K * outputs
                scale = tl.load(scale_ptr + expert.to(tl.int64) * outputs + cols, mask=some_cols, other=0.0)
                acc *= scale.to(tl.float32)[:, None]
            else:
                per_group: tl.constexpr = GROUP // 2 if PACKED else GROUP  # stored rows
                at = expert.to(tl.int64) * (width // GROUP) * outputs + cols
                for k in range(0, stored, BLOCK_K):
                    group = k // per_group
                    # the hint keeps x's loads wide enough to be asynchronous
                    begin = tl.multiple_of(group * GROUP + k % per_group, 16)
                    q = tl.load(q_ptrs, mask=some_cols[:, None], other=0)
                    x = tl.load(x_ptrs + begin, mask=some_rows[None, :], other=0.0)
                    if PACKED:
                        x_high = tl.load(x_ptrs + begin + per_group, mask=some_rows[None, :], other=0.0)
                        low = (q & 15).to(tl.int8)
                        high = (q >> 4).to(tl.int8)
                        if zero_ptr is None:
                            low -= 8
                            high -= 8
                        else:
                            zero = tl.load(zero_ptr + at + group * outputs, mask=some_cols, other=0).to(tl.int8)
                            low -= zero[:, None]
                            high -= zero[:, None]
                        part = tl.dot(low.to(kind), x, input_precision=PRECISION)
                        part = tl.dot(high.to(kind), x_high, part, input_precision=PRECISION)
                    else:
                        part = tl.dot(q.to(kind), x, input_precision=PRECISION)
                    scale = tl.load(scale_ptr + at + group * outputs, mask=some_cols, other=0.0)
                    acc += part * scale.to(tl.float32)[:, None]
                    q_ptrs += BLOCK_K * outputs
        y_ptrs = y_ptr + rows.to(tl.int64)[None, :] * outputs + cols[:, None]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=some_cols[:, None] & some_rows[None, :])

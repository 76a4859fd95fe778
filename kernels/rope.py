"""Rotary positions (Su et al. 2021, arXiv:2104.09864) for queries and keys in one launch.

Each pair (x_k, x_(k+W)) of a head turns by the angle of its position and of k:
y_k = x_k cos - x_(k+W) sin, y_(k+W) = x_(k+W) cos + x_k sin. The gradient turns back by the same angle, so nothing is
kept but the angles. They come as a table, because cosines of large angles need float64, which a kernel should not use.

Legend: B batch, H query heads, G key heads, S positions, P width of a head, W = P / 2 pairs, L rows of the table.
Heads may be strided, as a transposed view of (B, S, H, P) is: nothing is copied, and results have the same layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek_ray.kernels.aot import Variant
from deepseek_ray.kernels.dispatch import operator, use_triton
from deepseek_ray.kernels.rows import check_floats
from deepseek_ray.kernels.tuning import Settings, bucket, settings_for, tune_op

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; the reference then serves
    triton = None

_TILE = 2048  # pairs a program turns


def rope_ref(
    query_BHSP: Tensor, key_BGSP: Tensor, wave_LW2: Tensor, position: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Plain torch reference; differentiable in any float type."""
    wave = wave_LW2[: query_BHSP.shape[2]] if position is None else wave_LW2[position]
    wave = wave if wave.ndim == 3 else wave.unsqueeze(1)  # (B, 1, S, W, 2): the same for all heads
    return _turned(query_BHSP, wave), _turned(key_BGSP, wave)


def _turned(x: Tensor, wave: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).chunk(2, dim=-1)
    cosine, sine = wave.to(wide).unbind(-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)


def rope(
    query_BHSP: Tensor, key_BGSP: Tensor, wave_LW2: Tensor, position: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their positions; Triton on a GPU, plain torch elsewhere.

    Args:
        query_BHSP: float16, bfloat16, float32 or float64; P is even.
        key_BGSP: the same type, batch, positions and width.
        wave_LW2: cosine and sine of each position's angles, in any float type; no gradient reaches it.
        position: row of the table for each position, (S,) or (B, S) int32 or int64, each in [0, L); without it, the
            first S rows. On a GPU nobody checks that they are inside.

    Returns:
        Both, turned; computed in float32 and rounded once.

    Raises:
        ValueError: a shape, a type or a device does not fit, or the table asks for a gradient.
    """
    _check(query_BHSP, key_BGSP, wave_LW2, position)
    if not use_triton(query_BHSP, key_BGSP, wave_LW2):
        return rope_ref(query_BHSP, key_BGSP, wave_LW2, position)
    turned: tuple[Tensor, Tensor] = _op(_dense(query_BHSP), _dense(key_BGSP), wave_LW2.contiguous(), position, False)
    return turned


def _check(query: Tensor, key: Tensor, wave: Tensor, position: Tensor | None) -> None:
    check_floats(query=query, key=key, wave=wave)
    if query.ndim != 4 or query.shape[-1] % 2:
        raise ValueError(f"query has shape {tuple(query.shape)}: it must be (B, H, S, P) with an even P")
    batch, _, length, width = query.shape
    if key.ndim != 4 or (key.shape[0], *key.shape[2:]) != (batch, length, width) or key.dtype != query.dtype:
        wanted = f"({batch}, G, {length}, {width}) of {query.dtype}"
        raise ValueError(f"key is {tuple(key.shape)} of {key.dtype}: it must be {wanted}, like query")
    if wave.ndim != 3 or wave.shape[1:] != (width // 2, 2) or wave.requires_grad:
        raise ValueError(f"wave has shape {tuple(wave.shape)}: it must be (L, {width // 2}, 2), without a gradient")
    if position is None and wave.shape[0] < length:
        raise ValueError(f"wave has {wave.shape[0]} rows for {length} positions: make it longer or give position")
    if position is not None and position.shape not in ((length,), (batch, length)):
        raise ValueError(f"position has shape {tuple(position.shape)}: it must be ({length},) or ({batch}, {length})")
    if position is not None and (position.dtype not in (torch.int32, torch.int64) or position.device != query.device):
        raise ValueError(f"position is {position.dtype} on {position.device}: make it int32 or int64 on {query.device}")


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@operator("rope")
def _op(
    query_BHSP: Tensor, key_BGSP: Tensor, wave_LW2: Tensor, position: Tensor | None, back: bool
) -> tuple[Tensor, Tensor]:
    """Both turned, back by the same angles if asked."""
    outputs = torch.empty_like(query_BHSP), torch.empty_like(key_BGSP)
    settings = _settings(query_BHSP)
    batch, _, length, width = query_BHSP.shape
    blocks = [triton.cdiv(heads, settings["BLOCK_H"]) for heads in (query_BHSP.shape[1], key_BGSP.shape[1])]
    strides = [one.stride()[:3] for one in (query_BHSP, key_BGSP, *outputs)]
    position = None if position is None else _dense(position)
    position_stride = position.stride(0) if position is not None and position.ndim == 2 else 0
    _turn[(triton.cdiv(length, settings["BLOCK_S"]) * batch, sum(blocks))](
        query_BHSP, key_BGSP, *outputs, wave_LW2, position,
        query_BHSP.shape[1], key_BGSP.shape[1], length, *(stride for three in strides for stride in three),
        position_stride, blocks[0], W=width // 2, BACK=back, HAS_POSITION=position is not None, **settings,
    )  # fmt: skip
    return outputs


@_op.register_fake
def _(
    query_BHSP: Tensor, key_BGSP: Tensor, wave_LW2: Tensor, position: Tensor | None, back: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query_BHSP), torch.empty_like(key_BGSP)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[2:4])
    ctx.back = inputs[4]


def _gradients(ctx: Any, dquery_BHSP: Tensor, dkey_BGSP: Tensor) -> tuple[Tensor | None, ...]:
    wave_LW2, position = ctx.saved_tensors
    return *_op(_dense(dquery_BHSP), _dense(dkey_BGSP), wave_LW2, position, not ctx.back), None, None, None


_op.register_autograd(_gradients, setup_context=_keep)


def _settings(query_BHSP: Tensor) -> Settings:
    heads, width = query_BHSP.shape[1], query_BHSP.shape[3]
    block_w, block_h = bucket(width // 2), min(bucket(heads), 32)
    default = {"BLOCK_S": max(1, _TILE // (block_w * block_h)), "BLOCK_H": block_h, "BLOCK_W": block_w, "num_warps": 4}
    return settings_for("rope", (query_BHSP.dtype, heads, width), default)


def tune_rope(query_BHSP: Tensor, key_BGSP: Tensor, wave_LW2: Tensor) -> Settings:
    """Measure tiles on these heads, whose gradient takes the same kernel; keep the fastest for such heads."""
    heads, width = query_BHSP.shape[1], query_BHSP.shape[3]
    block_w = bucket(width // 2)
    tiles = [
        {"BLOCK_S": max(1, size // (block_w * block_h)), "BLOCK_H": block_h, "BLOCK_W": block_w, "num_warps": warps}
        for block_h in sorted({min(bucket(heads), most) for most in (8, 32)})
        for size in (_TILE // 2, _TILE, 2 * _TILE)
        for warps in (4, 8)
    ]
    return tune_op("rope", (query_BHSP.dtype, heads, width), tiles, lambda: rope(query_BHSP, key_BGSP, wave_LW2))


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _turn(  # type: ignore[no-untyped-def, unused-ignore]
        query_ptr, key_ptr, query_out_ptr, key_out_ptr, wave_ptr, position_ptr, query_heads, key_heads, length,
        query_b, query_h, query_s, key_b, key_h, key_s,
        query_out_b, query_out_h, query_out_s, key_out_b, key_out_h, key_out_s,
        position_b, query_blocks,
        W: tl.constexpr, BACK: tl.constexpr, HAS_POSITION: tl.constexpr,
        BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    ):  # fmt: skip
        # One program: a block of heads, of queries or of keys, at a block of positions, whose angles it reads once.
        blocks = tl.cdiv(length, BLOCK_S)
        b = (tl.program_id(0) // blocks).to(tl.int64)
        s = ((tl.program_id(0) % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
        row = s
        if HAS_POSITION:
            row = tl.load(position_ptr + b * position_b + s, mask=s < length, other=0).to(tl.int64)
        w = tl.arange(0, BLOCK_W)
        at = wave_ptr + row[:, None, None] * (2 * W) + 2 * w[None, None, :]
        inside = (s < length)[:, None, None] & (w < W)[None, None, :]
        cosine = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        sine = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
        if BACK:
            sine = -sine
        block = tl.program_id(1)
        if block < query_blocks:
            query_ptr += b * query_b
            query_out_ptr += b * query_out_b
            _turn_heads(
                query_ptr, query_out_ptr, block, query_heads, s, w, cosine, sine, inside,
                query_h, query_s, query_out_h, query_out_s, W, BLOCK_H,
            )  # fmt: skip
        else:
            key_ptr += b * key_b
            key_out_ptr += b * key_out_b
            _turn_heads(
                key_ptr, key_out_ptr, block - query_blocks, key_heads, s, w, cosine, sine, inside,
                key_h, key_s, key_out_h, key_out_s, W, BLOCK_H,
            )  # fmt: skip

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _turn_heads(  # type: ignore[no-untyped-def, unused-ignore]
        x_ptr, y_ptr, block, heads, s, w, cosine, sine, inside, x_h, x_s, y_h, y_s,
        W: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        h = (block * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
        mask = inside & (h < heads)
        at_x = x_ptr + s[:, None, None] * x_s + h * x_h + w[None, None, :]
        at_y = y_ptr + s[:, None, None] * y_s + h * y_h + w[None, None, :]
        first = tl.load(at_x, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(at_x + W, mask=mask, other=0.0).to(tl.float32)
        tl.store(at_y, (first * cosine - second * sine).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(at_y + W, (second * cosine + first * sine).to(y_ptr.dtype.element_ty), mask=mask)


def aot_variants() -> list[Variant]:
    """Heads of Qwen3-30B-A3B, of Mixtral and of DeepSeek-V3's rotary part."""
    if triton is None:
        return []
    return [
        _variant(heads, width, back, has_position)
        for heads, width in ((32, 128), (128, 64))
        for back, has_position in ((False, False), (True, True))
    ]


def _variant(heads: int, width: int, back: bool, has_position: bool) -> Variant:
    settings = _settings(torch.empty(1, heads, 1, width, dtype=torch.bfloat16, device="meta"))
    pointers = {**dict.fromkeys(("query_ptr", "key_ptr", "query_out_ptr", "key_out_ptr"), "*bf16"), "wave_ptr": "*fp32"}
    strides = [f"{name}_{dim}" for name in ("query", "key", "query_out", "key_out") for dim in "bhs"]
    sizes = dict.fromkeys(("query_heads", "key_heads", "length", "position_b", "query_blocks", *strides), "i32")
    constants: dict[str, Any] = {"W": width // 2, "BACK": back, "HAS_POSITION": has_position}
    constants |= {name: settings[name] for name in ("BLOCK_S", "BLOCK_H", "BLOCK_W")}
    if has_position:
        pointers["position_ptr"] = "*i64"
    else:
        constants["position_ptr"] = None
    return Variant(
        "rope", _turn, {**pointers, **sizes}, constants, aligned=("query_heads", "length", "position_b", *strides),
        options={"num_warps": settings["num_warps"]},
        label=f"bf16 H{heads} P{width}{' back' if back else ''}{' position' if has_position else ''}",
    )  # fmt: skip

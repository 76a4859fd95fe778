"""Causal attention over a sliding window, with grouped queries: position s sees s - window + 1 .. s.

softmax(q k^T * scale + mask) v (Beltagy et al. 2020, arXiv:2004.05150, section 3; Ainslie et al. 2023,
arXiv:2305.13245).

Legend: B samples, H query heads, G key and value heads, S positions, P width of a head; Q, K blocks of queries, keys.

No kernel of our own: on a GPU torch's flex_attention (Dong et al. 2024, arXiv:2412.05496) is compiled to the Triton
kernel that we would write, forward and backward, and skips the blocks outside the window; where the window covers the
sequence, causal scaled_dot_product_attention has flash back ends. Elsewhere blocks of one window each are attended to
in plain torch. All three are made of operations that torch can trace and differentiate, so nothing is registered here.
Memory grows with S * window at most, never with S^2.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from deepseek_ray.kernels import dispatch

FLEX_BLOCK = 128
FLEX_HEADS = range(16, 257)  # widths of a head that flex_attention takes
LEAST_BLOCK = 64  # narrower windows share a block: its product is then worth a call


def sliding_window_attention_ref(
    query_BHSP: Tensor, key_BGSP: Tensor, value_BGSP: Tensor, window: int, *, scale: float | None = None
) -> Tensor:
    """Plain torch reference with all S^2 scores; differentiable in any float type."""
    wide = torch.promote_types(query_BHSP.dtype, torch.float32)
    shared = query_BHSP.shape[1] // key_BGSP.shape[1]
    key_BHSP, value_BHSP = (one.to(wide).repeat_interleave(shared, 1) for one in (key_BGSP, value_BGSP))
    scale = query_BHSP.shape[-1] ** -0.5 if scale is None else scale
    score_BHSS = query_BHSP.to(wide) @ key_BHSP.transpose(-1, -2) * scale
    visible_SS = _band(query_BHSP.shape[2], query_BHSP.shape[2], window, 0, query_BHSP.device)
    share_BHSS = score_BHSS.masked_fill(~visible_SS, float("-inf")).softmax(-1)
    return (share_BHSS @ value_BHSP).to(query_BHSP.dtype)


def sliding_window_attention(
    query_BHSP: Tensor, key_BGSP: Tensor, value_BGSP: Tensor, window: int, *, scale: float | None = None
) -> Tensor:
    """Attend to the last ``window`` positions, a position's own included.

    Args:
        query_BHSP: float.
        key_BGSP: of the query's type; each of its G heads serves H / G query heads.
        value_BGSP: likewise.
        window: number of positions seen; from S on this is causal attention.
        scale: of the scores; P^(-1/2) by default.

    Returns:
        (B, H, S, P).

    Raises:
        ValueError: a shape, type or device does not fit, or the window is not positive.
    """
    _check(query_BHSP, key_BGSP, value_BGSP, window)
    if window >= query_BHSP.shape[2]:
        return F.scaled_dot_product_attention(
            query_BHSP, key_BGSP, value_BGSP, is_causal=True, scale=scale, enable_gqa=True
        )
    if _flex_serves(query_BHSP):
        return _flex(query_BHSP, key_BGSP, value_BGSP, window, scale)
    return _blocked(query_BHSP, key_BGSP, value_BGSP, window, scale)


def window_blocks(length: int, window: int, device: torch.device) -> BlockMask:
    """Which blocks of keys a block of queries sees, in whole or in part, written down without an S^2 mask."""

    def visible(_sample: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    blocks = -(-length // FLEX_BLOCK)
    number = torch.arange(blocks, device=device)
    behind = (number[:, None] - number[None, :]) * FLEX_BLOCK  # of two positions at the same place in their blocks
    seen = (behind >= 0) & (behind - (FLEX_BLOCK - 1) < window)
    whole_block = (number + 1) * FLEX_BLOCK <= length
    whole = (behind > 0) & (behind + (FLEX_BLOCK - 1) < window) & whole_block[:, None] & whole_block[None, :]
    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def _check(query_BHSP: Tensor, key_BGSP: Tensor, value_BGSP: Tensor, window: int) -> None:
    shapes = tuple(query_BHSP.shape), tuple(key_BGSP.shape), tuple(value_BGSP.shape)
    if any(len(shape) != 4 for shape in shapes) or shapes[1] != shapes[2]:
        raise ValueError(f"query, key, value have shapes {shapes}: give (B, H, S, P) and twice (B, G, S, P)")
    (batch, heads, *rest), (kv_batch, kv_heads, *kv_rest) = shapes[:2]
    if batch != kv_batch or rest != kv_rest or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"query has shape {shapes[0]}, key {shapes[1]}: B, S and P must agree, and G divide H = {heads}"
        )
    if not query_BHSP.is_floating_point() or not query_BHSP.dtype == key_BGSP.dtype == value_BGSP.dtype:
        raise ValueError(
            f"query is {query_BHSP.dtype}, key {key_BGSP.dtype}, value {value_BGSP.dtype}: cast all to one float type"
        )
    if not query_BHSP.device == key_BGSP.device == value_BGSP.device:
        raise ValueError(
            f"query is on {query_BHSP.device}, key on {key_BGSP.device}, value on {value_BGSP.device}: "
            "move them to one device"
        )
    if window < 1:
        raise ValueError(f"window = {window} must be at least 1: a position sees itself")


def _band(rows: int, columns: int, window: int, ahead: int, device: torch.device) -> Tensor:
    """(rows, columns) True where the row's position, ``ahead`` of the first column's, sees the column's."""
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    behind = row[:, None] + ahead - column[None, :]
    return (behind >= 0) & (behind < window)


def _blocked(query_BHSP: Tensor, key_BGSP: Tensor, value_BGSP: Tensor, window: int, scale: float | None) -> Tensor:
    """A block of queries sees its own keys and the window - 1 before them: one mask serves all blocks but the first."""
    length, device = query_BHSP.shape[2], query_BHSP.device
    block = max(window, LEAST_BLOCK)
    padding = (0, 0, 0, -length % block)  # at the end: no real query sees it
    query_BHSP, key_BGSP, value_BGSP = (F.pad(one, padding) for one in (query_BHSP, key_BGSP, value_BGSP))

    def attend(query: Tensor, key: Tensor, value: Tensor, ahead: int) -> Tensor:
        mask = _band(query.shape[2], key.shape[2], window, ahead, device)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)

    mixed = [attend(query_BHSP[:, :, :block], key_BGSP[:, :, :block], value_BGSP[:, :, :block], 0)]
    if length > block:
        ahead = window - 1
        query = _blocks(query_BHSP[:, :, block:], block, block)
        key, value = (_blocks(one[:, :, block - ahead :], block + ahead, block) for one in (key_BGSP, value_BGSP))
        rest = attend(query, key, value, ahead)
        mixed.append(torch.unflatten(rest, 0, (len(query_BHSP), -1)).transpose(1, 2).flatten(2, 3))
    return torch.cat(mixed, 2)[:, :, :length]


def _blocks(x_BHSP: Tensor, size: int, step: int) -> Tensor:
    """Blocks of ``size`` positions every ``step``, as samples: (B * blocks, H, size, P)."""
    return x_BHSP.unfold(2, size, step).permute(0, 2, 1, 4, 3).flatten(0, 1)


def _flex_serves(query_BHSP: Tensor) -> bool:
    if not query_BHSP.is_cuda or query_BHSP.shape[-1] not in FLEX_HEADS:
        return False
    return torch.compiler.is_compiling() or dispatch.use_triton(query_BHSP)


def _flex(query_BHSP: Tensor, key_BGSP: Tensor, value_BGSP: Tensor, window: int, scale: float | None) -> Tensor:
    length, device = query_BHSP.shape[2], query_BHSP.device
    # Inside a graph that is being compiled the caches would only be traced through; a mask made while a CUDA graph is
    # recorded holds nothing before a replay, and one that is kept may be dropped before the graph is.
    compiling = torch.compiler.is_compiling()
    attend: Any = flex_attention if compiling else _compiled_flex()
    fresh = compiling or _recording(device)
    mask = (window_blocks if fresh else _kept_blocks)(length, window, device)
    mixed_BHSP = attend(query_BHSP, key_BGSP, value_BGSP, block_mask=mask, scale=scale, enable_gqa=True)
    assert isinstance(mixed_BHSP, Tensor)
    return mixed_BHSP


def _recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _listed(block_QK: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of keys of each block of queries: how many, and their numbers first; for all samples and heads."""
    order_QK = block_QK.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return block_QK.sum(-1, dtype=torch.int32)[None, None], order_QK.to(torch.int32)[None, None]


@lru_cache(maxsize=16)
def _kept_blocks(length: int, window: int, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):  # training will want it too
        return window_blocks(length, window, device)


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)

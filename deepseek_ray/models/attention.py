"""Attention: temporal (the current event asks, the card's recent events answer) and over a sequence.

Legend: B rows, N recent events, D model width, H heads, P width of a head, S positions, K = P / 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_ray.kernels.rope import rope
from deepseek_ray.kernels.sliding_window_attention import sliding_window_attention
from deepseek_ray.models.layers import Linear, RMSNorm


class TemporalAttention(nn.Module):
    """Attention of one query a row over the card's events, newest first.

    The age of an event is part of its embedding (models/events.py). A learned null event is always present, so that a
    card without history gets an answer of its own instead of an average of padding.

    Args:
        d_model: width of query and events.
        num_heads: heads; must divide d_model.
    """

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key_value = nn.Linear(d_model, 2 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.null_event_D = nn.Parameter(torch.zeros(d_model))

    def forward(self, h_BD: Tensor, event_BND: Tensor, present_BN: Tensor) -> Tensor:
        """Attend.

        Args:
            h_BD: normalised query.
            event_BND: embedded events.
            present_BN: True where there is an event.

        Returns:
            (B, D), to be added to the residual stream.
        """
        batch, _, width = event_BND.shape
        null_B1D = self.null_event_D.expand(batch, 1, width)
        event_BMD = torch.cat([null_B1D, event_BND], dim=1)
        present_BM = torch.cat([present_BN.new_ones(batch, 1), present_BN], dim=1)
        query_BH1P = self._heads(self.query(h_BD).unsqueeze(1))
        key_BMD, value_BMD = self.key_value(event_BMD).chunk(2, dim=-1)
        score_BH1M = query_BH1P @ self._heads(key_BMD).transpose(-1, -2) * query_BH1P.shape[-1] ** -0.5
        score_BH1M = score_BH1M.masked_fill(~present_BM[:, None, None, :], float("-inf"))
        mixed_BH1P = score_BH1M.softmax(-1) @ self._heads(value_BMD)
        answer_BD: Tensor = self.output(mixed_BH1P.transpose(1, 2).reshape(batch, width))
        return answer_BD

    def _heads(self, x_BMD: Tensor) -> Tensor:
        """(B, M, D) -> (B, H, M, P)."""
        batch, length, width = x_BMD.shape
        return x_BMD.view(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with rotary positions and grouped queries (arXiv:2104.09864, arXiv:2305.13245).

    Args:
        d_model: width of a position.
        num_heads: query heads.
        num_kv_heads: key and value heads; each serves ``num_heads / num_kv_heads`` query heads.
        d_head: width of a head, even.
        causal: a position sees only itself and earlier ones.
        window: with a number, only the last ``window`` positions up to its own, or, when not causal, those less than
            ``window`` away.
        rope_theta: base of the rotary frequencies.
        qk_norm: normalise each query and key head.
    """

    def __init__(
        self, d_model: int, num_heads: int, num_kv_heads: int, d_head: int, *, causal: bool = True,
        window: int | None = None, rope_theta: float = 10_000.0, qk_norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.d_head, self.causal, self.window, self.rope_theta = d_head, causal, window, rope_theta
        self.query = Linear(d_model, num_heads * d_head)
        self.key = Linear(d_model, num_kv_heads * d_head)
        self.value = Linear(d_model, num_kv_heads * d_head)
        self.output = Linear(num_heads * d_head, d_model)
        self.query_norm = RMSNorm(d_head) if qk_norm else None
        self.key_norm = RMSNorm(d_head) if qk_norm else None

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D); a summand of it where heads are sharded."""
        query_BHSP, key_BHSP, value_BHSP = (self._heads(one(x_BSD)) for one in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            query_BHSP, key_BHSP = self.query_norm(query_BHSP), self.key_norm(key_BHSP)
        wave_SK2 = rotary_waves(x_BSD.shape[1], self.d_head, self.rope_theta, x_BSD)
        query_BHSP, key_BHSP = rope(query_BHSP, key_BHSP, wave_SK2)
        if self.window is not None and self.causal:
            mixed_BHSP = sliding_window_attention(query_BHSP, key_BHSP, value_BHSP, self.window)
        else:
            whole = self.window is None
            mixed_BHSP = F.scaled_dot_product_attention(
                query_BHSP, key_BHSP, value_BHSP,
                attn_mask=None if whole else self._visible(x_BSD), is_causal=whole and self.causal, enable_gqa=True,
            )  # fmt: skip
        y_BSD: Tensor = self.output(mixed_BHSP.transpose(1, 2).flatten(2))
        return y_BSD

    def _heads(self, x_BSD: Tensor) -> Tensor:
        """(B, S, H * P) -> (B, H, S, P), for as many heads as this process holds."""
        return x_BSD.view(*x_BSD.shape[:2], -1, self.d_head).transpose(1, 2)

    def _visible(self, x_BSD: Tensor) -> Tensor:
        """(S, S) True where the positions are less than a window apart."""
        assert self.window is not None
        position_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
        return (position_S[:, None] - position_S[None, :]).abs() < self.window


def rotary_waves(length: int, d_head: int, theta: float, like: Tensor) -> Tensor:
    """Unit vectors exp(i * position * theta^(-2k/P)) as (S, P/2, 2), in ``like``'s type or float32, on its device."""
    rate_K = theta ** (-torch.arange(0, d_head, 2, dtype=torch.float64, device=like.device) / d_head)
    angle_SK = torch.arange(length, dtype=torch.float64, device=like.device)[:, None] * rate_K
    return torch.stack([angle_SK.cos(), angle_SK.sin()], dim=-1).to(torch.promote_types(like.dtype, torch.float32))

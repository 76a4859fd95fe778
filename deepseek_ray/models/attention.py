"""Temporal attention: the current event asks, the card's recent events answer.

Legend: B rows, N recent events, D model width, H heads, P width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

"""Mixture of experts: routed SwiGLU experts beside shared ones. No token is dropped.

Legend: T tokens, D model width, I width of an expert, E experts, e experts on this process, K experts a token,
S = T * K chosen pairs, s pairs on this process after an exchange.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_ray.kernels.dispatch import use_triton
from deepseek_ray.kernels.fused_moe import fused_moe
from deepseek_ray.kernels.swiglu import swiglu
from deepseek_ray.models.layers import SwiGLU, local
from deepseek_ray.models.recompute import recomputed
from deepseek_ray.models.router import Router

FEW_PAIRS = 16
"""Up to here copying the chosen experts' weights is cheaper than sorting the pairs: single decisions."""

Exchange: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]
"""(x_SD sorted by expert, count_E) -> (x_sD sorted by local expert, count_e, the way back for y_sD -> y_SD)."""


class MoE(nn.Module):
    """Routed and shared experts.

    Args:
        d_model: width of a token.
        d_expert: hidden width of one expert.
        router: chooses experts and gates.
        num_shared: experts every token passes, as one wide layer.
    """

    def __init__(self, d_model: int, d_expert: int, router: Router, num_shared: int) -> None:
        super().__init__()
        self.router = router
        self.experts = Experts(router.num_experts, d_model, d_expert)
        self.shared = SwiGLU(d_model, num_shared * d_expert) if num_shared else None
        self.exchange: Exchange | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) or (sequences, positions, D) -> the same shape."""
        x_TD = x.flatten(0, -2)
        gate_TK, expert_TK = self.router(x_TD, num_sequences=len(x) if x.ndim == 3 else 0)
        if expert_TK.numel() <= FEW_PAIRS and self.exchange is None and not torch.is_grad_enabled():
            y = self.experts.each(x_TD, gate_TK, expert_TK).view_as(x)
            return y if self.shared is None else y + self.shared(x)
        if self.exchange is None and use_triton(x_TD):
            y = self.experts(x_TD, choice=(expert_TK, gate_TK)).view_as(x)
            return y if self.shared is None else y + self.shared(x)
        slot_S = expert_TK.flatten()
        order_S = slot_S.argsort(stable=True)
        token_S = order_S // self.router.top_k
        count_E = torch.bincount(slot_S, minlength=self.router.num_experts)
        y_SD = self._routed(x_TD[token_S], count_E) * gate_TK.flatten()[order_S].unsqueeze(-1)
        y_TD = torch.zeros_like(x_TD).index_add(0, token_S, y_SD)
        y = y_TD.view_as(x)
        return y if self.shared is None else y + self.shared(x)

    def _routed(self, x_SD: Tensor, count_E: Tensor) -> Tensor:
        y_SD: Tensor
        if self.exchange is None:
            y_SD = self.experts(x_SD, count_E)
            return y_SD
        x_sD, count_e, back = self.exchange(x_SD, count_E)
        return back(self.experts(x_sD, count_e))


class Experts(nn.Module):
    """The weights of the routed experts; each works on its own run of rows."""

    def __init__(self, num_experts: int, d_model: int, d_expert: int) -> None:
        super().__init__()
        up = _uniform(num_experts, d_model, 2 * d_expert, fan_in=d_model)
        self.up_ED2I = nn.Parameter(up.view(num_experts, d_model, 2, d_expert))
        self.down_EID = nn.Parameter(_uniform(num_experts, d_expert, d_model, fan_in=d_expert))
        self.recompute = False

    def forward(
        self, x: Tensor, count_e: Tensor | None = None, *, choice: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Outputs of rows, or gated sums of tokens; a summand of them where I is sharded.

        Args:
            x: rows sorted by expert (s, D), or tokens (T, D).
            count_e: rows an expert.
            choice: experts and gates of each token (T, K), instead of counts, where Triton kernels sort by themselves.
        """
        up_eD2I, down_eID = local(self.up_ED2I), local(self.down_EID)
        if choice is not None:
            return fused_moe(x, *choice, up_eD2I, down_eID)
        assert count_e is not None
        if use_triton(x):
            number_e = torch.arange(len(count_e), device=x.device)
            expert_s1 = number_e.repeat_interleave(count_e, output_size=len(x)).unsqueeze(1)
            return fused_moe(x, expert_s1, torch.ones_like(expert_s1, dtype=x.dtype), up_eD2I, down_eID)
        up_s2I = grouped_matmul(x, up_eD2I.flatten(2), count_e)
        return recomputed(_gated, up_s2I, down_eID, count_e) if self.recompute else _gated(up_s2I, down_eID, count_e)

    def each(self, x_TD: Tensor, gate_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """The gated sum (T, D) of each token's experts, pair by pair, without sorting: for a few tokens."""
        up_TK2I = (x_TD[:, None, None] @ local(self.up_ED2I).flatten(2)[expert_TK]).squeeze(2)
        y_TKD = (swiglu(up_TK2I).unsqueeze(2) @ local(self.down_EID)[expert_TK]).squeeze(2)
        return (y_TKD * gate_TK.unsqueeze(-1)).sum(1)


def _gated(up_s2I: Tensor, down_eID: Tensor, count_e: Tensor) -> Tensor:
    return grouped_matmul(swiglu(up_s2I), down_eID, count_e)


def grouped_matmul(x_SD: Tensor, w_EDI: Tensor, count_E: Tensor) -> Tensor:
    """Rows of x, sorted by group, times the matrix of their group: one fused call where torch allows it, else a loop.

    Args:
        x_SD: rows; the first ``count_E[0]`` belong to group 0, and so on.
        w_EDI: one matrix a group.
        count_E: rows a group, summing to S.
    """
    if _grouped_is_legal(x_SD, w_EDI):
        return F.grouped_mm(x_SD, w_EDI, offs=count_E.cumsum(0).to(torch.int32))
    rows = torch.split(x_SD, count_E.tolist())
    # Empty groups take part in training, so that every parameter gets a gradient on every worker.
    # The first one always does, so that no rows at all give no rows.
    return torch.cat([part @ w_EDI[e] for e, part in enumerate(rows) if not e or len(part) or torch.is_grad_enabled()])


def _grouped_is_legal(x_SD: Tensor, w_EDI: Tensor) -> bool:
    aligned = all(size * x_SD.element_size() % 16 == 0 for size in w_EDI.shape[1:])
    return x_SD.is_cuda and x_SD.dtype == torch.bfloat16 and aligned and hasattr(F, "grouped_mm")


def _uniform(*shape: int, fan_in: int) -> Tensor:
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(*shape).uniform_(-bound, bound)

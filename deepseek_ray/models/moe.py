"""Mixture of experts: routed SwiGLU experts beside shared ones, balanced by a bias on the choice.

Legend: T tokens, D model width, I width of an expert, E experts, K experts a token, S = T * K chosen pairs.
Gates are sigmoids, the choice adds a bias that no gradient reaches (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_ray.kernels.rms_norm import rms_norm

_ROUTER_STD = 0.02  # gates start near 1/2, within reach of the balancing bias


class RMSNorm(nn.Module):
    """Scale to unit root-mean-square over the last dimension (kernels/rms_norm.py)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight_D = nn.Parameter(torch.ones(d_model))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Normalise; same shape."""
        return rms_norm(x_TD, self.weight_D)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020, arXiv:2002.05202): (silu(x W1) * x W3) W2."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, 2 * d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        gate_TI, value_TI = self.up(x_TD).chunk(2, dim=-1)
        y_TD: Tensor = self.down(F.silu(gate_TI) * value_TI)
        return y_TD


class MoE(nn.Module):
    """Routed and shared experts. No token is dropped.

    Args:
        d_model: width of a token.
        d_expert: hidden width of one expert.
        num_experts: routed experts.
        top_k: routed experts a token.
        num_shared: experts every token passes, as one wide layer.
    """

    bias_E: Tensor
    count_E: Tensor

    def __init__(self, d_model: int, d_expert: int, num_experts: int, top_k: int, num_shared: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router_ED = nn.Parameter(torch.randn(num_experts, d_model) * _ROUTER_STD)
        self.up_EDI = nn.Parameter(_uniform(num_experts, d_model, 2 * d_expert, fan_in=d_model))
        self.down_EID = nn.Parameter(_uniform(num_experts, d_expert, d_model, fan_in=d_expert))
        self.shared = SwiGLU(d_model, num_shared * d_expert) if num_shared else None
        self.register_buffer("bias_E", torch.zeros(num_experts))
        self.register_buffer("count_E", torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D). In training, counts the tokens of each expert for :meth:`balance`."""
        gate_TK, expert_TK = self.route(x_TD)
        slot_S = expert_TK.flatten()
        order_S = slot_S.argsort(stable=True)
        token_S = order_S // self.top_k
        count_E = torch.bincount(slot_S, minlength=len(self.bias_E))
        if self.training:
            self.count_E += count_E
        y_SD = self._experts(x_TD[token_S], count_E) * gate_TK.flatten()[order_S].unsqueeze(-1)
        y_TD = torch.zeros_like(x_TD).index_add(0, token_S, y_SD)
        return y_TD if self.shared is None else y_TD + self.shared(x_TD)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts: gates (T, K) that sum to 1 and expert numbers (T, K). Ties go to the lower number."""
        score_TE = torch.sigmoid(x_TD @ self.router_ED.T)
        ranked_TE = (score_TE + self.bias_E).argsort(dim=-1, descending=True, stable=True)
        expert_TK = ranked_TE[:, : self.top_k]
        gate_TK = score_TE.gather(-1, expert_TK)
        return gate_TK / gate_TK.sum(-1, keepdim=True), expert_TK

    def balance(self, count_E: Tensor, rate: float) -> None:
        """Move the bias of each expert towards equal load; counts are those of all workers together.

        The move is ``rate`` times the relative gap, cut at ``rate``: DeepSeek-V3's sign update where the load is far
        off, smaller moves near the balance, because a run here has hundreds of steps and not hundreds of thousands.
        """
        load_E = count_E.to(self.bias_E)
        gap_E = (load_E.mean() - load_E) / load_E.mean().clamp(min=1.0)
        self.bias_E += rate * gap_E.clamp(-1.0, 1.0)
        self.bias_E -= self.bias_E.mean()
        self.count_E.zero_()

    def _experts(self, x_SD: Tensor, count_E: Tensor) -> Tensor:
        """Run each expert on its own run of rows; x_SD is sorted by expert."""
        gate_SI, value_SI = grouped_matmul(x_SD, self.up_EDI, count_E).chunk(2, dim=-1)
        return grouped_matmul(F.silu(gate_SI) * value_SI, self.down_EID, count_E)


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
    return torch.cat([part @ w_EDI[e] for e, part in enumerate(rows) if len(part) or torch.is_grad_enabled()])


def _grouped_is_legal(x_SD: Tensor, w_EDI: Tensor) -> bool:
    aligned = all(size * x_SD.element_size() % 16 == 0 for size in w_EDI.shape[1:])
    return x_SD.is_cuda and x_SD.dtype == torch.bfloat16 and aligned and hasattr(F, "grouped_mm")


def _uniform(*shape: int, fan_in: int) -> Tensor:
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(*shape).uniform_(-bound, bound)

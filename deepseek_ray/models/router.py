"""The router: which experts a token passes, and with which weight.

The choice adds a bias that no gradient reaches and that balances the load (DeepSeek-V3, arXiv:2412.19437, section
2.1.2). Beside it a small sequence-wise loss (same source) and the z-loss (ST-MoE, arXiv:2202.08906) act on the gates.

Legend: T tokens, D model width, E experts, K experts a token, G groups of experts, B sequences, S positions.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_ray.kernels.router_topk import Routing, router_topk
from deepseek_ray.models.layers import local
from deepseek_ray.models.recompute import is_recomputing

_ROUTER_STD = 0.02  # gates start near 1/2, within reach of the balancing bias


class Router(nn.Module):
    """Scores, choice and gates. ``loss_weight`` is what one token's loss counts; whoever trains sets it (0: no losses).

    Args:
        d_model: width of a token.
        num_experts: E.
        top_k: K.
        score: what makes a score of a logit.
        normalise: gates of a token sum to ``scale``.
        scale: factor on the gates.
        num_groups: G; a token chooses among the experts of its ``top_groups`` best groups.
        top_groups: see ``num_groups``.
        balance_loss: weight of the sequence-wise loss.
        z_loss: weight of the z-loss.
    """

    bias_E: Tensor
    count_E: Tensor

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, *, score: Literal["sigmoid", "softmax"] = "sigmoid",
        normalise: bool = True, scale: float = 1.0, num_groups: int = 1, top_groups: int = 1,
        balance_loss: float = 0.0, z_loss: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_experts, self.top_k, self.score = num_experts, top_k, score
        self.normalise, self.scale = normalise, scale
        self.num_groups, self.top_groups = num_groups, top_groups
        self.balance_loss, self.z_loss, self.loss_weight = balance_loss, z_loss, 0.0
        self.weight_ED = nn.Parameter(torch.randn(num_experts, d_model) * _ROUTER_STD)
        self.register_buffer("bias_E", torch.zeros(num_experts))
        self.register_buffer("count_E", torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x_TD: Tensor, num_sequences: int = 0) -> tuple[Tensor, Tensor]:
        """Choose: gates (T, K) and expert numbers (T, K). In training, counts the tokens of each expert.

        Args:
            x_TD: tokens, one sequence after the other.
            num_sequences: B, all of the same length; 0 where tokens are no sequences, then no loss applies.
        """
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        logit_TE = F.linear(x_TD.to(wide), local(self.weight_ED).to(wide))
        teaches = bool(self.training and num_sequences and self.loss_weight)
        gate_TK, expert_TK, score_TE = self.choose(logit_TE, scores=teaches)
        if self.training and not is_recomputing():
            chosen_S = expert_TK.flatten()  # bincount would make the host wait for a GPU
            self.count_E.scatter_add_(0, chosen_S, torch.ones_like(chosen_S))
        if score_TE is not None:
            loss = self.losses(logit_TE, score_TE, expert_TK, num_sequences)
            gate_TK = _AddLoss.apply(gate_TK, loss * self.loss_weight)  # type: ignore[no-untyped-call]
        return gate_TK.to(x_TD.dtype), expert_TK

    def choose(self, logit_TE: Tensor, *, scores: bool = False) -> Routing:
        """The K experts of the highest biased score, their gates and, where asked for, all scores."""
        return router_topk(
            logit_TE, self.bias_E, self.top_k, score=self.score, normalise=self.normalise, scale=self.scale,
            num_groups=self.num_groups, top_groups=self.top_groups, scores=scores,
        )  # fmt: skip

    def losses(self, logit_TE: Tensor, score_TE: Tensor, expert_TK: Tensor, num_sequences: int) -> Tensor:
        """The weighted sum over tokens of both losses.

        Sequence-wise: for each sequence sum_E f_E P_E, f the experts' share of its choices times E, P the mean of its
        normalised scores; it counts once a token. The choices are those made, bias included; DeepSeek-V3 counts the
        choices there would be without it.
        """
        length = len(logit_TE) // num_sequences
        share_TE = score_TE / score_TE.sum(-1, keepdim=True)
        mean_BE = share_TE.view(num_sequences, length, -1).mean(1)
        chosen_TE = torch.zeros_like(score_TE).scatter(-1, expert_TK, 1.0)
        often_BE = chosen_TE.view(num_sequences, length, -1).sum(1) * (self.num_experts / (self.top_k * length))
        balance = (often_BE * mean_BE).sum() * length
        return self.balance_loss * balance + self.z_loss * logit_TE.logsumexp(-1).square().sum()

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


class _AddLoss(torch.autograd.Function):
    """Adds a loss to the graph without a path to the output: its gradient arrives with that of x.

    So each layer's losses are counted exactly once in any pipeline schedule, and once when activations are recomputed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        """Return x."""
        ctx.save_for_backward(torch.ones_like(loss))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of x, and one for the loss."""
        return grads[0], ctx.saved_tensors[0]

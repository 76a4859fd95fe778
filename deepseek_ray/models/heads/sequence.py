"""Heads of the backbone: next token, or one class a sequence.

Legend: B sequences, S positions, D model width, V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from deepseek_ray.config_moe import BackboneConfig
from deepseek_ray.kernels.linear_cross_entropy import linear_cross_entropy
from deepseek_ray.models.layers import Linear, RMSNorm, local


class SequenceHead(nn.Module):
    """Normalise, pool where the answer is one a sequence, map to logits.

    ``loss`` is (hidden states, this process's rows of the last weight, targets) -> (B, S); whoever spreads the
    vocabulary replaces it.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.pool = config.head == "classification"
        self.norm = RMSNorm(config.d_model)
        self.loss: Callable[[Tensor, Tensor, Tensor], Tensor] = partial(linear_cross_entropy, reduction="none")
        self.logits = Logits(config.d_model, config.num_classes if self.pool else config.vocab_size, pool=self.pool)

    def forward(self, x_BSD: Tensor, target_BS: Tensor | None = None) -> Tensor:
        """(B, S, D) -> logits (B, S, V), or (B, V) for classes; with targets, the loss (B, S) without any logits."""
        h_BSD = self.norm(x_BSD)
        if target_BS is not None:
            weight_VD = local(self.logits.project.weight_OD)
            return self.loss(h_BSD, weight_VD, target_BS)
        y: Tensor = self.logits(h_BSD)
        return y


class Logits(nn.Module):
    """The last linear map; over the mean of all positions when it pools."""

    def __init__(self, d_model: int, num_outputs: int, *, pool: bool) -> None:
        super().__init__()
        self.pool = pool
        self.project = Linear(d_model, num_outputs)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, V) or (B, V); this process's part of V where it is sharded."""
        y: Tensor = self.project(x_BSD.mean(1) if self.pool else x_BSD)
        return y

"""The Mixture-of-Experts backbone: an adapter, pre-norm blocks of attention and experts, a head.

Legend: B samples, S positions, D model width. A stage of a pipeline is a backbone with some of the layers; layers keep
their number in the whole model, so that names do not depend on how it is cut.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deepseek_ray.config_moe import BackboneConfig
from deepseek_ray.models.adapters import make_adapter
from deepseek_ray.models.attention import Attention
from deepseek_ray.models.dropout import dropout
from deepseek_ray.models.heads.sequence import SequenceHead
from deepseek_ray.models.layers import RMSNorm, SwiGLU
from deepseek_ray.models.moe import Experts, MoE
from deepseek_ray.models.recompute import Recompute, recomputed
from deepseek_ray.models.router import Router

_STD = 0.02


class Backbone(nn.Module):
    """The whole model, or the part of it from one pipeline cut to the next.

    Args:
        config: shape.
        layers: numbers of the layers it holds; all by default.
    """

    def __init__(self, config: BackboneConfig, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        numbers = range(config.num_layers) if layers is None else layers
        self.config = config
        self.adapter = make_adapter(config) if 0 in numbers else None
        self.layers = nn.ModuleDict({str(number): Block(config, number) for number in numbers})
        self.head = SequenceHead(config) if config.num_layers - 1 in numbers else None

    def forward(self, x: Tensor, key_B: Tensor | None = None, target_BS: Tensor | None = None) -> Tensor:
        """Input or hidden states (B, S, D) -> hidden states, logits, or losses where there are targets.

        Args:
            x: what the adapter takes, on a first stage; else hidden states.
            key_B: models/dropout.py's keys of the samples; needed in training where there is dropout.
            target_BS: next tokens, for a model with its head.
        """
        if self.adapter is not None:
            x = self.adapter(x)
        for layer in self.layers.values():
            x = layer(x, key_B)
        if self.head is not None:
            x = self.head(x, target_BS)
        return x

    def set_recompute(self, mode: Recompute) -> None:
        """Choose what the backward pass computes again (models/recompute.py)."""
        for part in self.layers.modules():
            if isinstance(part, Block):
                part.recompute = mode == "full"
            elif isinstance(part, RMSNorm | SwiGLU | Experts):
                part.recompute = mode == "selective"

    def compile_dense(self) -> None:
        """torch.compile what computes on the same shapes in every step; an expert's rows are others each time."""
        for part in self.layers.modules():
            if isinstance(part, Attention | SwiGLU):
                part.compile()

    def routers(self) -> dict[int, Router]:
        """The routers by number of the layer."""
        return {int(n): layer.feed.router for n, layer in self.layers.items() if isinstance(layer.feed, MoE)}


class Block(nn.Module):
    """Attend, then pass the experts; both on the residual stream.

    ``shard`` is the number of this process's part of the sequence; whoever spreads the model sets it.
    """

    def __init__(self, config: BackboneConfig, number: int) -> None:
        super().__init__()
        self.number, self.rate = number, config.dropout
        self.recompute = False
        self.shard = 0
        self.attention_norm = RMSNorm(config.d_model)
        self.attention = Attention(
            config.d_model, config.num_heads, config.num_kv_heads, config.d_head, causal=config.causal,
            window=config.window if config.attention == "sliding" else None, rope_theta=config.rope_theta,
            qk_norm=config.qk_norm,
        )  # fmt: skip
        self.feed_norm = RMSNorm(config.d_model)
        self.feed = _make_feed(config, number)

    def forward(self, x_BSD: Tensor, key_B: Tensor | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return recomputed(self._compute, x_BSD, key_B) if self.recompute else self._compute(x_BSD, key_B)

    def _compute(self, x_BSD: Tensor, key_B: Tensor | None) -> Tensor:
        x_BSD = x_BSD + self._dropped(self.attention(self.attention_norm(x_BSD)), key_B, 2 * self.number)
        return x_BSD + self._dropped(self.feed(self.feed_norm(x_BSD)), key_B, 2 * self.number + 1)

    def _dropped(self, y_BSD: Tensor, key_B: Tensor | None, place: int) -> Tensor:
        if not (self.rate and self.training):
            return y_BSD
        assert key_B is not None, "training with dropout needs the samples' keys"
        return dropout(y_BSD, self.rate, key_B, place, self.shard * y_BSD.shape[1])


def _make_feed(config: BackboneConfig, number: int) -> MoE | SwiGLU:
    if number < config.num_dense_layers:
        return SwiGLU(config.d_model, config.d_dense)
    router = Router(
        config.d_model, config.num_experts, config.top_k, score=config.router, normalise=config.normalise_gates,
        scale=config.gate_scale, num_groups=config.num_groups, top_groups=config.top_groups,
        balance_loss=config.balance_loss, z_loss=config.z_loss,
    )  # fmt: skip
    return MoE(config.d_model, config.d_expert, router, config.num_shared_experts)


@torch.no_grad()
def init_weights(module: nn.Module, config: BackboneConfig, seed: int, prefix: str = "") -> None:
    """Draw every weight from a generator of its own, seeded by its name: any cut of the model draws the same numbers.

    Matrices are normal with deviation 0.02, those that write to the residual stream smaller by sqrt(2 * layers)
    (GPT-2), norms are 1, buffers 0.

    Args:
        module: a backbone or a part of one, whole weights only.
        config: shape of the whole model.
        seed: of the run.
        prefix: name of the part in the backbone, with a dot at the end.
    """
    for name, weight in module.named_parameters():
        if weight.ndim == 1:
            weight.fill_(1.0)
            continue
        residual = name.endswith(("output.weight_OD", "down_DH", "down_EID"))
        std = _STD / math.sqrt(2 * config.num_layers) if residual else _STD
        digest = hashlib.sha256(f"{seed}/{prefix}{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
        weight.copy_(drawn * std)
    for buffer in module.buffers():
        buffer.zero_()

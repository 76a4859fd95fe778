"""How large a backbone is and what it costs: weights, weights that one token uses, floating-point operations.

Closed forms, so that a shape of any size is counted without making it; tests hold them against made models.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_ray.config_moe import BackboneConfig


@dataclass(frozen=True)
class Counts:
    """Weights of a backbone, in numbers.

    Attributes:
        total: all of them.
        active: those that take part in one token's answer.
        embedding: of the adapter; a look-up costs no multiplications for tokens.
        block: of one MoE block, all experts.
        dense_block: of one block with a dense feed-forward layer.
        experts: routed experts of one MoE block.
        head: of the last map and its norm.
    """

    total: int
    active: int
    embedding: int
    block: int
    dense_block: int
    experts: int
    head: int


def count(config: BackboneConfig) -> Counts:
    """Count the weights of a shape."""
    width = config.d_model
    attention = width * config.d_head * (2 * config.num_heads + 2 * config.num_kv_heads)
    attention += 2 * config.d_head * config.qk_norm + 2 * width  # two norms of the block
    expert = 3 * width * config.d_expert
    experts, shared = config.num_experts * expert, config.num_shared_experts * expert
    block = attention + experts + shared + config.num_experts * width
    dense_block = attention + 3 * width * config.d_dense
    outputs = config.num_classes if config.head == "classification" else config.vocab_size
    head = width * outputs + width
    embedding = _adapter(config)
    sparse = config.num_layers - config.num_dense_layers
    total = embedding + config.num_dense_layers * dense_block + sparse * block + head
    idle = sparse * (config.num_experts - config.top_k) * expert
    return Counts(total, total - idle, embedding, block, dense_block, experts, head)


def flops_per_token(config: BackboneConfig, seq_len: int, *, training: bool = True, recompute: bool = False) -> float:
    """Floating-point operations of one token: two for each active weight in a product, and attention's own products.

    Training costs three times the forward pass, four times when all of it is recomputed (Kaplan et al. 2020,
    arXiv:2001.08361; Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
    """
    counts = count(config)
    weights = counts.active - (counts.embedding if config.adapter == "tokens" else 0)
    attention = 4.0 * config.num_layers * config.num_heads * config.d_head * mean_visible(config, seq_len)
    return (2.0 * weights + attention) * ((4 if recompute else 3) if training else 1)


def mean_visible(config: BackboneConfig, seq_len: int) -> float:
    """Positions that a query sees, on average over a sequence."""
    reach = min(config.window, seq_len) if config.attention == "sliding" else seq_len
    one_side = reach - reach * (reach - 1) / (2 * seq_len)  # positions near the start see fewer
    return one_side if config.causal else min(2 * one_side - 1, seq_len)


def _adapter(config: BackboneConfig) -> int:
    inputs = {
        "tokens": config.vocab_size,
        "events": config.num_channels,
        "patches": config.num_channels * config.patch_size**3,
    }
    return config.d_model * inputs[config.adapter]

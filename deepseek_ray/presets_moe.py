"""Named shapes and settings of pretraining: ``debug_moe`` (tests), ``small_moe`` (two cores), published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_ray.config import build_tree
from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.errors import ConfigError

MOE_PRESETS: dict[str, dict[str, Any]] = {
    "debug_moe": {
        "backbone": {"num_heads": 8, "num_kv_heads": 4, "d_head": 8, "bias_rate": 1e-2},
        "corpus": {"seq_len": 16, "max_bytes": 1 << 20},
        "step": {"steps": 20, "batch_size": 8, "micro_batch_size": 2, "lr": 3e-4, "checkpoint_every": 5},
    },
    "small_moe": {
        "backbone": {"d_model": 128, "num_heads": 4, "num_kv_heads": 2, "d_head": 32, "d_dense": 256, "d_expert": 64,
                     "bias_rate": 1e-2},
        "corpus": {"seq_len": 128},
        "step": {"steps": 150, "batch_size": 16, "micro_batch_size": 8, "lr": 3e-3},
        "parallel": {"dp_shard": 2},
    },
    "qwen3_30b_a3b": {  # Qwen3 technical report, arXiv:2505.09388
        "backbone": {"vocab_size": 151936, "max_seq_len": 32768, "d_model": 2048, "num_layers": 48, "num_heads": 32,
                     "num_kv_heads": 4, "d_head": 128, "qk_norm": True, "rope_theta": 1e6, "num_dense_layers": 0,
                     "num_experts": 128, "num_shared_experts": 0, "top_k": 8, "d_expert": 768, "router": "softmax"},
        "corpus": {"seq_len": 4096},
        "step": {"batch_size": 256, "micro_batch_size": 1, "lr": 3e-4, "recompute": "selective"},
        "parallel": {"dp_shard": 8, "ep": 8},
    },
    "mixtral_8x7b": {  # arXiv:2401.04088
        "backbone": {"vocab_size": 32000, "max_seq_len": 32768, "d_model": 4096, "num_layers": 32, "num_heads": 32,
                     "num_kv_heads": 8, "d_head": 128, "rope_theta": 1e6, "num_dense_layers": 0, "num_experts": 8,
                     "num_shared_experts": 0, "top_k": 2, "d_expert": 14336, "router": "softmax"},
        "corpus": {"seq_len": 4096},
        "step": {"batch_size": 256, "micro_batch_size": 1, "lr": 3e-4, "recompute": "selective"},
        "parallel": {"dp_shard": 8, "ep": 8},
    },
    "deepseek_v3": {  # arXiv:2412.19437, with grouped-query attention in place of its latent attention
        "backbone": {"vocab_size": 129280, "max_seq_len": 4096, "d_model": 7168, "num_layers": 61, "num_heads": 128,
                     "num_kv_heads": 8, "d_head": 128, "num_dense_layers": 3, "d_dense": 18432, "num_experts": 256,
                     "num_shared_experts": 1, "top_k": 8, "d_expert": 2048, "gate_scale": 2.5, "num_groups": 8,
                     "top_groups": 4},
        "corpus": {"seq_len": 4096},
        "step": {"batch_size": 4096, "micro_batch_size": 1, "lr": 2.2e-4, "recompute": "full"},
        "parallel": {"pp": 16, "dp_shard": 64, "ep": 64, "schedule": "DualPipeV"},
    },
}  # fmt: skip


def load_moe_preset(
    name: str, *, file: Path | None = None, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> MoEConfig:
    """Build a pretraining preset's config, then apply a YAML file and overrides.

    Raises:
        ConfigError: the preset, a key or a value is not valid.
    """
    if name not in MOE_PRESETS:
        raise ConfigError(f"Unknown preset {name!r}.", fix=f"choose one of {', '.join(sorted(MOE_PRESETS))}")
    return build_tree(MoEConfig, MOE_PRESETS[name], file=file, overrides=overrides)

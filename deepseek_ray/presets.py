"""Named settings: ``demo`` (two cores, a quarter of an hour), ``handbook`` (published data), ``debug`` (tests)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_ray.config import Config, build_config
from deepseek_ray.errors import ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {"data": {"replay_days": 16, "drift": "new-device"}},
    "handbook": {
        "model": {"dropout": 0.1},
        "train": {"epochs": 5, "batch_size": 1024, "negative_rate": 0.15, "ablation": False},
        "update": {"replay_fraction": 0.4, "epochs": 2, "batch_size": 256, "memory_rows": 120_000},
    },
    "debug": {  # small enough for tests, large enough that a model beats chance
        "data": {
            "num_customers": 150,
            "num_terminals": 300,
            "num_days": 40,
            "train_days": 14,
            "holdout_days": 5,
            "replay_days": 5,
        },
        "model": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_expert": 16, "num_bins": 4},
        "train": {"epochs": 3, "batch_size": 256, "num_workers": 0, "ablation": False},
        "gate": {"max_calibration_error": 1.0, "max_p99_ms": 1_000.0},
    },
}


def load_preset(
    name: str,
    *,
    fixed: Mapping[str, Any] | None = None,
    file: Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> Config:
    """Build a preset's config; ``fixed`` settings (dotted names) replace its own, then come a YAML file and overrides.

    Raises:
        ConfigError: the preset, a key or a value is not valid.
    """
    if name not in PRESETS:
        raise ConfigError(f"Unknown preset {name!r}.", fix=f"choose one of {', '.join(sorted(PRESETS))}")
    return build_config({**PRESETS[name], **(fixed or {})}, file=file, overrides=overrides)

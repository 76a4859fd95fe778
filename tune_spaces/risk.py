"""What the risk model's search varies: setting -> distribution, as plain data.

``uniform`` and ``loguniform`` take [low, high], ``choice`` a list. Keys are those of ``--set``.
"""

from __future__ import annotations

from typing import Any

SPACE: dict[str, dict[str, Any]] = {
    "train.lr": {"loguniform": [5e-4, 8e-3]},
    "train.weight_decay": {"loguniform": [1e-5, 1e-1]},
    "train.negative_rate": {"choice": [0.25, 0.5, 1.0]},
    "train.batch_size": {"choice": [512, 1024, 2048]},
    "model.d_model": {"choice": [32, 64, 96]},
    "model.num_layers": {"choice": [1, 2, 3]},
    "model.num_experts": {"choice": [8, 12, 16]},
    "model.d_expert": {"choice": [32, 64]},
    "model.num_bins": {"choice": [8, 16, 32]},
    "model.dropout": {"uniform": [0.0, 0.4]},
}

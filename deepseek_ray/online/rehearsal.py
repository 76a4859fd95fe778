"""Updates that train on old rows too: a share of each batch, or all of them.

Old rows come in their natural mix of classes and are thinned like the new ones: the prior correction of train/step then
holds for both, and only their joint share is set (``replay_fraction``; Chaudhry et al. 2019, "On tiny episodic
memories in continual learning", arXiv:1902.10486).
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.online.replay import Columns, Reservoir
from deepseek_ray.online.strategy import Material, Strategy

LOGIT = "logit"
"""Column of the memory: log-odds that a version gave the row when it was remembered; NaN where none was stored."""
COLUMNS = tuple(field.name for field in fields(RiskDataset) if field.name != "feature_names")


class Replay(Strategy):
    """New rows with a fresh draw of old ones each epoch, ``replay_fraction`` of what is trained on."""

    def __init__(self, material: Material) -> None:
        super().__init__(material)
        self.num_fraud, self.num_genuine = _split(material, self._wanted())
        self.old_logit = np.empty(0, dtype=np.float32)

    @property
    def num_old(self) -> int:  # type: ignore[override]
        """Old rows in an epoch, before thinning."""
        return self.num_fraud + self.num_genuine

    def epoch(self, number: int) -> RiskDataset:
        """The new rows, then the drawn ones, whose stored log-odds are kept in ``old_logit``."""
        if not self.num_old:
            return self.material.new
        memory, rng = self.material.memory, np.random.default_rng([self.material.recipe.seed, number])
        drawn = [memory.draw(1, self.num_fraud, rng), memory.draw(0, self.num_genuine, rng)]
        parts = [part for part in drawn if part and len(part["label"])]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in (*COLUMNS, LOGIT)}
        self.old_logit = columns[LOGIT]
        return self.material.new.concat(as_dataset(memory, columns))

    def _wanted(self) -> float:
        """Old rows wanted in an epoch, after thinning."""
        fraction = self.material.config.replay_fraction
        return _thinned(self.material) * fraction / (1 - fraction)


class WarmStart(Replay):
    """New rows and as many old ones as were ever seen: the most that an update can cost, and nothing left out."""

    def _wanted(self) -> float:
        seen = self.material.memory.seen
        return seen[1] + seen[0] * self.material.recipe.negative_rate


def as_dataset(memory: Reservoir, columns: Columns) -> RiskDataset:
    """Columns of the memory as a dataset."""
    arrays: dict[str, Any] = {name: columns[name] for name in COLUMNS}
    return RiskDataset(**arrays, feature_names=tuple(memory.note["feature_names"]))


def stored_logit(num_rows: int, logit: NDArray[np.float64] | None) -> NDArray[np.float32]:
    """The memory's column of log-odds (n,): those given, or NaN."""
    return np.full(num_rows, np.nan, dtype=np.float32) if logit is None else logit.astype(np.float32)


def _thinned(material: Material) -> float:
    """New rows of an epoch, after thinning."""
    frauds = int(material.new.label.sum())
    return frauds + (len(material.new) - frauds) * material.recipe.negative_rate


def _split(material: Material, wanted: float) -> tuple[int, int]:
    """Frauds and genuine rows to draw for so many rows after thinning, in the memory's natural mix."""
    memory, rate = material.memory, material.recipe.negative_rate
    if not len(memory):
        return 0, 0
    fraud, genuine = memory.seen[1], memory.seen[0] * rate
    share = fraud / (fraud + genuine)
    return round(wanted * share), round(wanted * (1 - share) / rate)

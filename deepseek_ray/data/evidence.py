"""Contracts of a promotion: what was measured, which checks follow, and the decision.

online/gate.py makes decisions, registry/ obeys them; both see only the types here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from deepseek_ray.paths import finite

GATES = (
    "average_precision",
    "card_precision_at_100",
    "calibration_error",
    "p99_scoring_ms",
    "schema",
    "feature_service",
    "forgetting",
    "label_shift",
)
"""Every check a decision must hold; one that is missing counts as failed."""


def schema_digest(columns: Sequence[str], sequence_len: int, sequence_channels: int) -> str:
    """SHA-256 of a model's input: column names in order and the shape of the sequence [N, C]."""
    text = json.dumps([list(columns), sequence_len, sequence_channels], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class VectorContract:
    """Which vector a model reads.

    Args:
        schema: :func:`schema_digest` of its input.
        feature_service: name of the service that delivers it, with its version.
        feature_digest: SHA-256 of the feature declaration behind the service.
    """

    schema: str
    feature_service: str
    feature_digest: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was measured on one version.

    Args:
        name: registered model name.
        version: registered version number.
        average_precision: area under precision-recall on the held-out days, 0-1.
        cp100: card precision at 100 on the held-out days, 0-1.
        calibration_error: expected calibration error on the held-out days, 0-1.
        p99_ms: 99th percentile of scoring one row, milliseconds.
        prevalence: share of fraud in the held-out rows; a random ranking has this average precision.
        heldout_digest: identity of the held-out rows; only equal ones may be compared.
        contract: the vector it reads.
        old_average_precision: average precision on rows of older fraud patterns; None when not measured.
        old_prevalence: share of fraud in those rows; None when not measured.
        num_rows: held-out rows; 0 when not counted.
    """

    name: str
    version: str
    average_precision: float
    cp100: float
    calibration_error: float
    p99_ms: float
    prevalence: float
    heldout_digest: str
    contract: VectorContract
    old_average_precision: float | None = None
    old_prevalence: float | None = None
    num_rows: int = 0

    def __post_init__(self) -> None:
        # JSON has no NaN: a number that was written as null is read back as what it was
        for name in ("average_precision", "cp100", "calibration_error", "p99_ms", "prevalence"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, math.nan)


@dataclass(frozen=True)
class Check:
    """One gate: the value, the bound it met or missed, and why."""

    name: str
    passed: bool
    value: float
    bound: float
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name} = {self.value:.6g} (bound {self.bound:.6g}): {self.detail}"


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    """The gate's verdict on one version, valid only against the champion it was compared with.

    Args:
        name: registered model name.
        version: the challenger.
        champion_version: the champion it was compared with; None when there was none.
        checks: one for every name in :data:`GATES`.
        evidence: the numbers of both sides, as plain data, for the audit.
    """

    name: str
    version: str
    champion_version: str | None
    checks: tuple[Check, ...]
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def promote(self) -> bool:
        """True when every gate was checked and passed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """Failed checks, and one for each gate that was never checked."""
        seen = {check.name for check in self.checks}
        absent = tuple(Check(name, False, math.nan, math.nan, "not checked") for name in GATES if name not in seen)
        return tuple(check for check in self.checks if not check.passed) + absent

    def to_json(self) -> str:
        """All numbers as JSON; NaN and infinities become null."""
        tree = {
            "name": self.name,
            "version": self.version,
            "champion_version": self.champion_version,
            "promote": self.promote,
            "checks": [asdict(check) for check in self.checks],
            "evidence": dict(self.evidence),
        }
        return json.dumps(finite(tree), sort_keys=True, allow_nan=False)

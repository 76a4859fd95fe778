"""The gate's question asked again, on the numbers that were recorded with a version when it was first asked."""

from __future__ import annotations

import json
from typing import Any

from deepseek_ray.config import GateConfig
from deepseek_ray.data.evidence import Evidence, GateDecision, VectorContract
from deepseek_ray.errors import RegistryError
from deepseek_ray.online.gate import decide
from deepseek_ray.registry import CHAMPION, Registry, VersionInfo


def decide_again(registry: Registry, version: str, bounds: GateConfig | None = None) -> GateDecision:
    """Let the gate decide on the recorded evidence of a version and of today's champion.

    Args:
        registry: of both.
        version: a number or an alias.
        bounds: what is tolerated; None: what was when the version was measured.

    Raises:
        RegistryError: there is no such version, or it or the champion was never measured.
    """
    challenger, champion = registry.get(version), registry.version_of(CHAMPION)
    rival = _rival(challenger, registry.get(champion)) if champion else None
    evidence = _evidence(challenger)
    return decide(rival, evidence, bounds or GateConfig.model_validate(_recorded(challenger).get("bounds", {})))


def _evidence(info: VersionInfo) -> Evidence:
    """The numbers that the gate last saw of a version, from its tag."""
    found = _side(info, "challenger")
    if found is None:
        raise RegistryError(
            f"Version {info.version} of {info.name!r} was never measured for the gate.",
            fix="run deepseek-ray update, which measures, decides and promotes",
        )
    return found


def _rival(challenger: VersionInfo, champion: VersionInfo) -> Evidence:
    """The champion's numbers on the challenger's rows, where it was compared with this champion; else its own."""
    found = _side(challenger, "champion")
    return found if found and found.version == champion.version else _evidence(champion)


def _side(info: VersionInfo, side: str) -> Evidence | None:
    found = _recorded(info).get(side)
    return Evidence(**{**found, "contract": VectorContract(**found["contract"])}) if found else None


def _recorded(info: VersionInfo) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(info.tags.get("gate.decision", "{}"))
    return tree.get("evidence") or {}

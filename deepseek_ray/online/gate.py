"""The promotion gate: two sets of numbers and bounds in, a decision out. No clock, no store, no model.

Relative gates compare with the champion on the same held-out rows; absolute gates hold for everyone,
the first version included. A number that is NaN or infinite fails its gate.
"""

from __future__ import annotations

import math
from dataclasses import asdict

from scipy.stats import binomtest

from deepseek_ray.config import GateConfig
from deepseek_ray.data.evidence import GATES, Check, Evidence, GateDecision, VectorContract

__all__ = ["GATES", "Check", "Evidence", "GateDecision", "VectorContract", "decide"]

_SURE = 0.999  # a few frauds more or less are chance


def decide(
    champion: Evidence | None, challenger: Evidence, bounds: GateConfig, *, live: VectorContract | None = None
) -> GateDecision:
    """Decide whether the challenger may become champion.

    Args:
        champion: evidence of the serving version on the same held-out rows; None for the first version.
        challenger: evidence of the candidate.
        bounds: what is tolerated.
        live: the vector that serving will deliver; by default the champion's own, and for the first
            version any vector that is fully named.

    Returns:
        A decision with one check for each name in GATES.
    """
    checks = (
        _average_precision(champion, challenger, bounds.max_average_precision_drop),
        _card_precision(champion, challenger, bounds.max_cp100_drop),
        _at_most("calibration_error", challenger.calibration_error, bounds.max_calibration_error),
        _at_most("p99_scoring_ms", challenger.p99_ms, bounds.max_p99_ms),
        *_contract(live or (champion.contract if champion else None), challenger.contract),
        _forgetting(champion, challenger, bounds.max_forgetting),
        _label_shift(champion, challenger, bounds.max_label_shift),
    )
    evidence = {"challenger": asdict(challenger), "champion": asdict(champion) if champion else None}
    return GateDecision(
        name=challenger.name,
        version=challenger.version,
        champion_version=champion.version if champion else None,
        checks=checks,
        evidence={**evidence, "bounds": bounds.model_dump()},
    )


def _average_precision(champion: Evidence | None, challenger: Evidence, max_drop: float) -> Check:
    name, value = "average_precision", challenger.average_precision
    if champion is None:
        skilled = _share(value) and _share(challenger.prevalence) and value > challenger.prevalence
        return Check(name, skilled, value, challenger.prevalence, "must be above a random ranking")
    if mismatch := _not_comparable(champion, challenger):
        return Check(name, False, value, math.nan, mismatch)
    return _not_worse(name, champion.average_precision, value, max_drop)


def _card_precision(champion: Evidence | None, challenger: Evidence, max_drop: float) -> Check:
    name, value = "card_precision_at_100", challenger.cp100
    if champion is None:
        return Check(name, _share(value) and value > 0, value, 0.0, "must find a compromised card")
    if mismatch := _not_comparable(champion, challenger):
        return Check(name, False, value, math.nan, mismatch)
    return _not_worse(name, champion.cp100, value, max_drop)


def _forgetting(champion: Evidence | None, challenger: Evidence, max_loss: float) -> Check:
    name = "forgetting"
    if champion is None:
        return Check(name, True, 0.0, max_loss, "the first version has nothing to forget")
    before, after = champion.old_average_precision, challenger.old_average_precision
    if before is None or after is None:
        return Check(name, False, math.nan, max_loss, "average precision on older patterns was not measured")
    if mismatch := _not_comparable(champion, challenger):
        return Check(name, False, math.nan, max_loss, mismatch)
    loss = relative_drop(before, after)
    passed = _share(before) and _share(after) and loss <= max_loss
    return Check(name, passed, loss, max_loss, f"older patterns: {before:.6g} -> {after:.6g}")


def _label_shift(champion: Evidence | None, challenger: Evidence, bound: float) -> Check:
    """Labels that call several times as many, or as few, rows fraud as before are an error or an attack, not a pattern.

    The held-out rows judge both sides; whoever could spoil them would judge.
    """
    name, old = "label_shift", challenger.old_prevalence
    if champion is None or not old or not challenger.num_rows or not _share(challenger.prevalence):
        return Check(name, True, 1.0, bound, "there are no older labels to compare with")
    frauds = round(challenger.prevalence * challenger.num_rows)
    among = binomtest(frauds, challenger.num_rows).proportion_ci(_SURE, method="wilson")
    shift = max(float(among.low) / old, old / float(among.high), 1.0)
    detail = f"share of fraud on older rows {old:.6g}, on these {challenger.prevalence:.6g}"
    return Check(name, shift <= bound, shift, bound, detail)


def relative_drop(before: float, after: float) -> float:
    """(before - after) / before; 0 when there was nothing to lose, negative for a gain."""
    return (before - after) / before if before > 0 else 0.0 - after


def _not_worse(name: str, before: float, after: float, max_drop: float) -> Check:
    bound = before * (1.0 - max_drop)
    passed = _share(before) and _share(after) and after >= bound
    return Check(name, passed, after, bound, f"champion {before:.6g}, tolerated relative drop {max_drop:.6g}")


def _at_most(name: str, value: float, bound: float) -> Check:
    return Check(name, math.isfinite(value) and 0 <= value <= bound, value, bound, "must be at most the bound")


def _contract(live: VectorContract | None, ours: VectorContract) -> tuple[Check, Check]:
    if live is None:
        named = bool(ours.schema), bool(ours.feature_service and ours.feature_digest)
        detail = "must be named"
        return _match("schema", named[0], detail), _match("feature_service", named[1], detail)
    same_service = (ours.feature_service, ours.feature_digest) == (live.feature_service, live.feature_digest)
    return (
        _match("schema", ours.schema == live.schema, f"{ours.schema[:12]} against {live.schema[:12]}"),
        _match("feature_service", same_service, f"{ours.feature_service!r} against {live.feature_service!r}"),
    )


def _match(name: str, same: bool, detail: str) -> Check:
    return Check(name, same, float(same), 1.0, detail)


def _not_comparable(champion: Evidence, challenger: Evidence) -> str:
    if champion.name != challenger.name:
        return f"the champion is a version of {champion.name!r}"
    if not challenger.heldout_digest or champion.heldout_digest != challenger.heldout_digest:
        return "champion and challenger were measured on different held-out rows"
    return ""


def _share(value: float) -> bool:
    return math.isfinite(value) and 0.0 <= value <= 1.0

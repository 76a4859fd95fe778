"""When to update: pure decisions from plain facts. No clock, no store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepseek_ray.config import UpdaterConfig

Outcome = Literal["promoted", "released", "refused", "failed"]
"""How an update ended; ``released``: the gate agreed, and a release by way of shadow and canary began."""

EXIT_STATUS: dict[Outcome, int] = {"promoted": 0, "refused": 3}
"""Exit status of a program that updates; 1 is a crash, 2 an error. What began a release ends like a promotion."""


@dataclass(frozen=True)
class Attempt:
    """The last update that was tried.

    Args:
        at_s: when it began, seconds since 1970.
        outcome: how it ended.
        waiting: labels that were waiting when it began.
        failures: failed attempts in a row, this one included.
        basis: see :class:`Facts`.
    """

    at_s: float
    outcome: Outcome
    waiting: int
    failures: int = 0
    basis: str = ""


@dataclass(frozen=True)
class Facts:
    """What is known when a decision is asked for.

    Args:
        now_s: seconds since 1970.
        since_s: when the last update was promoted or refused, or the updater first looked; the schedule counts from
            here, so that what failed is tried again as soon as the wait is over.
        waiting: usable labels that the champion has not been trained on.
        psi: largest population stability index of a feature; None where it is not known.
        last: the last attempt, None before the first.
        basis: what an update would start from, the champion and how many decisions are set aside.
        blocked: why an update should wait, a release that is under way; "" where nothing speaks against it.
    """

    now_s: float
    since_s: float
    waiting: int
    psi: float | None = None
    last: Attempt | None = None
    basis: str = ""
    blocked: str = ""


@dataclass(frozen=True)
class Decision:
    """Whether to update now.

    Args:
        start: yes or no.
        reason: the trigger, or what is waited for.
        fresh: labels that came since the last attempt that did not take them.
    """

    start: bool
    reason: str
    fresh: int = 0


def decide(facts: Facts, config: UpdaterConfig) -> Decision:
    """Back off after failures, keep the gap, ask for something new, then look at each trigger in turn.

    A failure takes no label: the trigger that started it holds until the wait is over.

    A refusal by the gate takes no label: the same ones would be refused again, so only those that came since count,
    until another champion, or labels set aside, make it another question. The labels of a release that was taken back
    wait again in the same way: the next update trains on them, those that came since start it.
    """
    fresh = facts.waiting - _refused(facts)
    if facts.blocked:
        return Decision(False, facts.blocked, fresh)
    if (left := not_before(facts.last, config) - facts.now_s) > 0:
        failed = facts.last is not None and facts.last.outcome == "failed"
        return Decision(False, f"{'backing off' if failed else 'too soon'} for {left:.0f} s more", fresh)
    if fresh <= 0:
        return Decision(False, "no new label", fresh)
    if config.min_new_labels and fresh >= config.min_new_labels:
        return Decision(True, f"labels: {fresh} >= {config.min_new_labels}", fresh)
    moved = bool(config.drift_psi) and facts.psi is not None and facts.psi >= config.drift_psi
    if moved and fresh >= config.drift_labels:
        return Decision(True, f"drift: {facts.psi:.3f} >= {config.drift_psi:g}", fresh)
    idle_s = facts.now_s - facts.since_s
    if config.every_s and idle_s >= config.every_s:
        return Decision(True, f"schedule: {idle_s:.0f} s >= {config.every_s:g}", fresh)
    return Decision(False, f"{fresh} new labels", fresh)


def noticed(last: Attempt | None, begun_s: float, waiting: int, basis: str) -> Attempt | None:
    """The last attempt, as a release that began since shows it.

    Whoever was killed or stopped just after the release began, or was not there when it was begun by hand, would take
    its labels for ones that were never asked about.

    Args:
        last: the last attempt that is known.
        begun_s: when the newest release began, 0 without one.
        waiting: labels that waited at the last look.
        basis: at the last look.
    """
    if begun_s <= (last.at_s if last else 0.0):
        return last
    return Attempt(begun_s, "released", waiting, basis=basis)


def not_before(last: Attempt | None, config: UpdaterConfig) -> float:
    """Earliest time of the next attempt, seconds since 1970; after failures the wait doubles up to its bound."""
    if last is None:
        return 0.0
    if last.outcome != "failed":
        return last.at_s + config.min_gap_s
    doublings = min(last.failures - 1, 32)
    return last.at_s + min(config.retry_s * 2.0**doublings, config.retry_max_s)


def _refused(facts: Facts) -> int:
    """Labels not to ask the gate about again."""
    last = facts.last
    if last is None or last.outcome not in ("refused", "released") or last.basis != facts.basis:
        return 0
    return last.waiting

"""Whether an arm may go on: its record against the champion's and against limits. Pure: no clock, no store.

Cards are drawn to arms at random, so a card that meets something bad met the arm with the arm's share of the traffic
as its probability, whatever the base rate does meanwhile. Each card counts once: its later fraud is no news about the
arm. Hence one test serves missed frauds and false alarms, under drift and with late labels.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import logsumexp

from deepseek_ray.data.log_follower import Decided, Labelled
from deepseek_ray.online.drift import Reference, psi
from deepseek_ray.online.significance import always_valid_p, is_significant, log_bayes_factor
from deepseek_ray.serving.arm_metrics import CallCounts
from deepseek_ray.serving.traffic import Limits

MIN_CALLS = 100
"""Model calls of the arm before its latency is judged; a p99 of fewer is its slowest one."""
MIN_CARDS = 100
"""Cards behind the scores that are compared: one card's scores resemble each other."""
KEPT_SCORES = 5_000
TESTS = ("errors", "missed_fraud", "false_alarm")
MAX_BAD_CARDS = 50_000
"""Cards with a mistake that a step notes of each kind, all its records together: about 10 MB."""


class Room:
    """How many more cards the records of one step may note.

    They share it, so that all stop at once: the test stays where it stood, which an always-valid one may. Were each to
    stop at a bound of its own, the smaller side would go on, and seem to be worse.
    """

    def __init__(self, most: int = MAX_BAD_CARDS) -> None:
        self._left = dict.fromkeys(TESTS[1:], most)

    def take(self, kind: str) -> bool:
        """Whether there is room for one more card with this kind of mistake, which then is taken."""
        if not self._left[kind]:
            return False
        self._left[kind] -= 1
        return True


@dataclass
class Record:
    """What one version decided on a step, and what its labels say.

    Attributes:
        scores: newest probabilities.
        cards: the first cards, as many as are needed to believe the scores.
        bad_cards: by kind of mistake, the cards that met it, as many as there is room for.
        room: shared by the records of a step.
    """

    decisions: int = 0
    reviews: int = 0
    labels: int = 0
    frauds: int = 0
    scores: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_SCORES))
    cards: set[str] = field(default_factory=set)
    bad_cards: dict[str, set[str]] = field(default_factory=lambda: {"missed_fraud": set(), "false_alarm": set()})
    room: Room = field(default_factory=Room)

    def decided(self, row: Decided) -> None:
        """Count a decision."""
        self.decisions += 1
        self.reviews += row.review
        self.scores.append(row.probability)
        if len(self.cards) < MIN_CARDS:
            self.cards.add(row.card_id)

    def labelled(self, row: Labelled) -> None:
        """Count a label, and the card of one that shows a mistake."""
        self.labels += 1
        self.frauds += row.is_fraud
        if row.is_fraud != row.decided.review:
            kind = "missed_fraud" if row.is_fraud else "false_alarm"
            card = row.decided.card_id
            if card not in self.bad_cards[kind] and self.room.take(kind):
                self.bad_cards[kind].add(card)


@dataclass
class StepRecord:
    """An arm and the champion beside it, while the split was the same.

    Attributes:
        share: of the cards of both that are the arm's, 0-1.
    """

    share: float
    arm: Record = field(default_factory=Record)
    champion: Record = field(default_factory=Record)


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        cause: error-rate, latency, score-shift or quality; "" while the arm is healthy.
        why: the figures, in words.
        evidence: natural logarithm of the Bayes factor of each test, by TESTS.
        psi: of the scores; None with too few of them.
    """

    cause: str
    why: str
    evidence: Mapping[str, float]
    psi: float | None

    @property
    def p_values(self) -> dict[str, float]:
        """Always-valid p-value of each test."""
        return {name: always_valid_p(value) for name, value in self.evidence.items()}


def judge(steps: Sequence[StepRecord], calls: CallCounts, champion_calls: CallCounts, limits: Limits) -> Verdict:
    """Judge an arm.

    Args:
        steps: the rollout's steps, the present one last: labels of earlier ones still come in.
        calls: the arm's model calls on the present step.
        champion_calls: the champion's.
        limits: what is tolerated.
    """
    evidence = {"errors": log_bayes_factor(calls.failed, calls.calls, limits.max_error_rate)}
    for kind in TESTS[1:]:
        each = [_more_bad_cards(step, kind) for step in steps]
        # the mean of Bayes factors is as valid as each of them, however they depend on each other
        evidence[kind] = float(logsumexp(each)) - math.log(len(each))
    shift = _shift(steps, limits.min_scores)
    cause, why = _cause(evidence, shift, calls, champion_calls, limits)
    return Verdict(cause, why, evidence, shift)


def _more_bad_cards(step: StepRecord, kind: str) -> float:
    ours, theirs = step.arm.bad_cards[kind], step.champion.bad_cards[kind]
    return log_bayes_factor(len(ours), len(ours) + len(theirs), step.share)


def _cause(
    evidence: Mapping[str, float], shift: float | None, calls: CallCounts, champion_calls: CallCounts, limits: Limits
) -> tuple[str, str]:
    if is_significant(evidence["errors"], limits.alpha):
        return "error-rate", f"{calls.failed} of {calls.calls} model calls failed"
    if slow := _slow(calls, champion_calls, limits):
        return "latency", slow
    if shift is not None and shift > limits.max_psi:
        return "score-shift", f"scores moved: PSI {shift:.3g}, at most {limits.max_psi:g}"
    for kind in TESTS[1:]:
        if is_significant(evidence[kind], limits.alpha):
            p = always_valid_p(evidence[kind])
            return "quality", f"more cards with a {kind.replace('_', ' ')} than the champion's (p = {p:.2g})"
    return "", ""


def _slow(calls: CallCounts, champion_calls: CallCounts, limits: Limits) -> str:
    if len(calls.recent_ms) < MIN_CALLS:
        return ""
    ours = float(np.percentile(calls.recent_ms, 99))
    # on a busy machine everybody is slow: only an arm that is slower than its neighbour is to blame
    theirs = float(np.percentile(champion_calls.recent_ms, 99)) if champion_calls.recent_ms else 0.0
    if ours <= limits.max_latency_ms or ours <= limits.max_latency_ratio * theirs:
        return ""
    return f"p99 of a model call is {ours:.1f} ms, the champion's {theirs:.1f}, at most {limits.max_latency_ms:g}"


def _shift(steps: Sequence[StepRecord], min_scores: int) -> float | None:
    """Of the newest step on which both sides scored enough: on the last one the champion scores no more."""
    arm = steps[-1].arm
    champion = next((step.champion for step in reversed(steps) if _enough(step.champion, min_scores)), None)
    if champion is None or not _enough(arm, min_scores):
        return None
    return psi(Reference.fit("score", list(champion.scores)), list(arm.scores))


def _enough(record: Record, min_scores: int) -> bool:
    return len(record.scores) >= min_scores and len(record.cards) >= MIN_CARDS

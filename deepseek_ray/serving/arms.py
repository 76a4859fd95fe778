"""A batch, split by arm: one model call an arm, and the champion for whatever an arm could not answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deepseek_ray.data.events import Reason
from deepseek_ray.logs import get_logger
from deepseek_ray.serving.arm_metrics import ArmTally
from deepseek_ray.serving.commands import FloatArray, LiveModel
from deepseek_ray.serving.traffic import NO_TRAFFIC, Alias, Arm, Split, TrafficPolicy

logger = get_logger(__name__)

Reasons = tuple[Reason, ...]
Answer = Callable[[LiveModel, FloatArray, FloatArray], tuple[FloatArray, Sequence[Reasons]]]
"""A version's probabilities [n] and reasons for values [n, F] and sequences [n, N, C]."""


class Outcome(NamedTuple):
    """One row's score, and the version that gave it."""

    live: LiveModel
    probability: float
    reasons: Reasons


@dataclass(frozen=True)
class LiveArm:
    """A version that answers a share of the cards."""

    alias: Alias
    percent: float
    live: LiveModel
    tally: ArmTally


@dataclass(frozen=True)
class ArmPlan:
    """Who answers whom, at one moment. Never changed: the next plan takes its place between two batches.

    Attributes:
        champion: answers every card that no arm takes.
        arms: in the order of the split's numbers.
        split: which card goes to which arm; None without arms.
        tally: the champion's calls beside these arms; None without arms.
        shadow: scores afterwards, off the path of the answers.
        policy: that these arms come from.
        text: of the policy, as the registry holds it.
    """

    champion: LiveModel
    arms: tuple[LiveArm, ...] = ()
    split: Split | None = None
    tally: ArmTally | None = None
    shadow: LiveModel | None = None
    policy: TrafficPolicy = NO_TRAFFIC
    text: str = ""

    @property
    def versions(self) -> dict[str, LiveModel]:
        """All loaded versions by number."""
        loaded = [self.champion, *(arm.live for arm in self.arms), *([self.shadow] if self.shadow else [])]
        return {live.version: live for live in loaded}

    def with_threshold(self, version: str, threshold: float) -> ArmPlan:
        """The same plan with another threshold for a version, wherever it serves."""

        def moved(live: LiveModel) -> LiveModel:
            return replace(live, threshold=threshold) if live.version == version else live

        arms = tuple(replace(arm, live=moved(arm.live)) for arm in self.arms)
        shadow = moved(self.shadow) if self.shadow else None
        return replace(self, champion=moved(self.champion), arms=arms, shadow=shadow)

    def without(self, aliases: Collection[str]) -> ArmPlan:
        """The champion answers the cards of these arms, at once."""
        arms = tuple(arm for arm in self.arms if arm.alias not in aliases)
        return self.with_arms(arms)

    def with_arms(self, arms: tuple[LiveArm, ...]) -> ArmPlan:
        """These arms on the policy's line."""
        cut = [Arm(alias=arm.alias, version=arm.live.version, percent=arm.percent) for arm in arms]
        return replace(self, arms=arms, split=Split(cut, self.policy.salt) if arms else None)

    def score(self, cards: Sequence[str], values: FloatArray, sequence: FloatArray, answer: Answer) -> list[Outcome]:
        """Outcomes of a batch's rows, in their order.

        Raises:
            Exception: the champion's model failed; an arm's failure is counted and the champion answers.
        """
        if self.split is None:
            return _outcomes(self.champion, *answer(self.champion, values, sequence))
        chosen = np.array([self.split.arm_of(card) for card in cards])
        outcomes: dict[int, Outcome] = {}
        for number, arm in enumerate(self.arms):
            outcomes |= _arm_outcomes(arm, np.flatnonzero(chosen == number), values, sequence, answer)
        rest = np.array([row for row in range(len(cards)) if row not in outcomes], dtype=np.intp)
        if len(rest):
            start = time.perf_counter()
            given = _outcomes(self.champion, *answer(self.champion, values[rest], sequence[rest]))
            if self.tally is not None:
                self.tally.answered(len(rest), time.perf_counter() - start)
            outcomes |= zip(rest.tolist(), given, strict=True)
        return [outcomes[row] for row in range(len(cards))]


def _arm_outcomes(
    arm: LiveArm, rows: npt.NDArray[np.intp], values: FloatArray, sequence: FloatArray, answer: Answer
) -> dict[int, Outcome]:
    if not len(rows):
        return {}
    start = time.perf_counter()
    try:
        probability, reasons = answer(arm.live, values[rows], sequence[rows])
        if len(probability) != len(rows) or not np.all((probability >= 0) & (probability <= 1)):
            raise ValueError(f"{len(rows)} rows got no probabilities between 0 and 1")
    except Exception:  # an arm on trial may fail in any way; the client must not see it
        arm.tally.failed()
        logger.exception("the %s (version %s) failed; the champion answers", arm.alias, arm.live.version)
        return {}
    arm.tally.answered(len(rows), time.perf_counter() - start)
    return dict(zip(rows.tolist(), _outcomes(arm.live, probability, reasons), strict=True))


def _outcomes(live: LiveModel, probability: FloatArray, reasons: Sequence[Reasons]) -> list[Outcome]:
    return [Outcome(live, float(p), why) for p, why in zip(probability, reasons, strict=True)]

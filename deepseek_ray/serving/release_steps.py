"""Moves a release on within the service: from shadow to canary, and from the last step to champion."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deepseek_ray.data.evidence import GateDecision
from deepseek_ray.errors import ModelFormatError, RegistryError, RegistryUnavailableError
from deepseek_ray.registry import TrafficBook, Words
from deepseek_ray.serving.arms import ArmPlan
from deepseek_ray.serving.moves import Move
from deepseek_ray.serving.release import View, turn
from deepseek_ray.serving.shadow_trial import ShadowTrial


class ReleaseSteps:
    """What the rollout asks about releases.

    Args:
        trial: judges the shadow.
        refused: why arms or the shadow of the policy cannot serve, by name.
        decide: the gate's decision on the recorded evidence of a version and today's champion.
    """

    def __init__(
        self, trial: ShadowTrial, refused: Callable[[], Mapping[str, str]], decide: Callable[[str], GateDecision]
    ) -> None:
        self._trial, self._refused, self._decide = trial, refused, decide

    def look(self, plan: ArmPlan, now_us: int) -> Move | None:
        """The move that the policy's release needs now; raises like ``ShadowTrial.verdict``."""
        policy, champion = plan.policy, plan.champion.version
        if policy.release is None:
            return None
        refused = self._refused().get("canary" if policy.arms else "shadow", "")
        trial = None
        if not policy.arms and plan.shadow is not None:
            trial = self._trial.verdict(policy.release.version, champion, policy.limits, now_us)
        return turn(plan.text, policy, View(now_us, champion, refused, trial))

    def crown(self, book: TrafficBook, move: Move, words: Words) -> str:
        """Make the move's version champion; why it cannot be, or "".

        Raises:
            RegistryError: somebody else moved the traffic first.
            RegistryUnavailableError: a store does not answer.
        """
        try:
            decision = self._decide(move.crown)
        except RegistryUnavailableError:
            raise
        except RegistryError as error:  # it was never measured: asking again changes nothing
            return str(error)
        try:
            return book.crown(move.before, move.after.model_dump_json(), move.crown, decision, words)
        except ModelFormatError as error:
            return str(error)

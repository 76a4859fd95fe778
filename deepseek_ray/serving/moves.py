"""Moves of the traffic that the service wants: what changes, who falls, and why."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_ray.serving.arms import LiveArm
from deepseek_ray.serving.traffic import TrafficPolicy


@dataclass(frozen=True)
class Fall:
    """An arm that lost its traffic, and why."""

    arm: LiveArm
    why: str

    @property
    def summary(self) -> str:
        """What happened, in a few words."""
        return f"{self.arm.alias} (version {self.arm.live.version}) {self.arm.percent:g} % -> 0 %"

    def is_from(self, policy: TrafficPolicy) -> bool:
        """Would that policy let the arm go on?"""
        return any((arm.alias, arm.version) == (self.arm.alias, self.arm.live.version) for arm in policy.arms)


@dataclass(frozen=True)
class Move:
    """A move that the registry has yet to hear of.

    Attributes:
        fallen: the arms of a rollback.
        cause: what the metric of moves says of it.
        crown: version that becomes champion with it, or "".
    """

    before: str
    after: TrafficPolicy
    action: str
    why: str
    summary: str
    fallen: tuple[Fall, ...] = ()
    cause: str = ""
    crown: str = ""


def rollback(text: str, policy: TrafficPolicy, fallen: tuple[Fall, ...]) -> Move:
    """One move for all arms: after two, a crash or a poll in between would let the second arm go on."""
    after = policy
    for fall in fallen:
        after = after.without(fall.arm.alias)
    why = fallen[0].why if len(fallen) == 1 else "; ".join(f"{fall.arm.alias}: {fall.why}" for fall in fallen)
    return Move(text, after, "rollback", why, ", ".join(fall.summary for fall in fallen), fallen)

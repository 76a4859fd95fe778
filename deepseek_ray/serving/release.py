"""A release: a version that the gate passed goes live by way of shadow and canary. Pure: no clock, no store.

All that is known of it is in the traffic policy, which the registry holds: whoever is killed, the next one reads there
how far it is. The service moves it on (release_steps.py); on the schedule's steps the guard judges it like any arm.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from deepseek_ray.config import ReleaseConfig
from deepseek_ray.serving.moves import Move
from deepseek_ray.serving.traffic import Release, Schedule, Shadow, TrafficPolicy


@dataclass(frozen=True)
class Trial:
    """What is known of a shadow.

    Attributes:
        scored: decisions that it and the champion scored.
        cause: error-rate, score-shift or quality; "" while it is healthy.
        why: in words.
    """

    scored: int
    cause: str = ""
    why: str = ""


@dataclass(frozen=True)
class View:
    """What the service sees of a release.

    Attributes:
        champion: version that serves as champion.
        refused: why the service cannot let the released version serve, or "".
        trial: of the shadow; None on the steps of the schedule.
    """

    now_us: int
    champion: str
    refused: str = ""
    trial: Trial | None = None


def start(before: TrafficPolicy, version: str, champion: str, settings: ReleaseConfig) -> TrafficPolicy:
    """The first policy of a release: the version as shadow, or on the first step where none is wanted.

    Raises:
        ValueError: the traffic is :func:`taken`.
    """
    if reason := taken(before):
        raise ValueError(reason)
    schedule = Schedule(steps=tuple(settings.steps), dwell_s=settings.dwell_s, min_decisions=settings.min_decisions)
    release = Release(
        version=version,
        champion=champion,
        schedule=schedule,
        shadow_s=settings.shadow_s,
        shadow_decisions=settings.shadow_decisions,
    )
    after = before.followed_by(TrafficPolicy(shadow=Shadow(version=version), release=release, limits=before.limits))
    return after if settings.shadow_s else after.begun().model_copy(update={"revision": after.revision})


def taken(policy: TrafficPolicy) -> str:
    """Why no release may begin: another one is under way, or somebody sends traffic by hand; "" where it may."""
    if policy.release is not None:
        return f"a release is under way: {stands(policy)}"
    hands = [f"{arm.alias} (version {arm.version}) {arm.percent:g} %" for arm in policy.arms]
    if policy.shadow is not None:
        hands.append(f"shadow (version {policy.shadow.version})")
    return f"the traffic is in use by hand: {', '.join(hands)}" if hands else ""


def stands(policy: TrafficPolicy) -> str:
    """Where a release stands and what comes next, in words; "" without one."""
    release = policy.release
    if release is None:
        return ""
    since = datetime.fromtimestamp(policy.since_us / 1e6, UTC).isoformat(timespec="seconds")
    if not policy.arms:
        first = f"canary {release.schedule.steps[0]:g} %"
        waits = f"{release.shadow_s:g} s and {release.shadow_decisions} decisions"
        return f"version {release.version} is the shadow since {since}; {first} after {waits}"
    schedule, percent = policy.schedule or release.schedule, policy.arms[0].percent
    after = "champion" if policy.next_percent is None else f"{policy.next_percent:g} %"
    waits = f"{schedule.dwell_s:g} s and {schedule.min_decisions} decisions"
    return f"version {release.version} is the canary at {percent:g} % since {since}; {after} after {waits}"


def turn(text: str, policy: TrafficPolicy, view: View) -> Move | None:
    """The move that a release needs now, besides those of guard and schedule; None: nothing but time.

    Args:
        text: of the policy, as the registry holds it.
        policy: one with a release.
        view: what the service sees.
    """
    release = policy.release
    assert release is not None
    if view.champion == release.version:  # by hand, or a crash came before the traffic was moved
        return champion_move(text, policy, "it is the champion")
    if view.champion != release.champion:
        why = f"version {view.champion} is the champion now, it was compared with version {release.champion}"
        return _end(text, policy, "champion", why)
    if view.refused:
        return _end(text, policy, "refused", view.refused)
    if policy.arms or view.trial is None:
        return None
    if view.trial.cause:
        return _end(text, policy, view.trial.cause, view.trial.why)
    stayed_s = (view.now_us - policy.since_us) / 1e6
    if stayed_s < release.shadow_s or view.trial.scored < release.shadow_decisions:
        return None
    after = policy.begun()
    summary = f"version {release.version}: shadow -> canary {after.arms[0].percent:g} %"
    return Move(text, after, "advance", "healthy", summary, cause="schedule")


def champion_move(text: str, policy: TrafficPolicy, why: str) -> Move:
    """The last move of a release: its version becomes champion."""
    assert policy.release is not None
    version = policy.release.version
    summary = f"version {version}: {_place(policy)} -> champion"
    return Move(text, policy.ended(), "promote", why, summary, cause="release", crown=version)


def _end(text: str, policy: TrafficPolicy, cause: str, why: str) -> Move:
    assert policy.release is not None
    summary = f"version {policy.release.version}: {_place(policy)} -> taken back"
    return Move(text, policy.ended(), "rollback", why, summary, cause=cause)


def refused_move(move: Move, policy: TrafficPolicy, why: str) -> Move:
    """What follows where the registry refuses to make a version champion."""
    return _end(move.before, policy, "gate", why)


def _place(policy: TrafficPolicy) -> str:
    return f"canary {policy.arms[0].percent:g} %" if policy.arms else "shadow"

"""What a replica says of itself beside its champion: who it is, its arms and its shadow, and what it could not load."""

from __future__ import annotations

import os
import socket
from typing import Any

from deepseek_ray.serving.arms import ArmPlan
from deepseek_ray.serving.release import stands
from deepseek_ray.serving.rollout import Rollout
from deepseek_ray.serving.watcher import RegistryWatcher

REPLICA = f"{socket.gethostname()}:{os.getpid()}"


def standing_of(plan: ArmPlan, watcher: RegistryWatcher, rollout: Rollout, fallback: str) -> dict[str, Any]:
    """Plain data for GET /v1/risk/model.

    Args:
        plan: who answers whom now.
        watcher: what it refused.
        rollout: what it knows of each arm.
        fallback: why the copy of the last good version serves, or "".
    """
    arms = [
        {
            "arm": arm.alias,
            "model_version": arm.live.version,
            "percent": arm.percent,
            "threshold": arm.live.threshold,
            **rollout.report.get(arm.alias, {}),
        }
        for arm in plan.arms
    ]
    return {
        "replica": REPLICA,
        "fallback": fallback,
        "champion_percent": 100.0 - sum(arm.percent for arm in plan.arms),
        "arms": arms,
        "shadow_version": plan.shadow.version if plan.shadow else "",
        "arms_refused": dict(watcher.arm_refusals),
        "release": stands(plan.policy),
        "policy_revision": plan.policy.revision,
    }

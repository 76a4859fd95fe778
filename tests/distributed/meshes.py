"""Meshes of the parity matrix: every axis alone, every schedule, combinations of up to eight processes."""

from __future__ import annotations

AXES = [
    "dp_replicate=2", "dp_shard=2", "dp_shard=3", "tp=2", "tp=4", "pp=2", "pp=4", "dp_shard=2,ep=2", "dp_shard=4,ep=2",
]  # fmt: skip
SCHEDULES = ["GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
COMBINATIONS = [
    ("dp_replicate=2,dp_shard=2", "1F1B"),
    ("dp_replicate=2,dp_shard=2,ep=2", "1F1B"),
    ("dp_shard=2,tp=2", "1F1B"),
    ("dp_shard=2,tp=2,ep=2", "1F1B"),
    ("pp=2,dp_shard=2", "GPipe"),
    ("pp=2,tp=2", "ZBVZeroBubble"),
    ("pp=2,dp_shard=2,ep=2", "InterleavedZeroBubble"),
    ("pp=2,dp_replicate=2,tp=2", "LoopedBFS"),
    ("pp=2,dp_shard=2,tp=2,ep=2", "DualPipeV"),
    ("pp=2,dp_shard=2,tp=2,ep=2", "Interleaved1F1B"),
    ("pp=2,dp_shard=2,tp=2,ep=2", "ZBVZeroBubble"),
    ("pp=4,dp_shard=2,ep=2", "1F1B"),
    ("dp_replicate=2,dp_shard=2,tp=2,ep=2", "1F1B"),
    ("dp_shard=8,ep=4", "1F1B"),
    ("pp=2,dp_replicate=2,dp_shard=2,ep=2", "DualPipeV"),
]


def overrides(mesh: str, schedule: str = "1F1B", **settings: object) -> list[str]:
    """Settings of a mesh such as ``pp=2,tp=2``."""
    degrees = [f"parallel.{degree}" for degree in mesh.split(",") if degree]
    return [*degrees, f"parallel.schedule={schedule}", *(f"{k.replace('__', '.')}={v}" for k, v in settings.items())]

"""What the kernels are to reach on one H200 in bfloat16, and whether the rows of a run show it.

The goals are the best published figures for these shapes, or the copy rate of the machine where memory is the bound.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
QWEN, WIDE, MIXTRAL = r"D2048 I768 E128 K8 uniform", r"D4096 I512 E128 K8 uniform", r"D4096 I14336 E8 K2 uniform"


@dataclass(frozen=True)
class Goal:
    """A least figure of our op.

    Attributes:
        op: its name.
        shape: a pattern; the worst of the shapes that fit counts.
        direction: forward, backward, or full for both in one.
        column: of a row; ``speedup`` is over ``against``.
        least: to be reached.
        against: another provider.
    """

    op: str
    shape: str
    direction: str
    column: str
    least: float
    against: str = ""


GOALS = (
    Goal("fused_moe", f"T32768 {QWEN}", "forward", "tflops", 510),
    Goal("fused_moe", f"T32768 {QWEN}", "full", "tflops", 430),
    Goal("fused_moe", f"T8192 {QWEN}", "forward", "tflops", 420),
    Goal("fused_moe", f"T8192 {QWEN}", "backward", "tflops", 300),
    Goal("fused_moe", f"T32768 {WIDE}", "forward", "tflops", 480),
    Goal("fused_moe", f"T32768 {WIDE}", "backward", "tflops", 440),
    Goal("fused_moe", f"T8192 {MIXTRAL}", "forward", "tflops", 600),
    Goal("fused_moe", f"T8192 {MIXTRAL}", "backward", "tflops", 480),
    Goal("linear_cross_entropy", "D4096 V131072", "forward", "tflops", 700),
    Goal("linear_cross_entropy", "D4096 V131072", "backward", "tflops", 690),
    *(Goal("rms_norm", r"N(4096|8192|65536)", way, "of_roofline", 0.9) for way in ("forward", "backward")),
    *(Goal("swiglu", r"I(4096|8192|65536)", way, "of_roofline", 0.9) for way in ("forward", "backward")),
    *(Goal("router_topk", "", way, "of_roofline", 0.9) for way in ("forward", "backward")),
    Goal("fused_moe", r"I(256|512|768) E\d+ K\d+ uniform", "full", "speedup", 1.5, against="torch grouped_mm"),
)


def place(op: str, shape: str) -> int | None:
    """Number of the first goal that needs this case; None where none does."""
    return next((n for n, goal in enumerate(GOALS) if goal.op == op and re.search(goal.shape, shape)), None)


def report(rows: Sequence[Row]) -> list[str]:
    """Lines for people: each goal, what was measured, and whether that meets it."""
    lines = [f"{'goal':34}{'shapes':44}{'':10}{'least':>8}{'measured':>10}  met"]
    for goal in GOALS:
        found = dict(_measured(goal, rows))
        worst = min(found, key=lambda shape: found[shape], default="")
        figure, met = (f"{found[worst]:.4g}", _verdict(found[worst] >= goal.least)) if found else ("-", "not measured")
        what = f"{goal.op} {goal.column}" + (f" over {goal.against}" if goal.against else "")
        lines.append(f"{what[:33]:34}{worst or goal.shape:44}{goal.direction:10}{goal.least:8g}{figure:>10}  {met}")
    return lines


def _measured(goal: Goal, rows: Iterable[Row]) -> Iterable[tuple[str, float]]:
    """The latest figure of each shape that fits."""
    fits = [row for row in rows if not row["error"] and row["op"] == goal.op and row["direction"] == goal.direction]
    fits = [row for row in fits if re.search(goal.shape, row["shape"])]
    others = {row["shape"]: float(row["ms_p50"]) for row in fits if row["provider"] == goal.against}
    for row in (row for row in fits if is_ours(row)):
        if not goal.against:
            yield row["shape"], float(row[goal.column])
        elif row["shape"] in others:
            yield row["shape"], others[row["shape"]] / float(row["ms_p50"])


def is_ours(row: Row) -> bool:
    """Whether a row is of our kernel, of what stands in for it, or of its tuning."""
    return row["provider"].startswith("ours")


def _verdict(met: bool) -> str:
    return "yes" if met else "no"

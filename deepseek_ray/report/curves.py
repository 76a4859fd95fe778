"""The curves of a pretraining, as a figure for the tracker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

_INK, _SOFT = "#0072b2", "#d55e00"


def loss_curve(lines: Sequence[dict[str, Any]]) -> Figure:
    """Loss and learning rate by step.

    Args:
        lines: ``step``, ``loss`` (nats a token) and ``lr`` each.
    """
    figure = Figure(figsize=(7.0, 3.5), layout="constrained")
    axis = figure.subplots()
    steps = [line["step"] + 1 for line in lines]
    axis.plot(steps, [line["loss"] for line in lines], color=_INK)
    axis.set(xlabel="step", ylabel="loss, nats a token", ylim=(0, None))
    axis.spines[["top"]].set_visible(False)
    rate = axis.twinx()
    rate.plot(steps, [line["lr"] for line in lines], color=_SOFT, linestyle="--", linewidth=1)
    rate.set(ylabel="learning rate (dashed)", ylim=(0, None))
    return figure

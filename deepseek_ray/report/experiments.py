"""Plots of the handbook's experiments as stand-alone SVG files, drawn from their JSON figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito 2008: safe for colour-blind readers
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#666666"
SIDES = {
    "full_retrain": ("full retrain", ORANGE, "--"),
    "incremental": ("incremental update", BLUE, "-"),
    "naive": ("naive fine-tuning", GREEN, "-."),
    "frozen": ("frozen", GREY, ":"),
}
"""Side of the experiment on a new pattern -> (name in words, colour, line style)."""
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "experiments", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd", "axes.axisbelow": True,
    "legend.frameon": False,
}  # fmt: skip


def plot_delay(result: Mapping[str, Any], target: Path) -> Path:
    """Recall at 1 % false positives of both sides, week by week, under their ceilings."""
    with matplotlib.rc_context(cast(Any, _STYLE)):
        figure = Figure((7.2, 3.6), layout="constrained")
        axes = figure.subplots()
        weeks = [week["test_start"] for week in result["weeks"]]
        for side, words, colour in (("1d", "daily, labels after 1 day", BLUE), ("7d", "weekly, after 7 days", ORANGE)):
            axes.plot(weeks, [week[f"recall_{side}"] for week in result["weeks"]], "o-", color=colour, label=words)
            ceiling = [week[f"ceiling_{side}"] for week in result["weeks"]]
            axes.plot(weeks, ceiling, ":", color=colour, label=f"ceiling, {side[0]} day{'s' * (side != '1d')}")
        axes.set_ylim(0.5, 1)
        axes.set_xlabel("test week from")
        axes.set_ylabel("recall at 1 % false positives")
        _legend_outside(figure, axes)
        return _save(figure, target)


def plot_pattern(result: Mapping[str, Any], target: Path) -> Path:
    """Average precision on the new and on the old patterns, week by week, of every side."""
    with matplotlib.rc_context(cast(Any, _STYLE)):
        figure = Figure((11, 3.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        weeks = [week["test_start"] for week in result["weeks"]]
        for axes, key, title in zip(
            panels, ("new_pattern", "old_patterns"), ("new pattern", "old patterns"), strict=True
        ):
            for side, (words, colour, line) in SIDES.items():
                values = [week[f"{side}_{key}"] for week in result["weeks"]]
                axes.plot(weeks, values, line, color=colour, marker="o", label=words)
            axes.set_ylim(0, 1)
            axes.set_title(title)
            axes.set_xlabel("test week from")
        panels[0].set_ylabel("average precision")
        _legend_outside(figure, panels[1])
        return _save(figure, target)


PLOTS: dict[str, Callable[[Mapping[str, Any], Path], Path]] = {"delay": plot_delay, "new-pattern": plot_pattern}
"""Experiment -> its plot."""


def _legend_outside(figure: Figure, axes: Any) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")


def _save(figure: Figure, target: Path) -> Path:
    figure.savefig(target, format="svg", metadata={"Date": None})
    return target

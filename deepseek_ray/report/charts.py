"""The plots of the report, as SVG to be placed inside the page.

Colours are drawn as marks and replaced by the page's CSS variables, so that one plot reads well on light and dark
screens and on paper. Series differ in colour (Okabe and Ito 2008, safe for colour-blind readers) and in line style.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deepseek_ray.report.results import Curves, ModelResult, Replay, Results, Score
from deepseek_ray.report.verdict import LATENCY_BOUND_MS

INK, SOFT, GRID = "#010101", "#020202", "#030303"
SERIES = ("#0000a1", "#0000a2", "#0000a3", "#0000a4")
BAD = "#0000b1"
_VARIABLES = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    GRID: "var(--grid)",
    BAD: "var(--bad)",
    **{mark: f"var(--series-{number})" for number, mark in enumerate(SERIES, start=1)},
}

MODELS = {
    "moe": ("Mixture of experts", SERIES[0], "-"),
    "lightgbm": ("LightGBM", SERIES[1], "--"),
    "dense": ("Dense, equal active size", SERIES[2], "-."),
    "logistic": ("Logistic regression", SERIES[3], ":"),
}
"""Model -> (name in words, colour, line style), in the order of tables and legends."""

SIDES = {
    "frozen": ("Frozen champion", SERIES[3]),
    "updated": ("Incremental update", SERIES[0]),
    "full_retrain": ("Full retrain", SERIES[1]),
}

_HALF, _FULL = (5.2, 3.3), (10.6, 3.1)
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def draw_all(results: Results) -> dict[str, str]:
    """Every plot the results allow, by name, as inline SVG."""
    with matplotlib.rc_context(cast(Any, _STYLE)):
        figures = {name: draw(results) for name, (draw, _) in CHARTS.items()}
        return {name: _svg(figure, name, CHARTS[name][1]) for name, figure in figures.items() if figure is not None}


def _svg(figure: Figure, name: str, alternative: str) -> str:
    """The figure as an SVG element without fixed size, foreign addresses or ids that another plot could share."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = (
        re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", text[: text.index(">")])
        + text[text.index(">") :]
    )
    text = re.sub(r'\bid="', f'id="{name}-', text).replace("xlink:href=", "href=")
    text = text.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for mark, variable in _VARIABLES.items():
        text = text.replace(mark, variable)
    return f'<svg role="img" aria-label="{html.escape(alternative)}"{text.removeprefix("<svg")}'


def _panels(size: tuple[float, float], rows: int = 1, columns: int = 1, **keywords: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns, **keywords))
    return figure, list(grid.ravel())


def _complete(points: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """Points without a gap; curves may hold None where nothing was measured."""
    return [[float(x) for x in point if x is not None] for point in points if None not in point]


def _day_axis(axis: Axes, days: Sequence[str]) -> None:
    """Label at most a dozen days; dates lose their year."""
    step = max(1, -(-len(days) // 12))
    shown = range(0, len(days), step)
    axis.set_xticks(list(shown), [re.sub(r"^\d{4}-", "", days[position]) for position in shown])
    axis.set_xlim(-0.6, len(days) - 0.4)


def frauds_by_day(results: Results) -> Figure | None:
    """Frauds a day, stacked by scenario."""
    days = results.data.days if results.data else []
    if not days:
        return None
    figure, (axis,) = _panels(_FULL)
    kinds = sorted({kind for day in days for kind in day.by_scenario})
    bottom = np.zeros(len(days))
    for number, kind in enumerate(kinds or ["all"]):
        heights = np.array([day.by_scenario.get(kind, 0) if kinds else day.frauds or 0 for day in days], dtype=float)
        strength = 1.0 if number < len(SERIES) else 0.5
        axis.bar(
            range(len(days)),
            heights,
            0.8,
            bottom,
            color=SERIES[number % len(SERIES)],
            alpha=strength,
            label=f"scenario {kind}",
        )
        bottom += heights
    _day_axis(axis, [day.day for day in days])
    axis.grid(axis="x", visible=False)
    axis.set_ylabel("frauds a day")
    if kinds:
        axis.legend(ncols=len(kinds), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    return figure


def _curves(
    results: Results, points_of: Callable[[Curves], Sequence[Sequence[float | None]]], score: str
) -> tuple[Figure, Axes] | None:
    """A line a model with its score in the legend."""
    figure, (axis,) = _panels(_HALF)
    for name, model in ranked(results.train.models if results.train else {}):
        if points := _complete(points_of(model.curves)):
            title, colour, dash = MODELS.get(name, (name, SOFT, "-"))
            x, y = zip(*points, strict=True)
            value = getattr(model, score)
            axis.plot(x, y, dash, color=colour, label=title if value is None else f"{title} {value:.3f}")
    return (figure, axis) if axis.lines else None


def ranked(models: Mapping[str, ModelResult]) -> list[tuple[str, ModelResult]]:
    """Known models in their fixed order, then others."""
    order = [*MODELS, *(name for name in models if name not in MODELS)]
    return [(name, models[name]) for name in order if name in models]


def precision_recall(results: Results) -> Figure | None:
    """Precision against recall, average precision in the legend."""
    if (drawn := _curves(results, lambda curves: curves.pr, "average_precision")) is None:
        return None
    figure, axis = drawn
    axis.set(
        xlabel="recall: share of frauds found",
        ylabel="precision: share of alarms that are fraud",
        xlim=(0, 1),
        ylim=(0, 1.02),
    )
    axis.legend(title="average precision", loc="lower left", title_fontsize=8.5, alignment="left")
    return figure


def roc(results: Results) -> Figure | None:
    """Recall against the false-positive rate on a logarithmic axis: alarms are affordable only at its left end."""
    if (drawn := _curves(results, lambda curves: curves.roc, "auc")) is None:
        return None
    figure, axis = drawn
    axis.axvline(0.01, color=SOFT, linewidth=1, linestyle=(0, (1, 2)))
    axis.text(0.0107, 0.02, "1 % false alarms", color=SOFT, fontsize=8)
    axis.set(xscale="log", xlim=(1e-4, 1), ylim=(0, 1.02))
    axis.set(xlabel="false alarms: share of genuine payments (log)", ylabel="recall: share of frauds found")
    axis.set_xticks([1e-4, 1e-3, 1e-2, 1e-1, 1], ["0.01 %", "0.1 %", "1 %", "10 %", "100 %"])
    axis.legend(title="area under the curve", loc="upper left", title_fontsize=8.5, alignment="left")
    return figure


def calibration(results: Results) -> Figure | None:
    """Observed fraud share against predicted probability; linear below 1 %, logarithmic above."""
    figure, (axis,) = _panels(_HALF)
    for name, model in ranked(results.train.models if results.train else {}):
        if points := sorted(_complete(model.curves.calibration)):
            title, colour, dash = MODELS.get(name, (name, SOFT, "-"))
            predicted, observed, _ = zip(*points, strict=True)
            error = "" if model.calibration_error is None else f" {model.calibration_error:.4f}"
            axis.plot(predicted, observed, dash, marker="o", markersize=3.5, color=colour, label=title + error)
    if not axis.lines:
        return None
    axis.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (1, 2)))
    ticks = [0, 0.01, 0.1, 1]
    for scale, limits, place in (
        (axis.set_xscale, axis.set_xlim, axis.set_xticks),
        (axis.set_yscale, axis.set_ylim, axis.set_yticks),
    ):
        scale("symlog", linthresh=0.01)
        limits(-0.0005, 1.1)
        place(ticks, ["0", "1 %", "10 %", "100 %"])
    axis.minorticks_off()
    axis.set(xlabel="predicted probability", ylabel="observed share of fraud")
    axis.legend(title="expected calibration error", loc="upper left", title_fontsize=8.5, alignment="left")
    return figure


def expert_load(results: Results) -> Figure | None:
    """Share of routed tokens an expert, a group of bars a layer."""
    layers = results.train.expert_load if results.train else []
    if not any(layers):
        return None
    figure, (axis,) = _panels(_HALF)
    width = 0.8 / len(layers)
    for number, shares in enumerate(layers):
        places = np.arange(len(shares)) + (number - (len(layers) - 1) / 2) * width
        axis.bar(
            places,
            [share or 0.0 for share in shares],
            width * 0.92,
            color=SERIES[number % len(SERIES)],
            label=f"layer {number + 1}",
        )
    num_experts = max(map(len, layers))
    axis.axhline(1 / num_experts, color=SOFT, linewidth=1, linestyle=(0, (1, 2)), label="equal share")
    axis.axhline(0.01, color=BAD, linewidth=1.2, linestyle="--", label="least allowed, 1 %")
    axis.set_xticks(range(num_experts), [str(number + 1) for number in range(num_experts)])
    axis.set(xlabel="expert", ylabel="share of the load")
    axis.grid(axis="x", visible=False)
    axis.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure


def loss(results: Results) -> Figure | None:
    """Training loss and validation average precision by epoch, one panel each."""
    points = results.train.loss if results.train else []
    if not points:
        return None
    figure, axes = _panels(_HALF, 2, sharex=True)
    titles = ("training loss", "average precision on validation days")
    for column, (axis, title, colour) in enumerate(zip(axes, titles, SERIES[:2], strict=True), start=1):
        drawn = _complete([(point[0], point[column]) for point in points])
        axis.plot(*(zip(*drawn, strict=True) if drawn else ((), ())), "-", marker="o", markersize=3.5, color=colour)
        axis.set_title(title)
    axes[1].set_xlabel("epoch")
    axes[1].set_xticks(
        sorted({point[0] for point in points if point[0] is not None and float(point[0]).is_integer()})[:20]
    )
    return figure


def _ranking(pairs: Sequence[tuple[str, float]], label: str, colour: str) -> Figure | None:
    """The largest values as horizontal bars, largest on top."""
    top = sorted(pairs, key=lambda pair: pair[1])[-15:]
    if not top:
        return None
    figure, (axis,) = _panels((_HALF[0], 0.7 + 0.21 * len(top)))
    axis.barh([name for name, _ in top], [value for _, value in top], 0.7, color=colour)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0, labelsize=8)
    axis.set_xlabel(label)
    return figure


def importance(results: Results) -> Figure | None:
    """The features the model leans on most."""
    pairs = results.train.importance if results.train else []
    return _ranking(
        [(name, value) for name, value in pairs if value is not None], "mean contribution to the log-odds", SERIES[0]
    )


def latency(results: Results) -> Figure | None:
    """Histogram of decision times with the percentiles and the promise."""
    measured = results.latency
    if measured is None or not measured.histogram:
        return None
    figure, (axis,) = _panels(_FULL)
    edges = [0.0, *(upper for upper, _ in measured.histogram)]
    counts = [count for _, count in measured.histogram]
    axis.stairs(counts, edges, fill=True, color=SERIES[0], alpha=0.85)
    marks = (("median", measured.http_p50_ms), ("90 %", measured.http_p90_ms), ("99 %", measured.http_p99_ms))
    top = max(*counts, 1)
    for number, (name, value) in enumerate(marks):
        if value is not None:  # the leftmost mark is the tallest, so that no line crosses a label
            height = top * (1.36 - 0.13 * number)
            axis.vlines(value, 0, height, color=INK, linewidth=1.2)
            axis.annotate(f"{name}: {value:.3g} ms", (value, height), (4, -7), textcoords="offset points", fontsize=8.5)
    axis.axvline(LATENCY_BOUND_MS, color=BAD, linewidth=1.2, linestyle="--")
    axis.annotate(
        f"bound on 99 %: {LATENCY_BOUND_MS:g} ms",
        (LATENCY_BOUND_MS, top * 1.36),
        (4, -7),
        textcoords="offset points",
        fontsize=8.5,
        color=BAD,
    )
    axis.set(xlabel="decision time over HTTP, ms", ylabel="requests", ylim=(0, top * 1.42))
    axis.set_xlim(0, max(LATENCY_BOUND_MS * 1.25, edges[-1]))
    axis.grid(axis="x", visible=False)
    return figure


_OVER_DAYS: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("psi_max", "largest population stability index of a feature (0.1 watch, 0.25 alarm)", (0.1, 0.25)),
    ("ks_max", "largest Kolmogorov-Smirnov distance of a feature", ()),
    ("average_precision", "average precision of the live decisions, once labels are known", ()),
    ("threshold", "decision threshold", ()),
)


def drift(results: Results) -> Figure | None:
    """Drift, live quality and threshold over the replayed days, each swap of the version marked."""
    replay = results.replay
    if replay is None or not replay.days:
        return None
    figure, axes = _panels((10.6, 7.0), len(_OVER_DAYS), sharex=True)
    for number, (axis, (name, title, levels)) in enumerate(zip(axes, _OVER_DAYS, strict=True)):
        values = [getattr(day, name) for day in replay.days]
        axis.plot(
            [np.nan if value is None else value for value in values],
            "-",
            marker="o",
            markersize=3.5,
            color=SERIES[number],
        )
        for level in levels:
            axis.axhline(level, color=BAD if level == levels[-1] else SOFT, linewidth=1, linestyle="--")
        axis.set_title(title)
        axis.set_ylim(0, 1.25 * max((*levels, *(value for value in values if value is not None)), default=1.0) or 1.0)
        _mark_swaps(axis, replay, named=number == 0)
    _day_axis(axes[-1], [day.day for day in replay.days])
    return figure


def _mark_swaps(axis: Axes, replay: Replay, *, named: bool) -> None:
    place = {day.day: position for position, day in enumerate(replay.days)}
    for swap in replay.swaps:
        if swap.at_day in place:
            axis.axvline(place[swap.at_day], color=INK, linewidth=1.4, linestyle=(0, (4, 2)))
            if named:
                label = f"swap: version {swap.from_version or '?'} to {swap.to_version or '?'}"
                late = place[swap.at_day] > 0.7 * len(replay.days)
                axis.annotate(
                    label,
                    (place[swap.at_day], 1),
                    (-4 if late else 4, 0),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    va="top",
                    ha="right" if late else "left",
                    fontsize=8.5,
                )


def drift_features(results: Results) -> Figure | None:
    """The features that moved most."""
    moved = results.replay.drift_features if results.replay else []
    return _ranking(
        [(one.feature, one.psi) for one in moved if one.psi is not None], "population stability index", SERIES[0]
    )


def before_after(results: Results) -> Figure | None:
    """Frozen champion, incremental update and full retrain on the new and on the old fraud pattern."""
    update = results.update
    if update is None or not (update.after_drift or update.old_pattern):
        return None
    figure, axes = _panels(_FULL, 1, 2)
    for axis, metric, title in zip(
        axes, ("average_precision", "cp100"), ("average precision", "card precision at 100"), strict=True
    ):
        for number, (side, (name, colour)) in enumerate(SIDES.items()):
            scores = [rows.get(side, Score()) for rows in (update.after_drift, update.old_pattern)]
            heights = [getattr(score, metric) for score in scores]
            places = np.arange(2) + (number - 1) * 0.27
            bars = axis.bar(places, [height or 0.0 for height in heights], 0.25, color=colour, label=name)
            axis.bar_label(
                bars, ["–" if height is None else f"{height:.3f}" for height in heights], padding=2, fontsize=8.5
            )
        axis.set_xticks([0, 1], ["after the drift", "old pattern"])
        axis.grid(axis="x", visible=False)
        axis.set_title(title)
        axis.margins(y=0.15)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


CHARTS: dict[str, tuple[Callable[[Results], Figure | None], str]] = {
    "frauds": (frauds_by_day, "Bars: frauds a day by scenario"),
    "pr": (precision_recall, "Curves: precision against recall, one a model"),
    "roc": (roc, "Curves: recall against false alarms, one a model"),
    "calibration": (calibration, "Curves: observed share of fraud against predicted probability, one a model"),
    "experts": (expert_load, "Bars: share of the load an expert and layer"),
    "loss": (loss, "Lines: training loss and validation average precision by epoch"),
    "importance": (importance, "Bars: features by importance"),
    "latency": (latency, "Histogram of decision times with percentiles"),
    "drift": (drift, "Lines over days: drift, live average precision and threshold, with swaps"),
    "drift-features": (drift_features, "Bars: features by drift"),
    "before-after": (
        before_after,
        "Bars: frozen champion, update and full retrain, after the drift and on the old pattern",
    ),
}
"""Name -> (plot, description for readers who do not see it)."""

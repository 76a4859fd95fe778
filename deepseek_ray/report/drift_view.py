"""The report on drift and quality for people: a table on the terminal, a figure as a file.

Both take the plain data of ``online.drift_report.DriftReport.plain``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deepseek_ray.errors import EnvironmentProblemError

Plain = Mapping[str, Any]

_BLUE, _ORANGE, _GREY = "#0072b2", "#e69f00", "#666666"  # Okabe and Ito 2008: safe for colour-blind readers
_SHOWN = 15


def table(report: Plain, limit: int) -> Iterator[str]:
    """Lines to print: the checks, then features most moved first, then quality and streams.

    Args:
        report: plain data.
        limit: features shown.
    """
    thinned = f", every {report['step']}th looked at" if report["step"] > 1 else ""
    yield f"version {report['version']}, {report['decisions']} decisions to {_time(report['newest_us'])}{thinned}"
    for check in report["checks"]:
        verdict = "ok  " if check["passed"] else "FAIL"
        yield f"  {verdict}  {check['name']:<18} {check['value']:.4g} (bound {check['bound']:.4g})  {check['detail']}"
    if not report["checks"]:
        yield "  too few decisions to judge anything"
    yield from _distances(report, limit)
    yield from _quality(report)
    for stream in report["streams"]:
        if stream["since_us"] is not None:
            means = f"{stream['before']:.5f} -> {stream['after']:.5f}"
            yield f"{stream['name']} stream: {stream['changes']} changes, since {_time(stream['since_us'])} {means}"
        else:
            yield f"{stream['name']} stream: no change in {stream['num_values']} values"


def plot(report: Plain, file: Path) -> Path:
    """Draw features, calibration and matured days, in the format that the file's name asks for.

    Raises:
        EnvironmentProblemError: the format is not known, or the file cannot be written.
    """
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    features, reliability, days = figure.subplots(1, 3)
    _draw_features(features, report["features"])
    _draw_reliability(reliability, report["quality"])
    _draw_days(days, report["quality"], report["held_out"])
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise EnvironmentProblemError(
            f"The figure {str(file)!r} cannot be written: {error}.",
            fix="name a writable file that ends in .png or .svg",
        ) from error
    return file


def _distances(report: Plain, limit: int) -> Iterator[str]:
    rows = [*report["features"][:limit]]
    if report["score"]:
        rows = [report["score"], *rows]
    if not rows:
        return
    width = max(len(row["name"]) for row in rows)
    yield f"{'':<{width}}      PSI       JS       KS"
    for row in rows:
        yield f"{row['name']:<{width}} {row['psi']:8.4f} {row['js']:8.4f} {row['ks']:8.4f}"
    if (left := len(report["features"]) - limit) > 0:
        yield f"{left} features that moved less (--limit, or --json for all)"


def _quality(report: Plain) -> Iterator[str]:
    columns = {"all matured": report["quality"], "own": report["own_quality"], "held out": report["held_out"]}
    shown = {name: figures for name, figures in columns.items() if figures}
    if not shown:
        return
    yield f"{'':<18}" + "".join(f"{name:>13}" for name in shown)
    names = ("decisions", "frauds", "alerts", "average_precision", "cp100", "alert_precision", "alert_recall")
    for name in (*names, "calibration_error", "predicted_rate", "observed_rate"):
        values = [figures.get(name, figures.get("rows") if name == "decisions" else None) for figures in shown.values()]
        yield f"{name:<18}" + "".join(f"{_number(value):>13}" for value in values)


def _draw_features(axis: Axes, features: list[Plain]) -> None:
    axis.set_title("Population stability index, most moved")
    if not features:
        return _nothing(axis)
    top = features[:_SHOWN][::-1]
    axis.barh([one["name"] for one in top], [one["psi"] for one in top], color=_BLUE)
    axis.tick_params(axis="y", labelsize=7)
    for bound in (0.1, 0.25):
        axis.axvline(bound, color=_GREY, linewidth=1, linestyle="--")
    return None


def _draw_reliability(axis: Axes, quality: Plain | None) -> None:
    axis.set_title("Calibration of matured decisions")
    if not quality:
        return _nothing(axis)
    predicted, observed, count = (np.array(column) for column in zip(*quality["reliability"], strict=True))
    axis.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle="--")
    axis.plot(predicted, observed, color=_BLUE, linewidth=1)
    axis.scatter(predicted, observed, s=8 + 120 * count / count.max(), color=_BLUE)
    axis.set(xlabel="predicted", ylabel="observed", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    return None


def _draw_days(axis: Axes, quality: Plain | None, held_out: Plain) -> None:
    axis.set_title("Matured days")
    if not quality:
        return _nothing(axis)
    days = [one["day"][5:] for one in quality["days"]]
    for name, colour in (("average_precision", _BLUE), ("alert_precision", _ORANGE)):
        values = [np.nan if one[name] is None else one[name] for one in quality["days"]]
        axis.plot(days, values, marker="o", markersize=3, color=colour, label=name.replace("_", " "))
    if held_out.get("average_precision") is not None:
        axis.axhline(held_out["average_precision"], color=_GREY, linestyle="--", linewidth=1, label="held out")
    axis.set_ylim(-0.02, 1.02)
    axis.tick_params(axis="x", labelrotation=60, labelsize=7)
    axis.legend(fontsize=7)
    return None


def _nothing(axis: Axes) -> None:
    axis.text(0.5, 0.5, "too few decisions", ha="center", va="center", transform=axis.transAxes, color=_GREY)


def _time(time_us: int) -> str:
    return datetime.fromtimestamp(time_us / 1e6, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:d}" if isinstance(value, int) else f"{value:.4f}"

"""The page: results, verdicts and plots put into the template ``report.html.j2``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from deepseek_ray.logs import hide_password
from deepseek_ray.paths import RunPaths
from deepseek_ray.report.charts import MODELS, SIDES, draw_all, ranked
from deepseek_ray.report.results import FeatureDrift, Results, Stage, dotted
from deepseek_ray.report.verdict import RATE_OF_THE_BOUND, Scalar, Verdict, judge

PACKAGES = ("torch", "ray", "mlflow", "feast", "lightgbm", "scikit-learn", "polars", "numpy")
PROGRAMS = {
    "data": "ingest --synthetic",
    "train": "train",
    "history": "train",
    "latency": "replay --steady-rate 50",
    "replay": "replay",
    "update": "update",
    "verify": "review",
}
"""Stage -> the verb that writes it, as one types it."""

DEEDS = {"promote": "promoted", "refuse": "refused", "rollback": "rolled back", "delete": "deleted"}
"""Action of the audit table -> what became of the version."""

_TABLE_ROWS = 60


@dataclass(frozen=True)
class RunLink:
    """Where a figure's MLflow run can be looked at.

    Args:
        run_id: the run.
        page: its page in the local MLflow server, once that runs.
        folder: its files relative to the report, or "" when they are not below the run folder.
    """

    run_id: str
    page: str
    folder: str


def render(paths: RunPaths, results: Results, flat: Mapping[str, Scalar]) -> str:
    """The whole page as HTML text."""
    environment = Environment(
        loader=PackageLoader("deepseek_ray.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, score=score, percent=percent, words=words)
    verdicts = judge(flat)
    return environment.get_template("report.html.j2").render(
        run=paths.root.name,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        results=results,
        flat=flat,
        verdicts=verdicts,
        summary=summary(verdicts),
        charts=draw_all(results),
        models=[
            (MODELS.get(name, (name,))[0], model)
            for name, model in ranked(results.train.models if results.train else {})
        ],
        scenarios=scenarios(results),
        deeds=DEEDS,
        sides={side: name for side, (name, _) in SIDES.items()},
        moved=most_moved(results),
        links={name: run_link(paths, results.run_of(name)) for name in PROGRAMS},
        versions=versions(results),
        others=other_fields(results),
        commands=commands(paths, results),
        missing={name: f"deepseek-ray {PROGRAMS[name]} --run {_place(paths.root)}" for name in results.missing},
        rate_of_the_bound=RATE_OF_THE_BOUND,
    )


def summary(verdicts: list[Verdict]) -> dict[str, int]:
    """How many bounds are met, missed and not measured."""
    states = [verdict.state for verdict in verdicts]
    return {state: states.count(state) for state in ("met", "missed", "not measured")}


def scenarios(results: Results) -> dict[str, list[str]]:
    """Scenario -> recall of each model, in the models' order; empty when no model was measured by scenario."""
    models = [model for _, model in ranked(results.train.models if results.train else {})]
    kinds = sorted({kind for model in models for kind in model.by_scenario})
    return {kind: [_short(model.by_scenario.get(kind)) for model in models] for kind in kinds}


def _short(value: float | Mapping[str, float | None] | None) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {score(inner)}" for name, inner in value.items())
    return score(value)


def most_moved(results: Results) -> list[FeatureDrift]:
    """The features that drifted most, at most fifteen."""
    features = results.replay.drift_features if results.replay else []
    return sorted(features, key=lambda one: -(one.psi or 0.0))[:15]


def run_link(paths: RunPaths, stage: Stage | None) -> RunLink | None:
    """The link to the run behind a stage."""
    if stage is None or stage.mlflow_run_id is None:
        return None
    run_id = stage.mlflow_run_id
    uri = stage.tracking_uri or ""
    server = uri.rstrip("/") if uri.startswith(("http://", "https://")) else "http://127.0.0.1:5000"
    safe = re.fullmatch(r"[\w-]+", run_id) is not None  # it becomes a file pattern
    found = next(iter(paths.artifacts.glob(f"**/{run_id}")), None) if safe and paths.artifacts.is_dir() else None
    folder = found.relative_to(paths.root).as_posix() if found else ""
    return RunLink(run_id, f"{hide_password(server)}/#/runs/{run_id}", folder)


def versions(results: Results) -> dict[str, str]:
    """What ran: this interpreter and its packages, and the code of the training run."""
    found = {"deepseek-ray": _version("deepseek-ray"), "python": platform.python_version()}
    found |= {name: _version(name) for name in PACKAGES}
    found["platform"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    found["git commit of the training"] = (results.train.git_commit if results.train else None) or "not recorded"
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def other_fields(results: Results) -> dict[str, list[tuple[str, str]]]:
    """Fields outside the contract, a table a stage; they are shown, never dropped."""
    unknown: dict[str, Any] = {
        name: stage.more for name in PROGRAMS if isinstance(stage := getattr(results, name), Stage)
    }
    tables = {
        name: [(key, number(value)) for key, value in dotted(tree, "")]
        for name, tree in {**unknown, **results.others}.items()
    }
    return {name: rows[:_TABLE_ROWS] for name, rows in tables.items() if rows}


def commands(paths: RunPaths, results: Results) -> list[tuple[str, str]]:
    """(what it does, what to type), in the order a newcomer would."""
    run = _place(paths.root)
    uri = next((stage.tracking_uri for stage in (results.update, results.train) if stage and stage.tracking_uri), "")
    typed = [
        ("serve the champion over HTTP; the API is described under /docs", f"deepseek-ray serve --run {run}"),
        (
            "walk from one decision to its model, data, features and code",
            f"deepseek-ray explain PREDICTION_ID --run {run}",
        ),
        ("prove again that served and offline features agree", f"deepseek-ray verify features --run {run}"),
        ("see who was promoted, when and by which numbers", f"deepseek-ray registry history --run {run}"),
        ("make the previous version champion again", f"deepseek-ray registry rollback --run {run}"),
        ("train a challenger on new labels and let the gate decide", f"deepseek-ray update --run {run}"),
        ("write this page again", f"deepseek-ray report --run {run}"),
    ]
    if not uri.startswith(("http://", "https://")):
        store = shlex.quote(hide_password(uri or paths.tracking_uri))
        typed.insert(0, ("open the links to MLflow runs on this page", f"mlflow ui --backend-store-uri {store}"))
    return typed


def _place(folder: Path) -> str:
    """The folder as one would type it in the working directory."""
    inside = folder.resolve().is_relative_to(Path.cwd())
    return shlex.quote(str(folder.resolve().relative_to(Path.cwd()) if inside else folder))


def number(value: object) -> str:
    """A figure for people: whole numbers with separators, four significant digits, an en dash for nothing."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == int(value) and abs(value) < 1e15:
            return f"{int(value):,}"
        return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def score(value: float | None) -> str:
    """A figure between 0 and 1 with four decimals, so that a column lines up."""
    return "–" if value is None else f"{value:.4f}"


def percent(value: float | None) -> str:
    """A share as a percentage, two significant digits or more."""
    return "–" if value is None else f"{100 * value:.3g} %"


def words(name: str) -> str:
    """A key as words."""
    return name.replace("_", " ")

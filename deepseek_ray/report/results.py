"""What the stages of a run wrote under ``<run>/results``: one JSON file a stage, every stage and every field optional.

Fields that are named here are checked; others are kept and shown as they are. NaN and infinity count as not measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError

from deepseek_ray.errors import SchemaError
from deepseek_ray.logs import hide_password

Measure = Annotated[float, Strict()] | None
Count = Annotated[int, Field(ge=0)] | None
Point = tuple[Measure, Measure]


def _parsed(value: Any) -> Any:
    """The audit table keeps a decision as JSON text."""
    return json.loads(value) if isinstance(value, str) else value


class Part(BaseModel):
    """A checked piece of a result; unknown fields are kept in ``more``."""

    model_config = ConfigDict(extra="allow", frozen=True, coerce_numbers_to_str=True, protected_namespaces=())

    @property
    def more(self) -> dict[str, Any]:
        """Fields that are not named in the contract."""
        return dict(self.model_extra or {})


class Stage(Part):
    """What every stage may say about where its numbers come from."""

    mlflow_run_id: str | None = None
    tracking_uri: str | None = None


class Day(Part):
    """Transactions and frauds of one day, UTC."""

    day: str
    transactions: Count = None
    frauds: Count = None
    by_scenario: dict[str, Annotated[int, Field(ge=0)]] = {}


class Data(Stage):
    """The events that entered the run."""

    source: str | None = None
    num_transactions: Count = None
    num_frauds: Count = None
    fraud_rate: Measure = None
    data_digest: str | None = None
    quarantined: Count = None
    days: list[Day] = []


class Curves(Part):
    """Points of a model's curves: [recall, precision], [false-positive rate, recall], [predicted, observed, rows]."""

    pr: list[Point] = []
    roc: list[Point] = []
    calibration: list[tuple[Measure, Measure, Measure]] = []


class ModelResult(Part):
    """One model on the held-out days."""

    average_precision: Measure = None
    auc: Measure = None
    cp100: Measure = None
    recall_at_1pct_fpr: Measure = None
    calibration_error: Measure = None
    by_scenario: dict[str, Measure | dict[str, Measure]] = {}
    curves: Curves = Curves()


class Train(Stage):
    """The training run with its yardsticks on the same rows and features."""

    seed: int | None = None
    feature_service: str | None = None
    feature_digest: str | None = None
    git_commit: str | None = None
    num_features: Count = None
    rows_train: Count = None
    rows_holdout: Count = None
    label_delay_days: Measure = None
    train_from: str | None = None
    train_to: str | None = None
    holdout_from: str | None = None
    holdout_to: str | None = None
    wall_s: Measure = None
    models: dict[str, ModelResult] = {}
    expert_load: list[list[Measure]] = []
    loss: list[tuple[Measure, Measure, Measure]] = []
    importance: list[tuple[str, Measure]] = []


class ReplayDay(Part):
    """One day as the live service saw it."""

    day: str
    transactions: Count = None
    frauds: Count = None
    average_precision: Measure = None
    threshold: Measure = None
    alerts: Count = None
    psi_max: Measure = None
    ks_max: Measure = None
    model_version: str | None = None


class FeatureDrift(Part):
    """Drift of one feature between the training days and the replay."""

    feature: str
    psi: Measure = None
    ks: Measure = None


class Swap(Part):
    """A change of the served version."""

    at_day: str
    from_version: str | None = None
    to_version: str | None = None


class Replay(Stage):
    """Held-out days played against the HTTP endpoint."""

    base_url: str | None = None
    requests: Count = None
    transactions: Count = None
    feedback: Count = None
    failed: Count = None
    wall_s: Measure = None
    http_p50_ms: Measure = None
    http_p99_ms: Measure = None
    days: list[ReplayDay] = []
    drift_features: list[FeatureDrift] = []
    swaps: list[Swap] = []


class Latency(Stage):
    """Decisions over HTTP at a fixed rate, the client in another process; times count from when a request was due."""

    rate_per_s: Measure = None
    http_achieved_rate: Measure = None
    duration_s: Measure = None
    requests: Count = None
    failed: Count = None
    http_p50_ms: Measure = None
    http_p90_ms: Measure = None
    http_p99_ms: Measure = None
    histogram: list[tuple[Annotated[float, Strict()], Annotated[int, Field(ge=0)]]] = []


class GateCheck(Part):
    """One check of the promotion gate."""

    name: str
    passed: bool
    value: Measure = None
    bound: Measure = None
    detail: str = ""


class Score(Part):
    """Ranking quality of one model on one set of rows."""

    average_precision: Measure = None
    cp100: Measure = None


class Update(Stage):
    """The incremental update: frozen champion, updated challenger and a full retrain on the same rows."""

    champion_version: str | None = None
    challenger_version: str | None = None
    promoted: bool | None = None
    checks: list[GateCheck] = []
    update_failed_requests: Count = None
    seconds_label_to_live: Measure = None
    after_drift: dict[str, Score] = {}
    old_pattern: dict[str, Score] = {}
    update_gain: Measure = None
    update_forgetting: Measure = None


class Verify(Stage):
    """Served vectors and scores against their offline recomputation."""

    feature_rows: Count = None
    feature_differences: Count = None
    served_offline_max_diff: Measure = None


class Decision(Part):
    """The gate's verdict behind a line of the history."""

    checks: list[GateCheck] = []


class HistoryEntry(Part):
    """One line of the registry's audit table."""

    at: str = ""
    action: str
    version: str
    alias: str | None = None
    champion_before: str | None = None
    champion_after: str | None = None
    note: str = ""
    decision: Annotated[Decision, BeforeValidator(_parsed)] = Decision()


_ADAPTERS: dict[str, TypeAdapter[Any]] = {
    "data": TypeAdapter(Data),
    "train": TypeAdapter(Train),
    "history": TypeAdapter(list[HistoryEntry]),
    "latency": TypeAdapter(Latency),
    "replay": TypeAdapter(Replay),
    "run": TypeAdapter(dict[str, Any]),
    "update": TypeAdapter(Update),
    "verify": TypeAdapter(Verify),
}


@dataclass(frozen=True)
class Results:
    """All results of a run; a stage that has not run is None (the history and the run's own figures: empty)."""

    data: Data | None = None
    train: Train | None = None
    history: list[HistoryEntry] = field(default_factory=list)
    latency: Latency | None = None
    replay: Replay | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    update: Update | None = None
    verify: Verify | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> tuple[str, ...]:
        """Stages of the contract without a file."""
        return tuple(name for name in _ADAPTERS if name != "run" and name not in self.raw)

    def run_of(self, name: str) -> Stage | None:
        """The stage whose MLflow run stands behind a stage's numbers: its own, else the training run."""
        for stage in (getattr(self, name, None), self.train):
            if isinstance(stage, Stage) and stage.mlflow_run_id:
                return stage
        return None


def read_results(folder: Path, extra: Mapping[str, Any] | None = None) -> Results:
    """Read and check every ``*.json`` of the folder; an absent folder is a run without results.

    Args:
        folder: ``<run>/results``.
        extra: figures of the run as a whole; they win over those in ``run.json``.

    Raises:
        SchemaError: a file is not JSON, or a field has the wrong type; the message names both.
    """
    raw = {file.stem: _load(file) for file in sorted(folder.glob("*.json"))}
    if extra:
        raw["run"] = {**_check(folder / "run.json", _ADAPTERS["run"], raw.get("run", {})), **extra}
    known = {name: _check(folder / f"{name}.json", _ADAPTERS[name], raw[name]) for name in _ADAPTERS if name in raw}
    others = {name: value for name, value in raw.items() if name not in _ADAPTERS}
    return Results(**known, others=others, raw=raw)


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError) as error:
        raise SchemaError(f"Result file {str(file)!r} is not readable JSON: {error}.", fix=_again(file)) from error


def _check(file: Path, adapter: TypeAdapter[Any], value: Any) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "(top level)"
        found = repr(first.get("input"))[:80]
        raise SchemaError(
            f"Result file {str(file)!r}, field {place} = {found}: {first['msg']}.", fix=_again(file)
        ) from error


def _again(file: Path) -> str:
    return f"run the {file.stem} stage again, or delete the file to leave the stage out"


_IDENTITIES = ("day", "at_day", "feature", "name", "id")
_LONGEST_TEXT = 120


def dotted(value: Any, prefix: str) -> Iterator[tuple[str, float | int | str]]:
    """Every number and short string below a value as ``a.b.c``; curve points stay in the stage's own file."""
    if isinstance(value, bool | int | float):
        yield prefix, int(value) if isinstance(value, bool) else value
    elif isinstance(value, str) and len(value) <= _LONGEST_TEXT:
        yield prefix, hide_password(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key != "curves":
                yield from dotted(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        for key, inner in zip(_keys(value), value, strict=True):
            yield from dotted(inner, f"{prefix}.{key}")


def _keys(items: list[Any] | tuple[Any, ...]) -> list[str]:
    """Names of a list's items: their own identity where all have one and it is unique, else their position."""
    for identity in _IDENTITIES:
        names = [str(item[identity]) for item in items if isinstance(item, dict) and identity in item]
        if len(names) == len(items) == len(set(names)):
            return names
    return [str(position) for position in range(len(items))]

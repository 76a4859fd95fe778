"""A small run that can be served: history in the online store, a model in the registry, promoted."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import torch

from deepseek_ray.config import DataConfig, ModelConfig
from deepseek_ray.data import windows
from deepseek_ray.data.batch_engine import FeatureTable, compute
from deepseek_ray.data.evidence import GATES, Check, GateDecision
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.stream_engine import StreamEngine
from deepseek_ray.data.transactions import generate
from deepseek_ray.models import RiskModel, RiskModelConfig
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import InputSchema, Lineage, Probes, Registry

SEQUENCE_LEN = 16
DELAY_DAYS = 1.0
LINEAGE = Lineage(data_digest="d" * 64, git_commit="c" * 40, train_start="2026-01-01", train_end="2026-02-01")


@dataclass(frozen=True)
class ServedRun:
    """Where it is, the history it was warmed with, and the events that come next."""

    paths: RunPaths
    registry: Registry
    history: pl.DataFrame
    future: pl.DataFrame


def make_run(
    folder: Path,
    *,
    vector: str = "default",
    model: ModelConfig | None = None,
    customers: int = 60,
    days: int = 40,
    future_days: int = 5,
    online_store: str = "",
) -> ServedRun:
    """Make the run. The last event lies a few minutes back, so that live events may follow."""
    end = datetime.now(UTC) - timedelta(minutes=10)
    config = DataConfig(
        num_customers=customers,
        num_terminals=2 * customers,
        start_date=str((end - timedelta(days=days)).date()),
        num_days=days,
        label_delay_days=DELAY_DAYS,
    )
    table = generate(config, 0).filter(pl.col("event_time") < end)
    cut = end - timedelta(days=future_days)
    history, future = table.filter(pl.col("event_time") < cut), table.filter(pl.col("event_time") >= cut)
    paths = RunPaths(folder).create()
    client = FeatureClient(paths, online_store)
    client.apply()
    spec = client.declaration().vector(vector)
    engine = StreamEngine(client.declaration(), spec, client, label_delay_days=DELAY_DAYS, sequence_len=SEQUENCE_LEN)
    client.warm(engine, history)
    client.close()
    registry = Registry.open(paths)
    run = ServedRun(paths, registry, history, future)
    features = compute(history, spec, label_delay_days=DELAY_DAYS, sequence_len=SEQUENCE_LEN)
    add_version(
        run, spec, features, model or ModelConfig(d_model=16, num_layers=1, num_heads=2, d_expert=16, num_bins=4)
    )
    return run


def add_version(
    run: ServedRun, spec: windows.VectorSpec, features: FeatureTable, shape: ModelConfig, seed: int = 0
) -> str:
    """Register a model with random weights and make it champion; returns its version."""
    version = register_version(run, spec, features, shape, seed)
    promote(run.registry, version)
    return version


def register_version(
    run: ServedRun, spec: windows.VectorSpec, features: FeatureTable, shape: ModelConfig, seed: int = 0
) -> str:
    """Register a model with random weights as challenger; returns its version."""
    torch.manual_seed(seed)
    config = RiskModelConfig(
        feature_names=spec.names,
        sequence_len=SEQUENCE_LEN,
        shape=shape,
        feature_service=spec.service,
        feature_digest=spec.digest,
        label_delay_days=DELAY_DAYS,
    )
    net = RiskModel(config)
    label = run.history["is_fraud"].fill_null(0).to_numpy().astype(np.int8)
    net.prepare(features.values.astype(np.float32), label)
    torch.nn.init.normal_(net.linear.weight, std=0.02)
    torch.nn.init.normal_(net.head.weight, std=0.5)
    folder = net.save_pretrained(run.paths.root / f"model-{seed}")
    net = RiskModel.from_pretrained(folder)
    some = slice(0, 64)
    expected = net.predict_proba(features.values[some], features.sequence[some])
    probes = Probes(features=features.values[some], sequence=features.sequence[some], expected=expected)
    schema = InputSchema(
        columns=spec.names,
        sequence_len=SEQUENCE_LEN,
        sequence_channels=features.sequence.shape[2],
        feature_service=spec.service,
        feature_digest=spec.digest,
    )
    with run.registry.tracking.start_run("train") as trained:
        info = run.registry.register(folder, trained.run_id, schema, LINEAGE, probes=probes, tags={"threshold": "0.4"})
    return info.version


def promote(registry: Registry, version: str) -> None:
    """Make a version champion by a decision that passes."""
    checks = tuple(Check(name, True, 0.5, 0.4, "test") for name in GATES)
    champion = registry.version_of("champion")
    registry.promote(version, GateDecision(name="risk", version=version, champion_version=champion, checks=checks))

"""Small models of each kind on disk, and a client that talks to their server in process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import torch

from deepseek_ray.config import Config, ModelConfig, StoreConfig, build_config
from deepseek_ray.config_moe import BackboneConfig
from deepseek_ray.data.evidence import GATES, Check, GateDecision
from deepseek_ray.models import RiskModel, RiskModelConfig
from deepseek_ray.models.backbone import Backbone, init_weights
from deepseek_ray.models.pretrained import save_pretrained
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import InputSchema, Lineage, Registry
from deepseek_ray.serving.model_app import ModelApp
from deepseek_ray.serving.model_service import open_app
from deepseek_ray.serving.model_target import find

KEY = "a-key-for-the-tests-only"
SHAPE = ModelConfig(d_model=8, num_layers=1, num_heads=2, d_expert=8, num_experts=4, num_bins=4)
NAMES = ("amount", "count 1d")


def risk_model(seed: int = 0) -> RiskModel:
    """A small risk model with random weights."""
    torch.manual_seed(seed)
    config = RiskModelConfig(feature_names=NAMES, sequence_len=3, shape=SHAPE, feature_service="s", feature_digest="d")
    model = RiskModel(config)
    rows = np.random.default_rng(seed).normal(size=(50, 2)).astype(np.float32)
    model.prepare(rows, (rows[:, 0] > 1).astype(np.int8))
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


def backbone(folder: Path, **changes: Any) -> Backbone:
    """A small backbone, saved into the folder."""
    small = {"d_model": 16, "num_layers": 2, "d_head": 4, "num_experts": 4, "d_expert": 8, "max_seq_len": 32}
    config = BackboneConfig(**(small | changes))
    model = Backbone(config)
    init_weights(model, config, seed=1)
    for weight in model.parameters():
        weight.data.mul_(8.0)  # far from uniform answers
    save_pretrained(model.eval(), folder)
    return model


def promoted(paths: RunPaths) -> Registry:
    """A store in which version 1 of ``risk`` is the champion."""
    registry = Registry.open(paths)
    model = risk_model()
    folder = model.save_pretrained(paths.root / "saved")
    lineage = Lineage(data_digest="d", git_commit="c", train_start="2026-01-01", train_end="2026-02-01")
    with registry.tracking.start_run("train") as run:
        info = registry.register(folder, run.run_id, InputSchema.of(model.config), lineage)
    checks = tuple(Check(name, True, 0.5, 0.4, "test") for name in GATES)
    decision = GateDecision(name="risk", version=info.version, champion_version=None, checks=checks)
    registry.promote(info.version, decision)
    return registry


def settings(**serving: Any) -> Config:
    """Settings of a service without gRPC."""
    return build_config({"serving": {"rpc_port": -1, **serving}})


@contextmanager
def served(target: Path | str, *, name: str = "m", config: Config | None = None, **where: Any) -> Iterator[ModelApp]:
    """The application of a saved model."""
    chosen = config or settings()
    options = {"paths": RunPaths(Path("none")), "stores": StoreConfig(), "cache": Path("none")} | where
    found = find(str(target), name=name, **options)
    app = cast("ModelApp", open_app(asdict(found), chosen.model_dump(), "cpu", KEY))
    try:
        yield app
    finally:
        app._batcher.close()


def client(app: ModelApp, key: str = KEY) -> httpx.AsyncClient:
    """An HTTP client of the application."""
    headers = {"X-API-Key": key}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test", headers=headers)


async def predict(app: ModelApp, body: Mapping[str, Any], name: str = "m") -> httpx.Response:
    """One request for predictions."""
    async with client(app) as talk:
        return await talk.post(f"/v1/models/{name}/predict", json=body)

"""Warm-start a challenger from the champion on new labels and replayed old rows, ask the gate, promote.

python -m pipelines.risk.update --run runs/mine --url http://127.0.0.1:8000

New rows are the vectors that were served, with the labels that came in; decisions without a label count as genuine
once the label delay has passed. The newest of these days judge champion and challenger and train neither.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from deepseek_ray import models
from deepseek_ray.cli import add_settings, guarded, settings_of
from deepseek_ray.client import RiskClient
from deepseek_ray.config import Config
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.served import matured_rows
from deepseek_ray.errors import ServingError
from deepseek_ray.online.replay import Reservoir
from deepseek_ray.online.threshold import policy_threshold
from deepseek_ray.online.trial import judge
from deepseek_ray.online.updater import UpdateResult, correct, not_remembered, remember, warm_start
from deepseek_ray.paths import RunPaths, write_stage
from deepseek_ray.registry import CHAMPION, InputSchema, Lineage, Probes, Registry, Run, VersionInfo, git_commit
from deepseek_ray.serving.champion import THRESHOLD_TAG

SWAP_TIMEOUT_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Update; exit status 3 when the gate refuses: 1 is a crash, 2 an error."""
    parser = argparse.ArgumentParser(prog="deepseek-ray update", description="Update the champion from feedback.")
    add_settings(parser)
    parser.add_argument("--url", help="wait until the service at this address answers with the new version")
    options = parser.parse_args(argv)
    config, paths = settings_of(options)
    torch.set_num_threads(1)  # the service needs the other core
    registry = Registry.open(paths, config.stores, name=config.model_name, create=False)
    with registry.tracking.start_run("update", tags={"stage": "update"}) as run:
        stage = update(config, paths, registry, run, options.url)
    return 0 if stage["promoted"] else 3


def update(config: Config, paths: RunPaths, registry: Registry, run: Run, url: str | None) -> dict[str, Any]:
    """The whole stage; writes results/update.json and returns it."""
    start = time.perf_counter()
    champion = registry.get(CHAMPION)
    served = matured_rows(paths, champion.schema.columns, champion.schema.feature_digest, config.data.label_delay_days)
    memory, old = _memory(config, paths)
    num_corrected = correct(memory, served)
    new, held_out = not_remembered(memory, served).split_tail(config.update.holdout_fraction)
    target = paths.root / "challenger"
    made = warm_start(champion.path, new, memory, target, config.update, config.train, seed=config.seed)
    info = _register(registry, run, made, new, held_out, config)
    decision = judge(champion, info, held_out, old, config.gate)
    refusal = registry.offer(info.version, decision)
    if not refusal:
        remember(memory, new)
        memory.save(paths.replay_memory)
        if url:
            asyncio.run(_await_swap(url, info.version))
    stage = {
        "champion_version": champion.version, "challenger_version": info.version, "promoted": not refusal,
        "checks": [asdict(check) for check in decision.checks], "mlflow_run_id": run.run_id,
        "tracking_uri": registry.tracking.shown_uri, "seconds_label_to_live": time.perf_counter() - start,
        "rows_new": made.num_new, "rows_replayed": made.num_replayed, "rows_holdout": len(held_out),
        "rows_corrected": num_corrected, "trained_until_us": int(held_out.order_us.max()),
    }  # fmt: skip
    _log(paths, run, stage, made)
    return stage


def _memory(config: Config, paths: RunPaths) -> tuple[Reservoir, RiskDataset]:
    """The replay memory, and held-out rows of the older patterns."""
    old = RiskDataset.load(paths.datasets / "holdout.safetensors")
    if paths.replay_memory.exists():
        return Reservoir.load(paths.replay_memory), old
    memory = Reservoir(config.update.memory_rows, seed=config.seed)
    remember(memory, RiskDataset.load(paths.datasets / "train.safetensors"))
    return memory, old


def _register(
    registry: Registry, run: Run, made: UpdateResult, new: RiskDataset, held_out: RiskDataset, config: Config
) -> VersionInfo:
    model = models.load(made.model_dir)
    probes = Probes.of(model, held_out.features, held_out.sequence)
    scores = model.predict_proba(held_out.features, held_out.sequence)
    tags = {THRESHOLD_TAG: str(policy_threshold(scores, config.serving))}
    days = [str(np.datetime64(int(day), "D")) for day in (new.day.min(), new.day.max())]
    lineage = Lineage(data_digest=new.digest, git_commit=git_commit(), train_start=days[0], train_end=days[1])
    schema = InputSchema.of(model.config)
    return registry.register(made.model_dir, run.run_id, schema, lineage, probes=probes, tags=tags)


async def _await_swap(url: str, version: str) -> None:
    async with RiskClient(url) as client:
        give_up = time.monotonic() + SWAP_TIMEOUT_S
        while (live := (await client.model())["model_version"]) != version:
            if time.monotonic() > give_up:
                raise ServingError(f"{url} still answers with version {live}.", fix="see the service's log")
            await asyncio.sleep(0.2)


def _log(paths: RunPaths, run: Run, stage: dict[str, Any], made: UpdateResult) -> None:
    for record in made.history:
        run.log_metrics(record.numbers(), step=record.epoch)
    run.log_metrics({check["name"]: check["value"] for check in stage["checks"]})
    run.log_dict(stage, "update.json")
    write_stage(paths, "update", stage)
    verdict = "promoted" if stage["promoted"] else "refused"
    print(f"version {stage['challenger_version']} {verdict} after {stage['seconds_label_to_live']:.1f} s")


if __name__ == "__main__":
    sys.exit(guarded(main))

"""Pretrain a Mixture-of-Experts backbone on text, over any mesh; run it again and it goes on where it stopped.

python -m pipelines.moe.train --config small_moe --run runs/moe --set parallel.dp_shard=2 --set step.steps=300
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_ray.cli import guarded
from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.paths import RunPaths, resolve_run, write_stage
from deepseek_ray.presets_moe import MOE_PRESETS, load_moe_preset
from deepseek_ray.registry import Registry, Run, git_commit
from deepseek_ray.report.curves import loss_curve
from deepseek_ray.train.export import export_newest
from deepseek_ray.train.pretrain_trainer import PretrainResult, check_pretraining, pretrain_on_ray, read_progress
from deepseek_ray.train.pretrain_worker import PROGRESS

METRICS = ("loss", "grad_norm", "lr", "min_expert_load", "tokens_per_s", "world_size")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, export, and say where everything is."""
    options = _parser().parse_args(argv)
    config = load_moe_preset(options.config, file=options.file, overrides=options.overrides)
    check_pretraining(config)
    paths = resolve_run(options.run)
    paths.create()
    tracking = Registry.open(paths, config.stores, name="moe").tracking
    with tracking.start_run("pretrain", tags={"stage": "pretrain", "git_commit": git_commit()}) as run:
        run.log_params(config.model_dump(exclude={"stores"}))
        result = pretrain_on_ray(config, paths.checkpoints / "moe", on_lines=lambda lines: _log_lines(run, lines))
        model = export_newest(config, result, paths.root / "model")
        _finish(run, config, result, paths)
    first, last = ("?" if loss is None else f"{loss:.3f}" for loss in (result.first_loss, result.last_loss))
    print(f"loss {first} -> {last} in {config.step.steps} steps, {result.wall_s:.0f} s")
    print(f"model {model}\nNext: deepseek-ray verify mesh --config {options.config} --mesh dp_shard=2,ep=2")
    return 0


def _log_lines(run: Run, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        run.log_metrics({name: line[name] for name in METRICS if line[name] is not None}, step=line["step"])


def _finish(run: Run, config: MoEConfig, result: PretrainResult, paths: RunPaths) -> None:
    lines = list(read_progress(result.folder / PROGRESS).values())
    run.log_figure(loss_curve(lines), "curves/loss.png")
    run.set_tags({"data_digest": result.data_digest})
    write_stage(paths, "pretrain", {
        "mlflow_run_id": run.run_id, "seed": config.seed, "steps": config.step.steps, "data_digest": result.data_digest,
        "first_loss": result.first_loss, "last_loss": result.last_loss, "wall_s": result.wall_s,
    })  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines.moe.train", description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="small_moe", choices=sorted(MOE_PRESETS), help="preset of presets_moe.py")
    parser.add_argument("--file", type=Path, help="YAML file of settings")
    parser.add_argument("--run", help="run folder (default: runs/latest)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.NAME=VALUE")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    sys.exit(guarded(main))

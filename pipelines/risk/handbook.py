"""The fraud detection handbook's published protocol, and what our loop makes of the same days.

python -m pipelines.risk.handbook --data DIR --json OUT
python -m pipelines.risk.handbook --experiment delay --data DIR --json OUT

``protocol`` is one test week beside its yardsticks, ``folds`` four of them, ``delay`` weekly retraining on 7-day labels
against daily increments on 1-day labels, ``new-pattern`` an increment against a full retrain when a fraud pattern is
new. With ``--json`` a plot is written beside the figures where there is one, under the same name with ``.svg``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path

from deepseek_ray.logs import silence_telemetry

silence_telemetry()

# ruff: noqa: E402  the environment above is read when torch and LightGBM are imported
import torch

from deepseek_ray.cli import guarded
from deepseek_ray.data.fraud_patterns import DRIFT_PRESETS
from deepseek_ray.errors import ConfigError
from deepseek_ray.paths import finite
from deepseek_ray.presets import PRESETS, load_preset
from deepseek_ray.report import experiments
from pipelines.risk import handbook_delay, handbook_folds, handbook_pattern, handbook_protocol

EXPERIMENTS = {
    "protocol": handbook_protocol, "folds": handbook_folds, "delay": handbook_delay, "new-pattern": handbook_pattern,
}  # fmt: skip

DEFAULTS = {
    "protocol": {"delay_days": 7, "history_days": 100},
    "folds": {"delay_days": 7, "history_days": 100},
    "delay": {"history_days": 60},
    "new-pattern": {"delay_days": 1, "history_days": 100},
}
"""Options that differ from experiment to experiment."""

MANY_TRAININGS = ("folds", "delay")
"""Experiments that train often, three epochs each: more cost minutes and gain little."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run an experiment, print a table, write JSON and a plot."""
    options = _parser().parse_args(argv)
    if not options.data:
        raise ConfigError("There is no data folder.", fix="give --data DIR with handbook-shaped parquet")
    for name, value in DEFAULTS[options.experiment].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    shorter = ["train.epochs=3"] if options.experiment in MANY_TRAININGS else []
    config = load_preset(options.preset, overrides=[*shorter, *options.overrides, f"seed={options.seed}"])
    torch.set_num_threads(config.train.threads_per_worker)
    experiment, start = EXPERIMENTS[options.experiment], time.perf_counter()
    result = {"experiment": options.experiment, "seed": options.seed, **experiment.run(options, config)}
    result["wall_s"] = time.perf_counter() - start
    print(f"seed {options.seed}", *experiment.show(result), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(finite(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        if options.experiment in experiments.PLOTS:
            target = options.json.with_suffix(".svg")
            experiments.PLOTS[options.experiment](result, target)
            print(target)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepseek-ray handbook", description="Experiments on the handbook's days.")
    add = parser.add_argument
    add("--experiment", choices=list(EXPERIMENTS), default="protocol")
    add("--data", default=os.environ.get("DEEPSEEK_RAY_HANDBOOK"), help="folder of handbook parquet")
    add("--json", type=Path, help="write every figure here")
    add("--train-start", type=date.fromisoformat, default=date(2018, 7, 25))
    add("--train-days", type=_count, default=7)
    add("--delay-days", type=partial(_count, least=0), help="of labels: 7; 'new-pattern' 1; 'delay' compares both")
    add("--test-start", type=date.fromisoformat, default=date(2018, 8, 8))
    add("--test-days", type=_count, default=7)
    add("--weeks", type=_count, default=4, help="test weeks of the experiments that walk forward")
    add("--history-days", type=_count, help="days to train on, with the newest known one last: 100; 'delay' 60")
    add("--pattern", choices=[name for name in DRIFT_PRESETS if name != "none"], default="terminal-night")
    add("--seed", type=int, default=0)
    add("--preset", default="handbook", choices=sorted(PRESETS))
    add("--set", dest="overrides", action="append", default=[], metavar="SECTION.NAME=VALUE")
    return parser


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


if __name__ == "__main__":
    sys.exit(guarded(main))

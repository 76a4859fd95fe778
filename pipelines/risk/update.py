"""Warm-start a challenger from the champion on new labels, ask the gate, promote.

python -m pipelines.risk.update --run runs/mine --policy replay --url http://127.0.0.1:8000

New rows are the vectors that were served, with the labels that came in; decisions without a label count as genuine
once the label delay has passed. The newest of these days judge champion and challenger and train neither.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from deepseek_ray.cli import add_settings, guarded, settings_of
from deepseek_ray.errors import DataError
from deepseek_ray.online.cycle import update
from deepseek_ray.online.ledger import Ledger
from deepseek_ray.online.triggers import EXIT_STATUS
from deepseek_ray.online.updater import STRATEGIES
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import Registry
from deepseek_ray.serving.release_desk import ReleaseDesk


def main(argv: Sequence[str] | None = None) -> int:
    """Update; exit status 3 when the gate refuses: 1 is a crash, 2 an error."""
    parser = argparse.ArgumentParser(prog="deepseek-ray update", description="Update the champion from feedback.")
    add_settings(parser)
    parser.add_argument("--policy", choices=sorted(STRATEGIES), help="short for --set update.strategy=...")
    parser.add_argument(
        "--release",
        choices=("direct", "canary"),
        help="how a version goes live that the gate passed; short for --set update.release=...",
    )
    parser.add_argument("--url", help="after a promotion wait until the service at this address answers with it")
    parser.add_argument(
        "--set-aside",
        type=Path,
        metavar="CSV",
        help="train on no decision of this file's column prediction_id, and end",
    )
    parser.add_argument("--reason", default="", help="why, with --set-aside")
    options = parser.parse_args(argv)
    if options.policy:
        options.overrides.append(f"update.strategy={options.policy}")
    if options.release:
        options.overrides.append(f"update.release={options.release}")
    config, paths = settings_of(options)
    if options.set_aside:
        return set_aside(paths, options.set_aside, options.reason)
    torch.set_num_threads(1)  # the service needs the other core
    registry = Registry.open(paths, config.stores, name=config.model_name, create=False)
    desk = ReleaseDesk(registry, config)
    stage = update(config, paths, registry, options.url, desk if config.update.release == "canary" else None)
    if stage["released"]:
        print(desk.standing() or "the release has ended, see deepseek-ray traffic show")
    return EXIT_STATUS["refused" if stage["refusal"] else "promoted"]


def set_aside(paths: RunPaths, file: Path, reason: str) -> int:
    """Note decisions whose labels are not to be trusted."""
    with file.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    if not rows or "prediction_id" not in rows[0]:
        raise DataError(f"{str(file)!r} has no rows with a column 'prediction_id'.", fix="write one id a line below it")
    added = Ledger(paths.updates).set_aside((row["prediction_id"] for row in rows), reason)
    print(f"{added} decisions set aside, {len(rows) - added} were before")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))

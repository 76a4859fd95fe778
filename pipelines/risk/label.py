"""Choose decisions to send for labelling under a budget; writes their ids as CSV, or as JSON.

python -m pipelines.risk.label --run runs/mine --budget 100 --out to_label.csv

The pool is what was served in the newest days and has no label. Labels come back by POST /feedback like all others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from deepseek_ray.cli import add_settings, guarded, settings_of
from deepseek_ray.config import Config
from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.prediction_archive import read_predictions, stack_sequences, stack_values
from deepseek_ray.errors import ConfigError, DataError
from deepseek_ray.online.acquisition import EXPLORE, choose
from deepseek_ray.online.ledger import Ledger
from deepseek_ray.paths import RunPaths, replace_text
from deepseek_ray.registry import CHAMPION, Registry

SHOWN = ("prediction_id", "transaction_id", "event_time", "card_id", "amount_cents", "probability", "decision")


def main(argv: Sequence[str] | None = None) -> int:
    """Choose, write, say how many."""
    parser = argparse.ArgumentParser(prog="deepseek-ray label", description="Choose decisions to send for labelling.")
    add_settings(parser)
    parser.add_argument("--budget", type=int, required=True, help="decisions that can be labelled")
    parser.add_argument("--days", type=float, default=7.0, help="how far back to look from the newest (default: 7)")
    parser.add_argument(
        "--explore", type=float, default=EXPLORE, help=f"share of the budget drawn at random (default: {EXPLORE})"
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write, .csv or .json")
    options = parser.parse_args(argv)
    _check(options)
    config, paths = settings_of(options)
    queue = label_queue(config, paths, options.budget, options.days, options.explore)
    if options.out.suffix == ".json":
        replace_text(options.out, json.dumps(queue.to_dicts(), indent=2, default=str) + "\n")
    else:
        replace_text(options.out, queue.write_csv())
    print(f"{queue.height} decisions to label -> {options.out}")
    return 0


def label_queue(config: Config, paths: RunPaths, budget: int, days: float, explore: float) -> pl.DataFrame:
    """The chosen decisions with what a person needs to look them up; ``why`` is "telling" or "explore".

    Raises:
        DataError: no decision of these days lacks a label.
    """
    champion = Registry.open(paths, config.stores, name=config.model_name, create=False).get(CHAMPION)
    logged = read_predictions(paths).filter(pl.col("feature_digest") == champion.schema.feature_digest)
    since_us = int(logged["order_us"].max() or 0) - round(days * DAY_US)  # type: ignore[arg-type]
    aside = list(Ledger(paths.updates).ids_set_aside())
    pool = logged.filter(
        pl.col("is_fraud").is_null() & (pl.col("order_us") >= since_us) & ~pl.col("prediction_id").is_in(aside)
    )
    if not pool.height:
        raise DataError(f"No decision of the newest {days:g} days lacks a label.", fix="give more --days")
    values, sequences = stack_values(pool), stack_sequences(pool)
    choice = choose(champion.load().model, values, sequences, budget, explore=explore, seed=config.seed)
    why = pl.Series("why", ["explore" if one else "telling" for one in choice.explored.tolist()])
    return pool[choice.rows.tolist()].select(SHOWN).with_columns(why)


def _check(options: argparse.Namespace) -> None:
    if options.budget < 1:
        raise ConfigError(f"--budget {options.budget} labels nothing.", fix="give 1 or more")
    if not 0.0 <= options.explore <= 1.0:
        raise ConfigError(f"--explore {options.explore:g} is no share.", fix="give a number from 0 to 1")
    if options.days <= 0:
        raise ConfigError(f"--days {options.days:g} looks at nothing.", fix="give a number above 0")
    if options.out.suffix not in (".csv", ".json"):
        raise ConfigError(f"--out {str(options.out)!r} is neither .csv nor .json.", fix="choose one of the two")


if __name__ == "__main__":
    sys.exit(guarded(main))

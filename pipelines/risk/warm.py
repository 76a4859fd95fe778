"""Bring the live feature state to where the history ends: every transaction before the replay days.

python -m pipelines.risk.warm --run runs/mine
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import polars as pl

from deepseek_ray.cli import add_settings, guarded, settings_of
from deepseek_ray.config import Config
from deepseek_ray.data import table
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.periods import periods
from deepseek_ray.data.stream_engine import StreamEngine
from deepseek_ray.errors import FeatureError
from deepseek_ray.paths import RunPaths


def main(argv: Sequence[str] | None = None) -> int:
    """Warm the state of the configured vector; prints how many cards, terminals and devices now have a history."""
    parser = argparse.ArgumentParser(prog="deepseek-ray warm", description="Fill the live feature state from history.")
    add_settings(parser)
    config, paths = settings_of(parser.parse_args(argv))
    states = warm(config, paths)
    print(f"{states} feature states stand at the end of the history. Next: deepseek-ray serve --run {paths.root}")
    return 0


def warm(config: Config, paths: RunPaths) -> int:
    """Load the history into the online store; returns the number of states written."""
    if paths.used == "served":  # what was served since would be gone from the states
        raise FeatureError(f"The run {str(paths.root)!r} has been served already.", fix="warm before the first serve")
    transactions = table.read(paths.transactions)
    days = periods(transactions, config.data)
    client = FeatureClient(paths, config.stores.online_store)
    declaration = client.declaration()
    engine = StreamEngine(
        declaration,
        declaration.vector(config.features.vector),
        client,
        label_delay_days=config.data.label_delay_days,
        sequence_len=config.features.sequence_len,
    )
    try:
        return client.warm(engine, transactions.filter(pl.col("order_us") < days.replay.start_us))
    finally:
        client.close()


if __name__ == "__main__":
    sys.exit(guarded(main))

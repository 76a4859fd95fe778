"""Active learning against random labels at the same budget, on generated data.

python -m tests.bench.bench_active --seeds 7 --out tests/bench/active.csv

A model knows a few labelled days. Then decisions are served whose labels nobody knows; a budget of them is labelled in
rounds, chosen by online/acquisition.py or at random, and after each round the model is updated by replay. What counts
is average precision on later days: (active - start) / (random - start). ``full`` is the same update with every label of
the pool. With ``--drift new-device`` the pool holds a pattern that the model has never seen and scores as harmless.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepseek_ray import models
from deepseek_ray.config import DataConfig, ModelConfig, TrainConfig, UpdateConfig
from deepseek_ray.data import source, windows
from deepseek_ray.data.batch_engine import compute
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.periods import card_numbers
from deepseek_ray.metrics import average_precision
from deepseek_ray.models import RiskModel, RiskModelConfig
from deepseek_ray.online.acquisition import choose
from deepseek_ray.online.replay import Reservoir
from deepseek_ray.online.updater import remember, warm_start
from deepseek_ray.train.step import Recipe, train_in_process
from tests.bench.results import append

TRAIN_DAYS, POOL_DAYS, TEST_DAYS, WARM_UP_DAYS = 4, 12, 15, 10
DELAY_DAYS, SEQUENCE_LEN = 1.0, 8
SHAPE = ModelConfig(d_model=32, num_layers=1, num_heads=4, num_experts=4, d_expert=32, num_bins=8, dropout=0.1)
TRAIN = TrainConfig(batch_size=128, negative_rate=0.3)
UPDATE = UpdateConfig(epochs=6, lr=1e-3, replay_fraction=0.8, min_labels=1)


def make_days(seed: int, customers: int, drift: str) -> tuple[RiskDataset, RiskDataset, RiskDataset]:
    """Rows of the labelled days, of the pool and of the test; a drift begins with the pool."""
    days = WARM_UP_DAYS + TRAIN_DAYS + POOL_DAYS + TEST_DAYS
    config = DataConfig(
        num_customers=customers, num_terminals=2 * customers, num_days=days, label_delay_days=DELAY_DAYS,
        drift=drift, drift_start_day=WARM_UP_DAYS + TRAIN_DAYS,
    )  # fmt: skip
    table = source.load(config, seed)
    spec = windows.load().vector("default")
    found = compute(table, spec, label_delay_days=DELAY_DAYS, sequence_len=SEQUENCE_LEN)
    label = table["is_fraud"].fill_null(0).to_numpy()
    rows = RiskDataset.build(
        found.values, found.sequence, label, table["order_us"].to_numpy(), card_numbers(table["card_id"]),
        feature_names=spec.names,
    )  # fmt: skip
    first = int(rows.day.min()) + WARM_UP_DAYS
    cut = [first, first + TRAIN_DAYS, first + TRAIN_DAYS + POOL_DAYS, first + TRAIN_DAYS + POOL_DAYS + TEST_DAYS]
    parts = [rows.select((rows.day >= start) & (rows.day < end)) for start, end in itertools.pairwise(cut)]
    return parts[0], parts[1], parts[2]


def start_model(rows: RiskDataset, folder: Path, seed: int) -> Path:
    """A model of the labelled days."""
    torch.manual_seed(seed)
    model = RiskModel(RiskModelConfig(feature_names=rows.feature_names, sequence_len=SEQUENCE_LEN, shape=SHAPE))
    model.prepare(rows.features, rows.label)
    train_in_process(model, rows, Recipe.of(TRAIN, seed=seed, epochs=4, lr=2e-3))
    return model.save_pretrained(folder)


def precision(folder: Path, rows: RiskDataset) -> float:
    """Average precision of a saved model."""
    return average_precision(rows.label, models.load(folder, torch.float32).predict_proba(rows.features, rows.sequence))


def learn(
    kind: str, start: Path, known: RiskDataset, pool: RiskDataset, budget: int, rounds: int, folder: Path, seed: int
) -> tuple[Path, int]:
    """Label the budget in rounds; returns the last model and how many frauds were found."""
    labelled = np.zeros(len(pool), dtype=bool)
    current = start
    memory = Reservoir(30_000, seed=seed)
    remember(memory, known)
    for number in range(rounds):
        open_rows = np.flatnonzero(~labelled)
        if kind == "random":
            picked = np.random.default_rng([seed, number]).choice(len(open_rows), budget // rounds, replace=False)
        else:
            model = models.load(current, torch.float32)
            part = pool.select(open_rows)
            picked = choose(model, part.features, part.sequence, budget // rounds, seed=seed * 100 + number).rows
        labelled[open_rows[picked]] = True
        target = folder / f"{kind}-{number}"
        # from the first model each time, on all that is labelled by now: rounds differ in rows and not in steps
        current = warm_start(start, pool.select(labelled), memory, target, UPDATE, TRAIN, seed=seed).model_dir
    return current, int(pool.label[labelled].sum())


def run(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One seed: its own data, model and draws."""
    known, pool, test = make_days(seed, options.customers, options.drift)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = start_model(known, folder / "start", seed)
        line: dict[str, Any] = {
            "seed": seed,
            "budget": options.budget,
            "pool": len(pool),
            "pool_frauds": int(pool.label.sum()),
        }
        line |= {"drift": options.drift, "known_frauds": int(known.label.sum()), "start": precision(start, test)}
        memory = Reservoir(30_000, seed=seed)
        remember(memory, known)
        every = warm_start(start, pool, memory, folder / "full", UPDATE, TRAIN, seed=seed).model_dir
        line["full"] = precision(every, test)
        for kind in ("random", "active"):
            made, frauds = learn(kind, start, known, pool, options.budget, options.rounds, folder, seed)
            line |= {kind: precision(made, test), f"{kind}_frauds": frauds}
    line["ratio"] = (line["active"] - line["start"]) / (line["random"] - line["start"])
    print(json.dumps({key: _short(value) for key, value in line.items()}), flush=True)
    return line


def main() -> None:
    """Run all seeds, write a line each, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=7)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--customers", type=int, default=400)
    parser.add_argument("--drift", default="none", help="preset of data/fraud_patterns.py")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [run(seed, options) for seed in range(options.first_seed, options.first_seed + options.seeds)]
    gain = {kind: float(np.median([line[kind] - line["start"] for line in lines])) for kind in ("active", "random")}
    low, middle, high = np.percentile([line["ratio"] for line in lines], [25, 50, 75])
    print(
        f"gain {gain}, ratio of medians {gain['active'] / gain['random']:.2f}; "
        f"ratio {middle:.2f} ({low:.2f} to {high:.2f})"
    )
    if options.out:
        append([{key: _short(value) for key, value in line.items()} for line in lines], list(lines[0]), options.out)


def _short(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()

"""Small random worlds for the feature tests: ties, shared devices, late labels, new and silent cards."""

from __future__ import annotations

import numpy as np
import polars as pl

from deepseek_ray.data.events import CHANNELS, DAY_US

START_US = 1_767_225_600_000_000  # 2026-01-01


def world(
    rows: int, seed: int, *, cards: int = 12, terminals: int = 8, days: float = 100.0, delay: float = 7.0
) -> pl.DataFrame:
    """A transactions table in arrival order; a third of the frauds get their label late."""
    rng = np.random.default_rng(seed)
    event = START_US + np.sort(rng.integers(0, int(days * 86_400), rows) // 40 * 40) * 1_000_000  # many ties
    if rows > 20:
        event[rows // 2 : rows // 2 + 6] = event[rows // 2]
        event.sort()
    ids = {
        "card_id": [f"c{i}" for i in rng.integers(0, cards, rows)],
        "terminal_id": [f"t{i}" for i in rng.integers(0, terminals, rows) ** 2],
        "device_id": ["unknown" if i < 2 else f"d{i}" for i in rng.integers(0, 9, rows)],
    }
    order = assign_order(event, ids)
    fraud = rng.random(rows) < 0.15
    label = order + max(int(delay * DAY_US), 1) + np.where(rng.random(rows) < 0.3, rng.integers(0, 9 * DAY_US, rows), 0)
    is_fraud = [None if rng.random() < 0.1 else int(f) for f in fraud]
    return pl.DataFrame(
        {
            "transaction_id": [f"x{i}" for i in range(rows)],
            "event_time": pl.Series(event).cast(pl.Datetime("us", "UTC")),
            "order_us": order,
            **ids,
            "amount_cents": np.where(
                rng.random(rows) < 0.1, 100 * rng.integers(1, 9, rows), rng.integers(0, 10**6, rows)
            ),
            "channel": [CHANNELS[i] for i in rng.integers(0, 5, rows)],
            "country": [["unknown", "de", "fr"][i] for i in rng.integers(0, 3, rows)],
            "merchant_category": [f"m{i}" for i in rng.integers(0, 4, rows)],
            "is_fraud": pl.Series(is_fraud, dtype=pl.Int8),
            "fraud_scenario": pl.Series(np.zeros(rows), dtype=pl.Int8),
            "label_us": [int(at) if known is not None else None for at, known in zip(label, is_fraud, strict=True)],
        },
        schema_overrides={"label_us": pl.Int64},
    )


def assign_order(event: np.ndarray, ids: dict[str, list[str]]) -> np.ndarray:
    """Event times made strictly increasing within each card, terminal and device, by arrival."""
    last: dict[tuple[str, str], int] = {}
    order = np.empty_like(event)
    for row, time in enumerate(event):
        keys = [(column, values[row]) for column, values in ids.items() if values[row] != "unknown"]
        order[row] = max([int(time), *(last[key] + 1 for key in keys if key in last)])
        last.update(dict.fromkeys(keys, int(order[row])))
    return order

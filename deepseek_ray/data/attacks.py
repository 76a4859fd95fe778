"""When and how often a fraud pattern strikes, and its payments among those of an existing table.

The generator (transactions.py) draws the same times and bursts for its own world; :func:`inject` puts a pattern into
any transactions table, of which only cards, terminals, times and amounts are used.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.fraud_patterns import FraudPattern
from deepseek_ray.data.table import to_table
from deepseek_ray.errors import DataError

Ints = npt.NDArray[np.int64]


def draw_daily(expected: float, num_days: int, population: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(day, member) pairs: ``expected`` different members a day; a fraction is spread evenly, from day 0 on."""
    total = np.ceil(np.arange(num_days + 1) * expected - 1e-9).astype(np.int64)
    drawn: list[tuple[int, int]] = []
    for day, count in enumerate(np.diff(total)):
        members = rng.choice(population, min(int(count), population), replace=False)
        drawn.extend((day, int(member)) for member in members)
    return drawn


def bursts(pattern: FraudPattern, day: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """For each burst the number of its attack and its start in microseconds since day 0."""
    num_bursts = rng.integers(*pattern.num_bursts, len(day))
    attack = np.repeat(np.arange(len(day)), num_bursts)
    later = np.arange(len(attack)) - np.repeat(np.cumsum(num_bursts) - num_bursts, num_bursts)
    hour = rng.uniform(*pattern.start_hour, len(attack))
    return attack, (day[attack] + later) * DAY_US + (hour * 3_600_000).astype(np.int64) * 1_000


def since_burst_us(burst: Ints, num_events: Ints, gap_s: tuple[float, float], rng: np.random.Generator) -> Ints:
    """Microseconds from the start of its burst to each payment."""
    gap_us = (rng.uniform(*gap_s, len(burst)) * 1_000).astype(np.int64) * 1_000
    total = np.cumsum(gap_us)
    first = np.cumsum(num_events) - num_events
    return total - total[first][burst] if len(burst) else gap_us


def inject(
    table: pl.DataFrame, pattern: FraudPattern, *, first_day: int, label_delay_days: float, seed: int
) -> pl.DataFrame:
    """The table and, from a day on, the payments of a pattern: frauds with ``fraud_scenario = pattern.scenario``.

    They are made on cards of the table at any of its terminals; an amount is a factor of the mean genuine amount of
    its card before that day. Device, country, channel and category are ``unknown``, so that on a table which has none
    nothing gives the pattern away but amounts, times and terminals.

    Args:
        table: transactions table.
        pattern: rates, bursts, amounts and hours of the frauds.
        first_day: day 0 of the pattern, a day number since 1970-01-01 (UTC).
        label_delay_days: of the injected labels.
        seed: of every draw.

    Raises:
        DataError: the table does not reach from before ``first_day`` to a day of the pattern.
    """
    day = table["event_time"].dt.date().cast(pl.Int32).to_numpy()
    before = table.filter(pl.Series(day < first_day) & (pl.col("is_fraud") == 0))
    end = int(day.max(initial=0)) + 1
    if before.is_empty() or end <= first_day + pattern.start_day:
        raise DataError(
            f"The pattern {pattern.name!r} cannot begin on {np.datetime64(first_day, 'D')}: the table has no genuine "
            "payment before, or none after.",
            fix="choose a day inside the data",
        )
    cards = before.group_by("card_id", maintain_order=True).agg(pl.col("amount_cents").mean()).sort("card_id")
    made = _payments(pattern, cards, before["terminal_id"].unique().sort(), first_day, end, np.random.default_rng(seed))
    added = to_table(made, label_delay_days=label_delay_days)
    return to_table(pl.concat([table, added]), label_delay_days=label_delay_days)


def _payments(
    pattern: FraudPattern, cards: pl.DataFrame, terminals: pl.Series, first_day: int, end: int, rng: np.random.Generator
) -> pl.DataFrame:
    begin = first_day + pattern.start_day
    length = end - begin if pattern.num_days is None else min(end - begin, pattern.num_days)
    drawn = np.array(draw_daily(pattern.cards_a_day * len(cards) / 1_000, length, len(cards), rng), dtype=np.int64)
    drawn = drawn.reshape(-1, 2)
    attack, start_us = bursts(pattern, drawn[:, 0] + begin, rng)
    num_events = rng.integers(*pattern.num_events, len(attack))
    burst = np.repeat(np.arange(len(attack)), num_events)
    time_us = start_us[burst] + since_burst_us(burst, num_events, pattern.gap_s, rng)
    card = drawn[:, 1][attack][burst]
    low, high = np.log(pattern.amount_factor)
    factor = np.exp(rng.uniform(low, high, len(card)))
    amount = np.maximum(np.rint(cards["amount_cents"].to_numpy()[card] * factor), 1).astype(np.int64)
    frame = pl.DataFrame(
        {
            "transaction_id": [f"{pattern.name}-{number:09d}" for number in range(len(card))],
            "event_time": pl.Series(time_us).cast(pl.Datetime("us")).dt.replace_time_zone("UTC"),
            "card_id": cards["card_id"].gather(card),
            "terminal_id": terminals.gather(rng.integers(0, len(terminals), len(card))),
            "amount_cents": amount,
            "is_fraud": pl.Series(np.ones(len(card)), dtype=pl.Int8),
            "fraud_scenario": pl.Series(np.full(len(card), pattern.scenario), dtype=pl.Int8),
        }
    )
    return frame.filter(pl.Series(time_us < end * DAY_US))

"""Seeded generator of card payments with labelled fraud.

Customers, terminals, amounts, times and the fraud scenarios 1-3 follow the published specification of the simulator in
*Reproducible Machine Learning for Credit Card Fraud Detection - Practical Handbook* (Le Borgne, Siblini, Lebichot,
Bontempi, 2022), implemented from its description. Device, channel, country and merchant category are our own: they
follow the owner's habits and carry no trace of scenarios 1-3, which therefore stay as hard as published. Drift
presets (fraud_patterns.py) add payments of other kinds, whose traces are in these attributes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.spatial import cKDTree

from deepseek_ray.config import DataConfig
from deepseek_ray.data.attacks import bursts, draw_daily, since_burst_us
from deepseek_ray.data.events import DAY_US, to_us
from deepseek_ray.data.fraud_patterns import FraudPattern, drift_preset
from deepseek_ray.data.table import UNKNOWN, to_table
from deepseek_ray.errors import ConfigError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

# The published world. Smaller worlds keep its density: as many terminals in reach and frauds a payment.
MAP_SIZE = 100.0
REACH_RADIUS = 5.0
PUBLISHED_TERMINALS = 10_000
PUBLISHED_CUSTOMERS = 5_000
LARGE_AMOUNT_CENTS = 22_000
TERMINALS_A_DAY, TERMINAL_FRAUD_DAYS = 2, 28
CUSTOMERS_A_DAY, CUSTOMER_FRAUD_DAYS, CUSTOMER_FRAUD_FACTOR = 3, 14, 5

COUNTRIES = ("FR", "DE", "BE", "NL", "ES", "IT", "PL", "SE")
HOME_BORDERS = (45.0, 72.0, 88.0)
"""x where the map passes from one of the first countries to the next; the others are only travelled to."""

KINDS = ("physical", "online", "atm")
KIND_SHARES = (0.70, 0.25, 0.05)
CATEGORIES: dict[str, dict[str, float]] = {
    "physical": {
        "grocery": 0.35,
        "restaurant": 0.22,
        "fuel": 0.13,
        "fashion": 0.10,
        "pharmacy": 0.10,
        "home": 0.05,
        "electronics": 0.05,
    },
    "online": {"fashion": 0.25, "digital": 0.22, "electronics": 0.18, "home": 0.15, "travel": 0.12, "gaming": 0.08},
    "atm": {"cash": 1.0},
}

CONTACTLESS_LIMIT_CENTS = 5_000
CONTACTLESS_SHARE = 0.8
WALLET_SHARE = 0.4
SECOND_DEVICE_SHARE = 0.5
SECOND_DEVICE_USE = 0.25
DEVICE_LIFE_DAYS = 700.0
GUEST_DEVICE_SHARE = 0.015
AWAY_SHARE = 0.015
_OWN_DEVICES = 3
_NO_DEVICE = -1


@dataclass(frozen=True)
class World:
    """Customers and terminals. Arrays of shape (num_customers,) or (num_terminals,)."""

    mean_amount: Floats
    rate_a_day: Floats
    home: Ints
    has_wallet: Flags
    has_second_device: Flags
    new_phone_day: Floats
    terminal_kind: Ints
    terminal_category: npt.NDArray[np.str_]
    terminal_country: Ints
    reach: Ints
    reach_start: Ints

    @property
    def num_customers(self) -> int:
        """Number of cards."""
        return len(self.home)

    @property
    def num_terminals(self) -> int:
        """Number of terminals."""
        return len(self.terminal_kind)


@dataclass(frozen=True)
class Rows:
    """Payments as columns of shape (n,)."""

    card: Ints
    terminal: Ints
    day: Ints
    time_us: Ints
    amount_cents: Ints
    scenario: Ints
    device: Ints
    country: Ints


def generate(config: DataConfig, seed: int) -> pl.DataFrame:
    """Generate a transactions table with the columns of TRANSACTION_COLUMNS.

    The same config and seed give the same table. Two configs that differ in the drift alone share every payment that
    does not belong to the drift.

    Raises:
        ConfigError: the start date, the drift preset or its start day is not valid.
    """
    start_us = _start_us(config)
    schedule = drift_preset(config.drift)
    drift_day = drift_start_day(config)
    streams = np.random.SeedSequence(seed).spawn(4 + len(schedule))
    world_rng, payment_rng, fraud_rng, habit_rng, *drift_rngs = (np.random.default_rng(stream) for stream in streams)
    world = _make_world(config, world_rng)
    rows = _add_frauds(_make_payments(world, config.num_days, payment_rng), world, config.num_days, fraud_rng)
    parts = [_add_habits(rows, world, habit_rng)]
    for index, (pattern, rng) in enumerate(zip(schedule, drift_rngs, strict=True)):
        parts.append(_attack(pattern, world, drift_day, config.num_days, _first_new_device(world, index), rng))
    return _to_frame(_concat(parts), world, start_us, config.label_delay_days)


def drift_start_day(config: DataConfig) -> int:
    """Day of the data on which the drift preset's day 0 falls.

    Raises:
        ConfigError: a drift is asked for that begins after the data end.
    """
    day = max(0, config.num_days - config.replay_days) if config.drift_start_day is None else config.drift_start_day
    if config.drift != "none" and day >= config.num_days:
        fix = f"choose a day below data.num_days={config.num_days}, or set data.replay_days"
        raise ConfigError(f"Setting 'data.drift_start_day' = {day} lies behind the last day.", fix=fix)
    return day


def _start_us(config: DataConfig) -> int:
    try:
        day = date.fromisoformat(config.start_date)
    except ValueError as error:
        raise ConfigError(
            f"Setting 'data.start_date' = {config.start_date!r} is no date.", fix="write it as 2026-01-31"
        ) from error
    return to_us(datetime(day.year, day.month, day.day, tzinfo=UTC))


def _make_world(config: DataConfig, rng: np.random.Generator) -> World:
    customers, terminals = config.num_customers, config.num_terminals
    customer_xy = rng.uniform(0, MAP_SIZE, (customers, 2))
    terminal_xy = rng.uniform(0, MAP_SIZE, (terminals, 2))
    kind = rng.choice(len(KINDS), terminals, p=KIND_SHARES)
    reach, reach_start = _reachable(customer_xy, terminal_xy)
    return World(
        mean_amount=rng.uniform(5, 100, customers),
        rate_a_day=rng.uniform(0, 4, customers),
        home=_country_at(customer_xy),
        has_wallet=rng.random(customers) < WALLET_SHARE,
        has_second_device=rng.random(customers) < SECOND_DEVICE_SHARE,
        new_phone_day=rng.uniform(0, DEVICE_LIFE_DAYS, customers),
        terminal_kind=kind,
        terminal_category=_categories(kind, rng),
        terminal_country=_country_at(terminal_xy),
        reach=reach,
        reach_start=reach_start,
    )


def _country_at(points_xy: Floats) -> Ints:
    return np.searchsorted(HOME_BORDERS, points_xy[:, 0]).astype(np.int64)


def _categories(kind: Ints, rng: np.random.Generator) -> npt.NDArray[np.str_]:
    chosen = np.full(len(kind), UNKNOWN, dtype="U16")
    for code, name in enumerate(KINDS):
        members = np.flatnonzero(kind == code)
        shares = CATEGORIES[name]
        chosen[members] = rng.choice(list(shares), len(members), p=list(shares.values()))
    return chosen


def _reachable(customer_xy: Floats, terminal_xy: Floats) -> tuple[Ints, Ints]:
    """Terminals in reach of each customer as one flat array and its (num_customers + 1,) start offsets."""
    radius = REACH_RADIUS * max(1.0, PUBLISHED_TERMINALS / len(terminal_xy)) ** 0.5
    tree = cKDTree(terminal_xy)
    near = tree.query_ball_point(customer_xy, radius, return_sorted=True)
    nearest = np.asarray(tree.query(customer_xy)[1], dtype=np.int64)
    lists = [np.array(found or [nearest[row]], dtype=np.int64) for row, found in enumerate(near)]
    return np.concatenate(lists), np.concatenate([[0], np.cumsum([len(found) for found in lists])]).astype(np.int64)


def _make_payments(world: World, num_days: int, rng: np.random.Generator) -> Rows:
    counts = rng.poisson(world.rate_a_day[:, None], (world.num_customers, num_days))
    card, day = (np.repeat(axis.ravel(), counts.ravel()) for axis in np.indices(counts.shape))
    time_s = rng.normal(43_200, 20_000, len(card))
    inside = (time_s > 0) & (time_s < 86_400)
    card, day, time_s = card[inside], day[inside], time_s[inside]
    mean = world.mean_amount[card]
    amount = rng.normal(mean, mean / 2)
    amount = np.where(amount < 0, rng.uniform(0, 2 * mean), amount)
    size = np.diff(world.reach_start)[card]
    terminal = world.reach[world.reach_start[card] + (rng.random(len(card)) * size).astype(np.int64)]
    nothing = np.zeros(len(card), dtype=np.int64)
    time_us = (time_s * 1_000).astype(np.int64) * 1_000  # card networks stamp milliseconds
    return Rows(card, terminal, day, time_us, np.rint(amount * 100).astype(np.int64), nothing, nothing, nothing)


def _add_frauds(rows: Rows, world: World, num_days: int, rng: np.random.Generator) -> Rows:
    """Scenarios 1, 2 and 3 in the published order: a later one takes over the label."""
    amount = rows.amount_cents.copy()
    scenario = np.where(amount > LARGE_AMOUNT_CENTS, 1, 0)
    terminals_a_day = TERMINALS_A_DAY * world.num_terminals / PUBLISHED_TERMINALS
    by_terminal = _DaySlices(rows.terminal, rows.day, num_days)
    for day, terminal in draw_daily(terminals_a_day, num_days, world.num_terminals, rng):
        scenario[by_terminal.rows(terminal, day, TERMINAL_FRAUD_DAYS)] = 2
    customers_a_day = CUSTOMERS_A_DAY * world.num_customers / PUBLISHED_CUSTOMERS
    by_card = _DaySlices(rows.card, rows.day, num_days)
    for day, card in draw_daily(customers_a_day, num_days, world.num_customers, rng):
        candidates = by_card.rows(card, day, CUSTOMER_FRAUD_DAYS)
        hit = rng.choice(candidates, len(candidates) // 3, replace=False) if len(candidates) else candidates
        amount[hit] *= CUSTOMER_FRAUD_FACTOR
        scenario[hit] = 3
    return Rows(rows.card, rows.terminal, rows.day, rows.time_us, amount, scenario, rows.device, rows.country)


class _DaySlices:
    """Finds the rows of one key over some days."""

    def __init__(self, key: Ints, day: Ints, num_days: int) -> None:
        self.num_days = num_days
        position = key * num_days + day
        self.order = np.argsort(position, kind="stable")
        self.position = position[self.order]

    def rows(self, key: int, day: int, length: int) -> Ints:
        first = key * self.num_days + day
        last = key * self.num_days + min(day + length, self.num_days)
        low, high = np.searchsorted(self.position, [first, last])
        return self.order[low:high]


def _add_habits(rows: Rows, world: World, rng: np.random.Generator) -> Rows:
    """Give payments the device and country that their owner would show; blind to the fraud label."""
    online = world.terminal_kind[rows.terminal] == KINDS.index("online")
    with_phone = online | (_is_contactless(rows, world) & world.has_wallet[rows.card])
    device = np.where(with_phone, _own_device(rows.card, rows.day, online, world, rng), _NO_DEVICE)
    guests = np.flatnonzero(online & (rng.random(len(online)) < GUEST_DEVICE_SHARE))
    borrowed = rng.integers(0, world.num_customers, len(guests)) * _OWN_DEVICES
    fresh = world.num_customers * _OWN_DEVICES + np.arange(len(guests))
    device[guests] = np.where(rng.random(len(guests)) < 0.5, borrowed, fresh)
    home = np.where(online, world.home[rows.card], world.terminal_country[rows.terminal])
    away = online & (rng.random(len(online)) < AWAY_SHARE)
    country = np.where(away, _foreign(home, rng), home)
    return Rows(rows.card, rows.terminal, rows.day, rows.time_us, rows.amount_cents, rows.scenario, device, country)


def _own_device(card: Ints, day: Ints, online: Flags, world: World, rng: np.random.Generator) -> Ints:
    """Phone 0, replaced by phone 1 one day, or for some online payments the second device 2."""
    phone = (day >= world.new_phone_day[card]).astype(np.int64)
    second = online & world.has_second_device[card] & (rng.random(len(card)) < SECOND_DEVICE_USE)
    return card * _OWN_DEVICES + np.where(second, 2, phone)


def _foreign(home: Ints, rng: np.random.Generator) -> Ints:
    return (home + rng.integers(1, len(COUNTRIES), len(home))) % len(COUNTRIES)


def _is_contactless(rows: Rows, world: World) -> Flags:
    """Small payments at a physical terminal, most of the time; decided by the time stamp, so that it needs no draw."""
    physical = world.terminal_kind[rows.terminal] == KINDS.index("physical")
    habit = (rows.time_us // 1_000 * 7 + rows.card * 13) % 100 < 100 * CONTACTLESS_SHARE
    return physical & (rows.amount_cents <= CONTACTLESS_LIMIT_CENTS) & habit


def _first_new_device(world: World, pattern: int) -> int:
    # Far above the guests' devices, and never shared between patterns.
    return (pattern + 1) * 100_000_000 + world.num_customers * _OWN_DEVICES


def _attack(
    pattern: FraudPattern, world: World, drift_day: int, num_days: int, first_device: int, rng: np.random.Generator
) -> Rows:
    """The payments of one scheduled pattern; those behind the last day are cut off."""
    begin = drift_day + pattern.start_day
    length = max(0, min(num_days - begin, pattern.num_days if pattern.num_days is not None else num_days))
    cards_a_day = pattern.cards_a_day * world.num_customers / 1_000
    drawn = np.array(draw_daily(cards_a_day, length, world.num_customers, rng), dtype=np.int64).reshape(-1, 2)
    attack, burst_us = bursts(pattern, drawn[:, 0] + begin, rng)
    card = drawn[:, 1][attack]
    num_events = rng.integers(*pattern.num_events, len(card))
    burst = np.repeat(np.arange(len(card)), num_events)
    time_us = burst_us[burst] + since_burst_us(burst, num_events, pattern.gap_s, rng)
    attack, card = attack[burst], card[burst]
    terminal = rng.choice(_targets(pattern, world), len(card))
    low, high = np.log(pattern.amount_factor)
    factor = np.exp(rng.uniform(low, high, len(card)))
    amount = np.maximum(np.rint(world.mean_amount[card] * factor * 100), 1).astype(np.int64)
    device, country = _traces(pattern, world, len(drawn), attack, card, terminal, first_device, rng)
    day = time_us // DAY_US
    rows = Rows(card, terminal, day, time_us % DAY_US, amount, np.full(len(card), pattern.scenario), device, country)
    return _take(rows, day < num_days)


def _targets(pattern: FraudPattern, world: World) -> Ints:
    right_kind = world.terminal_kind == KINDS.index(pattern.kind)
    right_category = np.isin(world.terminal_category, pattern.categories or world.terminal_category)
    for mask in (right_kind & right_category, right_kind):
        if mask.any():
            return np.flatnonzero(mask)
    return np.arange(world.num_terminals)  # a tiny world may lack the kind altogether


def _traces(
    pattern: FraudPattern,
    world: World,
    num_attacks: int,
    attack: Ints,
    card: Ints,
    terminal: Ints,
    first_device: int,
    rng: np.random.Generator,
) -> tuple[Ints, Ints]:
    """Device and country that an attack shows; one choice an attack."""
    is_new = rng.random(num_attacks) < pattern.new_device_share
    new_device = first_device + np.arange(num_attacks) // pattern.cards_a_device
    abroad = rng.random(num_attacks) < pattern.foreign_share
    offset = rng.integers(1, len(COUNTRIES), num_attacks)
    if pattern.kind != "online":
        return np.full(len(card), _NO_DEVICE), world.terminal_country[terminal]
    device = np.where(is_new[attack], new_device[attack], card * _OWN_DEVICES)
    country = np.where(abroad[attack], (world.home[card] + offset[attack]) % len(COUNTRIES), world.home[card])
    return device, country


def _take(rows: Rows, mask: Flags) -> Rows:
    return Rows(*(getattr(rows, field.name)[mask] for field in fields(Rows)))


def _concat(parts: list[Rows]) -> Rows:
    return Rows(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Rows)))


def _to_frame(rows: Rows, world: World, start_us: int, label_delay_days: float) -> pl.DataFrame:
    order = np.lexsort((rows.card, rows.time_us, rows.day))
    rows = Rows(*(getattr(rows, field.name)[order] for field in fields(Rows)))
    kind = world.terminal_kind[rows.terminal]
    channel = np.select(
        [kind == KINDS.index("online"), kind == KINDS.index("atm"), _is_contactless(rows, world)], [2, 3, 1], default=0
    )
    event_us = pl.Series(start_us + rows.day * DAY_US + rows.time_us)
    columns: dict[str, Any] = {
        "transaction_id": _names("tx", np.arange(len(order)), width=9),
        "event_time": event_us.cast(pl.Datetime("us")).dt.replace_time_zone("UTC"),
        "card_id": _names("c", rows.card),
        "terminal_id": _names("t", rows.terminal),
        "amount_cents": rows.amount_cents,
        "device_id": _device_names(rows.device),
        "channel": _pick(("chip", "contactless", "online", "atm"), channel),
        "country": _pick(COUNTRIES, rows.country),
        "merchant_category": _pick(tuple(world.terminal_category.tolist()), rows.terminal),
        "is_fraud": pl.Series(rows.scenario > 0).cast(pl.Int8),
        "fraud_scenario": pl.Series(rows.scenario).cast(pl.Int8),
    }
    return to_table(pl.DataFrame(columns), label_delay_days=label_delay_days)


def _names(prefix: str, numbers: Ints, *, width: int = 1) -> pl.Series:
    text = pl.Series("number", numbers).cast(pl.String).str.zfill(width)
    return text.to_frame().select(pl.lit(prefix) + pl.col("number")).to_series()


def _pick(names: tuple[str, ...], codes: Ints) -> pl.Series:
    return pl.Series(list(names), dtype=pl.String).gather(codes)


def _device_names(codes: Ints) -> pl.Series:
    """Fingerprints that hide whose device it is: an odd multiplier permutes the 32-bit numbers."""
    known, inverse = np.unique(codes, return_inverse=True)
    names = [UNKNOWN if code == _NO_DEVICE else f"d{int(code) * 2_654_435_761 % 2**32:08x}" for code in known]
    return pl.Series(names, dtype=pl.String).gather(inverse)

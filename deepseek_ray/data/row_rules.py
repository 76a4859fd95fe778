"""What makes one row a transaction: conversions and reasons of rejection, as polars expressions.

Each rule gives the converted value and, for wrong rows, one reason that starts with the field's name. A row is
rejected for its first reason, in the order of the fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

import polars as pl

from deepseek_ray.data.events import CHANNELS, MAX_AMOUNT_CENTS
from deepseek_ray.data.mapping import AMOUNT_FIELDS, EPOCH_UNITS, FIELDS, FileMapping
from deepseek_ray.data.table import UNKNOWN
from deepseek_ray.errors import SchemaError

IDENTIFIER = r"^[A-Za-z0-9][A-Za-z0-9_.:\-]{0,63}$"
CODE = r"^[A-Za-z0-9_\-]{1,32}$"
_OFFSET = r"(Z|[+-]\d{2}:?\d{2})$"
_ISO_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M")
_TRUE, _FALSE = ("1", "1.0", "true"), ("0", "0.0", "false")
_CLOCK_SKEW = timedelta(days=1)


@dataclass(frozen=True)
class Rule:
    """One field of a row.

    Attributes:
        field: name in a mapping.
        column: name in the transactions table (``label_us`` for ``label_time``).
        value: the converted value; anything where a check fails.
        checks: (condition of a wrong row, reason), first match counts.
    """

    field: str
    column: str
    value: pl.Expr
    checks: tuple[tuple[pl.Expr, str], ...]

    @property
    def reason(self) -> pl.Expr:
        """The reason of rejection, null for a good row."""
        return pl.coalesce(
            *(pl.when(wrong.fill_null(False)).then(pl.lit(f"{self.field}: {why}")) for wrong, why in self.checks)
        )


def rules_for(mapping: FileMapping, source: pl.Schema, now: datetime) -> list[Rule]:
    """The rules of all mapped fields and defaults.

    Args:
        mapping: which column feeds which field.
        source: types of the source columns.
        now: the present; later events are rejected.

    Raises:
        SchemaError: a mapped column has a type that no rule can read.
    """
    rules = []
    for field in FIELDS:
        column = mapping.source_of(field)
        if column is not None:
            rules.append(_rule(field, column, source[column], mapping, now))
        elif field in mapping.defaults:
            rules.append(_rule(field, None, pl.String(), mapping, now))
    return rules


def _rule(field: str, column: str | None, dtype: pl.DataType, mapping: FileMapping, now: datetime) -> Rule:
    if dtype.is_nested() or dtype in (pl.Binary, pl.Object, pl.Time, pl.Duration):
        raise SchemaError(
            f"Column {column!r} has type {dtype}, which no field can be.", fix="use text, numbers or times"
        )
    raw = pl.lit(None, dtype=pl.String) if column is None else pl.col(column)
    if field in AMOUNT_FIELDS:
        return _amount(field, raw, dtype)
    if field in ("event_time", "label_time"):
        return _time(field, raw, dtype, mapping, now)
    text = _text(raw, field, mapping)
    if field == "is_fraud":
        return _label(text)
    if field == "fraud_scenario":
        return _scenario(text)
    return _name(field, text)


def _text(raw: pl.Expr, field: str, mapping: FileMapping) -> pl.Expr:
    """Text without outer blanks, coded values replaced; null when empty and without a default."""
    text = raw.cast(pl.String).str.strip_chars()
    if field in mapping.values:
        text = text.replace(mapping.values[field])
    filled = pl.when(text != "").then(text)
    return filled.fill_null(pl.lit(mapping.defaults[field])) if field in mapping.defaults else filled


def _name(field: str, text: pl.Expr) -> Rule:
    if field in ("transaction_id", "card_id", "terminal_id"):
        return Rule(
            field, field, text, ((text.is_null(), "missing"), (~text.str.contains(IDENTIFIER), "not an identifier"))
        )
    text = text.fill_null(UNKNOWN)
    if field == "channel":
        text = text.str.to_lowercase()
        return Rule(field, field, text, ((~text.is_in(list(CHANNELS)), f"not one of {', '.join(CHANNELS)}"),))
    pattern, what = (IDENTIFIER, "an identifier") if field == "device_id" else (CODE, "a code of letters and digits")
    return Rule(field, field, text, ((~text.str.contains(pattern), f"not {what}"),))


def _label(text: pl.Expr) -> Rule:
    low = text.str.to_lowercase()
    value = pl.when(low.is_in(_TRUE)).then(1).when(low.is_in(_FALSE)).then(0).cast(pl.Int8)
    return Rule(
        "is_fraud", "is_fraud", value, ((low.is_not_null() & value.is_null(), "not 0, 1, true, false or empty"),)
    )


def _scenario(text: pl.Expr) -> Rule:
    value = text.fill_null("0").cast(pl.Int8, strict=False)
    return Rule("fraud_scenario", "fraud_scenario", value, ((value.is_null() | (value < 0), "not a number in 0..127"),))


def _amount(field: str, raw: pl.Expr, dtype: pl.DataType) -> Rule:
    """Exact cents: text and decimals digit by digit, floats only when they are the float nearest to a whole cent."""
    factor = 100 if field == "amount" else 1
    if dtype.is_float():
        return _float_amount(field, raw.cast(pl.Float64), factor)
    text = raw.cast(pl.String).str.strip_chars()
    parts = text.str.extract_groups(r"^[+]?(\d{1,15})(?:\.(\d*?)0*)?$")
    whole, fraction = parts.struct[0].cast(pl.Int64, strict=False), parts.struct[1].fill_null("")
    digits = 2 if field == "amount" else 0
    cents = whole * factor + fraction.str.pad_end(digits, "0").str.head(digits).cast(pl.Int64, strict=False).fill_null(
        0
    )
    finer = "finer than a cent" if digits else "not a whole number of cents"
    return Rule(
        field,
        "amount_cents",
        cents,
        (
            (text.is_null() | (text == ""), "missing"),
            (text.str.contains(r"^-\d"), "negative"),
            (text.str.contains(r"^[+]?\d{16,}"), "too large"),
            (whole.is_null(), "not a number"),
            (fraction.str.len_chars() > digits, finer),
            (cents > MAX_AMOUNT_CENTS, "too large"),
        ),
    )


def _float_amount(field: str, amount: pl.Expr, factor: int) -> Rule:
    usable = pl.when(amount.is_finite() & (amount.abs() <= 2 * MAX_AMOUNT_CENTS)).then(amount)
    cents = (usable * factor).round()
    close = (cents / factor - amount).abs() <= 1e-9 * pl.max_horizontal(pl.lit(1.0), amount.abs())
    finer = "finer than a cent" if factor > 1 else "not a whole number of cents"
    return Rule(
        field,
        "amount_cents",
        cents.cast(pl.Int64),
        (
            (amount.is_null(), "missing"),
            (~amount.is_finite(), "not a number"),
            (amount < 0, "negative"),
            (usable.is_null() | (cents > MAX_AMOUNT_CENTS), "too large"),
            (~close, finer),
        ),
    )


def _time(field: str, raw: pl.Expr, dtype: pl.DataType, mapping: FileMapping, now: datetime) -> Rule:
    empty = raw.is_null() if dtype != pl.String else (raw.is_null() | (raw.str.strip_chars() == ""))
    time = _utc(raw, dtype, mapping)
    unreadable = f"not a time of format {mapping.time_format} in {mapping.timezone}"
    checks = [
        (~empty & time.is_null(), unreadable),
        (time < pl.lit(datetime(1970, 1, 1, tzinfo=now.tzinfo)), "before 1970"),
        (time > pl.lit(now + _CLOCK_SKEW), "in the future"),
    ]
    if field == "event_time":
        return Rule(field, field, time, ((empty, "missing"), *checks))
    return Rule(field, "label_us", time.dt.epoch("us"), tuple(checks))


def _utc(raw: pl.Expr, dtype: pl.DataType, mapping: FileMapping) -> pl.Expr:
    if isinstance(dtype, pl.Datetime) and dtype.time_zone is not None:
        return raw.cast(pl.Datetime("us", dtype.time_zone)).dt.convert_time_zone("UTC")
    if dtype.is_temporal():
        return _localised(raw.cast(pl.Datetime("us")), mapping.timezone)
    if mapping.time_format in EPOCH_UNITS:
        ticks = raw.cast(pl.Decimal(38, 6), strict=False) * EPOCH_UNITS[mapping.time_format]
        return ticks.cast(pl.Int64, strict=False).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    text = raw.cast(pl.String).str.strip_chars()
    if mapping.time_format != "iso8601":
        return _localised(text.str.to_datetime(mapping.time_format, time_unit="us", strict=False), mapping.timezone)
    return _iso8601(text, mapping.timezone)


def _iso8601(text: pl.Expr, timezone: str) -> pl.Expr:
    """``2026-01-31 12:30:00.25`` with a blank or a T, seconds and fraction optional, with or without an offset."""
    bare = text.str.replace(_OFFSET, "").str.strip_chars().str.replace("T", " ", literal=True)
    clock = pl.coalesce(*(bare.str.to_datetime(form, time_unit="us", strict=False) for form in _ISO_FORMATS))
    offset = text.str.extract(_OFFSET)
    digits = offset.str.replace_all(r"[+:\-Z]", "")
    minutes = digits.str.head(2).cast(pl.Int64, strict=False) * 60 + digits.str.tail(2).cast(pl.Int64, strict=False)
    east = pl.when(offset.str.starts_with("-")).then(-minutes).otherwise(minutes).fill_null(0)
    absolute = (clock - pl.duration(minutes=east)).dt.replace_time_zone("UTC")
    return pl.when(offset.is_not_null()).then(absolute).otherwise(_localised(clock, timezone))


def _localised(clock: pl.Expr, timezone: str) -> pl.Expr:
    local = clock.dt.replace_time_zone(timezone, ambiguous="earliest", non_existent="null")
    return local.dt.convert_time_zone("UTC")

"""How the columns of a user's file become fields of a transaction, as a YAML file."""

from __future__ import annotations

import codecs
import difflib
from collections.abc import Sequence
from pathlib import Path
from zoneinfo import ZoneInfo

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deepseek_ray.errors import ConfigError, SchemaError

OPTIONAL_FIELDS = ("device_id", "channel", "country", "merchant_category", "is_fraud", "fraud_scenario", "label_time")
AMOUNT_FIELDS = ("amount", "amount_cents")
FIELDS = ("transaction_id", "event_time", "card_id", "terminal_id", *AMOUNT_FIELDS, *OPTIONAL_FIELDS)
"""Fields a column may feed. ``amount`` is in currency units with at most two decimals, ``amount_cents`` in cents;
``label_time`` is when the truth about the payment became known."""

EPOCH_UNITS = {"epoch_s": 1_000_000, "epoch_ms": 1_000, "epoch_us": 1}
"""Microseconds in one unit of a numeric time."""


class FileMapping(BaseModel):
    """Source columns and how to read them. Unknown keys are errors.

    Attributes:
        columns: source column -> field; source columns not named here are not used.
        timezone: IANA zone of times that carry no offset. A local time that happens twice is the first one.
        time_format: ``iso8601``, ``epoch_s``, ``epoch_ms``, ``epoch_us`` or a strptime format without an offset.
        values: field -> source value -> our value, for coded channels, countries and labels.
        defaults: field -> value where the source has no column or leaves it empty.
        encoding: of a CSV file.
        delimiter: of a CSV file, one character.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    columns: dict[str, str]
    timezone: str = "UTC"
    time_format: str = "iso8601"
    values: dict[str, dict[str, str]] = Field(default_factory=dict)
    defaults: dict[str, str] = Field(default_factory=dict)
    encoding: str = "utf-8"
    delimiter: str = Field(",", min_length=1, max_length=1)

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (KeyError, OSError, ValueError) as error:
            raise ValueError(f"{value!r} is no IANA time zone, such as Europe/Paris") from error
        return value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            codecs.lookup(value)
        except LookupError as error:
            raise ValueError(f"{value!r} is no encoding, such as utf-8 or latin-1") from error
        return value

    @model_validator(mode="after")
    def _check_fields(self) -> FileMapping:
        targets = list(self.columns.values())
        for name in (*targets, *self.values, *self.defaults):
            if name not in FIELDS:
                near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.0)
                raise ValueError(f"{name!r} is no field; did you mean {near[0]!r}?")
        twice = sorted({name for name in targets if targets.count(name) > 1})
        if twice:
            raise ValueError(f"the fields {twice} are fed by more than one column")
        missing = [name for name in ("transaction_id", "event_time", "card_id", "terminal_id") if name not in targets]
        if missing or sum(name in targets for name in AMOUNT_FIELDS) != 1:
            raise ValueError(f"columns must feed {missing or 'exactly one of amount and amount_cents'}")
        unusable = sorted(set(self.defaults) - set(OPTIONAL_FIELDS))
        if unusable:
            raise ValueError(f"the fields {unusable} may have no default")
        return self

    def source_of(self, field: str) -> str | None:
        """The source column that feeds a field."""
        return next((column for column, target in self.columns.items() if target == field), None)

    def check_header(self, header: Sequence[str], file: Path) -> None:
        """Raise when the file has a column twice or lacks one.

        Raises:
            SchemaError: names the columns that are missing and those that were found.
        """
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise SchemaError(f"The file {str(file)!r} names the columns {twice} twice.", fix="rename one of each")
        missing = [name for name in self.columns if name not in header]
        if missing:
            fix = "correct 'columns' or 'delimiter' in the mapping, or add the columns to the file"
            raise SchemaError(f"The file {str(file)!r} lacks the columns {missing}; found {list(header)}.", fix=fix)


def load_mapping(file: Path) -> FileMapping:
    """Read a mapping from YAML.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong.
    """
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"The mapping {str(file)!r} cannot be read: {error}.", fix="give a UTF-8 YAML file"
        ) from error
    try:
        return FileMapping.model_validate(loaded)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "mapping"
        message = f"The mapping {str(file)!r}: {where}: {first['msg']}."
        raise ConfigError(message, fix="see docs/risk-pipeline.md for an example") from error


def identity_mapping(header: Sequence[str], file: Path) -> FileMapping:
    """The mapping of a file whose columns already have our names; other columns are not used.

    Raises:
        SchemaError: a required field is missing.
    """
    try:
        return FileMapping(columns={name: name for name in header if name in FIELDS})
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        fix = "give a mapping with --map"
        raise SchemaError(f"The file {str(file)!r} has the columns {list(header)}: {reason}.", fix=fix) from error

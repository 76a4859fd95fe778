"""The feature declaration: which key, aggregation and window make each feature of each vector.

``features/windows.yaml`` is the only place where features are named. Both engines compute from the
:class:`VectorSpec` read here, and Feast registers one service a vector from the same file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from deepseek_ray.data.events import CHANNELS, DAY_US, SECOND_US
from deepseek_ray.errors import FeatureError

DECLARATION = Path(__file__).parents[1] / "features" / "windows.yaml"  # a symlink here, files in the wheel
FORMULA_VERSION = 1
"""``version`` of the declaration and part of every digest: raise both when a formula changes its value."""

_UNITS_US = {"m": 60 * SECOND_US, "h": 3_600 * SECOND_US, "d": DAY_US}

LARGE_WINDOW_US = 30 * DAY_US
"""An event is large against the card's earlier events in this window."""

EVENT_AGGREGATIONS = (
    "count", "sum", "mean", "std", "max", "rank", "ratio", "zscore", "large_count",
    "distinct_terminals", "distinct_cards", "since_last_s", "since_first_s", "cold",
)  # fmt: skip
DELAYED_AGGREGATIONS = (
    "delayed_count", "fraud_count", "fraud_share", "since_last_fraud_s", "since_first_fraud_s",
    "clean_since_fraud", "clean_ratio",
)  # fmt: skip
MERCHANT_BUCKETS = 8
REQUEST_BLOCKS: dict[str, tuple[str, ...]] = {
    "amount_cents": ("amount_cents",),
    "round_amount": ("round_amount",),
    "weekend": ("weekend",),
    "night": ("night",),
    "hour_sin": ("hour_sin",),
    "hour_cos": ("hour_cos",),
    "weekday": tuple(f"weekday_{day}" for day in range(7)),
    "channel": tuple(f"channel_{name}" for name in CHANNELS),
    "merchant_bucket": tuple(f"merchant_bucket_{bucket}" for bucket in range(MERCHANT_BUCKETS)),
    "country_known": ("country_known",),
    "device_known": ("device_known",),
}
"""Features of the request alone, by the name used in the declaration."""

OWNERS = {"card_id": "card", "terminal_id": "terminal", "device_id": "device"}
"""Columns whose values have a history of their own."""


@dataclass(frozen=True)
class Feature:
    """One windowed feature: ``aggregation`` of the ``key``'s events in a window of ``window_us`` microseconds."""

    name: str
    key: str
    aggregation: str
    window_us: int

    @property
    def delayed(self) -> bool:
        """True when the feature waits for labels."""
        return self.aggregation in DELAYED_AGGREGATIONS


@dataclass(frozen=True)
class VectorSpec:
    """One feature vector: request features first, then windowed ones, in declaration order.

    Attributes:
        name: ``default``, ``wide``, ``handbook`` or another vector of the declaration.
        service: Feast service that serves it, with its version.
        digest: sha256 of everything that decides the vector's values.
        request: names of the features of the request alone.
        features: the windowed features.
        keys: the columns of each key the vector uses.
    """

    name: str
    service: str
    digest: str
    request: tuple[str, ...]
    features: tuple[Feature, ...]
    keys: Mapping[str, tuple[str, ...]]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Column names of the vector, ``len(names)`` = F."""
        return self.request + tuple(feature.name for feature in self.features)

    @cached_property
    def windows_us(self) -> dict[str, tuple[int, ...]]:
        """Ascending windows each key needs."""
        return {key: tuple(sorted({f.window_us for f in self.features if f.key == key})) for key in self.keys}

    @cached_property
    def owners(self) -> tuple[str, ...]:
        """Whose histories the vector needs: card, terminal, device; the card's always, for the sequence."""
        needed = {OWNERS[columns[0]] for columns in self.keys.values()} | {"card"}
        return tuple(owner for owner in OWNERS.values() if owner in needed)

    def positions(self, owner: str) -> list[int]:
        """Columns of the vector that come from an owner's history, ascending."""
        named = enumerate(self.features, len(self.request))
        return [position for position, feature in named if OWNERS[self.keys[feature.key][0]] == owner]

    def horizon_us(self, owner: str, delay_us: int) -> int:
        """How far back an owner's (card, terminal, device) events matter, in microseconds.

        A card also keeps its events for LARGE_WINDOW_US after their label delay: a label that becomes known later than
        the card's horizon after its event is not counted by any feature, in both engines.
        """
        needed = [DAY_US, LARGE_WINDOW_US + delay_us if owner == "card" else 0]
        for feature in self.features:
            if OWNERS[self.keys[feature.key][0]] == owner:
                needed.append(feature.window_us + (delay_us if feature.delayed else 0))
        return max(needed)


@dataclass(frozen=True)
class Declaration:
    """All vectors of one declaration file."""

    vectors: Mapping[str, VectorSpec]

    def vector(self, name: str) -> VectorSpec:
        """The vector of that name.

        Raises:
            FeatureError: the declaration has no such vector.
        """
        if name not in self.vectors:
            raise FeatureError(f"Unknown feature vector {name!r}.", fix=f"choose one of {', '.join(self.vectors)}")
        return self.vectors[name]


def load(path: Path | None = None) -> Declaration:
    """Read a declaration; without a path, features/windows.yaml of the checkout.

    Raises:
        FeatureError: the file is missing or one of its entries is wrong (the entry is named).
    """
    source = path or DECLARATION
    try:
        tree = yaml.safe_load(source.read_text(encoding="utf-8"))
        if tree["version"] != FORMULA_VERSION:
            problem = (
                f"Feature declaration {str(source)!r} has version {tree['version']!r}, the formulas {FORMULA_VERSION}."
            )
            raise FeatureError(problem, fix="use a declaration and a library of one release")
        keys = {key: tuple(columns) for key, columns in tree["keys"].items()}
        vectors = {name: _vector(name, body, keys) for name, body in tree["vectors"].items()}
    except OSError as error:
        problem = f"Feature declaration {str(source)!r} cannot be read: {error.strerror}."
        raise FeatureError(problem, fix="run from a checkout of the repository") from error
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        problem = f"Feature declaration {str(source)!r} is malformed: {error!r}."
        raise FeatureError(problem, fix="compare it with docs/features.md") from error
    return Declaration(vectors)


def window_us(text: str) -> int:
    """Microseconds of a window such as ``10m``, ``6h`` or ``30d``.

    Raises:
        FeatureError: the text is no window.
    """
    match = re.fullmatch(r"([1-9]\d*)([mhd])", text)
    if match is None:
        raise FeatureError(f"Window {text!r} is not understood.", fix="write a number and m, h or d, for example 30d")
    return int(match[1]) * _UNITS_US[match[2]]


def _vector(name: str, body: Mapping[str, Any], keys: Mapping[str, tuple[str, ...]]) -> VectorSpec:
    request = tuple(column for block in body.get("request", []) for column in _request_block(name, block))
    features = _grid(name, body.get("events", []), keys, EVENT_AGGREGATIONS)
    features += _grid(name, body.get("delayed", []), keys, DELAYED_AGGREGATIONS)
    names = [*request, *(feature.name for feature in features)]
    twice = {column for column in names if names.count(column) > 1}
    if twice:
        raise FeatureError(f"Vector {name!r} declares {sorted(twice)[0]!r} twice.", fix="remove one of them")
    used = {key: keys[key] for key in dict.fromkeys(feature.key for feature in features)}
    text = json.dumps(
        [FORMULA_VERSION, {k: list(c) for k, c in keys.items()}, body], sort_keys=True, separators=(",", ":")
    )
    return VectorSpec(name, body["service"], hashlib.sha256(text.encode()).hexdigest(), request, tuple(features), used)


def _request_block(vector: str, block: str) -> tuple[str, ...]:
    if block not in REQUEST_BLOCKS:
        raise FeatureError(
            f"Vector {vector!r} asks for request feature {block!r}.", fix=f"choose from {', '.join(REQUEST_BLOCKS)}"
        )
    return REQUEST_BLOCKS[block]


def _grid(
    vector: str, blocks: list[dict[str, Any]], keys: Mapping[str, tuple[str, ...]], allowed: tuple[str, ...]
) -> list[Feature]:
    features = []
    for block in blocks:
        key = block["key"]
        if key not in keys:
            raise FeatureError(f"Vector {vector!r} uses the unknown key {key!r}.", fix=f"choose from {', '.join(keys)}")
        for aggregation in block["aggregations"]:
            _check(vector, key, keys[key], aggregation, allowed)
            names = {f"{key}_{aggregation}_{window}": window_us(window) for window in block["windows"]}
            features += [Feature(name, key, aggregation, width) for name, width in names.items()]
    return features


def _check(vector: str, key: str, columns: tuple[str, ...], aggregation: str, allowed: tuple[str, ...]) -> None:
    where = f"Vector {vector!r}: aggregation {aggregation!r} of key {key!r}"
    if aggregation not in allowed:
        raise FeatureError(f"{where} is not known here.", fix=f"choose from {', '.join(allowed)}")
    if columns[0] not in OWNERS or (len(columns) > 1 and columns[0] != "card_id"):
        raise FeatureError(f"{where}: {columns[0]!r} keeps no such history.", fix="start the key with card_id")
    if len(columns) > 1 and aggregation in DELAYED_AGGREGATIONS:
        raise FeatureError(f"{where}: labels are kept by card, terminal and device.", fix="use a key of one column")
    kept_by = _KEPT_BY.get(aggregation, (columns,))
    if columns not in kept_by:
        raise FeatureError(f"{where} is not kept for this key.", fix=f"use it with {kept_by}")


_KEPT_BY: dict[str, tuple[tuple[str, ...], ...]] = {
    "distinct_terminals": (("card_id",),),
    "large_count": (("card_id",),),
    "distinct_cards": (("terminal_id",), ("device_id",)),
}

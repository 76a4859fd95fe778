"""Rows that a model is trained and judged on, as plain arrays.

Legend: n rows, F features, N recent events, C channels of one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from deepseek_ray.data.events import DAY_US
from deepseek_ray.errors import DataError

UNKNOWN = -1
"""Label of a row whose truth is not known yet."""

_TYPES = {
    "features": np.float32, "sequence": np.float32, "label": np.int8, "order_us": np.int64, "day": np.int32,
    "card": np.int64, "amount_cents": np.int64, "scenario": np.int8,
}  # fmt: skip


@dataclass(frozen=True)
class RiskDataset:
    """Aligned arrays, one row a transaction.

    Args:
        features: (n, F) float32.
        sequence: (n, N, C) float32, newest event first, age -1 where there is none.
        label: (n,) 1 fraud, 0 genuine, -1 unknown.
        order_us: (n,) event time in microseconds, in the order of events.
        day: (n,) day number since 1970-01-01, UTC.
        card: (n,) card as a number.
        amount_cents: (n,) amount in cents.
        scenario: (n,) kind of fraud, 0 when none or unknown.
        feature_names: F names.

    Raises:
        DataError: lengths or types do not fit, or a number is not finite.
    """

    features: NDArray[np.float32]
    sequence: NDArray[np.float32]
    label: NDArray[np.int8]
    order_us: NDArray[np.int64]
    day: NDArray[np.int32]
    card: NDArray[np.int64]
    amount_cents: NDArray[np.int64]
    scenario: NDArray[np.int8]
    feature_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, wanted in _TYPES.items():
            array = getattr(self, name)
            if array.dtype != wanted or len(array) != len(self.label):
                raise DataError(
                    f"Dataset column {name!r} holds {len(array)} rows of {array.dtype}, "
                    f"expected {len(self.label)} of {np.dtype(wanted)}.",
                    fix="build it with RiskDataset.build",
                )
        if self.features.ndim != 2 or self.features.shape[1] != len(self.feature_names) or self.sequence.ndim != 3:
            raise DataError(
                f"Features {self.features.shape} and sequence {self.sequence.shape} do not fit "
                f"{len(self.feature_names)} feature names.",
                fix="give (n, F) features, (n, N, C) sequences and F names",
            )

    @classmethod
    def build(
        cls,
        features: NDArray[Any],
        sequence: NDArray[Any],
        label: NDArray[Any],
        order_us: NDArray[Any],
        card: NDArray[Any],
        *,
        feature_names: tuple[str, ...] | list[str],
        amount_cents: NDArray[Any] | None = None,
        scenario: NDArray[Any] | None = None,
    ) -> RiskDataset:
        """Cast arrays of any numeric type; cards may be strings; the day follows from the time.

        Raises:
            DataError: lengths do not fit, or a feature is NaN or infinite.
        """
        for name, array in (("features", features), ("sequence", sequence)):
            if not np.isfinite(array).all():
                raise DataError(f"Dataset column {name!r} holds NaN or infinity.", fix="repair the feature engine")
        zeros = np.zeros(len(label), dtype=np.int64)
        codes = card if np.issubdtype(card.dtype, np.integer) else np.unique(card, return_inverse=True)[1]
        columns = {
            "features": features, "sequence": sequence, "label": label, "order_us": order_us,
            "day": np.asarray(order_us) // DAY_US, "card": codes,
            "amount_cents": zeros if amount_cents is None else amount_cents,
            "scenario": zeros if scenario is None else scenario,
        }  # fmt: skip
        cast = {name: np.ascontiguousarray(columns[name], dtype=wanted) for name, wanted in _TYPES.items()}
        return cls(**cast, feature_names=tuple(feature_names))

    def __len__(self) -> int:
        return len(self.label)

    def select(self, mask: NDArray[Any]) -> RiskDataset:
        """Rows where a boolean mask holds, or rows by number, in that order."""
        columns: dict[str, Any] = {name: np.ascontiguousarray(getattr(self, name)[mask]) for name in _TYPES}
        return replace(self, **columns)

    def labelled(self) -> RiskDataset:
        """Rows whose truth is known."""
        return self.select(self.label != UNKNOWN)

    def split_tail(self, fraction: float) -> tuple[RiskDataset, RiskDataset]:
        """Cut off the last days: at least one whole day, about ``fraction`` of the days; the rest comes first.

        Raises:
            DataError: all rows lie in one day.
        """
        days = np.unique(self.day)
        if len(days) < 2:
            raise DataError(f"{len(self)} rows of {len(days)} day(s) cannot be split.", fix="give two days or more")
        first = tail_start(days.tolist(), fraction)
        return self.select(self.day < first), self.select(self.day >= first)

    def concat(self, other: RiskDataset) -> RiskDataset:
        """These rows, then the other's.

        Raises:
            DataError: the two have different features.
        """
        if self.feature_names != other.feature_names:
            raise DataError("Two datasets with different features cannot be joined.", fix="use one feature vector")
        joined = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in _TYPES}
        return RiskDataset(**joined, feature_names=self.feature_names)

    @property
    def digest(self) -> str:
        """sha256 over names, shapes and bytes of every column."""
        state = hashlib.sha256(json.dumps(self.feature_names).encode())
        for name in _TYPES:
            array = np.ascontiguousarray(getattr(self, name))
            state.update(f"{name}{array.shape}".encode())
            state.update(array.reshape(-1).view(np.uint8).data)
        return state.hexdigest()

    def save(self, path: Path) -> Path:
        """Write one safetensors file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {field.name: getattr(self, field.name) for field in fields(self) if field.name in _TYPES}
        save_file(arrays, path, metadata={"feature_names": json.dumps(self.feature_names)})
        return path

    @classmethod
    def load(cls, path: Path) -> RiskDataset:
        """Read a file written by :meth:`save`.

        Raises:
            DataError: the file is missing or is not a dataset.
        """
        try:
            with safe_open(path, framework="np") as stored:
                names = tuple(json.loads((stored.metadata() or {})["feature_names"]))
                return cls(**{name: stored.get_tensor(name) for name in _TYPES}, feature_names=names)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"Dataset {str(path)!r} cannot be read: {error}.", fix="build it again") from error


def tail_start(days: Sequence[int], fraction: float) -> int:
    """First day of the tail that ``split_tail`` cuts off; ``days`` are two or more, each once, in order."""
    return days[-min(len(days) - 1, max(1, round(fraction * len(days))))]

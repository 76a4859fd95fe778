"""Replay memory: a class-balanced reservoir of labelled rows, so that an update does not forget.

One reservoir a class (Vitter 1985, algorithm R): frauds are rare and would otherwise be crowded out.
Every row of a class ever seen has the same chance to be in it, whenever it came.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek_ray.errors import CheckpointError, DataError

Columns = dict[str, npt.NDArray[Any]]

LABEL = "label"
_STATE = "reservoir_state"


class Reservoir:
    """Columns of rows, at most ``capacity`` a class; which rows stay depends only on the seed and their order.

    Args:
        capacity: rows kept of each class.
        seed: of the choice of rows.
        note: plain data kept with the rows, for example the names of the features.
    """

    def __init__(self, capacity: int, seed: int = 0, note: Mapping[str, Any] | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be >= 1")
        self.capacity = capacity
        self.note = dict(note or {})
        self.seen = {0: 0, 1: 0}
        self._rng = {label: np.random.default_rng([seed, label]) for label in self.seen}
        self._kept: dict[int, Columns] = {0: {}, 1: {}}

    def __len__(self) -> int:
        return sum(self.num_kept(label) for label in self.seen)

    def num_kept(self, label: int) -> int:
        """Rows kept of one class."""
        return len(self._kept[label].get(LABEL, ()))

    def add(self, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        """Offer labelled rows in their order.

        Args:
            columns: arrays with rows in their first dimension; ``label`` is 0 or 1, no column holds objects.

        Raises:
            DataError: lengths, labels or columns do not fit the rows already kept.
        """
        label = self._checked(columns)
        for value in self.seen:
            chosen = np.flatnonzero(label == value)
            if chosen.size:
                self._offer(value, {name: array[chosen] for name, array in columns.items()})

    def withdraw(self, columns: Mapping[str, npt.NDArray[Any]], key: Sequence[str]) -> None:
        """Take back rows that were offered as genuine, whether they were kept or thinned out.

        Args:
            columns: the rows, each offered before with label 0 and not taken back since.
            key: columns that together name a row.
        """
        gone = set(_names(columns, key))
        stays = np.array([name not in gone for name in _names(self._kept[0], key)], dtype=bool)
        self._kept[0] = {name: array[stays] for name, array in self._kept[0].items()}
        self.seen[0] -= len(gone)

    def fill(self, column: str, make: Callable[[Columns], npt.NDArray[Any]]) -> None:
        """Give kept rows whose number in a column is NaN the number that ``make`` computes from their columns."""
        for kept in self._kept.values():
            lacking = np.flatnonzero(np.isnan(kept[column])) if kept else np.empty(0, dtype=np.int64)
            if lacking.size:
                kept[column] = kept[column].copy()
                kept[column][lacking] = make({name: array[lacking] for name, array in kept.items()})

    def rows(self) -> Columns:
        """All kept rows, genuine ones first."""
        full = [kept for label, kept in self._kept.items() if self.num_kept(label)]
        if not full:
            return {}
        return {name: np.concatenate([kept[name] for kept in full]) for name in full[0]}

    def draw(self, label: int, num_rows: int, rng: np.random.Generator) -> Columns:
        """Draw rows of one class: each kept row once, in random order, before any is drawn again.

        Raises:
            DataError: rows are wanted of a class that has none.
        """
        kept = self.num_kept(label)
        if num_rows and not kept:
            raise DataError(f"The replay memory holds no row of label {label}.", fix="add labelled rows first")
        rounds = [rng.permutation(kept) for _ in range(-(-num_rows // kept) if num_rows else 0)]
        chosen = np.concatenate([*rounds, np.empty(0, dtype=np.int64)])[:num_rows].astype(np.int64)
        return {name: array[chosen] for name, array in self._kept[label].items()}

    def weights(self) -> npt.NDArray[np.float64]:
        """How many seen rows each row of :meth:`rows` stands for: restores the true share of fraud."""
        parts = [np.full(self.num_kept(k), self.seen[k] / self.num_kept(k)) for k in self.seen if self.num_kept(k)]
        return np.concatenate(parts) if parts else np.empty(0)

    def save(self, path: Path) -> None:
        """Write to an npz file without pickled objects, atomically."""
        state = {
            "capacity": self.capacity,
            "note": self.note,
            "seen": {str(label): count for label, count in self.seen.items()},
            "rng": {str(label): rng.bit_generator.state for label, rng in self._rng.items()},
        }
        arrays = {f"{label}.{name}": array for label, kept in self._kept.items() for name, array in kept.items()}
        fresh = path.with_name(f".{path.name}-{os.getpid()}.npz")
        np.savez(fresh, allow_pickle=False, **{_STATE: np.array(json.dumps(state))}, **arrays)
        os.replace(fresh, path)

    @classmethod
    def load(cls, path: Path) -> Reservoir:
        """Read what :meth:`save` wrote; adding goes on as if it had never stopped.

        Raises:
            CheckpointError: the file is missing, torn or of another kind.
        """
        try:
            with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
                state = json.loads(str(file[_STATE]))
                arrays = {name: file[name] for name in file.files if name != _STATE}
            return cls._restore(state, arrays)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"The replay memory {str(path)!r} cannot be read: {error}.",
                fix="remove it; the next update fills a new one",
            ) from error

    @classmethod
    def _restore(cls, state: dict[str, Any], arrays: Columns) -> Reservoir:
        reservoir = cls(int(state["capacity"]), note=state["note"])
        for label, rng in reservoir._rng.items():
            reservoir.seen[label] = int(state["seen"][str(label)])
            rng.bit_generator.state = state["rng"][str(label)]
        for name, array in arrays.items():
            label_text, _, column = name.partition(".")
            reservoir._kept[int(label_text)][column] = array
        return reservoir

    def _offer(self, label: int, rows: Columns) -> None:
        count = len(rows[LABEL])
        kept = self.num_kept(label)
        # a row that was taken back left a thinned class: its place stays empty, what is left is as fair a choice
        room = self.capacity if kept == self.seen[label] else kept
        position = np.arange(self.seen[label], self.seen[label] + count, dtype=np.int64)
        drawn = self._rng[label].integers(0, position + 1)
        slot = np.where(position < room, position, drawn)
        taken = np.flatnonzero(slot < room)
        # several rows may want one slot: the newest wins, as if they had come one by one
        slots, first_from_end = np.unique(slot[taken][::-1], return_index=True)
        source = taken[::-1][first_from_end]
        self.seen[label] += count
        size = min(room, self.seen[label])
        old = self._kept[label]
        self._kept[label] = {
            name: _placed(old.get(name, array[:0]), array[source], slots, size) for name, array in rows.items()
        }

    def _checked(self, columns: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        if LABEL not in columns:
            raise DataError(f"Replay rows lack the column {LABEL!r}.", fix="add it, 0 or 1")
        label = columns[LABEL]
        if not np.isin(label, (0, 1)).all():
            raise DataError("A replay row's label is neither 0 nor 1.", fix="add labelled rows only")
        for name, array in columns.items():
            self._check_column(name, array, len(label))
        return label

    def _check_column(self, name: str, array: npt.NDArray[Any], num_rows: int) -> None:
        if len(array) != num_rows or array.dtype.hasobject:
            raise DataError(
                f"Column {name!r} has {len(array)} rows of {array.dtype}.", fix=f"give {num_rows} plain values"
            )
        for kept in self._kept.values():
            if kept and (name not in kept or kept[name].shape[1:] != array.shape[1:]):
                raise DataError(f"Column {name!r} does not fit the rows kept before.", fix="start a new replay memory")


def _placed(old: npt.NDArray[Any], new: npt.NDArray[Any], slots: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    dtype = np.promote_types(old.dtype, new.dtype)  # longer strings need a wider column
    placed = np.empty((size, *new.shape[1:]), dtype=dtype)
    placed[: len(old)] = old
    placed[slots] = new
    return placed


def _names(columns: Mapping[str, npt.NDArray[Any]], key: Sequence[str]) -> list[tuple[Any, ...]]:
    """One value a row that tells it from the others."""
    return list(zip(*(columns[name].tolist() for name in key if name in columns), strict=True))

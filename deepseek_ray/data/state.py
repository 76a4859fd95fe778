"""What is remembered about one card, terminal or device: its recent events and fraud labels as int64.

A state is stored as one blob of little-endian int64: a header of 8, the events [M, columns], the labels [2, L].
The header holds a checksum, so that a torn or foreign blob is an error and never a wrong feature. In memory events are
bytes too: an event is appended without numpy, and those of a batch are joined in one step.

    M  remembered events, oldest first     L  fraud labels, by position
"""

from __future__ import annotations

import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple, Protocol

import numpy as np

from deepseek_ray.data.formulas import IntArray
from deepseek_ray.errors import FeatureError

ORDER, AMOUNT, OTHER = 0, 1, 2
DEVICE, COUNTRY, CATEGORY, CHANNEL, LARGE, LABEL = 3, 4, 5, 6, 7, 8
"""Columns of an event. OTHER is the terminal of a card's event and the card of a terminal's or device's event; a card
keeps the rest too. Identifiers are hashes, LABEL is the position of the event's fraud label or 0."""
CARD_COLUMNS, OTHER_COLUMNS = 9, 3

_MAGIC = 0x64726179_0002  # "dray", format 2
_MAGIC_1 = 0x64726179_0001  # the same with events [columns, M]
_HEADER, _INT = 8, 8
_FIRST, _REST = struct.Struct("<2q"), struct.Struct("<6q")  # of the header: what is not in the checksum, what is
_EVENT = {columns: struct.Struct(f"<{columns}q") for columns in (CARD_COLUMNS, OTHER_COLUMNS)}
_NO_LABELS = np.empty((2, 0), np.int64)
_OBJECT_BYTES = 300  # of a state, its bytes and its numbers, beside the events and labels


class State(NamedTuple):
    """One owner's memory. Immutable: an event or label makes a new one.

    Attributes:
        rows: its events, little-endian int64 [M, columns].
        columns: of an event.
        labels: int64 [2, L], position and amount of each fraud label.
        last_order: order of the newest event ever seen, 0 for none.
        last_event_us: event time of the newest event ever seen.
        horizon_us: how far back events are kept.
    """

    rows: bytes
    columns: int
    labels: IntArray
    last_order: int
    last_event_us: int
    horizon_us: int

    @property
    def events(self) -> IntArray:
        """int64 [columns, M], to read."""
        return np.frombuffer(self.rows, "<i8").reshape(-1, self.columns).T

    def with_event(self, row: Sequence[int], event_us: int) -> State:
        """Append an event (one value a column, order first) and forget what has left the horizon."""
        order, rows, labels = row[ORDER], self.rows, self.labels
        oldest = order - self.horizon_us
        if rows and int.from_bytes(rows[:_INT], "little", signed=True) <= oldest:  # seldom: a look costs less
            rows = rows[int(self.events[ORDER].searchsorted(oldest, "right")) * self.columns * _INT :]
        if labels.size and labels[0, 0] <= oldest:
            labels = labels[:, labels[0] > oldest]
        rows += _EVENT[self.columns].pack(*row)
        return State(rows, self.columns, labels, order, max(event_us, self.last_event_us), self.horizon_us)

    def with_label(self, position: int, amount: int) -> State:
        """Add a fraud label, keeping positions sorted."""
        place = int(self.labels[0].searchsorted(position, "right"))
        return self._replace(labels=np.insert(self.labels, place, (position, amount), axis=1))

    def marked(self, event: int, position: int) -> State:
        """Note on an event that its fraud label stands at a position."""
        rows = bytearray(self.rows)
        struct.pack_into("<q", rows, (event * self.columns + LABEL) * _INT, position)
        return self._replace(rows=bytes(rows))

    def find(self, order: int) -> int:
        """Column of the event of that order, -1 when it is not remembered."""
        orders = self.events[ORDER]
        place = int(orders.searchsorted(order))
        return place if place < len(orders) and orders[place] == order else -1

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return _OBJECT_BYTES + len(self.rows) + self.labels.nbytes

    def encode(self) -> bytes:
        """The blob."""
        count = len(self.rows) // (self.columns * _INT)
        rest = _REST.pack(
            self.columns, count, self.labels.shape[1], self.last_order, self.last_event_us, self.horizon_us
        )
        rest += self.rows
        if self.labels.size:
            rest += self.labels.astype("<i8", copy=False).tobytes()
        return _FIRST.pack(_MAGIC, zlib.crc32(rest)) + rest


def empty(columns: int, horizon_us: int) -> State:
    """Memory of an owner that was never seen."""
    return State(b"", columns, _NO_LABELS, 0, 0, horizon_us)


def decode(blob: bytes, key: str, columns: int, horizon_us: int) -> State:
    """Read a blob.

    Raises:
        FeatureError: it is torn, of another format, or was kept for shorter windows than are needed now.
    """
    fix = "warm the online store again from the transactions table"
    magic, checksum = _FIRST.unpack_from(blob) if len(blob) >= _HEADER * _INT else (0, 0)
    if magic >> 16 == _MAGIC >> 16 and magic > _MAGIC:
        problem = f"The feature state of {key!r} has format {magic & 0xFFFF}; this program reads 1 and 2."
        raise FeatureError(problem, fix=f"use the release that wrote it, or {fix}")
    if magic not in (_MAGIC, _MAGIC_1) or checksum != zlib.crc32(memoryview(blob)[_FIRST.size :]):
        raise FeatureError(f"The feature state of {key!r} is corrupted ({len(blob)} bytes).", fix=fix)
    found, count, num_labels, last_order, last_event_us, kept_us = _REST.unpack_from(blob, _FIRST.size)
    if found != columns or kept_us != horizon_us:
        problem = (
            f"The feature state of {key!r} keeps {kept_us} us and {found} columns, not {horizon_us} and {columns}."
        )
        raise FeatureError(problem, fix=fix)
    middle = _INT * (_HEADER + columns * count)
    rows = blob[_INT * _HEADER : middle]
    if magic == _MAGIC_1:
        rows = np.frombuffer(rows, "<i8").reshape(columns, count).T.tobytes()
    labels = np.frombuffer(blob[middle:], "<i8").reshape(2, num_labels) if num_labels else _NO_LABELS
    return State(rows, columns, labels, last_order, last_event_us, horizon_us)


@lru_cache(maxsize=1 << 16)
def hashed(identifier: str) -> int:
    """64-bit hash of an identifier as a signed integer; equal in every process."""
    return int.from_bytes(blake2b(identifier.encode(), digest_size=8).digest(), "little", signed=True)


class StateStore(Protocol):
    """Where states are kept; the Feast client is one."""

    def read_states(self, keys: Sequence[str]) -> list[bytes | None]:
        """Blobs in the order of the keys, None where there is none."""

    def write_states(self, states: Iterable[tuple[str, bytes, int]]) -> None:
        """Keep (key, blob, order_us of the newest event) triples."""


class StateMemory(ABC):
    """Stands before a store and keeps states as they are: what is in memory is neither encoded nor checked again."""

    @abstractmethod
    def read_states(self, keys: Sequence[str]) -> list[State | bytes | None]:
        """States, or blobs of those that nobody has used yet, in the order of the keys."""

    @abstractmethod
    def write_states(self, states: Iterable[tuple[str, State | bytes, int]]) -> None:
        """Keep (key, state, order_us of the newest event) triples."""


AnyStore = StateStore | StateMemory
"""What an engine may stand on."""


class MemoryStore:
    """A state store in this process, for tests and offline replays."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def read_states(self, keys: Sequence[str]) -> list[bytes | None]:
        """Blobs in the order of the keys."""
        return [self.blobs.get(key) for key in keys]

    def write_states(self, states: Iterable[tuple[str, bytes, int]]) -> None:
        """Keep the blobs."""
        self.blobs.update({key: blob for key, blob, _ in states})

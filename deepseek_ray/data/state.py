"""What is remembered about one card, terminal or device: its recent events and fraud labels as int64.

A state is stored as one blob of little-endian int64: a header of 8, the events [columns, M], the labels [2, L].
The header holds a checksum, so that a torn or foreign blob is an error and never a wrong feature.

    M  remembered events, oldest first     L  fraud labels, by position
"""

from __future__ import annotations

import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol

import numpy as np

from deepseek_ray.data.formulas import IntArray
from deepseek_ray.errors import FeatureError

ORDER, AMOUNT, OTHER = 0, 1, 2
DEVICE, COUNTRY, CATEGORY, CHANNEL, LARGE, LABEL = 3, 4, 5, 6, 7, 8
"""Rows of ``events``. OTHER is the terminal of a card's event and the card of a terminal's or device's event; a card
keeps the rest too. Identifiers are hashes, LABEL is the position of the event's fraud label or 0."""
CARD_COLUMNS, OTHER_COLUMNS = 9, 3

_MAGIC = 0x64726179_0001  # "dray", format 1
_HEADER = 8
_FIRST, _REST = struct.Struct("<2q"), struct.Struct("<6q")  # of the header: what is not in the checksum, what is
_OBJECT_BYTES = 600  # of a state and its two arrays, beside their numbers


@dataclass(frozen=True)
class State:
    """One owner's memory. Immutable: an event or label makes a new one.

    Attributes:
        events: int64 [columns, M].
        labels: int64 [2, L], position and amount of each fraud label.
        last_order: order of the newest event ever seen, 0 for none.
        last_event_us: event time of the newest event ever seen.
        horizon_us: how far back events are kept.
    """

    events: IntArray
    labels: IntArray
    last_order: int
    last_event_us: int
    horizon_us: int

    def with_event(self, row: Sequence[int], event_us: int) -> State:
        """Append an event (one value a column, order first) and forget what has left the horizon."""
        order, length = row[ORDER], self.events.shape[1]
        oldest = order - self.horizon_us
        gone = length and self.events[ORDER, 0] <= oldest  # seldom: a search costs more than a look
        start = int(self.events[ORDER].searchsorted(oldest, "right")) if gone else 0
        kept = length - start
        events = np.empty((len(row), kept + 1), np.int64)
        events[:, :kept] = self.events[:, start:]
        events[:, kept] = row
        labels = self.labels
        if labels.size and labels[0, 0] <= oldest:
            labels = labels[:, labels[0] > oldest]
        return State(events, labels, order, max(event_us, self.last_event_us), self.horizon_us)

    def with_label(self, position: int, amount: int) -> State:
        """Add a fraud label, keeping positions sorted."""
        place = int(self.labels[0].searchsorted(position, "right"))
        return replace(self, labels=np.insert(self.labels, place, (position, amount), axis=1))

    def marked(self, event: int, position: int) -> State:
        """Note on an event that its fraud label stands at a position."""
        events = self.events.copy()
        events[LABEL, event] = position
        return replace(self, events=events)

    def find(self, order: int) -> int:
        """Column of the event of that order, -1 when it is not remembered."""
        place = int(self.events[ORDER].searchsorted(order))
        return place if place < self.events.shape[1] and self.events[ORDER, place] == order else -1

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return _OBJECT_BYTES + self.events.nbytes + self.labels.nbytes

    def encode(self) -> bytes:
        """The blob."""
        shape = *self.events.shape, self.labels.shape[1]
        rest = _REST.pack(*shape, self.last_order, self.last_event_us, self.horizon_us)
        rest += self.events.astype("<i8", copy=False).tobytes() + self.labels.astype("<i8", copy=False).tobytes()
        return _FIRST.pack(_MAGIC, zlib.crc32(rest)) + rest


def empty(columns: int, horizon_us: int) -> State:
    """Memory of an owner that was never seen."""
    return State(np.empty((columns, 0), np.int64), np.empty((2, 0), np.int64), 0, 0, horizon_us)


def decode(blob: bytes, key: str, columns: int, horizon_us: int) -> State:
    """Read a blob.

    Raises:
        FeatureError: it is torn, of another format, or was kept for shorter windows than are needed now.
    """
    fix = "warm the online store again from the transactions table"
    body = np.frombuffer(blob, "<i8") if len(blob) % 8 == 0 else np.empty(0, np.int64)
    if len(body) < _HEADER or body[0] != _MAGIC or body[1] != zlib.crc32(body[2:].data):
        raise FeatureError(f"The feature state of {key!r} is corrupted ({len(blob)} bytes).", fix=fix)
    found, count, labels, last_order, last_event_us, kept_us = body[2:_HEADER].tolist()
    if found != columns or kept_us != horizon_us:
        problem = (
            f"The feature state of {key!r} keeps {kept_us} us and {found} columns, not {horizon_us} and {columns}."
        )
        raise FeatureError(problem, fix=fix)
    middle = _HEADER + columns * count
    events = body[_HEADER:middle].reshape(columns, count)
    few = body[middle:].reshape(2, labels).copy()  # later states share them: a view would keep the whole blob
    return State(events, few, last_order, last_event_us, horizon_us)


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

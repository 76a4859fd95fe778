"""The stream engine over a store whose writes wait until the prediction log has committed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from deepseek_ray.data.events import Transaction
from deepseek_ray.data.prediction_log import LabelTarget, LoggedFeedback, PredictionLog
from deepseek_ray.data.state import StateStore
from deepseek_ray.data.stream_engine import Served, StreamEngine
from deepseek_ray.errors import FeatureError
from deepseek_ray.logs import get_logger

logger = get_logger(__name__)

REPLAY_MARGIN = 2_000
"""Rows replayed before the last one known to be in the store: a store that gives up durability for speed
(SQLite with synchronous=NORMAL) may lose its last commits in a power cut."""


REPLAY_CHUNK = 2_000
"""Rows of the log read, and their states written, at once."""

LabelRow = tuple[int, LabelTarget, LoggedFeedback]
Row = TypeVar("Row", bound=tuple[Any, ...])


class Replayed(NamedTuple):
    """How far the log was taken in: row numbers of the last event and label, and how many there were."""

    last: tuple[int, int]
    counts: tuple[int, int]


class DeferredStore:
    """Holds writes back in two steps: staged (may be undone), then kept (will be written)."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._staged: dict[str, tuple[str, bytes, int]] = {}
        self._kept: dict[str, tuple[str, bytes, int]] = {}

    def read_states(self, keys: Sequence[str]) -> list[bytes | None]:
        """Newest blobs, written or not, in the order of the keys."""
        waiting = {key: self._staged.get(key) or self._kept.get(key) for key in keys}
        missing = [key for key in keys if waiting[key] is None]
        stored = dict(zip(missing, self._store.read_states(missing), strict=True)) if missing else {}
        return [entry[1] if (entry := waiting[key]) else stored[key] for key in keys]

    def write_states(self, states: Iterable[tuple[str, bytes, int]]) -> None:
        """Stage blobs."""
        self._staged.update({state[0]: state for state in states})

    def keep(self) -> None:
        """Make what is staged final."""
        self._kept |= self._staged
        self._staged = {}

    def discard(self) -> None:
        """Drop what is staged."""
        self._staged = {}

    def flush(self) -> None:
        """Write what is kept; on an error it stays kept."""
        if self._kept:
            self._store.write_states(list(self._kept.values()))
            self._kept = {}


class LiveFeatures:
    """The predictor's view of the features.

    Args:
        make_engine: builds a stream engine over a store; engines keep nothing between calls but the store.
        store: where states live.
    """

    def __init__(self, make_engine: Callable[[StateStore], StreamEngine], store: StateStore) -> None:
        self._make_engine = make_engine
        self._store = DeferredStore(store)
        self._engine = make_engine(self._store)

    def last_event_us(self, card_ids: Sequence[str]) -> Mapping[str, int]:
        """Time of each known card's last event."""
        return self._engine.last_event_us(card_ids)

    def observe_many(self, transactions: Sequence[Transaction]) -> Sequence[Served]:
        """Compute features and stage the new states.

        Raises:
            StaleEventError: an event is older than its card's last one; nothing may be kept then.
        """
        served = []
        for item in self._engine.observe_many(transactions):
            if isinstance(item, Exception):
                raise item
            served.append(item)
        return served

    def peek(self, transaction: Transaction) -> Served:
        """The features of an event that is not remembered.

        Raises:
            StaleEventError: the event is older than its card's last one.
        """
        return self._engine.peek(transaction)

    def apply_label(self, target: LabelTarget, is_fraud: bool, known_us: int) -> None:
        """Stage a label; one that the card no longer remembers can count in no feature and is only logged."""
        ids = (target.card_id, target.terminal_id, target.device_id)
        try:
            self._engine.apply_label(*ids, target.order_us, is_fraud, known_us)
        except FeatureError as error:
            logger.warning("label of %s reaches no feature: %s", target.prediction_id, error)

    def keep(self) -> None:
        """The log holds what is staged."""
        self._store.keep()

    def discard(self) -> None:
        """Undo what is staged; the engine may hold half a batch, so a fresh one takes its place."""
        self._store.discard()
        self._engine = self._make_engine(self._store)

    def flush(self) -> None:
        """Write what was kept to the store."""
        self._store.flush()

    def recover(self, log: PredictionLog) -> tuple[int, int]:
        """Bring the store up to the log after a crash; returns the events and labels looked at.

        The log is the truth: an answered event is in it. Events and labels are taken in the order in
        which they were first taken, so that each label gets the position it had. What the store
        holds already stays as it is: a state remembers the order of its newest event.
        """
        events_done, labels_done = log.applied
        since = max(0, events_done - REPLAY_MARGIN), max(0, labels_done - REPLAY_MARGIN)
        return self.replay(log, since).counts

    def replay(self, log: PredictionLog, since: tuple[int, int]) -> Replayed:
        """Take in what the log holds after these row numbers of events and labels; see :meth:`recover`."""
        labels = _chunks(log.labels_after, since[1])
        waiting = next(labels, None)
        last, counts = list(since), [0, 0]
        for seq, event, order_us in _chunks(log.events_after, since[0]):
            while waiting is not None and waiting[2].after_seq < seq:
                waiting = self._relabel(waiting, labels, last, counts)
            self._engine.restore(event, order_us)
            last[0], counts[0] = seq, counts[0] + 1
            if counts[0] % REPLAY_CHUNK == 0:
                self.keep()
                self.flush()
        while waiting is not None:
            waiting = self._relabel(waiting, labels, last, counts)
        self.keep()
        self.flush()
        return Replayed((last[0], last[1]), (counts[0], counts[1]))

    def _relabel(self, row: LabelRow, rows: Iterator[LabelRow], last: list[int], counts: list[int]) -> LabelRow | None:
        self.apply_label(row[1], row[2].is_fraud, row[2].known_us)
        last[1], counts[1] = row[0], counts[1] + 1
        return next(rows, None)


def _chunks(read: Callable[[int, int], Sequence[Row]], after: int) -> Iterator[Row]:
    while rows := read(after, REPLAY_CHUNK):
        yield from rows
        after = rows[-1][0]

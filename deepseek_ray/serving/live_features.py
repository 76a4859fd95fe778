"""The stream engine over a store whose writes wait until the prediction log has committed.

While the store is away, events are scored from what is in memory; one whose card, terminal or device is not there is
scored as without history and marked as degraded. The log holds them all: once the store answers again, what it lacks
is replayed, and only then is it read again. So that each then finds its place at the end of its card's, terminal's and
device's histories, whatever these hold, such an event comes after all that was ever served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from deepseek_ray.data.events import Transaction
from deepseek_ray.data.prediction_log import LabelTarget, LoggedFeedback, PredictionLog
from deepseek_ray.data.state import AnyStore, StateStore
from deepseek_ray.data.stream_engine import Served, StreamEngine
from deepseek_ray.errors import FeatureError
from deepseek_ray.logs import get_logger
from deepseek_ray.serving.deferred_store import DeferredStore
from deepseek_ray.serving.outage import AWAY, Outage

logger = get_logger(__name__)

REPLAY_MARGIN = 2_000
"""Rows replayed before the last one known to be in the store: a store that gives up durability for speed
(SQLite with synchronous=NORMAL, Redis with appendfsync=everysec) may lose its last writes when it goes down."""

REPLAY_CHUNK = 2_000
"""Rows of the log read, and their states written, at once."""

LabelRow = tuple[int, LabelTarget, LoggedFeedback]
Row = TypeVar("Row", bound=tuple[Any, ...])


class Replayed(NamedTuple):
    """How far the log was taken in: row numbers of the last event and label, and how many there were."""

    last: tuple[int, int]
    counts: tuple[int, int]


class LiveFeatures:
    """The predictor's view of the features.

    Args:
        make_engine: builds a stream engine over a store; engines keep nothing between calls but the store.
        store: where states live.
        log: what is replayed after an outage of the store; known from the first replay on where not given.
    """

    def __init__(
        self,
        make_engine: Callable[[AnyStore], StreamEngine],
        store: StateStore,
        log: PredictionLog | None = None,
    ) -> None:
        self._make_engine = make_engine
        self._store = DeferredStore(store)
        self._engine = make_engine(self._store)
        self._outage = Outage()
        self._log = log

    @property
    def behind(self) -> bool:
        """Whether the store is away and lacks what the log holds."""
        return self._outage.on

    @property
    def num_kept(self) -> int:
        """States that wait to be written."""
        return self._store.num_kept

    def fetch(self, transactions: Sequence[Transaction]) -> None:
        """Read all that the events need, in one round trip; without the store, what is in memory has to do."""
        keys = [
            key
            for tx in transactions
            for key in self._engine.keys_of(tx.card_id, tx.terminal_id, tx.device_id).values()
        ]
        if not keys:
            return
        if not self._reach(keys):
            self._store.do_without(keys)

    def _reach(self, keys: Sequence[str]) -> bool:
        """Have the states at hand; while the store is away it is seldom asked, and False is the answer."""
        try:
            if self._outage.on:
                if not self._outage.due:
                    return False
                self._return(keys[0])
            self._store.fetch(keys)
        except AWAY:
            self._lose("read")
            return False
        return True

    def _return(self, probe: str) -> None:
        """Ask the store again; when it answers, replay what it lacks."""
        self._store.forget(probe)
        events, labels = self._catch_up()
        self._outage.end()
        logger.info("the feature store answers again; %d events and %d labels looked at", events, labels)

    def _catch_up(self) -> tuple[int, int]:
        assert self._log is not None
        events_done, labels_done = self._log.applied
        since = max(0, events_done - REPLAY_MARGIN), max(0, labels_done - REPLAY_MARGIN)
        return self.replay(self._log, since).counts

    def _keys(self, of: Transaction | LabelTarget) -> Mapping[str, str]:
        return self._engine.keys_of(of.card_id, of.terminal_id, of.device_id)

    def _lose(self, verb: str) -> None:
        if not self._outage.on:
            logger.exception("the feature store cannot be %s; scores go on from memory and defaults", verb)
        self._outage.begin()

    def last_event_us(self, card_ids: Sequence[str]) -> Mapping[str, int]:
        """Time of each known card's last event."""
        return self._engine.last_event_us(card_ids)

    def observe_many(self, transactions: Sequence[Transaction]) -> Sequence[Served]:
        """Compute features and stage the new states.

        Raises:
            StaleEventError: an event is older than its card's last one; nothing may be kept then.
        """
        served = []
        blind = self._store.blind
        unread = dict.fromkeys(blind, self._log.horizon()[0]) if blind and self._log else None
        for tx, item in zip(transactions, self._engine.observe_many(transactions, unread=unread), strict=True):
            if isinstance(item, Exception):
                raise item
            served.append(self._marked(tx, item) if blind else item)
        return served

    def _marked(self, tx: Transaction, served: Served) -> Served:
        keys = self._keys(tx)
        known = [owner for owner in served.cold if keys[owner] not in self._store.blind]
        return replace(served, cold=known, degraded=not self._store.blind.isdisjoint(keys.values()))

    def peek(self, transaction: Transaction) -> Served:
        """The features of an event that is not remembered.

        Raises:
            StaleEventError: the event is older than its card's last one.
        """
        return self._engine.peek(transaction)

    def fetch_labels(self, targets: Sequence[LabelTarget]) -> None:
        """Read all that the labels need, in one round trip.

        Raises:
            FeatureError: the store is away.
        """
        if not self._reach([key for target in targets for key in self._keys(target).values()]):
            raise FeatureError("Labels wait for the feature store, which is away.", fix="send the label again")

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
        """Write what was kept to the store; while it is away the log has it, see ``behind``."""
        if not self._outage.on:
            try:
                self._store.flush()
                return
            except AWAY:
                self._lose("written")
        self._store.give_up()

    def recover(self, log: PredictionLog) -> tuple[int, int]:
        """Bring the store up to the log after a crash; returns the events and labels looked at.

        The log is the truth: an answered event is in it. Events and labels are taken in the order in
        which they were first taken, so that each label gets the position it had. What the store
        holds already stays as it is: a state remembers the order of its newest event. A store that is away is
        brought up to the log when it answers again.

        Raises:
            EnvironmentProblemError, sqlite3.Error, OSError: the store is away, and has never served: the log is empty.
        """
        self._log = log
        try:
            return self._catch_up()
        except AWAY:
            if not log.last_rows()[0]:
                raise
            self._lose("read")
            return 0, 0

    def replay(self, log: PredictionLog, since: tuple[int, int]) -> Replayed:
        """Take in what the log holds after these row numbers of events and labels; see :meth:`recover`."""
        self._log = log
        try:
            return self._replay(log, since)
        except AWAY:
            self._store.clear()  # states that hold a part of the log would pass for whole ones
            self._engine = self._make_engine(self._store)
            raise

    def _replay(self, log: PredictionLog, since: tuple[int, int]) -> Replayed:
        labels = _chunks(log.labels_after, since[1])
        waiting = next(labels, None)
        last, counts = list(since), [0, 0]
        for seq, event, order_us in _chunks(log.events_after, since[0]):
            while waiting is not None and waiting[2].after_seq < seq:
                waiting = self._relabel(waiting, labels, last, counts)
            self._engine.restore(event, order_us)
            last[0], counts[0] = seq, counts[0] + 1
            if counts[0] % REPLAY_CHUNK == 0:
                self._store.keep()
                self._store.flush()
        while waiting is not None:
            waiting = self._relabel(waiting, labels, last, counts)
        self._store.keep()
        self._store.flush()
        return Replayed((last[0], last[1]), (counts[0], counts[1]))

    def _relabel(self, row: LabelRow, rows: Iterator[LabelRow], last: list[int], counts: list[int]) -> LabelRow | None:
        self.apply_label(row[1], row[2].is_fraud, row[2].known_us)
        last[1], counts[1] = row[0], counts[1] + 1
        return next(rows, None)


def _chunks(read: Callable[[int, int], Sequence[Row]], after: int) -> Iterator[Row]:
    while rows := read(after, REPLAY_CHUNK):
        yield from rows
        after = rows[-1][0]

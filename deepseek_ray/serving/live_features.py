"""The stream engine over a store whose writes wait until the prediction log has committed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from deepseek_ray.data.events import Transaction
from deepseek_ray.data.prediction_log import LabelTarget, PredictionLog
from deepseek_ray.data.state import StateStore
from deepseek_ray.data.stream_engine import Served, StreamEngine
from deepseek_ray.errors import FeatureError
from deepseek_ray.logs import get_logger

logger = get_logger(__name__)

REPLAY_MARGIN = 2_000
"""Rows replayed before the last one known to be in the store: a store that gives up durability for speed
(SQLite with synchronous=NORMAL) may lose its last commits in a power cut."""


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
        events = log.events_after(max(0, events_done - REPLAY_MARGIN))
        labels = log.labels_after(max(0, labels_done - REPLAY_MARGIN))
        waiting = iter(labels)
        label = next(waiting, None)
        for seq, event, order_us in events:
            while label is not None and label[2].after_seq < seq:
                self.apply_label(label[1], label[2].is_fraud, label[2].known_us)
                label = next(waiting, None)
            self._engine.restore(event, order_us)
        while label is not None:
            self.apply_label(label[1], label[2].is_fraud, label[2].known_us)
            label = next(waiting, None)
        self.keep()
        self.flush()
        return len(events), len(labels)

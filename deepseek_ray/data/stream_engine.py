"""The stream engine: the same features as the batch engine, computed as each event arrives.

It remembers the recent events of every card, terminal and device (data/state.py) in a state store and applies the
shared formulas to them, so that a served vector equals the recomputed one to the last bit.

One process writes a state at a time. Within :meth:`StreamEngine.observe_many` all states are read in one round trip
and written in one.

    F  features     S  sequence length     C  sequence channels
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from deepseek_ray.data import state as st
from deepseek_ray.data.events import SECOND_US, Transaction, delay_us, to_us
from deepseek_ray.data.formulas import FloatArray, is_large
from deepseek_ray.data.history import UNKNOWN_DEVICE
from deepseek_ray.data.state import AnyStore, State, StateMemory, hashed
from deepseek_ray.data.stream_vector import CHANNEL_CODE, Moment, Vectors
from deepseek_ray.data.warm import states_of
from deepseek_ray.data.windows import LARGE_WINDOW_US, OWNERS, Declaration, VectorSpec
from deepseek_ray.errors import FeatureError, StaleEventError

_WARM_CHUNK = 2_000


@dataclass(frozen=True)
class Served:
    """What the model sees of one event.

    Attributes:
        order_us: position of the event in time.
        values: float64 [F].
        sequence: float64 [S, C], newest earlier event first.
        cold: which of card, terminal, device were without history.
        degraded: whether a history that there may be could not be read.
    """

    order_us: int
    values: FloatArray
    sequence: FloatArray
    cold: list[str]
    degraded: bool = False


class StreamEngine:
    """Computes vectors event by event.

    Args:
        declaration: the declaration the vector belongs to; its vectors share nothing in the store.
        spec: the vector.
        store: where states live; read and written through. Before it there may be a memory of states.
        label_delay_days: a label counts no earlier than this many days after its event.
        sequence_len: S.
    """

    def __init__(
        self,
        declaration: Declaration,
        spec: VectorSpec,
        store: AnyStore,
        *,
        label_delay_days: float,
        sequence_len: int,
    ) -> None:
        if declaration.vector(spec.name) != spec:
            raise FeatureError(
                f"Vector {spec.name!r} is not of this declaration.", fix="take it from declaration.vector()"
            )
        self.spec, self._store, self._service = spec, store, spec.service
        self._delay = delay_us(label_delay_days)
        self._horizon = {owner: spec.horizon_us(owner, self._delay) for owner in OWNERS.values()}
        self._vectors = Vectors(spec, self._delay, sequence_len)
        self._unwritten: dict[str, State] = {}

    def observe(self, tx: Transaction) -> Served:
        """Compute the vector of an event, remember the event and write its states.

        Raises:
            StaleEventError: the event is older than its card's last one.
            FeatureError: a stored state is corrupted.
        """
        served = self.observe_many([tx])[0]
        if isinstance(served, FeatureError):
            raise served
        return served

    def observe_many(
        self, txs: Sequence[Transaction], *, write: bool = True, unread: Mapping[str, int] | None = None
    ) -> list[Served | FeatureError]:
        """Observe events in order of arrival, with one read and one write of the store.

        An event that is stale or whose state is corrupted is not remembered; its error stands in its place. With
        ``write=False`` the new states stay in this process (later calls see them) until :meth:`flush`: log the
        predictions durably in between, and a crash loses nothing that :meth:`restore` cannot bring back.
        ``unread`` names states that could not be read, with the latest order that each may hold: their events come
        after it.
        """
        broken: dict[str, FeatureError] = {}
        states = self._load((key for tx in txs for key in self._owner_keys(tx).values()), broken)
        for key, order_us in (unread or {}).items():
            if key in states:
                states[key] = states[key]._replace(last_order=max(states[key].last_order, order_us))
        results = [self._take(tx, states, broken) for tx in txs]
        if write:
            self.flush()
        served = iter(self._served([moment for moment in results if isinstance(moment, Moment)]))
        return [next(served) if isinstance(result, Moment) else result for result in results]

    def flush(self) -> None:
        """Write the states that ``write=False`` has held back."""
        if self._unwritten:
            if isinstance(self._store, StateMemory):
                self._store.write_states([(key, s, s.last_order) for key, s in self._unwritten.items()])
            else:
                self._store.write_states([(key, s.encode(), s.last_order) for key, s in self._unwritten.items()])
            self._unwritten = {}

    def peek(self, tx: Transaction) -> Served:
        """The vector of an event, without remembering it.

        Raises:
            StaleEventError: the event is older than its card's last one.
        """
        keys = self._owner_keys(tx)
        states = self._load(keys.values())
        cold = [owner for owner, key in keys.items() if not states[key].rows]
        return self._served([Moment(tx, self._advance(tx, keys, states, order=None), cold)])[0]

    def last_event_us(self, card_ids: Sequence[str]) -> dict[str, int]:
        """Time of the last event of each card that has one, in microseconds; corrupted states are left out."""
        keys = {card_id: self._key("card", card_id) for card_id in card_ids}
        states = self._load(keys.values(), {})
        last = {card_id: states[key].last_event_us for card_id, key in keys.items() if key in states}
        return {card_id: event_us for card_id, event_us in last.items() if event_us}

    def restore(self, tx: Transaction, order_us: int) -> None:
        """Remember an event served before a crash at its logged order; a state that has it stays as it is."""
        keys = self._owner_keys(tx)
        states = self._load(keys.values())
        for owner, after in self._advance(tx, keys, states, order=order_us).items():
            if states[keys[owner]].last_order < order_us:
                self._unwritten[keys[owner]] = after
        self.flush()

    def apply_label(
        self,
        card_id: str,
        terminal_id: str,
        device_id: str,
        order_us: int,
        is_fraud: bool,
        known_us: int,
        *,
        write: bool = True,
    ) -> int:
        """Take in the truth about an event and return the label's position (``label_us``).

        The position is never before the label delay, the moment it became known, or an event already served for the
        same card, terminal or device. A second label for the same event changes nothing. A label that comes later
        than the card's horizon after its event is counted by no feature. ``write`` as in :meth:`observe_many`.

        Raises:
            FeatureError: the card does not remember the event, or a stored state is corrupted.
        """
        keys = self.keys_of(card_id, terminal_id, device_id)
        states = self._load(keys.values())
        served = max(states[key].last_order + 1 for key in keys.values())
        position = max(order_us + max(self._delay, 1), known_us, served)
        if is_fraud:
            position = self._place_label(keys, states, order_us, position)
        if write:
            self.flush()
        return position

    def _place_label(self, keys: dict[str, str], states: dict[str, State], order_us: int, position: int) -> int:
        if position - order_us > self._horizon["card"]:
            return position
        card = states[keys["card"]]
        event = card.find(order_us)
        if event < 0:
            problem = f"The card state {keys['card']!r} has no event at order {order_us}."
            raise FeatureError(problem, fix="check the ids, or warm the online store again")
        if card.events[st.LABEL, event]:
            return int(card.events[st.LABEL, event])
        amount = int(card.events[st.AMOUNT, event])
        self._unwritten.update({key: states[key].with_label(position, amount) for key in keys.values()})
        self._unwritten[keys["card"]] = self._unwritten[keys["card"]].marked(event, position)
        return position

    def warm(self, transactions: pl.DataFrame) -> int:
        """Replace the states of all owners of a transactions table by what its rows leave behind.

        Known labels are taken over at their positions. Give at least the card's horizon plus 30 days before the first
        event to be served. Returns the number of states written.
        """
        written = 0
        batch: list[tuple[str, bytes, int]] = []
        for owner, identifier, state in states_of(transactions, self._delay, self._horizon):
            batch.append((self._key(owner, identifier), state.encode(), state.last_order))
            if len(batch) == _WARM_CHUNK:
                self._store.write_states(batch)
                written, batch = written + len(batch), []
        self._store.write_states(batch)
        return written + len(batch)

    def _key(self, owner: str, identifier: str) -> str:
        return f"{self._service}/{owner}/{identifier}"

    def keys_of(self, card_id: str, terminal_id: str, device_id: str) -> dict[str, str]:
        """Keys of the states that an event reads and writes, by owner."""
        keys = {"card": self._key("card", card_id), "terminal": self._key("terminal", terminal_id)}
        if device_id != UNKNOWN_DEVICE:
            keys["device"] = self._key("device", device_id)
        return keys

    def _owner_keys(self, tx: Transaction) -> dict[str, str]:
        return self.keys_of(tx.card_id, tx.terminal_id, tx.device_id)

    def _load(self, keys: Iterable[str], broken: dict[str, FeatureError] | None = None) -> dict[str, State]:
        """States by key, a new one where there is none; corrupted ones go to ``broken`` when it is given."""
        wanted = dict.fromkeys(keys)
        missing = [key for key in wanted if key not in self._unwritten]
        states = {key: self._unwritten[key] for key in wanted if key in self._unwritten}
        found: Sequence[State | bytes | None] = self._store.read_states(missing) if missing else ()
        for key, blob in zip(missing, found, strict=True):
            try:
                states[key] = self._decode(key, blob)
            except FeatureError as error:
                if broken is None:
                    raise
                broken[key] = error
        return states

    def _decode(self, key: str, blob: State | bytes | None) -> State:
        if isinstance(blob, State):
            return blob
        owner = key.split("/", 2)[1]
        columns, horizon = st.CARD_COLUMNS if owner == "card" else st.OTHER_COLUMNS, self._horizon[owner]
        return st.empty(columns, horizon) if blob is None else st.decode(blob, key, columns, horizon)

    def _take(
        self, tx: Transaction, states: dict[str, State], broken: dict[str, FeatureError]
    ) -> Moment | FeatureError:
        """Remember an event in ``states``; its error when it is stale or one of its states is corrupted."""
        keys = self._owner_keys(tx)
        for key in keys.values():
            if key in broken:
                return broken[key]
        cold = [owner for owner, key in keys.items() if not states[key].rows]
        try:
            after = self._advance(tx, keys, states, order=None)
        except StaleEventError as error:
            return error
        fresh = {keys[owner]: state for owner, state in after.items()}
        states.update(fresh)
        self._unwritten.update(fresh)
        return Moment(tx, after, cold)

    def _served(self, moments: Sequence[Moment]) -> list[Served]:
        if not moments:
            return []
        rows = zip(moments, *self._vectors(moments), strict=True)
        return [Served(moment.order_us, values, sequence, moment.cold) for moment, values, sequence in rows]

    def _advance(
        self, tx: Transaction, keys: dict[str, str], states: dict[str, State], order: int | None
    ) -> dict[str, State]:
        """The owners' states with the event appended; the order is assigned where none is given."""
        event_us, before = to_us(tx.event_time), {owner: states[key] for owner, key in keys.items()}
        if order is None:
            if event_us < before["card"].last_event_us:
                late_s = (before["card"].last_event_us - event_us) / SECOND_US
                problem = f"Transaction {tx.transaction_id!r} is {late_s:.6f} s older than the last event of its card."
                raise StaleEventError(problem, fix="send a card's events in order of time")
            order = max(event_us, *(state.last_order + 1 for state in before.values()))
        terminal, device = hashed(tx.terminal_id), hashed(tx.device_id)
        place = hashed(tx.country), hashed(tx.merchant_category), CHANNEL_CODE[tx.channel]
        large = _is_large(before["card"], order, tx.amount_cents)
        card = before["card"].with_event((order, tx.amount_cents, terminal, device, *place, large, 0), event_us)
        row = (order, tx.amount_cents, hashed(tx.card_id))
        others = {owner: state.with_event(row, event_us) for owner, state in before.items() if owner != "card"}
        return {"card": card, **others}


def _is_large(card: State, order: int, amount: int) -> bool:
    """Whether an amount that comes now is large against the card's earlier ones."""
    if not card.rows:
        return False
    orders, amounts = card.events[: st.AMOUNT + 1]
    earlier = amounts[orders.searchsorted(order - LARGE_WINDOW_US, "right") :]
    return bool(is_large(amount, len(earlier) + 1, int(np.add.reduce(earlier)) + amount))

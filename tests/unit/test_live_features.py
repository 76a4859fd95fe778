"""A crash at any point leaves, after recovery, the same feature state as no crash at all."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_ray.data import stream_engine, windows
from deepseek_ray.data.events import Feedback, Transaction
from deepseek_ray.data.prediction_log import PredictionLog
from deepseek_ray.data.state import AnyStore, MemoryStore
from deepseek_ray.data.stream_engine import StreamEngine
from deepseek_ray.errors import FeatureError
from deepseek_ray.serving import live_features
from deepseek_ray.serving.commands import (
    FeedbackCommand,
    FeedbackResult,
    LiveModel,
    ScoreCommand,
    ScoreResult,
    TaskCommand,
    TaskResult,
)
from deepseek_ray.serving.live_features import DeferredStore, LiveFeatures
from deepseek_ray.serving.monitor import Monitor
from deepseek_ray.serving.outage import Outage
from deepseek_ray.serving.predictor import Predictor
from tests.unit.serving_parts import NOW, event

DECLARATION = windows.load()
SPEC = DECLARATION.vector("handbook")


def make_engine(store: AnyStore) -> StreamEngine:
    return StreamEngine(DECLARATION, SPEC, store, label_delay_days=0.01, sequence_len=4)


class Mean:
    """Scores a row by the share of its positive features."""

    fail = False

    def predict_proba(self, features: Any, sequence: Any) -> Any:
        if self.fail:
            raise RuntimeError("model failed")
        return (features > 0).mean(axis=1)

    def attribute(self, features: Any, sequence: Any) -> Any:
        return np.zeros_like(features)


class Service:
    """Predictor over the real engine; ``store`` outlives it like a disk outlives a process."""

    def __init__(self, path: Path, store: MemoryStore) -> None:
        self.log = PredictionLog(path / "p.db")
        self.features = LiveFeatures(make_engine, store)
        self.recovered = self.features.recover(self.log)
        live = LiveModel(Mean(), "risk", "1", "r", SPEC.service, SPEC.digest, SPEC.names, 0.9, 0)
        self.predictor = Predictor(self.features, self.log, live, Monitor())

    def score(self, events: Sequence[Transaction], *, flush: bool = True) -> ScoreResult:
        result = self.predictor.run([ScoreCommand(events)])[0]
        assert isinstance(result, ScoreResult), result
        if flush:
            self.predictor.flush()
        return result

    def label(self, prediction_id: str, *, flush: bool = True) -> None:
        item = Feedback(prediction_id=prediction_id, is_fraud=True, observed_at=NOW + timedelta(days=1))
        assert self.predictor.run([FeedbackCommand([item])]) == [FeedbackResult(1, 0)]
        if flush:
            self.predictor.flush()

    def crash(self) -> None:
        """The process dies: what was not in the store or the log is gone."""
        self.log.close()


def stream(count: int = 60) -> list[Transaction]:
    rng = random.Random(7)
    return [
        event(
            n,
            card=f"c{rng.randrange(4)}",
            at_s=60.0 * n,
            amount=rng.randrange(1, 9_000),
            terminal_id=f"m{rng.randrange(3)}",
            device_id=rng.choice(["unknown", "d1", "d2"]),
        )
        for n in range(count)
    ]


def play(service: Service, events: Iterable[Transaction], *, flush: bool = True) -> list[str]:
    ids = []
    for item in events:
        ids.append(service.score([item], flush=flush).predictions[0].prediction_id)
        if len(ids) % 5 == 0:
            service.label(ids[-3], flush=flush)
    return ids


@pytest.mark.parametrize("unflushed", [1, 5, 23])
def test_a_crash_before_the_store_is_written_is_made_good_from_the_log(tmp_path: Path, unflushed: int) -> None:
    events = stream()
    whole, crashed = MemoryStore(), MemoryStore()
    (tmp_path / "a").mkdir()
    play(Service(tmp_path / "a", whole), events)
    service = Service(tmp_path / "b", crashed)
    ids = play(service, events[:-unflushed])
    for item in events[-unflushed:]:
        ids.append(service.score([item], flush=False).predictions[0].prediction_id)
        if len(ids) % 5 == 0:
            service.label(ids[-3], flush=False)
    service.crash()
    assert crashed.blobs != whole.blobs
    again = Service(tmp_path / "b", crashed)
    assert again.recovered[0] >= unflushed
    assert crashed.blobs == whole.blobs


def test_recovery_may_be_repeated_and_starts_from_nothing_too(tmp_path: Path) -> None:
    events = stream()
    store = MemoryStore()
    play(Service(tmp_path, store), events)
    expected = dict(store.blobs)
    Service(tmp_path, store)
    assert store.blobs == expected
    lost = MemoryStore()
    Service(tmp_path, lost)
    assert lost.blobs == expected


def test_served_vectors_after_a_crash_equal_those_without_one(tmp_path: Path) -> None:
    events = stream()
    store = MemoryStore()
    service = Service(tmp_path, store)
    play(service, events[:40], flush=False)
    service.crash()
    after = Service(tmp_path, store)
    last = after.log.get(after.score([events[40]]).predictions[0].prediction_id)
    other = Service(tmp_path / "other", MemoryStore())
    play(other, events[:40])
    expected = other.log.get(other.score([events[40]]).predictions[0].prediction_id)
    assert last is not None
    assert expected is not None
    np.testing.assert_array_equal(last.values, expected.values)
    np.testing.assert_array_equal(last.sequence, expected.sequence)


def test_a_failed_batch_is_undone_but_earlier_unwritten_events_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = stream(3)
    store, plain = MemoryStore(), MemoryStore()
    service = Service(tmp_path, store)
    service.score([first], flush=False)
    with monkeypatch.context() as patch:
        patch.setattr(Mean, "fail", True)
        assert isinstance(service.predictor.run([ScoreCommand([second])])[0], RuntimeError)
    service.score([second])
    service.score([third])
    engine = make_engine(plain)
    for item in (first, second, third):
        engine.observe(item)
    assert store.blobs == plain.blobs


def test_the_deferred_store_reads_its_own_writes() -> None:
    store = MemoryStore()
    deferred = DeferredStore(store)
    deferred.write_states([("a", b"1", 1)])
    deferred.keep()
    deferred.write_states([("a", b"2", 2), ("b", b"3", 1)])
    assert deferred.read_states(["a", "b", "c"]) == [b"2", b"3", None]
    deferred.discard()
    assert deferred.read_states(["a", "b"]) == [b"1", None]
    assert store.blobs == {}
    deferred.flush()
    assert store.blobs == {"a": b"1"}


def test_a_full_cache_lets_nothing_go_that_is_being_read() -> None:
    deferred = DeferredStore(MemoryStore(), cache_bytes=2_000)
    deferred.write_states([("a", b"x" * 900, 1), ("b", b"x" * 900, 1)])
    deferred.keep()
    deferred.flush()
    assert deferred.read_states(["a", "new"]) == [b"x" * 900, None]


def test_a_full_cache_loses_nothing_that_waits_to_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    deferred = DeferredStore(store, cache_bytes=0)
    deferred.write_states([("a", b"1", 1), ("b", b"1", 1)])
    deferred.keep()
    deferred.fetch(["c"])  # lets all go that may go
    assert deferred.read_states(["a", "c"]) == [b"1", None]
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_states", None)
        with pytest.raises(TypeError):
            deferred.flush()
    deferred.fetch(["c"])
    deferred.write_states([("a", b"2", 2)])
    deferred.keep()
    deferred.fetch(["d"])
    assert deferred.read_states(["a", "b"]) == [b"2", b"1"]
    deferred.flush()
    assert store.blobs == {"a": b"2", "b": b"1"}
    deferred.fetch(["d"])
    assert deferred.read_states(["a", "b", "c"]) == [b"2", b"1", None]


def test_states_in_memory_are_not_decoded_again_and_little_memory_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, plain, narrow = stream(), MemoryStore(), MemoryStore()
    play(Service(tmp_path / "plain", plain), events)
    service = Service(tmp_path / "narrow", narrow)
    service.features._store._cache.max_bytes = 2_000
    play(service, events)
    assert narrow.blobs == plain.blobs
    again = Service(tmp_path / "plain", plain)
    again.features.flush()
    later = [item.model_copy(update={"transaction_id": f"later{n}"}) for n, item in enumerate(events[-1:] * 5)]
    again.score(later[:1])
    with monkeypatch.context() as patch:
        patch.setattr(stream_engine.st, "decode", None)
        for item in later[1:]:
            again.score([item])


def test_a_look_at_the_features_leaves_nothing_behind(tmp_path: Path) -> None:
    store = MemoryStore()
    service = Service(tmp_path, store)
    play(service, stream()[:20])
    before = dict(store.blobs)
    after = stream()[20]
    peeked = service.features.peek(after)
    service.features.keep()
    service.features.flush()
    assert store.blobs == before
    served = service.log.get(service.score([after]).predictions[0].prediction_id)
    assert served is not None
    np.testing.assert_array_equal(peeked.values, served.values)


def test_features_of_another_vector_take_over_from_the_log_with_nothing_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared aside up to some row, brought to the end by the worker: then as if it had served from the beginning."""
    monkeypatch.setattr(live_features, "REPLAY_CHUNK", 7)
    other = DECLARATION.vector("handbook_history")

    def make_other(store: AnyStore) -> StreamEngine:
        return StreamEngine(DECLARATION, other, store, label_delay_days=0.01, sequence_len=4)

    events, store, truth = stream(), MemoryStore(), MemoryStore()
    service = Service(tmp_path, store)
    straight = LiveFeatures(make_other, truth)
    for number, item in enumerate(events):
        answer = service.score([item])
        straight.observe_many([item])
        if number % 5 == 0:
            service.label(answer.predictions[0].prediction_id)
            straight.apply_label(*_label(service, answer.predictions[0].prediction_id))
        straight.keep()
        if number == 30:
            prepared = LiveFeatures(make_other, store).replay(service.log, (0, 0))
    straight.flush()
    assert (prepared.counts, service.log.last_service()) == ((31, 7), SPEC.service)
    assert service.log.last_rows() == (60, 12)
    features = LiveFeatures(make_other, store)
    live = LiveModel(Mean(), "risk", "2", "r", other.service, other.digest, other.names, 0.9, 0)

    def work() -> None:
        service.predictor.hand_over(features, lambda: features.replay(service.log, prepared.last), live)  # type: ignore[arg-type,func-returns-value]

    assert service.predictor.run([TaskCommand(work)]) == [TaskResult()]
    keys = [key for key in truth.blobs if key.startswith(other.service)]
    assert [store.blobs[key] for key in keys] == [truth.blobs[key] for key in keys]
    assert len(keys) > 5
    last = service.score([events[-1].model_copy(update={"transaction_id": "after"})])
    assert (last.predictions[0].model_version, last.predictions[0].feature_service) == ("2", other.service)
    assert service.log.last_service() == other.service


def _label(service: Service, prediction_id: str) -> tuple[Any, bool, int]:
    target = service.log.label_targets([prediction_id])[prediction_id]
    return target, True, service.log.labels_after(0)[-1][2].known_us


def test_work_that_fails_leaves_the_features_as_they_were(tmp_path: Path) -> None:
    service = Service(tmp_path, MemoryStore())
    service.score(stream(3))
    card = stream(3)[0].card_id

    def fails() -> None:
        raise OSError("disk full")

    def work() -> None:
        service.predictor.hand_over(LiveFeatures(make_engine, MemoryStore()), fails, service.predictor.live)

    [error] = service.predictor.run([TaskCommand(work)])
    assert isinstance(error, OSError)
    assert "card" not in service.score([event(99, card=card, at_s=9_000.0)]).predictions[0].cold


class Flaky(MemoryStore):
    """A store that can be out of reach, at once or after some more reads."""

    away = False
    reads = 0
    breaks_after = float("inf")

    def read_states(self, keys: Sequence[str]) -> list[bytes | None]:
        self.reads += 1
        if self.away or self.reads > self.breaks_after:
            raise OSError("no route to the store")
        return super().read_states(keys)

    def write_states(self, states: Iterable[tuple[str, bytes, int]]) -> None:
        if self.away:
            raise OSError("no route to the store")
        super().write_states(states)


def test_without_the_store_scores_are_degraded_and_later_made_good(tmp_path: Path, caplog: Any) -> None:
    events = stream(40)
    plain = Service(tmp_path / "plain", MemoryStore())
    store = Flaky()
    service = Service(tmp_path / "flaky", store)
    play(service, events[:20])
    play(plain, events[:20])
    for item in events[20:30]:
        plain.score([item])
    cold = Service(tmp_path / "flaky", store)
    cold.features._store.forget("any")  # nothing is in memory
    clock = iter(range(0, 10_000, 100))
    cold.features._outage = Outage(lambda: next(clock))
    store.away = True
    answers = [cold.score([item]).predictions[0] for item in events[20:30]]
    assert answers[0].degraded
    assert answers[0].cold == []
    assert cold.features.behind
    assert cold.predictor.healthy
    assert "cannot be read" in caplog.text
    label = Feedback(prediction_id=answers[0].prediction_id, is_fraud=True, observed_at=NOW + timedelta(days=1))
    (refused,) = cold.predictor.run([FeedbackCommand([label])])
    assert isinstance(refused, FeatureError), "its place in the history is not known"
    store.away = False
    for each in (plain, cold):
        play(each, events[30:])
        assert not each.features.behind
        assert not each.score([event(99, at_s=5_000.0)]).predictions[0].degraded
    assert store.blobs == states_of(plain)
    logged = {row.transaction.transaction_id: row for row in map(cold.log.get, ids_of(cold)) if row}
    assert logged["t20"].feature_digest == "degraded"
    assert logged["t39"].feature_digest == SPEC.digest


def test_a_repeat_during_an_outage_does_not_keep_the_replay_from_the_store(tmp_path: Path) -> None:
    """A batch with nothing fresh says what it does without, and nothing ends that but the next batch."""
    events = stream(30)
    plain, store = Service(tmp_path / "plain", MemoryStore()), Flaky()
    for item in events:
        plain.score([item])
    first = Service(tmp_path / "flaky", store)
    for item in events[:20]:
        first.score([item])
    cold = Service(tmp_path / "flaky", store)
    cold.features._store.forget("any")  # nothing is in memory
    clock = iter(range(0, 10_000, 100))
    cold.features._outage = Outage(lambda: next(clock))
    store.away = True
    for item in events[20:29]:
        cold.score([item])
    assert cold.score([events[28]]).repeated == 1
    store.away = False
    cold.score([events[29]])
    assert store.blobs == states_of(plain)


def test_a_store_that_cannot_be_written_costs_no_answer_and_no_event(tmp_path: Path) -> None:
    events = stream(40)
    plain, store = Service(tmp_path / "plain", MemoryStore()), Flaky()
    service = Service(tmp_path / "flaky", store)
    for each in (plain, service):
        play(each, events[:20])
        store.away = each is service
        for item in events[20:30]:
            each.score([item])
    store.away = False
    play(plain, events[30:])
    service.features._outage = Outage(lambda: 0.0)
    service.features._outage.begin()
    service.features._outage._now_s = lambda: 1e9
    play(service, events[30:])
    again = service.features.peek(event(99, at_s=9_000.0, card="c1"))
    want = plain.features.peek(event(99, at_s=9_000.0, card="c1"))
    np.testing.assert_array_equal(again.values, want.values)


def outage(service: Service) -> None:
    """From now on nothing is in memory, and each batch asks the store again."""
    service.features._store.clear()
    clock = iter(range(0, 10_000, 100))
    service.features._outage = Outage(lambda: next(clock))


def test_an_event_of_an_unknown_history_takes_its_place_after_all_that_was_served(tmp_path: Path) -> None:
    """Its terminal has seen a later event, and its card one of the same moment: by its own time it would be lost."""
    store = Flaky()
    service = Service(tmp_path, store)
    service.score([event(1, card="c1", at_s=100.0), event(2, card="c2", at_s=130.0)])
    outage(service)
    store.away = True
    early = [event(3, card="c1", at_s=100.0), event(4, card="c3", at_s=90.0), event(5, card="c1", at_s=101.0)]
    for item in early:
        assert service.score([item]).predictions[0].degraded
    store.away = False
    service.score([event(6, card="c4", at_s=140.0)])
    rows = service.log._db.execute("SELECT transaction_id, order_us FROM predictions ORDER BY order_us").fetchall()
    assert [name for name, _ in rows] == ["t1", "t2", "t3", "t4", "t5", "t6"]
    engine = make_engine(store)
    keys = engine.keys_of("c1", "m1", "unknown")
    card, terminal = (engine._load([key])[key].events[0].tolist() for key in (keys["card"], keys["terminal"]))
    assert terminal == [order for _, order in rows]
    assert card == [order for name, order in rows if name in ("t1", "t3", "t5")]
    again = Service(tmp_path, MemoryStore())  # the log alone gives the same
    assert states_of(again) == store.blobs


def test_labels_of_a_request_are_read_in_one_round_trip(tmp_path: Path) -> None:
    store = Flaky()
    service = Service(tmp_path, store)
    ids = play(service, [event(number, card=f"c{number}", terminal_id=f"m{number}") for number in range(4)])
    service.features._store.clear()
    store.reads = 0
    labels = [Feedback(prediction_id=name, is_fraud=True, observed_at=NOW + timedelta(days=1)) for name in ids]
    assert service.predictor.run([FeedbackCommand(labels)]) == [FeedbackResult(4, 0)]
    assert store.reads == 1


def test_a_service_that_starts_without_its_store_is_made_good_later(tmp_path: Path) -> None:
    events = stream(40)
    plain, store = Service(tmp_path / "plain", MemoryStore()), Flaky()
    play(plain, events[:20])
    play(Service(tmp_path / "flaky", store), events[:20], flush=False)  # and dies
    store.away = True
    started = Service(tmp_path / "flaky", store)
    assert (started.recovered, started.features.behind) == ((0, 0), True)
    outage(started)
    started.features._outage.begin()
    for item in events[20:30]:
        plain.score([item])
        assert started.score([item]).predictions[0].degraded
    store.away = False
    play(plain, events[30:])
    play(started, events[30:])
    assert not started.features.behind
    assert store.blobs == states_of(plain)


def test_a_first_start_without_the_store_is_refused(tmp_path: Path) -> None:
    store = Flaky()
    store.away = True
    with pytest.raises(OSError, match="no route"):
        Service(tmp_path, store).features.peek(event(1))


def test_a_store_that_leaves_again_during_the_replay_leaves_no_half_history(tmp_path: Path) -> None:
    events = stream(40)
    store = Flaky()
    service = Service(tmp_path / "flaky", store)
    play(service, events[:20])
    outage(service)
    store.away = True
    for item in events[20:30]:
        assert service.score([item]).predictions[0].degraded
    store.away, store.reads, store.breaks_after = False, 0, 6  # the probe and some of the replay
    store.blobs.clear()
    assert service.score([events[30]]).predictions[0].degraded
    assert service.features.behind
    store.breaks_after = float("inf")
    service.score(events[31:])
    assert store.blobs == states_of(Service(tmp_path / "flaky", MemoryStore()))


def states_of(service: Service) -> dict[str, bytes]:
    """The states that a service has written."""
    store = service.features._store._store
    assert isinstance(store, MemoryStore)
    return store.blobs


def ids_of(service: Service) -> list[str]:
    """All prediction ids of a log."""
    return [row[0] for row in service.log._db.execute("SELECT prediction_id FROM predictions")]

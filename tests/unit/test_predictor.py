"""One batch: all or nothing for each request, log before answer, state after log."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from deepseek_ray.data.events import Feedback, Transaction, to_us
from deepseek_ray.errors import EnvironmentProblemError, FeatureError, RequestError
from deepseek_ray.serving import predictor
from deepseek_ray.serving.commands import FeedbackCommand, FeedbackResult, ScoreCommand, ScoreResult
from tests.unit.serving_parts import NOW, FakeScorer, Rig, event, live_model, rig


def scored(made: Rig, *events: object) -> ScoreResult:
    result = made.predictor.run([ScoreCommand(events)])[0]  # type: ignore[arg-type]
    assert isinstance(result, ScoreResult), result
    return result


def refused(made: Rig, command: ScoreCommand | FeedbackCommand) -> RequestError:
    result = made.predictor.run([command])[0]
    assert isinstance(result, RequestError), result
    return result


def feedback(prediction_id: str, is_fraud: bool = True, days: float = 1.0) -> Feedback:
    return Feedback(prediction_id=prediction_id, is_fraud=is_fraud, observed_at=NOW + timedelta(days=days))


def test_a_score_is_answered_and_logged_with_its_inputs(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        answer = scored(made, event(1, amount=9_000)).predictions[0]
        assert (answer.probability, answer.decision, answer.threshold) == (0.9, "review", 0.5)
        assert answer.cold == ["card"]
        assert [(r.feature, r.contribution) for r in answer.reasons] == [("amount", 9.0), ("count", -1.0)]
        row = made.log.get(answer.prediction_id)
        assert row is not None
        assert row.values.tolist() == [9_000.0, 1.0]
        assert row.model_version == answer.model_version == "1"


def test_approvals_carry_no_reasons(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        assert scored(made, event(1)).predictions[0].reasons == []


def test_the_same_transaction_again_gives_the_stored_answer(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        first, again = scored(made, event(1)), scored(made, event(1))
        assert again.predictions == first.predictions
        assert (first.repeated, again.repeated) == (0, 1)
        assert made.state.counts == {"c1": 1}


def test_the_same_id_with_another_amount_is_a_conflict(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        scored(made, event(1))
        error = refused(made, ScoreCommand([event(1, amount=2_000)]))
        assert (error.status, error.kind) == (409, "duplicate-transaction")
        assert "was sent before with another amount_cents: 1000, now 2000" in str(error)


def test_an_id_that_stands_twice_in_one_request_was_not_sent_before(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        error = refused(made, ScoreCommand([event(1), event(1, amount=2_000)]))
        assert (error.status, error.kind, error.fix) == (
            409,
            "duplicate-transaction",
            "give each transaction its own id",
        )
        assert "(number 1 of the request) stands in the request twice, the second time with another" in str(error)
        assert made.state.counts == {}


def test_duplicates_within_one_batch_count_once(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        one, two, bad = made.predictor.run(
            [ScoreCommand([event(1)]), ScoreCommand([event(1), event(2)]), ScoreCommand([event(2, amount=5)])]
        )
        assert isinstance(one, ScoreResult)
        assert isinstance(two, ScoreResult)
        assert one.predictions[0] == two.predictions[0]
        assert isinstance(bad, RequestError)
        assert made.state.counts == {"c1": 2}


def test_a_stale_event_refuses_its_whole_request_and_no_other(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        scored(made, event(1, at_s=0))
        mixed = ScoreCommand([event(2, card="c2"), event(3, at_s=-10)])
        bad, good = made.predictor.run([mixed, ScoreCommand([event(4, card="c3")])])
        assert isinstance(bad, RequestError)
        assert (bad.status, bad.kind) == (409, "stale-event")
        assert "10 s older than the last event of card 'c1'" in str(bad)
        assert isinstance(good, ScoreResult)
        assert made.state.counts == {"c1": 1, "c3": 1}


def test_equal_times_are_not_stale(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        assert len(scored(made, event(1), event(2)).predictions) == 2


def test_a_failing_model_leaves_no_trace_and_a_retry_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(tmp_path) as made:
        monkeypatch.setattr(FakeScorer, "fail", True)
        assert isinstance(made.predictor.run([ScoreCommand([event(1)])])[0], RuntimeError)
        monkeypatch.setattr(FakeScorer, "fail", False)
        assert scored(made, event(1)).predictions[0].cold == ["card"]
        assert made.state.counts == {"c1": 1}


def test_a_failing_batch_does_not_undo_labels_of_the_same_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(tmp_path) as made:
        answer = scored(made, event(1)).predictions[0]
        monkeypatch.setattr(FakeScorer, "fail", True)
        failed, label = made.predictor.run(
            [ScoreCommand([event(2)]), FeedbackCommand([feedback(answer.prediction_id)])]
        )
        assert isinstance(failed, RuntimeError)
        assert label == FeedbackResult(1, 0)
        assert len(made.state.labels) == 1


def test_a_swap_changes_the_next_batch_only_by_its_reference(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        scored(made, event(1))
        made.predictor.swap(live_model("2", threshold=0.05))
        answer = scored(made, event(2)).predictions[0]
        assert (answer.model_version, answer.decision) == ("2", "review")


def test_feedback_is_taken_once_and_reaches_the_features(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        answer = scored(made, event(1)).predictions[0]
        item = feedback(answer.prediction_id)
        assert made.predictor.run([FeedbackCommand([item, item])]) == [FeedbackResult(1, 1)]
        assert made.predictor.run([FeedbackCommand([item])]) == [FeedbackResult(0, 1)]
        assert made.state.labels == [(answer.prediction_id, True, to_us(item.observed_at))]


def test_a_label_never_counts_before_events_already_served(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        answer = scored(made, event(1)).predictions[0]
        scored(made, event(2, card="c2", at_s=200))
        made.predictor.run([FeedbackCommand([feedback(answer.prediction_id, days=0.001)])])
        assert made.state.labels[0][2] == to_us(NOW) + 200_000_001


def test_wrong_feedback_is_refused_as_a_whole(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        answer = scored(made, event(1)).predictions[0]
        unknown = refused(made, FeedbackCommand([feedback(answer.prediction_id), feedback("p-unknown")]))
        assert (unknown.status, unknown.kind) == (404, "unknown-prediction")
        assert made.state.labels == []
        early = refused(made, FeedbackCommand([feedback(answer.prediction_id, days=-1)]))
        assert (early.status, early.field) == (422, "observed_at")
        made.predictor.run([FeedbackCommand([feedback(answer.prediction_id)])])
        conflict = refused(made, FeedbackCommand([feedback(answer.prediction_id, is_fraud=False)]))
        assert (conflict.status, conflict.kind) == (409, "conflicting-feedback")


def test_state_reaches_its_store_after_the_log_and_survives_a_store_outage(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        made.state.fail_flush = True
        scored(made, event(1))
        made.predictor.flush()
        assert not made.predictor.healthy
        assert made.log.applied == (0, 0)
        made.state.fail_flush = False
        scored(made, event(2))
        made.predictor.flush()
        assert made.predictor.healthy
        assert made.state.flushed == {"c1": 2}
        scored(made, event(3))
        assert made.log.applied == (2, 0)


def test_a_label_that_the_state_refuses_is_in_neither_state_nor_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OSError("store is away")

    with rig(tmp_path) as made:
        answer = scored(made, event(1)).predictions[0]
        command = FeedbackCommand([feedback(answer.prediction_id)])
        with monkeypatch.context() as patch:
            patch.setattr(made.state, "apply_label", away)
            assert isinstance(made.predictor.run([command])[0], OSError)
        assert made.predictor.run([command]) == [FeedbackResult(1, 0)]
        assert len(made.state.labels) == 1


def test_a_broken_state_fails_the_requests_of_its_card_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(tmp_path) as made:
        observe = made.state._observe

        def broken(item: Transaction) -> object:
            if item.card_id == "c2":
                raise FeatureError("The feature state is corrupted.")
            return observe(item)

        monkeypatch.setattr(made.state, "_observe", broken)
        commands = [ScoreCommand([event(number, card=f"c{number}")]) for number in (1, 2, 3)]
        first, second, third = made.predictor.run(commands)
        assert isinstance(first, ScoreResult)
        assert isinstance(second, FeatureError)
        assert isinstance(third, ScoreResult)
        assert made.state.counts == {"c1": 1, "c3": 1}


def test_a_swap_does_not_split_a_batch_that_runs_again_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(tmp_path) as made:
        observe = made.state._observe

        def broken(item: Transaction) -> object:
            made.predictor.swap(live_model("2"))
            if item.card_id == "c2":
                raise FeatureError("The feature state is corrupted.")
            return observe(item)

        monkeypatch.setattr(made.state, "_observe", broken)
        results = made.predictor.run([ScoreCommand([event(number, card=f"c{number}")]) for number in (1, 2, 3)])
        answers = [one for result in results if isinstance(result, ScoreResult) for one in result.predictions]
        assert [one.model_version for one in answers] == ["1", "1"]


def test_what_the_archive_holds_is_dropped_some_after_each_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "DROPPED_A_BATCH", 2)

    def held(made: Rig) -> list[str]:
        ids = [made.log.by_transaction([f"t{number}"])[f"t{number}"].prediction_id for number in range(1, 6)]
        rows = [made.log.get(name) for name in ids]
        return [row.transaction.transaction_id for row in rows if row is not None and row.values.size]

    with rig(tmp_path) as made:
        scored(made, *(event(number, card=f"c{number}") for number in range(1, 6)))
        made.predictor.settle()
        assert held(made) == ["t1", "t2", "t3", "t4", "t5"]
        made.predictor.archived = 3
        for left in (["t3", "t4", "t5"], ["t4", "t5"], ["t4", "t5"]):
            made.predictor.settle(write=False)
            assert held(made) == left
        assert scored(made, event(1, card="c1")).repeated == 1  # still known by its transaction


def test_the_log_is_closed_though_its_last_commit_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    def full(*_: object, **__: object) -> None:
        raise EnvironmentProblemError("disk full")

    with rig(tmp_path) as made, monkeypatch.context() as patch:
        close = made.log.close
        patch.setattr(made.log, "commit", full)
        patch.setattr(made.log, "close", lambda: (close(), closed.append(True)))
        with pytest.raises(EnvironmentProblemError, match="disk full"):
            made.predictor.close()
    assert closed == [True]

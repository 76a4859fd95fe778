"""Recorded days played as clients would: a card's payments in order, labels when due, no failure forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from aiohttp import web

from deepseek_ray.client import RiskClient
from deepseek_ray.data.events import DAY_US, to_us
from deepseek_ray.data.table import to_table
from deepseek_ray.errors import RequestError
from deepseek_ray.online import playback
from deepseek_ray.online.playback import (
    Label,
    Outcome,
    late_labels,
    play_day,
    send_labels,
    send_threshold,
    send_transactions,
    to_transactions,
)
from tests.unit.risk_server import KEY, RiskServer
from tests.unit.serving_parts import event

MORNING = datetime(2026, 1, 5, tzinfo=UTC)
DELAY_DAYS = 1.0


def recorded(hours: list[float], **columns: list[Any]) -> pl.DataFrame:
    """A transactions table with one payment at each hour after midnight of 5 January, labelled genuine."""
    count = len(hours)
    defaults = {
        "transaction_id": [f"t{number}" for number in range(count)],
        "card_id": [f"c{number}" for number in range(count)],
        "terminal_id": ["m1"] * count,
        "amount_cents": [1_000] * count,
        "is_fraud": [0] * count,
    }
    times = {"event_time": [MORNING + timedelta(hours=hour) for hour in hours]}
    return to_table(pl.DataFrame(defaults | times | columns), label_delay_days=DELAY_DAYS)


def play(server: RiskServer, story: Callable[[RiskClient], Awaitable[Any]]) -> Any:
    """Run a story with a client of the server."""

    async def run() -> Any:
        async with server.running() as url, RiskClient(url, api_key=KEY, connections=16) as client:
            return await story(client)

    return asyncio.run(run())


def no_limit() -> float:
    return 0.0


def test_a_card_keeps_its_order_while_cards_go_side_by_side() -> None:
    server, outcome = RiskServer(delay_s=0.002), Outcome()
    events = [event(number, card=f"c{number % 7}", at_s=number) for number in range(60)]
    play(server, lambda client: send_transactions(client, events, outcome, lanes=4, rate_per_s=no_limit))
    for card in {item.card_id for item in events}:
        own = [item for item in events if item.card_id == card]
        assert [item for item in server.scored if item.card_id == card] == own
    assert not server.overtaken
    assert 2 <= server.most_at_once <= 4
    assert outcome.predictions == {item.transaction_id: f"p-{item.transaction_id}" for item in events}
    assert (outcome.requests, len(outcome.latencies_ms), outcome.failures) == (60, 60, [])


def test_progress_counts_every_request() -> None:
    counts: list[int] = []
    events = [event(number, card=f"c{number}") for number in range(5)]
    play(
        RiskServer(),
        lambda client: send_transactions(
            client, events, Outcome(), lanes=2, rate_per_s=no_limit, progress=counts.append
        ),
    )
    assert counts == [1] * 5


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s, self.sleeps = 100.0, []  # type: ignore[var-annotated]

    def perf_counter(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(round(seconds, 6))
        self.now_s += max(seconds, 0.0)


def test_requests_are_spaced_by_the_rate_of_their_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rates = Clock(), iter([10.0, 10.0, 2.0, 2.0, 0.0])
    monkeypatch.setattr(playback.time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr(playback.asyncio, "sleep", clock.sleep)

    async def story() -> None:
        pacer = playback._Pacer(lambda: next(rates))
        for _ in range(5):
            await pacer.wait()

    asyncio.run(story())
    assert clock.sleeps == [0.0, 0.1, 0.1, 0.5]  # and not at all when there is no limit


def test_a_slow_answer_is_not_made_up_for_by_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(playback.time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr(playback.asyncio, "sleep", clock.sleep)

    async def story() -> None:
        pacer = playback._Pacer(lambda: 10.0)
        await pacer.wait()
        clock.now_s += 5.0
        await pacer.wait()
        await pacer.wait()

    asyncio.run(story())
    assert clock.sleeps == [0.0, 0.0, 0.1]


def test_an_open_loop_keeps_to_its_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(playback.time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr(playback.asyncio, "sleep", clock.sleep)

    async def story() -> list[float]:
        pacer = playback._Pacer(lambda: 10.0, open_loop=True)
        due = [await pacer.wait()]
        clock.now_s += 0.25  # an answer that takes as long as two and a half requests
        return due + [await pacer.wait() for _ in range(4)]

    assert asyncio.run(story()) == pytest.approx([100.0, 100.1, 100.2, 100.3, 100.4])
    assert clock.now_s == pytest.approx(100.4)


class Stalling(RiskServer):
    """Answers its first request after 0.4 s, the others at once."""

    async def _work(self, cards: list[str]) -> None:
        await asyncio.sleep(0.0 if self.scored else 0.4)


def stalled(*, open_loop: bool) -> Outcome:
    """Thirty requests at 50 a second over one lane."""
    outcome, events = Outcome(), [event(number, card=f"c{number}", at_s=number) for number in range(30)]
    pace: dict[str, Any] = {"lanes": 1, "rate_per_s": lambda: 50.0, "open_loop": open_loop}
    play(Stalling(), lambda client: send_transactions(client, events, outcome, **pace))
    return outcome


def test_a_stall_is_seen_by_every_request_that_was_due_in_it() -> None:
    outcome = stalled(open_loop=True)
    assert sum(latency > 100 for latency in outcome.latencies_ms) >= 10  # of 20 that were due in the meantime
    assert outcome.figures()["http_achieved_rate"] == pytest.approx(50.0, rel=0.2)


def test_without_a_schedule_a_stall_shows_in_the_rate_alone() -> None:
    outcome = stalled(open_loop=False)
    assert sum(latency > 300 for latency in outcome.latencies_ms) == 1
    assert outcome.figures()["http_achieved_rate"] < 40.0


def test_a_threshold_goes_to_the_version_it_was_computed_for(caplog: pytest.LogCaptureFixture) -> None:
    server = RiskServer()
    assert play(server, lambda client: send_threshold(client, 0.2, "1"))
    server.model_version = "2"  # swapped in between
    with caplog.at_level("WARNING", logger=playback.log.name):
        playback.log.addHandler(caplog.handler)
        assert not play(server, lambda client: send_threshold(client, 0.3, "1"))
        playback.log.removeHandler(caplog.handler)
    assert server.threshold == 0.2
    assert "of version 1 is left out" in caplog.text


def test_another_refusal_of_a_threshold_is_an_error() -> None:
    server = RiskServer(refuse=lambda body: web.json_response({"detail": "no number"}, status=422))
    with pytest.raises(RequestError, match="no number"):
        play(server, lambda client: send_threshold(client, 0.2, "1"))


def test_a_failed_request_is_kept_and_the_rest_goes_on() -> None:
    def refuse(body: dict[str, Any]) -> web.Response | None:
        broken = "transactions" in body and body["transactions"][0]["transaction_id"] == "t2"
        return web.json_response({"detail": "no room"}, status=500) if broken else None

    server, outcome = RiskServer(refuse=refuse), Outcome()
    events = [event(number, at_s=number) for number in (1, 2, 3)]
    play(server, lambda client: send_transactions(client, events, outcome, lanes=3, rate_per_s=no_limit))
    assert sorted(outcome.predictions) == ["t1", "t3"]
    assert outcome.requests == 3
    assert ["no room" in text for text in outcome.failures] == [True]
    figures = outcome.figures()
    assert (figures["requests"], figures["transactions"], figures["failed"]) == (3, 2, 1)
    assert figures["failures"] == outcome.failures


def test_labels_go_out_in_batches_and_only_for_scored_transactions() -> None:
    server = RiskServer()
    outcome = Outcome(predictions={f"t{number}": f"p-t{number}" for number in range(600)})
    labels = [Label(number, f"t{number}", number % 100 == 0) for number in range(700)]
    play(server, lambda client: send_labels(client, labels, outcome))
    assert server.feedback_sizes == [250, 250, 100]
    assert server.labels == {f"p-t{number}": number % 100 == 0 for number in range(600)}
    assert outcome.feedback == 600


def test_refused_labels_are_a_failure_too() -> None:
    server = RiskServer(refuse=lambda body: web.json_response({"detail": "unknown id", "type": "x"}, status=404))
    outcome = Outcome(predictions={"t1": "p-t1"})
    play(server, lambda client: send_labels(client, [Label(0, "t1", True)], outcome))
    assert (outcome.feedback, len(outcome.failures)) == (0, 1)


def test_labels_are_due_after_the_delay_and_some_come_late() -> None:
    table = recorded([float(number) / 100 for number in range(1_000)])
    on_time = late_labels(table, share=0.0, max_days=2.0, seed=0)
    assert [label.due_us for label in on_time] == table["label_us"].to_list()
    labels = late_labels(table, share=0.1, max_days=2.0, seed=0)
    due = {label.transaction_id: label.due_us for label in labels}
    late_us = [due[name] - at for name, at in table.select("transaction_id", "label_us").iter_rows()]
    assert min(late_us) == 0
    assert max(late_us) <= 2 * DAY_US
    assert sum(value > 0 for value in late_us) == pytest.approx(100, abs=30)
    assert [label.due_us for label in labels] == sorted(due.values())
    assert labels == late_labels(table, share=0.1, max_days=2.0, seed=0)


def test_a_payment_without_a_label_gets_none() -> None:
    labels = late_labels(recorded([1, 2], is_fraud=[None, 1]), share=0.0, max_days=0.0, seed=0)
    assert [(label.transaction_id, label.is_fraud) for label in labels] == [("t1", True)]


def test_a_day_sends_the_labels_of_each_quarter_before_its_payments() -> None:
    table = recorded([1, 7, 13, 30])
    start_us = to_us(MORNING)
    labels = [
        Label(start_us - 1, "old", True),
        Label(start_us + 8 * 3_600_000_000, "t0", False),
        Label(start_us + DAY_US - 1, "t1", True),
        Label(start_us + DAY_US, "t2", False),
    ]
    server, outcome = RiskServer(), Outcome(predictions={"old": "p-old"})
    later = play(
        server,
        lambda client: play_day(client, table, start_us, labels, outcome, lanes=2, rate_per_s=no_limit),
    )
    assert [item.transaction_id for item in server.scored] == ["t0", "t1", "t2"]  # the fourth is of the next day
    assert server.labels == {"p-old": True, "p-t0": False, "p-t1": True}
    assert server.feedback_sizes == [1, 1, 1]
    assert later == labels[3:]


def test_rows_become_the_records_that_were_recorded() -> None:
    table = recorded([1.5], channel=["online"], country=["FR"])
    (sent,) = to_transactions(table)
    assert (sent.transaction_id, sent.card_id, sent.channel, sent.country) == ("t0", "c0", "online", "FR")
    assert sent.event_time == MORNING + timedelta(hours=1.5)


def test_figures_and_histogram_of_latencies() -> None:
    outcome = Outcome(latencies_ms=[float(number) for number in range(1, 101)])
    figures = outcome.figures()
    assert (figures["http_p50_ms"], figures["http_p99_ms"]) == (pytest.approx(50.5), pytest.approx(99.01))
    bins = outcome.histogram(10)
    assert sum(count for _, count in bins) == 100
    assert [edge for edge, _ in bins] == sorted(edge for edge, _ in bins)
    assert (Outcome().figures()["http_p50_ms"], Outcome().histogram()) == (None, [])

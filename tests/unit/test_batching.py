"""Batches form when the worker is idle, up to a cap, and one bad item harms no other."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Sequence

import pytest

from deepseek_ray.errors import LateError, OverloadedError
from deepseek_ray.serving import batching
from deepseek_ray.serving.batch_control import MIN_BATCHES
from deepseek_ray.serving.batching import Batcher


class Work:
    """Doubles numbers; waits while the gate is shut; notes each batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.started = threading.Event()
        self.gate = threading.Event()

    def __call__(self, items: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(items))
        self.started.set()
        assert self.gate.wait(10)
        return [ValueError(str(item)) if item < 0 else 2 * item for item in items]


async def _first_then(batcher: Batcher[int, int], work: Work, items: Sequence[int]) -> list[int | BaseException]:
    first = asyncio.create_task(batcher.submit(0))
    await asyncio.to_thread(work.started.wait, 10)
    rest = [asyncio.create_task(batcher.submit(item)) for item in items]
    await asyncio.sleep(0.01)
    work.gate.set()
    return list(await asyncio.gather(first, *rest, return_exceptions=True))


def test_what_waits_becomes_one_batch_up_to_the_cap() -> None:
    work = Work()
    batcher = Batcher[int, int](work, max_batch_size=3, max_queued=100)
    assert asyncio.run(_first_then(batcher, work, [1, 2, 3, 4, 5])) == [0, 2, 4, 6, 8, 10]
    batcher.close()
    assert work.batches == [[0], [1, 2, 3], [4, 5]]


def test_one_failing_item_fails_alone() -> None:
    work = Work()
    batcher = Batcher[int, int](work, max_batch_size=8, max_queued=100)
    results = asyncio.run(_first_then(batcher, work, [1, -7, 3]))
    batcher.close()
    assert results[1] == 2
    assert isinstance(results[2], ValueError)
    assert results[3] == 6


def test_a_failing_batch_fails_its_items_and_the_worker_lives_on() -> None:
    calls = 0

    def work(items: Sequence[int]) -> list[int | Exception]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("boom")
        return list(items)

    async def story() -> int:
        with pytest.raises(RuntimeError, match="boom"):
            await batcher.submit(1)
        return await batcher.submit(2)

    batcher = Batcher[int, int](work, max_batch_size=8, max_queued=8)
    assert asyncio.run(story()) == 2
    batcher.close()


def test_a_full_queue_refuses_and_keeps_what_it_holds() -> None:
    work = Work()
    batcher = Batcher[int, int](work, max_batch_size=1, max_queued=2)
    results = asyncio.run(_first_then(batcher, work, [1, 2, 3]))
    batcher.close()
    assert results[:3] == [0, 2, 4]
    assert isinstance(results[3], OverloadedError)
    assert "2 of at most 2" in str(results[3])


def test_a_client_that_leaves_while_waiting_costs_no_work() -> None:
    work = Work()
    batcher = Batcher[int, int](work, max_batch_size=8, max_queued=8)

    async def story() -> None:
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.to_thread(work.started.wait, 10)
        gone, stays = asyncio.create_task(batcher.submit(1)), asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0)
        work.gate.set()
        assert await asyncio.gather(first, stays) == [0, 4]

    asyncio.run(story())
    batcher.close()
    assert work.batches == [[0], [2]]


def test_what_the_event_loop_takes_for_the_answers_is_seen() -> None:
    batcher = Batcher[int, int](list, max_batch_size=8, max_queued=100)

    async def slow_answer(item: int) -> None:
        await batcher.submit(item)
        time.sleep(0.01)  # what writing an answer takes

    async def story() -> None:
        for _ in range(MIN_BATCHES):
            await asyncio.gather(*(slow_answer(item) for item in range(3)))
        await asyncio.sleep(0.05)
        await batcher.submit(0)

    asyncio.run(story())
    asyncio.run(batcher.submit(0))  # another loop waits for an answer too
    batcher.close()
    assert batcher.queue.control.loop_s > 0.01


def test_what_would_be_refused_is_known_before_it_is_handed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "OVERLOAD_S", 60.0)
    work = Work()
    batcher = Batcher[int, int](work, max_batch_size=1, max_queued=1)
    for _ in range(6):
        batcher.queue.control.observe(1, 1.0)

    async def story() -> None:
        batcher.check(0.0)  # the worker is idle: tried whatever is predicted
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.to_thread(work.started.wait, 10)
        assert not batcher.overloaded
        with pytest.raises(LateError):
            await batcher.submit(2, deadline_s=time.perf_counter() + 0.5)
        assert batcher.overloaded
        with pytest.raises(LateError):
            batcher.check(time.perf_counter() + 0.5)
        batcher.check(math.inf)
        second = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.01)
        with pytest.raises(OverloadedError, match="queue holds 1 of at most 1"):
            batcher.check(math.inf)
        work.gate.set()
        await asyncio.gather(first, second)

    asyncio.run(story())
    batcher.close()


def test_closing_finishes_what_waits_and_refuses_what_comes() -> None:
    batcher = Batcher[int, int](lambda items: list(items), max_batch_size=8, max_queued=8)

    async def story() -> None:
        assert await batcher.submit(5) == 5
        batcher.close()
        with pytest.raises(OverloadedError, match="shutting down"):
            await batcher.submit(6)

    asyncio.run(story())


def test_a_worker_that_hangs_keeps_no_caller_waiting_once_the_batcher_is_closed() -> None:
    work = Work()
    batcher = Batcher[int, int](work, max_batch_size=1, max_queued=8)

    async def story() -> list[int | BaseException]:
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.to_thread(work.started.wait, 10)
        rest = [asyncio.create_task(batcher.submit(item)) for item in (1, 2)]
        await asyncio.sleep(0.01)
        await asyncio.to_thread(batcher.close, 0.05)
        return await asyncio.wait_for(asyncio.gather(first, *rest, return_exceptions=True), 5)

    answers = asyncio.run(story())
    assert [type(answer) for answer in answers] == [OverloadedError] * 3
    assert "same ids" in str(answers[0])
    work.gate.set()  # it comes round after all: what was refused is not done
    batcher.close()
    assert (work.batches, batcher.queued) == ([[0]], 0)


def test_work_after_a_batch_runs_after_the_answers_and_may_fail() -> None:
    after: list[str] = []

    def fail() -> None:
        after.append("ran")
        raise OSError("disk")

    async def story() -> list[int]:
        return [await batcher.submit(1), await batcher.submit(2)]

    batcher = Batcher[int, int](lambda items: list(items), max_batch_size=8, max_queued=8, after=fail)
    assert asyncio.run(story()) == [1, 2]
    batcher.close()
    assert after == ["ran", "ran"]


def test_a_wrong_number_of_results_fails_the_batch_and_the_worker_lives_on() -> None:
    answers = iter([[], [2]])

    async def story() -> int:
        with pytest.raises(AssertionError, match="0 results for 1 items"):
            await batcher.submit(1)
        return await asyncio.wait_for(batcher.submit(2), 5)

    batcher = Batcher[int, int](lambda items: next(answers), max_batch_size=8, max_queued=8)
    assert asyncio.run(story()) == 2
    batcher.close()


def test_what_can_wait_is_done_in_the_first_pause_and_once() -> None:
    calls: list[str] = []
    batcher = Batcher[int, int](
        lambda items: list(items),
        max_batch_size=8,
        max_queued=8,
        after=lambda: calls.append("after"),
        idle=lambda: calls.append("idle"),
    )

    async def story() -> None:
        for _ in range(3):
            await batcher.submit(1)  # the next one comes at once
        await asyncio.sleep(0.2)
        assert calls.count("after") == 3
        assert calls[-1] == "idle"
        pauses = calls.count("idle")
        await asyncio.sleep(0.1)
        assert calls.count("idle") == pauses <= 3

    asyncio.run(story())
    batcher.close()

"""Arrival traces with fixed seeds, and a worker in virtual time that answers them through the service's own queue."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_ray.serving.batch_control import BatchControl
from deepseek_ray.serving.batch_queue import BatchQueue, Entry

Rate = Callable[[float], float]
Service = Callable[[int, float], float]
"""Seconds of a batch of some size that starts at some time."""


def arrivals(rate: Rate, seconds: float, peak: float, seed: int) -> list[float]:
    """Times of a Poisson process whose rate changes: thinning of one at the peak rate (Lewis and Shedler 1979)."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / peak, int(seconds * peak * 1.2)))
    times = times[times < seconds]
    kept = rng.random(len(times)) * peak < [rate(t) for t in times]
    return [float(t) for t in times[kept]]


def steady(seconds: float = 20.0) -> list[float]:
    return arrivals(lambda t: 800.0, seconds, 800.0, seed=1)


def step(seconds: float = 20.0) -> list[float]:
    """Five times the load from second 5 to second 15."""
    return arrivals(lambda t: 4_000.0 if 5 <= t < 15 else 800.0, seconds, 4_000.0, seed=2)


def bursts(seconds: float = 20.0) -> list[float]:
    """A tenth of the time at ten times the rate of the rest."""
    return arrivals(lambda t: 5_000.0 if t % 1.0 < 0.1 else 500.0, seconds, 5_000.0, seed=3)


def day(seconds: float = 30.0) -> list[float]:
    """A day in half a minute: from 300 to 3,300 a second and back."""
    return arrivals(lambda t: 1_800 - 1_500 * math.cos(2 * math.pi * t / seconds), seconds, 3_300.0, seed=4)


TRACES: dict[str, Callable[[], list[float]]] = {"steady": steady, "step": step, "bursts": bursts, "day": day}


def linear(base_ms: float, per_item_ms: float, *, seed: int = 0, slow: Rate = lambda t: 1.0) -> Service:
    """A worker whose batches take base + per_item * size, with a spread of 15 % and a pause now and then."""
    rng = np.random.default_rng(seed)

    def service(size: int, now_s: float) -> float:
        pause_ms = 15.0 if rng.random() < 0.001 else 0.0
        mean = (base_ms + per_item_ms * size) * slow(now_s)
        return float(mean * rng.lognormal(-0.011, 0.15) + pause_ms) / 1e3

    return service


@dataclass(frozen=True)
class Outcome:
    """What became of each arrival: latency in seconds, NaN where it was shed."""

    arrived_s: np.ndarray
    latency_s: np.ndarray
    sizes: list[tuple[float, int]]

    @property
    def answered(self) -> int:
        return int(np.isfinite(self.latency_s).sum())

    def kept(self, objective_s: float) -> float:
        """Share of the one-second windows whose p99 is within the objective; a window without an answer is not."""
        window = self.arrived_s.astype(int)
        good = []
        for second in np.unique(window):
            answered = self.latency_s[(window == second) & np.isfinite(self.latency_s)]
            good.append(len(answered) > 0 and float(np.quantile(answered, 0.99)) <= objective_s)
        return float(np.mean(good))


def simulate(times: Sequence[float], queue: BatchQueue[int], service: Service, deadline_s: float = math.inf) -> Outcome:
    """Let a queue's one worker answer arrivals, each with the same deadline after it."""
    latency = np.full(len(times), np.nan)
    sizes: list[tuple[float, int]] = []
    now, running, index = 0.0, [], 0
    while index < len(times) or len(queue) or running:
        if running:  # whoever arrives meanwhile waits
            done = now + service(len(running), now)
            index = _offer(queue, times, index, done, deadline_s)
            now = done
            for entry in running:
                latency[entry.item] = now - entry.arrived_s
            queue.finished(now)
        elif not len(queue):
            now = times[index]
            index = _offer(queue, times, index, now, deadline_s)
        running, _ = queue.take(now)
        if running:
            sizes.append((now, len(running)))
    return Outcome(np.array(times), latency, sizes)


def _offer(queue: BatchQueue[int], times: Sequence[float], index: int, until_s: float, deadline_s: float) -> int:
    while index < len(times) and times[index] <= until_s:
        arrived = times[index]
        queue.offer(Entry(index, 1, arrived, arrived + deadline_s), arrived)
        index += 1
    return index


def adaptive(objective_s: float, max_batch: int = 256, max_queued: int = 2_000) -> BatchQueue[int]:
    return BatchQueue(BatchControl(max_batch, objective_s), max_queued)


def fixed(cap: int, max_queued: int = 2_000) -> BatchQueue[int]:
    return BatchQueue(BatchControl(cap), max_queued)

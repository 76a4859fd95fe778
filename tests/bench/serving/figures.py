"""What is measured of each provider, and how rounds become one figure."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import numpy as np

from tests.bench.serving.load import Trace, start_trace, throughput
from tests.bench.serving.providers import Provider

COLUMNS = ("at", "figure", "provider", "value", "low", "high", "rounds", "failed", "cpu_us", "tool", "cpus", "load")
NUM_WINDOWS = 20


class Rounds:
    """Closed-loop measurements of all providers in turn; ratios are taken within a round, then their median."""

    def __init__(self) -> None:
        self.rps: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.p50: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.cpu_us: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.failed: dict[tuple[str, int], int] = defaultdict(int)
        self.tool = ""

    def add(self, provider: Provider, connections: int, seconds: float) -> None:
        """Measure once."""
        key, before = (provider.name, connections), provider.cpu_s()
        seconds = max(seconds, provider.least_s)
        found = throughput(provider.url, provider.body, connections, seconds)
        used = provider.cpu_s() - before
        self.rps[key].append(max(found.rps, 1 / seconds))  # none in the time counts as one
        self.p50[key].append(found.p50_ms or seconds * 1e3)
        self.cpu_us[key].append(used / max(found.rps * seconds, 1) * 1e6)
        self.failed[key] += found.failed
        self.tool = found.tool

    def ratio(self, name: str, other: str, connections: int, what: str = "rps") -> float:
        """Median over rounds of one provider's figure relative to another's."""
        table = getattr(self, what)
        return statistics.median(
            a / b for a, b in zip(table[name, connections], table[other, connections], strict=True)
        )

    def rows(self, floor: str) -> Iterable[dict[str, object]]:
        """Lines for the CSV: throughput, latency at one connection, both relative to the floor."""
        for (name, connections), values in self.rps.items():
            key, extra = (name, connections), {"failed": self.failed[name, connections], "tool": self.tool}
            cpu = round(statistics.median(self.cpu_us[key]), 1)
            if connections == 1:
                yield row("p50_ms at 1 connection", name, self.p50[key], cpu_us=cpu, **extra)
                yield row("p50 at 1 connection vs floor", name, self._ratios(key, floor, "p50"))
            else:
                yield row(f"requests/s at {connections} connections", name, values, cpu_us=cpu, **extra)
                yield row(f"requests/s at {connections} vs floor", name, self._ratios(key, floor, "rps"))

    def _ratios(self, key: tuple[str, int], floor: str, what: str) -> list[float]:
        table = getattr(self, what)
        return [a / b for a, b in zip(table[key], table[floor, key[1]], strict=False)]


def row(figure: str, provider: str, values: Sequence[float], **extra: object) -> dict[str, object]:
    """One line: the median of the rounds, lowest and highest beside it."""
    made = dict.fromkeys(COLUMNS, "") | extra
    return made | {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "figure": figure,
        "provider": provider,
        "value": round(statistics.median(values), 4),
        "low": round(min(values), 4),
        "high": round(max(values), 4),
        "rounds": len(values),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }


def steady(providers: Sequence[Provider], rate: float, window_s: float) -> Iterable[dict[str, object]]:
    """p99 / p50 at a steady rate, and the spread (standard deviation / mean) of p50 over windows taken in turn."""
    traces: dict[str, list[Trace]] = defaultdict(list)
    for _ in range(NUM_WINDOWS):
        for provider in providers:
            traces[provider.name].append(start_trace(provider.url, provider.body, f"{rate:g}x{window_s:g}")())
    for name, windows in traces.items():
        p50 = [float(np.median(trace.latency_ms)) for trace in windows]
        every = np.concatenate([trace.latency_ms for trace in windows])
        failed = sum(trace.failed for trace in windows)
        yield row(f"p50_ms at {rate:g}/s", name, p50, failed=failed)
        yield row(f"p99 / p50 at {rate:g}/s", name, [float(np.percentile(every, 99) / np.percentile(every, 50))])
        yield row(f"spread of p50 over {NUM_WINDOWS} windows at {rate:g}/s", name, [float(np.std(p50) / np.mean(p50))])


def kept(trace: Trace, objective_ms: float, seconds: float) -> float:
    """Share of one-second windows whose answers' p99 is within the objective; a window without an answer is not."""
    good = 0
    for second in range(int(seconds)):
        inside = trace.latency_ms[_answered(trace) & (trace.due_s >= second) & (trace.due_s < second + 1)]
        good += bool(len(inside)) and bool(np.percentile(inside, 99, method="higher") <= objective_ms)
    return good / int(seconds)


def in_time(trace: Trace, objective_ms: float) -> int:
    """Answers of the 2xx class within the objective."""
    return int((_answered(trace) & (trace.latency_ms <= objective_ms)).sum())


def _answered(trace: Trace) -> np.ndarray:
    return (trace.status >= 200) & (trace.status < 300)

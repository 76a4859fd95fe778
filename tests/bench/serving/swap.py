"""Hot swaps under full load: does a request fail, how much later is the slowest, what does the replica's memory do."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from tests.bench.serving.load import KEY_VARIABLE, Trace, start_trace
from tests.bench.serving.providers import Provider

WINDOW_S = 1.0
CONNECTIONS = 16
QUIET_S = 2.0
"""Between two swaps: the windows without a swap, to compare with, lie in it."""


@dataclass(frozen=True)
class Swaps:
    """Figures of a run of swaps.

    Attributes:
        added_ms: slowest request around a swap, less the median of the slowest ones of windows without a swap.
        batch_ms: median latency, what one batch takes a client.
        memory_ratio: resident memory of the replica after the last swap, relative to after the first.
    """

    num_swaps: int
    failed: int
    added_ms: float
    batch_ms: float
    memory_ratio: float


def measure(provider: Provider, run: Path, num_swaps: int) -> Swaps:
    """Promote two registered versions in turn while the service is under load."""
    seconds = num_swaps * (QUIET_S + 2 * WINDOW_S) + 4
    wait = start_trace(provider.url, provider.body, f"closed:{CONNECTIONS}x{seconds:g}")
    swapped: list[float] = []
    memory: list[int] = []
    time.sleep(1.5 + QUIET_S)  # the generator starts in the meantime
    with httpx.Client(
        base_url=f"http://127.0.0.1:{provider.port}", headers={"X-API-Key": os.environ[KEY_VARIABLE]}
    ) as client:
        for _ in range(num_swaps):
            swapped.append(_swap(client, run))
            time.sleep(QUIET_S)
            memory.append(provider.replica().memory_info().rss)
    trace = wait()
    return _figures(trace, swapped, memory)


def _swap(client: httpx.Client, run: Path) -> float:
    """Promote the version that does not serve; the moment at which it is seen to serve."""
    before = client.get("/v1/risk/model").json()["model_version"]
    thread = threading.Thread(target=_promote, args=(run, "2" if before == "1" else "1"))
    thread.start()
    end = time.monotonic() + 60
    while client.get("/v1/risk/model").json()["model_version"] == before:
        if time.monotonic() > end:
            raise RuntimeError("the version did not change in a minute")
        time.sleep(0.02)
    now = time.perf_counter()
    thread.join()
    return now


def _promote(run: Path, version: str) -> None:
    """Only the alias moves: what a promotion checks is another program's work, elsewhere."""
    from deepseek_ray.paths import RunPaths
    from deepseek_ray.registry import CHAMPION, Registry

    registry = Registry.open(RunPaths(run), name="risk", create=False)
    with registry.tracking.guard(write=True) as client:
        client.set_registered_model_alias("risk", CHAMPION, version)


def _figures(trace: Trace, swapped: list[float], memory: list[int]) -> Swaps:
    seen_s = trace.start_s + trace.due_s
    near = np.zeros(len(seen_s), bool)
    for moment in swapped:
        near |= np.abs(seen_s - moment) <= WINDOW_S
    windows = seen_s // WINDOW_S
    apart = [trace.latency_ms[(windows == w) & ~near].max() for w in np.unique(windows[~near])]
    added = float(trace.latency_ms[near].max() - np.median(apart))
    return Swaps(len(swapped), trace.failed, added, float(np.median(trace.latency_ms)), memory[-1] / memory[0])

"""Plays recorded days against a live service as its clients would: in order for each card, labels when they are due."""

from __future__ import annotations

import asyncio
import time
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import polars as pl

from deepseek_ray.client import RiskClient
from deepseek_ray.data.events import DAY_US, EPOCH, Feedback, Transaction
from deepseek_ray.errors import DeepseekRayError, RequestError
from deepseek_ray.logs import get_logger

log = get_logger(__name__)

FEEDBACK_BATCH = 250
CHUNKS_A_DAY = 4


@dataclass
class Outcome:
    """What the played requests brought.

    Attributes:
        predictions: transaction id -> prediction id.
        latencies_ms: one a scoring request, as the client saw it.
            An open-loop schedule counts from the moment the request was due, so that a stall is not hidden.
        failures: message of each request that failed.
        sending_s: seconds spent sending them.
        feedback: labels accepted.
    """

    predictions: dict[str, str] = field(default_factory=dict)
    latencies_ms: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    requests: int = 0
    feedback: int = 0
    sending_s: float = 0.0

    def figures(self) -> dict[str, Any]:
        """Counts, percentiles in milliseconds and the first failures, as plain data."""
        at = [50, 90, 99]
        found = np.percentile(self.latencies_ms, at).tolist() if self.latencies_ms else [None] * len(at)
        return {
            "requests": self.requests,
            "transactions": len(self.predictions),
            "feedback": self.feedback,
            "failed": len(self.failures),
            "failures": self.failures[:5],
            "http_achieved_rate": self.requests / self.sending_s if self.sending_s else None,
            **{f"http_p{p}_ms": value for p, value in zip(at, found, strict=True)},
        }

    def histogram(self, num_bins: int = 40) -> list[tuple[float, int]]:
        """Upper edge in milliseconds and count of each bin, evenly spaced in the logarithm."""
        times = np.asarray(self.latencies_ms)
        if not times.size:
            return []
        edges = np.geomspace(times.min(), times.max() * (1 + 1e-9), num_bins + 1)
        counts = np.histogram(times, edges)[0]
        return [(float(edge), int(count)) for edge, count in zip(edges[1:], counts, strict=True)]


@dataclass(frozen=True)
class Label:
    """A label that becomes known at ``due_us`` (microseconds since 1970)."""

    due_us: int
    transaction_id: str
    is_fraud: bool


def late_labels(table: pl.DataFrame, *, share: float, max_days: float, seed: int) -> list[Label]:
    """Labels of a transactions table by due time; ``share`` of them come up to ``max_days`` after the label delay."""
    rng = np.random.default_rng(seed)
    labelled = table.filter(pl.col("is_fraud").is_not_null())
    extra_us = (rng.random(labelled.height) < share) * rng.random(labelled.height) * max_days * 86_400e6
    due_us = labelled["label_us"].to_numpy() + extra_us.astype(np.int64)
    rows = zip(due_us.tolist(), labelled["transaction_id"].to_list(), labelled["is_fraud"].to_list(), strict=True)
    return sorted((Label(due, name, bool(fraud)) for due, name, fraud in rows), key=lambda label: label.due_us)


def to_transactions(table: pl.DataFrame) -> Iterator[Transaction]:
    """The rows of a transactions table as request records."""
    names = list(Transaction.model_fields)
    for row in table.select(names).iter_rows(named=True):
        yield Transaction(**row)


async def play_day(
    client: RiskClient,
    rows: pl.DataFrame,
    start_us: int,
    labels: Sequence[Label],
    outcome: Outcome,
    *,
    lanes: int,
    rate_per_s: Callable[[], float],
    open_loop: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> Sequence[Label]:
    """Play the day that begins at ``start_us`` in quarters: first the labels due by a quarter's end, then its payments.

    Args:
        rows: the day's part of a transactions table.
        labels: by due time.

    Returns:
        The labels that are due later. For the other arguments see ``send_transactions``.
    """
    step = DAY_US // CHUNKS_A_DAY
    for start in range(start_us, start_us + DAY_US, step):
        num_due = bisect_left(labels, start + step, key=lambda label: label.due_us)
        await send_labels(client, labels[:num_due], outcome)
        labels = labels[num_due:]
        chunk = rows.filter(pl.col("order_us").is_between(start, start + step, closed="left"))
        records = list(to_transactions(chunk))
        await send_transactions(
            client, records, outcome, lanes=lanes, rate_per_s=rate_per_s, open_loop=open_loop, progress=progress
        )
    return labels


async def send_threshold(client: RiskClient, threshold: float, model_version: str) -> bool:
    """Move the threshold of the version that it was computed for; False, with a warning, if another serves by now."""
    try:
        await client.set_threshold(threshold, model_version)
    except RequestError as error:
        if error.status != 409:
            raise
        log.warning("the threshold %.4g of version %s is left out: %s", threshold, model_version, error)
        return False
    return True


async def send_labels(client: RiskClient, labels: Sequence[Label], outcome: Outcome) -> None:
    """Send the labels of transactions that were scored; others have no prediction to speak of."""
    ready = [label for label in labels if label.transaction_id in outcome.predictions]
    for start in range(0, len(ready), FEEDBACK_BATCH):
        batch = [
            Feedback(
                prediction_id=outcome.predictions[label.transaction_id],
                is_fraud=label.is_fraud,
                observed_at=EPOCH + timedelta(microseconds=label.due_us),
            )
            for label in ready[start : start + FEEDBACK_BATCH]
        ]
        try:
            outcome.feedback += await client.feedback(batch)
        except DeepseekRayError as error:
            outcome.failures.append(str(error))


async def send_transactions(
    client: RiskClient,
    transactions: Sequence[Transaction],
    outcome: Outcome,
    *,
    lanes: int,
    rate_per_s: Callable[[], float],
    open_loop: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Score transactions one a request, over ``lanes`` clients at once; a card always keeps to its lane and order.

    Args:
        rate_per_s: requests a second over all lanes, asked again for each request; 0 means as fast as answers come.
        open_loop: keep to the schedule when answers are slow: what is overdue goes out as soon as a lane is free, and
            its latency counts from when it was due. Else a slow answer moves all that comes after it.
    """
    queues: list[list[Transaction]] = [[] for _ in range(lanes)]
    for transaction in transactions:
        queues[zlib.crc32(transaction.card_id.encode()) % lanes].append(transaction)
    pacer = _Pacer(rate_per_s, open_loop=open_loop)

    async def lane(queue: Sequence[Transaction]) -> None:
        for transaction in queue:
            await _score(client, transaction, outcome, await pacer.wait())
            progress(1)

    start = time.perf_counter()
    await asyncio.gather(*(lane(queue) for queue in queues))
    outcome.sending_s += time.perf_counter() - start


class _Pacer:
    """Hands out evenly spaced moments to all lanes together."""

    def __init__(self, rate_per_s: Callable[[], float], *, open_loop: bool = False) -> None:
        self._rate_per_s, self._open_loop = rate_per_s, open_loop
        self._next_s = time.perf_counter()

    async def wait(self) -> float:
        """Wait for the next moment; returns when the request that takes it was due, in ``time.perf_counter``."""
        rate = self._rate_per_s()
        if rate <= 0:
            return time.perf_counter()
        slot_s = self._next_s if self._open_loop else max(self._next_s, time.perf_counter())
        self._next_s = slot_s + 1 / rate
        await asyncio.sleep(slot_s - time.perf_counter())
        return slot_s if self._open_loop else time.perf_counter()


async def _score(client: RiskClient, transaction: Transaction, outcome: Outcome, start: float) -> None:
    outcome.requests += 1
    try:
        prediction = (await client.score([transaction]))[0]
    except DeepseekRayError as error:
        outcome.failures.append(str(error))
        return
    outcome.latencies_ms.append((time.perf_counter() - start) * 1e3)
    outcome.predictions[transaction.transaction_id] = prediction.prediction_id

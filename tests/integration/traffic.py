"""Clients that never give up: requests at a steady rate, each repeated under its id until it is answered."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import httpx

GIVE_UP_S = 90.0
LABEL_EVERY = 5


class Traffic:
    """Scores, and a label for every fifth of them.

    Attributes:
        predictions: transaction id -> every prediction id that it was ever answered with.
        labelled: prediction ids whose label was answered 2xx.
        refused: answers that repeating does not change.
        retried: answers and failures that were tried again, by status or error.
        latencies_s: of each request, its repeats included.
        degraded: transaction ids scored without the feature store.
    """

    def __init__(self, port: int, key: str, *, rate: float = 50.0, num_cards: int = 200) -> None:
        self._rate, self._num_cards = rate, num_cards
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"X-API-Key": key},
            timeout=15,
            limits=httpx.Limits(max_connections=32, max_keepalive_connections=32),
        )
        self._done = threading.Event()
        self.predictions: dict[str, set[str]] = defaultdict(set)
        self.labelled: set[str] = set()
        self.refused: list[str] = []
        self.retried: Counter[str] = Counter()
        self.latencies_s: list[float] = []
        self.degraded: set[str] = set()

    @contextmanager
    def running(self) -> Iterator[Traffic]:
        """Send while the block runs; afterwards every request has its answer."""
        thread = threading.Thread(target=self._send)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join()
            self._client.close()

    def _send(self) -> None:
        due, number, run = time.monotonic(), 0, time.time_ns()
        with ThreadPoolExecutor(32) as pool:
            while not self._done.is_set():
                pool.submit(self._one, f"f{run}-{number}", number)
                number, due = number + 1, due + 1 / self._rate
                time.sleep(max(0.0, due - time.monotonic()))

    def _one(self, transaction_id: str, number: int) -> None:
        body = {
            "transaction_id": transaction_id,
            "event_time": datetime.now(UTC).isoformat(),
            "card_id": f"x{number % self._num_cards}",
            "terminal_id": f"y{number % 37}",
            "amount_cents": 100 + number % 5_000,
        }
        start = time.monotonic()
        answer = self._until_answered("/v1/risk/score", body)
        if answer is None:
            return
        self.latencies_s.append(time.monotonic() - start)
        self.predictions[transaction_id].add(answer["prediction_id"])
        if answer["degraded"]:
            self.degraded.add(transaction_id)
        if number % LABEL_EVERY == 0:
            label = {
                "prediction_id": answer["prediction_id"],
                "is_fraud": number % 2 == 0,
                "observed_at": datetime.now(UTC).isoformat(),
            }
            if self._until_answered("/v1/risk/feedback", label) is not None:
                self.labelled.add(answer["prediction_id"])

    def _until_answered(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        end = time.monotonic() + GIVE_UP_S
        while time.monotonic() < end:
            try:
                answer = self._client.post(path, json=body)
            except httpx.TransportError as error:
                self.retried[type(error).__name__] += 1
            else:
                if answer.is_success:
                    return dict(answer.json())
                if answer.status_code not in (429, 503):
                    self.refused.append(answer.text)
                    return None
                self.retried[str(answer.status_code)] += 1
            time.sleep(0.1)
        self.refused.append(f"no answer to {path} in {GIVE_UP_S:g} s")
        return None

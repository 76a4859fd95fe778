"""The shadow: scores what others have answered, after they answered it, on a thread of its own.

The worker only puts the rows of a batch into a bounded queue; a full queue drops them and counts. Nothing that the
shadow does, or fails to do, reaches a client.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from deepseek_ray.data.prediction_log import LoggedPrediction
from deepseek_ray.data.shadow_scores import ShadowScore, ShadowScores, read_pairs
from deepseek_ray.logs import get_logger
from deepseek_ray.metrics import average_precision
from deepseek_ray.online.drift import Reference, psi
from deepseek_ray.serving.arm_metrics import ArmMetrics, CallCounts
from deepseek_ray.serving.commands import LiveModel

logger = get_logger(__name__)

QUEUED_ROWS = 2_000
KEPT_ROWS = 100_000
CALL_ROWS = 256
MIN_SCORES = 100


class ShadowScorer:
    """Queue and thread of the shadow.

    Args:
        live: the shadow's version, or None while there is none.
        path: where its scores are kept.
        metrics: what is scored, dropped and failed.
        queued_rows: most rows that wait.
        kept_rows: newest scores kept.
    """

    def __init__(
        self,
        live: Callable[[], LiveModel | None],
        path: Path,
        metrics: ArmMetrics,
        *,
        queued_rows: int = QUEUED_ROWS,
        kept_rows: int = KEPT_ROWS,
    ) -> None:
        self._live = live
        self._path = path
        self._metrics = metrics
        self._queued_rows, self._kept_rows = queued_rows, kept_rows
        self._waiting: deque[LoggedPrediction] = deque()
        self._wake = threading.Condition()
        self._store: ShadowScores | None = None
        self._closed = self._failing = False
        self._calls = ("", 0, 0)
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    def offer(self, rows: Sequence[LoggedPrediction]) -> None:
        """Take a batch's rows if there is a shadow and room; never waits, never raises."""
        if self._live() is None:
            return
        with self._wake:
            if self._closed or len(self._waiting) + len(rows) > self._queued_rows:
                self._metrics.shadow_dropped.inc(len(rows))
                return
            self._waiting.extend(rows)
            self._wake.notify()

    def calls(self, version: str) -> CallCounts:
        """Model calls of a version as shadow, and how many failed; their times say nothing, nobody waits for them."""
        name, calls, failed = self._calls
        return CallCounts(calls, failed, ()) if name == version else CallCounts(0, 0, ())

    def close(self, timeout_s: float = 10.0) -> None:
        """Score what waits, and stop."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        torch.set_num_threads(1)
        while rows := self._take():
            live = self._live()
            if live is not None:
                self._score(live, rows)
        if self._store is not None:
            self._store.close()

    def _take(self) -> list[LoggedPrediction]:
        with self._wake:
            while not self._waiting and not self._closed:
                self._wake.wait()
            return [self._waiting.popleft() for _ in range(min(CALL_ROWS, len(self._waiting)))]

    def _score(self, live: LiveModel, rows: Sequence[LoggedPrediction]) -> None:
        try:
            values, sequence = np.stack([row.values for row in rows]), np.stack([row.sequence for row in rows])
            scores = live.scorer.predict_proba(values, sequence)
            pairs = [_pair(live, row, float(score)) for row, score in zip(rows, scores, strict=True)]
        except Exception:  # a shadow may fail in any way
            self._count(live.version, failed=True)
            self._failed(live, rows)
            return
        self._count(live.version, failed=False)
        try:
            if self._store is None:
                self._store = ShadowScores(self._path, self._kept_rows)
            self._store.add(pairs)
        except Exception:  # the disk's fault, say, and not the version's
            self._failed(live, rows)
            return
        self._failing = False
        self._metrics.shadow_scored.labels(live.version).inc(len(rows))

    def _failed(self, live: LiveModel, rows: Sequence[LoggedPrediction]) -> None:
        self._metrics.shadow_failed.labels(live.version).inc(len(rows))
        if not self._failing:
            logger.exception("the shadow (version %s) failed", live.version)
        self._failing = True

    def _count(self, version: str, *, failed: bool) -> None:
        name, calls, bad = self._calls
        self._calls = (version, calls + 1, bad + failed) if name == version else (version, 1, int(failed))


def _pair(live: LiveModel, row: LoggedPrediction, score: float) -> ShadowScore:
    review = score >= live.threshold
    served = (row.model_version, row.probability, row.decision == "review")
    return ShadowScore(row.prediction_id, live.version, score, review, *served)


@dataclass(frozen=True)
class ShadowReport:
    """A shadow beside what was served.

    Attributes:
        scored: decisions scored by both, of those kept.
        psi: of the shadow's scores against the served ones; None with too few.
        differing_decisions: share of decisions that the shadow would have made otherwise.
        labels: decisions whose truth is known.
        average_precision: the shadow's on those; None without fraud and genuine ones.
        served_average_precision: that of what was served, on the same.
    """

    version: str
    scored: int
    psi: float | None = None
    differing_decisions: float | None = None
    labels: int = 0
    average_precision: float | None = None
    served_average_precision: float | None = None

    def plain(self) -> dict[str, object]:
        """As plain data."""
        return asdict(self)


def compare(path: Path, log_path: Path, version: str) -> ShadowReport:
    """Compare a shadow with what was served; raises like ``read_pairs``."""
    if not path.exists() or not log_path.exists():
        return ShadowReport(version, 0)
    pairs = read_pairs(path, log_path, version)
    known = pairs.label >= 0
    both = len(set(pairs.label[known].tolist())) == 2
    return ShadowReport(
        version=version,
        scored=len(pairs.shadow),
        psi=psi(Reference.fit("score", pairs.served), pairs.shadow) if len(pairs.shadow) >= MIN_SCORES else None,
        differing_decisions=float(pairs.differs.mean()) if len(pairs.differs) else None,
        labels=int(known.sum()),
        average_precision=average_precision(pairs.label[known], pairs.shadow[known]) if both else None,
        served_average_precision=average_precision(pairs.label[known], pairs.served[known]) if both else None,
    )

"""Evidence for the gate, measured on a loaded model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.evidence import Evidence, VectorContract
from deepseek_ray.errors import DataError
from deepseek_ray.metrics import average_precision, calibration_error, cp100


class Scorer(Protocol):
    """What is measured."""

    def predict_proba(self, features: npt.NDArray[Any], sequence: npt.NDArray[Any], /) -> npt.NDArray[np.float64]:
        """Probabilities [B] of features [B, F] and sequence [B, N, C]."""


def measure(
    model: Scorer,
    held_out: RiskDataset,
    *,
    name: str,
    version: str,
    contract: VectorContract,
    old: RiskDataset | None = None,
    timed_rows: int = 200,
) -> Evidence:
    """Score the held-out rows and, apart, rows of older fraud patterns.

    Args:
        model: loaded version.
        held_out: labelled rows the version was not trained on; the same ones for champion and challenger.
        name: registered model.
        version: registered version.
        contract: the vector it reads, ``VersionInfo.schema.contract``.
        old: labelled rows of older patterns, held out too.
        timed_rows: rows scored one by one for the 99th percentile.

    Raises:
        DataError: the held-out rows hold no fraud.
    """
    rows = held_out.labelled()
    if not (rows.label == 1).any():
        raise DataError(f"{len(rows)} held-out rows hold no fraud.", fix="hold out more days")
    score = model.predict_proba(rows.features, rows.sequence)
    return Evidence(
        name=name,
        version=version,
        average_precision=average_precision(rows.label, score),
        cp100=cp100(score, rows.card, rows.day, rows.label),
        calibration_error=calibration_error(rows.label, score),
        p99_ms=scoring_p99_ms(model, rows, timed_rows),
        prevalence=float((rows.label == 1).mean()),
        heldout_digest=rows.digest if old is None else f"{rows.digest}:{old.digest}",
        contract=contract,
        old_average_precision=None if old is None else _precision(model, old.labelled()),
        old_prevalence=None if old is None else float((old.labelled().label == 1).mean()),
        num_rows=len(rows),
    )


def scoring_p99_ms(model: Scorer, rows: RiskDataset, timed_rows: int) -> float:
    """99th percentile of the processor time of scoring one row, milliseconds, after a warm-up.

    Processor time of one thread, as in a replica: on a busy machine the wall clock would judge the neighbours.
    """
    times = []
    with _one_thread():
        for row in [0, *(number % len(rows) for number in range(timed_rows))]:
            start_ns = time.thread_time_ns()
            model.predict_proba(rows.features[row : row + 1], rows.sequence[row : row + 1])
            times.append((time.thread_time_ns() - start_ns) / 1e6)
    return float(np.percentile(times[1:], 99))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _precision(model: Scorer, rows: RiskDataset) -> float:
    return average_precision(rows.label, model.predict_proba(rows.features, rows.sequence))

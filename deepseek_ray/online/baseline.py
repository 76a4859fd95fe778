"""What a version knew before it served: the features it was trained on, its scores and quality on days held out.

Drift is a distance from here. A baseline is measured once a version and kept in one file.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.errors import DataError
from deepseek_ray.metrics import average_precision, calibration_error, cp100
from deepseek_ray.online.drift import Floats, Reference
from deepseek_ray.online.watch import varying

if TYPE_CHECKING:
    from deepseek_ray.online.measure import Scorer  # brings torch, which who reads a baseline does without

MAX_SAMPLE = 2_000
"""Values of a feature that are kept for the Kolmogorov-Smirnov test."""
MAX_STREAM = 5_000
"""Held-out decisions that are kept, evenly spread over their days, as the beginning of each stream."""


@dataclass(frozen=True)
class HeldOut:
    """A version on labelled days that it was not trained on, k of them kept in the order of events.

    Args:
        scores: (k,) probabilities.
        labels: (k,) of 0 and 1.
        rows: decisions measured, of which k were kept.
        average_precision: None without a fraud.
        cp100: card precision at 100.
        calibration_error: expected calibration error.
    """

    scores: Floats
    labels: Floats
    rows: int
    average_precision: float | None
    cp100: float
    calibration_error: float

    @property
    def figures(self) -> dict[str, float | None]:
        """What was measured, without the rows."""
        return {name: getattr(self, name) for name in ("rows", "average_precision", "cp100", "calibration_error")}


@dataclass(frozen=True)
class Baseline:
    """What live decisions of one version are compared with.

    Args:
        version: registered version.
        feature_digest: of the vector that it reads.
        feature_names: the whole vector, F names.
        features: references of the features that vary and are no part of the calendar.
        score: reference of the scores; None where nothing was held out.
        held_out: quality; None where nothing was held out.
    """

    version: str
    feature_digest: str
    feature_names: tuple[str, ...]
    features: tuple[Reference, ...]
    score: Reference | None
    held_out: HeldOut | None

    @classmethod
    def measure(
        cls, version: str, feature_digest: str, model: Scorer, train: RiskDataset, held_out: RiskDataset | None
    ) -> Baseline:
        """Measure a loaded version.

        Args:
            version: registered version.
            feature_digest: of the vector that it reads.
            model: the version.
            train: rows that it was trained on, n >= 1.
            held_out: rows that it was not trained on; unlabelled ones are left out.

        Raises:
            DataError: there are no rows to compare with.
        """
        named = varying(train)
        if not named:
            raise DataError(f"{len(train)} training rows hold no feature that varies.", fix="train on more days")
        features = tuple(Reference.fit(n, train.features[:, i], max_sample=MAX_SAMPLE) for n, i in named.items())
        rows = None if held_out is None else held_out.labelled()
        if rows is None or not len(rows):
            return cls(version, feature_digest, train.feature_names, features, None, None)
        rows = rows.select(np.argsort(rows.order_us, kind="stable"))
        scores = model.predict_proba(rows.features, rows.sequence)
        score = Reference.fit("score", scores, max_sample=MAX_SAMPLE)
        return cls(version, feature_digest, train.feature_names, features, score, _judged(rows, scores))

    def save(self, file: Path) -> Path:
        """Write one safetensors file, whole or not at all."""
        arrays = {f"{i}.{part}": getattr(one, part) for i, one in enumerate(self._references()) for part in _PARTS}
        told = {
            "version": self.version,
            "feature_digest": self.feature_digest,
            "feature_names": self.feature_names,
            "references": [one.name for one in self._references()],
            "held_out": self.held_out.figures if self.held_out else None,
        }
        if self.held_out is not None:
            arrays |= {"scores": self.held_out.scores, "labels": self.held_out.labels}
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}-{os.getpid()}")
        save_file(arrays, draft, metadata={"baseline": json.dumps(told)})
        os.replace(draft, file)
        return file

    @classmethod
    def load(cls, file: Path) -> Baseline:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: the file is missing, torn or no baseline.
        """
        try:
            with safe_open(file, framework="np") as stored:
                told = json.loads((stored.metadata() or {})["baseline"])
                arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
            found = [
                Reference(name, *(arrays[f"{i}.{part}"] for part in _PARTS))
                for i, name in enumerate(told["references"])
            ]
            held_out = told["held_out"]
            kept = None if held_out is None else HeldOut(arrays["scores"], arrays["labels"], **held_out)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DataError(
                f"The baseline {str(file)!r} cannot be read: {error}.", fix="remove it; it is measured again"
            ) from error
        score = None if kept is None else found.pop()
        names = tuple(told["feature_names"])
        return cls(told["version"], told["feature_digest"], names, tuple(found), score, kept)

    def _references(self) -> tuple[Reference, ...]:
        return (*self.features, *(() if self.score is None else (self.score,)))


_PARTS = ("edges", "shares", "sample")


def _judged(rows: RiskDataset, scores: npt.NDArray[np.float64]) -> HeldOut:
    picks = np.linspace(0, len(rows) - 1, min(len(rows), MAX_STREAM)).round().astype(np.int64)
    has_fraud = bool((rows.label == 1).any())
    return HeldOut(
        scores=scores[picks],
        labels=rows.label[picks].astype(np.float64),
        rows=len(rows),
        average_precision=average_precision(rows.label, scores) if has_fraud else None,
        cp100=cp100(scores, rows.card, rows.day, rows.label),
        calibration_error=calibration_error(rows.label, scores),
    )

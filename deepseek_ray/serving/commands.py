"""What the HTTP side and the predictor say to each other, and what the predictor needs of features and model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from deepseek_ray.data.events import Feedback, Prediction, Transaction
from deepseek_ray.data.prediction_log import LabelTarget

FloatArray = npt.NDArray[np.float64]


class Served(Protocol):
    """One event's features as they stood at its moment."""

    @property
    def order_us(self) -> int: ...
    @property
    def values(self) -> FloatArray: ...
    @property
    def sequence(self) -> FloatArray: ...
    @property
    def cold(self) -> Sequence[str]: ...
    @property
    def degraded(self) -> bool: ...


class FeatureState(Protocol):
    """The incremental feature engine over a store whose writes can wait."""

    @property
    def behind(self) -> bool:
        """Whether the store is away and lacks what the log holds."""

    def fetch(self, transactions: Sequence[Transaction]) -> None:
        """Read all that the events need, in one round trip."""

    def last_event_us(self, card_ids: Sequence[str]) -> Mapping[str, int]:
        """Time of each known card's last event."""

    def observe_many(self, transactions: Sequence[Transaction]) -> Sequence[Served]:
        """Compute features and take the events into the state, in memory."""

    def fetch_labels(self, targets: Sequence[LabelTarget]) -> None:
        """Read all that the labels need, in one round trip."""

    def apply_label(self, target: LabelTarget, is_fraud: bool, known_us: int) -> None:
        """Take a label into the state, in memory; its target was fetched."""

    def keep(self) -> None:
        """Make the changes so far final: the log holds them."""

    def discard(self) -> None:
        """Undo what changed since the last ``keep``."""

    def flush(self) -> None:
        """Write what was kept to the store."""


class Scorer(Protocol):
    """A loaded model."""

    def predict_proba(self, features: FloatArray, sequence: FloatArray) -> FloatArray:
        """Fraud probability [n] of values [n, F] and sequences [n, N, C]."""

    def attribute(self, features: FloatArray, sequence: FloatArray) -> FloatArray:
        """Log-odds contribution [n, F] of each feature."""


@dataclass(frozen=True)
class LiveModel:
    """A version that serves, and since when."""

    scorer: Scorer
    name: str
    version: str
    run_id: str
    feature_service: str
    feature_digest: str
    feature_names: tuple[str, ...]
    threshold: float
    since_us: int


@dataclass(frozen=True)
class ScoreCommand:
    """One request's transactions, and when it arrived (``time.perf_counter``)."""

    transactions: Sequence[Transaction]
    received_s: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class FeedbackCommand:
    """One request's labels."""

    feedback: Sequence[Feedback]


@dataclass(frozen=True)
class ScoreResult:
    """Predictions in the order of the request; ``repeated`` says how many had been made before."""

    predictions: list[Prediction]
    repeated: int


@dataclass(frozen=True)
class FeedbackResult:
    """How many labels were new, and how many were known already."""

    accepted: int
    repeated: int


@dataclass(frozen=True)
class ThresholdCommand:
    """A new threshold for the version that serves; ``model_version`` guards against a swap, "" does not."""

    threshold: float
    model_version: str = ""


@dataclass(frozen=True)
class TaskCommand:
    """Work that must not overlap with a batch: it has the worker to itself."""

    work: Callable[[], None]


@dataclass(frozen=True)
class TaskResult:
    """The work is done."""


Command = ScoreCommand | FeedbackCommand | ThresholdCommand | TaskCommand
Result = ScoreResult | FeedbackResult | LiveModel | TaskResult

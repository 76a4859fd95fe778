"""The version that a model server answers with, and the change from one to the next between two batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from deepseek_ray.logs import get_logger
from deepseek_ray.serving.batch_control import pad_to
from deepseek_ray.serving.model_kinds import ServedModel
from deepseek_ray.serving.model_records import Batch
from deepseek_ray.serving.model_target import ModelIdentity
from deepseek_ray.serving.monitor import HttpMonitor

logger = get_logger(__name__)


@dataclass(frozen=True)
class LiveVersion:
    """A loaded model, what it is, and since when it answers."""

    model: ServedModel
    identity: ModelIdentity
    since: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


@dataclass(frozen=True)
class Answers:
    """One request's answers, a row each, and the version that gave all of them."""

    identity: ModelIdentity
    rows: Sequence[Any]

    def body(self) -> bytes:
        """As JSON."""
        named = {"model": self.identity.name, "version": self.identity.version}
        return orjson.dumps(named | {"predictions": list(self.rows)})


class ModelSlot:
    """Holds the version that serves. All of them take the same records; who changes it sees to that."""

    def __init__(self, model: ServedModel, identity: ModelIdentity, monitor: HttpMonitor) -> None:
        self._monitor = monitor
        self.swap(model, identity)

    @property
    def live(self) -> LiveVersion:
        """The version that serves now; read once a batch."""
        return self._live

    def swap(self, model: ServedModel, identity: ModelIdentity) -> None:
        """Let another version answer from the next batch on; the old one is freed when its last batch has ended."""
        self._live = LiveVersion(model, identity)
        self._monitor.show_version(identity.name, identity.version, identity.run_id)


class ModelWork:
    """Runs batches on the version that serves; a batch that fails is run request by request, so that one cannot fail
    another.

    Args:
        slot: read once a batch.
        monitor: where batches are timed.
        buckets: sizes that batches are padded to, ascending; none to leave them as they are.
    """

    def __init__(self, slot: ModelSlot, monitor: HttpMonitor, buckets: Sequence[int] = ()) -> None:
        self._slot, self._monitor, self._buckets = slot, monitor, buckets

    def run(self, requests: Sequence[Batch]) -> list[Answers | Exception]:
        """Each request's answers, or what went wrong with it."""
        return self._run(self._slot.live, requests)

    def _run(self, live: LiveVersion, requests: Sequence[Batch]) -> list[Answers | Exception]:
        try:
            return self._together(live, requests)
        except Exception as error:
            if len(requests) == 1:
                return [error]
            logger.warning("a batch of %d requests failed (%s); they run one by one", len(requests), error)
            return [result for request in requests for result in self._run(live, [request])]

    def _together(self, live: LiveVersion, requests: Sequence[Batch]) -> list[Answers | Exception]:
        batch = Batch.joined(requests)
        size = pad_to(batch.num_rows, self._buckets)
        with self._monitor.timed("model"):
            answers = live.model.predict(batch.resized(size))
        assert len(answers) == size, f"{len(answers)} answers for {size} rows"
        self._monitor.batch_size.observe(batch.num_rows)
        parts: list[Answers | Exception] = []
        start = 0
        for request in requests:
            parts.append(Answers(live.identity, answers[start : start + request.num_rows]))
            start += request.num_rows
        return parts

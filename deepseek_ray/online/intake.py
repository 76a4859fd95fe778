"""What an update may train on: served decisions with matured labels that the champion has not seen, each once.

Labels are what people sent, or genuine where nobody objected within the delay. A score or a decision is never one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepseek_ray.config import Config
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.served import Matured
from deepseek_ray.errors import CheckpointError
from deepseek_ray.logs import get_logger
from deepseek_ray.online.ledger import Counted, Ledger
from deepseek_ray.online.replay import Reservoir
from deepseek_ray.online.updater import remember, take_back
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import Registry

log = get_logger(__name__)


@dataclass(frozen=True)
class Intake:
    """The rows of one update.

    Args:
        train: new rows, and remembered ones whose label came after the delay, in the order of events.
        held_out: the newest days, to judge on.
        labels: what the ledger is to note of ``train`` and of labels that only confirm what was assumed.
        num_late: rows of ``train`` that an earlier update took as genuine.
        memory: older rows, without those.
        root_until_us: event time up to which the version from scratch was trained.
    """

    train: RiskDataset
    held_out: RiskDataset
    labels: Mapping[str, Counted]
    num_late: int
    memory: Reservoir
    root_until_us: int


def take_in(
    champion: str, served: Matured, registry: Registry, ledger: Ledger, config: Config, paths: RunPaths
) -> Intake:
    """Sort the served rows.

    Args:
        champion: version that the update starts from.
        served: all matured decisions.
        registry: knows when the version from scratch was trained.
        ledger: knows what was counted since.
        config: ``update.holdout_fraction``, ``update.memory_rows``, the seed.
        paths: the run.

    Raises:
        DataError: the new rows are of one day, so that none could judge.
    """
    until_us = root_until(champion, ledger, registry)
    counted = ledger.counted(champion)
    memory = memory_of(champion, served, ledger, Root(config, paths, until_us))
    taken, late, confirmed = _sort(served, counted, ledger.ids_set_aside(), until_us)
    held_out = served.rows.select(taken).split_tail(config.update.holdout_fraction)[1]
    chosen = (taken & (served.rows.day < held_out.day.min())) | late
    take_back(memory, served.rows.select(late))
    return Intake(
        train=served.rows.select(chosen),
        held_out=held_out,
        labels=_labels(served, chosen | confirmed),
        num_late=int(late.sum()),
        memory=memory,
        root_until_us=until_us,
    )


def root_until(version: str, ledger: Ledger, registry: Registry) -> int:
    """The end of the last day that the version from scratch behind a version was trained on, microseconds."""
    descent = ledger.descent(version)
    if descent.root_until_us is not None:
        return descent.root_until_us
    return end_of_day(registry.get(descent.root).tags["train_end"])


def end_of_day(day: str) -> int:
    """Last microsecond of a day in ISO 8601."""
    return (int(np.datetime64(day, "D").astype(np.int64)) + 1) * DAY_US - 1


def memory_of(version: str, served: Matured, ledger: Ledger, root: Root) -> Reservoir:
    """The replay memory of a version: the newest one kept on the way to it, and what the ledger says since.

    It depends on training rows, ledger and log only: a lost file costs time and no row.
    """
    steps = ledger.descent(version).steps
    memory, rest = root.memory(), steps
    for number in reversed(range(len(steps))):
        if (kept := _kept(root.paths, steps[number])) is not None:
            memory, rest = kept, steps[number + 1 :]
            break
    known: dict[str, Counted] = {}
    for step in steps:
        labels = ledger.labels_of(step)
        if step in rest:
            _apply(memory, served, labels, known)
        known |= labels
    return memory


def keep_memory(memory: Reservoir, version: str, paths: RunPaths, others: set[str]) -> None:
    """Write a version's memory, and drop those of versions that are not among the ``others``."""
    memory.save(memory_file(paths, version))
    wanted = {memory_file(paths, one) for one in {*others, version}}
    for file in paths.updates.glob("memory-*.npz"):
        if file not in wanted:
            file.unlink()


def memory_file(paths: RunPaths, version: str) -> Path:
    """Where a version's memory is kept."""
    return paths.updates / f"memory-{version}.npz"


@dataclass(frozen=True)
class Root:
    """Rows of the training from scratch."""

    config: Config
    paths: RunPaths
    until_us: int

    def memory(self) -> Reservoir:
        memory = Reservoir(self.config.update.memory_rows, seed=self.config.seed)
        rows = RiskDataset.load(self.paths.datasets / "train.safetensors")
        remember(memory, rows.select(rows.order_us <= self.until_us))  # a later training may have been refused
        return memory


def _kept(paths: RunPaths, version: str) -> Reservoir | None:
    file = memory_file(paths, version)
    if not file.exists():
        return None
    try:
        return Reservoir.load(file)
    except CheckpointError as error:
        log.warning("made again from the log: %s", error)
        return None


def _apply(memory: Reservoir, served: Matured, labels: Mapping[str, Counted], known: Mapping[str, Counted]) -> None:
    """Remember what one update trained on, as it did."""
    fresh = {name: one for name, one in labels.items() if name not in known or known[name].is_fraud != one.is_fraud}
    at = np.array([name in fresh for name in served.prediction_ids.tolist()], dtype=bool)
    part = served.select(at)
    again = np.array([name in known for name in part.prediction_ids.tolist()], dtype=bool)
    take_back(memory, part.rows.select(again))
    then = [fresh[name].is_fraud for name in part.prediction_ids.tolist()]  # a label may have come since
    remember(memory, RiskDataset(**{**vars(part.rows), "label": np.array(then, dtype=np.int8)}))


def _sort(
    served: Matured, counted: Mapping[str, Counted], aside: set[str], until_us: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Masks: never counted; counted as genuine and a fraud by now; counted unasked and confirmed by now."""
    names = served.prediction_ids.tolist()
    before = [counted.get(name) for name in names]
    wanted = np.array([name not in aside for name in names], dtype=bool)
    known = np.array([one is not None for one in before], dtype=bool)
    assumed = np.array([one is not None and not one.told for one in before], dtype=bool)
    fraud = served.rows.label == 1
    taken = wanted & ~known & (served.rows.order_us > until_us)
    return taken, wanted & assumed & fraud, wanted & assumed & served.told & ~fraud


def _labels(served: Matured, mask: NDArray[np.bool_]) -> dict[str, Counted]:
    part = served.select(mask)
    rows = zip(part.prediction_ids.tolist(), part.rows.label.tolist(), part.told.tolist(), strict=True)
    return {name: Counted(bool(label), told) for name, label, told in rows}

"""Does a run survive the death of a worker? Train undisturbed, then with one killed, compare the ends."""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.errors import ConfigError, EnvironmentProblemError
from deepseek_ray.train.pretrain_trainer import pretrain_on_ray
from deepseek_ray.train.pretrain_worker import PROGRESS, WORKERS


@dataclass(frozen=True)
class Recovery:
    """What the death of a worker cost.

    Attributes:
        killed_rank: of the worker.
        killed_after_step: last step that was done.
        resumed_at_step: first step that was done after it.
        seconds_to_resume: from the kill to the end of that step.
        checkpoint_every: steps.
        final_loss: of the disturbed run.
        final_loss_diff: to the undisturbed run's, absolute.
    """

    killed_rank: int
    killed_after_step: int
    resumed_at_step: int
    seconds_to_resume: float
    checkpoint_every: int
    final_loss: float
    final_loss_diff: float

    @property
    def steps_lost(self) -> int:
        """Steps that had to be done again."""
        return self.killed_after_step + 1 - self.resumed_at_step

    @property
    def passed(self) -> bool:
        """The same end, and no more lost than since the last checkpoint."""
        return self.final_loss_diff == 0.0 and self.steps_lost <= self.checkpoint_every

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"pass": self.passed, "steps_lost": self.steps_lost, **asdict(self)}


def verify_recovery(config: MoEConfig, folder: Path, *, kill_at: int, signal: int) -> Recovery:
    """Train twice on Ray Train, the second time with a worker ended once ``kill_at`` steps are done.

    Args:
        config: everything; the mesh has at least two processes.
        folder: of both runs; storage that every node sees.
        kill_at: steps.
        signal: its number.

    Raises:
        ConfigError: there is no worker process, or the run is over before the kill.
        EnvironmentProblemError: the worker did not die of the signal.
    """
    if config.parallel.world < 2 or not 0 < kill_at < config.step.steps:
        raise ConfigError(
            f"--kill-at {kill_at} with {config.parallel.world} processes and step.steps = {config.step.steps}.",
            fix="take a mesh of two or more and a step before the last",
        )
    calm = pretrain_on_ray(config, folder / "undisturbed")
    killer = _Killer(folder / "disturbed", kill_at, signal, random.Random(config.seed + kill_at))
    disturbed = pretrain_on_ray(config, folder / "disturbed", on_lines=killer)
    if killer.at is None or len(_workers(folder / "disturbed")) <= config.parallel.world:
        raise EnvironmentProblemError(
            f"No worker group was started again after --kill-at {kill_at}.", fix="kill earlier, or with signal KILL"
        )
    before, after = _around(folder / "disturbed" / PROGRESS, killer.at)
    return Recovery(
        killer.rank, before["step"], after["step"], after["time"] - killer.at, config.step.checkpoint_every,
        disturbed.last_loss, abs(disturbed.last_loss - calm.last_loss),
    )  # fmt: skip


class _Killer:
    """Ends one worker when enough steps are done."""

    def __init__(self, folder: Path, kill_at: int, signal: int, draw: random.Random) -> None:
        self.folder, self.kill_at, self.signal, self.draw = folder, kill_at, signal, draw
        self.rank = -1
        self.at: float | None = None

    def __call__(self, lines: list[dict[str, Any]]) -> None:
        if self.at is not None or lines[-1]["step"] + 1 < self.kill_at:
            return
        victim = self.draw.choice(_workers(self.folder))
        self.rank, self.at = victim["rank"], time.time()
        place = NodeAffinitySchedulingStrategy(victim["node"], soft=False)
        kill = ray.remote(num_cpus=0, scheduling_strategy=place)(_kill)
        ray.get(kill.remote(victim["pid"], self.signal))


def _kill(process: int, number: int) -> None:
    os.kill(process, number)


def _workers(folder: Path) -> list[dict[str, Any]]:
    """All that ever started, in this order."""
    return [json.loads(line) for line in (folder / WORKERS).read_text(encoding="utf-8").splitlines()]


def _around(progress: Path, moment: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last line of the group that was disturbed, and the first one of the group after it."""
    lines = [json.loads(line) for line in progress.read_text(encoding="utf-8").splitlines()]
    for before, after in itertools.pairwise(lines):
        if after["time"] > moment and after["step"] != before["step"] + 1:
            return before, after
    late = next(i for i, line in enumerate(lines) if line["time"] > moment)  # it had just checkpointed: nothing lost
    return lines[late - 1], lines[late]

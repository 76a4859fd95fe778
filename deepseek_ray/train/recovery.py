"""Does a run survive the death of a worker? Train undisturbed, then with one killed, compare the ends."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.errors import ConfigError, EnvironmentProblemError
from deepseek_ray.train.pretrain_trainer import PretrainResult, pretrain_on_ray
from deepseek_ray.train.pretrain_worker import FAULT, PROGRESS, WORKERS, Fault


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
    """Train twice on Ray Train; the second time a worker that the seed draws ends itself after ``kill_at`` steps.

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
    rank = random.Random(config.seed + kill_at).randrange(config.parallel.world)
    fault = Fault(rank=rank, after_step=kill_at - 1, signal=signal)
    disturbed = pretrain_on_ray(config, folder / "disturbed", fault=fault)
    died = folder / "disturbed" / FAULT
    if not died.exists() or len(_workers(folder / "disturbed")) <= config.parallel.world:
        raise EnvironmentProblemError(
            f"No worker group was started again after --kill-at {kill_at}.", fix="take a signal that ends a process"
        )
    moment = float(died.read_text(encoding="utf-8"))
    after = _first_after(folder / "disturbed" / PROGRESS, moment)
    return Recovery(
        rank, kill_at - 1, after["step"], after["time"] - moment, config.step.checkpoint_every,
        end := _last_loss(disturbed), abs(end - _last_loss(calm)),
    )  # fmt: skip


def _last_loss(result: PretrainResult) -> float:
    if result.last_loss is None:
        raise EnvironmentProblemError(f"{str(result.folder)!r} lost its {PROGRESS}.", fix="verify again")
    return result.last_loss


def _workers(folder: Path) -> list[str]:
    """All that ever started."""
    return (folder / WORKERS).read_text(encoding="utf-8").splitlines()


def _first_after(progress: Path, moment: float) -> dict[str, Any]:
    """The first step of the group that went on."""
    lines = [json.loads(line) for line in progress.read_text(encoding="utf-8").splitlines()]
    later: dict[str, Any] = next(line for line in lines if line["group_started"] > moment)
    return later

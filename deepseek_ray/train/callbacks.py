"""What may act on a training between its steps: schedules, and whatever a user adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek_ray.config_moe import StepConfig
from deepseek_ray.train.schedule import learning_rate

if TYPE_CHECKING:
    from deepseek_ray.train.pretrain_step import Stepper, StepReport


class Callback:
    """Does nothing; a subclass overrides what it needs. Every process of the mesh calls its own."""

    def before_update(self, stepper: Stepper, number: int) -> None:
        """Gradients of step ``number`` are there, the weights have not moved."""

    def after_step(self, report: StepReport) -> None:
        """A step is done."""


class LearningRate(Callback):
    """Warm-up, then the schedule of the settings (train/schedule.py)."""

    def __init__(self, settings: StepConfig) -> None:
        self.settings = settings

    def before_update(self, stepper: Stepper, number: int) -> None:
        """Give every parameter group the step's rate."""
        for group in stepper.optimiser.param_groups:
            group["lr"] = learning_rate(number, self.settings)

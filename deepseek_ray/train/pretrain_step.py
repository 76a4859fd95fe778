"""One step of pretraining on this process's share of the model: gradients, clipping, AdamW, balance. No Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist

from deepseek_ray.config_moe import MoEConfig, StepConfig
from deepseek_ray.data.samples import Samples
from deepseek_ray.errors import DivergedError
from deepseek_ray.models.dropout import sample_keys
from deepseek_ray.parallel.apply import SpreadModel, joined_counts
from deepseek_ray.parallel.exchange import GradientExchange
from deepseek_ray.train.callbacks import Callback, LearningRate
from deepseek_ray.train.clip import clip_by_global_norm, clip_by_unit
from deepseek_ray.train.precision import LossScale, unscale


@dataclass(frozen=True)
class StepReport:
    """What a step did; the same on every process, loads by layer where the layer is here.

    Attributes:
        step: number, from 0.
        loss: mean cross-entropy of the global batch, before the update.
        grad_norm: before clipping; infinite when the gradients overflowed and the weights stayed.
        lr: learning rate used.
        load: layer -> tokens of each expert.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    load: dict[int, list[int]]


class Stepper:
    """Trains a spread model, step by step.

    Args:
        config: everything.
        model: this process's share.
        samples: the whole data set, by sample number.
        exchange: sums gradients over dp_replicate; None where the backward pass does.

    Attributes:
        callbacks: called in this order; the schedule of the learning rate comes first.
    """

    def __init__(
        self, config: MoEConfig, model: SpreadModel, samples: Samples, exchange: GradientExchange | None = None
    ) -> None:
        self.config, self.model, self.samples, self.exchange = config, model, samples, exchange
        self.optimiser = make_adamw(model, config.step)
        self.callbacks: list[Callback] = [LearningRate(config.step)]
        self.scale = LossScale() if model.compute == torch.float16 else None
        if self.scale is not None:
            model.loss_scale = self.scale.value

    def step(self, number: int) -> StepReport:
        """Run step ``number``; the batch follows from the number alone."""
        return self.update(number, self.backward(number))

    def update(self, number: int, loss: float) -> StepReport:
        """Clip the gradients of step ``number``, move the weights by them, balance the experts.

        Raises:
            DivergedError: loss or gradients are not finite, and no smaller loss scale could help.
        """
        settings = self.config.step
        finite = self._finite()  # first: what overflowed must not stay in an exchange
        flush = saves(number, settings)  # a checkpoint must hold all there is
        if self.exchange is not None and self.exchange.delays and flush and not finite:
            for _, weight in self.model.named_parameters():
                if weight.grad is not None:
                    weight.grad.zero_()  # the step is made of what the exchange still owes
            finite = True
        if self.exchange is not None and finite:
            self.exchange.sum_gradients(list(self.model.named_parameters()), flush=flush)
        for callback in self.callbacks:
            callback.before_update(self, number)
        norm = math.inf
        if finite:
            norm = self._clip()
            self._refuse_divergence(number, loss, norm)
            self.optimiser.step()
        elif self.scale is not None and self.scale.value == 1.0:
            self._refuse_divergence(number, loss, norm)
        load = joined_counts(self.model)
        for layer, router in self.model.routers().items():
            router.balance(load[layer], self.config.backbone.bias_rate)
        lr = float(self.optimiser.param_groups[0]["lr"])
        report = StepReport(number, loss, norm, lr, {layer: count.tolist() for layer, count in load.items()})
        for callback in self.callbacks:
            callback.after_step(report)
        return report

    def backward(self, number: int) -> float:
        """Gradients of step ``number``; returns the global batch's mean loss."""
        self.optimiser.zero_grad(set_to_none=True)
        mesh = self.model.mesh
        rank = mesh.rank("dp") if mesh else 0
        share = self.config.step.batch_size // self.config.parallel.data
        first = number * self.config.step.batch_size + rank * share
        sample_B = torch.arange(first, first + share)
        x, target = self.samples.take(sample_B)
        key_B = sample_keys(self.config.seed, number, sample_B)
        device = self.model.device
        loss = self.model.forward_backward(x.to(device), target.to(device), key_B.to(device))
        return self._whole(loss)

    def _whole(self, loss: Tensor) -> float:
        """Sum over data ranks and stages."""
        loss = loss.double() / self.model.loss_scale
        if (mesh := self.model.mesh) is not None:
            dist.all_reduce(loss, group=mesh.group("dp"))
            dist.all_reduce(loss, group=mesh.group("pp"))
            if self.config.backbone.head == "classification":
                loss = loss * mesh.degrees.tp
        return float(loss)

    def _finite(self) -> bool:
        """Take the loss scale out of the gradients; False when they overflowed and the step must be left out."""
        if self.scale is None:
            return True
        finite = unscale([weight for _, weight in self.model.named_parameters()], self.scale.value)
        self.scale.update(finite=finite)
        self.model.loss_scale = self.scale.value
        return finite

    def _refuse_divergence(self, number: int, loss: float, norm: float) -> None:
        """The same on every process: both figures are those of the whole mesh."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(
                f"Training diverged at step {number}: loss {loss:g}, gradient norm {norm:g}.",
                fix="lower step.lr, or set step.max_grad_norm; the checkpoints are from before",
            )

    def restore_scale(self, state: Tensor) -> None:
        """Go on with the loss scale of a checkpoint."""
        assert self.scale is not None
        self.scale.restore(state)
        self.model.loss_scale = self.scale.value

    def _clip(self) -> float:
        settings, mesh = self.config.step, self.model.mesh
        named = list(self.model.named_parameters())
        if settings.adaptive_clip:
            clip_by_unit(named, settings.adaptive_clip)
        group = mesh.group("pp") if mesh else None
        return float(clip_by_global_norm((weight for _, weight in named), settings.max_grad_norm, group))


def saves(number: int, settings: StepConfig) -> bool:
    """Whether a checkpoint follows step ``number``."""
    return (number + 1) % settings.checkpoint_every == 0 or number + 1 == settings.steps


def make_adamw(model: SpreadModel, settings: StepConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) on the shards; norms and routers do not decay."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        (free if weight.ndim < 2 or "router" in name else decayed).append(weight)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    # one tensor at a time: the fused forms do not take weights of different meshes together
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=betas, foreach=False)

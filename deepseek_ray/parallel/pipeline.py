"""The pipeline axis (pp): which layers a stage holds, and the schedule that moves micro-batches through the stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.models.adapters import example_input
from deepseek_ray.models.backbone import Backbone
from deepseek_ray.parallel.mesh import Mesh, num_micro_batches, num_stages, stages_of


def layers_of(num_layers: int, stages: int, stage: int) -> list[int]:
    """Layer numbers of a stage: as even as can be, longer ones first."""
    each, more = divmod(num_layers, stages)
    first = stage * each + min(stage, more)
    return list(range(first, first + each + (stage < more)))


def local_layers(config: MoEConfig, rank: int) -> dict[int, list[int]]:
    """Stage number -> layer numbers of one process of the pipeline."""
    total = num_stages(config.parallel)
    return {stage: layers_of(config.backbone.num_layers, total, stage) for stage in stages_of(config.parallel, rank)}


class Pipeline:
    """Runs the stages of this process by the schedule of the config.

    Args:
        parts: stage number -> its part of the model.
        config: shapes, degrees, schedule.
        mesh: for the group of the axis.
        device: of the parts.
        dtype: of hidden states between stages.
        loss: (output, target) -> scalar, of one micro-batch.
        fused: the last stage gets the targets and returns losses, not logits.
    """

    def __init__(
        self, parts: dict[int, Backbone], config: MoEConfig, mesh: Mesh, device: torch.device, dtype: torch.dtype,
        loss: Any, *, fused: bool,
    ) -> None:  # fmt: skip
        total = num_stages(config.parallel)
        stages = []
        for stage, part in parts.items():
            shapes: dict[str, Any] = {
                "input_args": _input(config, stage, dtype),
                "output_args": _output(config, stage, total, dtype, fused=fused),
            }
            stages.append(PipelineStage(part, stage, total, device, group=mesh.group("pp"), **shapes))
        kind = get_schedule_class(config.parallel.schedule)
        single = issubclass(kind, PipelineScheduleSingle)
        chosen: Any = stages[0] if single else stages
        # gradients are summed: the loss is already its share of the global mean
        self.schedule = kind(chosen, n_microbatches=num_micro_batches(config), loss_fn=loss, scale_grads=False)
        self.fused = fused
        self.has_first, self.has_last = 0 in parts, total - 1 in parts

    def step(self, x: Tensor, target: Tensor, keys: dict[str, Tensor]) -> list[Tensor]:
        """Forward and backward of all micro-batches; the losses of each where the last stage is here, else none."""
        losses: list[Tensor] = []
        inputs = (x,) if self.has_first else ()
        goal: dict[str, Any] = {"target": target, "losses": losses} if self.has_last else {}
        if self.has_last and self.fused:
            keys = {**keys, "target_BS": target}
        self.schedule.step(*inputs, return_outputs=False, **goal, **keys)
        return losses


def _hidden(config: MoEConfig, dtype: torch.dtype) -> Tensor:
    length = config.corpus.seq_len // config.parallel.tp
    shape = config.step.micro_batch_size, length, config.backbone.d_model
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _input(config: MoEConfig, stage: int, dtype: torch.dtype) -> Tensor:
    if stage:
        return _hidden(config, dtype)
    return example_input(config.backbone, config.step.micro_batch_size, config.corpus.seq_len, dtype)


def _output(config: MoEConfig, stage: int, total: int, dtype: torch.dtype, *, fused: bool) -> Tensor:
    if stage < total - 1:
        return _hidden(config, dtype)
    shape, rows = config.backbone, config.step.micro_batch_size
    if shape.head == "classification":
        return torch.empty(rows, shape.num_classes, dtype=dtype, device="meta", requires_grad=True)
    if fused:
        wide = torch.promote_types(dtype, torch.float32)
        return torch.empty(rows, config.corpus.seq_len, dtype=wide, device="meta", requires_grad=True)
    columns = shape.vocab_size // config.parallel.tp
    return torch.empty(rows, config.corpus.seq_len, columns, dtype=dtype, device="meta", requires_grad=True)

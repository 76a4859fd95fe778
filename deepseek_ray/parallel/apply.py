"""The order in which the axes are applied to the backbone: cut (pp), split (tp), deal experts (ep), shard (dp).

The result computes what the whole model computes in one process; ``deepseek-ray verify mesh`` shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.kernels.dispatch import use_triton
from deepseek_ray.models.backbone import Backbone, Block, init_weights
from deepseek_ray.models.heads.sequence import SequenceHead
from deepseek_ray.models.moe import MoE
from deepseek_ray.models.router import Router
from deepseek_ray.parallel import shard, tensor
from deepseek_ray.parallel.expert import ExpertExchange
from deepseek_ray.parallel.mesh import Mesh, check_mesh, num_micro_batches
from deepseek_ray.parallel.pipeline import Pipeline, local_layers


class SpreadModel:
    """This process's share of the backbone, and how to run a step on it.

    Args:
        config: everything; its degrees fit the mesh.
        mesh: where this process sits; None for one process that holds all, with plain torch.
        device: of the weights.
        dtype: of the weights.
        compute: precision of computing; the weights' own by default.
    """

    def __init__(
        self, config: MoEConfig, mesh: Mesh | None, device: torch.device, dtype: torch.dtype,
        compute: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        check_mesh(config)
        self.config, self.mesh, self.device = config, mesh, device
        self.compute = compute or dtype
        layers = local_layers(config, mesh.rank("pp") if mesh else 0)
        self.parts = {stage: self._make(numbers, dtype) for stage, numbers in layers.items()}
        self.loss_scale = 1.0
        language = config.backbone.head == "language"
        self.fused = language and use_triton(torch.empty(1, dtype=self.compute, device=device))
        """Whether the head computes losses without logits."""
        self.pipeline: Pipeline | None = None
        if config.parallel.pp > 1:
            assert mesh is not None
            self.pipeline = Pipeline(self.parts, config, mesh, device, self.compute, self._loss, fused=self.fused)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Weights here, sharded, by their name in the whole model."""
        for part in self.parts.values():
            yield from part.named_parameters()

    def routers(self) -> dict[int, Router]:
        """Routers here by number of the layer."""
        return {number: router for part in self.parts.values() for number, router in part.routers().items()}

    def forward_backward(self, x: Tensor, target: Tensor, key_B: Tensor) -> Tensor:
        """Gradients of the loss of this data rank's rows; returns their summed loss times ``loss_scale``.

        The sum over all data ranks is the mean loss of the global batch; without the routers' own losses.

        Args:
            x: input of this data rank.
            target: its labels.
            key_B: keys of its samples (models/dropout.py).
        """
        self._weigh_losses()
        x = x.to(self.compute) if x.is_floating_point() else x
        keys = {"key_B": key_B} if self.config.backbone.dropout else {}
        if self.pipeline is not None:
            losses = self.pipeline.step(x, target, keys)
        else:
            losses = self._accumulate(x, target, keys)
        return torch.stack([loss.detach() for loss in losses]).sum() if losses else torch.zeros((), device=self.device)

    def _accumulate(self, x: Tensor, target: Tensor, keys: dict[str, Tensor]) -> list[Tensor]:
        (model,) = self.parts.values()
        count = num_micro_batches(self.config)
        losses = []
        for number, (rows, goal) in enumerate(zip(x.chunk(count), target.chunk(count), strict=True)):
            if isinstance(model, FSDPModule):  # gradients cross processes once a step
                model.set_is_last_backward(number == count - 1)
                model.set_requires_gradient_sync(number == count - 1)
            with nullcontext() if self.mesh else shard.computing_in(model, self.compute):
                extra = {k: v.chunk(count)[number] for k, v in keys.items()}
                extra |= {"target_BS": goal} if self.fused else {}
                loss = self._loss(model(rows, **extra), goal)
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss)
        return losses

    def _loss(self, logit: Tensor, target: Tensor) -> Tensor:
        """A micro-batch's share of the global mean loss, scaled; fused, the model's output is the losses already."""
        if self.fused:
            return self._share(logit)
        tp, pooled = self.config.parallel.tp, self.config.backbone.head == "classification"
        split = self.mesh.group("tp") if self.mesh and tp > 1 and not pooled else None
        each = tensor.cross_entropy(logit.flatten(0, -2), target.flatten(), split)
        # a pooled head repeats its work on every process of tp: each contributes its part of the gradient
        return self._share(each) / (tp if pooled else 1)

    def _share(self, loss: Tensor) -> Tensor:
        """Summed losses of some targets, as a share of the mean over all, scaled."""
        return loss.sum() * (self.loss_scale / self._targets())

    def _targets(self) -> int:
        rows = self.config.step.batch_size
        return rows if self.config.backbone.head == "classification" else rows * self.config.corpus.seq_len

    def _weigh_losses(self) -> None:
        tokens = self.config.step.batch_size * self.config.corpus.seq_len
        for router in self.routers().values():  # every process of tp sees all tokens of a router
            router.loss_weight = self.loss_scale / (tokens * self.config.parallel.tp)

    def _make(self, numbers: list[int], dtype: torch.dtype) -> Backbone:
        config, mesh = self.config.backbone, self.mesh
        with torch.device("meta"):
            part = Backbone(config, numbers)
        pieces: dict[str, nn.Module] = {f"layers.{name}.": layer for name, layer in part.layers.items()}
        pieces |= {f"{name}.": one for name, one in (("adapter", part.adapter), ("head", part.head)) if one is not None}
        for prefix, piece in pieces.items():  # one piece whole at a time
            piece.to_empty(device=self.device).to(dtype)
            init_weights(piece, config, self.config.seed, prefix)
            if mesh is not None:
                self._spread(piece, mesh)
        part.set_recompute(self.config.step.recompute)
        if self.config.step.compile:
            part.compile_dense()
        if mesh is not None:
            shard.shard_dense(part, mesh, self._policy, replicate=self._replicate, keep=True)
        return part.train()

    def _spread(self, piece: nn.Module, mesh: Mesh) -> None:
        keep = mesh.degrees.pp > 1  # else every micro-batch gathers the weights again
        if mesh.degrees.tp > 1:
            tp = mesh.dense["tp"]
            tensor.shard_weights(piece, tp, pooled=self.config.backbone.head == "classification")
            if isinstance(piece, Block):
                tensor.split_block(piece, tp)
            elif isinstance(piece, SequenceHead):
                tensor.split_head(piece, tp)
            else:
                tensor.split_adapter(piece, tp)
        feed = getattr(piece, "feed", None)
        if isinstance(feed, MoE):
            if mesh.degrees.ep > 1:
                feed.exchange = ExpertExchange(mesh.group("ep"))
            shard.shard_experts(feed.experts, mesh, self._policy, replicate=self._replicate, keep=keep)
        shard.shard_dense(piece, mesh, self._policy, replicate=self._replicate, keep=keep)

    @property
    def _replicate(self) -> bool:
        return self.config.parallel.dp_replicate > 1 and self.config.step.exchange == "all_reduce"

    @property
    def _policy(self) -> MixedPrecisionPolicy:
        return shard.precision_policy(self.compute)


def joined_counts(model: SpreadModel) -> dict[int, Tensor]:
    """Tokens of each expert in this step over all data ranks, by layer; the same on every process of a stage."""
    counts = {}
    for number, router in model.routers().items():
        count_E = router.count_E.clone()
        if model.mesh is not None:
            dist.all_reduce(count_E, group=model.mesh.group("dp"))
        counts[number] = count_E
    return counts

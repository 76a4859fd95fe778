"""The data axes of the backbone: weights, gradients and optimiser state are sharded over dp_shard (FSDP2).

dp_replicate repeats the shards. Gradients are summed, not averaged: a loss is already its share of the global mean.
Experts are sharded over efsdp, the processes that hold the same experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from deepseek_ray.models.moe import Experts
from deepseek_ray.parallel.mesh import Mesh
from deepseek_ray.parallel.tensor import placement_of


def shard_experts(experts: Experts, mesh: Mesh, policy: MixedPrecisionPolicy, *, replicate: bool, keep: bool) -> None:
    """Deal the experts over ep, their hidden width over tp, what is left over efsdp.

    Args:
        experts: whole weights.
        mesh: both layouts.
        policy: precision of computing and of reducing.
        replicate: sum gradients over dp_replicate in the backward pass.
        keep: keep gathered weights from forward to backward.
    """
    axes = tuple(axis for axis in ("ep", "tp") if getattr(mesh.degrees, axis) > 1)
    for name, weight in list(experts.named_parameters()):
        if axes:
            places = [Shard(0) if axis == "ep" else placement_of(name) for axis in axes]
            sharded = distribute_tensor(weight.detach(), mesh.sparse[axes], places, src_data_rank=None)
            experts.register_parameter(name, nn.Parameter(sharded))
    here, size = experts.up_ED2I.shape[0] // mesh.degrees.ep, mesh.degrees.dp_shard // mesh.degrees.ep
    # by expert, or, where that is uneven, by model width if it can be: up is (E, D, 2, I), down is (E, I, D)
    by_width = {weight: Shard(1 if weight.ndim == 4 else 2) for weight in experts.parameters()}
    even = here % size == 0 or experts.down_EID.shape[2] % size
    choose = None if even else by_width.__getitem__
    _fully_shard(experts, mesh.sparse, "efsdp", policy, replicate=replicate, keep=keep, shard_placement_fn=choose)


def shard_dense(module: nn.Module, mesh: Mesh, policy: MixedPrecisionPolicy, *, replicate: bool, keep: bool) -> None:
    """Shard all weights of a module that are not sharded yet over dp_shard; arguments as in :func:`shard_experts`."""
    size = mesh.degrees.dp_shard

    def choose(weight: nn.Parameter) -> Shard | None:  # (2, H, D) has no rows to deal, but a width
        return Shard(2) if weight.ndim == 3 and weight.shape[2] % size == 0 else None

    _fully_shard(module, mesh.dense, "dp_shard", policy, replicate=replicate, keep=keep, shard_placement_fn=choose)


def _fully_shard(
    module: nn.Module, layout: DeviceMesh, axis: str, policy: MixedPrecisionPolicy,
    *, replicate: bool, keep: bool, **options: Any,
) -> None:  # fmt: skip
    axes: Any = ("dp_replicate", axis) if replicate else axis
    fully_shard(module, mesh=layout[axes], mp_policy=policy, reshard_after_forward=not keep, **options)
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def precision_policy(precision: torch.dtype) -> MixedPrecisionPolicy:
    """Compute in a low precision and reduce in float32; plain where weights have the precision they compute in."""
    if precision in (torch.bfloat16, torch.float16):
        return MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()


@contextmanager
def computing_in(model: nn.Module, precision: torch.dtype) -> Iterator[None]:
    """One process alone computes as FSDP2 does: it reads weights in a low precision, gradients arrive in their own."""
    held = [(owner, name, weight) for owner in model.modules() for name, weight in owner._parameters.items()]
    try:
        for owner, name, weight in held:
            owner._parameters[name] = weight.to(precision) if weight is not None else None  # type: ignore[assignment]
        yield
    finally:  # the backward pass is over, for it may compute activations again
        for owner, name, weight in held:
            owner._parameters[name] = weight

"""Gradient clipping on sharded gradients: by the global norm, and unit by unit.

A sum over shards is taken axis by axis of the weight's own mesh, and over the pipeline at the end; a weight that is
whole on an axis is counted once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

_UNIT_DIMS = {"up_2HD": (0, 1), "up_ED2I": (0, 2, 3), "down_EID": (0, 2)}
"""Dimensions that number the units (outputs) of a weight; dimension 0 of all others."""
_EPS = 1e-3


def local_part(tensor: Tensor) -> Tensor:
    """The shard here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(parameters: Iterable[nn.Parameter], pipeline: dist.ProcessGroup | None) -> Tensor:
    """Euclidean norm (float64 scalar) of all gradients of the model; the same on every process.

    Args:
        parameters: those of this process.
        pipeline: processes that hold the other stages.
    """
    sums: dict[tuple[str, ...], Tensor] = {}
    meshes = {}
    for weight in parameters:
        if weight.grad is None:
            continue
        axes = _split_axes(weight.grad, range(weight.ndim))
        square = local_part(weight.grad).double().square().sum()
        sums[axes] = sums[axes] + square if axes in sums else square
        if isinstance(weight.grad, DTensor):
            meshes[axes] = weight.grad.device_mesh
    for axes in sorted(sums):
        for axis in axes:
            dist.all_reduce(sums[axes], group=meshes[axes].get_group(axis))
    total = torch.stack(list(sums.values())).sum() if sums else torch.zeros((), dtype=torch.float64)
    if pipeline is not None:
        dist.all_reduce(total, group=pipeline)
    return total.sqrt()


@torch.no_grad()
def clip_by_global_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, pipeline: dist.ProcessGroup | None
) -> Tensor:
    """Scale all gradients so that their joint norm is at most ``max_norm`` (0: leave them); returns the norm before."""
    weights = list(parameters)
    norm = global_norm(weights, pipeline)
    if max_norm and norm > max_norm:
        for weight in weights:
            if weight.grad is not None:
                local_part(weight.grad).mul_((max_norm / norm).to(weight.grad.dtype))
    return norm


@torch.no_grad()
def clip_by_unit(parameters: Iterable[tuple[str, nn.Parameter]], ratio: float) -> None:
    """Adaptive clipping (Brock et al. 2021, arXiv:2102.06171): a unit's gradient is at most ``ratio`` of its weight.

    A unit is one output of a matrix. Weights of one dimension are left alone.

    Args:
        parameters: (name, weight).
        ratio: lambda of the paper.
    """
    for name, weight in parameters:
        if weight.grad is None or weight.ndim < 2:
            continue
        units = _UNIT_DIMS.get(name.rpartition(".")[2], (0,))
        inner = [dim for dim in range(weight.ndim) if dim not in units]
        largest = (_unit_norm(weight.detach(), inner) * ratio).clamp(min=_EPS * ratio)
        norm = _unit_norm(weight.grad, inner)
        scale = (largest / norm.clamp(min=1e-12)).clamp(max=1.0)
        gradient = local_part(weight.grad)
        gradient.mul_(scale.to(gradient.dtype))


def _unit_norm(tensor: Tensor, inner: list[int]) -> Tensor:
    """Norms over the inner dimensions, kept with size 1; of the units in this shard, over all shards of a unit."""
    square = local_part(tensor).double().square().sum(inner, keepdim=True)
    if isinstance(tensor, DTensor):
        for axis in _split_axes(tensor, inner):
            dist.all_reduce(square, group=tensor.device_mesh.get_group(axis))
    return square.sqrt()


def _split_axes(tensor: Tensor, dims: Iterable[int]) -> tuple[str, ...]:
    """Axes of the tensor's mesh that split one of the dimensions."""
    if not isinstance(tensor, DTensor):
        return ()
    names = tensor.device_mesh.mesh_dim_names or ()
    wanted = set(dims)
    pairs = zip(names, tensor.placements, strict=True)
    return tuple(name for name, place in pairs if not place.is_replicate() and getattr(place, "dim", None) in wanted)

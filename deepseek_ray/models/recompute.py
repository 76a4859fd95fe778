"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): the backward pass computes activations again.

Selective: what is dear to compute is kept (matrix products, attention, gathered sequences), the rest is
recomputed (Korthikanti et al. 2022, arXiv:2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from deepseek_ray.models.layers import recomputing

_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default, _aten.addmm.default, _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default, _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default, _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default, torch.ops._c10d_functional.all_gather_into_tensor.default,
}  # fmt: skip


def recomputed(compute: Callable[..., Tensor], *inputs: Tensor | None, selective: bool) -> Tensor:
    """``compute(*inputs)`` without keeping what its backward pass can compute again."""
    y: Tensor = checkpoint(
        compute, *inputs, use_reentrant=False, preserve_rng_state=False,
        context_fn=_selective_contexts if selective else _full_contexts,
    )  # fmt: skip
    return y


def _full_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), recomputing()


def _selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    keep, again = create_selective_checkpoint_contexts(_policy)
    return keep, _both(again)


@contextmanager
def _both(again: AbstractContextManager[Any]) -> Iterator[None]:
    with recomputing(), again:
        yield


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE

"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): the backward pass computes activations again.

``full`` keeps a block's input only. ``selective`` keeps the results of matrix products and of attention, and computes
again what is cheap and large: norms and the products of gates and values (Korthikanti et al. 2022, arXiv:2205.05198).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "selective", "full"]
_thread = threading.local()


def recomputed(compute: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """``compute(*inputs)`` without keeping what its backward pass can compute again; draws no random numbers."""
    contexts: Any = lambda: (nullcontext(), _Recomputing())  # noqa: E731
    y: Tensor = checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return y


def is_recomputing() -> bool:
    """True while activations are computed again, in this thread: what counts tokens must not count them twice."""
    return getattr(_thread, "depth", 0) > 0


class _Recomputing:
    """Entered once for each recomputation: a schedule that splits the backward pass recomputes twice."""

    def __enter__(self) -> None:
        _thread.depth = getattr(_thread, "depth", 0) + 1

    def __exit__(self, *_: object) -> None:
        _thread.depth -= 1

"""What every kernel test uses: a device, guarded buffers, and hard comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_ray.kernels.dispatch import interpreting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BAND = 64
SENTINEL = 113

needs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not interpreting(), reason="kernels need a GPU or TRITON_INTERPRET=1 before the first import"
)


@contextmanager
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New buffers hold NaN (integers: a large number) and lie between bands; at the end the bands are untouched.

    A kernel that leaves a part of its output unwritten, or writes beside it, fails.
    """
    made: list[tuple[Tensor, int]] = []
    honest = torch.empty

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        whole = honest(shape.numel() + 2 * BAND, dtype=dtype or torch.get_default_dtype(), device=device)
        whole.fill_(SENTINEL)
        inner = whole[BAND : BAND + shape.numel()]
        inner.fill_(float("nan") if whole.is_floating_point() else SENTINEL)
        made.append((whole, shape.numel()))
        return inner.view(shape)

    def empty_like(other: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return empty(tuple(other.shape), dtype=dtype or other.dtype, device=other.device)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", empty_like)
        yield
    for whole, size in made:
        assert bool((whole[:BAND] == SENTINEL).all()), "written before a buffer"
        assert bool((whole[BAND + size :] == SENTINEL).all()), "written behind a buffer"


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Equal within a tolerance relative to the largest element wanted: hard on small elements too."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    if wanted.numel():
        scale = max(float(wanted.abs().max()), 1e-6)
        worst = float((found.double() - wanted.double()).abs().max()) / scale
        assert worst <= tolerance, f"off by {worst:.2e} of the largest element"

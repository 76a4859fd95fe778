"""How a row-wise op is compared with its reference: outputs and gradients, in guarded buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepseek_ray.kernels import dispatch
from tests.kernels.checks import DEVICE, assert_near, guarded

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The public functions run their kernels, in the interpreter where there is no GPU."""
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    dispatch.choice.cache_clear()
    with np.errstate(over="ignore"):  # exp of a large number is infinite, in the interpreter as on a GPU
        yield


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """A leaf that asks for its gradient, on the device that runs kernels."""
    return (torch.randn(shape) * scale).to(DEVICE, dtype).requires_grad_()


def assert_equals_reference(
    monkeypatch: pytest.MonkeyPatch,
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    tolerance: float | None = None,
) -> None:
    """Outputs and the gradients of random cotangents equal those of the reference in float64, rounded."""
    near = TOLERANCE[inputs[0].dtype] if tolerance is None else tolerance
    exact_inputs = [one.detach().double().requires_grad_(one.requires_grad) for one in inputs]
    with guarded(monkeypatch):
        outputs = _tuple(op(*inputs))
        cotangents = [torch.randn_like(one) for one in outputs]
        gradients = torch.autograd.grad(outputs, inputs, cotangents)
    exact = _tuple(reference(*exact_inputs))
    wanted = torch.autograd.grad(exact, exact_inputs, [one.double() for one in cotangents])
    for found, one in zip((*outputs, *gradients), (*exact, *wanted), strict=True):
        assert_near(found.detach(), one.detach().to(found.dtype), near)


def assert_compiles(op: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """One graph, no break: outputs and gradients as without compilation, bit for bit."""
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=False)
    torch._dynamo.reset()
    found, wanted = _tuple(compiled(*inputs)), _tuple(op(*inputs))
    cotangents = [torch.randn_like(one) for one in wanted]
    ours = torch.autograd.grad(found, inputs, cotangents)
    theirs = torch.autograd.grad(wanted, inputs, cotangents)
    for one, other in zip((*found, *ours), (*wanted, *theirs), strict=True):
        assert torch.equal(one, other)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)

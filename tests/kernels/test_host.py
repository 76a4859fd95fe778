"""The host runs ahead of the GPU: on the kernels, the model's MoE layer and its gradients ask for no number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_ray.kernels import dispatch
from deepseek_ray.models.moe import MoE
from deepseek_ray.models.router import Router
from tests.kernels.checks import DEVICE, needs_kernels

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.nonzero_static, aten.masked_select, aten.bincount, aten.histc,
    aten.unique_consecutive, aten.unique_dim, aten._unique2, aten.equal, aten.is_nonzero,
}  # fmt: skip
"""What must know values on the host, or makes an output whose size depends on them."""


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for a GPU, on any device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func.overloadpacket not in WAITING, f"{func} makes the host wait"
        counts = func.overloadpacket is aten.repeat_interleave
        assert not counts or kwargs.get("output_size") is not None, f"{func} without output_size makes the host wait"
        indexed = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_)
        assert not indexed or all(one is None or one.dtype != torch.bool for one in args[1]), f"{func} with a mask"
        leaves = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu" and DEVICE != "cpu"
        assert not leaves or not any(isinstance(one, Tensor) for one in args), f"{func} copies to the host"
        return func(*args, **kwargs)


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    dispatch.choice.cache_clear()
    yield
    dispatch.choice.cache_clear()


def moe(**router: Any) -> MoE:
    torch.manual_seed(0)
    layer = MoE(16, 8, Router(16, 8, 2, **router), num_shared=1)
    layer.router.loss_weight = 1.0
    return layer.to(DEVICE)


def both_passes(layer: nn.Module) -> None:
    x = torch.randn(2, 12, 16, device=DEVICE, requires_grad=True)
    dy = torch.ones_like(x)
    # a list is read past the dispatcher where the tensor is on the host
    with NoWaiting(), mock.patch.object(torch.Tensor, "tolist", side_effect=AssertionError("makes the host wait")):
        torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)


@needs_kernels
@pytest.mark.parametrize(
    "router",
    [{}, {"score": "softmax", "num_groups": 4, "top_groups": 2}, {"balance_loss": 0.1, "z_loss": 0.1}],
    ids=["plain", "groups", "losses"],
)
def test_the_host_never_waits_for_the_layer(router: dict[str, Any], on_triton: None) -> None:
    both_passes(moe(**router))


class Asking(nn.Module):
    """A layer that asks the device for something."""

    def __init__(self, question: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), device=DEVICE))
        self.question = question

    def forward(self, x: Tensor) -> Tensor:
        self.question(x.detach())
        return x * self.weight


@pytest.mark.parametrize(
    "question",
    [
        lambda x: x.sum().item(),
        lambda x: x.flatten().tolist(),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.where(x > 0),
        lambda x: torch.bincount(x.flatten().relu().long()),
        lambda x: x.flatten().relu().long().repeat_interleave(x.flatten().relu().long()),
        lambda x: bool((x > 0).any()),
        lambda x: x.flatten().relu().long().unique(),
    ],
    ids=["item", "tolist", "nonzero", "mask", "where", "bincount", "repeat_interleave", "bool", "unique"],
)
def test_a_question_to_the_device_is_noticed(question: Any) -> None:
    with pytest.raises(AssertionError, match=r"makes the host wait|with a mask"):
        both_passes(Asking(question))

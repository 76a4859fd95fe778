"""A backward pass in two, as pipelines split it: every product at most once, and the gradients of one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from deepseek_ray.kernels import dispatch, fused_moe
from deepseek_ray.kernels import linear_cross_entropy as op
from deepseek_ray.kernels.linear_cross_entropy import linear_cross_entropy
from tests.kernels.checks import DEVICE, needs_kernels

ONCE = {"backward_of_activation": 1, "multiply_rows": 1, "outer_products": 2}


class Experts(nn.Module):
    """Experts behind a router, with a weight before and after."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"before": (16, 16), "router": (16, 3), "up": (3, 16, 2, 16), "down": (3, 16, 16), "after": (16, 16)}
        self.weights = nn.ParameterDict({name: torch.randn(size, device=DEVICE) / 4 for name, size in sizes.items()})

    def forward(self, x_TD: Tensor) -> Tensor:
        before, router, up, down, after = (self.weights[name] for name in ("before", "router", "up", "down", "after"))
        x_TD = x_TD @ before
        gate_TK, expert_TK = (x_TD @ router).topk(2)
        y: Tensor = fused_moe.fused_moe(x_TD, expert_TK, gate_TK, up, down) @ after
        return y


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Parameter(torch.randn(48, 16, device=DEVICE))

    def forward(self, x_TD: Tensor) -> Tensor:
        target_T = torch.arange(len(x_TD), device=x_TD.device)
        return linear_cross_entropy(x_TD, self.project, target_T, reduction="none")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    dispatch.choice.cache_clear()
    yield
    dispatch.choice.cache_clear()


@pytest.fixture(name="launches")
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    seen: Counter[str] = Counter()

    def watch(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: [seen.update([name]), run(*args, **options)][1]

    for name in ONCE:
        monkeypatch.setattr(fused_moe, name, watch(name, getattr(fused_moe, name)))
    return seen


def stage(module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    x_TD = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
    y_TD = module(x_TD)
    return x_TD, y_TD, torch.linspace(-1, 1, y_TD.numel(), device=DEVICE).view_as(y_TD)


def in_one(module: nn.Module) -> list[Tensor]:
    x_TD, y_TD, dy_TD = stage(module)
    torch.autograd.backward(y_TD, dy_TD)
    assert x_TD.grad is not None
    return [x_TD.grad, *(weight.grad for weight in module.parameters() if weight.grad is not None)]


def in_two(module: nn.Module, between: Callable[[], None]) -> list[Tensor]:
    module.zero_grad()
    x_TD, y_TD, dy_TD = stage(module)
    (dx_TD,), groups = stage_backward_input([y_TD], [dy_TD], [x_TD], module.parameters())
    between()
    assert dx_TD is not None
    assert all(weight.grad is None for weight in module.parameters())
    stage_backward_weight(module.parameters(), groups)
    return [dx_TD, *(weight.grad for weight in module.parameters() if weight.grad is not None)]


@needs_kernels
def test_experts_multiply_no_more_in_two_passes_than_in_one(
    launches: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    module, forward = Experts(), {"multiply_rows": 1}
    wanted = in_one(module)
    assert launches == Counter(ONCE) + Counter(forward)
    launches.clear()
    first: Counter[str] = Counter()
    found = in_two(module, between=lambda: first.update(launches))
    assert first == Counter(ONCE) + Counter(forward) - Counter({"outer_products": 2})  # none of the weights yet
    assert launches == Counter(ONCE) + Counter(forward)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@needs_kernels
def test_what_is_kept_for_the_second_pass_serves_no_other_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    module = Experts()
    x_TD, y_TD, dy_TD = stage(module)
    torch.autograd.grad(y_TD, x_TD, dy_TD, retain_graph=True)
    (found,) = torch.autograd.grad(y_TD, module.weights["up"], 2 * dy_TD)
    (wanted,) = torch.autograd.grad(module(x_TD), module.weights["up"], 2 * dy_TD)
    assert torch.equal(found, wanted)


def test_the_loss_takes_each_gradient_once_in_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: Counter[tuple[int, ...]] = Counter()
    honest, add = torch.mm, op._add_product

    def multiply(*args: Any, **options: Any) -> Tensor:
        found = honest(*args, **options)
        shapes[tuple(found.shape)] += 1
        return found

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(op, "_add_product", lambda *args: [shapes.update([tuple(args[0].shape)]), add(*args)][1])
    module = Head()
    wanted = in_one(module)
    plain = shapes.copy()
    shapes.clear()
    found = in_two(module, between=lambda: None)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    gradients = [shape for shape in plain if 16 in shape]  # of x and of the weight; logits are (5, columns)
    assert len(gradients) == 2
    assert all(shapes[shape] == plain[shape] for shape in gradients)

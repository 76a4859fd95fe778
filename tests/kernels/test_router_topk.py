"""Routing: the reference against the model's router, the kernels against the reference, ties and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_ray.kernels import router_topk as module
from deepseek_ray.kernels.router_topk import router_topk, router_topk_ref
from deepseek_ray.models.router import Router
from tests.kernels.checks import DEVICE, assert_near, guarded, needs_kernels
from tests.kernels.rowwise import assert_compiles, randn, with_kernels  # noqa: F401

PLAIN = {"num_groups": 1, "top_groups": 1}
SETTINGS: list[dict[str, Any]] = [
    {"score": "softmax"},
    {"score": "sigmoid", "scale": 2.5},
    {"score": "softmax", "normalise": False},
    {"score": "sigmoid", "normalise": False, "num_groups": 4, "top_groups": 2},
    {"score": "sigmoid", "num_groups": 3, "top_groups": 1, "scale": 0.5},
    {"score": "softmax", "num_groups": 12, "top_groups": 7},
]
each = pytest.mark.parametrize("how", SETTINGS)


def assert_routes(monkeypatch: pytest.MonkeyPatch, logit: Tensor, bias: Tensor | None, top_k: int, **how: Any) -> None:
    """The kernels choose as the reference does, and gates, scores and gradients are near."""
    with guarded(monkeypatch):
        found = router_topk(logit, bias, top_k, scores=True, **how)
        assert found.score_TE is not None
        dweight, dscore = torch.randn_like(found.weight_TK), torch.randn_like(found.score_TE)
        alone = torch.autograd.grad(found.weight_TK, logit, dweight, retain_graph=True)[0]
        both = torch.autograd.grad((found.weight_TK, found.score_TE), logit, (dweight, dscore))[0]
    wanted = router_topk_ref(logit, bias, top_k, scores=True, **how)
    assert wanted.score_TE is not None
    assert torch.equal(found.index_TK, wanted.index_TK)
    near = 1e-5 if logit.dtype == torch.float32 else 2e-3
    assert_near(found.weight_TK.detach(), wanted.weight_TK.detach(), 1e-5)
    assert_near(found.score_TE.detach(), wanted.score_TE.detach(), 1e-5)
    exact = torch.autograd.grad(wanted.weight_TK, logit, dweight, retain_graph=True)[0]
    # The gate of a single normalised expert has no gradient: what remains of it is rounding.
    torch.testing.assert_close(alone, exact, rtol=0.0, atol=near * max(0.01, float(exact.abs().max())))
    exact = torch.autograd.grad((wanted.weight_TK, wanted.score_TE), logit, (dweight, dscore))[0]
    torch.testing.assert_close(both, exact, rtol=0.0, atol=near * max(0.01, float(exact.abs().max())))


@each
def test_the_reference_is_the_models_router(how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    router = Router(6, 12, 3, **how).double()
    router.bias_E.copy_(torch.linspace(-0.1, 0.1, 12)[torch.randperm(12)])
    x_TD = torch.randn(40, 6, dtype=torch.float64)
    gate_TK, expert_TK = router(50 * x_TD)
    logit_TE = 50 * x_TD @ router.weight_ED.mT
    found = router_topk_ref(logit_TE, router.bias_E, 3, **how)
    assert torch.equal(found.index_TK, expert_TK)
    torch.testing.assert_close(found.weight_TK, gate_TK)
    torch.testing.assert_close(router_topk(logit_TE, router.bias_E, 3, **how).weight_TK, gate_TK)


@each
def test_the_reference_passes_gradcheck(how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logit_TE = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)

    def differentiable(logit_TE: Tensor) -> tuple[Tensor, ...]:
        found = router_topk_ref(logit_TE, None, 3, scores=True, **how)
        assert found.score_TE is not None
        return found.weight_TK, found.score_TE

    assert torch.autograd.gradcheck(differentiable, logit_TE)


ONES = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("logit", "bias", "top_k", "how", "message"),
    [
        (torch.ones(8), None, 2, {}, r"logit has shape \(8,\): it must be \(tokens, experts\)"),
        (ONES.int(), None, 2, {}, "logit has type .*int32"),
        (ONES, torch.ones(7), 2, {}, r"bias has shape \(7,\): it must be \(8,\)"),
        (ONES, torch.ones(8, device="meta"), 2, {}, "bias is on meta"),
        (ONES, None, 0, {}, r"top_k = 0 must be in 1\.\.8"),
        (ONES, None, 5, {"num_groups": 4, "top_groups": 2}, r"top_k = 5 must be in 1\.\.4"),
        (ONES, None, 2, {"num_groups": 3}, "num_groups = 3 must divide the 8 experts"),
        (ONES, None, 2, {"num_groups": 2, "top_groups": 3}, "top_groups = 3 must be in"),
        (ONES, None, 2, {"score": "relu"}, "score = 'relu' must be one of sigmoid, softmax"),
    ],
)
def test_what_does_not_fit_is_named(logit: Tensor, bias: Any, top_k: int, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router_topk(logit, bias, top_k, **how)


def test_no_tokens_and_no_data_are_fine() -> None:
    assert router_topk(torch.ones(0, 8), None, 2).index_TK.shape == (0, 2)
    assert router_topk(torch.ones(3, 8, device="meta"), None, 2).weight_TK.shape == (3, 2)


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 12, 1), (70, 12, 3), (9, 60, 4)])
def test_kernels_equal_the_reference(
    tokens: int, experts: int, top_k: int, dtype: torch.dtype, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    logit, bias = randn(tokens, experts, dtype=dtype), torch.randn(experts, device=DEVICE) / 10
    assert_routes(monkeypatch, logit, bias, top_k, **how)
    assert_routes(monkeypatch, logit, None, top_k, **how)


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_the_models_it_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    assert_routes(monkeypatch, randn(20, 128), None, 8, score="softmax")
    assert_routes(monkeypatch, randn(20, 8), None, 2, score="softmax")
    bias = torch.randn(256, device=DEVICE) / 10
    assert_routes(monkeypatch, randn(9, 256), bias, 8, score="sigmoid", num_groups=8, top_groups=4, scale=2.5)
    assert_routes(monkeypatch, randn(3, 1000), None, 4, score="sigmoid")
    assert_routes(monkeypatch, randn(3, 1), None, 1, score="sigmoid")


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
@given(data=st.data(), groups=st.integers(1, 5), size=st.integers(1, 9), tokens=st.integers(1, 30))
@settings(deadline=None, derandomize=True, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_with_many_ties(
    data: st.DataObject, groups: int, size: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, min(8, size * top_groups)))
    how = {"score": data.draw(st.sampled_from(module.SCORES)), "num_groups": groups, "top_groups": top_groups}
    logit = torch.randint(-1, 2, (tokens, groups * size)).to(DEVICE, torch.float32).requires_grad_()
    assert_routes(monkeypatch, logit, None, top_k, **how)


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("how", [PLAIN, {"num_groups": 4, "top_groups": 2}])
def test_ties_go_to_the_lowest_number(how: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    same = torch.zeros(3, 8, device=DEVICE, requires_grad=True)
    assert router_topk(same, None, 3, **how).index_TK.tolist() == [[0, 1, 2]] * 3
    assert_routes(monkeypatch, torch.full_like(same, 90.0).requires_grad_(), None, 3, **how)  # saturated
    falling = torch.linspace(0.5, -0.5, 8, device=DEVICE).round(decimals=0)  # below zero too
    assert_routes(monkeypatch, same, falling - 0.5, 3, **how)


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_experts_out_of_reach_tie_with_those_of_other_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two groups of three hold two experts each that are not disabled; the fifth choice is the lowest number of all.
    bias = torch.tensor([0.0 if e in (6, 7, 9, 10) else float("-inf") for e in range(12)], device=DEVICE)
    logit = torch.zeros(2, 12, device=DEVICE, requires_grad=True)
    assert router_topk(logit, bias, 5, num_groups=4, top_groups=2).index_TK.tolist() == [[6, 7, 9, 10, 0]] * 2
    assert_routes(monkeypatch, logit, bias, 5, num_groups=4, top_groups=2)


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("how", [PLAIN, {"num_groups": 4, "top_groups": 2}])
@pytest.mark.parametrize("score", module.SCORES)
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_experts_are_valid_whatever_the_logits(how: dict[str, int], score: Any) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[nan] * 8, [1.0, nan, 2.0, 3.0, 4.0, 0.0, -1.0, 5.0], [-inf, 0.0] * 4, [1e30, -1e30] * 4]
    logit = torch.tensor(rows, device=DEVICE)
    with torch.no_grad():
        found = router_topk(logit, None, 3, score=score, **how)
        wanted = router_topk_ref(logit, None, 3, score=score, **how)
    assert torch.equal(found.index_TK, wanted.index_TK)
    assert torch.equal(found.weight_TK.isnan(), wanted.weight_TK.isnan())


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_scores_alone_have_a_gradient_too() -> None:
    logit = randn(5, 12)
    for score in module.SCORES:
        found, wanted = (one(logit, None, 3, score=score, scores=True) for one in (router_topk, router_topk_ref))
        assert found.score_TE is not None
        assert wanted.score_TE is not None
        grads = [torch.autograd.grad(one.score_TE.square().sum(), logit)[0] for one in (found, wanted)]
        torch.testing.assert_close(*grads)


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_it_is_one_graph_for_the_compiler() -> None:
    logit, bias = randn(5, 12), torch.randn(12, device=DEVICE)
    assert_compiles(lambda logit: router_topk(logit, bias, 3, num_groups=4, top_groups=2).weight_TK, (logit,))
    torch.library.opcheck(module._forward_op, (logit, bias, 3, True, True, 2.0, 4, 2, True))
    torch.library.opcheck(module._forward_op, (logit, None, 3, False, False, 1.0, 1, 1, False))
    free, index = logit.detach(), torch.topk(logit, 3).indices
    torch.library.opcheck(module._backward_op, (free, index, free[:, :3].contiguous(), free, False, True, 2.0))

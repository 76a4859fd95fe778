"""The router: choice and gates against a plain loop, both losses against their papers, each counted exactly once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_ray.models.recompute import is_recomputing, recomputed
from deepseek_ray.models.router import Router

BALANCE, Z = 0.3, 0.2


def make(num_experts: int = 8, top_k: int = 3, **settings: Any) -> Router:
    torch.manual_seed(0)
    router = Router(6, num_experts, top_k, **settings).double()
    torch.nn.init.normal_(router.weight_ED)
    return router


def tokens(count: int = 12) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 6, dtype=torch.float64)


def plain_scores(router: Router, x_D: Tensor) -> list[float]:
    logits = [float(x_D @ row_D) for row_D in router.weight_ED.detach()]
    if router.score == "sigmoid":
        return [1 / (1 + math.exp(-logit)) for logit in logits]
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def plain_choice(router: Router, scores: list[float]) -> list[int]:
    """The K highest biased scores among the best groups; a group is worth its two best experts."""
    biased = [score + float(bias) for score, bias in zip(scores, router.bias_E, strict=True)]
    size = len(biased) // router.num_groups
    groups = [range(first, first + size) for first in range(0, len(biased), size)]
    groups.sort(key=lambda group: -sum(sorted(biased[e] for e in group)[-2:]))
    allowed = sorted(e for group in groups[: router.top_groups] for e in group)
    return sorted(allowed, key=lambda e: -biased[e])[: router.top_k]


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (2, 1), (8, 4)])
def test_choice_and_gates_equal_a_plain_loop(score: Any, normalise: bool, groups: tuple[int, int]) -> None:
    router = make(score=score, normalise=normalise, scale=2.5, num_groups=groups[0], top_groups=groups[1])
    router.bias_E.copy_(torch.linspace(-0.2, 0.2, 8)[torch.randperm(8)])
    for x_D, gate_K, expert_K in zip(tokens(), *router(tokens()), strict=True):
        scores = plain_scores(router, x_D)
        chosen = plain_choice(router, scores)
        share = sum(scores[e] for e in chosen) if normalise else 1.0
        assert expert_K.tolist() == chosen
        assert gate_K.tolist() == pytest.approx([2.5 * scores[e] / share for e in chosen])


def test_a_token_stays_in_its_groups_even_if_the_best_expert_is_elsewhere() -> None:
    router = make(top_k=2, num_groups=4, top_groups=1)
    score_TE = torch.tensor([[0.9, 0.0, 0.6, 0.5, 0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    assert router.choose(torch.logit(score_TE, eps=1e-9))[1].tolist() == [[2, 3]]  # 0.6 + 0.5 is more than 0.9 + 0.0


@given(groups=st.sampled_from([1, 2, 4]), top_groups=st.integers(1, 4), top_k=st.integers(1, 8))
@settings(deadline=None, max_examples=40)
def test_choices_differ_lie_in_few_groups_and_gates_sum_to_the_scale(groups: int, top_groups: int, top_k: int) -> None:
    top_groups = min(top_groups, groups)
    top_k = min(top_k, 8 // groups * top_groups)
    gate_TK, expert_TK = make(top_k=top_k, num_groups=groups, top_groups=top_groups, scale=1.5)(tokens())
    torch.testing.assert_close(gate_TK.sum(-1), torch.full((12,), 1.5, dtype=torch.float64))
    for chosen in expert_TK.tolist():
        assert len(set(chosen)) == top_k
        assert len({e // (8 // groups) for e in chosen}) <= top_groups


def test_half_precision_scores_are_those_of_float32() -> None:
    router, x_TD = make().bfloat16(), tokens(40).bfloat16()
    gate_TK, expert_TK = router(x_TD)
    wide_TK, wanted_TK = router.float()(x_TD.float())
    assert torch.equal(expert_TK, wanted_TK)
    assert gate_TK.dtype == torch.bfloat16
    assert torch.equal(gate_TK, wide_TK.bfloat16())


def plain_losses(router: Router, x_TD: Tensor, num_sequences: int) -> Tensor:
    """DeepSeek-V3, equations 17 to 20 (with f of the choices made), and ST-MoE, equation 5; for each token once."""
    total = x_TD.new_zeros(())
    for x_SD in x_TD.chunk(num_sequences):
        logit_SE = x_SD @ router.weight_ED.T
        score_SE = logit_SE.sigmoid() if router.score == "sigmoid" else logit_SE.softmax(-1)
        expert_SK = router.choose(logit_SE.detach()).index_TK
        length = len(x_SD)
        for e in range(router.num_experts):
            often = router.num_experts / (router.top_k * length) * int((expert_SK == e).sum())
            mean = sum(score_SE[s, e] / score_SE[s].sum() for s in range(length)) / length
            total = total + BALANCE * often * mean * length
        total = total + Z * sum(logit_SE[s].exp().sum().log() ** 2 for s in range(length))
    return total


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_losses_are_those_of_the_papers(score: Any) -> None:
    router, x_TD = make(score=score, balance_loss=BALANCE, z_loss=Z), tokens()
    logit_TE = x_TD @ router.weight_ED.T
    score_TE = logit_TE.sigmoid() if score == "sigmoid" else logit_TE.softmax(-1)
    expert_TK = router.choose(logit_TE).index_TK
    for num_sequences in (1, 3):
        got = router.losses(logit_TE, score_TE, expert_TK, num_sequences)
        torch.testing.assert_close(got, plain_losses(router, x_TD, num_sequences))


def test_even_use_costs_the_weight_once_a_token_and_one_sided_use_more() -> None:
    router = make(num_experts=4, top_k=1, balance_loss=1.0)
    logit_TE = torch.eye(4, dtype=torch.float64) * 20  # each token wants another expert
    even, one = torch.arange(4)[:, None], torch.zeros(4, 1, dtype=torch.int64)
    assert float(router.losses(logit_TE, logit_TE.softmax(-1), even, 1)) == pytest.approx(4.0)
    crowded_TE = logit_TE[:1].expand(4, 4)
    assert float(router.losses(crowded_TE, crowded_TE.softmax(-1), one, 1)) == pytest.approx(16.0, rel=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_of_the_losses_arrives_once(recompute: bool) -> None:
    router, x_TD = make(balance_loss=BALANCE, z_loss=Z), tokens().requires_grad_()
    leaves = (x_TD, router.weight_ED)

    def answer(x_TD: Tensor) -> Tensor:
        return router(x_TD, num_sequences=3)[0].square()

    main = torch.autograd.grad(answer(x_TD).sum(), leaves)
    losses = torch.autograd.grad(plain_losses(router, x_TD, 3) * 0.7, leaves)
    router.loss_weight = 0.7
    got = torch.autograd.grad((recomputed(answer, x_TD) if recompute else answer(x_TD)).sum(), leaves)
    torch.testing.assert_close(got, tuple(a + b for a, b in zip(main, losses, strict=True)))
    assert max(float(one.abs().max()) for one in losses) > 1e-3


def test_the_losses_leave_the_answer_alone_and_ignore_the_scale_of_what_follows() -> None:
    router = make(balance_loss=BALANCE, z_loss=Z)
    before_TK, _ = router(tokens(), num_sequences=3)
    router.loss_weight = 0.7
    after_TK, _ = router(tokens(), num_sequences=3)
    assert torch.equal(before_TK, after_TK)
    alone = torch.autograd.grad((after_TK * 0).sum(), router.weight_ED)
    torch.testing.assert_close(alone, torch.autograd.grad(plain_losses(router, tokens(), 3) * 0.7, router.weight_ED))


@pytest.mark.parametrize("why", ["weight 0", "evaluation", "no sequences"])
def test_nothing_is_added_without_weight_in_evaluation_and_without_sequences(why: str) -> None:
    router = make(balance_loss=BALANCE, z_loss=Z).train(why != "evaluation")
    router.loss_weight = 0.0 if why == "weight 0" else 0.7
    gate_TK, _ = router(tokens(), num_sequences=0 if why == "no sequences" else 3)
    (gradient,) = torch.autograd.grad((gate_TK * 0).sum(), router.weight_ED)
    assert gradient.abs().max() == 0


def test_recomputing_counts_no_token_twice() -> None:
    router, x_TD = make(), tokens().requires_grad_()
    seen: list[bool] = []

    def answer(x_TD: Tensor) -> Tensor:
        seen.append(is_recomputing())
        return router(x_TD)[0].square()

    recomputed(answer, x_TD).sum().backward()
    assert seen == [False, True]
    assert not is_recomputing()
    assert int(router.count_E.sum()) == 12 * 3


def test_no_gradient_reaches_the_bias_and_balance_keeps_its_mean_at_zero() -> None:
    router = make(num_experts=4, top_k=1)
    assert not router.bias_E.requires_grad
    router.count_E += 5
    router.balance(torch.tensor([40, 0, 4, 4]), rate=0.1)  # 12 each would be even
    shift = torch.tensor([-0.1, 0.1, 0.1 * 2 / 3, 0.1 * 2 / 3], dtype=torch.float64)
    torch.testing.assert_close(router.bias_E, shift - shift.mean())
    assert int(router.count_E.sum()) == 0

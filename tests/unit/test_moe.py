"""Experts: routing invariants, the grouped computation against a plain loop, balance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_ray.models.moe import MoE, grouped_matmul
from deepseek_ray.models.router import Router


def make_moe(num_shared: int = 1, dtype: torch.dtype = torch.float64) -> MoE:
    torch.manual_seed(0)
    return MoE(d_model=8, d_expert=6, router=Router(8, num_experts=4, top_k=2), num_shared=num_shared).to(dtype)


def plain(moe: MoE, x_TD: Tensor) -> Tensor:
    """One token and one expert at a time."""
    gate_TK, expert_TK = moe.router(x_TD)
    rows = []
    for x_D, gate_K, expert_K in zip(x_TD, gate_TK, expert_TK, strict=True):
        y_D = torch.zeros_like(x_D)
        for gate, expert in zip(gate_K, expert_K, strict=True):
            inner_I, value_I = (x_D @ moe.experts.up_ED2I[expert].flatten(1)).chunk(2)
            y_D = y_D + gate * (F.silu(inner_I) * value_I @ moe.experts.down_EID[expert])
        rows.append(y_D)
    y_TD = torch.stack(rows)
    return y_TD if moe.shared is None else y_TD + moe.shared(x_TD)


def test_gates_sum_to_one_and_choices_differ() -> None:
    gate_TK, expert_TK = make_moe().router(torch.randn(50, 8, dtype=torch.float64))
    torch.testing.assert_close(gate_TK.sum(-1), torch.ones(50, dtype=torch.float64))
    assert (expert_TK[:, 0] != expert_TK[:, 1]).all()


def test_ties_go_to_the_lower_expert() -> None:
    moe = make_moe()
    _, expert_TK = moe.router(torch.zeros(3, 8, dtype=torch.float64))
    assert expert_TK.tolist() == [[0, 1]] * 3


def test_forward_and_gradients_equal_a_plain_loop() -> None:
    for num_shared in (0, 2):
        moe = make_moe(num_shared)
        x_TD = torch.randn(30, 8, dtype=torch.float64)
        parameters = list(moe.parameters())
        wanted = torch.autograd.grad(plain(moe, x_TD).square().sum(), parameters)
        got = torch.autograd.grad(moe(x_TD).square().sum(), parameters)
        torch.testing.assert_close(moe(x_TD), plain(moe, x_TD))
        torch.testing.assert_close(got, wanted)


def test_an_expert_without_tokens_gets_a_zero_gradient_not_none() -> None:
    moe = make_moe()
    moe.router.bias_E[3] = -10.0
    moe(torch.randn(5, 8, dtype=torch.float64)).sum().backward()
    assert moe.experts.up_ED2I.grad is not None
    assert moe.experts.up_ED2I.grad[3].abs().sum() == 0
    assert moe.experts.up_ED2I.grad[0].abs().sum() > 0


def test_no_tokens_give_no_rows() -> None:
    moe = make_moe()
    assert moe(torch.empty(0, 8, dtype=torch.float64)).shape == (0, 8)
    with torch.no_grad():  # with experts spread over processes one may get no tokens in evaluation
        assert moe.eval()(torch.empty(0, 8, dtype=torch.float64)).shape == (0, 8)


def test_every_token_is_counted_top_k_times_in_training_only() -> None:
    moe = make_moe()
    moe(torch.randn(30, 8, dtype=torch.float64))
    assert int(moe.router.count_E.sum()) == 60
    moe.eval()
    moe(torch.randn(30, 8, dtype=torch.float64))
    assert int(moe.router.count_E.sum()) == 60


def test_balancing_spreads_a_skewed_load() -> None:
    moe = make_moe()
    moe.router.bias_E[0] = 0.5  # everything goes to expert 0 first
    x_TD = torch.randn(400, 8, dtype=torch.float64) * 3
    with torch.no_grad():
        for _ in range(300):
            moe(x_TD)
            moe.router.balance(moe.router.count_E, rate=0.01)
        moe(x_TD)
    share_E = moe.router.count_E / moe.router.count_E.sum()
    assert share_E.min() > 0.2
    assert share_E.max() < 0.3


def test_the_bias_changes_the_choice_but_not_the_gates() -> None:
    moe = make_moe()
    x_TD = torch.randn(5, 8, dtype=torch.float64)
    moe.router.bias_E[2] = 10.0
    gate_TK, expert_TK = moe.router(x_TD)
    score_TE = torch.sigmoid(x_TD @ moe.router.weight_ED.T)
    assert (expert_TK[:, 0] == 2).all()
    chosen = score_TE.gather(-1, expert_TK)
    torch.testing.assert_close(gate_TK, chosen / chosen.sum(-1, keepdim=True))


def test_grouped_matmul_equals_one_product_a_group() -> None:
    x_SD, w_EDI = torch.randn(7, 4), torch.randn(3, 4, 5)
    got = grouped_matmul(x_SD, w_EDI, torch.tensor([2, 0, 5]))
    torch.testing.assert_close(got, torch.cat([x_SD[:2] @ w_EDI[0], x_SD[2:] @ w_EDI[2]]))


def test_a_few_tokens_take_the_short_way_to_the_same_answer() -> None:
    for num_shared in (0, 1):
        moe = make_moe(num_shared).eval()
        for num_tokens in (0, 1, 8, 9):  # 8 tokens are the last to take it
            x_TD = torch.randn(num_tokens, 8, dtype=torch.float64)
            with torch.no_grad():
                torch.testing.assert_close(moe(x_TD), plain(moe, x_TD) if num_tokens else x_TD, rtol=1e-12, atol=1e-14)

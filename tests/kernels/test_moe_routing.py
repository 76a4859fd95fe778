"""Rows sorted by expert: the kernels against a sort, for every kind of routing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_ray.kernels import moe_routing
from tests.kernels.checks import DEVICE, guarded, needs_kernels


def check(expert_TK: Tensor, num_experts: int, block_rows: int) -> None:
    found = moe_routing.route(expert_TK, num_experts, block_rows)
    wanted = moe_routing.route_ref(expert_TK, num_experts, block_rows)
    kept = int(wanted.offset_E[-1])
    assert torch.equal(found.offset_E, wanted.offset_E)
    assert torch.equal(found.pair_S[:kept], wanted.pair_S[:kept])
    assert torch.equal(found.row_S, wanted.row_S)
    assert torch.equal(found.tile_N2, wanted.tile_N2)


def test_the_reference_sorts_pairs_and_cuts_tiles() -> None:
    found = moe_routing.route_ref(torch.tensor([[2, 0], [2, -1], [0, 2]]), num_experts=3, block_rows=2)
    assert found.offset_E.tolist() == [0, 2, 2, 5]
    assert found.pair_S.tolist() == [1, 4, 0, 2, 5, -1]
    assert found.row_S.tolist() == [2, 0, 3, -1, 1, 4]
    assert found.tile_N2.tolist() == [[0, 0], [2, 2], [2, 4], [-1, -1]]


@needs_kernels
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_several_blocks_of_pairs_and_of_experts(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    expert_TK = torch.randint(0, 150, (150, 4), device=DEVICE, dtype=kind)
    with guarded(monkeypatch):
        check(expert_TK, 150, block_rows=16)


@needs_kernels
def test_more_blocks_than_one_sum_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_routing, "_scan_block", lambda num_blocks: 4)
    torch.manual_seed(0)
    check(torch.randint(0, 3, (300, 4), device=DEVICE), 3, block_rows=128)


@needs_kernels
def test_numbers_of_no_expert_are_dropped() -> None:
    check(torch.tensor([[-1, 0, 5], [2**32, -(2**40), 4]], device=DEVICE), 5, block_rows=16)
    check(torch.full((7, 2), -1, device=DEVICE), 5, block_rows=16)


@needs_kernels
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 90),
    top_k=st.integers(1, 5),
    experts=st.integers(1, 70),
    block_rows=st.sampled_from([16, 64, 128]),
    skew=st.floats(0.2, 3.0),
    seed=st.integers(0, 99),
)
def test_any_routing(tokens: int, top_k: int, experts: int, block_rows: int, skew: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(tokens, top_k, generator=generator) ** skew * (experts + 1)).long() - 1
    check(chosen.to(DEVICE), experts, block_rows)

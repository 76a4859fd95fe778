"""Rotary positions: the reference against the model's own and against complex numbers, the kernel against it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_ray.kernels import rope as module
from deepseek_ray.kernels.rope import rope, rope_ref
from deepseek_ray.models.attention import rotary_waves
from tests.kernels.checks import DEVICE, needs_kernels
from tests.kernels.rowwise import assert_compiles, assert_equals_reference, randn, with_kernels  # noqa: F401


def waves(length: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return rotary_waves(length, width, 10_000.0, torch.empty(0, dtype=dtype, device=DEVICE))


def on(wave: Tensor, position: Tensor | None = None) -> tuple[Callable[..., object], Callable[..., object]]:
    """The op and its reference as functions of query and key alone."""
    wide = wave.double()
    return lambda q, k: rope(q, k, wave, position), lambda q, k: rope_ref(q, k, wide, position)


def test_the_reference_is_a_product_of_complex_numbers_at_each_position() -> None:
    query, wave = torch.randn(2, 3, 5, 8).double(), waves(30, 8, torch.float64).cpu()
    for position in (torch.tensor([[4, 0, 29, 7, 7], [1, 2, 3, 4, 5]]), torch.tensor([9, 8, 2, 2, 0])):
        found = rope_ref(query, query, wave, position)[0]
        pairs = torch.complex(*query.chunk(2, dim=-1))
        rate = 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        turns = torch.exp(1j * position.expand(2, 5)[:, None, :, None] * rate)
        torch.testing.assert_close(torch.complex(*found.chunk(2, dim=-1)), pairs * turns)


def test_the_reference_passes_gradcheck() -> None:
    query, key = torch.randn(2, 2, 3, 4, dtype=torch.float64), torch.randn(2, 1, 3, 4, dtype=torch.float64)
    wave = waves(3, 4, torch.float64).cpu()
    assert torch.autograd.gradcheck(lambda q, k: rope_ref(q, k, wave), (query.requires_grad_(), key.requires_grad_()))


ONES, TABLE, PLACES = torch.ones(2, 4, 3, 8), torch.ones(5, 4, 2), torch.arange(3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((ONES[..., :7], ONES, TABLE), "query has shape .* with an even P"),
        ((ONES, ONES[:, :, :2], TABLE), r"key is \(2, 4, 2, 8\) .* must be \(2, G, 3, 8\)"),
        ((ONES, ONES.half(), TABLE), "key is .*float16: it must be .*float32, like query"),
        ((ONES, ONES, TABLE[:, :3]), r"wave has shape \(5, 3, 2\): it must be \(L, 4, 2\)"),
        ((ONES, ONES, TABLE.clone().requires_grad_()), "without a gradient"),
        ((ONES, ONES, TABLE[:2]), "wave has 2 rows for 3 positions"),
        ((ONES, ONES, TABLE, PLACES[:2]), r"position has shape \(2,\): it must be \(3,\) or \(2, 3\)"),
        ((ONES, ONES, TABLE, PLACES.float()), "make it int32 or int64 on cpu"),
        ((ONES, ONES, TABLE.to("meta")), "wave is on meta, query on cpu"),
    ],
)
def test_what_does_not_fit_is_named(inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope(*inputs)


def test_nothing_turns_without_positions_and_shapes_are_known_without_data() -> None:
    assert rope(ONES[:, :, :0], ONES[:, :, :0], TABLE)[0].shape == (2, 4, 0, 8)
    assert rope(*(one.to("meta") for one in (ONES, ONES[:, :2], TABLE)))[1].shape == (2, 2, 3, 8)


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(2, 4, 1, 9, 16), (1, 1, 1, 1, 2), (1, 40, 8, 3, 6), (1, 3, 3, 70, 128)])
def test_the_kernel_equals_the_reference(
    sizes: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    batch, heads, key_heads, length, width = sizes
    query, key = randn(batch, heads, length, width, dtype=dtype), randn(batch, key_heads, length, width, dtype=dtype)
    assert_equals_reference(monkeypatch, *on(waves(length + 3, width)), (query, key))
    for shape in ((length,), (batch, length)):
        position = torch.randint(0, 50, shape, device=DEVICE)
        assert_equals_reference(monkeypatch, *on(waves(50, width), position), (query, key))


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 9), key_heads=st.integers(1, 3), length=st.integers(0, 20),
    pairs=st.integers(1, 20),
)  # fmt: skip
@settings(deadline=None, derandomize=True, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(
    batch: int, heads: int, key_heads: int, length: int, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = randn(batch, length, heads, 2 * pairs), randn(batch, key_heads, length, 2 * pairs)
    assert_equals_reference(monkeypatch, *on(waves(20, 2 * pairs)), (query.transpose(1, 2), key))


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_transposed_heads_keep_their_layout() -> None:
    query, key = randn(2, 5, 4, 8).transpose(1, 2), randn(2, 5, 2, 8).transpose(1, 2)
    turned = rope(query, key, waves(5, 8))
    assert turned[0].stride() == query.stride()
    assert turned[1].stride() == key.stride()


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_positions_of_a_column_or_of_a_broadcast_row_are_read_right(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = randn(2, 2, 4, 8), randn(2, 1, 4, 8)
    table = torch.randint(0, 30, (4, 2), device=DEVICE)
    for position in (table.T, table[:, 0], table[:, 1].expand(2, 4), table[:, 0].to(torch.int32)):
        assert_equals_reference(monkeypatch, *on(waves(30, 8), position), (query, key))


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_it_is_one_graph_for_the_compiler() -> None:
    query, key, wave = randn(1, 2, 3, 4), randn(1, 1, 3, 4), waves(3, 4)
    assert_compiles(on(wave)[0], (query, key))
    torch.library.opcheck(module._op, (query, key, wave, None, False))
    torch.library.opcheck(module._op, (query, key, wave, torch.tensor([2, 0, 1], device=DEVICE), True))

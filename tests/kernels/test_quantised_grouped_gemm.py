"""Quantised grouped product: formats against their definition, the kernel against a loop over rows, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_ray.kernels import dispatch
from deepseek_ray.kernels import quantised_grouped_gemm as op
from deepseek_ray.kernels.quantised_grouped_gemm import (
    QuantisedWeight,
    dequantise,
    quantise_int4,
    quantise_int8,
    quantised_grouped_gemm,
    quantised_grouped_gemm_ref,
)
from tests.kernels.checks import DEVICE, assert_near, guarded, needs_kernels


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    dispatch.choice.cache_clear()
    yield
    dispatch.choice.cache_clear()


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def offsets(*sizes: int) -> Tensor:
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)


def quantise(weight_EDN: Tensor, kind: str) -> QuantisedWeight:
    bits, group = kind.removesuffix("z").split("/")
    if bits == "8":
        return quantise_int8(weight_EDN, None if group == "D" else int(group))
    return quantise_int4(weight_EDN, int(group), zero_points=kind.endswith("z"))


KINDS = ("8/D", "8/32", "8/128", "4/32", "4/64z", "4/128", "4/128z")


def plain(x_RD: Tensor, weight: QuantisedWeight, offsets_E1: Tensor) -> Tensor:
    """Row by row, in float64."""
    y_RN = torch.zeros(len(x_RD), weight.shape[2], dtype=torch.float64, device=x_RD.device)
    for expert, weight_DN in enumerate(dequantise(weight, torch.float64)):
        for row in range(int(offsets_E1[expert]), int(offsets_E1[expert + 1])):
            y_RN[row] = (x_RD[row].double()[:, None] * weight_DN).sum(0)
    return y_RN.to(x_RD.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_off_by_half_a_step_at_most(kind: str) -> None:
    weight_EDN = floats(2, 256, 9) + (0.7 if kind.endswith("z") else 0.0)
    weight = quantise(weight_EDN, kind)
    assert weight.shape == weight_EDN.shape
    off = (dequantise(weight) - weight_EDN).unflatten(1, (-1, weight.group)).abs().amax(2)
    allowed = 1.01 if kind.endswith("z") else 0.501  # with zero points, the zero is rounded too
    assert bool((off <= allowed * weight.scale_EGN).all())


def test_bytes_mean_what_the_format_says() -> None:
    """A group of 32: byte j holds row j low and row j + 16 high; levels are counted from 8."""
    weight_EDN = torch.zeros(1, 32, 1)
    weight_EDN[0, 0], weight_EDN[0, 16], weight_EDN[0, 31] = 7.0, -3.0, 1.0
    weight = quantise_int4(weight_EDN, 32)
    assert weight.data_EQN.flatten().tolist() == [15 + 16 * 5, *[8 + 16 * 8] * 14, 8 + 16 * 9]
    assert weight.scale_EGN.flatten().tolist() == [1.0]
    assert quantise_int8(weight_EDN).data_EQN.flatten().tolist()[:17] == [127, *[0] * 15, -54]


def test_four_bits_are_half_a_byte() -> None:
    weight = quantise_int4(floats(3, 128, 10), 64)
    assert weight.data_EQN.shape == (3, 64, 10)
    assert weight.data_EQN.dtype == torch.uint8
    assert weight.scale_EGN.shape == (3, 2, 10)


def test_zero_points_serve_weights_of_one_sign() -> None:
    weight_EDN = floats(1, 128, 8).abs()
    errors = [
        float((dequantise(quantise_int4(weight_EDN, 32, zero_points=zeros)) - weight_EDN).square().mean())
        for zeros in (True, False)
    ]
    assert errors[0] < 0.4 * errors[1]


@pytest.mark.parametrize("kind", ["8/D", "4/32", "4/32z"])
def test_zero_weights_stay_zero(kind: str) -> None:
    assert not dequantise(quantise(torch.zeros(1, 32, 4), kind)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_equals_a_loop(kind: str) -> None:
    x_RD, weight, offsets_E1 = floats(7, 128), quantise(floats(4, 128, 5), kind), offsets(2, 0, 4, 0)
    assert_near(quantised_grouped_gemm_ref(x_RD, weight, offsets_E1), plain(x_RD, weight, offsets_E1), 1e-6)


def test_the_references_gradient_of_x() -> None:
    weight = quantise_int4(floats(2, 32, 3, dtype=torch.float64), 32)
    x_RD = floats(4, 32, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: quantised_grouped_gemm_ref(x, weight, offsets(1, 2)), (x_RD,))


@needs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_equals_a_loop(
    kind: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty experts, one with more rows than a tile, and a row that is no expert's."""
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    weight = quantise(floats(5, 256, 70, dtype=dtype), kind)
    x_RD, offsets_E1 = floats(25, 256, dtype=dtype), offsets(0, 18, 0, 1, 5)
    with guarded(monkeypatch):
        found = quantised_grouped_gemm(x_RD, weight, offsets_E1)
    assert_near(found, plain(x_RD, weight, offsets_E1), tolerance)
    assert not found[24:].any()


@needs_kernels
@pytest.mark.parametrize("rows", [1, 33, 65, 200])
def test_the_kernel_equals_a_loop_at_every_size_of_tile(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    weight, x_RD, offsets_E1 = quantise_int4(floats(1, 128, 40)), floats(rows, 128), offsets(rows)
    with guarded(monkeypatch):
        found = quantised_grouped_gemm(x_RD, weight, offsets_E1)
    assert_near(found, plain(x_RD, weight, offsets_E1), 1e-5)


@needs_kernels
@settings(max_examples=8, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=5), width=st.integers(1, 90), outputs=st.integers(1, 70))
def test_the_kernel_equals_a_loop_at_any_shape(sizes: list[int], width: int, outputs: int) -> None:
    weight, x_RD = quantise_int8(floats(len(sizes), width, outputs)), floats(sum(sizes), width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(dispatch.VARIABLE, "triton")
        found = quantised_grouped_gemm(x_RD, weight, offsets(*sizes))
    assert_near(found, plain(x_RD, weight, offsets(*sizes)), 1e-5)


@needs_kernels
def test_extreme_weights_keep_their_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups whose scales are twelve orders of magnitude apart, and the largest and smallest levels."""
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    weight_EDN = floats(1, 128, 16)
    weight_EDN[:, :64] *= 1e-6
    weight_EDN[:, 64:] *= 1e6
    weight = quantise_int4(weight_EDN, 64, zero_points=True)
    x_RD = torch.cat([floats(1, 64).repeat(2, 1), torch.zeros(2, 64, device=DEVICE)], 1)
    x_RD[1, 64:] = 1
    assert_near(quantised_grouped_gemm(x_RD[:1], weight, offsets(1)), plain(x_RD[:1], weight, offsets(1)), 1e-5)
    assert_near(quantised_grouped_gemm(x_RD, weight, offsets(2)), plain(x_RD, weight, offsets(2)), 1e-5)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_kernels)])
def test_no_rows_and_no_experts_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    weight = quantise_int8(floats(2, 8, 4))
    assert quantised_grouped_gemm(floats(0, 8), weight, offsets(0, 0)).shape == (0, 4)
    assert not quantised_grouped_gemm(floats(3, 8), weight, offsets(0, 0)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_plain_torch_serves_where_there_is_no_gpu(kind: str) -> None:
    x_RD, weight, offsets_E1 = floats(6, 128), quantise(floats(3, 128, 5), kind), offsets(2, 0, 3)
    assert_near(quantised_grouped_gemm(x_RD, weight, offsets_E1), plain(x_RD, weight, offsets_E1), 1e-5)


def test_it_is_a_torch_operation_without_a_gradient() -> None:
    x_RD, weight, offsets_E1 = floats(6, 32), quantise_int4(floats(3, 32, 5), 32), offsets(2, 0, 3)
    inputs = (x_RD, weight.data_EQN, weight.scale_EGN, weight.zero_EGN, offsets_E1, weight.group)
    torch.library.opcheck(torch.ops.deepseek_ray.quantised_grouped_gemm, inputs)
    compiled = torch.compile(quantised_grouped_gemm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x_RD, weight, offsets_E1), quantised_grouped_gemm(x_RD, weight, offsets_E1))
    assert quantised_grouped_gemm(x_RD.to("meta"), weight.to("meta"), offsets_E1.to("meta")).shape == (6, 5)
    y_RN = quantised_grouped_gemm(x_RD.requires_grad_(), weight, offsets_E1)
    with pytest.raises(NotImplementedError, match="has no backward pass"):
        y_RN.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_RD": torch.ones(3, 8)}, r"x must be \(rows, 32\)"),
        ({"x_RD": torch.ones(3, 32, dtype=torch.int32)}, "cast it to a float"),
        ({"offsets_E1": torch.zeros(2, dtype=torch.int32)}, r"must be torch.int32 \(3,\)"),
        ({"offsets_E1": torch.zeros(3)}, r"offsets is torch.float32"),
        ({"offsets_E1": torch.zeros(3, dtype=torch.int32, device="meta")}, "one device"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    given_ = {"x_RD": torch.ones(3, 32), "weight": quantise_int8(torch.ones(2, 32, 4))}
    given_["offsets_E1"] = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        quantised_grouped_gemm(**{**given_, **change})  # type: ignore[arg-type]


def test_weights_that_cannot_be_quantised_are_named() -> None:
    with pytest.raises(ValueError, match="group = 48 must be one of 32, 64, 128"):
        quantise_int4(torch.ones(1, 96, 4), 48)
    with pytest.raises(ValueError, match="divide the width 96: pad"):
        quantise_int8(torch.ones(1, 96, 4), 64)
    with pytest.raises(ValueError, match="must be float"):
        quantise_int8(torch.ones(1, 96, 4, dtype=torch.int8))


def test_candidates_are_distinct_and_legal() -> None:
    for rows in (1, 64, 5000):
        found = op.candidates(rows)
        assert len({tuple(one.items()) for one in found}) == len(found)
        assert all(one["BLOCK_R"] in op._ROW_TILES for one in found)

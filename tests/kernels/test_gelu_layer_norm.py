"""GELU and layer norm in one: the reference against torch's two and gradcheck, the kernels against the reference."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_ray.kernels import gelu_layer_norm as module
from deepseek_ray.kernels.gelu_layer_norm import EPS, gelu_layer_norm, gelu_layer_norm_ref
from deepseek_ray.kernels.rows import MAX_WIDTH
from tests.kernels.checks import DEVICE, needs_kernels
from tests.kernels.rowwise import assert_compiles, assert_equals_reference, randn, with_kernels  # noqa: F401

Form = Literal["none", "tanh"]
each_form = pytest.mark.parametrize("form", ["none", "tanh"])


@each_form
def test_the_reference_is_layer_norm_of_gelu(form: Form) -> None:
    x, w, b = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 9), (9,), (9,)))
    wanted = F.layer_norm(F.gelu(x, approximate=form), (9,), w, b, EPS)
    torch.testing.assert_close(gelu_layer_norm_ref(x, w, b, approximate=form), wanted)
    torch.testing.assert_close(gelu_layer_norm(x, w, b, approximate=form), wanted)


@each_form
def test_the_reference_passes_gradcheck(form: Form) -> None:
    x, w, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (5,), (5,)))
    assert torch.autograd.gradcheck(partial(gelu_layer_norm_ref, approximate=form), (x, w, b))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_N": torch.ones(4)}, r"weight has shape \(4,\), x has \(2, 8\)"),
        ({"bias_N": torch.ones(8, 1)}, r"bias has shape \(8, 1\)"),
        ({"approximate": "erf"}, "approximate = 'erf' must be one of none, tanh"),
        ({"bias_N": torch.ones(8, dtype=torch.int64)}, "bias has type .*int64: convert it"),
        ({"bias_N": torch.ones(8, device="meta")}, "bias is on meta, x on cpu"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    fits = {"x": torch.ones(2, 8), "weight_N": torch.ones(8), "bias_N": torch.ones(8)}
    with pytest.raises(ValueError, match=message):
        gelu_layer_norm(**(fits | change))


def test_no_rows_and_no_data_are_fine() -> None:
    ones = torch.ones(8)
    assert gelu_layer_norm(torch.ones(0, 8), ones, ones).shape == (0, 8)
    assert gelu_layer_norm(torch.ones(3, 8).to("meta"), ones.to("meta"), ones.to("meta")).shape == (3, 8)


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
@each_form
@pytest.mark.parametrize("shape", [(300, 64), (5, 3, 48), (1, 3), (7, 1000), (2, MAX_WIDTH), (1, MAX_WIDTH + 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_equal_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    inputs = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype), randn(shape[-1], dtype=dtype)
    op, reference = (partial(one, approximate=form) for one in (gelu_layer_norm, gelu_layer_norm_ref))
    assert_equals_reference(monkeypatch, op, reference, inputs)


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
@each_form
@given(rows=st.integers(0, 40), width=st.integers(4, 300), scale=st.sampled_from([0.1, 1.0, 100.0]))
@settings(deadline=None, derandomize=True, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(form: Form, rows: int, width: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = randn(rows, width, scale=scale), randn(width), randn(width)
    op, reference = (partial(one, approximate=form) for one in (gelu_layer_norm, gelu_layer_norm_ref))
    assert_equals_reference(monkeypatch, op, reference, inputs, tolerance=3e-5)


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_rows_of_several_programs_add_up_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "programs", lambda *_: 3)  # each then takes three tiles of rows, the last none
    inputs = randn(100, 64), randn(64), randn(64)
    assert_equals_reference(monkeypatch, gelu_layer_norm, gelu_layer_norm_ref, inputs)
    first, second = (torch.autograd.grad(gelu_layer_norm(*inputs).square().sum(), inputs) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
@each_form
def test_far_tails_stay_finite(form: Form) -> None:
    x = torch.tensor([[-3e4, -40.0, -6.0, 0.0, 6.0, 40.0]], device=DEVICE, requires_grad=True)
    y = gelu_layer_norm(x, torch.ones(6, device=DEVICE), torch.zeros(6, device=DEVICE), approximate=form)
    assert bool(y.isfinite().all())
    assert bool(torch.autograd.grad(y.square().sum(), x)[0].isfinite().all())


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_it_is_one_graph_for_the_compiler() -> None:
    x, w, b = randn(4, 8), randn(8), randn(8)
    assert_compiles(gelu_layer_norm, (x, w, b))
    torch.library.opcheck(module._forward_op, (x, w, b, EPS, True))
    rows = torch.rand(4, device=DEVICE)
    torch.library.opcheck(module._backward_op, (x.detach(), w.detach(), rows, rows, torch.rand_like(x), False))

"""SwiGLU: the reference against its definition and gradcheck, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_ray.kernels import swiglu as module
from deepseek_ray.kernels.swiglu import swiglu, swiglu_ref
from tests.kernels.checks import needs_kernels
from tests.kernels.rowwise import assert_compiles, assert_equals_reference, randn, with_kernels  # noqa: F401


def test_the_reference_is_silu_times_up() -> None:
    x = torch.randn(3, 5, 14, dtype=torch.float64)
    gate, up = x[..., :7], x[..., 7:]
    torch.testing.assert_close(swiglu_ref(x), F.silu(gate) * up)
    torch.testing.assert_close(swiglu(x), swiglu_ref(x))
    assert torch.autograd.gradcheck(swiglu_ref, x.requires_grad_())


def test_an_odd_or_whole_number_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(4, 7\).*two halves"):
        swiglu(torch.ones(4, 7))
    with pytest.raises(ValueError, match=r"x has type .*int64"):
        swiglu(torch.ones(4, 8, dtype=torch.int64))


def test_nothing_is_needed_for_no_rows_or_no_data() -> None:
    assert swiglu(torch.ones(0, 8)).shape == (0, 4)
    assert swiglu(torch.ones(3, 0)).shape == (3, 0)
    assert swiglu(torch.ones(3, 8, device="meta")).shape == (3, 4)


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("shape", [(33, 96), (2, 3, 2), (1, 2050), (9, 4098)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_equal_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    assert_equals_reference(monkeypatch, swiglu, swiglu_ref, (randn(*shape, dtype=dtype),))


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
@given(rows=st.integers(0, 40), half=st.integers(1, 150), scale=st.sampled_from([1e-3, 1.0, 30.0]))
@settings(deadline=None, derandomize=True, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(rows: int, half: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_equals_reference(monkeypatch, swiglu, swiglu_ref, (randn(rows, 2 * half, scale=scale),))


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_a_closed_gate_gives_nothing_and_no_nan() -> None:
    x = torch.tensor([[-1e4, 1e4, 3.0, 3.0]], requires_grad=True, device=randn(1).device)
    y = swiglu(x)
    assert y.tolist() == [[0.0, 3e4]]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[0.0, 3.0, 0.0, 1e4]]


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_it_is_one_graph_for_the_compiler() -> None:
    x = randn(4, 8)
    assert_compiles(swiglu, (x,))
    torch.library.opcheck(module._forward_op, (x,))
    torch.library.opcheck(module._backward_op, (x.detach(), torch.rand_like(x)[:, :4].contiguous()))

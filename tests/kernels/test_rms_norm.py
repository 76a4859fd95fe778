"""RMS norm: the reference against its definition and gradcheck, the kernels against the reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_ray.kernels import rms_norm as module
from deepseek_ray.kernels import tuning
from deepseek_ray.kernels.rms_norm import EPS, rms_norm, rms_norm_ref
from deepseek_ray.kernels.rows import MAX_WIDTH, backward_tile, candidates
from tests.kernels.checks import DEVICE, needs_kernels
from tests.kernels.rowwise import assert_compiles, assert_equals_reference, randn, with_kernels  # noqa: F401

SHAPES = [(300, 64), (5, 3, 48), (1, 2), (7, 1000), (3, MAX_WIDTH), (2, MAX_WIDTH + 1)]


def with_residual(x: Tensor, weight_N: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm(x, weight_N, EPS, residual)


def with_residual_ref(x: Tensor, weight_N: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm_ref(x, weight_N, EPS, residual)


def test_the_reference_is_torchs_own() -> None:
    x, w, residual = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 32), (32,), (7, 32)))
    torch.testing.assert_close(rms_norm_ref(x, w), F.rms_norm(x, (32,), w, EPS))
    y, h = rms_norm_ref(x, w, EPS, residual)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, rms_norm_ref(h, w))


def test_the_reference_passes_gradcheck() -> None:
    x, residual = (torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm_ref, (x, w))
    assert torch.autograd.gradcheck(with_residual_ref, (x, w, residual))


def test_half_precision_is_computed_in_float32() -> None:
    x = torch.full((2, 64), 300.0, dtype=torch.float16)  # its square is not a float16
    torch.testing.assert_close(rms_norm(x, torch.ones(64, dtype=torch.float16)), torch.ones_like(x))


def test_the_public_function_is_the_reference_without_an_accelerator() -> None:
    x, w = torch.randn(4, 8), torch.randn(8)
    assert torch.equal(rms_norm(x, w), rms_norm_ref(x, w))
    assert rms_norm(torch.empty(0, 8), w).shape == (0, 8)
    assert rms_norm(x.to("meta"), w.to("meta")).shape == (4, 8)


@pytest.mark.parametrize(
    ("x", "weight", "residual", "message"),
    [
        (torch.ones(4, 8), torch.ones(4), None, r"weight has shape \(4,\), x has \(4, 8\)"),
        (torch.ones(()), torch.ones(()), None, "must match"),
        (torch.ones(4, 8), torch.ones(8), torch.ones(4, 1), r"residual is \(4, 1\) .* they must match"),
        (torch.ones(4, 8), torch.ones(8), torch.ones(4, 8).half(), "float16.* they must match"),
        (torch.ones(4, 8, dtype=torch.int32), torch.ones(8), None, "x has type torch.int32: convert it"),
        (torch.ones(4, 8), torch.ones(8, device="meta"), None, "weight is on meta, x on cpu: move one"),
    ],
)
def test_what_does_not_fit_is_named(x: Tensor, weight: Tensor, residual: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, EPS, residual)


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_equal_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, w, residual = (randn(*size, dtype=dtype) for size in (shape, shape[-1:], shape))
    assert_equals_reference(monkeypatch, rms_norm, rms_norm_ref, (x, w))
    # In half precision the sum is rounded before it is normalised, in float64 it is not.
    slack = 4e-3 if dtype == torch.float16 else None
    assert_equals_reference(monkeypatch, with_residual, with_residual_ref, (x, w, residual), slack)


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
@given(rows=st.integers(0, 40), width=st.integers(3, 300), scale=st.sampled_from([1e-4, 1.0, 1e4]))
@settings(deadline=None, derandomize=True, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(rows: int, width: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_equals_reference(monkeypatch, rms_norm, rms_norm_ref, (randn(rows, width, scale=scale), randn(width)))


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_a_row_of_one_is_its_sign() -> None:
    x, w = randn(1, 1), randn(1)
    y = rms_norm(x, w)
    torch.testing.assert_close(y, x.sign() * w)
    assert float(torch.autograd.grad(y.sum(), x)[0].abs()) < 1e-5


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_rows_of_several_programs_add_up_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "programs", lambda *_: 3)  # each then takes three tiles of rows, the last none
    x, w = randn(100, 64), randn(64)
    assert_equals_reference(monkeypatch, rms_norm, rms_norm_ref, (x, w))
    first, second = (torch.autograd.grad(rms_norm(x, w).square().sum(), (x, w)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_tuned_tiles_give_the_same_norm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "table.json"))
    tuning._table.cache_clear()
    left = iter(range(99, 0, -1))  # the last one measured is the fastest
    monkeypatch.setattr(module.triton.testing, "do_bench", lambda launch, **_: launch() and next(left))
    x, w = randn(20, 300), randn(300)
    chosen = module.tune_rms_norm(x.detach(), w.detach())
    assert chosen == (candidates(300)[-1], candidates(300)[-1])
    assert module._backward_settings(x.dtype, 300) == chosen[1] != backward_tile(300)
    assert_equals_reference(monkeypatch, rms_norm, rms_norm_ref, (x, w))
    tuning._table.cache_clear()


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_transposed_heads_keep_their_layout_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = randn(2, 5, 3, 16).transpose(1, 2), randn(16)
    assert_equals_reference(monkeypatch, rms_norm, rms_norm_ref, (x, w))
    assert rms_norm(x, w).stride() == x.stride()
    seen = []
    monkeypatch.setattr(module, "_forward_op", lambda x_MN, *_: seen.append(x_MN) or (x_MN, x_MN, x_MN))
    rms_norm(x, w)
    assert seen[0].data_ptr() == x.data_ptr()


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_either_output_may_be_all_that_is_used() -> None:
    x, w, residual = randn(4, 8), randn(8), randn(4, 8)
    y, h = with_residual(x, w, residual)
    assert torch.equal(torch.autograd.grad(h.sum(), residual, retain_graph=True)[0], torch.ones_like(x))
    found = torch.autograd.grad(y.square().sum(), x)[0]
    wanted = torch.autograd.grad(with_residual_ref(x, w, residual)[0].square().sum(), x)[0]
    torch.testing.assert_close(found, wanted)


@needs_kernels
@pytest.mark.usefixtures("with_kernels")
def test_it_is_one_graph_for_the_compiler() -> None:
    x, w, residual = randn(4, 8), randn(8), randn(4, 8)
    assert_compiles(rms_norm, (x, w))
    assert_compiles(with_residual, (x, w, residual))
    torch.library.opcheck(module._forward_op, (x, w, EPS, residual))
    torch.library.opcheck(module._forward_op, (x, w, EPS, None))
    rstd_M, free = torch.rand(4, device=DEVICE), [one.detach() for one in (x, w)]
    torch.library.opcheck(module._backward_op, (*free, rstd_M, free[0], None))


def test_it_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\nimport torch\nfrom deepseek_ray.kernels.rms_norm import rms_norm\n"
    )
    code += "print(rms_norm(torch.ones(1, 2), torch.ones(2)).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "0.99" in done.stdout or "1.0" in done.stdout

"""RMS norm: the reference against its definition and gradcheck, the Triton kernels against the reference."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from deepseek_ray.kernels.rms_norm import rms_norm, rms_norm_ref

INTERPRETED = """
import torch
from deepseek_ray.kernels.rms_norm import RMSNormFunction, rms_norm_ref
torch.manual_seed(0)
for shape, dtype, tolerance in (((300, 64), torch.float32, 1e-5), ((5, 3, 48), torch.float32, 1e-5),
                                ((1, 1), torch.float32, 1e-5), ((70, 100), torch.float16, 5e-3)):
    x = torch.randn(shape).to(dtype).requires_grad_()
    w = torch.randn(shape[-1]).to(dtype).requires_grad_()
    dy = torch.randn(shape).to(dtype)
    wanted = torch.autograd.grad(rms_norm_ref(x, w), (x, w), dy)
    y = RMSNormFunction.apply(x, w, 1e-6)
    got = torch.autograd.grad(y, (x, w), dy)
    torch.testing.assert_close(y, rms_norm_ref(x, w), rtol=tolerance, atol=tolerance)
    for one, other in zip(got, wanted):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * shape[0] ** 0.5)
print("equal")
"""


def test_the_reference_scales_rows_to_unit_mean_square() -> None:
    x = torch.randn(7, 32, dtype=torch.float64)
    y = rms_norm_ref(x, torch.ones(32, dtype=torch.float64), eps=0.0)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(rms_norm_ref(3 * x, torch.ones(32, dtype=torch.float64), eps=0.0), y)


def test_the_reference_passes_gradcheck() -> None:
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm_ref, (x, w))


def test_half_precision_is_computed_in_float32() -> None:
    x = torch.full((2, 64), 300.0, dtype=torch.float16)  # its square is not a float16
    torch.testing.assert_close(rms_norm(x, torch.ones(64, dtype=torch.float16)), torch.ones_like(x))


def test_the_public_function_is_the_reference_without_an_accelerator() -> None:
    x, w = torch.randn(4, 8), torch.randn(8)
    assert torch.equal(rms_norm(x, w), rms_norm_ref(x, w))
    assert rms_norm(torch.empty(0, 8), w).shape == (0, 8)


def test_a_weight_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="must match"):
        rms_norm(torch.randn(4, 8), torch.randn(4))


def test_the_kernels_equal_the_reference_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when triton is imported: hence a fresh process
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_it_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\nimport torch\nfrom deepseek_ray.kernels.rms_norm import rms_norm\n"
    )
    code += "print(rms_norm(torch.ones(1, 2), torch.ones(2)).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "0.99" in done.stdout or "1.0" in done.stdout

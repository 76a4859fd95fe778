"""Triton or torch: chosen once, overridable, never silently."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deepseek_ray import doctor
from deepseek_ray.kernels import dispatch


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    dispatch.choice.cache_clear()
    yield
    dispatch.choice.cache_clear()


def test_torch_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert dispatch.choice().backend == "torch"
    assert not dispatch.use_triton(torch.ones(2))


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="'cuda' must be one of auto, triton, torch"):
        dispatch.choice()


def test_triton_is_never_given_up_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.setattr(dispatch, "triton", None)
    with pytest.raises(ValueError, match="triton is not installed"):
        dispatch.choice()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cpu_tensors_take_kernels_only_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not dispatch.use_triton(torch.ones(2))
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert dispatch.use_triton(torch.ones(2))
    assert not dispatch.use_triton(torch.ones(2, dtype=torch.float64))
    assert not dispatch.use_triton(torch.ones(0))


def test_the_doctor_says_which_backend_runs_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert doctor.check_kernels().value == "torch: DEEPSEEK_RAY_KERNELS=torch"
    dispatch.choice.cache_clear()
    monkeypatch.setenv(dispatch.VARIABLE, "metal")
    assert doctor.check_kernels().state == "broken"
    assert "auto, triton, torch" in doctor.check_kernels().fix

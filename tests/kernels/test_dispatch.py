"""Triton or torch: chosen once, overridable, never silently."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek_ray import doctor
from deepseek_ray.kernels import dispatch, tuning


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


def test_the_doctor_says_what_to_do_with_a_broken_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table.json").write_text("[]")
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "table.json"))
    tuning._table.cache_clear()
    found = doctor.check_kernels()
    tuning._table.cache_clear()
    assert found.state == "broken"
    assert str(tmp_path / "table.json") in found.value
    assert re.search(rf"delete {tmp_path}/table\.json, or set {tuning.VARIABLE} to another path or to off", found.fix)


@pytest.mark.parametrize(("backend", "says"), [("auto", "torch on the CPU"), ("triton", "Triton's interpreter: slow")])
def test_the_doctor_knows_that_the_interpreter_must_be_asked_for(
    backend: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    assert doctor.check_kernels().value.startswith(says)
    assert doctor.check_kernels().state == "warning"


def test_an_operator_runs_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [torch.device("cuda", 0)]

    @contextmanager
    def switched(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", switched)
    launch = dispatch._on_its_device("norm", lambda x, eps: current[-1])
    with FakeTensorMode():
        assert launch(torch.empty(2, device="cuda:1"), 1e-6) == torch.device("cuda", 1)
    assert launch(torch.ones(2), 1e-6) == torch.device("cuda", 0)


def test_tensors_on_two_devices_are_named() -> None:
    x, target = torch.ones(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="linear_lse_backward got tensors on cpu and meta: move them"):
        dispatch._on_its_device("linear_lse_backward", print)(x, target.to("meta"))

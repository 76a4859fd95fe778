"""Triton or plain torch: chosen once for the process, shown by ``deepseek-ray doctor``, overridable.

DEEPSEEK_RAY_KERNELS = auto (Triton on a GPU that it supports, else torch), triton (refuse to fall back) or torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # not on every platform
    triton = None

VARIABLE = "DEEPSEEK_RAY_KERNELS"
CHOICES = ("auto", "triton", "torch")
OLDEST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Choice:
    """What the process runs.

    Attributes:
        backend: ``triton`` or ``torch``.
        why: for people.
    """

    backend: str
    why: str


@cache
def choice() -> Choice:
    """The backend of this process.

    Raises:
        ValueError: the variable has another value, or asks for Triton where there is none.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in CHOICES:
        raise ValueError(f"{VARIABLE} = {wanted!r} must be one of {', '.join(CHOICES)}")
    if wanted == "torch":
        return Choice("torch", f"{VARIABLE}=torch")
    problem = _problem()
    if wanted == "triton" and problem:
        raise ValueError(f"{VARIABLE} = 'triton', but {problem}: unset it or set it to 'torch'")
    return Choice("torch", problem) if problem else Choice("triton", _where())


def use_triton(*tensors: Tensor) -> bool:
    """Whether an op on these tensors runs its Triton kernels: half or single precision, something to do, on a GPU.

    The Triton interpreter (TRITON_INTERPRET=1) takes CPU tensors, but only when the variable says ``triton``.
    """
    if not _runs_triton(tensors[0].is_cuda):  # first: single decisions on a CPU are counted in microseconds
        return False
    return all(tensor.dtype != torch.float64 and tensor.numel() for tensor in tensors)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _runs_triton(on_gpu: bool) -> bool:
    if not on_gpu and not (os.environ.get(VARIABLE) == "triton" and interpreting()):
        return False
    return choice().backend == "triton"


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a function an operator of torch, ``deepseek_ray::name``, that changes none of its arguments.

    It runs on the device of its tensors: Triton launches on the current one, which may be another.

    Raises:
        ValueError: when called with tensors on several devices.
    """

    def register(run: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(run, mutates_args=())
        return torch.library.custom_op(
            f"deepseek_ray::{name}", _on_its_device(name, run), mutates_args=(), schema=schema
        )

    return register


def _on_its_device(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(run)
    def launch(*args: Any) -> Any:
        devices = {one.device: None for one in args if isinstance(one, Tensor)}
        if len(devices) > 1:
            raise ValueError(f"{name} got tensors on {' and '.join(map(str, devices))}: move them to one device")
        (device,) = devices
        if device.type != "cuda":
            return run(*args)
        with torch.cuda.device(device):
            return run(*args)

    return launch


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def _problem() -> str:
    if triton is None:
        return "triton is not installed"
    if interpreting():
        return ""
    if not torch.cuda.is_available():
        return "there is no GPU"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        return f"the GPU has compute capability {capability}, Triton needs {OLDEST_CAPABILITY}"
    return ""


def _where() -> str:
    return "Triton's interpreter" if interpreting() else torch.cuda.get_device_name()

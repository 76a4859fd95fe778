"""Ahead-of-time compilation of kernels for GPUs that are not here: does it compile, and what does it use?

Every op lists its kernels as variants in ``aot_variants()``, with the specialisation that the launcher would choose
(strides of 1 as constants, sizes divisible by 16 marked so): without it register counts mean nothing.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import triton
except ImportError:  # not on every platform
    triton = None

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}
"""What one block may have."""


@dataclass(frozen=True)
class Variant:
    """A kernel as it would be launched.

    Attributes:
        op: name for the table.
        kernel: the ``@triton.jit`` function.
        signature: argument -> Triton type (``*bf16``, ``i32``, ``fp32``); what is missing is in ``constants``.
        constants: arguments known when it is compiled.
        aligned: arguments divisible by 16; all pointers are.
        options: num_warps and num_stages.
        label: what tells it from other variants of the op.
        targets: where it is launched; sm_120 is left out where it runs what sm_80 runs.
    """

    op: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: Sequence[str] = ()
    options: Mapping[str, int] = field(default_factory=dict)
    label: str = ""
    targets: Sequence[str] = ("sm_80", "sm_90", "gfx942")


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel uses; registers and stack (spills, arrays) are known for NVIDIA only, -1 elsewhere."""

    registers: int
    stack_bytes: int
    shared_bytes: int


def compile_variant(variant: Variant, target: str) -> Usage:
    """Compile for one of TARGETS; raises what Triton raises."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    divisible = [n for n, kind in variant.signature.items() if kind.startswith("*") or n in variant.aligned]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(variant.kernel, signature, dict(variant.constants), attributes)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(variant.options))
    shared = int(compiled.metadata.shared)
    if "cubin" not in compiled.asm:
        return Usage(-1, -1, shared)
    return Usage(*_registers_and_stack(compiled.asm["cubin"]), shared)


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers = re.search(r"REG:(\d+)", done.stdout)
    stack = re.search(r"(?:STACK|LOCAL):(\d+)", done.stdout)
    assert registers is not None, done.stdout
    return int(registers[1]), int(stack[1]) if stack else 0

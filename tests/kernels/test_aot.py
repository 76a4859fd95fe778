"""Every kernel compiles for GPUs that are not here, and needs no more of them than the committed table says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_ray.kernels import aot
from tests.bench import kernel_usage

ROOT = Path(__file__).resolve().parents[2]
USED = {"registers": "64", "stack_bytes": "0", "shared_bytes": "32"}
ROW = {"op": "norm", "label": "bf16", "target": "sm_90", "triton": "3.7.1", **USED}


@pytest.mark.timeout(900)
def test_no_kernel_needs_more_than_the_table_says() -> None:
    pytest.importorskip("triton.backends.nvidia")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.bench.kernel_usage", "--check"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_every_op_is_in_the_table() -> None:
    ops = {row["op"] for row in kernel_usage.read()}
    assert {"rms_norm", "rope", "swiglu", "gelu_layer_norm", "router_topk"} <= ops


def test_every_kernel_in_the_table_fits_and_none_spills_on_hopper() -> None:
    for row in kernel_usage.read():
        assert int(row["shared_bytes"]) <= aot.SHARED_BYTES[row["target"]], row
        assert int(row["stack_bytes"]) <= (0 if row["target"] == "sm_90" else 16), row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registers": "81"}, "norm / bf16 / sm_90: registers grew from 64 to 81; .*kernel_usage"),
        ({"stack_bytes": "8"}, "stack_bytes grew from 0 to 8"),
        ({"shared_bytes": "33"}, "shared_bytes grew from 32 to 33"),
        ({"error": "CompilationError: no"}, "norm / bf16 / sm_90 does not compile: CompilationError: no"),
        ({"label": "fp32"}, "norm / fp32 / sm_90 is not in the table"),
    ],
)
def test_what_got_worse_is_named(change: dict[str, str], message: str) -> None:
    (line,) = kernel_usage.complaints([{**ROW, **change}], [] if "label" in change else [ROW])
    assert re.search(message, line)


def test_a_little_more_is_fine_and_a_table_that_does_not_fit_is_not() -> None:
    better = {**ROW, "registers": "80", "shared_bytes": "16"}
    assert kernel_usage.complaints([better], [ROW]) == []
    assert kernel_usage.complaints([{**ROW, "registers": "200", "triton": "3.8.0"}], [ROW]) == []
    assert "listed twice" in kernel_usage.complaints([ROW, ROW], [ROW])[0]
    assert "is in the table and not in kernels/" in kernel_usage.complaints([], [ROW])[0]

"""Every case of the benchmark runs with every provider that needs no compiler."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.bench.bench_kernels import Machine, measure
from tests.bench.kernel_cases import Case, all_cases

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", list(all_cases(CPU, small=True)), ids=lambda case: f"{case.op} {case.shape}")
def test_a_case_is_measured_forward_and_backward(case: Case) -> None:
    plain = {name: op for name, op in case.providers.items() if name != "torch compiled"}
    rows = list(measure(dataclasses.replace(case, providers=plain), Machine(CPU, 1e12, 1e11), repeats=2))
    assert [row["error"] for row in rows] == [""] * len(rows)
    assert all(row["ms_p50"] > 0 for row in rows)
    trains = case.op != "quantised_grouped_gemm"
    assert [row["direction"] for row in rows] == ["forward", "backward"][: 1 + trains] * len(plain)

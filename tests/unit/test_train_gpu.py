"""The program that measures training on a GPU, on a small shape here."""

from __future__ import annotations

import torch

from deepseek_ray.models.router import Router
from tests.bench import train_gpu


def test_a_case_yields_its_figures() -> None:
    options = train_gpu._parser().parse_args(
        ["--config", "debug_moe", "--tokens", "64", "--layers", "1", "--steps", "2"]
    )
    row = train_gpu.measure(options, 8192, "balanced", compiled=False)
    assert row["tokens"] == 64
    assert row["layers"] == 1
    assert 0 < row["tflops"] < 10
    assert row["tokens_per_s"] > 0
    assert set(train_gpu.COLUMNS) - set(row) == {"kernels"}


def test_tokens_dealt_in_turn_load_all_experts_alike() -> None:
    router = Router(8, 6, 2)
    gate, expert, _ = train_gpu.in_turn(router, torch.randn(9, 6))
    assert torch.bincount(expert.flatten()).tolist() == [3] * 6
    torch.testing.assert_close(gate.sum(-1), torch.ones(9))

"""Every mesh computes what one process computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepseek_ray.config_moe import StepConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.parallel import apply
from deepseek_ray.parallel.apply import SpreadModel
from deepseek_ray.parallel.mesh import check_mesh
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train import callbacks
from deepseek_ray.train.parity import Parity, verification_config, verify_mesh
from tests.distributed.meshes import AXES, COMBINATIONS, SCHEDULES, overrides


def compare(mesh: str, schedule: str = "1F1B", steps: int = 3, dtype: str = "float64", **settings: object) -> Parity:
    """Train the debug model on a mesh and alone."""
    settings["step__precision"] = dtype
    config = load_moe_preset("debug_moe", overrides=overrides(mesh, schedule, **settings))
    return verify_mesh(verification_config(config), steps)


@pytest.mark.parametrize("mesh", AXES)
def test_every_axis_alone(mesh: str) -> None:
    result = compare(mesh)
    assert result.passed, result.plain()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_under_data_and_expert_parallelism(schedule: str) -> None:
    result = compare("pp=2,dp_shard=2,ep=2", schedule)
    assert result.passed, result.plain()


@pytest.mark.parametrize(("mesh", "schedule"), [("pp=2,tp=2", "ZBVZeroBubble"), ("dp_shard=2,tp=2", "1F1B")])
def test_the_loss_without_logits(mesh: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    init = SpreadModel.__init__

    def on_a_mesh(self: SpreadModel, *args: Any, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(apply, "use_triton", lambda _: torch.distributed.is_initialized())
            init(self, *args, **options)
        assert self.fused == torch.distributed.is_initialized()

    monkeypatch.setattr(SpreadModel, "__init__", on_a_mesh)
    result = compare(mesh, schedule)
    assert result.passed, result.plain()


def test_all_axes_at_once_in_float32() -> None:
    result = compare("pp=2,dp_shard=2,tp=2,ep=2", "DualPipeV", dtype="float32")
    assert result.passed, result.plain()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("mesh", "schedule"), COMBINATIONS)
def test_combinations_over_twenty_steps(mesh: str, schedule: str, dtype: str) -> None:
    result = compare(mesh, schedule, steps=20, dtype=dtype)
    assert result.passed, result.plain()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("mesh", "schedule"), [("dp_shard=2,tp=2,ep=2", "1F1B"), ("pp=2,dp_replicate=2", "ZBVZeroBubble")]
)
def test_compiled_layers_compute_the_same(mesh: str, schedule: str) -> None:
    result = compare(mesh, schedule, step__compile=True, cluster__timeout_s=400)
    assert result.passed, result.plain()


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_and_dropout_change_nothing(recompute: str) -> None:
    result = compare("pp=2,tp=2", "ZBVZeroBubble", step__recompute=recompute, backbone__dropout=0.1)
    assert result.passed, result.plain()


@pytest.mark.parametrize(
    "settings",
    [
        {"backbone__router": "softmax", "backbone__num_groups": 4, "backbone__top_groups": 2},
        {"backbone__attention": "sliding", "backbone__window": 5, "backbone__qk_norm": True},
        {"backbone__adapter": "events", "backbone__num_channels": 3, "backbone__head": "classification"},
        {"backbone__adapter": "patches", "corpus__seq_len": 8, "backbone__head": "classification"},
        {"step__adaptive_clip": 0.01, "step__max_grad_norm": 0.1},
    ],
    ids=["groups", "sliding", "events", "patches", "clipping"],
)
def test_every_kind_of_model_on_tensor_and_data_axes(settings: dict[str, object]) -> None:
    result = compare("dp_shard=2,tp=2,ep=2", **settings)
    assert result.passed, result.plain()


def test_an_exchange_that_sends_everything_is_an_all_reduce() -> None:
    result = compare("dp_replicate=2,tp=2", step__exchange="top_k", step__top_k_fraction=1.0)
    assert result.passed, result.plain()


def test_a_mesh_that_is_a_little_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = callbacks.learning_rate

    def other_rate(step: int, settings: StepConfig) -> float:
        return honest(step, settings) * (1 + 1e-6 * torch.distributed.is_initialized())

    monkeypatch.setattr(callbacks, "learning_rate", other_rate)
    assert not compare("dp_shard=2").passed


@pytest.mark.parametrize(
    ("settings", "equation"),
    [
        (["parallel.dp_shard=4", "parallel.ep=3"], r"parallel.dp_shard % \(parallel.ep\) = 4 % 3 = 1"),
        (["parallel.dp_shard=16", "parallel.ep=16"], r"num_experts % \(parallel.ep\) = 8 % 16 = 8"),
        (["parallel.tp=2", "backbone.adapter=events", "backbone.vocab_size=321"], r"vocab_size % .* = 321 % 2 = 1"),
        (["parallel.tp=2", "backbone.adapter=events", "corpus.seq_len=15"], r"seq_len % .* = 15 % 2 = 1"),
        (["parallel.tp=3"], r"num_heads % \(parallel.tp\) = 8 % 3 = 2"),
        (["parallel.dp_shard=3"], r"step.batch_size % \(.*micro_batch_size\) = 8 % 6 = 2"),
        (["parallel.pp=8"], "num_layers = 4 < 8 pipeline stages"),
        (["parallel.pp=2", "parallel.stages_per_rank=2"], "stages_per_rank = 2 with schedule 1F1B"),
        (["parallel.pp=2", "parallel.schedule=DualPipeV", "step.batch_size=4"], "= 2 micro-batches, must be >= 4"),
    ],
)
def test_degrees_that_do_not_fit_are_refused_with_the_equation(settings: list[str], equation: str) -> None:
    with pytest.raises(ConfigError, match=equation):
        check_mesh(load_moe_preset("debug_moe", overrides=settings))

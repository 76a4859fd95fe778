"""Settings of pretraining: presets are valid, impossible shapes are refused with the field and its value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from deepseek_ray.config_moe import BackboneConfig, MoEConfig, ParallelConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.presets_moe import MOE_PRESETS, load_moe_preset


@pytest.mark.parametrize("name", MOE_PRESETS)
def test_each_preset_is_valid_and_survives_json(name: str) -> None:
    config = load_moe_preset(name)
    assert MoEConfig.model_validate_json(config.model_dump_json()) == config


def test_an_override_beats_the_file_and_the_file_beats_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("step:\n  steps: 3\n  batch_size: 64\n")
    config = load_moe_preset("debug_moe", file=file, overrides=["step.steps=5"])
    assert (config.step.steps, config.step.batch_size, config.backbone.num_heads) == (5, 64, 8)


def test_an_unknown_preset_or_key_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"Unknown preset 'debug'.*choose one of debug_moe, deepseek_v3"):
        load_moe_preset("debug")
    with pytest.raises(ConfigError, match=r"'backbone.topk'.*did you mean 'backbone.top_k'"):
        load_moe_preset("debug_moe", overrides=["backbone.topk=3"])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_heads": 6, "num_kv_heads": 4}, r"num_heads % num_kv_heads = 2, must be 0"),
    ({"d_head": 15}, r"d_head % 2 = 1, must be 0"),
    ({"num_experts": 8, "num_groups": 3}, r"num_experts % num_groups = 2, must be 0"),
    ({"num_groups": 2, "top_groups": 3}, r"top_groups = 3 must be <= num_groups = 2"),
    ({"num_groups": 4, "top_groups": 1, "top_k": 3}, r"top_k = 3 must be <= 2, the experts of a token's groups"),
    ({"top_k": 9}, r"top_k = 9 must be <= 8"),
    ({"num_layers": 2, "num_dense_layers": 3}, r"num_dense_layers = 3 > num_layers = 2"),
    ({"dropout": 1.0}, r"less than 1"),
    ({"router": "tanh"}, r"'sigmoid' or 'softmax'"),
]


@pytest.mark.parametrize(("shape", "problem"), WRONG)
def test_an_impossible_shape_is_refused(shape: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        BackboneConfig.model_validate(shape)
    with pytest.raises(ConfigError, match=problem):
        load_moe_preset("debug_moe", overrides={f"backbone.{key}": value for key, value in shape.items()})


@pytest.mark.parametrize(
    "shape",
    [
        {"num_groups": 4, "top_groups": 1, "top_k": 2},
        {"top_k": 8},
        {"num_layers": 2, "num_dense_layers": 2},
        {"num_heads": 4, "num_kv_heads": 4},
        {"dropout": 0.99},
    ],
)
def test_the_edge_of_what_is_possible_is_accepted(shape: dict[str, Any]) -> None:
    assert BackboneConfig.model_validate(shape).model_dump().items() >= shape.items()


def test_samples_must_fit_the_model() -> None:
    with pytest.raises(ConfigError, match=r"corpus.seq_len = 257 > max_seq_len = 256"):
        load_moe_preset("debug_moe", overrides={"corpus.seq_len": 257})
    assert load_moe_preset("debug_moe", overrides={"corpus.seq_len": 256}).corpus.seq_len == 256


def test_the_degrees_multiply_and_ep_takes_no_processes_of_its_own() -> None:
    parallel = ParallelConfig(dp_replicate=2, dp_shard=4, tp=3, pp=5, ep=4)
    assert (parallel.data, parallel.model, parallel.world) == (8, 15, 120)

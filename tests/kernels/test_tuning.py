"""Settings of kernels: measured on demand, kept, never in a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deepseek_ray.data.samples import RandomSamples
from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.kernels import tuning
from deepseek_ray.parallel.launch import run_processes
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train.pretraining import make_stepper

DEFAULT = {"BLOCK": 64}
SHAPE = (torch.bfloat16, 2048, 768)


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "table.json"))
    tuning._table.cache_clear()
    yield tmp_path / "table.json"
    tuning._table.cache_clear()


def measured(settings: dict[str, int]) -> float:
    return {32: 2.0, 64: 1.0, 128: 0.5, 256: float("inf")}[settings["BLOCK"]]


def test_the_fastest_that_runs_is_kept_for_its_shape_alone() -> None:
    before = tuning.digest()
    candidates = [{"BLOCK": block} for block in (32, 64, 128, 256)]
    assert tuning.tune("gemm", SHAPE, candidates, measured) == {"BLOCK": 128}
    assert tuning.settings_for("gemm", SHAPE, DEFAULT) == {"BLOCK": 128}
    assert tuning.settings_for("gemm", (torch.float16, *SHAPE[1:]), DEFAULT) == DEFAULT
    assert tuning.settings_for("other", SHAPE, DEFAULT) == DEFAULT
    assert tuning.digest() != before


def test_one_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.tune("gemm", SHAPE, [{"BLOCK": 32}], measured)
    monkeypatch.setenv(tuning.VARIABLE, "off")
    tuning._table.cache_clear()
    assert tuning.settings_for("gemm", SHAPE, DEFAULT) == DEFAULT
    with pytest.raises(ValueError, match="set a path"):
        tuning.tune("gemm", SHAPE, [DEFAULT], measured)


def test_a_broken_table_is_named(table: Path) -> None:
    table.write_text('{"gemm/x": {"BLOCK": "many"}}')
    with pytest.raises(ValueError, match=r"table\.json.*delete it and tune again"):
        tuning.settings_for("gemm", SHAPE, DEFAULT)


def test_nothing_that_runs_is_an_error() -> None:
    with pytest.raises(ValueError, match="no settings of gemm run"):
        tuning.tune("gemm", SHAPE, [{"BLOCK": 256}], measured)


def test_sizes_share_buckets() -> None:
    assert [tuning.bucket(size) for size in (1, 2, 3, 4, 5, 1000, 1024, 1025)] == [1, 2, 4, 4, 8, 1024, 1024, 2048]


def with_own_settings() -> str:
    rank = torch.distributed.get_rank()
    if rank == 1:
        tuning._table.cache_clear()
        tuning.tune("gemm", SHAPE, [{"BLOCK": 32}], measured)
    config = load_moe_preset("debug_moe", overrides=["parallel.dp_shard=2"])
    samples = RandomSamples(config.backbone, config.corpus.seq_len, config.seed)
    try:
        make_stepper(config, samples, torch.device("cpu"))
    except EnvironmentProblemError as error:
        return error.message
    return ""


def test_processes_of_a_mesh_must_agree_on_their_settings() -> None:
    tuning.digest()  # read before: rank 0 knows no settings
    for message in run_processes(2, with_own_settings):
        assert "other kernels than rank 0" in message
        assert "rank 1" in message

"""Settings of kernels: measured on demand, kept, never in a step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_ray.data.samples import RandomSamples
from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.kernels import dispatch, gelu_layer_norm, rope, router_topk, swiglu, tuning
from deepseek_ray.parallel.launch import run_processes
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train.pretraining import make_stepper
from tests.kernels.checks import DEVICE, needs_kernels

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


def of_the_router() -> Tensor:
    logit_TE = torch.randn(9, 16, device=DEVICE, requires_grad=True)
    router_topk.tune_router_topk(logit_TE, None, 2)
    return router_topk.router_topk(logit_TE, None, 2).weight_TK


def of_rope() -> Tensor:
    query_BHSP, key_BGSP = torch.randn(1, 4, 5, 16, device=DEVICE), torch.randn(1, 2, 5, 16, device=DEVICE)
    wave_LW2 = torch.rand(5, 8, 2, device=DEVICE)
    rope.tune_rope(query_BHSP, key_BGSP, wave_LW2)
    return rope.rope(query_BHSP, key_BGSP, wave_LW2)[0]


def of_swiglu() -> Tensor:
    x = torch.randn(5, 32, device=DEVICE, requires_grad=True)
    swiglu.tune_swiglu(x)
    return swiglu.swiglu(x)


def of_gelu_layer_norm() -> Tensor:
    made = [torch.randn(*size, device=DEVICE, requires_grad=True) for size in ((5, 16), (16,), (16,))]
    gelu_layer_norm.tune_gelu_layer_norm(*made)
    return gelu_layer_norm.gelu_layer_norm(*made)


@needs_kernels
@pytest.mark.parametrize(
    ("op", "names"),
    [
        (of_the_router, ["router_topk"]),
        (of_rope, ["rope"]),
        (of_swiglu, ["swiglu"]),
        (of_gelu_layer_norm, ["gelu_layer_norm", "gelu_layer_norm_backward"]),
    ],
    ids=["router_topk", "rope", "swiglu", "gelu_layer_norm"],
)
def test_an_op_runs_with_the_settings_that_were_fastest(
    op: Callable[[], Tensor], names: list[str], table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    tried: list[dict[str, int]] = []

    def do_bench(launch: Callable[[], object], **_: object) -> float:
        tried.extend(tuning._TRIED.values())
        launch()
        return 1.0 / len(tried)  # the last is the fastest

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    dispatch.choice.cache_clear()
    assert op().isfinite().all()
    dispatch.choice.cache_clear()
    kept = json.loads(table.read_text())
    assert [key.partition("/")[0] for key in kept] == names
    assert tried[-1] in kept.values()
    assert not tuning._TRIED

"""The commands that prove a mesh: arguments, exit status, figures; and the planner's table."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from deepseek_ray import cli, verify
from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.parallel.mesh import check_mesh
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train.parity import Parity
from deepseek_ray.train.recovery import Recovery


def test_a_mesh_is_parsed() -> None:
    assert verify.parse_mesh("pp=2,dp_shard=4") == {"pp": 2, "dp_shard": 4}
    assert verify.parse_mesh("") == {}


@pytest.mark.parametrize("text", ["dp=2", "pp", "pp=", "pp=0", "pp=-1", "pp=two", "tp=1.5", "schedule=2", "pp=2;tp=2"])
def test_what_is_no_mesh_is_refused_by_its_part(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no degree\. Fix: write AXIS=NUMBER, axes: dp_replicate, dp_shard, tp"):
        verify.parse_mesh(f"tp=2,{text}")


def test_the_wrong_mesh_ends_the_command_with_its_fix(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "mesh", "--mesh", "cp=2"]) != 0
    assert "Mesh 'cp=2'" in capsys.readouterr().err


@pytest.mark.parametrize(("gradient", "status", "word"), [(0.0, 0, "PASS"), (1e-3, 1, "FAIL")])
def test_parity_decides_the_exit_status_and_all_figures_are_written(
    gradient: float, status: int, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked: list[MoEConfig] = []

    def found(config: MoEConfig, steps: int, **_: Any) -> Parity:
        asked.append(config)
        return Parity(config.parallel.world, steps, config.step.precision, [1e-9] * steps, [gradient] * steps)

    monkeypatch.setattr(verify, "verify_mesh", found)
    file = tmp_path / "parity.json"
    arguments = ["--mesh", "pp=2,dp_shard=2", "--schedule", "ZBVZeroBubble", "--steps", "3", "--json", str(file)]
    assert cli.main(["verify", "mesh", *arguments]) == status
    degrees = asked[0].parallel
    assert (degrees.pp, degrees.dp_shard, degrees.schedule) == (2, 2, "ZBVZeroBubble")
    assert asked[0].step.precision == "float32"
    content = json.loads(file.read_text())
    assert content["pass"] is (status == 0)
    assert content["max_grad_cosine_diff"] == gradient
    assert len(content["loss_rel_diff"]) == 3
    assert capsys.readouterr().out.splitlines()[-1] == word


def test_a_checkpoint_that_differs_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"pass": False, "tensors": 7, "bytes": 9, "different": ["model.head"], "world_sizes": [1, 2]}
    monkeypatch.setattr(verify, "verify_checkpoint", lambda source, target: result)
    assert cli.main(["verify", "checkpoint", "--from", "", "--to", "tp=2"]) == 1
    assert capsys.readouterr().out.splitlines() == ["7 tensors, 9 bytes: 1 differ", "  model.head", "FAIL"]


@pytest.mark.parametrize(("gap", "resumed", "status"), [(0.0, 5, 0), (1e-9, 5, 1), (0.0, 1, 1)])
def test_a_recovery_with_another_end_or_too_much_lost_fails(
    gap: float, resumed: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = Recovery(1, 6, resumed, 3.0, 5, 2.5, gap)
    monkeypatch.setattr(verify, "verify_recovery", lambda *_, **__: result)
    assert cli.main(["verify", "recovery", "--kill-at", "6"]) == status
    assert f"steps lost {7 - resumed} (checkpoint every 5)" in capsys.readouterr().out


def test_a_signal_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "recovery", "--kill-at", "6", "--signal", "NOISE"]) != 0
    assert "--signal 'NOISE' is no signal" in capsys.readouterr().err


def test_the_plan_is_a_table_the_fastest_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--gpus", "64", "--memory", "80", "--top", "3"]) == 0
    title, head, *rows, last = capsys.readouterr().out.splitlines()
    assert title.endswith("meshes of 64 GPUs fit 80 GiB; sizes in GiB a GPU")
    assert head.split()[:3] == ["mesh", "schedule", "weights"]
    assert len(rows) == 3
    steps = [float(row.split()[-1].removesuffix("s")) for row in rows]
    assert steps == sorted(steps)
    mesh = rows[0].split()[0]
    assert last.startswith("Next: ")
    assert "qwen3_30b_a3b" in last
    for axis, degree in verify.parse_mesh(mesh).items():
        assert f"parallel.{axis}={degree}" in last


def test_a_plan_that_cannot_be_says_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--gpus", "8", "--memory", "1"]) != 0
    assert "No mesh of 8 GPUs fits 1 GiB" in capsys.readouterr().err


def test_the_plans_next_command_is_the_planned_mesh(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--set", "corpus.seq_len=2048"]
    assert cli.main(["plan", "--config", "qwen3_30b_a3b", "--gpus", "16", "--memory", "141", *chosen]) == 0
    command = capsys.readouterr().out.partition("Next: ")[2].split()
    overrides = [value for flag, value in itertools.pairwise(command) if flag == "--set"]
    config = load_moe_preset(command[command.index("--config") + 1], overrides=overrides)
    check_mesh(config)
    assert config.parallel.world == 16
    assert config.corpus.seq_len == 2048


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["verify", "mesh", "--mesh", "tp=2", "--steps", "0"], "--steps 0"),
        (["verify", "mesh", "--mesh", "tp=2", "--json", "/no/such/x.json"], "--json: there is no folder '/no/such'"),
        (["verify", "checkpoint", "--from", "tp=2", "--to", "pp=2", "--shared", "/no"], "--shared"),
        (["verify", "mesh", "--mesh", "tp=2", "--set", "step.precision=bfloat16"], "give --dtype"),
        (["verify", "mesh", "--mesh", "tp=2", "--set", "corpus.pattern=/etc/*"], "corpus.pattern"),
        (["plan", "--gpus", "8", "--memory", "-1"], "--memory -1"),
        (["plan", "--gpus", "8", "--gpus-per-node", "0"], "--gpus-per-node 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("where", ["loss_rel_diff", "grad_cosine_diff", "max_param_diff"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_no_number_is_no_parity(where: str, dtype: str) -> None:
    good = {"loss_rel_diff": [0.0, 0.0], "grad_cosine_diff": [0.0, 0.0], "max_param_diff": 0.0}
    assert Parity(2, 2, dtype, **good).passed
    bad = math.nan if where == "max_param_diff" else [0.0, math.nan]
    assert not Parity(2, 2, dtype, **(good | {where: bad})).passed
    assert not Parity(2, 2, dtype, **good, max_count_diff=1).passed

"""Pretraining on Ray: resumed after a kill, always the same run."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from deepseek_ray.cluster import local_cluster
from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.errors import DivergedError
from deepseek_ray.models.pretrained import from_pretrained
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train.parity import verification_config, verify_mesh
from deepseek_ray.train.pretrain_trainer import pretrain_on_ray, read_progress
from deepseek_ray.train.pretrain_worker import PROGRESS
from deepseek_ray.train.recovery import verify_recovery
from pipelines.moe import train

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # Ray's own use of its old settings
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves log files and sockets to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LATER_KILLS = (
    (2, "dp_shard=2"), (4, "pp=2"), (5, "tp=2"), (9, "dp_shard=2,ep=2"), (11, "dp_replicate=2"),
    (13, "pp=2,dp_shard=2"), (14, "tp=2"), (16, "pp=2"), (18, "dp_shard=2,ep=2"),
)  # fmt: skip
KILLS = [(7, "dp_shard=2"), *(pytest.param(*later, marks=pytest.mark.slow) for later in LATER_KILLS)]
"""Step after which a worker dies, and the mesh; which worker, the seed draws."""


@pytest.fixture
def cluster() -> Iterator[None]:
    with local_cluster(4):
        yield
    assert not ray.is_initialized()


def make(*overrides: str) -> MoEConfig:
    settings = ["corpus.max_bytes=200000", "step.precision=float64", *overrides]
    return load_moe_preset("debug_moe", overrides=settings)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_progress(folder / PROGRESS).values()]


@pytest.mark.usefixtures("cluster")
def test_the_program_trains_a_mesh_and_leaves_a_model_that_one_process_reads(tmp_path: Path) -> None:
    settings = ["parallel.dp_shard=2", "parallel.ep=2", "step.steps=12", "corpus.max_bytes=200000"]
    arguments = [f"--set={setting}" for setting in settings]
    assert train.main(["--config", "debug_moe", "--run", str(tmp_path / "run"), *arguments]) == 0
    stage = json.loads((tmp_path / "run/results/pretrain.json").read_text())
    assert stage["last_loss"] < stage["first_loss"]
    model = from_pretrained(tmp_path / "run/model")
    assert sum(p.numel() for p in model.parameters()) > 100_000
    alone = pretrain_on_ray(load_moe_preset("debug_moe", overrides=settings[2:]), tmp_path / "alone")
    assert stage["last_loss"] == pytest.approx(alone.last_loss, rel=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_mesh_of_ray_workers_computes_what_one_process_computes(tmp_path: Path) -> None:
    config = verification_config(make("parallel.pp=2", "parallel.dp_shard=2", "parallel.schedule=ZBVZeroBubble"))
    result = verify_mesh(config, 3, on_ray=True, shared=tmp_path)
    assert result.world_size == 4
    assert result.passed, result.plain()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("kill_at", "mesh"), KILLS)
def test_a_killed_worker_costs_no_more_than_the_steps_since_the_checkpoint(
    kill_at: int, mesh: str, tmp_path: Path
) -> None:
    degrees = [f"parallel.{degree}" for degree in mesh.split(",")]
    config = make(*degrees, "step.checkpoint_every=3", f"seed={kill_at}")
    result = verify_recovery(config, tmp_path, kill_at=kill_at, signal=signal.SIGKILL)
    assert result.final_loss_diff == 0.0
    assert 0 <= result.steps_lost <= 3, result
    assert result.passed


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_what_ends_a_worker_on_purpose_reaches_the_caller_in_one_piece(tmp_path: Path) -> None:
    config = make("parallel.dp_shard=2", "step.lr=1e30", "step.max_grad_norm=0", "step.weight_decay=0")
    with pytest.raises(DivergedError, match=r"diverged at step \d+.*lower step\.lr"):
        pretrain_on_ray(config, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_checkpoint_that_a_worker_skips_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = make("parallel.dp_shard=2", "step.steps=6", "step.checkpoint_every=3")
    whole = pretrain_on_ray(config, tmp_path)
    newest = tmp_path / "step-000006"
    shard = next(newest.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    again = pretrain_on_ray(config, tmp_path)
    assert again.last_loss == whole.last_loss
    assert "step-000006" in capfd.readouterr().err

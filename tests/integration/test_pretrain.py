"""Pretraining on Ray: resumed after a kill, resized with the cluster, always the same run."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from deepseek_ray.cluster import local_cluster
from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.models.pretrained import from_pretrained
from deepseek_ray.presets_moe import load_moe_preset
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

LATER_KILLS = (2, 4, 5, 9, 11, 13, 14, 16, 18)


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


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "kill_at", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 5, 9, 11, 13, 14, 16, 18))]
)
def test_a_killed_worker_costs_no_more_than_the_steps_since_the_checkpoint(kill_at: int, tmp_path: Path) -> None:
    config = make("parallel.dp_shard=2", "step.checkpoint_every=3", f"seed={kill_at}")
    result = verify_recovery(config, tmp_path, kill_at=kill_at, signal=signal.SIGKILL)
    assert result.final_loss_diff == 0.0
    assert 0 <= result.steps_lost <= 3, result
    assert result.passed


@pytest.mark.slow
def test_a_mesh_shrinks_and_grows_with_the_cluster_and_the_run_stays_the_same(tmp_path: Path) -> None:
    steps = ("step.steps=60", "step.checkpoint_every=2")
    alone = pretrain_on_ray(make(*steps), tmp_path / "alone")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    spare = nodes.add_node(num_cpus=2)
    nodes.add_node(num_cpus=2)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    try:
        elastic = ["parallel.tp=2", "parallel.dp_shard=2", "cluster.num_workers=5", "cluster.min_workers=2"]
        config = make(*steps, *elastic, "cluster.resize_interval_s=5", "cluster.max_failures=10")
        changer = threading.Thread(target=shrink_and_grow, args=(nodes, spare, tmp_path / "elastic" / PROGRESS))
        changer.start()
        result = pretrain_on_ray(config, tmp_path / "elastic")
        changer.join()
    finally:
        ray.shutdown()
        nodes.shutdown()
    raw = [json.loads(line) for line in (tmp_path / "elastic" / PROGRESS).read_text().splitlines()]
    sizes = [line["world_size"] for line in raw]
    changes = [size for at, size in enumerate(sizes) if at == 0 or sizes[at - 1] != size]
    assert changes == [4, 2, 4]  # of 5, 3 and 5 workers
    assert losses(tmp_path / "elastic") == pytest.approx(losses(tmp_path / "alone"), rel=1e-12)
    assert result.last_loss == pytest.approx(alone.last_loss, rel=1e-12)


def shrink_and_grow(nodes: Cluster, node: object, progress: Path) -> None:
    """Take two processes away after eight steps, and give two back eight steps later."""
    wait_for_step(progress, 8, world_size=4)
    nodes.remove_node(node, allow_graceful=False)
    wait_for_step(progress, 20, world_size=2)
    nodes.add_node(num_cpus=2)


def wait_for_step(progress: Path, step: int, world_size: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        newest = list(read_progress(progress).values())[-1:]
        if newest and newest[0]["step"] >= step and newest[0]["world_size"] == world_size:
            return
        time.sleep(0.2)
    raise TimeoutError(f"no step {step} on {world_size} processes")

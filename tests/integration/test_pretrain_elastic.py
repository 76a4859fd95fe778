"""Pretraining while the cluster shrinks and grows: other meshes, the same run."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train.pretrain_trainer import pretrain_on_ray, read_progress
from deepseek_ray.train.pretrain_worker import PROGRESS

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # Ray's own use of its old settings
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves log files and sockets to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def make(*overrides: str) -> MoEConfig:
    return load_moe_preset("debug_moe", overrides=["corpus.max_bytes=200000", *overrides])


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_progress(folder / PROGRESS).values()]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [("float64", 1e-12), ("float32", 1e-6)])
def test_a_mesh_shrinks_and_grows_with_the_cluster_and_the_run_stays_the_same(
    precision: str, bound: float, tmp_path: Path
) -> None:
    steps = (f"step.precision={precision}", "step.steps=60", "step.checkpoint_every=2")
    alone = pretrain_on_ray(make(*steps), tmp_path / "alone")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    spare = nodes.add_node(num_cpus=2)
    nodes.add_node(num_cpus=2)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    try:
        elastic = ["parallel.tp=2", "parallel.dp_shard=2", "cluster.num_workers=5", "cluster.min_workers=2"]
        config = make(*steps, *elastic, "cluster.resize_interval_s=5", "cluster.max_failures=10")
        with ThreadPoolExecutor(1) as pool:  # a node is started by the main thread only: it sets signal handlers
            run = pool.submit(pretrain_on_ray, config, tmp_path / "elastic")
            shrink_and_grow(nodes, spare, tmp_path / "elastic" / PROGRESS, run)
            result = run.result()
    finally:
        ray.shutdown()
        nodes.shutdown()
    raw = [json.loads(line) for line in (tmp_path / "elastic" / PROGRESS).read_text().splitlines()]
    sizes = [line["world_size"] for line in raw]
    changes = [size for at, size in enumerate(sizes) if at == 0 or sizes[at - 1] != size]
    assert changes == [4, 2, 4]  # of 5, 3 and 5 workers
    assert losses(tmp_path / "elastic") == pytest.approx(losses(tmp_path / "alone"), rel=bound)
    assert result.last_loss == pytest.approx(alone.last_loss, rel=bound)


def shrink_and_grow(nodes: Cluster, node: Any, progress: Path, run: Future[Any]) -> None:
    """Take two processes away after eight steps, and give two back some steps later."""
    wait_for_step(progress, 8, 4, run)
    nodes.remove_node(node, allow_graceful=False)
    wait_for_step(progress, 12, 2, run)
    nodes.add_node(num_cpus=2)


def wait_for_step(progress: Path, step: int, world_size: int, run: Future[Any]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not run.done():
        newest = list(read_progress(progress).values())[-1:]
        if newest and newest[0]["step"] >= step and newest[0]["world_size"] == world_size:
            return
        time.sleep(0.2)
    raise TimeoutError(f"no step {step} on {world_size} processes")

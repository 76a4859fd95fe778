"""Gradients summed by Ray actors: the same sums as among the workers, whatever arrives first."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from torch import nn

from deepseek_ray.cluster import local_cluster
from deepseek_ray.config_moe import MoEConfig, ParallelConfig
from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train.parameter_server import ParameterServer, SumServer
from deepseek_ray.train.pretrain_trainer import pretrain_on_ray, read_progress
from deepseek_ray.train.pretrain_worker import PROGRESS

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # Ray's own use of its old settings
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves log files and sockets to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_cluster(2):
        yield
    assert not ray.is_initialized()


class Place:
    """Stands in for a mesh: only ranks and the number of replicas are asked for."""

    degrees = ParallelConfig(dp_replicate=2)

    def __init__(self, replica: int) -> None:
        self.replica = replica

    def rank(self, axis: str) -> int:
        return self.replica if axis == "dp_replicate" else 0


def test_the_sum_does_not_depend_on_the_order_of_arrival() -> None:
    draw = np.random.default_rng(0)
    pushed = list(draw.normal(size=(3, 1000)))
    server = ray.remote(num_cpus=0)(SumServer).options(max_concurrency=10).remote(3)
    orders = list(itertools.permutations(range(3)))
    for round_, order in enumerate(orders):
        waiting = {}
        for replica in order:
            waiting[replica] = server.push.remote(round_, replica, pushed[replica])
            time.sleep(0.02)
        for answer in ray.get(list(waiting.values()), timeout=30):
            assert np.array_equal(answer, pushed[0] + pushed[1] + pushed[2])
    backwards = pushed[2] + pushed[1] + pushed[0]
    assert not np.array_equal(pushed[0] + pushed[1] + pushed[2], backwards), "the order must matter"


def test_a_replica_that_reads_late_still_gets_its_round() -> None:
    server = ray.remote(num_cpus=0)(SumServer).options(max_concurrency=10).remote(2)
    one = np.ones(3)
    quick, slow = server.push.remote(0, 0, one), server.push.remote(0, 1, one)
    assert ray.get(quick, timeout=30).tolist() == [2] * 3
    ahead = server.push.remote(1, 0, 10 * one)
    assert ray.get(slow, timeout=30).tolist() == [2] * 3
    assert ray.get(server.push.remote(1, 1, 10 * one), timeout=30).tolist() == [20] * 3
    assert ray.get(ahead, timeout=30).tolist() == [20] * 3


def test_a_replica_that_stays_away_is_an_error() -> None:
    side = ParameterServer(Place(0), "alone", timeout_s=1.0)  # type: ignore[arg-type]
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    with pytest.raises(EnvironmentProblemError, match="no gradients of round 0 within 1 s"):
        side.sum_gradients([("weight", weight)], flush=False)


def make(exchange: str) -> MoEConfig:
    settings = [
        "parallel.dp_replicate=2", f"step.exchange={exchange}", "step.precision=float64", "step.steps=6",
        "corpus.max_bytes=200000", "backbone.num_layers=2",
    ]  # fmt: skip
    return load_moe_preset("debug_moe", overrides=settings)


@pytest.mark.slow
def test_training_by_a_server_is_training_by_all_reduce(tmp_path: Path) -> None:
    losses = {}
    for exchange in ("parameter_server", "all_reduce"):
        pretrain_on_ray(make(exchange), tmp_path / exchange)
        losses[exchange] = [line["loss"] for line in read_progress(tmp_path / exchange / PROGRESS).values()]
    assert len(losses["all_reduce"]) == 6
    assert losses["parameter_server"] == pytest.approx(losses["all_reduce"], rel=1e-12)

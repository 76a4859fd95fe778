"""Ray for the time being: the cluster of the job or the caller, else an own one on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from deepseek_ray.errors import EnvironmentProblemError, first_line


@contextmanager
def local_cluster(num_cpus: int) -> Iterator[None]:
    """The cluster of the job or the caller, where there is one; else an own one on this machine for the time being.

    Raises:
        EnvironmentProblemError: Ray does not start, or the cluster does not answer.
    """
    if ray.is_initialized():
        yield
        return
    own: dict[str, Any] = {}
    if not inside_cluster():
        cores = max(num_cpus, os.cpu_count() or 1)
        own = {"include_dashboard": False, "num_cpus": cores, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(address="local" if own else "auto", log_to_driver=False, logging_level="ERROR", **own)
    except Exception as error:  # Ray raises this very class when a node is slow to start
        raise EnvironmentProblemError(
            f"Ray does not start: {first_line(error)}",
            fix="end what keeps the processors busy, or set RAY_raylet_start_wait_time_s=180",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def inside_cluster() -> bool:
    """Whether this process is part of a Ray job, or has connected to a cluster already."""
    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))


def num_nodes() -> int:
    """Machines of the connected cluster that are alive."""
    return sum(node["Alive"] for node in ray.nodes())


def num_cpus() -> int:
    """Cores of the connected cluster that tasks may use, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))

"""Clusters: cluster.yaml, by the functions that ``ray up`` itself runs before it touches a machine."""

from __future__ import annotations

import copy
import importlib.metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from deepseek_ray.cluster import local_cluster
from deepseek_ray.errors import EnvironmentProblemError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return loaded


def prepared(cluster: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    result: dict[str, Any] = prepare_config(copy.deepcopy(cluster))
    validate_config(result)
    return result


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    assert prepared(cluster)["head_node_type"] == "local.cluster.node"


def test_workers_count_once_their_addresses_are_given(cluster: dict[str, Any]) -> None:
    cluster["provider"]["worker_ips"] = ["10.0.0.2", "10.0.0.3"]
    cluster["min_workers"] = cluster["max_workers"] = 2
    node = prepared(cluster)["available_node_types"]["local.cluster.node"]
    assert (node["min_workers"], node["max_workers"]) == (2, 2)


def test_the_validation_is_a_real_one(cluster: dict[str, Any]) -> None:
    cluster["no_such_field"] = 1
    with pytest.raises(jsonschema.ValidationError, match="no_such_field"):
        prepared(cluster)


def test_nodes_get_the_pinned_ray_and_our_own_start_commands(cluster: dict[str, Any]) -> None:
    ready = prepared(cluster)
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert f"ray=={importlib.metadata.version('ray')}" in pins
    assert any("--requirement ~/deepseek-ray/constraints.txt" in line for line in ready["head_setup_commands"])
    assert any("--requirement ~/deepseek-ray/constraints.txt" in line for line in ready["worker_setup_commands"])
    for start in (ready["head_start_ray_commands"], ready["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in start[-1]


def test_mounted_files_of_the_repository_exist(cluster: dict[str, Any]) -> None:
    ours = [source for source in cluster["file_mounts"].values() if not source.startswith("~")]
    assert ours == [source for source in ours if (ROOT / source).is_file()] != []


def test_a_ray_that_does_not_start_is_one_line_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nmore")

    monkeypatch.setattr(ray, "init", slow)
    refused = pytest.raises(EnvironmentProblemError, match=r"timed out during startup\. Fix: end what keeps")
    with refused, local_cluster(1):
        pass

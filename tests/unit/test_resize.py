"""Which mesh runs on what is offered."""

from __future__ import annotations

import pytest

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.parallel.mesh import check_mesh
from deepseek_ray.parallel.resize import fit_mesh
from deepseek_ray.presets_moe import load_moe_preset
from tests.distributed.meshes import overrides


def config_of(mesh: str, schedule: str = "1F1B", **settings: object) -> MoEConfig:
    return load_moe_preset("debug_moe", overrides=overrides(mesh, schedule, **settings))


@pytest.mark.parametrize(("offered", "world"), [(2, 2), (3, 2), (4, 4), (5, 4), (6, 6), (7, 6), (8, 8), (9, 8)])
@pytest.mark.parametrize("model", ["tp=2", "pp=2"])
def test_whole_replicas_of_the_model_fill_what_is_offered(offered: int, world: int, model: str) -> None:
    config = config_of(f"{model},dp_shard=4", step__batch_size=24, step__micro_batch_size=1)
    fitted = fit_mesh(config, offered)
    assert fitted.parallel.world == world
    assert (fitted.parallel.tp, fitted.parallel.pp) == (config.parallel.tp, config.parallel.pp)
    assert fitted.step == config.step
    check_mesh(fitted)


def test_one_process_cannot_hold_a_model_cut_in_two() -> None:
    with pytest.raises(ConfigError, match=r"pp \* tp = 2 fits 1 processes.*offer 2 processes"):
        fit_mesh(config_of("tp=2"), 1)


@pytest.mark.parametrize(("offered", "shard", "ep"), [(1, 1, 1), (2, 2, 2), (3, 3, 1), (4, 4, 4), (6, 6, 2)])
def test_ep_shrinks_to_what_divides_the_shards(offered: int, shard: int, ep: int) -> None:
    config = config_of("dp_shard=4,ep=4", step__batch_size=24, step__micro_batch_size=1, backbone__d_model=48)
    fitted = fit_mesh(config, offered)
    assert (fitted.parallel.dp_shard, fitted.parallel.ep) == (shard, ep)


def test_a_size_that_does_not_divide_the_batch_is_passed_over() -> None:
    config = config_of("dp_shard=4")  # batches of 8 in micro-batches of 2
    assert [fit_mesh(config, offered).parallel.dp_shard for offered in range(1, 10)] == [1, 2, 2, 4, 4, 4, 4, 4, 4]


@pytest.mark.parametrize(("offered", "replicate", "shard"), [(2, 2, 1), (3, 1, 3), (4, 2, 2), (6, 2, 3), (8, 2, 4)])
def test_replicas_stay_where_the_number_is_even(offered: int, replicate: int, shard: int) -> None:
    config = config_of("dp_replicate=2,dp_shard=2", step__batch_size=24, step__micro_batch_size=1)
    degrees = fit_mesh(config, offered).parallel
    assert (degrees.dp_replicate, degrees.dp_shard) == (replicate, shard)


def test_the_last_reason_is_told_when_nothing_fits() -> None:
    config = config_of("pp=2", "DualPipeV", step__batch_size=3, step__micro_batch_size=1)
    with pytest.raises(ConfigError, match=r"No mesh with pp \* tp = 2 fits 4 processes\. .*3 micro-batches"):
        fit_mesh(config, 4)


def test_the_mesh_that_was_asked_for_is_left_as_it_is() -> None:
    config = config_of("pp=2,dp_shard=2,tp=2,ep=2", "DualPipeV", step__micro_batch_size=1)
    assert fit_mesh(config, 8) == config

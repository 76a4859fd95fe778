"""Which mesh to run on when the number of processes is not the one that was asked for."""

from __future__ import annotations

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.parallel.mesh import check_mesh


def fit_mesh(config: MoEConfig, offered: int) -> MoEConfig:
    """The config on the largest mesh of at most ``offered`` processes; what is left over stays spare.

    tp, pp and the schedule stay: they are one replica of the model. The data axes take what there is room for, so the
    mesh is a multiple of pp * tp; the global batch, and with it the order of the data, stays too. ep shrinks to the
    largest divisor that still divides dp_shard.

    Raises:
        ConfigError: not even one replica fits.
    """
    degrees, problem = config.parallel, ""
    for data in range(min(offered // degrees.model, config.step.batch_size), 0, -1):
        replicate = degrees.dp_replicate if data % degrees.dp_replicate == 0 else 1
        shard = data // replicate
        ep = max(d for d in range(1, degrees.ep + 1) if degrees.ep % d == 0 and shard % d == 0)
        changed = degrees.model_copy(update={"dp_replicate": replicate, "dp_shard": shard, "ep": ep})
        smaller = config.model_copy(update={"parallel": changed})
        try:
            check_mesh(smaller)
        except ConfigError as error:
            problem = error.message
            continue
        return smaller
    raise ConfigError(
        f"No mesh with pp * tp = {degrees.model} fits {offered} processes. {problem}".strip(),
        fix=f"offer {degrees.model} processes or more, or change the batch",
    )

"""The device mesh: which process sits where on the axes pp, dp_replicate, dp_shard (with ep folded in) and tp.

One set of processes is seen in two layouts: dense weights live on (pp, dp_replicate, dp_shard, tp), experts on
(pp, dp_replicate, efsdp, ep, tp), where ``efsdp * ep = dp_shard``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from deepseek_ray.config_moe import MoEConfig, ParallelConfig
from deepseek_ray.errors import ConfigError

V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
INTERLEAVED = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")


@dataclass(frozen=True)
class Mesh:
    """Both layouts of the processes.

    Attributes:
        degrees: the sizes of the axes.
        dense: axes pp, dp_replicate, dp_shard, tp.
        sparse: axes pp, dp_replicate, efsdp, ep, tp.
    """

    degrees: ParallelConfig
    dense: DeviceMesh
    sparse: DeviceMesh
    data: DeviceMesh

    @classmethod
    def build(cls, degrees: ParallelConfig, device: str = "cpu") -> Mesh:
        """Lay the axes over the default process group.

        Raises:
            ConfigError: the group has another number of processes than the mesh.
        """
        if dist.get_world_size() != degrees.world:
            raise ConfigError(
                f"pp * dp_replicate * dp_shard * tp = {degrees.world}, not the {dist.get_world_size()} processes here.",
                fix="change a degree or the number of workers",
            )
        world = init_device_mesh(device, (degrees.world,), mesh_dim_names=("world",))
        pp, replicate, shard, ep, tp = degrees.pp, degrees.dp_replicate, degrees.dp_shard, degrees.ep, degrees.tp
        dense = world._unflatten(0, (pp, replicate, shard, tp), ("pp", "dp_replicate", "dp_shard", "tp"))
        sizes = (pp, replicate, shard // ep, ep, tp)
        sparse = world._unflatten(0, sizes, ("pp", "dp_replicate", "efsdp", "ep", "tp"))
        return cls(degrees, dense, sparse, dense["dp_replicate", "dp_shard"]._flatten("dp"))

    def rank(self, axis: str) -> int:
        """This process's place on an axis; ``dp`` is dp_replicate and dp_shard together."""
        return self._axis(axis).get_local_rank()

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes that differ from this one on an axis only."""
        return self._axis(axis).get_group()

    def _axis(self, axis: str) -> DeviceMesh:
        if axis == "dp":
            return self.data
        return (self.sparse if axis in ("efsdp", "ep") else self.dense)[axis]


def num_stages(degrees: ParallelConfig) -> int:
    """Stages of the pipeline over all processes."""
    default = 2 if degrees.schedule in (*V_SHAPED, *INTERLEAVED) else 1
    return degrees.pp * (degrees.stages_per_rank or default) if degrees.pp > 1 else 1


def stages_of(degrees: ParallelConfig, rank: int) -> list[int]:
    """Stage numbers of one process of the pipeline: every pp-th, or a V (first and last on process 0)."""
    total = num_stages(degrees)
    if degrees.schedule in V_SHAPED and degrees.pp > 1:
        return [rank, total - 1 - rank]
    return list(range(rank, total, degrees.pp))


def num_micro_batches(config: MoEConfig) -> int:
    """Forward passes of a step on one process."""
    return config.step.batch_size // (config.parallel.data * config.step.micro_batch_size)


def check_mesh(config: MoEConfig) -> None:
    """Refuse degrees that the model, the batch or the schedule does not allow.

    Raises:
        ConfigError: the equation that failed, with its numbers.
    """
    shape, degrees, step, tp = config.backbone, config.parallel, config.step, config.parallel.tp
    rows = degrees.data * step.micro_batch_size
    _divides("parallel.dp_shard", degrees.dp_shard, "parallel.ep", degrees.ep)
    _divides("backbone.num_experts", shape.num_experts, "parallel.ep", degrees.ep)
    for name in ("num_heads", "num_kv_heads", "d_dense", "d_expert"):
        _divides(f"backbone.{name}", getattr(shape, name), "parallel.tp", tp)
    _divides("corpus.seq_len", config.corpus.seq_len, "parallel.tp", tp)
    if shape.adapter == "tokens" or shape.head == "language":
        _divides("backbone.vocab_size", shape.vocab_size, "parallel.tp", tp)
    _divides("step.batch_size", step.batch_size, "dp_replicate * dp_shard * step.micro_batch_size", rows)
    local_experts, efsdp = shape.num_experts // degrees.ep, degrees.dp_shard // degrees.ep
    if degrees.ep > 1 and local_experts % efsdp:  # then they are dealt by width
        _divides("backbone.d_model", shape.d_model, "dp_shard / ep", efsdp)
    if degrees.pp > 1:
        _check_pipeline(config)


def _check_pipeline(config: MoEConfig) -> None:
    degrees, batches, total = config.parallel, num_micro_batches(config), num_stages(config.parallel)
    each, schedule = total // degrees.pp, degrees.schedule
    if config.backbone.num_layers < total:
        raise ConfigError(
            f"backbone.num_layers = {config.backbone.num_layers} < {total} pipeline stages "
            f"(pp = {degrees.pp}, {each} a process with {schedule}).",
            fix="take more layers, a smaller pp or another schedule",
        )
    wanted = {"GPipe": each == 1, "1F1B": each == 1} | dict.fromkeys(V_SHAPED, each == 2)
    if not wanted.get(schedule, each >= 2):
        need = {"GPipe": "1", "1F1B": "1"} | dict.fromkeys(V_SHAPED, "2")
        raise ConfigError(
            f"parallel.stages_per_rank = {each} with schedule {schedule}.",
            fix=f"{schedule} takes {need.get(schedule, '2 or more')}; 0 chooses",
        )
    least = {"1F1B": total, "DualPipeV": total}.get(schedule, 1)
    rounds = max(1, batches // degrees.pp)
    if batches < least or (schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and batches % rounds):
        rule = f">= {least}" if batches < least else f"a multiple of {rounds} = micro-batches // pp"
        raise ConfigError(
            f"batch_size / (dp_replicate * dp_shard * micro_batch_size) = {batches} micro-batches, must be {rule} for "
            f"{schedule} with {total} stages.",
            fix="change step.batch_size or step.micro_batch_size",
        )


def _divides(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise ConfigError(
            f"{name} % ({divisor_name}) = {value} % {divisor} = {value % divisor}, must be 0.",
            fix=f"change {name} or {divisor_name}",
        )

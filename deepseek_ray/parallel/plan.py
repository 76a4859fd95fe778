"""Which mesh for how many GPUs: memory, bubble and traffic of every legal one, from closed forms (docs/parallelism.md).

All sizes are those of the process that holds most. Times follow stated rates: good for ranking, no promise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deepseek_ray.config_moe import MoEConfig, ParallelConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.models.counts import count, flops_per_token
from deepseek_ray.parallel.mesh import check_mesh, num_micro_batches, num_stages, stages_of
from deepseek_ray.parallel.pipeline import layers_of

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What the processes run on; defaults are an H100/H200 node in bfloat16.

    Attributes:
        memory_gib: of one GPU.
        gpus_per_node: that share the fast links.
        flops: operations a second that large products reach on one GPU.
        node_bytes: bytes a second between GPUs of a node, one direction.
        network_bytes: between nodes, a GPU's share.
    """

    memory_gib: float = 80.0
    gpus_per_node: int = 8
    flops: float = 500e12
    node_bytes: float = 300e9
    network_bytes: float = 40e9


@dataclass(frozen=True)
class Plan:
    """One mesh and what it is expected to need; sizes in GiB, shares of 1, seconds."""

    degrees: ParallelConfig
    weights_gib: float
    gradients_gib: float
    optimiser_gib: float
    activations_gib: float
    bubble: float
    traffic_s: float
    step_s: float

    @property
    def memory_gib(self) -> float:
        """Everything together."""
        return self.weights_gib + self.gradients_gib + self.optimiser_gib + self.activations_gib

    def mesh(self) -> str:
        """As ``--mesh`` takes it."""
        parts = [(axis, getattr(self.degrees, axis)) for axis in ("pp", "dp_replicate", "dp_shard", "tp", "ep")]
        return ",".join(f"{axis}={degree}" for axis, degree in parts if degree > 1) or "dp_shard=1"


def propose(config: MoEConfig, num_gpus: int, machine: Machine, *, bytes_each: int = 2) -> list[Plan]:
    """Every legal mesh of ``num_gpus`` processes that fits, the fastest first.

    Args:
        config: shape and batch; its degrees are replaced.
        num_gpus: processes.
        machine: what they run on.
        bytes_each: of a number in computing; weights, moments and reduced gradients have at least four.

    Raises:
        ConfigError: no mesh is legal, or none fits; names the smallest one and what it lacks.
    """
    plans = [evaluate(one, machine, bytes_each=bytes_each) for one in _legal(config, num_gpus)]
    if not plans:
        raise ConfigError(
            f"No mesh of {num_gpus} processes suits the model and step.batch_size = {config.step.batch_size}.",
            fix="change the number of GPUs or the batch",
        )
    fitting = [plan for plan in plans if plan.memory_gib <= machine.memory_gib]
    if not fitting:
        least = min(plans, key=lambda plan: plan.memory_gib)
        raise ConfigError(
            f"No mesh of {num_gpus} GPUs fits {machine.memory_gib:g} GiB; the smallest, {least.mesh()}, "
            f"needs {least.memory_gib:.1f} GiB.",
            fix="take more GPUs, a shorter corpus.seq_len, or step.recompute=full",
        )
    return sorted(fitting, key=lambda plan: (plan.step_s, plan.memory_gib))


def evaluate(config: MoEConfig, machine: Machine, *, bytes_each: int = 2) -> Plan:
    """What one mesh is expected to need."""
    master = max(bytes_each, 4)
    whole, expert = _held(config)
    degrees, dense = config.parallel, whole - expert
    sharded = dense / (degrees.tp * degrees.dp_shard) + expert / (degrees.tp * degrees.dp_shard)
    gathered = dense / degrees.tp + expert / (degrees.tp * degrees.ep)
    # computing needs gathered weights: of one layer, or of the stage where they are kept for all micro-batches; alone
    # there is nothing to gather, but low precision takes a copy
    layers = config.backbone.num_layers / degrees.pp
    kept = gathered * (1 if degrees.pp > 1 else min(1, 2 / layers)) * bytes_each
    accumulated = gathered * master / (1 if num_micro_batches(config) > 1 else layers)
    if degrees.world == 1:
        kept, accumulated = whole * bytes_each * (bytes_each < master), 0.0
    bubble, traffic = bubble_share(config), _traffic_s(config, machine, bytes_each)
    tokens = config.step.batch_size * config.corpus.seq_len
    flops = flops_per_token(config.backbone, config.corpus.seq_len, recompute=config.step.recompute == "full") * tokens
    return Plan(
        degrees, (sharded * master + kept) / GIB, (sharded * master + accumulated) / GIB, 2 * sharded * master / GIB,
        activation_bytes(config, bytes_each) / GIB, bubble, traffic,
        flops / (degrees.world * machine.flops) / (1 - bubble) + traffic,
    )  # fmt: skip


def bubble_share(config: MoEConfig) -> float:
    """Share of the time that a process waits for others, forward : input gradient : weight gradient = 1 : 1 : 1.

    With p processes, v stages on each and m micro-batches a process is busy for 3m; it waits 3(p - 1) in GPipe and 1F1B
    (Narayanan et al. 2021, arXiv:2104.04473), 1/v of that interleaved, a third of that when weight gradients fill the
    gap (Qi et al. 2023, arXiv:2401.10241), not at all in ZBV once m >= 2p (arXiv:2405.15362). In DualPipeV it is p - 1
    times a forward and two backward passes less three weight gradients, each of half a process's layers: DualPipe's
    figure (arXiv:2412.19437, table 2) for 2p stages.
    """
    processes, batches = config.parallel.pp, num_micro_batches(config)
    if processes == 1:
        return 0.0
    stages, schedule = num_stages(config.parallel) // processes, config.parallel.schedule
    wait = 3.0 * (processes - 1) / stages
    if schedule == "InterleavedZeroBubble":
        wait /= 3
    elif schedule == "ZBVZeroBubble":
        wait = 0.0 if batches >= 2 * processes else wait / 3
    elif schedule == "DualPipeV":
        wait = max(0.0, (processes - 1) * (3.0 + 2.0 - 3.0) / 2)
    return wait / (3.0 * batches + wait)


def activation_bytes(config: MoEConfig, bytes_each: int) -> float:
    """Activations on the process that holds most, when its backward pass begins.

    The pipeline's first process holds p micro-batches of its stages in 1F1B and its kin, all of them in GPipe and
    LoopedBFS. To them come the head's logarithms of probabilities with their gradient, in float32, and, with full
    recomputation, one layer that is computed again.
    """
    degrees, shape = config.parallel, config.backbone
    tokens = config.step.micro_batch_size * config.corpus.seq_len
    numbers = range(shape.num_layers)
    per_layer = [_layer_bytes(config, number, bytes_each) for number in numbers]
    stages = [sum(per_layer[number] for number in part) for part in _stage_layers(config)]
    held = max(sum(stages[stage] for stage in stages_of(degrees, rank)) for rank in range(degrees.pp))
    flight = num_micro_batches(config) if degrees.schedule in ("GPipe", "LoopedBFS") else degrees.pp
    copies = min(flight, num_micro_batches(config)) if degrees.pp > 1 else 1
    again = 0.0
    if config.step.recompute == "full":
        plain = config.model_copy(update={"step": config.step.model_copy(update={"recompute": "none"})})
        again = max(_layer_bytes(plain, number, bytes_each) for number in numbers)
    head = (3 * shape.d_model * bytes_each + 2 * 4 * shape.vocab_size) / degrees.tp
    return tokens * (held * copies + again + head)


def _layer_bytes(config: MoEConfig, number: int, bytes_each: int) -> float:
    """Bytes that one token leaves in one layer; what is sharded by tp counts its part."""
    shape, tp = config.backbone, config.parallel.tp
    width, recompute = shape.d_model, config.step.recompute
    if recompute == "full":
        return width * bytes_each / tp
    heads, pairs = shape.num_heads * shape.d_head, 2 * shape.num_kv_heads * shape.d_head
    norms = 2 * (1 if recompute == "selective" else 2) * width / tp + 2 * width
    attention = (3 * heads + pairs) / tp
    act = 2 if recompute == "selective" else 4
    if number < shape.num_dense_layers:
        feed = act * shape.d_dense / tp
    else:
        routed = shape.top_k * (2 * width + act * shape.d_expert / tp)
        feed = routed + act * shape.num_shared_experts * shape.d_expert / tp
    return float(norms + attention + feed) * bytes_each


def _held(config: MoEConfig) -> tuple[float, float]:
    """Weights before sharding, and routed experts among them, of the process of the pipeline that holds most."""
    shape, counts = config.backbone, count(config.backbone)
    total = num_stages(config.parallel)
    found = []
    for stage, numbers in enumerate(_stage_layers(config)):
        sparse = sum(number >= shape.num_dense_layers for number in numbers)
        weights = sparse * counts.block + (len(numbers) - sparse) * counts.dense_block
        weights += counts.embedding * (stage == 0) + counts.head * (stage == total - 1)
        found.append((weights, sparse * counts.experts))
    ranks = [[found[stage] for stage in stages_of(config.parallel, rank)] for rank in range(config.parallel.pp)]
    return max((sum(w for w, _ in part), sum(e for _, e in part)) for part in ranks)


def _stage_layers(config: MoEConfig) -> list[list[int]]:
    total = num_stages(config.parallel)
    return [layers_of(config.backbone.num_layers, total, stage) for stage in range(total)]


def _traffic_s(config: MoEConfig, machine: Machine, bytes_each: int) -> float:
    """Seconds a step in exchanges that nothing hides: sequences of tp, tokens of ep, half of the weights of dp."""
    degrees, shape = config.parallel, config.backbone
    tokens = config.step.batch_size * config.corpus.seq_len / degrees.data
    layers = shape.num_layers / degrees.pp
    near = machine.gpus_per_node

    def rate(reach: int) -> float:
        return machine.node_bytes if reach <= near else machine.network_bytes

    gathers = 8 * tokens * shape.d_model * bytes_each * layers * (degrees.tp - 1) / degrees.tp / rate(degrees.tp)
    moved = 4 * tokens * shape.top_k * shape.d_model * bytes_each * layers * (degrees.ep - 1) / degrees.ep
    experts = moved / rate(degrees.tp * degrees.ep)
    weights = sum(_held(config)[:1]) / degrees.tp * 3 * bytes_each * (degrees.dp_shard > 1)
    times = 1 if degrees.pp > 1 else num_micro_batches(config)
    shards = weights * times / rate(degrees.tp * degrees.dp_shard) / 2
    return float(gathers + experts + shards)


def _legal(config: MoEConfig, num_gpus: int) -> Iterator[MoEConfig]:
    """Meshes of exactly that many processes, with the schedules that suit their depth."""
    divisors = [number for number in range(1, num_gpus + 1) if num_gpus % number == 0]
    for pp in divisors:
        for tp in (number for number in divisors if num_gpus // pp % number == 0 and number <= 8):
            shard = num_gpus // pp // tp
            for ep in (number for number in divisors if shard % number == 0):
                for schedule in ("1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV") if pp > 1 else ("1F1B",):
                    degrees = {"pp": pp, "tp": tp, "dp_shard": shard, "dp_replicate": 1, "ep": ep, "schedule": schedule}
                    parallel = ParallelConfig.model_validate(degrees)
                    one = config.model_copy(update={"parallel": parallel})
                    if _is_legal(one):
                        yield one


def _is_legal(config: MoEConfig) -> bool:
    try:
        check_mesh(config)
    except ConfigError:
        return False
    return True

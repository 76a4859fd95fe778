"""Does a mesh compute what one process computes? Both train from the same seed on the same samples; all is compared.

Figures are computed in float64 on whole tensors. The gradient difference is DualPipe's: 1 - 2<a, b> / (|a|^2 + |b|^2),
which also sees a wrong scale.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from deepseek_ray.config_moe import MoEConfig, ParallelConfig
from deepseek_ray.data.samples import RandomSamples
from deepseek_ray.parallel.launch import run_processes
from deepseek_ray.parallel.mesh import check_mesh, num_stages
from deepseek_ray.train.callbacks import Callback
from deepseek_ray.train.precision import precision_of
from deepseek_ray.train.pretrain_step import Stepper, StepReport
from deepseek_ray.train.pretrain_trainer import run_on_ray
from deepseek_ray.train.pretrain_worker import server_of
from deepseek_ray.train.pretraining import MakeServer, make_stepper, own_device

# gathering a whole gradient takes two steps where experts are dealt twice: slow, as it says, and meant
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

BOUNDS = {"float32": (1e-6, 1e-10, math.inf), "float64": (1e-12, 1e-13, 1e-10)}
"""Type -> most relative loss difference, gradient difference, parameter difference."""

_CPU = torch.device("cpu")


@dataclass
class Parity:
    """What was compared, and how far apart it was.

    Attributes:
        world_size: processes of the mesh.
        steps: AdamW steps.
        dtype: of weights and computing.
        loss_rel_diff: by step.
        grad_cosine_diff: by step.
        max_param_diff: after the last step; router biases included.
        max_count_diff: of the tokens an expert got, over all steps.
    """

    world_size: int
    steps: int
    dtype: str
    loss_rel_diff: list[float] = field(default_factory=list)
    grad_cosine_diff: list[float] = field(default_factory=list)
    max_param_diff: float = 0.0
    max_count_diff: int = 0

    @property
    def passed(self) -> bool:
        """Finite, within the bounds of the type, and every expert got the same tokens."""
        bounds = BOUNDS[self.dtype]
        found = (*self.loss_rel_diff, *self.grad_cosine_diff, self.max_param_diff)
        worst = (max(self.loss_rel_diff), max(self.grad_cosine_diff), self.max_param_diff)
        near = all(one <= bound for one, bound in zip(worst, bounds, strict=True))
        return all(map(math.isfinite, found)) and near and self.max_count_diff == 0

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        worst = {
            "max_loss_rel_diff": max(self.loss_rel_diff),
            "max_grad_cosine_diff": max(self.grad_cosine_diff),
        }
        return {"pass": self.passed, **worst, **asdict(self)}


def verification_config(config: MoEConfig) -> MoEConfig:
    """The config with the smallest batch that its mesh and schedule take; it starts without warm-up."""
    degrees = config.parallel
    batches = 2 * num_stages(degrees) if degrees.pp > 1 else 2
    step = {"micro_batch_size": 1, "batch_size": degrees.data * batches, "warmup_fraction": 0.0}
    return config.model_copy(update={"step": config.step.model_copy(update=step)})


def verify_mesh(config: MoEConfig, steps: int, *, on_ray: bool = False, shared: Path | None = None) -> Parity:
    """Train ``steps`` steps on a mesh and in one process, and compare.

    Args:
        config: shape, degrees, batch; ``step.precision`` is float32 or float64.
        steps: AdamW steps.
        on_ray: run on Ray Train, on its workers' GPUs where they have some, instead of in processes on this CPU.
        shared: storage that every node of the cluster sees; a temporary folder without it.

    Raises:
        ConfigError: the mesh does not fit the model or the batch.
        EnvironmentProblemError: a process failed.
    """
    check_mesh(config)
    alone = config.model_copy(update={"parallel": ParallelConfig()})
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        meshed, single = Path(folder) / "mesh", Path(folder) / "one"
        if on_ray:  # the one process is a worker too: the same kind of device
            for one, target in ((config, meshed), (alone, single)):
                run_on_ray(one, _record_loop, {"config": one.model_dump(), "steps": steps, "folder": str(target)})
        else:
            run_processes(config.parallel.world, record, config, steps, meshed, timeout_s=config.cluster.timeout_s)
            record(alone, steps, single)
        result = Parity(config.parallel.world, steps, config.step.precision)
        ours, wanted = _reports(meshed), _reports(single)[0]
        for step in range(steps):
            reports = [one[step] for one in ours]
            _compare_step(result, reports, wanted[step], _read(meshed, f"grad-{step}"), _read(single, f"grad-{step}"))
        pairs = _pairs(_read(meshed, "weights"), _read(single, "weights"))
        result.max_param_diff = float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())  # NaN stays NaN
    return result


def record(
    config: MoEConfig, steps: int, folder: Path, device: torch.device = _CPU, make_server: MakeServer | None = None
) -> None:
    """Train, and write whole gradients of every step and the weights at the end; one process of each stage writes.

    Gradients are written as AdamW gets them but for clipping: summed over all replicas, however they are exchanged.
    """
    dtype = precision_of(config.step.precision, device)[0]
    samples = RandomSamples(config.backbone, config.corpus.seq_len, config.seed, dtype)
    stepper = make_stepper(config, samples, device, make_server)
    folder.mkdir(parents=True, exist_ok=True)
    stepper.callbacks.append(_GradientFiles(folder))
    reports = [stepper.step(number) for number in range(steps)]
    biases = {f"layers.{number}.feed.router.bias_E": r.bias_E for number, r in stepper.model.routers().items()}
    _write(stepper, folder / "weights", {**dict(stepper.model.named_parameters()), **biases})
    rank = dist.get_rank() if dist.is_initialized() else 0
    (folder / f"reports-{rank:04d}.json").write_text(json.dumps([asdict(one) for one in reports]), encoding="utf-8")


class _GradientFiles(Callback):
    """Writes the gradients of every step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def before_update(self, stepper: Stepper, number: int) -> None:
        """Write."""
        gradients = {name: weight.grad for name, weight in stepper.model.named_parameters() if weight.grad is not None}
        _write(stepper, self.folder / f"grad-{number}", gradients)


def _record_loop(settings: dict[str, Any]) -> None:
    """:func:`record` in a worker of Ray Train."""
    torch.set_num_threads(1)
    config = MoEConfig.model_validate(settings["config"])
    record(config, settings["steps"], Path(settings["folder"]), own_device(), server_of(config))


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor; every process of its mesh calls this."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _write(stepper: Stepper, target: Path, tensors: dict[str, Tensor]) -> None:
    gathered = {name: whole(tensor).contiguous() for name, tensor in tensors.items()}
    mesh = stepper.model.mesh
    if mesh is None or (mesh.rank("dp") == 0 and mesh.rank("tp") == 0):
        stage = mesh.rank("pp") if mesh else 0
        save_file(gathered, f"{target}.{stage}.safetensors")


def _reports(folder: Path) -> list[list[StepReport]]:
    """By rank, then by step."""
    found = []
    for file in sorted(folder.glob("reports-*.json")):
        lines = json.loads(file.read_text(encoding="utf-8"))
        loads = [{int(layer): counts for layer, counts in line.pop("load").items()} for line in lines]
        found.append([StepReport(**line, load=load) for line, load in zip(lines, loads, strict=True)])
    return found


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    parts = [load_file(file) for file in sorted(folder.glob(f"{name}.*.safetensors"))]
    return {key: tensor.double() for part in parts for key, tensor in part.items()}


def _pairs(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    assert ours.keys() == wanted.keys(), sorted(ours.keys() ^ wanted.keys())
    return ((ours[name], wanted[name]) for name in wanted)


def _compare_step(
    result: Parity, ours: list[StepReport], wanted: StepReport, gradients: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    result.loss_rel_diff.append(max(abs(one.loss - wanted.loss) / abs(wanted.loss) for one in ours))
    both = same = 0.0
    for a, b in _pairs(gradients, truth):
        same += float((a * b).sum())
        both += float(a.square().sum() + b.square().sum())
    result.grad_cosine_diff.append(abs(1.0 - 2.0 * same / both))
    for one in ours:
        for layer, counts in one.load.items():
            gap = max(abs(a - b) for a, b in zip(counts, wanted.load[layer], strict=True))
            result.max_count_diff = max(result.max_count_diff, gap)

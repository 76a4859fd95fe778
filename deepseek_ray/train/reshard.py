"""Is a checkpoint the same on every mesh? Train on one, save, load on another, save there, compare bit by bit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_ray.config_moe import MoEConfig, ParallelConfig
from deepseek_ray.data.samples import RandomSamples
from deepseek_ray.parallel.launch import run_processes
from deepseek_ray.parallel.mesh import check_mesh
from deepseek_ray.train.mesh_checkpoint import CheckpointWriter, load_newest, tensors_of
from deepseek_ray.train.parity import whole
from deepseek_ray.train.precision import precision_of
from deepseek_ray.train.pretrain_step import Stepper
from deepseek_ray.train.pretraining import make_stepper

STEPS = 2
_FINGERPRINT = "reshard"


def verify_checkpoint(source: MoEConfig, target: MoEConfig) -> dict[str, Any]:
    """Compare weights, moments and router biases as they were trained on ``source`` with what ``target`` saved.

    Both checkpoints are read by one process, and so are the tensors that training ended with.

    Returns:
        ``pass``, ``tensors``, ``bytes``, ``different`` (names) and the sizes of both meshes.

    Raises:
        ConfigError: a mesh does not fit the model or the batch.
        EnvironmentProblemError: a process failed.
    """
    for config in (source, target):
        check_mesh(config)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "source", Path(folder) / "target"
        trained = _merged(run_processes(source.parallel.world, train_and_save, source, first))
        run_processes(target.parallel.world, load_and_save, target, first, second)
        alone = source.model_copy(update={"parallel": ParallelConfig()})
        saved, again = load_alone(alone, first), load_alone(alone, second)
    names = sorted(trained.keys() | saved.keys() | again.keys())
    different = [
        name
        for name in names
        if not all(name in one and torch.equal(one[name], trained[name]) for one in (saved, again, trained))
    ]
    size = sum(tensor.numel() * tensor.element_size() for tensor in trained.values())
    return {
        "pass": not different, "tensors": len(names), "bytes": size, "different": different,
        "world_sizes": [source.parallel.world, target.parallel.world],
    }  # fmt: skip


def train_and_save(config: MoEConfig, folder: Path) -> dict[str, Tensor]:
    """A few steps and a checkpoint; returns this stage's whole tensors on one of its processes."""
    stepper = _stepper(config)
    for number in range(STEPS):
        stepper.step(number)
    _save(stepper, folder)
    gathered = {name: whole(tensor).clone() for name, tensor in tensors_of(stepper).items()}
    mesh = stepper.model.mesh
    return gathered if mesh is None or mesh.rank("dp") == mesh.rank("tp") == 0 else {}


def load_and_save(config: MoEConfig, source: Path, target: Path) -> None:
    """Load a checkpoint of any mesh and save it from this one."""
    stepper = _stepper(config)
    assert load_newest(source, _FINGERPRINT, stepper) == STEPS
    _save(stepper, target)


def load_alone(config: MoEConfig, folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, loaded by one process."""
    stepper = _stepper(config)
    assert load_newest(folder, _FINGERPRINT, stepper) == STEPS
    return tensors_of(stepper)


def _stepper(config: MoEConfig) -> Stepper:
    device = torch.device("cpu")
    dtype = precision_of(config.step.precision, device)[0]
    return make_stepper(config, RandomSamples(config.backbone, config.corpus.seq_len, config.seed, dtype), device)


def _save(stepper: Stepper, folder: Path) -> None:
    writer = CheckpointWriter(folder, _FINGERPRINT)
    writer.save(STEPS, stepper)
    writer.close()


def _merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}

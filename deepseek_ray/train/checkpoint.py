"""Checkpoints of the card-fraud model: weights and optimiser in a folder that its manifest declares complete."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deepseek_ray.errors import CheckpointError
from deepseek_ray.models import RiskModel
from deepseek_ray.train import manifest
from deepseek_ray.train.manifest import MANIFEST

_MODEL = "model.safetensors"
_OPTIMISER = "optimiser.pt"
_PREFIX = "epoch"

__all__ = ["MANIFEST", "Checkpoint", "latest", "save", "verify"]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, verified when it was found.

    Args:
        path: its folder.
        epoch: epochs that are done.
        notes: what the writer added: history, fingerprint of the job.
    """

    path: Path
    epoch: int
    notes: Mapping[str, Any]

    def restore(self, model: RiskModel, optimiser: torch.optim.Optimizer) -> None:
        """Load weights, buffers and optimiser state in place.

        Raises:
            CheckpointError: the state is that of another model.
        """
        try:
            model.load_state_dict(load_file(self.path / _MODEL))
            optimiser.load_state_dict(torch.load(self.path / _OPTIMISER, weights_only=True))
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"Checkpoint {str(self.path)!r} holds another model: {error}.", fix="remove the checkpoint folder"
            ) from error


def save(
    folder: Path,
    epoch: int,
    model: RiskModel,
    optimiser: torch.optim.Optimizer,
    notes: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write a checkpoint and drop all but the ``keep`` newest. One process calls this.

    Args:
        folder: checkpoints of one job.
        epoch: epochs that are done.
        model: weights and buffers.
        optimiser: its state.
        notes: plain data to keep in the manifest.
        keep: complete checkpoints that stay.

    Raises:
        CheckpointError: the disk refuses.
    """
    target = folder / f"{_PREFIX}-{epoch:06d}"
    try:
        shutil.rmtree(target, ignore_errors=True)  # a torn one from before a crash
        target.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, target / _MODEL)
        torch.save(optimiser.state_dict(), target / _OPTIMISER)
        manifest.commit(target, {"epoch": epoch, "notes": dict(notes)})
    except OSError as error:
        raise CheckpointError(
            f"Checkpoint {str(target)!r} cannot be written: {error.strerror}.", fix="free space or change permissions"
        ) from error
    manifest.prune(folder, _PREFIX, keep)
    return target


def latest(folder: Path, fingerprint: str) -> Checkpoint | None:
    """The newest complete checkpoint of the same job, or None.

    Args:
        folder: checkpoints of one job.
        fingerprint: ``notes["fingerprint"]`` that a checkpoint must carry to be used.
    """
    found = manifest.newest(folder, _PREFIX, fingerprint)
    return None if found is None else verify(found[0])


def verify(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: the manifest is missing or broken, or a file is missing or changed.
    """
    content = manifest.read(path)
    try:
        epoch, notes = int(content["epoch"]), dict(content["notes"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"Checkpoint {str(path)!r} is torn: {error}.", fix="use an older one") from error
    return Checkpoint(path, epoch, notes)

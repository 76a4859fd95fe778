"""Checkpoints that are complete or do not count.

A checkpoint is a folder; its manifest, written last and moved into place, holds the sha256 of every file. The newest
folder whose files all match wins. A torn or changed one is skipped with a warning, and an older one is used. This is
our own commit: a report to Ray Train is none, because a crash right after it loses the report.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deepseek_ray.errors import CheckpointError
from deepseek_ray.logs import get_logger
from deepseek_ray.models import RiskModel
from deepseek_ray.paths import sync

MANIFEST = "manifest.json"
_MODEL = "model.safetensors"
_OPTIMISER = "optimiser.pt"
_FOLDER = re.compile(r"epoch-(\d{6})")
_log = get_logger(__name__)


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
    target = folder / f"epoch-{epoch:06d}"
    try:
        shutil.rmtree(target, ignore_errors=True)  # a torn one from before a crash
        target.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, target / _MODEL)
        torch.save(optimiser.state_dict(), target / _OPTIMISER)
        _commit(target, {"epoch": epoch, "notes": dict(notes)})
    except OSError as error:
        raise CheckpointError(
            f"Checkpoint {str(target)!r} cannot be written: {error.strerror}.", fix="free space or change permissions"
        ) from error
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def latest(folder: Path, fingerprint: str) -> Checkpoint | None:
    """The newest complete checkpoint of the same job, or None.

    Args:
        folder: checkpoints of one job.
        fingerprint: ``notes["fingerprint"]`` that a checkpoint must carry to be used.
    """
    for path in _folders(folder):
        try:
            found = verify(path)
        except CheckpointError as error:
            _log.warning("skipped a checkpoint: %s", error)
            continue
        if found.notes.get("fingerprint") == fingerprint:
            return found
        _log.info("skipped %s: it belongs to other data or settings", path)
    return None


def verify(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: the manifest is missing or broken, or a file is missing or changed.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files, epoch, notes = dict(manifest["files"]), int(manifest["epoch"]), dict(manifest["notes"])
        changed = [name for name, digest in files.items() if _sha256(path / name) != digest]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"Checkpoint {str(path)!r} is torn: {error}.", fix="use an older one") from error
    if changed or {_MODEL, _OPTIMISER} - files.keys():
        raise CheckpointError(f"Checkpoint {str(path)!r} has changed files: {changed}.", fix="use an older one")
    return Checkpoint(path, epoch, notes)


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, complete or not."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if _FOLDER.fullmatch(path.name)), key=lambda path: path.name, reverse=True)


def _commit(target: Path, content: dict[str, Any]) -> None:
    names = sorted(path.name for path in target.iterdir())
    for name in names:
        sync(target / name)
    content["files"] = {name: _sha256(target / name) for name in names}
    draft = target / f".{MANIFEST}"
    draft.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
    sync(draft)
    os.replace(draft, target / MANIFEST)
    sync(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

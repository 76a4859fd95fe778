"""Checkpoints of training that any other mesh can load: weights, router biases, AdamW's state, loss scale, step.

torch.distributed.checkpoint writes them, each process its own shards, in safetensors (no pickle). Names are those of
the whole model, positions those in the whole tensors: a mesh does not show. The manifest (train/manifest.py) commits.
"""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from deepseek_ray.errors import CheckpointError, first_line
from deepseek_ray.models.pretrained import check
from deepseek_ray.parallel.apply import SpreadModel
from deepseek_ray.train import manifest
from deepseek_ray.train.pretrain_step import Stepper

PREFIX = "step"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_PATIENCE = timedelta(hours=1)
_UPDATES, _LOSS_SCALE = "optimiser.updates", "optimiser.loss_scale"


def tensors_of(stepper: Stepper) -> dict[str, Tensor]:
    """Everything a checkpoint holds, by name; shards are DTensors. Missing moments are created as zeros."""
    model, optimiser = stepper.model, stepper.optimiser
    found: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        found[f"model.{name}"] = weight.detach()
        state = optimiser.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            state.update({moment: torch.zeros_like(weight) for moment in _MOMENTS})
        found |= {f"optimiser.{moment}.{name}": state[moment] for moment in _MOMENTS}
    found[_UPDATES] = state["step"].clone().reshape(1)  # the same for all; fewer than steps after an overflow
    if stepper.scale is not None:
        found[_LOSS_SCALE] = stepper.scale.state()
    return found | {f"model.layers.{number}.feed.router.bias_E": r.bias_E for number, r in model.routers().items()}


class CheckpointWriter:
    """Writes checkpoints of one job, in the background where asked. Every process makes one, at the same time.

    Args:
        folder: of the job; storage that every process sees.
        fingerprint: of the job's settings and data.
        keep: complete checkpoints that stay.
        background: write while training goes on; the next save, and ``close``, wait for it.
    """

    def __init__(self, folder: Path, fingerprint: str, *, keep: int = 2, background: bool = False) -> None:
        self.folder, self.fingerprint, self.keep, self.background = folder, fingerprint, keep, background
        self._group = _patient_group()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, done: int, stepper: Stepper) -> None:
        """Write the state after ``done`` steps.

        Raises:
            CheckpointError: this or the previous one could not be written.
        """
        self.close()
        tensors = tensors_of(stepper)
        if self.background:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            self._thread = threading.Thread(target=self._guarded, args=(done, tensors), name="checkpoint")
            self._thread.start()
        else:
            self._guarded(done, tensors)
            self.close()

    def close(self) -> None:
        """Wait for a checkpoint under way.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(
                f"A checkpoint in {str(self.folder)!r} cannot be written: {_reason(error)}.",
                fix="free space or change permissions; the last complete one is still there",
            ) from error

    def _guarded(self, done: int, tensors: dict[str, Tensor]) -> None:
        try:
            self._write(done, tensors)
        except (Exception, CheckpointException) as error:  # raised again by close(); the second is a BaseException
            self._error = error
            if _is_first():
                shutil.rmtree(self._place(done), ignore_errors=True)  # half of it helps nobody and takes the space

    def _write(self, done: int, tensors: dict[str, Tensor]) -> None:
        target = self._place(done)
        self._first_does(lambda: self._clear(target))
        writer = HuggingFaceStorageWriter(str(target), save_distributed=True)
        with _quiet_alone():
            save_shards(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        self._first_does(lambda: self._commit(target, done))

    def _clear(self, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)  # a torn one from before a crash
        target.mkdir(parents=True)

    def _commit(self, target: Path, done: int) -> None:
        manifest.commit(target, {"step": done, "notes": {"fingerprint": self.fingerprint}})
        manifest.prune(self.folder, PREFIX, self.keep)

    def _first_does(self, work: Callable[[], None]) -> None:
        """Let the first process do something while the others wait, and fail together when it cannot."""
        told: list[Any] = [None]
        if _is_first():
            try:
                work()
            except OSError as error:
                told = [error]
        if self._group is not None:
            dist.broadcast_object_list(told, src=0, group=self._group)
        if told[0] is not None:
            raise told[0]

    def _place(self, done: int) -> Path:
        return self.folder / f"{PREFIX}-{done:06d}"


def load_newest(folder: Path, fingerprint: str, stepper: Stepper) -> int:
    """Load the newest complete checkpoint of a job on any mesh; returns the steps done, 0 without one.

    Raises:
        CheckpointError: its tensors are not those of the model.
    """
    found = manifest.newest(folder, PREFIX, fingerprint) if _is_first() else None
    chosen: list[Any] = [found and (str(found[0]), int(found[1]["step"]))]
    if (group := _patient_group()) is not None:  # one process looks, so that all load the same
        dist.broadcast_object_list(chosen, src=0, group=group)
    if chosen[0] is None:
        return 0
    path, done = chosen[0]
    load(Path(path), stepper)
    return int(done)


def load(path: Path, stepper: Stepper) -> None:
    """Load one checkpoint folder in place.

    Raises:
        CheckpointError: its tensors are not those of the model.
    """
    tensors = tensors_of(stepper)
    try:
        read_shards(tensors, path, alone=not dist.is_initialized())
    except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"Checkpoint {str(path)!r} does not hold this model: {_reason(error)}.",
            fix="use the settings it was made with",
        ) from error
    for _, weight in stepper.model.named_parameters():
        stepper.optimiser.state[weight]["step"].copy_(tensors[_UPDATES].squeeze())
    if stepper.scale is not None:
        stepper.restore_scale(tensors[_LOSS_SCALE])


def import_pretrained(model: SpreadModel, folder: Path) -> None:
    """Load the weights of a pretrained model into a model on any mesh; moments and steps stay as they are.

    Raises:
        ModelFormatError: a file is missing or changed, or the shapes are not the model's.
    """
    check(folder, model.config.backbone)
    names = dict(model.named_parameters())
    wanted = {name: weight.detach() for name, weight in names.items()}
    wanted |= {f"layers.{number}.feed.router.bias_E": router.bias_E for number, router in model.routers().items()}
    read_shards(wanted, folder, alone=not dist.is_initialized())


def read_shards(tensors: dict[str, Tensor], folder: Path, *, alone: bool) -> None:
    """Fill tensors, or this process's shards of them, from safetensors files by name.

    Args:
        tensors: to be overwritten.
        folder: a checkpoint, or a pretrained model.
        alone: only this process reads; else all of the process group do.
    """
    with _quiet_alone():
        load_shards(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)


@contextmanager
def _quiet_alone() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as asked for
        yield


def _patient_group() -> dist.ProcessGroup | None:
    """A group beside training's own, whose processes wait while one of them reads hundreds of gigabytes."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE) if dist.is_initialized() else None


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _reason(error: BaseException) -> str:
    """The first line that says something, of an error that may carry one of each process."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error)

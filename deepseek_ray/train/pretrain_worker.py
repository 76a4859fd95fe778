"""The bridge between pretraining and Ray Train: what runs in each worker process."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.data.corpus import Corpus
from deepseek_ray.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeepseekRayError,
    DivergedError,
    ModelFormatError,
)
from deepseek_ray.logs import get_logger
from deepseek_ray.parallel.resize import fit_mesh
from deepseek_ray.paths import replace_text
from deepseek_ray.train.callbacks import Callback
from deepseek_ray.train.parameter_server import ParameterServer
from deepseek_ray.train.pretrain_step import StepReport
from deepseek_ray.train.pretraining import MakeServer, own_device, pretrain

PROGRESS, WORKERS, FAULT = "progress.jsonl", "workers.jsonl", "fault"
WARNINGS, REFUSAL = "warnings.log", "refusal"
FINAL = (ConfigError, DataError, ModelFormatError, CheckpointError, DivergedError)
"""Errors that a worker meets again when it is started again."""

_log = get_logger(__name__)


def pretrain_loop(settings: dict[str, Any]) -> None:
    """Train on the largest mesh that the workers of this start make; the spare ones leave at once.

    An error that a restart would meet again is left in a file: workers that are started again see it and leave.

    Args:
        settings: ``config`` (plain), ``folder``, ``data_digest``, ``attempt`` (of the driver), and ``fault``, a Fault
            or None.

    Raises:
        DataError: this node's corpus is not the driver's.
    """
    folder, refusal = Path(settings["folder"]), Path(settings["folder"]) / f"{REFUSAL}-{settings['attempt']}"
    if refusal.exists():
        return
    try:
        asked, offered = MoEConfig.model_validate(settings["config"]), dist.get_world_size()
        config = fit_mesh(asked, offered)
        torch.set_num_threads(config.cluster.threads_per_worker)
        if dist.get_rank() == 0:
            _keep_warnings(folder / WARNINGS)
            if config.parallel != asked.parallel:
                _log.warning("%d processes are offered: the mesh is now %s", offered, config.parallel.degrees())
        if _leave_spares(config):
            return
        run_here(config, folder, settings["data_digest"], settings["fault"])
    except FINAL as error:
        plain = {"kind": type(error).__name__, "message": error.message, "fix": error.fix}
        replace_text(refusal, json.dumps(plain))
        raise


def read_refusal(folder: Path, attempt: str) -> DeepseekRayError | None:
    """The error that workers of an attempt left, if they did."""
    file = folder / f"{REFUSAL}-{attempt}"
    if not file.is_file():
        return None
    plain = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    kind = next(one for one in FINAL if one.__name__ == plain["kind"])
    return kind(plain["message"], fix=plain["fix"])


def _keep_warnings(file: Path) -> None:
    """What this worker warns of, in a file that the driver shows."""
    handler = logging.FileHandler(file)
    handler.setLevel(logging.WARNING)
    logging.getLogger("deepseek_ray").addHandler(handler)


@dataclass(frozen=True)
class Fault:
    """A worker that ends itself once, for ``deepseek-ray verify recovery``."""

    rank: int
    after_step: int
    signal: int


def run_here(config: MoEConfig, folder: Path, data_digest: str, fault: Fault | None = None) -> None:
    """Train in this process, which is one of the mesh or all of it; the first one notes the progress.

    Raises:
        DataError: the corpus here is not the driver's.
    """
    corpus = Corpus(config.corpus, config.seed)
    if corpus.digest != data_digest:
        raise DataError(
            f"The corpus on {socket.gethostname()!r} has digest {corpus.digest[:12]}, the driver's {data_digest[:12]}.",
            fix="set corpus.folder to storage that every node sees",
        )
    device = own_device()
    _note_worker(folder)
    rank = dist.get_rank() if dist.is_initialized() else 0
    callbacks: list[Callback] = [ProgressNotes(folder / PROGRESS, config)] if rank == 0 else []
    if fault is not None and fault.rank == rank:
        callbacks.append(_Dies(fault, folder / FAULT))
    pretrain(
        config, corpus, folder, data_digest=data_digest, device=device, callbacks=callbacks,
        make_server=server_of(config),
    )  # fmt: skip


def server_of(config: MoEConfig) -> MakeServer:
    """How a worker of Ray Train reaches its parameter server."""
    # a restart has another coordinator, hence other servers: rounds of a dead group never mix with its own
    job = f"gradients-{os.environ.get('MASTER_ADDR')}-{os.environ.get('MASTER_PORT')}"
    return lambda mesh: ParameterServer(mesh, job, config.cluster.timeout_s)


class ProgressNotes(Callback):
    """Appends one JSON line a step: its figures, tokens a second, processes of the mesh, the time.

    Args:
        file: to append to.
        config: on the mesh that trains.
    """

    def __init__(self, file: Path, config: MoEConfig) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not file.read_bytes().endswith(b"\n"):
            with file.open("a", encoding="utf-8") as stream:  # a killed process left half a line
                stream.write("\n")
        self.file, self.config, self._last, self._started = file, config, time.perf_counter(), time.time()

    def after_step(self, report: StepReport) -> None:
        """Write the line."""
        now = time.perf_counter()
        tokens = self.config.step.batch_size * self.config.corpus.seq_len
        shares = [min(counts) / sum(counts) for counts in report.load.values()]
        line = {
            "step": report.step, "loss": report.loss, "grad_norm": report.grad_norm, "lr": report.lr,
            "min_expert_load": min(shares, default=None), "tokens_per_s": tokens / (now - self._last),
            "world_size": self.config.parallel.world, "time": time.time(), "group_started": self._started,
        }  # fmt: skip
        self._last = now
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


class _Dies(Callback):
    """Ends this process after a step, unless it did so before."""

    def __init__(self, fault: Fault, note: Path) -> None:
        self.fault, self.note = fault, note

    def after_step(self, report: StepReport) -> None:
        """Note the time, and send the signal."""
        if report.step == self.fault.after_step and not self.note.exists():
            self.note.write_text(str(time.time()), encoding="utf-8")
            os.kill(os.getpid(), self.fault.signal)


def _note_worker(folder: Path) -> None:
    """Say which process this is, for whoever wants to look at it."""
    place = {"rank": dist.get_rank() if dist.is_initialized() else 0, "pid": os.getpid(), "host": socket.gethostname()}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / WORKERS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(place) + "\n")


def _leave_spares(config: MoEConfig) -> bool:
    """Make the process group one of the mesh's processes only; True for a process that is not needed."""
    world, offered, rank = config.parallel.world, dist.get_world_size(), dist.get_rank()
    if world == offered:
        return False
    timeout, backend = timedelta(seconds=config.cluster.timeout_s), dist.get_backend()
    address: list[Any] = [_free_address() if rank == 0 else None]
    dist.broadcast_object_list(address, src=0)
    dist.destroy_process_group()
    if rank >= world:
        return True
    url = f"tcp://{address[0]}"
    dist.init_process_group(backend, init_method=url, rank=rank, world_size=world, timeout=timeout)
    return False


def _free_address() -> str:
    host = os.environ["MASTER_ADDR"]
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"

"""A whole pretraining in one process of the mesh: build, resume, step, checkpoint. No Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from deepseek_ray.config_moe import BackboneConfig, MoEConfig
from deepseek_ray.data.samples import Samples
from deepseek_ray.errors import ConfigError, EnvironmentProblemError
from deepseek_ray.kernels import dispatch, tuning
from deepseek_ray.parallel.apply import SpreadModel
from deepseek_ray.parallel.exchange import GradientExchange, TopK
from deepseek_ray.parallel.mesh import Mesh
from deepseek_ray.train.callbacks import Callback
from deepseek_ray.train.mesh_checkpoint import CheckpointWriter, import_pretrained, load_newest
from deepseek_ray.train.precision import precision_of
from deepseek_ray.train.pretrain_step import Stepper, saves

_FREE = {"micro_batch_size", "checkpoint_every", "keep_checkpoints", "background_checkpoints", "recompute", "compile"}


def own_device() -> torch.device:
    """What this process computes on: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


MakeServer = Callable[[Mesh], GradientExchange]


def make_stepper(
    config: MoEConfig, samples: Samples, device: torch.device, make_server: MakeServer | None = None
) -> Stepper:
    """This process's share of the model with its optimiser; the default process group, if any, is the mesh.

    Raises:
        ConfigError: the settings ask for a parameter server where there is no cluster.
        EnvironmentProblemError: processes of the mesh would run other kernels, or other settings of them.
    """
    _agree_on_kernels()
    mesh = Mesh.build(config.parallel, device.type) if dist.is_initialized() else None
    weights, compute = precision_of(config.step.precision, device)
    model = SpreadModel(config, mesh, device, weights, compute)
    return Stepper(config, model, samples, _make_exchange(config, mesh, make_server))


def _agree_on_kernels() -> None:
    """Another kernel rounds in another way: replicas would drift apart."""
    try:
        mine = (dispatch.choice().backend, tuning.digest())
    except ValueError as error:
        raise EnvironmentProblemError(f"The kernels cannot run: {error}.", fix="see deepseek-ray doctor") from error
    if not dist.is_initialized():
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    others = {f"rank {rank}: {one}" for rank, one in enumerate(everyone) if one != everyone[0]}
    if others:
        raise EnvironmentProblemError(
            f"Processes run other kernels than rank 0 with {everyone[0]}: {', '.join(sorted(others))}.",
            fix=f"give all nodes the same {dispatch.VARIABLE} and {tuning.VARIABLE}",
        )


def _make_exchange(config: MoEConfig, mesh: Mesh | None, make_server: MakeServer | None) -> GradientExchange | None:
    kind = config.step.exchange
    if mesh is None or config.parallel.dp_replicate == 1 or kind == "all_reduce":
        return None
    if kind == "top_k":
        return TopK(mesh.group("dp_replicate"), config.step.top_k_fraction)
    if make_server is None:
        raise ConfigError("step.exchange = 'parameter_server' needs Ray.", fix="run python -m pipelines.moe.train")
    return make_server(mesh)


def pretrain(
    config: MoEConfig,
    samples: Samples,
    folder: Path,
    *,
    data_digest: str,
    device: torch.device,
    callbacks: Sequence[Callback] = (),
    make_server: MakeServer | None = None,
) -> int:
    """Train up to ``step.steps``, from the newest complete checkpoint on; returns the step it started with.

    Args:
        config: everything.
        samples: the data, the same on every process.
        folder: of the checkpoints; storage that every process sees.
        data_digest: of the samples; a checkpoint of other data is not resumed.
        device: of this process.
        callbacks: called between steps, after the schedule; every process has its own.
        make_server: connects to a parameter server, where the settings ask for one.

    Raises:
        CheckpointError: a checkpoint cannot be written, or the newest one holds another model.
        DivergedError: the loss or the gradients are not finite.
    """
    stepper = make_stepper(config, samples, device, make_server)
    stepper.callbacks += callbacks
    print_ = fingerprint(config, data_digest)
    settings = config.step
    start = load_newest(folder, print_, stepper)
    if not start and config.init_from:
        import_pretrained(stepper.model, Path(config.init_from))
    writer = CheckpointWriter(
        folder, print_, keep=settings.keep_checkpoints, background=settings.background_checkpoints
    )
    for number in range(start, settings.steps):
        stepper.step(number)
        if saves(number, settings):
            writer.save(number + 1, stepper)
    writer.close()
    return start


def lasting_settings(config: MoEConfig, data_digest: str) -> dict[str, Any]:
    """What may not change between two runs of one training: all but the mesh and the cluster."""
    step = config.step.model_dump(exclude=_FREE)
    if config.step.exchange == "top_k":  # it sends what is left before a checkpoint
        step["checkpoint_every"] = config.step.checkpoint_every
    else:
        del step["top_k_fraction"]
    return {
        "seed": config.seed, "backbone": config.backbone.model_dump(), "step": step,
        "corpus.seq_len": config.corpus.seq_len, "corpus.sha256": data_digest, "init_from": config.init_from,
    }  # fmt: skip


def fingerprint(config: MoEConfig, data_digest: str) -> str:
    """What a checkpoint must share with a job to be resumed."""
    return hashlib.sha256(json.dumps(lasting_settings(config, data_digest), sort_keys=True).encode()).hexdigest()


def check_reads_text(shape: BackboneConfig, needed: int) -> None:
    """Refuse a model that does not read tokens and predict the next one, or has no vector for some token.

    Raises:
        ConfigError: the adapter, the head or the vocabulary does not fit.
    """
    for name, wanted in (("adapter", "tokens"), ("head", "language")):
        if getattr(shape, name) != wanted:
            raise ConfigError(
                f"backbone.{name} = {getattr(shape, name)!r}; the corpus is text.", fix=f"set it to {wanted!r}"
            )
    if shape.vocab_size < needed:
        raise ConfigError(
            f"backbone.vocab_size = {shape.vocab_size}, the corpus has {needed} tokens.",
            fix=f"set it to {needed} or more",
        )

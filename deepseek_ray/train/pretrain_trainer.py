"""From a config to a pretrained model: starts the workers on Ray Train and follows what they note."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from tqdm import tqdm

from deepseek_ray.cluster import local_cluster
from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.data.corpus import VOCAB_SIZE, Corpus
from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.models.pretrained import check
from deepseek_ray.parallel.mesh import check_mesh
from deepseek_ray.parallel.resize import fit_mesh
from deepseek_ray.train.claim import claimed
from deepseek_ray.train.pretrain_worker import PROGRESS, WARNINGS, Fault, pretrain_loop, read_refusal, run_here
from deepseek_ray.train.pretraining import check_reads_text, lasting_settings
from deepseek_ray.train.trainer import train_settings, worker_environment

OnLines = Callable[[list[dict[str, Any]]], None]
_POLL_S = 0.5


@dataclass(frozen=True)
class PretrainResult:
    """What a pretraining left.

    Attributes:
        folder: of checkpoints and progress.
        data_digest: of the corpus.
        first_loss: of the first step; None where the notes of the progress were lost.
        last_loss: of the last one, likewise.
        wall_s: seconds, the start of the workers included.
    """

    folder: Path
    data_digest: str
    first_loss: float | None
    last_loss: float | None
    wall_s: float


def pretrain_on_ray(
    config: MoEConfig, folder: Path, *, on_lines: OnLines | None = None, fault: Fault | None = None
) -> PretrainResult:
    """Train to ``step.steps``; run again, it goes on where it stopped. One process alone trains without Ray.

    Args:
        config: everything.
        folder: of checkpoints and progress; on a cluster, storage that every node sees.
        on_lines: called with the new progress lines now and then.
        fault: the end of a worker, to see what becomes of the run.

    Raises:
        ConfigError: the mesh, the batch, the vocabulary or the workers do not fit, or the folder holds a training
            with other settings.
        DataError: there is no text, or too little.
        DivergedError: the loss or the gradients are not finite.
        EnvironmentProblemError: another program trains in the folder, or workers failed more than
            ``cluster.max_failures`` times.
        ModelFormatError: ``init_from`` is no such model.
    """
    start = time.perf_counter()
    check_pretraining(config)
    digest = Corpus(config.corpus, config.seed).digest
    folder = folder.resolve()
    with (
        claimed(folder, lasting_settings(config, digest)),
        _following(folder, config.step.steps, on_lines),
    ):
        if config.parallel.world == 1 and not config.cluster.num_workers:
            torch.set_num_threads(max(config.cluster.threads_per_worker, os.cpu_count() or 1))
            run_here(config, folder, digest)
        else:
            attempt = f"{time.time_ns()}"
            settings = {"config": config.model_dump(), "folder": str(folder), "data_digest": digest}
            try:
                run_on_ray(config, pretrain_loop, {**settings, "attempt": attempt, "fault": fault}, folder / "ray")
            finally:
                if refusal := read_refusal(folder, attempt):
                    raise refusal
    lines = read_progress(folder / PROGRESS)
    first, last = (lines.get(step, {}).get("loss") for step in (0, config.step.steps - 1))
    return PretrainResult(folder, digest, first, last, time.perf_counter() - start)


def check_pretraining(config: MoEConfig) -> None:
    """Refuse what cannot train, before anything is started.

    Raises:
        ConfigError: a setting does not fit another one.
        ModelFormatError: ``init_from`` is no such model.
    """
    check_mesh(config)
    check_reads_text(config.backbone, VOCAB_SIZE)
    if workers := config.cluster.min_workers or config.cluster.num_workers:
        fit_mesh(config, workers)
    if config.init_from:
        check(config.init_from, config.backbone)


def read_progress(file: Path) -> dict[int, dict[str, Any]]:
    """The lines by step; of a step that was done twice, the later one. Half a line, of a killed process, is none."""
    if not file.is_file():
        return {}
    found = {}
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            found[int(line["step"])] = line
        except (ValueError, TypeError, KeyError):
            continue
    return found


def run_on_ray(
    config: MoEConfig, loop: Callable[[dict[str, Any]], None], settings: dict[str, Any], storage: Path | None = None
) -> None:
    """Run a loop in as many Ray Train workers as ``cluster`` says, or as the mesh has processes.

    Args:
        config: mesh and cluster.
        loop: called in every worker.
        settings: its argument.
        storage: where Ray Train keeps its own state; a temporary folder without it.
    """
    cluster = config.cluster
    most = cluster.num_workers or config.parallel.world
    elastic = bool(cluster.min_workers)
    with (
        local_cluster(most * cluster.threads_per_worker),
        train_settings(elastic=elastic),
        tempfile.TemporaryDirectory(prefix="deepseek-ray-") as temporary,
    ):
        trainer = _trainer(config, loop, settings, str(storage or temporary))
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise EnvironmentProblemError(
                f"Workers failed more than cluster.max_failures = {cluster.max_failures} times: {_cause(error)}",
                fix="look for the first error in the workers' logs below /tmp/ray, then run the same command again",
            ) from error


def _cause(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _trainer(
    config: MoEConfig, loop: Callable[[dict[str, Any]], None], settings: dict[str, Any], storage: str
) -> TorchTrainer:
    cluster = config.cluster
    most = cluster.num_workers or config.parallel.world
    elastic = bool(cluster.min_workers)
    gpu = bool(ray.cluster_resources().get("GPU"))  # of the cluster: a driver often has none
    return TorchTrainer(
        loop,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=(cluster.min_workers, most) if elastic else most,
            elastic_resize_monitor_interval_s=cluster.resize_interval_s,
            use_gpu=gpu,
            resources_per_worker={"CPU": cluster.threads_per_worker, **({"GPU": 1} if gpu else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=cluster.timeout_s),
        run_config=ray.train.RunConfig(
            name=f"moe-{time.time_ns()}",  # our manifests decide what is resumed, not Ray's state
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            worker_runtime_env={"env_vars": worker_environment(cluster.threads_per_worker)},
        ),
    )


@contextmanager
def _following(folder: Path, steps: int, on_lines: OnLines | None) -> Iterator[None]:
    """A bar over the steps, advanced by the lines that the first worker writes; its warnings are shown too."""
    done = threading.Event()
    known = read_progress(folder / PROGRESS)
    if known and on_lines is not None:
        on_lines(list(known.values()))
    bar = tqdm(total=steps, initial=min(len(known), steps), desc="train", unit="step")
    bar.set_postfix_str("starting")
    with bar, ThreadPoolExecutor(1, thread_name_prefix="progress") as pool:
        follower = pool.submit(_follow, folder, bar, on_lines, done)
        try:
            yield
        finally:
            done.set()
        follower.result()  # what on_lines raised


def _follow(folder: Path, bar: Any, on_lines: OnLines | None, done: threading.Event) -> None:
    file, warnings = folder / PROGRESS, folder / WARNINGS
    seen = max(read_progress(file), default=-1)
    shown = len(_lines(warnings))
    last = False
    while not last:
        last = done.wait(_POLL_S)  # one more look after the end
        for warning in _lines(warnings)[shown:]:
            bar.write(warning, file=sys.stderr)
            shown += 1
        lines = read_progress(file)
        new = [line for step, line in lines.items() if step > seen]
        if new:
            seen = max(lines)
            bar.n = seen + 1
            bar.set_postfix_str(f"loss {new[-1]['loss']:.3f}, {new[-1]['tokens_per_s']:.0f} tokens/s")
            if on_lines is not None:
                on_lines(new)


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []

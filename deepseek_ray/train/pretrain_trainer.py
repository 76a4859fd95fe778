"""From a config to a pretrained model: starts the workers on Ray Train and follows what they note."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from tqdm import tqdm

from deepseek_ray.cluster import local_cluster
from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.data.corpus import VOCAB_SIZE, Corpus
from deepseek_ray.parallel.mesh import check_mesh
from deepseek_ray.train.pretrain_worker import PROGRESS, Fault, pretrain_loop, run_here
from deepseek_ray.train.pretraining import check_vocabulary
from deepseek_ray.train.trainer import train_settings, worker_environment

OnLines = Callable[[list[dict[str, Any]]], None]
_POLL_S = 0.5


@dataclass(frozen=True)
class PretrainResult:
    """What a pretraining left.

    Attributes:
        folder: of checkpoints and progress.
        data_digest: of the corpus.
        first_loss: of the first step.
        last_loss: of the last one.
        wall_s: seconds, the start of the workers included.
    """

    folder: Path
    data_digest: str
    first_loss: float
    last_loss: float
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
        ConfigError: the mesh, the batch or the vocabulary does not fit.
        ray.train.TrainingFailedError: workers failed more than ``cluster.max_failures`` times.
    """
    start = time.perf_counter()
    check_mesh(config)
    check_vocabulary(config.backbone, VOCAB_SIZE)
    digest = Corpus(config.corpus, config.seed).digest
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with _following(folder / PROGRESS, config.step.steps, on_lines):
        if config.parallel.world == 1 and not config.cluster.num_workers:
            torch.set_num_threads(max(config.cluster.threads_per_worker, os.cpu_count() or 1))
            run_here(config, folder, digest)
        else:
            settings = {"config": config.model_dump(), "folder": str(folder), "data_digest": digest, "fault": fault}
            run_on_ray(config, pretrain_loop, settings, folder / "ray")
    lines = read_progress(folder / PROGRESS)
    first, last = lines[0]["loss"], lines[config.step.steps - 1]["loss"]
    return PretrainResult(folder, digest, first, last, time.perf_counter() - start)


def read_progress(file: Path) -> dict[int, dict[str, Any]]:
    """The lines by step; of a step that was done twice, the later one."""
    if not file.is_file():
        return {}
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
    lines = [json.loads(line) for line in whole.splitlines() if line]
    return {line["step"]: line for line in lines}


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
    gpu = torch.cuda.is_available()
    trainer = TorchTrainer(
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
            storage_path=str(storage or tempfile.mkdtemp(prefix="deepseek-ray-")),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            worker_runtime_env={"env_vars": worker_environment(cluster.threads_per_worker)},
        ),
    )
    with local_cluster(most * cluster.threads_per_worker), train_settings(elastic=elastic):
        trainer.fit()


@contextmanager
def _following(file: Path, steps: int, on_lines: OnLines | None) -> Iterator[None]:
    """A bar over the steps, advanced by the lines that the first worker writes."""
    done = threading.Event()
    known = len(read_progress(file))
    bar = tqdm(total=steps, initial=min(known, steps), desc="train", unit="step")
    with bar, ThreadPoolExecutor(1, thread_name_prefix="progress") as pool:
        follower = pool.submit(_follow, file, bar, on_lines, done)
        try:
            yield
        finally:
            done.set()
        follower.result()  # what on_lines raised


def _follow(file: Path, bar: Any, on_lines: OnLines | None, done: threading.Event) -> None:
    seen = max(read_progress(file), default=-1)
    last = False
    while not last:
        last = done.wait(_POLL_S)  # one more look after the end
        lines = read_progress(file)
        new = [line for step, line in lines.items() if step > seen]
        if new:
            seen = max(lines)
            bar.n = seen + 1
            bar.set_postfix_str(f"loss {new[-1]['loss']:.3f}, {new[-1]['tokens_per_s']:.0f} tokens/s")
            if on_lines is not None:
                on_lines(new)

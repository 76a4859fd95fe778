"""Cost of a training step, as ratios measured in one run.

    python -m tests.bench.bench_train --out runs/bench/train.csv

* ``plain``: a torch loop that knows nothing of meshes, on the same model. ``ours``: our step in one process.
* ``torchrun-N`` and ``ray-N``: the same mesh of N processes under either launcher; seconds a step after the first few.
  Ray's own processes take a tenth of a core: where the mesh has all cores, that shows.
* ``weak-N``: N processes with N times the batch; 1.0 would be perfect scaling.

Where there is a GPU, tests/bench/train_gpu.py follows: TFLOP/s, tokens/s and MFU of a Mixture of Experts on it.

Rounds are interleaved, because machines are noisy; a ratio is the median of the rounds' ratios with their quartiles.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.data.corpus import Corpus
from deepseek_ray.data.samples import RandomSamples
from deepseek_ray.models.backbone import Backbone, init_weights
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.registry.tracking import git_commit
from deepseek_ray.train.pretrain_trainer import pretrain_on_ray, read_progress
from deepseek_ray.train.pretrain_worker import PROGRESS, run_here
from deepseek_ray.train.pretraining import make_stepper
from deepseek_ray.train.schedule import learning_rate
from tests.bench import train_gpu
from tests.bench.results import append

COLUMNS = ("at", "case", "baseline", "ratio", "q1", "q3", "rounds", "seconds", "cpus", "load", "torch", "commit")
WARM_UP = 3


def main() -> int:
    """Measure, print a table, append to the CSV."""
    options = _parser().parse_args()
    if options.torchrun_worker:
        return _torchrun_worker(Path(options.torchrun_worker))
    parts = {"one-process": _one_process, "launchers": _launchers, "weak-scaling": _weak_scaling}
    rows = [row for name in options.parts or parts for row in parts[name](options)]
    _print(rows)
    if options.out:
        append(rows, COLUMNS, options.out)
    if torch.cuda.is_available():
        return train_gpu.main(["--out", str(options.out.with_name("train_gpu.csv"))] if options.out else [])
    return 0


def _config(*overrides: str) -> MoEConfig:
    return load_moe_preset("small_moe", overrides=["parallel.dp_shard=1", *overrides])


def _one_process(options: argparse.Namespace) -> list[dict[str, object]]:
    """Our step against a plain loop."""
    torch.set_num_threads(os.cpu_count() or 1)
    config = _config()
    plain, ours = _plain_step(config), _our_step(config)
    pairs = []
    for number in range(WARM_UP + options.rounds * options.steps):
        pairs.append((_timed(plain, number), _timed(ours, number)))
    pairs = pairs[WARM_UP:]
    chunks = [pairs[at : at + options.steps] for at in range(0, len(pairs), options.steps)]
    ratios = [statistics.median(b for _, b in chunk) / statistics.median(a for a, _ in chunk) for chunk in chunks]
    return [_row("ours", "plain", ratios, statistics.median(b for _, b in pairs))]


def _plain_step(config: MoEConfig) -> Callable[[int], None]:
    shape, settings = config.backbone, config.step
    model = Backbone(shape)
    init_weights(model, shape, config.seed)
    samples = RandomSamples(shape, config.corpus.seq_len, config.seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, foreach=False)
    tokens = settings.batch_size * config.corpus.seq_len

    def step(number: int) -> None:
        optimiser.zero_grad(set_to_none=True)
        first = number * settings.batch_size
        x, target = samples.take(torch.arange(first, first + settings.batch_size))
        for router in model.routers().values():
            router.loss_weight = 1.0 / tokens
        for rows, goal in zip(x.split(settings.micro_batch_size), target.split(settings.micro_batch_size), strict=True):
            loss = F.cross_entropy(model(rows).flatten(0, 1), goal.flatten(), reduction="sum") / tokens
            loss.backward()
            loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm, foreach=False)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(number, settings)
        optimiser.step()
        for router in model.routers().values():
            router.balance(router.count_E, shape.bias_rate)

    return step


def _our_step(config: MoEConfig) -> Callable[[int], None]:
    samples = RandomSamples(config.backbone, config.corpus.seq_len, config.seed)
    stepper = make_stepper(config, samples, torch.device("cpu"))
    return lambda number: (stepper.step(number), None)[1]


def _launchers(options: argparse.Namespace) -> list[dict[str, object]]:
    """The same mesh under torchrun and under Ray Train, in turns."""
    return [_launcher(options, size) for size in options.processes]


def _launcher(options: argparse.Namespace, size: int) -> dict[str, object]:
    mesh = [f"parallel.dp_shard={size}", f"cluster.num_workers={size}"]
    config = _config(*mesh, f"step.steps={WARM_UP + options.steps}", "step.checkpoint_every=1000000")
    pairs = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            torchrun, ray = Path(folder) / "torchrun", Path(folder) / "ray"
            _torchrun(config, torchrun)
            pretrain_on_ray(config, ray)
            pairs.append((_seconds_a_step(torchrun), _seconds_a_step(ray)))
    ratios = [b / a for a, b in pairs]
    return _row(f"ray-{size}", f"torchrun-{size}", ratios, statistics.median(b for _, b in pairs))


def _torchrun(config: MoEConfig, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={config.parallel.world}"]
    program = ["-m", "tests.bench.bench_train", "--torchrun-worker", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, "--standalone", *program], check=True, env=environment, stderr=subprocess.DEVNULL)


def _torchrun_worker(folder: Path) -> int:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    config = MoEConfig.model_validate_json((folder / "config.json").read_text(encoding="utf-8"))
    run_here(config, folder, Corpus(config.corpus, config.seed).digest)
    torch.distributed.destroy_process_group()
    return 0


def _weak_scaling(options: argparse.Namespace) -> list[dict[str, object]]:
    """N processes with N times the batch, against one process with one thread."""
    cores = os.cpu_count() or 1
    sizes = [size for size in (1, 2, 4, 8) if size <= cores]
    rounds: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(options.rounds):
        for size in sizes:
            each = 8 * size
            settings = [f"parallel.dp_shard={size}", f"step.batch_size={each}", "step.checkpoint_every=1000000"]
            config = _config(*settings, f"step.steps={WARM_UP + options.steps}")
            with tempfile.TemporaryDirectory() as folder:
                _torchrun(config, Path(folder) / "run")
                rounds[size].append(_seconds_a_step(Path(folder) / "run"))
    first = rounds[1]
    return [
        _row(f"weak-{size}", "weak-1", [b / a for a, b in zip(first, times, strict=True)], statistics.median(times))
        for size, times in rounds.items()
        if size > 1
    ]


def _seconds_a_step(folder: Path) -> float:
    times = [line["time"] for line in read_progress(folder / PROGRESS).values()]
    return statistics.median(b - a for a, b in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False))


def _timed(step: Callable[[int], None], number: int) -> float:
    start = time.perf_counter()
    step(number)
    return time.perf_counter() - start


def _row(case: str, baseline: str, ratios: list[float], seconds: float) -> dict[str, object]:
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"), "case": case, "baseline": baseline,
        "ratio": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3), "rounds": len(ratios),
        "seconds": round(seconds, 4), "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__, "commit": git_commit(),
    }  # fmt: skip


def _print(rows: list[dict[str, object]]) -> None:
    print(f"python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, seed 0")
    print(f"{'case':12}{'against':12}{'ratio':>8}{'quartiles':>18}{'s a step':>10}")
    for row in rows:
        spread = f"{row['q1']} - {row['q3']}"
        print(f"{row['case']:12}{row['baseline']:12}{row['ratio']:>8}{spread:>18}{row['seconds']:>10}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="*", choices=("one-process", "launchers", "weak-scaling"), help="default: all")
    parser.add_argument("--processes", nargs="*", type=int, default=[1, 2], help="of the launchers' meshes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="steps of a round, after the warm-up")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    parser.add_argument("--torchrun-worker", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())

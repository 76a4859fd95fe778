"""One GPU, one MoE of real layer shapes: TFLOP/s, tokens/s and MFU of a whole training step. Part of bench_train.

    python -m tests.bench.train_gpu --out tests/bench/train_gpu.csv        all cases, each in a process of its own
    python -m tests.bench.train_gpu --config debug_moe --tokens 256 --layers 2      the same on a CPU, to try it

``kernels`` is DEEPSEEK_RAY_KERNELS: ``auto`` runs our kernels, ``torch`` the same model on torch's grouped_mm.
``balanced`` routing deals tokens to experts in turn; ``real`` is what the router chooses. MFU is against the dense bf16
peak of the data sheet; ``of_matmul`` against the best square product measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.data.samples import RandomSamples
from deepseek_ray.kernels.router_topk import Routing
from deepseek_ray.models.counts import count, flops_per_token
from deepseek_ray.models.router import Router
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train.pretraining import make_stepper
from tests.bench.results import append, commit

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
BYTES_A_WEIGHT = 4 + 4 + 8 + 2  # float32 weight and gradient, two moments, a copy to compute with
COLUMNS = (
    "at", "config", "layers", "tokens", "routing", "kernels", "compiled", "seconds", "q1", "q3", "steps",
    "tokens_per_s", "tflops", "mfu", "of_matmul", "peak_gib", "device", "torch", "commit",
)  # fmt: skip
HEADER = f"{'tokens':>8}{'routing':>10}{'kernels':>9}{'compiled':>9}{'s a step':>10}{'TFLOP/s':>9}{'MFU':>7}{'GiB':>7}"
WARM_UP = 3
CASES = [
    (tokens, routing, kernels, compiled)
    for tokens, routing in ((32768, "balanced"), (8192, "real"), (8192, "balanced"), (32768, "real"))
    for kernels, compiled in (("auto", False), ("auto", True), ("torch", False))
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one case here, or all of them, each in a fresh process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    if options.case:
        tokens, routing, _, compiled = json.loads(options.case)
        print(json.dumps(measure(options, tokens, routing, compiled=compiled)))
        return 0
    failed = 0
    print(HEADER)
    for case in (case for case in CASES if not options.tokens or case[0] == CASES[0][0]):
        environment = os.environ | {"DEEPSEEK_RAY_KERNELS": case[2]}
        command = [sys.executable, "-m", "tests.bench.train_gpu", *arguments, "--case", json.dumps(case)]
        done = subprocess.run(command, env=environment, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed = 1
            print(f"{case[0]:8}{case[1]:>10}{case[2]:>9}{case[3]!s:>9} failed: exit {done.returncode}", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1]) | {"kernels": case[2]}
        print(f"{row['tokens']:8}{row['routing']:>10}{row['kernels']:>9}{row['compiled']!s:>9}{row['seconds']:10.4f}"
              f"{row['tflops']:9.1f}{row['mfu']:7.1%}{row['peak_gib']:7.1f}", flush=True)  # fmt: skip
        if options.out:
            append([row], COLUMNS, options.out)  # at once: lent machines leave
    return failed


def measure(options: argparse.Namespace, tokens: int, routing: str, *, compiled: bool) -> dict[str, Any]:
    """Steps of one case on this machine's GPU, or CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = options.tokens or tokens
    config = _config(options, tokens, compiled=compiled)
    samples = RandomSamples(config.backbone, config.corpus.seq_len, config.seed)
    stepper = make_stepper(config, samples, device)
    with mock.patch.object(Router, "choose", in_turn) if routing == "balanced" else nullcontext():
        every = [
            _timed(lambda number=number: stepper.step(number), device) for number in range(WARM_UP + options.steps)
        ]
    seconds = every[WARM_UP:]
    low, middle, high = statistics.quantiles(seconds, n=4)
    rate = tokens / middle
    tflops = rate * flops_per_token(config.backbone, config.corpus.seq_len) / 1e12
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = next((value for key, value in PEAK_TFLOPS.items() if key in name), float("nan"))
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"), "config": options.config,
        "layers": config.backbone.num_layers, "tokens": tokens, "routing": routing, "compiled": compiled,
        "seconds": round(middle, 5), "q1": round(low, 5), "q3": round(high, 5), "steps": options.steps,
        "tokens_per_s": round(rate), "tflops": round(tflops, 3), "mfu": round(tflops / peak, 4),
        "of_matmul": round(tflops / matmul_tflops(device), 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else 0.0,
        "device": name, "torch": torch.__version__, "commit": commit(),
    }  # fmt: skip


def in_turn(router: Router, logit_TE: Tensor, *, scores: bool = False) -> Routing:
    """Router.choose with the same load for every expert, whatever the scores."""
    first_T1 = torch.arange(len(logit_TE), device=logit_TE.device)[:, None] * router.top_k
    expert_TK = (first_T1 + torch.arange(router.top_k, device=logit_TE.device)) % router.num_experts
    score_TE = logit_TE.sigmoid()
    gate_TK = score_TE.gather(-1, expert_TK)
    gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True) * router.scale
    return Routing(gate_TK, expert_TK, score_TE if scores else None)


def matmul_tflops(device: torch.device) -> float:
    """The best of ten square products, in the type that the device computes in."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / min(_timed(lambda: a @ a, device) for _ in range(10)) / 1e12


def _config(options: argparse.Namespace, tokens: int, *, compiled: bool) -> MoEConfig:
    one = [f"parallel.{axis}=1" for axis in ("pp", "dp_replicate", "dp_shard", "tp", "ep")]
    shape = load_moe_preset(options.config, overrides=one)
    layers = options.layers or _layers_that_fit(shape, tokens)
    length = min(4096, tokens, shape.backbone.max_seq_len)
    step = [
        f"step.batch_size={tokens // length}",
        f"step.micro_batch_size={tokens // length}",
        f"step.compile={compiled}",
    ]
    sizes = [f"backbone.num_layers={layers}", f"corpus.seq_len={length}", "step.precision=auto", "step.recompute=none"]
    return load_moe_preset(options.config, overrides=[*one, *step, *sizes])


def _layers_that_fit(config: MoEConfig, tokens: int) -> int:
    """Blocks for which the GPU's memory suffices, with a fifth of it left over."""
    shape, counts = config.backbone, count(config.backbone)
    free = 0.8 * torch.cuda.mem_get_info()[0]
    free -= (counts.embedding + counts.head) * BYTES_A_WEIGHT + 3 * 4 * tokens * shape.vocab_size  # logits
    pairs = tokens * shape.top_k
    kept = 2 * (pairs * (2 * shape.d_model + 4 * shape.d_expert) + 16 * tokens * shape.d_model)
    return max(1, min(shape.num_layers, int(free / (counts.block * BYTES_A_WEIGHT + kept))))


def _timed(work: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="qwen3_30b_a3b")
    parser.add_argument("--layers", type=int, default=0, help="0: as many as fit the GPU")
    parser.add_argument("--tokens", type=int, default=0, help="of a step; 0: 8192 and 32768")
    parser.add_argument("--steps", type=int, default=10, help="after the warm-up of three")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())

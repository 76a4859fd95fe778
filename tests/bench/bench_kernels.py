"""Every kernel beside what else there is, in one run: time, share of the roofline measured on the same machine, memory.

    python -m tests.bench.bench_kernels --out tests/bench/kernels.csv --plots runs/bench       on a GPU
    python -m tests.bench.bench_kernels --ops fused_moe --tune                                 measure settings first
    python -m tests.bench.bench_kernels --small --ops rms_norm                                 a CPU's smoke test

A roofline is the larger of operations over the measured bf16 matmul rate and bytes over the measured copy rate; 100 %
is a kernel that is as fast as a matmul or a copy could be. Peers that are installed (Liger) run too. Operations are
those that the result needs: what a kernel computes twice counts once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_ray.registry.tracking import git_commit
from tests.bench import kernel_cases
from tests.bench.kernel_cases import Case
from tests.bench.results import append

COLUMNS = (
    "at", "op", "shape", "provider", "direction", "ms_p20", "ms_p50", "ms_p80", "tflops", "gb_per_s", "of_roofline",
    "bound", "peak_gib", "error", "device", "torch", "triton", "commit",
)  # fmt: skip
HEADER = f"{'op':26}{'shape':34}{'provider':18}{'':10}{'ms':>9}{'TFLOP/s':>9}{'GB/s':>8}{'roofline':>9}{'GiB':>7}"


@dataclass(frozen=True)
class Machine:
    """What this machine does at most, measured here.

    Attributes:
        device: to run on.
        flops: of a large matrix product in the case's type, a second.
        bytes: read and written by a large copy, a second.
    """

    device: torch.device
    flops: float
    bytes: float


def main() -> int:
    """Measure the chosen cases, print a line each, keep CSV and plots."""
    options = _parser().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        print("nothing measured: there is no GPU; --small runs every provider once on tiny shapes")
        return 0
    machine = measure_machine(device, small=options.small)
    print(f"{name_of(device)}: matmul {machine.flops / 1e12:.1f} TFLOP/s, copy {machine.bytes / 1e9:.0f} GB/s; seed 0")
    print(HEADER)
    rows: list[dict[str, Any]] = []
    for case in kernel_cases.all_cases(device, small=options.small, words=options.ops):
        if options.tune and case.tune is not None:
            case.tune(case.inputs())
        for row in measure(case, machine, repeats=options.repeats):
            rows.append(row)
            print_row(row)
            if options.out:
                append([row], COLUMNS, options.out)  # at once: lent machines leave
    if options.plots:
        plot(rows, options.plots)
    return 0


def measure(case: Case, machine: Machine, repeats: int) -> Iterable[dict[str, Any]]:
    """Time every provider of a case, forward and backward, one after the other."""
    torch._dynamo.reset()  # else the ninth shape of a compiled provider runs eagerly
    inputs = case.inputs()
    leaves = [one for one in inputs.values() if isinstance(one, Tensor) and one.requires_grad]
    for provider, op in case.providers.items():
        forward = partial(op, **inputs)
        try:
            outputs = trained(forward())
            grads = [torch.randn_like(one) for one in outputs]
            works = {"forward": forward}
            if outputs:
                works["backward"] = partial(torch.autograd.grad, outputs, leaves, grads, retain_graph=True)
            for direction, work in works.items():
                ms = timed(work, machine.device, repeats)
                yield _row(case, provider, direction, machine, ms, peak(work))
        except Exception as error:
            yield _row(case, provider, "-", machine, [], error=f"{type(error).__name__}: {error}"[:200])
        outputs = grads = works = work = forward = None  # the next provider's memory is its own
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()


def trained(outputs: Any) -> list[Tensor]:
    """The outputs that a gradient comes back from."""
    each = outputs if isinstance(outputs, tuple | list) else [outputs]
    return [one for one in each if isinstance(one, Tensor) and one.requires_grad]


def measure_machine(device: torch.device, *, small: bool) -> Machine:
    """The matmul and copy rates of the device."""
    size, dtype = (512, torch.float32) if small else (8192, torch.bfloat16)
    a = torch.randn(size, size, device=device).to(dtype)
    flops = 2 * size**3 / (min(timed(lambda: a @ a, device, 10)) / 1e3)
    source = torch.empty((1 << 20) if small else (1 << 29), dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / (min(timed(lambda: target.copy_(source), device, 10)) / 1e3)
    return Machine(device, flops, rate)


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of each repeat, with a cold cache, after three for warming up."""
    for _ in range(3):
        work()
    if device.type != "cuda":
        return [_wall(work) for _ in range(repeats)]
    cold = torch.empty(256 << 20, dtype=torch.int8, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        cold.zero_()
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def peak(work: Callable[[], object]) -> float:
    """GiB that one call allocates at most beside what was there; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / 2**30


def print_row(row: dict[str, Any]) -> None:
    """One line for people."""
    start = f"{row['op']:26}{row['shape']:34}{row['provider']:18}{row['direction']:10}"
    if row["error"]:
        print(f"{start} {row['error'].splitlines()[0][:70]}", flush=True)
        return
    figures = (
        f"{row['ms_p50']:9.3f}{row['tflops']:9.1f}{row['gb_per_s']:8.0f}{row['of_roofline']:9.1%}{row['peak_gib']:7.2f}"
    )
    print(start + figures, flush=True)


def plot(rows: list[dict[str, Any]], folder: Path) -> None:
    """A picture an op: each provider's share of the roofline, by shape."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op and not row["error"]]
        labels = list(dict.fromkeys(f"{row['shape']} {row['direction']}" for row in mine))
        providers = list(dict.fromkeys(row["provider"] for row in mine))
        figure, axes = plt.subplots(figsize=(8, 1 + 0.25 * len(labels) * len(providers)), layout="constrained")
        height = 0.8 / max(1, len(providers))
        for number, provider in enumerate(providers):
            values = {f"{r['shape']} {r['direction']}": r["of_roofline"] for r in mine if r["provider"] == provider}
            places = [labels.index(label) + number * height for label in values]
            axes.barh(places, [100 * value for value in values.values()], height=height, label=provider)
        axes.set_yticks([at + 0.4 - height / 2 for at in range(len(labels))], labels, fontsize=7)
        axes.axvline(100, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel("% of the roofline measured on the same machine")
        axes.set_title(op)
        axes.legend(fontsize=7)
        figure.savefig(folder / f"{op}.png", dpi=150)
        plt.close(figure)


def name_of(device: torch.device) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def _row(
    case: Case, provider: str, direction: str, machine: Machine, ms: list[float], peak_gib: float = 0.0, error: str = ""
) -> dict[str, Any]:
    flops, moved = (case.flops, case.bytes) if direction == "forward" else (case.backward_flops, case.backward_bytes)
    low, middle, high = _quantiles(ms)
    needed = max(flops / machine.flops, moved / machine.bytes)
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"), "op": case.op, "shape": case.shape, "provider": provider,
        "direction": direction, "ms_p20": round(low, 5), "ms_p50": round(middle, 5), "ms_p80": round(high, 5),
        "tflops": round(flops / middle / 1e9, 2), "gb_per_s": round(moved / middle / 1e6, 1),
        "of_roofline": round(needed * 1e3 / middle, 4),
        "bound": "operations" if flops / machine.flops > moved / machine.bytes else "bytes",
        "peak_gib": round(peak_gib, 3), "error": error, "device": name_of(machine.device), "torch": torch.__version__,
        "triton": version, "commit": git_commit(),
    }  # fmt: skip


def _quantiles(ms: list[float]) -> tuple[float, float, float]:
    if not ms:
        return float("nan"), float("nan"), float("nan")
    fifths = statistics.quantiles(ms, n=5) if len(ms) > 1 else [ms[0]] * 4
    return fifths[0], statistics.median(ms), fifths[3]


def _wall(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ops", nargs="*", default=[], help="only ops whose name holds one of these words")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="tiny shapes, also on a CPU")
    parser.add_argument("--tune", action="store_true", help="measure launch settings first and keep them")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    parser.add_argument("--plots", type=Path, help="folder for a picture of each op")
    return parser


if __name__ == "__main__":
    sys.exit(main())

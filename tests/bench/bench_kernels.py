"""Every kernel beside what else there is, in one run: time, share of the roofline measured on the same machine, memory.

    python -m tests.bench.bench_kernels --out tests/bench/kernels.csv --plots runs/bench       on a GPU
    python -m tests.bench.bench_kernels --goals --tune                              settings first; goals' shapes alone
    python -m tests.bench.bench_kernels --report tests/bench/kernels.csv            goals and plots of rows kept before
    python -m tests.bench.bench_kernels --small --ops rms_norm                      a CPU's smoke test

A roofline is the larger of operations over the measured bf16 matmul rate and bytes over the measured copy rate; 100 %
is a kernel that is as fast as a matmul or a copy could be. Peers that are installed run too (kernel_peers.py).
Operations are those that the result needs: what a kernel computes twice counts once. ``full`` is forward and backward
in one, the only fair row for an op that computes gradients on its way forward.

Short ops are timed by replaying a CUDA graph, so that no launch is waited for; the column ``timed`` says so. Whatever
fails is a row with its error; where it was ours, the program's exit status says so too.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.bench import kernel_cases, kernel_goals, kernel_peers
from tests.bench.kernel_cases import Case
from tests.bench.results import append, commit

COLUMNS = (
    "at", "op", "shape", "provider", "direction", "ms_p20", "ms_p50", "ms_p80", "timed", "tflops", "gb_per_s",
    "of_roofline", "bound", "peak_gib", "off_ours", "error", "device", "torch", "triton", "commit",
)  # fmt: skip
HEADER = (
    f"{'op':26}{'shape':34}{'provider':18}{'':10}{'ms':>9}{'timed':>8}"
    f"{'TFLOP/s':>9}{'GB/s':>8}{'roofline':>9}{'GiB':>7}"
)
SHORT_MS = 0.5
"""Below this launches count, and an op is timed by replaying a graph of it."""


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen cases, print a line each, keep CSV and plots."""
    options = _parser().parse_args(arguments)
    if options.report:
        with options.report.open(newline="", encoding="utf-8") as file:
            return conclude(list(csv.DictReader(file)), options.plots)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        print("nothing measured: there is no GPU; --small runs every provider once on tiny shapes")
        return 0
    rows: list[dict[str, Any]] = []
    with own_stream(device):
        machine = measure_machine(device, small=options.small)
        print(
            f"{name_of(device)}: matmul {machine.flops / 1e12:.1f} TFLOP/s, copy {machine.bytes / 1e9:.0f} GB/s; seed 0"
        )
        print(HEADER)
        for row in rows_of(cases(options, device), machine, options):
            rows.append(row)
            print_row(row)
            if options.out:
                append([row], COLUMNS, options.out)  # at once: lent machines leave
    for name, why in kernel_peers.MISSING.items():
        print(f"peer not measured: {name} ({why})")
    return conclude(rows, options.plots)


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """Those that were asked for, with the providers that were asked for; for goals in the order of these."""
    found = kernel_cases.all_cases(device, small=options.small, words=options.ops)
    if options.goals:
        places = [(kernel_goals.place(case.op, case.shape), case) for case in found]
        found = (case for _, case in sorted(((n, case) for n, case in places if n is not None), key=itemgetter(0)))
    for case in found:
        wanted = {name: op for name, op in case.providers.items() if _asked(name, options.providers)}
        yield replace(case, providers=wanted)


def rows_of(chosen: Iterable[Case], machine: Machine, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of every case; of its tuning too, where that fails."""
    for case in chosen:
        if options.tune and case.tune is not None:
            try:
                case.tune(case.inputs())
            except Exception as error:
                yield _row(case, "ours: tuning", "-", machine, error=_text(error))
        yield from measure(case, machine, repeats=options.repeats)


def conclude(rows: Sequence[Mapping[str, Any]], plots: Path | None) -> int:
    """Plots, goals, and 1 where something of ours failed."""
    if plots:
        plot(rows, plots)
    print("\n".join(("", *kernel_goals.report(rows))))
    failed = [row for row in rows if row["error"] and kernel_goals.is_ours(row)]
    for row in failed:
        print(f"failed: {row['op']} {row['shape']} {row['provider']} {row['direction']}: {row['error']}")
    return int(bool(failed))


def measure(case: Case, machine: Machine, repeats: int) -> Iterator[dict[str, Any]]:
    """Time every provider of a case, one after the other: forward, backward, and both in one."""
    torch._dynamo.reset()  # else the ninth shape of a compiled provider runs eagerly
    inputs = case.inputs()
    first: Tensor | None = None
    for provider, op in case.providers.items():
        direction, off = "-", ""
        try:
            outputs, works = prepare(op, case.laid_out(provider, inputs))
            first = outputs if first is None else first
            off = f"{difference(outputs, first):.1e}" if provider != next(iter(case.providers)) else ""
            for direction, work in works.items():
                ms, how = timed(work, machine.device, repeats)
                yield _row(case, provider, direction, machine, ms, timed=how, peak_gib=peak(work), off_ours=off)
        except Exception as error:
            yield _row(case, provider, direction, machine, error=_text(error))
        outputs = works = work = None  # the next provider's memory is its own
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()


def prepare(op: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Callable[[], object]]]:
    """The first output, and what is to be timed: the op, its gradients, and both in one."""
    leaves = [one for one in inputs.values() if isinstance(one, Tensor) and one.requires_grad]
    forward = partial(op, **inputs)
    found = forward()
    outputs = trained(found)
    if not outputs:
        return found, {"forward": forward}
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator, device=o.device, dtype=o.dtype) for o in outputs]
    backward = partial(torch.autograd.grad, outputs, leaves, grads, retain_graph=True)

    def both() -> object:
        return torch.autograd.grad(trained(forward()), leaves, grads)

    return outputs[0].detach(), {"forward": forward, "backward": backward, "full": both}


def difference(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what was wanted."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))


def trained(outputs: Any) -> list[Tensor]:
    """The outputs that a gradient comes back from."""
    each = outputs if isinstance(outputs, tuple | list) else [outputs]
    return [one for one in each if isinstance(one, Tensor) and one.requires_grad]


def measure_machine(device: torch.device, *, small: bool) -> Machine:
    """The matmul and copy rates of the device."""
    size, dtype = (512, torch.float32) if small else (8192, torch.bfloat16)
    a = torch.randn(size, size, device=device).to(dtype)
    flops = 2 * size**3 / (min(timed(lambda: a @ a, device, 10)[0]) / 1e3)
    source = torch.empty((1 << 20) if small else (1 << 29), dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / (min(timed(lambda: target.copy_(source), device, 10)[0]) / 1e3)
    return Machine(device, flops, rate)


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """One stream for all: the graph of a backward pass must be captured on the stream of its forward pass."""
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> tuple[list[float], str]:
    """Milliseconds of each repeat, with a cold cache, after warming up; and how: wall, events or graph."""
    for _ in range(3 if device.type == "cuda" else 1):
        work()
    if device.type != "cuda":
        return [_wall(work) for _ in range(repeats)], "wall"
    ms = _by_events(work, device, repeats)
    if statistics.median(ms) > SHORT_MS or waits(work):
        return ms, "events"
    try:
        return _by_events(captured(work).replay, device, repeats), "graph"
    except RuntimeError:
        return ms, "events"


def _by_events(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    cold = torch.empty(256 << 20, dtype=torch.int8, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        cold.zero_()
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def waits(work: Callable[[], object]) -> bool:
    """Whether the host waits for the GPU somewhere: no graph can hold that, and trying spoils what comes after."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of one call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        work()
    return graph


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
    time_of = f"{row['ms_p50']:9.4f}{row['timed']:>8}"
    rates = f"{row['tflops']:9.1f}{row['gb_per_s']:8.0f}{row['of_roofline']:9.1%}{row['peak_gib']:7.2f}"
    print(start + time_of + rates, flush=True)


def plot(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
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
            values = {
                f"{r['shape']} {r['direction']}": float(r["of_roofline"]) for r in mine if r["provider"] == provider
            }
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
    case: Case, provider: str, direction: str, machine: Machine, ms: Sequence[float] = (), **more: Any
) -> dict[str, Any]:
    flops, moved = _needs(case, direction)
    low, middle, high = _quantiles(ms)
    needed = max(flops / machine.flops, moved / machine.bytes)
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"), "op": case.op, "shape": case.shape, "provider": provider,
        "direction": direction, "ms_p20": round(low, 5), "ms_p50": round(middle, 5), "ms_p80": round(high, 5),
        "timed": "", "tflops": round(flops / middle / 1e9, 2), "gb_per_s": round(moved / middle / 1e6, 1),
        "of_roofline": round(needed * 1e3 / middle, 4),
        "bound": "operations" if flops / machine.flops > moved / machine.bytes else "bytes",
        "off_ours": "", "error": "", "device": name_of(machine.device), "torch": torch.__version__,
        "triton": _triton_version(), "commit": commit(), **more, "peak_gib": round(more.get("peak_gib", 0.0), 3),
    }  # fmt: skip


def _needs(case: Case, direction: str) -> tuple[float, float]:
    """Operations and bytes of a direction."""
    ways = {"forward": (case.flops, case.bytes), "backward": (case.backward_flops, case.backward_bytes)}
    if direction == "full":
        return case.flops + case.backward_flops, case.bytes + case.backward_bytes
    return ways.get(direction, (0.0, 0.0))


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _asked(name: str, words: Sequence[str]) -> bool:
    return not words or any(name.startswith(word) for word in words)


def _quantiles(ms: Sequence[float]) -> tuple[float, float, float]:
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
    parser.add_argument(
        "--providers", nargs="*", default=[], help="only those whose name starts with one of these words"
    )
    parser.add_argument("--goals", action="store_true", help="only the shapes that a goal names")
    parser.add_argument("--report", type=Path, help="measure nothing: goals and plots of this CSV")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="tiny shapes, also on a CPU")
    parser.add_argument("--tune", action="store_true", help="measure launch settings first and keep them")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    parser.add_argument("--plots", type=Path, help="folder for a picture of each op")
    return parser


if __name__ == "__main__":
    sys.exit(main())

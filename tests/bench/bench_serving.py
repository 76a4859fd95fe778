"""Serving: throughput, latency, load steps and hot swaps, all providers in one run and in turn.

    python -m tests.bench.bench_serving --quick --json serving.json       # the five figures, under four minutes
    python -m tests.bench.bench_serving --rounds 5 --out tests/bench/serving.csv [--peers FOLDER]

Providers share the model, the machine and the load generator (wrk where it is installed), which runs in another
process. Every ratio is taken within a round, between measurements seconds apart; the median over rounds is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.bench.results import append
from tests.bench.serving import swap
from tests.bench.serving.figures import COLUMNS, Rounds, in_time, kept, row, steady
from tests.bench.serving.load import KEY_VARIABLE, Trace, start_trace, throughput
from tests.bench.serving.peers import PEERS, make
from tests.bench.serving.providers import Provider, ours

FLOOR, BARE, WHOLE, BATCHED = (
    "floor", "deepseek_ray, model only", "deepseek_ray, features and log", "Ray Serve, @serve.batch",
)  # fmt: skip
Part = tuple[dict[str, float], list[dict[str, object]]]
"""Figures of the JSON, rows of the CSV."""
PARTS = ("throughput", "steady", "swap", "step")
OBJECTIVE_MS = 50.0
_BEGUN = time.monotonic()
FIXED_CAPS = (8, 64, 512)
_STEP_FIGURES: dict[str, Callable[[Trace], float]] = {
    f"seconds with p99 <= {OBJECTIVE_MS:g} ms under a 5x step": lambda trace: kept(trace, OBJECTIVE_MS, 20),
    f"answered/s within {OBJECTIVE_MS:g} ms under a 5x step": lambda trace: in_time(trace, OBJECTIVE_MS) / 20,
    "answered/s under a 5x step": lambda trace: (len(trace.status) - trace.failed) / 20,
}


def main() -> int:
    """Measure, print, append to the CSV, draw, write the JSON."""
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the servers end with it
    os.environ.setdefault(KEY_VARIABLE, "only-for-this-benchmark")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for found, rows in (_quick if options.quick else _full)(Path(folder), options):
            figures |= found
            _keep(figures, rows, options)
    print(json.dumps(figures, indent=2))
    return 0


def _keep(figures: dict[str, float], rows: Sequence[dict[str, object]], options: argparse.Namespace) -> None:
    """What is measured is kept at once: a later part may fail."""
    for line in rows:
        print(f"{line['figure']:<44} {line['provider']:<32} {line['value']:>10} ({line['low']} - {line['high']})")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.out:
        append(rows, COLUMNS, options.out)
        _draw(rows, options.out.with_suffix(".png"))


def _quick(folder: Path, options: argparse.Namespace) -> Iterator[Part]:
    run, model, file, records = _make_run(folder)
    known = {provider.name: provider for provider in ours(run, model, file, records)}
    chosen = [known[name] for name in (FLOOR, BARE, WHOLE, BATCHED)]
    with _running(chosen, folder):
        rounds = _rounds(chosen, options.rounds, 1.0)
        yield _ratios(rounds), [*rounds.rows(FLOOR)]
        _say("swaps")
        swaps = swap.measure(known[WHOLE], run, 5)
        yield _swap_keys(swaps), _swap_rows(swaps)


def _full(folder: Path, options: argparse.Namespace) -> Iterator[Part]:
    run, model, file, records = _make_run(folder)
    chosen = ours(run, model, file, records) + _peers(options.peers, model, file)
    known = {provider.name: provider for provider in chosen}
    if "throughput" in options.parts:
        with _running(chosen, folder) as started:
            rounds = _rounds(started, options.rounds, options.seconds)
        yield _ratios(rounds), [*rounds.rows(FLOOR)]
    if {"steady", "swap"} & set(options.parts):
        three = [known[FLOOR], known[BARE], known[WHOLE]]
        with _running(three, folder):
            if "steady" in options.parts:
                yield {}, [*steady(three, 100.0, 2.0)]
            if "swap" in options.parts:
                swaps = swap.measure(known[WHOLE], run, 20)
                yield _swap_keys(swaps), _swap_rows(swaps)
    if "step" in options.parts:
        yield {}, _steps(folder, known[WHOLE], options.rounds)


def _ratios(rounds: Rounds) -> dict[str, float]:
    figures = {
        "throughput_vs_floor": rounds.ratio(BARE, FLOOR, 64),
        "throughput_vs_floor_16": rounds.ratio(BARE, FLOOR, 16),
        "throughput_vs_floor_features_and_log": rounds.ratio(WHOLE, FLOOR, 64),
        "throughput_vs_plain_serve": rounds.ratio(BARE, BATCHED, 64),
        "p50_vs_floor": rounds.ratio(BARE, FLOOR, 1, "p50"),
    }
    return {name: round(value, 3) for name, value in figures.items()}


def _swap_keys(swaps: swap.Swaps) -> dict[str, float]:
    return {
        "swap_failed_requests": swaps.failed,
        "swap_added_ms": round(swaps.added_ms, 1),
        "swap_one_batch_ms": round(swaps.batch_ms, 1),
    }


def _rounds(providers: Sequence[Provider], num_rounds: int, seconds: float) -> Rounds:
    rounds, warm = Rounds(), Rounds()
    for provider in providers:
        warm.add(provider, 16, 1.0)
    for number in range(num_rounds):
        _say(f"round {number + 1} of {num_rounds}")
        for connections in (64, 16, 1):
            for provider in providers:
                if connections == 64 or not provider.least_s:  # Ray Serve's quick start is compared at 64 only
                    rounds.add(provider, connections, seconds)
    return rounds


def _swap_rows(swaps: swap.Swaps) -> list[dict[str, object]]:
    figures = {"failed": swaps.failed, "added_ms": swaps.added_ms, "one batch_ms": swaps.batch_ms}
    figures["memory after the last / first"] = swaps.memory_ratio
    return [row(f"{swaps.num_swaps} swaps: {name}", WHOLE, [value]) for name, value in figures.items()]


def _steps(folder: Path, whole: Provider, num_rounds: int) -> list[dict[str, object]]:
    """The objective under a load step of five times, to 1.25 of what the service takes at 64 connections."""
    with _running([whole], folder):
        rate = throughput(whole.url, whole.body, 64, 5.0).rps / 4
    settings = {f"fixed cap {cap}": [f"serving.max_batch_size={cap}"] for cap in FIXED_CAPS}
    settings["adaptive"] = [f"serving.slo_p99_ms={OBJECTIVE_MS:g}"]
    found: dict[str, dict[str, list[float]]] = {what: {name: [] for name in settings} for what in _STEP_FIGURES}
    for number in range(num_rounds):
        _say(f"load step {number + 1} of {num_rounds}")
        for name, words in settings.items():
            command = [*whole.command, *(part for word in words for part in ("--set", word))]
            provider = Provider(name, command, whole.path, whole.body)
            with _running([provider], folder):
                trace = start_trace(provider.url, provider.body, f"{rate:g}x5,{5 * rate:g}x10,{rate:g}x5")()
            for what, figure in _STEP_FIGURES.items():
                found[what][name].append(figure(trace))
    return [row(what, name, values) for what, by_name in found.items() for name, values in by_name.items()]


def _peers(folder: Path | None, model: Path, file: Path) -> list[Provider]:
    if folder is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name in PEERS:
        try:
            made.append(make(name, folder.resolve(), model, json.loads(file.read_text(encoding="utf-8"))))
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return made


@contextmanager
def _running(providers: Sequence[Provider], folder: Path) -> Iterator[list[Provider]]:
    """Start all; those that do not start are named and left out, ours are an error."""
    started = []
    try:
        for number, provider in enumerate(providers):
            provider.start(folder / f"{number}.log")
        for number, provider in enumerate(providers):
            try:
                provider.wait()
                started.append(provider)
            except RuntimeError as error:
                print(f"{error}:\n{(folder / f'{number}.log').read_text()[-2_000:]}", file=sys.stderr)
                if provider.name not in PEERS:
                    raise
        _say(f"{len(started)} providers answer")
        yield started
    finally:
        for provider in providers:
            provider.stop()


def _say(what: str) -> None:
    print(f"{time.monotonic() - _BEGUN:6.1f} s  {what}", file=sys.stderr, flush=True)


def _make_run(folder: Path) -> tuple[Path, Path, Path, Path]:
    """A run with two registered versions, the first one's files, and one row of its inputs: arrays, named columns."""
    from deepseek_ray.config import ModelConfig
    from deepseek_ray.data import windows
    from deepseek_ray.data.batch_engine import compute
    from deepseek_ray.registry.pyfunc import SEQUENCE_COLUMN
    from tests.served_run import DELAY_DAYS, SEQUENCE_LEN, add_version, make_run

    shape = ModelConfig(d_model=16, num_layers=1, num_heads=2, d_expert=16, num_bins=4)
    made = make_run(folder / "run", model=shape, days=15, future_days=2)
    spec = windows.load().vector("default")
    features = compute(made.history, spec, label_delay_days=DELAY_DAYS, sequence_len=SEQUENCE_LEN)
    add_version(made, spec, features, shape, seed=1)
    file = folder / "row.json"
    line = {"features": features.values[-1].tolist(), "sequence": features.sequence[-1].tolist()}
    file.write_text(json.dumps(line), encoding="utf-8")
    records = folder / "records.json"
    named = dict(zip(spec.names, line["features"], strict=True)) | {SEQUENCE_COLUMN: line["sequence"]}
    records.write_text(json.dumps({"records": [named]}), encoding="utf-8")
    return folder / "run", folder / "run" / "model-0", file, records


def _draw(rows: Sequence[dict[str, object]], target: Path) -> None:
    """Bars: requests a second at 64 connections."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [line for line in rows if line["figure"] == "requests/s at 64 connections"]
    if not shown:
        return
    shown.sort(key=lambda line: float(str(line["value"])))
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(shown) + 1.5))
    bars = axes.barh([str(line["provider"]) for line in shown], [float(str(line["value"])) for line in shown])
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xlabel("requests a second, 64 connections")
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Serving, all providers in one run.")
    parser.add_argument("--quick", action="store_true", help="the five figures of the JSON only")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the whole run (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    parser.add_argument("--peers", type=Path, help="folder for the peers' environments; they are installed on demand")
    parser.add_argument("--out", type=Path, help="CSV to append to; a plot beside it")
    parser.add_argument("--json", type=Path, help="where the figures go")
    return parser


if __name__ == "__main__":
    sys.exit(main())

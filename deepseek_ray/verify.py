"""What ``deepseek-ray verify mesh | checkpoint | recovery`` and ``deepseek-ray plan`` do."""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
from pathlib import Path
from typing import Any

from deepseek_ray.config_moe import MoEConfig, ParallelConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.parallel.plan import Machine, propose
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train.parity import BOUNDS, Parity, verification_config, verify_mesh
from deepseek_ray.train.recovery import verify_recovery
from deepseek_ray.train.reshard import verify_checkpoint


def mesh(options: argparse.Namespace) -> int:
    """Print how far a mesh is from one process, step by step; exit status 1 when too far."""
    if options.steps < 1:
        raise ConfigError(f"--steps {options.steps}.", fix="give 1 or more")
    config = _config(options, options.mesh, schedule=options.schedule)
    if not _has(options, "step.batch_size"):
        config = verification_config(config)
    result = verify_mesh(config, options.steps, on_ray=options.on_ray, shared=options.shared)
    _print_parity(result)
    return _finish(result.plain(), result.passed, options.json)


def checkpoint(options: argparse.Namespace) -> int:
    """Print whether a checkpoint of one mesh, loaded on another and saved there, is the same to the last bit."""
    source, target = (verification_config(_config(options, mesh)) for mesh in (options.source, options.target))
    result = verify_checkpoint(source, target)
    print(f"{result['tensors']} tensors, {result['bytes']} bytes: {len(result['different'])} differ")
    for name in result["different"][:20]:
        print(f"  {name}")
    return _finish(result, result["pass"], options.json)


def recovery(options: argparse.Namespace) -> int:
    """Print what the death of a worker cost; exit status 1 when the end differs or too much was lost."""
    config = _config(options, options.mesh)
    number = getattr(signal, f"SIG{options.signal.upper().removeprefix('SIG')}", None)
    if number is None:
        raise ConfigError(f"--signal {options.signal!r} is no signal.", fix="give KILL, TERM or INT")
    with tempfile.TemporaryDirectory(dir=options.shared) as folder:
        result = verify_recovery(config, Path(folder), kill_at=options.kill_at, signal=int(number))
    print(f"rank {result.killed_rank} ended after step {result.killed_after_step}; resumed at {result.resumed_at_step}")
    print(f"steps lost {result.steps_lost} (checkpoint every {result.checkpoint_every})")
    print(f"seconds to resume {result.seconds_to_resume:.1f}")
    print(f"final loss {result.final_loss:.9f}, {result.final_loss_diff:g} from the undisturbed run")
    return _finish(result.plain(), result.passed, options.json)


def plan(options: argparse.Namespace) -> int:
    """Print the meshes that fit, the fastest first, with what each needs and why."""
    for name in ("gpus", "memory", "gpus_per_node", "top"):
        if getattr(options, name) <= 0:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {getattr(options, name)}.", fix="give a number above 0")
    config = load_moe_preset(options.config, file=options.file, overrides=options.overrides)
    machine = Machine(memory_gib=options.memory, gpus_per_node=options.gpus_per_node)
    plans = propose(config, options.gpus, machine)
    print(f"{len(plans)} meshes of {options.gpus} GPUs fit {options.memory:g} GiB; sizes in GiB a GPU")
    print(_row("mesh", "schedule", "weights", "grads", "moments", "activ.", "sum", "bubble", "traffic", "step"))
    for one in plans[: options.top]:
        sizes = (one.weights_gib, one.gradients_gib, one.optimiser_gib, one.activations_gib, one.memory_gib)
        schedule = one.degrees.schedule if one.degrees.pp > 1 else "-"
        times = (f"{one.bubble:.1%}", f"{one.traffic_s:.2f}s", f"{one.step_s:.2f}s")
        print(_row(one.mesh(), schedule, *(f"{size:.1f}" for size in sizes), *times))
    best = plans[0].degrees
    same = f" --file {options.file}" if options.file else ""
    settings = [*(f"parallel.{degree}" for degree in best.degrees().split(",")), f"parallel.schedule={best.schedule}"]
    chosen = "".join(f" --set {one}" for one in [*options.overrides, *settings])
    print(f"Next: python -m pipelines.moe.train --config {options.config}{same}{chosen}")
    return 0


def parse_mesh(text: str) -> dict[str, int]:
    """Degrees of ``pp=2,dp_shard=2``.

    Raises:
        ConfigError: an axis is unknown or a degree is no number.
    """
    axes = [name for name in ParallelConfig.model_fields if name not in ("schedule", "stages_per_rank")]
    degrees = {}
    for part in filter(None, text.split(",")):
        axis, _, degree = part.partition("=")
        if axis not in axes or not degree.isdecimal() or not int(degree):
            raise ConfigError(
                f"Mesh {text!r}: {part!r} is no degree.", fix=f"write AXIS=NUMBER, axes: {', '.join(axes)}"
            )
        degrees[axis] = int(degree)
    return degrees


def _row(mesh: str, schedule: str, *cells: str) -> str:
    return f"{mesh:34}{schedule:22}" + "".join(f"{cell:>9}" for cell in cells)


def _config(options: argparse.Namespace, mesh: str, schedule: str | None = None) -> MoEConfig:
    for flag, folder in (("--json", options.json and options.json.absolute().parent), ("--shared", options.shared)):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{flag}: there is no folder {str(folder)!r}.", fix="make it first")
    if _has(options, "step.precision"):
        raise ConfigError("--set step.precision: what is verified is named otherwise.", fix="give --dtype")
    one = dict.fromkeys(("pp", "dp_replicate", "dp_shard", "tp", "ep"), 1)
    degrees = [f"parallel.{axis}={degree}" for axis, degree in (one | parse_mesh(mesh)).items()]
    chosen = [f"parallel.schedule={schedule}"] if schedule else []
    precision = [f"step.precision={options.dtype}"]
    overrides = [*degrees, *chosen, *precision, *options.overrides]
    return load_moe_preset(options.config, file=options.file, overrides=overrides)


def _has(options: argparse.Namespace, key: str) -> bool:
    return any(item.partition("=")[0] == key for item in options.overrides)


def _print_parity(result: Parity) -> None:
    print(f"{result.world_size} processes against one, {result.dtype}")
    print(f"{'step':>6}{'loss, relative':>18}{'gradient, cosine':>18}")
    for step, pair in enumerate(zip(result.loss_rel_diff, result.grad_cosine_diff, strict=True)):
        print(f"{step:6}{pair[0]:18.2e}{pair[1]:18.2e}")
    loss, gradient, weight = BOUNDS[result.dtype]
    print(f"{'most':>6}{max(result.loss_rel_diff):18.2e}{max(result.grad_cosine_diff):18.2e}")
    print(f"{'bound':>6}{loss:18.0e}{gradient:18.0e}")
    print(f"largest difference of a parameter {result.max_param_diff:.2e} (bound {weight:g}), "
          f"of an expert's tokens {result.max_count_diff}")  # fmt: skip


def _finish(result: dict[str, Any], passed: bool, target: Path | None) -> int:
    if target is not None:
        target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1

"""The ``deepseek-ray`` command: one verb for each thing a user does.

Verbs that are programs of the repository (``pipelines/``, ``serve_apps/``) start by name in a subprocess and get
every argument after the verb. The others run here; what they need is imported when they are called, so that
``--help`` stays instant.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from deepseek_ray import __version__
from deepseek_ray.errors import DeepseekRayError, EnvironmentProblemError

if TYPE_CHECKING:
    from deepseek_ray.config import Config
    from deepseek_ray.paths import RunPaths
    from deepseek_ray.settings import Purpose

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

PROGRAMS: dict[str, tuple[str, str]] = {
    "ingest": ("pipelines.risk.ingest", "read, check and store transactions"),
    "train": ("pipelines.risk.train", "features, training, yardsticks, registration"),
    "tune": ("pipelines.risk.tune", "search hyperparameters"),
    "serve": ("serve_apps.serve", "answer over HTTP and gRPC: a run's decisions, or any one model"),
    "warm": ("pipelines.risk.warm", "bring the live feature state to the end of the history"),
    "replay": ("pipelines.risk.replay", "play held-out days against the service"),
    "update": ("pipelines.risk.update", "warm-start a challenger, gate it, promote it"),
    "updater": ("serve_apps.updater", "update the champion whenever it is time"),
    "label": ("pipelines.risk.label", "choose decisions to send for labelling"),
    "review": ("pipelines.risk.review", "recompute what was served, and judge the update"),
    "report": ("pipelines.risk.report", "write the report of a run again"),
    "handbook": ("pipelines.risk.handbook", "the published protocol on handbook-shaped parquet"),
    "demo": ("pipelines.risk.demo", "the whole loop, a quarter of an hour"),
}
"""Verb -> (module, one line of help)."""

EXIT_REFUSED = 2
"""Exit status of an error that was raised on purpose."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _dispatch(arguments))


def guarded(program: Callable[[], int | None]) -> int:
    """Run a program; an error raised on purpose becomes one line on stderr and exit status 2.

    ``pipelines`` and ``serve_apps`` wrap their ``main`` in it too, so that a subprocess reports like the CLI.
    """
    from deepseek_ray.logs import silence_telemetry

    silence_telemetry()
    try:
        return program() or 0
    except DeepseekRayError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_REFUSED
    except BrokenPipeError:  # the reader of stdout left, as in `deepseek-ray doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.ENOSPC, errno.EACCES, errno.ENOTDIR):
            raise
        print(f"error: {error.filename or 'The disk'}: {error.strerror}. Fix: see deepseek-ray doctor", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def checkout_root() -> Path | None:
    """The repository's root: the working directory or a parent of it, else where an editable install points to."""
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (folder / "pipelines" / "risk").is_dir() and (folder / "deepseek_ray").is_dir():
            return folder
    return None


def start_program(verb: str, arguments: Sequence[str]) -> int:
    """Start the program behind a verb and wait for it; SIGTERM is passed on.

    Raises:
        EnvironmentProblemError: the command runs outside a checkout.
    """
    module = PROGRAMS[verb][0]
    root = checkout_root()
    if root is None:
        raise EnvironmentProblemError(
            f"'deepseek-ray {verb}' starts the program {module!r}, which is part of the repository, not of the wheel.",
            fix="change into a checkout of the repository and try again",
        )
    search = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    environment = {"DEEPSEEK_RAY_RUNS": str(root / "runs"), **os.environ, "PYTHONPATH": search}
    with subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment) as child:
        previous = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            return child.wait()
        finally:
            signal.signal(signal.SIGTERM, previous)


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in PROGRAMS:
        return start_program(arguments[0], arguments[1:])
    parser = build_parser()
    options = parser.parse_args(arguments)
    root = checkout_root()
    if root is not None:
        os.environ.setdefault("DEEPSEEK_RAY_RUNS", str(root / "runs"))
    module, _, function = options.command.partition(":")
    status: int = getattr(importlib.import_module(module), function)(options)
    return status


def build_parser() -> argparse.ArgumentParser:
    """The argument parser with every verb."""
    parser = argparse.ArgumentParser(
        prog="deepseek-ray",
        description="event -> features -> train -> register -> promote -> serve -> feedback -> update",
        epilog="Each verb answers --help. Settings: --preset NAME, --config FILE.yaml, --set section.name=value.",
    )
    parser.add_argument("--version", action="version", version=f"deepseek-ray {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for add in (
        _add_doctor,
        _add_explain,
        _add_verify,
        _add_plan,
        _add_registry,
        _add_traffic,
        _add_compact,
        _add_drift,
        _add_keys,
    ):
        add(verbs)
    for verb, (_, summary) in PROGRAMS.items():
        verbs.add_parser(verb, help=summary, add_help=False)  # started by name before parsing
    return parser


def _add_doctor(verbs: Verbs) -> None:
    verb = verbs.add_parser("doctor", help="what works here, and the fix for what does not")
    verb.add_argument("--json", action="store_true", help="print the checks as JSON")
    _run_here(verb, "deepseek_ray.doctor:run")


def _add_explain(verbs: Verbs) -> None:
    verb = verbs.add_parser("explain", help="from a prediction to version, run, data, features and commit")
    verb.add_argument("prediction_id", metavar="PREDICTION_ID")
    verb.add_argument("--json", action="store_true", help="print everything as JSON")
    _run_here(verb, "deepseek_ray.commands:explain")


def _add_verify(verbs: Verbs) -> None:
    verify = verbs.add_parser("verify", help="prove that what was served is what training sees")
    what = verify.add_subparsers(metavar="WHAT", required=True)
    verb = what.add_parser("features", help="recompute every logged vector by the point-in-time join")
    verb.add_argument("--limit", type=int, default=20, help="differences to print (default: 20)")
    _run_here(verb, "deepseek_ray.commands:verify_features")
    verb = what.add_parser("mesh", help="train a mesh and one process from the same seed, and compare")
    verb.add_argument("--mesh", default="", help="degrees, as in pp=2,dp_shard=2,tp=2,ep=2")
    verb.add_argument("--schedule", help="of the pipeline, for example DualPipeV")
    verb.add_argument("--steps", type=int, default=20)
    verb.add_argument("--on-ray", action="store_true", help="run the mesh on Ray Train, wherever there is room")
    _run_verification(verb, "deepseek_ray.verify:mesh")
    verb = what.add_parser("checkpoint", help="save on one mesh, load on another, save there, and compare")
    verb.add_argument("--from", dest="source", required=True, metavar="MESH")
    verb.add_argument("--to", dest="target", required=True, metavar="MESH")
    _run_verification(verb, "deepseek_ray.verify:checkpoint")
    verb = what.add_parser("recovery", help="end a worker on the way, and compare with an undisturbed run")
    verb.add_argument("--mesh", default="dp_shard=2", help="degrees (default: dp_shard=2)")
    verb.add_argument("--kill-at", type=int, required=True, metavar="STEP", help="steps that are done before")
    verb.add_argument("--signal", default="KILL", help="what ends the worker (default: KILL)")
    _run_verification(verb, "deepseek_ray.verify:recovery")


def _add_plan(verbs: Verbs) -> None:
    verb = verbs.add_parser("plan", help="meshes for a number of GPUs: what each needs, and why")
    verb.add_argument("--gpus", type=int, required=True)
    verb.add_argument("--memory", type=float, default=80.0, help="GiB a GPU (default: 80)")
    verb.add_argument("--gpus-per-node", type=int, default=8)
    verb.add_argument("--top", type=int, default=10, help="meshes to print (default: 10)")
    _add_shape(verb, "qwen3_30b_a3b")
    verb.set_defaults(command="deepseek_ray.verify:plan")


def _run_verification(verb: argparse.ArgumentParser, command: str) -> None:
    verb.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    verb.add_argument("--json", type=Path, metavar="OUT", help="write every figure here")
    verb.add_argument("--shared", type=Path, metavar="DIR", help="storage that every node sees, on a cluster")
    _add_shape(verb, "debug_moe")
    verb.set_defaults(command=command)


def _add_shape(verb: argparse.ArgumentParser, preset: str) -> None:
    """The arguments that name a model, as in ``python -m pipelines.moe.train``."""
    verb.add_argument("--config", default=preset, help=f"preset of deepseek_ray/presets_moe.py (default: {preset})")
    verb.add_argument("--file", type=Path, help="YAML file of settings")
    verb.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.NAME=VALUE", help="one setting"
    )


def _add_registry(verbs: Verbs) -> None:
    registry = verbs.add_parser("registry", help="history, promotion, rollback and deletion of versions")
    actions = registry.add_subparsers(metavar="ACTION", required=True)
    verb = actions.add_parser("history", help="who became champion, when, by which numbers")
    verb.add_argument("--json", action="store_true", help="print everything as JSON")
    _run_here(verb, "deepseek_ray.commands:history")
    verb = actions.add_parser("promote", help="decide again on a version's recorded evidence, and promote it")
    verb.add_argument("version", metavar="VERSION", help="a number or an alias")
    _run_here(verb, "deepseek_ray.commands:promote")
    verb = actions.add_parser("rollback", help="make the previous version champion again")
    verb.add_argument("--note", default="", help="why, for the history")
    _run_here(verb, "deepseek_ray.commands:rollback")
    verb = actions.add_parser("delete", help="delete a version that no alias names")
    verb.add_argument("version", metavar="VERSION", help="a number")
    _run_here(verb, "deepseek_ray.commands:delete")


def _add_traffic(verbs: Verbs) -> None:
    traffic = verbs.add_parser("traffic", help="which version answers which share of the cards")
    actions = traffic.add_subparsers(metavar="ACTION", required=True)
    verb = actions.add_parser("show", help="arms, schedule, shadow, and the last moves")
    verb.add_argument("--json", action="store_true", help="print everything as JSON")
    _run_here(verb, "deepseek_ray.traffic_commands:show")
    verb = actions.add_parser("set", help="give an arm a share, or set the shadow; the other arms stay as they are")
    verb.add_argument("arms", nargs="*", metavar="ARM[@VERSION][=PERCENT]", help="as in canary@7=5; 0 ends the arm")
    verb.add_argument("--shadow", metavar="VERSION", help="scores beside the others, unseen; 'off' ends it")
    verb.add_argument("--schedule", metavar="PERCENTS", help="steps by which the arm grows, as in 1,5,25,100")
    verb.add_argument("--dwell", type=float, metavar="SECONDS", help="least time on a step (default: 3600)")
    verb.add_argument("--min-decisions", type=int, metavar="N", help="least decisions on a step (default: 1000)")
    verb.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE", help="as in max_psi=0.3")
    _move_traffic(verb, "deepseek_ray.traffic_commands:set_traffic")
    verb = actions.add_parser("promote", help="make the arm's version champion if the gate agrees, and end the arm")
    _move_traffic(verb, "deepseek_ray.traffic_commands:promote")
    verb = actions.add_parser("rollback", help="give every card back to the champion")
    _move_traffic(verb, "deepseek_ray.traffic_commands:rollback")


def _move_traffic(verb: argparse.ArgumentParser, command: str) -> None:
    verb.add_argument("--note", default="", help="why, for the history")
    _run_here(verb, command)


def _add_compact(verbs: Verbs) -> None:
    verb = verbs.add_parser("compact", help="move the prediction log into parquet")
    verb.add_argument("--prune", action="store_true", help="drop the vectors from the log that the parquet holds")
    _run_here(verb, "deepseek_ray.commands:compact")


def _add_drift(verbs: Verbs) -> None:
    text = "how far live decisions are from the training days; status 3 when a bound is passed"
    verb = verbs.add_parser("drift", help=text, description=f"Print {text}. Bounds: the settings of the section drift.")
    verb.add_argument("--days", type=float, help="newest days compared (default: drift.window_days)")
    verb.add_argument("--limit", type=int, default=20, help="features to print (default: 20)")
    verb.add_argument("--json", action="store_true", help="print everything as JSON")
    verb.add_argument("--plot", type=Path, metavar="OUT.png", help="draw features, calibration and days")
    _run_here(verb, "deepseek_ray.commands:drift")


def _add_keys(verbs: Verbs) -> None:
    keys = verbs.add_parser("keys", help="API keys of a service: add, list, revoke; no restart needed")
    actions = keys.add_subparsers(metavar="ACTION", required=True)
    verb = actions.add_parser("add", help="make a key, print it once, and note its digest")
    verb.add_argument("name", metavar="NAME", help="who uses it")
    verb.add_argument("--scope", choices=("read", "write", "admin"), default="write", help="default: write")
    verb.add_argument("--days", type=float, help="valid for so long (default: until it is revoked)")
    verb.add_argument(
        "--rate", type=float, metavar="R", help="records a second, 0 for any (default: serving.rate_per_key)"
    )
    _run_here(verb, "deepseek_ray.commands_keys:add")
    verb = actions.add_parser("list", help="names, scopes, rates and ends")
    verb.add_argument("--json", action="store_true", help="print everything as JSON")
    _run_here(verb, "deepseek_ray.commands_keys:show")
    verb = actions.add_parser("revoke", help="take a key back; it is refused a second later")
    verb.add_argument("key", metavar="ID_OR_NAME", help="an id, or a name that one key has")
    _run_here(verb, "deepseek_ray.commands_keys:revoke")


def _run_here(verb: argparse.ArgumentParser, command: str) -> None:
    """Finish a verb that a function ``module:name`` carries out in this process."""
    add_settings(verb)
    verb.set_defaults(command=command)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments by which every program is told its run folder and settings; see ``settings_of``."""
    parser.add_argument("--run", help="run folder (default: runs/latest)")
    parser.add_argument("--preset", help="named settings of deepseek_ray/presets.py (default: the run's own, or demo)")
    parser.add_argument("--config", type=Path, help="YAML file of settings over those of the preset")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.NAME=VALUE", help="one setting"
    )


def settings_of(options: argparse.Namespace, purpose: Purpose = "use") -> tuple[Config, RunPaths]:
    """The config and the run folder that the options name; see ``settings.resolve``.

    Raises:
        ConfigError: the preset, a key or a value is not valid, or the run was made with another one.
        EnvironmentProblemError: the run does not exist, and the purpose is not to make it.
    """
    from deepseek_ray.paths import resolve_run
    from deepseek_ray.settings import resolve

    paths = resolve_run(options.run)
    chosen = {"preset": options.preset, "file": options.config, "overrides": options.overrides}
    return resolve(paths, purpose, **chosen), paths


def settings_arguments(options: argparse.Namespace) -> list[str]:
    """The arguments that give another program the same settings, but not the run folder."""
    named = {"--preset": options.preset, "--config": options.config}
    return [f"{name}={value}" for name, value in named.items() if value] + [f"--set={one}" for one in options.overrides]


if __name__ == "__main__":
    sys.exit(main())

"""The whole loop on one machine: events, features, training, registry, service, replay with drift, update, report.

python -m pipelines.risk.demo --seed 0

Every stage is the program that a user would start; its command is printed.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from deepseek_ray import settings
from deepseek_ray.cli import add_settings, guarded, settings_arguments, settings_of
from deepseek_ray.config import Config
from deepseek_ray.data.source import SYNTHETIC
from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.paths import RunPaths, mark_latest, runs_root, write_stage
from deepseek_ray.registry import Registry
from deepseek_ray.report import write_report

START_TIMEOUT_S = 120.0
DAYS_AFTER_UPDATE = 5


@dataclass(frozen=True)
class Stages:
    """Starts the programs of one demo with the same run and settings."""

    paths: RunPaths
    arguments: tuple[str, ...]

    def command(self, module: str, *arguments: str) -> list[str]:
        """The command line of a stage."""
        return [sys.executable, "-m", module, *arguments, f"--run={self.paths.root}", *self.arguments]

    def run(self, module: str, *arguments: str) -> None:
        """Run a stage to its end.

        Raises:
            EnvironmentProblemError: it failed; its own message stands above.
        """
        print(f"\n$ python -m {module} {' '.join(arguments)} --run {self.paths.root.name}", flush=True)
        status = subprocess.run(self.command(module, *arguments), check=False).returncode
        if status:
            raise EnvironmentProblemError(f"{module} ended with status {status}.", fix="see its message above")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the last lines say where the report is."""
    parser = argparse.ArgumentParser(prog="deepseek-ray demo", description="The whole loop on one machine.")
    add_settings(parser)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    options.overrides.append(f"seed={options.seed}")
    start = time.perf_counter()
    config, paths = _open(options)
    stages = Stages(paths, tuple(settings_arguments(options)))
    print(f"seed {config.seed}, run {paths.root}")
    _loop(stages, config)
    page = write_report(paths, extra={"wall_s": time.perf_counter() - start, "seed": config.seed})
    mark_latest(paths)
    print(f"\nReport: {page}\nNumbers: {paths.report_json}\nNext: make demo ARGS='--seed 1', or docs/quickstart.md")
    return 0


def _open(options: argparse.Namespace) -> tuple[Config, RunPaths]:
    options.run = options.run or str(runs_root() / f"{time.strftime('%Y%m%d-%H%M%S')}-risk-seed{options.seed}")
    config, paths = settings_of(options, "make")
    if paths.used == "served":  # repeated payments get their first answers again: no figure would be true
        raise EnvironmentProblemError(f"The run {paths.root} has been served already.", fix="give a new folder, --run")
    if paths.used:  # interrupted after the state was warmed: its table stays
        settings.refuse_changes(paths, config, ("seed", *settings.TABLE, *settings.DAYS, *settings.FEATURES))
    return config, paths.create()


def _loop(stages: Stages, config: Config) -> None:
    update_after = config.data.replay_days - DAYS_AFTER_UPDATE
    os.environ.setdefault(config.serving.api_key_env, secrets.token_urlsafe(24))
    os.environ.setdefault("PYTHONWARNINGS", "ignore::DeprecationWarning")  # libraries' own, between the progress bars
    if not stages.paths.used:
        flag = "--synthetic" if config.data.source == SYNTHETIC else f"--data={config.data.source}"
        stages.run("pipelines.risk.ingest", flag)
    stages.run("pipelines.risk.train")
    stages.run("pipelines.risk.warm")
    with _service(stages, config) as url:
        stages.run("pipelines.risk.replay", f"--url={url}", f"--update-after={update_after}", "--steady-rate=50")
    stages.run("pipelines.risk.review")
    registry = Registry.open(stages.paths, config.stores, name=config.model_name, create=False)
    write_stage(stages.paths, "history", [asdict(entry) for entry in registry.history()])


@contextmanager
def _service(stages: Stages, config: Config) -> Iterator[str]:
    """Serve while the block runs."""
    port = _free_port()
    url = f"http://{config.serving.host}:{port}"
    print(f"\n$ python -m serve_apps.risk --run {stages.paths.root.name}", flush=True)
    with subprocess.Popen(stages.command("serve_apps.risk", f"--port={port}")) as server:
        try:
            _await_ready(server, url)
            yield url
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_ready(server: subprocess.Popen[bytes], url: str) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise EnvironmentProblemError(f"The service at {url} did not become ready.", fix="see its message above")


if __name__ == "__main__":
    sys.exit(guarded(main))

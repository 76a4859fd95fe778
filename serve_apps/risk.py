"""Serve a run's champion over HTTP: ``python -m serve_apps.risk --run DIR --port P``.

Starts a local Ray cluster and one replica that answers on 127.0.0.1, prints its address, and stops
cleanly on SIGTERM or Ctrl-C: open requests finish, feature state is written, the log is closed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deepseek_ray.cli import add_settings, guarded
from deepseek_ray.config import Config
from deepseek_ray.errors import RegistryUnavailableError
from deepseek_ray.logs import keep_in
from deepseek_ray.paths import RunPaths
from serve_apps import ingress, terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; returns the exit status."""
    options = _parser().parse_args(arguments)
    config, paths = terminal.settings_of(options)
    key = terminal.api_key(config.serving, paths, generate=options.generate_key)
    config = terminal.with_ports(terminal.with_certificate(config, paths))
    ingress.prepare(config.serving.host, config.serving.port, config.stores.gcs_store)
    _check_champion(paths, config)
    run = str(paths.create().root)
    http = terminal.http_options(config.serving)
    terminal.serve(
        f"{config.model_name!r} of {run}",
        config,
        lambda: ingress.start(build, run, config.model_dump(), key, host=config.serving.host, http=http),
        log=paths.replica_log,
    )
    return 0


def build(run: str, settings: dict[str, object], key: str) -> object:
    """The ASGI application; called inside the replica."""
    from deepseek_ray.serving.service import open_app  # seconds of imports that the driver does without

    keep_in(RunPaths(Path(run)).replica_log)
    return open_app(run, settings, key)


def _check_champion(paths: RunPaths, config: Config) -> None:
    """Report a missing registry or champion here, where the message is short, and not from the replica."""
    from deepseek_ray.registry import Registry
    from deepseek_ray.serving.champion import champion_version
    from deepseek_ray.serving.last_good import LastGood

    try:
        champion_version(Registry.open(paths, config.stores, name=config.model_name, create=False))
    except RegistryUnavailableError as error:
        if not LastGood(paths.last_good).exists():
            raise
        print(f"the version that served last is served again: {error}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepseek-ray serve", description="Answer decisions over HTTP.")
    add_settings(parser)
    terminal.add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(guarded(main))

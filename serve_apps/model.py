"""Serve one model of a registry or a folder: ``deepseek-ray serve models:/risk@champion --port 8080``.

Without a model ``deepseek-ray serve`` is ``serve_apps.risk``. Starts a local Ray cluster and one replica that answers
on 127.0.0.1 over HTTP and gRPC; the routes and their description follow from the model's own signature.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deepseek_ray.cli import add_settings, guarded
from deepseek_ray.config import Config
from deepseek_ray.errors import RegistryUnavailableError
from deepseek_ray.logs import keep_in
from deepseek_ray.paths import RunPaths
from deepseek_ray.serving.keys import file_of
from deepseek_ray.serving.model_kept import Following, KeptModel
from deepseek_ray.serving.model_target import Target, alias_of, find, is_uri
from serve_apps import ingress, terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; returns the exit status."""
    options = parser().parse_args(arguments)
    elsewhere = "" if options.run else os.environ.get("MLFLOW_TRACKING_URI", "")
    needs_run = is_uri(options.model) and not elsewhere
    config, paths = terminal.settings_of(options, "use" if needs_run else "make")
    key = terminal.api_key(config.serving, paths, generate=options.generate_key)
    config = terminal.with_ports(terminal.with_certificate(config, paths))
    ingress.prepare(config.serving.host, config.serving.port, config.stores.gcs_store)
    with tempfile.TemporaryDirectory(prefix="deepseek-ray-model-") as folder:
        key_file = str(file_of(paths.root, config.serving.api_keys_file))
        store, known = _store(config, paths, elsewhere, Path(folder))
        target, following = _find(options, store, known, Path(folder))
        told = asdict(following) if following else None
        log = paths.replica_log.with_name(f"model-{target.name}.log") if paths.root.is_dir() else None
        build_arguments = (asdict(target), store.model_dump(), options.device, key, key_file, told, str(log or ""))
        http = terminal.http_options(config.serving)
        start = functools.partial(ingress.start, build, *build_arguments, host=config.serving.host, http=http)
        terminal.serve(f"{target.name!r} of {target.source}", config, start, log=log)
    return 0


def build(
    target: dict[str, Any],
    settings: dict[str, Any],
    device: Any,
    key: str,
    key_file: str,
    following: dict[str, str] | None,
    log: str,
) -> object:
    """The ASGI application; called inside the replica."""
    from deepseek_ray.serving.model_service import open_app  # seconds of imports that the driver does without

    if log:
        with suppress(OSError):  # a store may be read-only; Ray keeps the lines too
            keep_in(Path(log))
    return open_app(target, settings, device, key, key_file, following)


def _store(config: Config, paths: RunPaths, elsewhere: str, folder: Path) -> tuple[Config, RunPaths]:
    """The store that knows the model, and the run that its files are kept in; elsewhere there is none."""
    if not elsewhere:
        return config, paths
    stores = config.stores.model_copy(update={"tracking_uri": elsewhere})
    return config.model_copy(update={"stores": stores}), RunPaths(folder)


def _find(options: argparse.Namespace, config: Config, paths: RunPaths, cache: Path) -> tuple[Target, Following | None]:
    """Make the model's files local; what is wrong with them is said here, where it is short, not by the replica."""
    named = alias_of(options.model)
    folder = paths.kept_models / "@".join(named or ())
    kept = KeptModel(folder)
    following = Following(str(paths.root), str(folder), kept.seen) if named else None
    try:
        return find(options.model, paths=paths, stores=config.stores, cache=cache, name=options.name), following
    except RegistryUnavailableError as error:
        last = kept.target(options.name or named[0]) if named else None
        if last is None or following is None:
            raise
        print(f"the version that served last is served again: {error}", file=sys.stderr, flush=True)
        return last, replace(following, fallback=str(error))


def parser() -> argparse.ArgumentParser:
    """The arguments of ``deepseek-ray serve``, MODEL among them."""
    made = argparse.ArgumentParser(
        prog="deepseek-ray serve",
        description="Answer over HTTP and gRPC: the risk service of a run, or any one model.",
        epilog="Without MODEL: the run's champion with its features, its log and its updates.",
    )
    made.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN/PATH (of --run's store, else MLFLOW_TRACKING_URI's) "
        "or a folder",
    )
    made.add_argument("--name", default="", help="the model's name in the routes (default: its own)")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="for MODEL (default: auto)")
    terminal.add_arguments(made)
    add_settings(made)
    return made


if __name__ == "__main__":
    sys.exit(guarded(main))

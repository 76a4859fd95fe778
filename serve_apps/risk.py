"""Serve a run's champion over HTTP: ``python -m serve_apps.risk --run DIR --port P``.

Starts a local Ray cluster and one replica that answers on 127.0.0.1, prints its address, and stops
cleanly on SIGTERM or Ctrl-C: open requests finish, feature state is written, the log is closed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from deepseek_ray.cli import add_settings, guarded, settings_of
from deepseek_ray.config import Config, ServingConfig
from deepseek_ray.paths import RunPaths
from deepseek_ray.serving.auth import load_key
from deepseek_ray.serving.keys import file_of, generate_key
from serve_apps import ingress


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; returns the exit status."""
    options = _parser().parse_args(arguments)
    config, paths = _settings(options)
    key = _key(config.serving, paths, generate=options.generate_key)
    http = _http(config.serving, paths)
    host, port = config.serving.host, config.serving.port or ingress.free_port(config.serving.host)
    ingress.prepare(host, port)
    _check_champion(paths, config)
    run = str(paths.create().root)
    try:
        ingress.start(build, run, config.model_dump(), key, host=host, http=http)
        stop = _stop_signal()
        address = f"{'https' if 'ssl_certfile' in http else 'http'}://{host}:{port}"
        print(f"serving {config.model_name!r} of {run} at {address}, described at /docs", flush=True)
        stop.wait()
    finally:
        ingress.stop()
    return 0


def build(run: str, settings: dict[str, object], key: str) -> object:
    """The ASGI application; called inside the replica."""
    from deepseek_ray.serving.service import open_app  # seconds of imports that the driver does without

    return open_app(run, settings, key)


def _check_champion(paths: RunPaths, config: Config) -> None:
    """Report a missing registry or champion here, where the message is short, and not from the replica."""
    from deepseek_ray.registry import Registry
    from deepseek_ray.serving.champion import champion_version

    champion_version(Registry.open(paths, config.stores, name=config.model_name, create=False))


def _stop_signal() -> threading.Event:
    """Set on SIGTERM and SIGINT. Made after Ray has started, because Ray puts its own handlers in place."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepseek-ray serve", description="Answer decisions over HTTP.")
    add_settings(parser)
    parser.add_argument("--port", type=int, help="port to listen on, 0 for a free one (default: serving.port)")
    parser.add_argument("--generate-key", action="store_true", help="make an API key and print it")
    return parser


def _settings(options: argparse.Namespace) -> tuple[Config, RunPaths]:
    if options.port is not None:
        options.overrides.append(f"serving.port={options.port}")
    return settings_of(options)


def _http(serving: ServingConfig, paths: RunPaths) -> dict[str, Any]:
    """Serve's HTTP options: keep-alive, and the certificate where there is one; its files as seen from the run."""
    options: dict[str, Any] = {"keep_alive_timeout_s": serving.keep_alive_timeout_s}
    if not serving.tls_certfile:
        return options
    certfile, keyfile = paths.root / serving.tls_certfile, paths.root / serving.tls_keyfile
    ingress.check_certificate(certfile, keyfile)
    return options | {"ssl_certfile": str(certfile), "ssl_keyfile": str(keyfile)}


def _key(serving: ServingConfig, paths: RunPaths, *, generate: bool) -> str:
    if not generate:
        return load_key(serving.api_key_env, file_of(paths.root, serving.api_keys_file))
    key = generate_key()
    print(f"API key: {key}", flush=True)
    return key


if __name__ == "__main__":
    sys.exit(guarded(main))

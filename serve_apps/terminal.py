"""What every service does in the terminal: read its key, choose its ports, say where it is, wait for its end."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from deepseek_ray import cli
from deepseek_ray.config import Config, ServingConfig
from deepseek_ray.paths import RunPaths
from deepseek_ray.serving.auth import load_key
from deepseek_ray.serving.keys import file_of, generate_key, hashed
from deepseek_ray.settings import Purpose
from serve_apps import head, ingress

LOOK_EVERY_S = 0.5
"""How often the service asks whether Ray's control server still runs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every service takes."""
    parser.add_argument("--port", type=int, help="port to listen on, 0 for a free one (default: serving.port)")
    parser.add_argument(
        "--rpc-port", type=int, help="port of gRPC, 0 for a free one, -1 for none (default: serving.rpc_port)"
    )
    parser.add_argument("--generate-key", action="store_true", help="make an API key and print it")


def settings_of(options: argparse.Namespace, purpose: Purpose = "use") -> tuple[Config, RunPaths]:
    """The settings, those of :func:`add_arguments` among them, and the run folder."""
    for name in ("port", "rpc_port"):
        if (value := getattr(options, name)) is not None:
            options.overrides.append(f"serving.{name}={value}")
    return cli.settings_of(options, purpose)


def api_key(serving: ServingConfig, paths: RunPaths, *, generate: bool) -> str:
    """The environment's key or a fresh one, which is printed; "" where only the file of keys holds some.

    Hashed: Serve keeps what a replica is made with, in the controller's checkpoints too.
    """
    if not generate:
        return hashed(load_key(serving.api_key_env, file_of(paths.root, serving.api_keys_file)))
    key = generate_key()
    print(f"API key: {key}", flush=True)
    return hashed(key)


def with_ports(config: Config) -> Config:
    """The settings with free ports in place of 0; a replica that is started again then listens where it did."""
    serving = config.serving
    for name in ("port", "rpc_port"):
        while getattr(serving, name) == 0 or serving.port == serving.rpc_port:
            serving = serving.model_copy(update={name: ingress.free_port(serving.host)})
    return config.model_copy(update={"serving": serving})


def with_certificate(config: Config, paths: RunPaths) -> Config:
    """The settings with the certificate's files as absolute paths; they are named as seen from the run.

    Raises:
        EnvironmentProblemError: they cannot be used.
    """
    serving = config.serving
    if not serving.tls_certfile:
        return config
    certfile, keyfile = (paths.root / name for name in (serving.tls_certfile, serving.tls_keyfile))
    ingress.check_certificate(certfile, keyfile)
    files = {"tls_certfile": str(certfile.resolve()), "tls_keyfile": str(keyfile.resolve())}
    return config.model_copy(update={"serving": serving.model_copy(update=files)})


def http_options(serving: ServingConfig) -> dict[str, Any]:
    """What the replica's own server is told."""
    options: dict[str, Any] = {"keep_alive_timeout_s": serving.keep_alive_timeout_s}
    if not serving.tls_certfile:
        return options
    return options | {"ssl_certfile": serving.tls_certfile, "ssl_keyfile": serving.tls_keyfile}


def serve(what: str, config: Config, start: Callable[[], None], *, log: Path | None = None) -> None:
    """Start a service, print its address, and stop it on SIGTERM or Ctrl-C.

    Args:
        what: named in the line that is printed once it answers.
        config: its settings, ports chosen.
        start: deploys it.
        log: file that the replica writes to, named too.
    """
    serving = config.serving
    with ExitStack() as ports:
        for port in (serving.port, serving.rpc_port):
            if port > 0:
                ports.enter_context(ingress.held(serving.host, port))
        try:
            start()
            stop = _stop_signal()
            _announce(what, serving, log)
            while not stop.wait(LOOK_EVERY_S):
                head.look_after()
        finally:
            ingress.stop()


def _announce(what: str, serving: ServingConfig, log: Path | None) -> None:
    rpc = f", gRPC on port {serving.rpc_port}" if serving.rpc_port > 0 else ""
    scheme = "https" if serving.tls_certfile else "http"
    print(f"serving {what} at {scheme}://{serving.host}:{serving.port}{rpc}, described at /docs", flush=True)
    if log:
        print(f"metrics at /metrics, log in {log}", flush=True)


def _stop_signal() -> threading.Event:
    """Set on SIGTERM and SIGINT. Made after Ray has started, because Ray puts its own handlers in place."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop

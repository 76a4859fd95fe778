"""What every service does in the terminal: read its key, choose its ports, say where it is, wait for its end."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Callable

from deepseek_ray import cli
from deepseek_ray.config import Config
from deepseek_ray.paths import RunPaths
from deepseek_ray.serving.auth import generate_key, load_key
from deepseek_ray.settings import Purpose
from serve_apps import ingress


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


def api_key(variable: str, *, generate: bool) -> str:
    """The key in an environment variable, or a fresh one, printed."""
    if not generate:
        return load_key(variable)
    key = generate_key()
    print(f"API key: {key}", flush=True)
    return key


def with_ports(config: Config) -> Config:
    """The settings with free ports in place of 0; a replica that is started again then listens where it did."""
    serving = config.serving
    for name in ("port", "rpc_port"):
        while getattr(serving, name) == 0 or serving.port == serving.rpc_port:
            serving = serving.model_copy(update={name: ingress.free_port(serving.host)})
    return config.model_copy(update={"serving": serving})


def serve(what: str, config: Config, start: Callable[[], None]) -> None:
    """Start a service, print its address, and stop it on SIGTERM or Ctrl-C.

    Args:
        what: named in the line that is printed once it answers.
        config: its settings, ports chosen.
        start: deploys it.
    """
    serving = config.serving
    try:
        start()
        stop = _stop_signal()
        rpc = f", gRPC on port {serving.rpc_port}" if serving.rpc_port > 0 else ""
        print(f"serving {what} at http://{serving.host}:{serving.port}{rpc}, described at /docs", flush=True)
        stop.wait()
    finally:
        ingress.stop()


def _stop_signal() -> threading.Event:
    """Set on SIGTERM and SIGINT. Made after Ray has started, because Ray puts its own handlers in place."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop

"""A Ray Serve deployment around any ASGI application: throughput-optimised mode, direct ingress, no second hop.

In this mode a replica listens itself; requests pass neither a proxy process nor an actor call (0.5 ms of
CPU a request instead of 10 to 45). Ray reads the mode from the environment when it is first imported, so
``prepare`` must run before any import of ray, in the process that starts the cluster.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from deepseek_ray.errors import EnvironmentProblemError, ServingError
from deepseek_ray.logs import QUIET_ENVIRONMENT, silence_telemetry

APP_NAME = "default"


def prepare(host: str, port: int) -> None:
    """Set Ray Serve's mode, and the one port that the replica may listen on.

    Raises:
        EnvironmentProblemError: the port is taken.
    """
    check_port(host, port)
    silence_telemetry()
    os.environ |= {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 1),
        # no load balancer stands in front that would need time to notice, and a restarted replica
        # must get its port back at once
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_PORT_QUARANTINE_S": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


def check_port(host: str, port: int) -> None:
    """Make sure that the port can be listened on.

    Raises:
        EnvironmentProblemError: it is taken, or the host is not an address of this machine.
    """
    with closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EnvironmentProblemError(
                f"{host}:{port} cannot be listened on: {error.strerror}.",
                fix="stop the other server, or choose another port with --port",
            ) from error


def check_certificate(certfile: Path, keyfile: Path) -> None:
    """Make sure that a certificate and its key can be used.

    Raises:
        EnvironmentProblemError: one cannot be read, the key wants a password, or they do not belong together.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise EnvironmentProblemError(
            f"TLS cannot use serving.tls_certfile {str(certfile)!r}, serving.tls_keyfile {str(keyfile)!r}: {error}.",
            fix="give a PEM certificate and its PEM key without a password, both readable by the service's user",
        ) from error


def _no_password() -> str:
    raise ValueError("the key has a password")


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago."""
    with closing(socket.socket()) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def start(factory: Callable[..., Any], *args: Any, host: str, http: Mapping[str, Any] | None = None) -> None:
    """Start a local cluster and deploy ``factory(*args)``, an ASGI application, made inside the replica.

    Args:
        factory: importable function.
        args: picklable arguments.
        host: address to listen on; the port is the one given to ``prepare``.
        http: further fields of Serve's HTTPOptions: the replica's own server takes certificate, key and
            ``keep_alive_timeout_s`` from there.
    """
    import ray  # not before ``prepare``
    from ray import serve

    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",  # Ray's own ports stay on this machine too
        include_dashboard=False,
        num_cpus=max(2, os.cpu_count() or 1),
        object_store_memory=100 << 20,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": {**QUIET_ENVIRONMENT, "OMP_NUM_THREADS": "1"}},
    )
    # Ray has no direct ingress without a proxy: it gets a port of its own on this machine, and no traffic.
    options = {"host": host, "port": free_port(host), **(http or {})}
    serve.start(http_options=options, logging_config={"enable_access_log": False})
    try:
        serve.run(_deployment(serve).bind(factory, *args), name=APP_NAME, route_prefix="/", blocking=False)
    except RuntimeError as error:
        cause = serve.status().applications[APP_NAME].message or str(error)
        raise ServingError(f"The service did not start: {cause}", fix="see the error named last") from error


def stop() -> None:
    """Finish open requests, close the service, stop the cluster."""
    import ray
    from ray import serve

    _expect_the_controllers_end()
    serve.shutdown()
    ray.shutdown()


def _expect_the_controllers_end() -> None:
    """Keep one line of Ray's off the screen.

    Serve's controller answers the call that shuts it down by dying, and Ray 2.60 prints that as a failed task.
    """
    from ray._private import worker

    show = worker.print_to_stdstream

    def show_others(data: dict[str, Any], *args: Any, **options: Any) -> None:
        lines = [line for line in data["lines"] if "ServeController.graceful_shutdown failed" not in line]
        if lines:
            show({**data, "lines": lines}, *args, **options)

    worker.print_to_stdstream = show_others


def _deployment(serve: Any) -> Any:
    options = {
        "num_replicas": 1,  # feature state and prediction log have one writer
        "max_ongoing_requests": 100_000,  # the application keeps its own queue and answers 429 itself
        "ray_actor_options": {"num_cpus": 1},
        "graceful_shutdown_timeout_s": 20,
        "graceful_shutdown_wait_loop_s": 0.1,
        "health_check_period_s": 10,
    }
    return serve.deployment(name="ingress", **options)(serve.ingress()(Ingress))


class Ingress:
    """Builds the application in the replica and hands it to Serve."""

    def __init__(self, factory: Callable[..., Any], *args: Any) -> None:
        _let_ports_be_reused()
        _stay_on_this_machine()
        self._application = factory(*args)

    def __serve_build_asgi_app__(self) -> Any:
        return self._application


def _let_ports_be_reused() -> None:
    """Let Serve bind a port whose last owner has just died.

    Ray 2.60 binds a replica's port without SO_REUSEADDR: after a crash the kernel keeps it for a
    minute, and the restarted replica would give up.
    """
    from ray.serve._private import http_util

    class Reusing(socket.socket):
        def bind(self, address: Any) -> None:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            super().bind(address)

    class Module:
        def __getattr__(self, name: str) -> Any:
            return Reusing if name == "socket" else getattr(socket, name)

    http_util.socket = Module()


def _stay_on_this_machine() -> None:
    """Keep the port for calls between deployments on 127.0.0.1.

    Ray 2.60 opens one in every replica, on every address of the machine, whether it is used or not, and unpickles
    what arrives there. This cluster has one machine and one deployment.
    """
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))

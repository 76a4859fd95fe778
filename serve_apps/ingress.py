"""A Ray Serve deployment around any ASGI application: the replica listens itself, no proxy, no second hop.

Serve starts, watches, restarts and stops the replica; a request meets nothing of Ray's (``serve_apps.listener``
says why). Ray reads its mode from the environment when it is first imported, so ``prepare`` must run before any
import of ray, in the process that starts the cluster.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import ssl
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from deepseek_ray.errors import EnvironmentProblemError, ServingError
from deepseek_ray.logs import QUIET_ENVIRONMENT, silence_telemetry
from serve_apps import head

APP_NAME = "default"
COLLECT_AFTER = 50_000
"""Containers made and not freed after which Python looks for cycles; with its 700 that is a tenth of a decision's CPU
time. What a request needs is freed by reference counts, what stands at the start is frozen by Serve."""
_port = 0  # what ``prepare`` was given


def prepare(host: str, port: int, gcs_store: str = "") -> None:
    """Set Ray Serve's mode, and make sure that the replica can listen.

    Args:
        host: address of this machine.
        port: the replica's.
        gcs_store: ``redis://host:port`` that keeps what Ray's control server knows, "" for its memory.

    Raises:
        EnvironmentProblemError: the port is taken, or Redis cannot be used.
    """
    global _port
    check_port(host, port)
    _port = port
    head.use(gcs_store)
    silence_telemetry()
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's default; where it is not named Ray suggests to end it
    os.environ |= {
        # What Ray does on Macs: the node is 127.0.0.1, and all its ports stay on this machine. ``_node_ip_address``
        # does not do it, because ``ray.init`` puts the machine's address in the place of 127.0.0.1.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # the application shares the replica's event loop (uvloop), frozen GC
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",  # it would listen too, at another port
        "RAY_worker_niceness": "0",  # 15 otherwise: whatever else runs on the machine would come before requests
        "RAY_enable_metrics_collection": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


def check_port(host: str, port: int) -> None:
    """Make sure that the port can be listened on; raises like ``held``."""
    held(host, port).close()


def held(host: str, port: int) -> socket.socket:
    """Keeps a port for the replica as long as it is open: the system gives it to no other program, Ray's among them.

    The replica may listen there all the same: the socket is bound and does not listen.

    Raises:
        EnvironmentProblemError: it is taken, or the host is not an address of this machine.
    """
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise EnvironmentProblemError(
            f"{host}:{port} cannot be listened on: {error.strerror}.",
            fix="stop the other server, or choose another port with --port or --rpc-port",
        ) from error
    return made


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
    with closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def start(factory: Callable[..., Any], *args: Any, host: str, http: Mapping[str, Any] | None = None) -> None:
    """Start a local cluster and deploy ``factory(*args)``, an ASGI application, made inside the replica.

    Args:
        factory: importable function.
        args: picklable arguments.
        host: address to listen on; the port is the one given to ``prepare``.
        http: further arguments of the replica's ``Listener``.

    Raises:
        ServingError: the application cannot be made.
    """
    import ray  # not before ``prepare``
    from ray import serve

    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=max(2, os.cpu_count() or 1),
        object_store_memory=100 << 20,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": {**QUIET_ENVIRONMENT, "OMP_NUM_THREADS": "1"}},
        **head.options(),
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # here, not in the replica
    serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False})
    try:
        serve.run(
            _deployment(serve).bind((host, _port), dict(http or {}), factory, *args), name=APP_NAME, route_prefix=None
        )
    except RuntimeError as error:
        status = serve.status().applications[APP_NAME]
        causes = [deployment.message for deployment in status.deployments.values()]  # the replica's own last words
        cause = "\n".join(text for text in [status.message, *causes] if text) or str(error)
        raise ServingError(f"The service did not start: {cause}", fix="see the error named last") from error


def stop() -> None:
    """Finish open requests, close the service, stop the cluster."""
    import ray
    from ray import serve

    if head.has_ended():
        head.forget()
        return
    _expect_the_controllers_end()
    serve.shutdown()
    ray.shutdown()
    head.forget()


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
    return serve.deployment(name="ingress", **options)(Ingress)


class Ingress:
    """Builds the application in the replica and listens."""

    async def __init__(  # type: ignore[misc]  # Serve waits for it
        self, address: tuple[str, int], http: Mapping[str, Any], factory: Callable[..., Any], *args: Any
    ) -> None:
        from serve_apps.listener import Listener, bound  # the driver does without uvicorn

        _stay_on_this_machine()
        with ExitStack() as undo:
            own = undo.enter_context(bound(*address))  # before anything is opened that a server there may still write
            self._listener = Listener(factory(*args), own, **http)
            undo.pop_all()
        await self._listener.ready()
        gc.set_threshold(COLLECT_AFTER)

    def check_health(self) -> None:
        """Called by Serve; an error makes it replace the replica."""
        self._listener.check()

    async def __del__(self) -> None:
        """Called by Serve before it ends the replica."""
        await self._listener.close()


def _stay_on_this_machine() -> None:
    """Keep the port for calls between deployments on 127.0.0.1.

    Ray 2.60 opens one in every replica, on every address of the machine, whether it is used or not, and unpickles
    what arrives there. This cluster has one machine and one deployment.
    """
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))

"""The head of the service's own Ray cluster: its control server (GCS) may die, where Redis keeps what it knows.

Ray 2.60 starts the control server once and looks after it no more; a node that finds none ends itself. Here it is
started again on the same port, reads its state from Redis, and node, Serve's controller and replica, which have not
stopped meanwhile, connect to it again. Without Redis the state is gone with it, and the service ends with an error.

``use`` must run before any import of ray: Ray reads its environment then.
"""

from __future__ import annotations

import os
import secrets
import sys
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from deepseek_ray.data.redis_store import PASSWORD_ENV, address_of
from deepseek_ray.errors import ConfigError, EnvironmentProblemError, ServingError

SETTING = "stores.gcs_store"
_ADDRESS, _NAMESPACE = "RAY_REDIS_ADDRESS", "RAY_external_storage_namespace"
_WAIT_S = 600
"""So long node and actors wait for a control server that cannot start because Redis is away too."""
_CONNECT_S = 5


def use(store: str) -> None:
    """Say to Ray where its control server keeps its state.

    Each start has keys of its own: what an earlier one left must not come to life beside it, and where this service is
    a job of a cluster, the environment names that cluster's Redis.

    Args:
        store: ``redis://host:port``, ``rediss`` for TLS, the password in the environment; "" for its memory.

    Raises:
        ConfigError: the address is not understood.
        EnvironmentProblemError: Redis does not answer, or refuses.
    """
    for name in (_ADDRESS, _NAMESPACE):
        os.environ.pop(name, None)
    if not store:
        return
    address = address_of(store, SETTING)
    if ",db=" in address:
        raise ConfigError(f"{SETTING} = {store!r} names a database; Ray uses the first.", fix="write redis://host:port")
    _check(store)
    os.environ |= {
        _ADDRESS: f"{urlsplit(store).scheme}://{address}",
        _NAMESPACE: f"deepseek_ray_{secrets.token_hex(8)}",
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(_WAIT_S),
    }


def options() -> dict[str, Any]:
    """What ``ray.init`` must be told beside the environment."""
    return {"_redis_password": os.environ.get(PASSWORD_ENV, "")} if _ADDRESS in os.environ else {}


def look_after() -> None:
    """Start the control server again if it has died.

    Only the main thread may call this: the kernel ends Ray's processes with the thread that started them.

    Raises:
        ServingError: the node has ended, or the control server and its state with it.
    """
    from ray._private import worker

    node = worker._global_node
    dead = {kind: process.returncode for kind, process in node.dead_processes()}
    if "raylet" in dead:
        _give_up(node, f"node has ended with status {dead['raylet']}")
    if "gcs_server" not in dead:
        return
    if _ADDRESS not in os.environ:
        _give_up(node, f"control server (GCS) has ended with status {dead['gcs_server']}, and what it knew with it")
    node.kill_gcs_server(check_alive=False)  # forgets the dead one
    node.start_gcs_server()
    print(f"Ray's control server had ended ({dead['gcs_server']}) and was started again", file=sys.stderr, flush=True)


def _give_up(node: Any, what: str) -> None:
    node.kill_all_processes(check_alive=False)  # neither Serve nor Ray can be shut down in order now
    fix = f"start the service again, nothing that was answered is lost; {SETTING} keeps what a GCS knows"
    raise ServingError(f"Ray's {what}.", fix=fix)


def has_ended() -> bool:
    """Whether the node has been given up."""
    from ray._private import worker

    node = worker._global_node
    return node is not None and not node.all_processes


def forget() -> None:
    """Take away what the control server left in Redis, once it has stopped."""
    if _ADDRESS not in os.environ:
        return
    from ray._private.gcs_utils import cleanup_redis_storage

    parts = urlsplit(os.environ[_ADDRESS])
    cleanup_redis_storage(
        parts.hostname, parts.port, os.environ.get(PASSWORD_ENV, ""), parts.scheme == "rediss", os.environ[_NAMESPACE]
    )


def _check(store: str) -> None:
    try:
        redis = import_module("redis")  # an extra
    except ModuleNotFoundError as error:
        fix = "pip install 'deepseek-ray[redis]'"
        raise EnvironmentProblemError(f"{SETTING} needs the package 'redis'.", fix=fix) from error
    secret = os.environ.get(PASSWORD_ENV)
    client = redis.Redis.from_url(store, password=secret, socket_timeout=_CONNECT_S, socket_connect_timeout=_CONNECT_S)
    try:
        client.ping()
    except redis.RedisError as error:
        fix = f"start it, correct {SETTING}, or set {PASSWORD_ENV}"
        raise EnvironmentProblemError(f"{SETTING} = {store!r} cannot be used: {error}.", fix=fix) from error
    finally:
        client.close()

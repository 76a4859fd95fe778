"""Redis as Feast's online store: the settings that keep states right there, and errors that name the server."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from deepseek_ray.errors import ConfigError, EnvironmentProblemError
from deepseek_ray.logs import hide_password

PASSWORD_ENV = "DEEPSEEK_RAY_REDIS_PASSWORD"
_TIMEOUT_S = 5
_PROJECT = "deepseek_ray_"


def settings(url: str, folder: Path) -> dict[str, Any]:
    """What a run's feature_store.yaml says about its Redis.

    Args:
        url: ``redis://host:port/db``, ``rediss`` for TLS; the password comes from the environment.
        folder: the run's Feast repository.

    Raises:
        ConfigError: the URL is not understood or holds a login, or the password cannot be passed on.
    """
    options = [address_of(url), f"socket_timeout={_TIMEOUT_S}", f"socket_connect_timeout={_TIMEOUT_S}"]
    options += ["ssl=true"] if urlsplit(url).scheme == "rediss" else []
    if password := os.environ.get(PASSWORD_ENV):
        if not re.fullmatch(r"[\w.~!@%^&*()+=:/?-]+", password, re.ASCII):
            raise ConfigError(f"Feast cannot pass on a character of {PASSWORD_ENV}.", fix="use letters and digits")
        options += [f'password="${{{PASSWORD_ENV}}}"']  # Feast expands it; unquoted digits it would take for a number
    # Feast drops a write that is not newer than the stored one: a label would be lost, for it leaves the time alone.
    store = {"type": "redis", "connection_string": ",".join(options), "skip_dedup": True}
    return {"online_store": store, "project": _project(folder / "feature_store.yaml")}


def try_once(client: Any) -> None:
    """Time-outs are the caller's: redis-py would wait for four of them before it says that the server is away."""
    backoff, retry = import_module("redis.backoff"), import_module("redis.retry")  # an extra, there with its client
    client.set_retry(retry.Retry(backoff.NoBackoff(), 0))


def address_of(url: str, setting: str = "stores.online_store") -> str:
    """``host:port`` of a URL, with ``,db=N`` where it names a database.

    Args:
        url: ``redis://host:port/db``, ``rediss`` for TLS.
        setting: where it stands.

    Raises:
        ConfigError: the URL is not understood or holds a login.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"redis", "rediss"} or not parts.hostname:
        shown = hide_password(url)
        raise ConfigError(f"{setting} = {shown!r} is not understood.", fix="write redis://host:port")
    if parts.password or parts.username:
        raise ConfigError(f"{setting} holds a password.", fix=f"put it into the environment as {PASSWORD_ENV}")
    database = parts.path.strip("/")
    return f"{parts.hostname}:{parts.port or 6379}" + (f",db={database}" if database else "")


def address(online_store: Any) -> str:
    """The same of Feast's own settings; "" for SQLite."""
    options = getattr(online_store, "connection_string", "").split(",")
    return ",".join(option for option in options if "=" not in option or option.startswith("db="))


@contextmanager
def reaching(online_store: Any) -> Iterator[None]:
    """Name the server in what Redis raises; other errors pass.

    Raises:
        EnvironmentProblemError: the server does not answer, or refuses.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "redis":  # an extra: not there to be imported by name
            raise
        problem = f"The online store redis://{address(online_store)} cannot be used: {error}."
        fix = f"start it, correct stores.online_store, or set {PASSWORD_ENV} for train and all that follows"
        raise EnvironmentProblemError(problem, fix=fix) from error


def _project(file: Path) -> str:
    """Part of every key, one a run: two runs on one server must not write each other's cards."""
    known: str = yaml.safe_load(file.read_text(encoding="utf-8"))["project"] if file.exists() else ""
    return known if known.startswith(_PROJECT) else _PROJECT + secrets.token_hex(8)

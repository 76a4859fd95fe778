"""Logging: one format, UTC times, nothing private."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import time
import traceback
from pathlib import Path

QUIET_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    "FEAST_USAGE": "False",
    "OMP_WAIT_POLICY": "passive",  # threads that spin at a barrier starve each other when cores are shared
}
"""Set before mlflow, ray or feast are imported, and passed on in every runtime_env: none may phone home or spin."""


def silence_telemetry() -> None:
    """Switch off telemetry of the libraries we use; a value already set wins."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def hide_password(text: str) -> str:
    """The text without user name and password in an address."""
    return re.sub(r"(?<=://)[^/\s]+@", "", text)


def drop_password(text: str) -> str:
    """The text without the password in an address; the user's name stays, so that it still connects."""
    return re.sub(r"(://[^/\s:@]*):[^/\s]*@", r"\1@", text)


def trace_of(error: BaseException) -> str:
    """Where an unforeseen error came from, without its message: a message may quote a card, a key, a row.

    Errors of the operating system and of SQLite speak of files and disks, so theirs is kept.
    """
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    detail = f" ({error})" if isinstance(error, OSError | sqlite3.Error) else ""
    return f"{type(error).__name__}{detail} at {where or 'an unknown place'}"


def get_logger(name: str) -> logging.Logger:
    """Return a logger below ``deepseek_ray`` that writes ``time level name: message`` to stderr."""
    root = logging.getLogger("deepseek_ray")
    if not root.handlers:
        handler = logging.StreamHandler()
        formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        root.addHandler(handler)
        root.setLevel(os.environ.get("DEEPSEEK_RAY_LOG_LEVEL", "INFO").upper())
        root.propagate = False
    return root.getChild(name.removeprefix("deepseek_ray."))

"""Logging: one format, UTC times, nothing private."""

from __future__ import annotations

import copy
import logging
import logging.handlers
import os
import re
import sqlite3
import time
import traceback
from pathlib import Path
from types import TracebackType

QUIET_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    "FEAST_USAGE": "False",
    "OMP_WAIT_POLICY": "passive",  # threads that spin at a barrier starve each other when cores are shared
}
"""Set before mlflow, ray or feast are imported, and passed on in every runtime_env: none may phone home or spin."""


MAX_LOG_BYTES = 5 << 20
OLDER_LOGS = 3
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


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


def hide_folders(text: str, root: str = "") -> str:
    """The text with its absolute paths as seen from a folder, or cut to their last part."""
    if root:
        text = text.replace(f"{root.rstrip('/')}/", "")
    text = re.sub(r"'/[^'\n]*/([^'/\n]*)'", r"'\1'", text)
    text = re.sub(r"(?<=:///)/(?:[^\s/'\"]+/)+", "", text)  # of a database's URI
    return re.sub(r"(?<![\w.:/])/(?!v1/)(?:[^\s/'\"]+/)+", "", text)  # /v1/ begins a route


def trace_of(error: BaseException) -> str:
    """Where an unforeseen error came from, without its message: a message may quote a card, a key, a row.

    Errors of the operating system and of SQLite speak of files and disks, so theirs is kept.
    """
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    detail = f" ({error})" if isinstance(error, OSError | sqlite3.Error) else ""
    return f"{type(error).__name__}{detail} at {where or 'an unknown place'}"


class _Discreet(logging.Formatter):
    """Gives errors without their messages; see :func:`trace_of`."""

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)
        record.exc_text = None  # another handler's, with the messages
        return super().format(record)

    def formatException(
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        traces, error = [], ei[1]
        while error is not None:
            traces.append(trace_of(error))
            error = error.__cause__
        return "\n  from ".join(traces)


def keep_in(file: Path) -> None:
    """Write what this process logs to a file too, and what its HTTP server warns of; errors without their messages.

    When it has 5 MiB it becomes ``<file>.1``, and the next is begun; three older ones are kept.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(
        file, maxBytes=MAX_LOG_BYTES, backupCount=OLDER_LOGS, encoding="utf-8"
    )
    formatter = _Discreet(_FORMAT, "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    for logger in (_ours(), logging.getLogger("uvicorn.error")):
        logger.addHandler(handler)


def get_logger(name: str) -> logging.Logger:
    """Return a logger below ``deepseek_ray`` that writes ``time level name: message`` to stderr."""
    return _ours().getChild(name.removeprefix("deepseek_ray."))


def _ours() -> logging.Logger:
    root = logging.getLogger("deepseek_ray")
    if not root.handlers:
        handler = logging.StreamHandler()
        formatter = logging.Formatter(_FORMAT, "%H:%M:%S")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        root.addHandler(handler)
        root.setLevel(os.environ.get("DEEPSEEK_RAY_LOG_LEVEL", "INFO").upper())
        root.propagate = False
    return root

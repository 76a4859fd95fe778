"""A Python program run in a process of its own, and ended when that is asked for."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

_POLL_S = 0.2
_KILL_AFTER_S = 5.0


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        status: exit status, minus the number of the signal that ended it.
        said: its standard output, "" where that went to a file.
        errors: its standard error, likewise.
    """

    status: int
    said: str
    errors: str


def run_python(
    arguments: Sequence[str], stop: threading.Event, *, told: str = "", words: IO[str] | None = None
) -> Ended:
    """Run Python on this process's modules and wait for its end.

    Args:
        arguments: what Python is to run.
        stop: once it is set the program is asked to end, and killed when it does not.
        told: the program's standard input: what may hold a password has no place among arguments.
        words: takes standard output and standard error, instead of the result.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipe = subprocess.PIPE
    out, errors = (pipe, pipe) if words is None else (words, subprocess.STDOUT)
    with subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdin=pipe, stdout=out, stderr=errors, text=True
    ) as child:
        said, complaints = _listen(child, told, stop)
    return Ended(child.returncode, said or "", complaints or "")


def _listen(child: subprocess.Popen[str], told: str | None, stop: threading.Event) -> tuple[str | None, str | None]:
    kill_at = math.inf
    while True:
        try:
            return child.communicate(told, timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            told = None  # the first call has it
            if time.monotonic() >= kill_at:
                child.kill()  # it does not end when asked; nobody is to wait for it
            elif stop.is_set() and kill_at == math.inf:
                child.terminate()
                kill_at = time.monotonic() + _KILL_AFTER_S

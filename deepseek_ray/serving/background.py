"""A program that runs beside the service again and again, in a process of its own.

A process and not a thread: what it does holds the interpreter for longer than a request may take.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

_POLL_S = 0.2
_KILL_AFTER_S = 5.0


class BackgroundProgram(ABC):
    """Starts a program on a schedule; one that fails is told in the log and tried again the next time.

    Args:
        name: what it does, as in "compaction".
        every_s: seconds between the end of one and the start of the next; 0 never starts any.
        log: told what went wrong.
    """

    def __init__(self, name: str, every_s: float, log: logging.Logger) -> None:
        self._name, self._every_s, self._log = name, every_s, log
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def arguments(self) -> Sequence[str]:
        """What Python is to run next."""

    @abstractmethod
    def done(self, said: str) -> None:
        """Take what the program wrote to stdout; status 0."""

    def told(self) -> str:
        """What the program reads from stdin: settings may hold a password, which has no place among arguments."""
        return ""

    def failed(self) -> None:
        """One has failed."""
        return

    def start(self) -> None:
        """Begin to wait for the first one."""
        if self._every_s > 0:
            self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop; one that is under way is cut short."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self._once()
            except Exception:  # whatever it is: the thread must outlive it, or there is no next time
                self.failed()
                self._log.exception("%s failed, trying again in %g s", self._name, self._every_s)

    def _once(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen([sys.executable, *self.arguments()], env=environment, text=True, **pipes) as child:  # type: ignore[call-overload]
            said, words = self._listen(child)
        if not child.returncode:
            self.done(said)
        elif not self._stop.is_set():
            self.failed()
            last = words.strip().splitlines()[-1:] or [f"status {child.returncode}"]
            self._log.error("%s failed, trying again in %g s: %s", self._name, self._every_s, last[0])

    def _listen(self, child: subprocess.Popen[str]) -> tuple[str, str]:
        told: str | None = self.told()
        kill_at = math.inf
        while True:
            try:
                return child.communicate(told, timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                told = None  # the first call has it
                if time.monotonic() >= kill_at:
                    child.kill()  # it does not end when asked; nobody is to wait for it
                elif self._stop.is_set() and kill_at == math.inf:
                    child.terminate()
                    kill_at = time.monotonic() + _KILL_AFTER_S

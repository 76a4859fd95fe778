"""A program that runs beside the service again and again, in a process of its own.

A process and not a thread: what it does holds the interpreter for longer than a request may take.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence

from deepseek_ray.child import run_python
from deepseek_ray.periodic import Periodic


class BackgroundProgram(Periodic, ABC):
    """Starts a program on a schedule; one that fails is told in the log and tried again the next time.

    One that is under way when this is closed is cut short.

    Args:
        name: what it does, as in "compaction".
        every_s: seconds between the end of one and the start of the next; 0 never starts any.
        log: told what went wrong.
    """

    def __init__(self, name: str, every_s: float, log: logging.Logger) -> None:
        super().__init__(name, every_s, self._run_program)
        self._log = log

    @abstractmethod
    def arguments(self) -> Sequence[str]:
        """What Python is to run next."""

    @abstractmethod
    def done(self, said: str) -> None:
        """Take what the program wrote to stdout; status 0."""

    def told(self) -> str:
        """What the program reads from stdin: settings may hold a password, which has no place among arguments."""
        return ""

    def count_failure(self) -> None:
        """One has failed."""
        return

    def _run_program(self) -> None:
        ended = run_python(self.arguments(), self._stop, told=self.told())
        if not ended.status:
            self.done(ended.said)
        elif not self._stop.is_set():
            self.count_failure()
            last = ended.errors.strip().splitlines()[-1:] or [f"status {ended.status}"]
            self._log.error("%s failed, trying again in %g s: %s", self.name, self.every_s, last[0])

    def failed(self, *, again: bool) -> None:
        """Tell each: the next one is long to come."""
        self.count_failure()
        self._log.exception("%s failed, trying again in %g s", self.name, self.every_s)

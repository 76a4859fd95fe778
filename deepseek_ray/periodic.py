"""Work that is done again and again on a thread of its own, until it is closed."""

from __future__ import annotations

import threading
from collections.abc import Callable

from deepseek_ray.logs import get_logger

logger = get_logger(__name__)


class Periodic:
    """Has its turn every so often; a turn that fails is told, and the next one comes all the same.

    Args:
        name: of the thread, and of what is told.
        every_s: seconds between the end of a turn and the start of the next; 0 never has any.
        turn: does it once; may raise anything.
    """

    def __init__(self, name: str, every_s: float, turn: Callable[[], None]) -> None:
        self.name, self.every_s, self._turn = name, every_s, turn
        self._failing = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def failed(self, *, again: bool) -> None:
        """A turn has raised; called while that is handled. The first of several in a row is told in the log."""
        if not again:
            logger.exception("%s failed; trying again every %g s", self.name, self.every_s)

    def start(self) -> None:
        """Begin to wait for the first turn."""
        if self.every_s > 0:
            self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop after the turn under way, which sees ``_stop``."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            self._once()

    def _once(self) -> None:
        try:
            self._turn()
            self._failing = False
        except Exception:  # whatever it is: the thread must outlive it, or there is no next turn
            self.failed(again=self._failing)
            self._failing = True

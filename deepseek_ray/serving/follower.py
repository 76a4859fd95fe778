"""Follows an alias of the registry: what it names is taken over, what cannot serve is refused once and changes nothing.

The same for the risk service, whose champion brings features and arms with it, and for the server of any model.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from prometheus_client import Counter

from deepseek_ray.errors import FeatureError, ModelFormatError
from deepseek_ray.logs import get_logger
from deepseek_ray.periodic import Periodic

logger = get_logger(__name__)

Opened = TypeVar("Opened")


class RefusedError(Exception):
    """A version cannot serve, and why."""


class AliasFollower(Periodic, ABC):
    """Polls in the background; ``refused`` says why the version that the alias names is not the one that serves.

    Args:
        swaps: counted by outcome: swapped, refused, failed.
        poll_s: time between two looks.
    """

    def __init__(self, swaps: Counter, poll_s: float) -> None:
        super().__init__("following the registry", poll_s, self.check)
        self._swaps, self._looked = swaps, threading.Event()
        self._refused: tuple[str, str] = ("", "")

    @abstractmethod
    def check(self) -> None:
        """Look once, and take over what is new and fits.

        Raises:
            RegistryError: the registry is away.
        """

    @abstractmethod
    def take_over(self, version: str) -> None:
        """Let a version serve, verified and warmed up before.

        Raises:
            RefusedError, ModelFormatError, FeatureError: it cannot serve, now or later.
        """

    @property
    def refused(self) -> str:
        """Why the version that the alias names does not serve, or ""."""
        return self._refused[1]

    def follow(self, version: str | None, live: str) -> None:
        """Take over what the alias names, unless it serves or was refused before.

        Args:
            version: behind the alias; None for an alias that is not set: what serves goes on serving.
            live: that serves.
        """
        if version is None or version == live:
            self._refused = ("", "")
            return
        if version == self._refused[0]:
            return
        try:
            self.take_over(version)
        except (RefusedError, ModelFormatError, FeatureError) as error:
            self._refused = (version, str(error))
            self._swaps.labels("refused").inc()
            logger.error("version %s is refused, version %s serves on: %s", version, live, error)
            return
        self._refused = ("", "")
        self._swaps.labels("swapped").inc()
        logger.info("version %s serves now", version)

    def failed(self, *, again: bool) -> None:
        """The registry is away, say: what serves goes on serving."""
        self._swaps.labels("failed").inc()
        super().failed(again=again)

    def _run(self) -> None:
        self._once()  # a replica that Serve restarts goes on with what the registry says now
        self._looked.set()
        super()._run()


class Reopening(Generic[Opened]):
    """Opens the registry when it is first asked for, and again as long as it is away."""

    def __init__(self, open_it: Callable[[], Opened]) -> None:
        self._open = open_it
        self._opened: Opened | None = None

    def __call__(self) -> Opened:
        """The open registry; raises what opening it raises."""
        if self._opened is None:
            self._opened = self._open()
        return self._opened

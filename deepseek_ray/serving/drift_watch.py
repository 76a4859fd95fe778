"""Drift and quality on a schedule: every so often a process of its own reports on the live decisions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepseek_ray.logs import get_logger
from deepseek_ray.paths import RunPaths
from deepseek_ray.serving.background import BackgroundProgram
from deepseek_ray.serving.drift_gauges import DriftGauges

logger = get_logger(__name__)

PROGRAM = ("-m", "deepseek_ray.online.drift_run")


class DriftWatch(BackgroundProgram):
    """Shows the newest report as gauges, and tells in the log which checks begin to fail.

    Args:
        paths: the run.
        settings: a ``Config`` as a mapping; ``serving.drift_every_s`` is the schedule.
        version: number of the version that serves.
        gauges: where reports are shown.
        program: what to run, for tests.
    """

    def __init__(
        self,
        paths: RunPaths,
        settings: Mapping[str, Any],
        version: Callable[[], str],
        gauges: DriftGauges,
        *,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        super().__init__("the report on drift", settings["serving"]["drift_every_s"], logger)
        self._paths, self._settings, self._version = paths, json.dumps(settings), version
        self._gauges, self._program = gauges, program
        self._alarms: set[str] = set()

    def arguments(self) -> Sequence[str]:
        """The program, the run folder and the version that serves now."""
        return [*self._program, str(self._paths.root), self._version()]

    def told(self) -> str:
        """The settings."""
        return self._settings

    def done(self, said: str) -> None:
        """Show the report."""
        report = json.loads(said)
        if report is None:  # nothing was served yet
            return
        self._gauges.show(report, time.time())
        alarms = {check["name"]: check for check in report["checks"] if not check["passed"]}
        for name in sorted(alarms.keys() - self._alarms):
            check = alarms[name]
            logger.warning("%s: %.4g passes %.4g (%s)", name, check["value"], check["bound"], check["detail"])
        self._alarms = set(alarms)

    def count_failure(self) -> None:
        """Count it; the gauges keep the last report, whose age shows."""
        self._gauges.failures.inc()

"""What the prediction log says about a policy's arms, step by step: a restart of the service forgets none of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deepseek_ray.data.log_follower import Decided, LogFollower
from deepseek_ray.serving.guard import Record, Room, StepRecord
from deepseek_ray.serving.traffic import Split, TrafficPolicy

CHAMPION = "champion"


class ArmEvidence:
    """Records of every arm and of the champion beside it, for one policy and one champion.

    Args:
        policy: the arms, and the steps since they began.
        champion: version of the champion.
        log_path: the prediction log.
    """

    def __init__(self, policy: TrafficPolicy, champion: str, log_path: Path) -> None:
        self._champion = champion
        self._steps = policy.steps
        self._splits = [Split(step.arms, policy.salt) for step in self._steps]
        self._since_us = self._steps[0].since_us
        self._log = LogFollower(log_path, self._since_us)
        self._forget()

    def read(self, going: Callable[[], bool] = lambda: True) -> None:
        """Take in what is new, as long as ``going`` says yes.

        Raises:
            EnvironmentProblemError: the log cannot be read.
        """
        for decided in self._log.decisions():
            for row in decided:
                if (record := self._record_of(row)) is not None:
                    record.decided(row)
            if not going():
                return
        for labels in self._log.labels():
            for label in labels:
                if (record := self._record_of(label.decided)) is not None:
                    record.labelled(label)
            if not going():
                return

    def steps(self, alias: str) -> list[StepRecord]:
        """An arm's records, the present step last."""
        pairs = zip(self._steps, self._records, strict=True)
        return [StepRecord(step.share(alias), by[alias], by[CHAMPION]) for step, by in pairs]

    def _forget(self) -> None:
        aliases = {CHAMPION, *(arm.alias for step in self._steps for arm in step.arms)}
        rooms = [Room() for _ in self._steps]
        self._records = [{alias: Record(room=room) for alias in aliases} for room in rooms]

    def _record_of(self, row: Decided) -> Record | None:
        """Where a row counts; None for one that came before, or that its own arm did not answer."""
        if row.logged_us < self._since_us:
            return None
        step = max(index for index, step in enumerate(self._steps) if index == 0 or step.since_us <= row.logged_us)
        number = self._splits[step].arm_of(row.card_id)
        arms = self._steps[step].arms
        if number >= 0:
            return self._records[step][arms[number].alias] if row.version == arms[number].version else None
        if row.version == self._champion:
            return self._records[step][CHAMPION]
        if row.version not in {arm.version for arm in arms}:
            # until here the champion was another one: the arms were compared with somebody else
            self._since_us = row.logged_us + 1
            self._forget()
        return None

"""Judges a released shadow before it may answer anyone: by the guard's tests, on decisions that both sides scored.

Shadow and champion score the same cards, so a mistake of both says nothing. Of the cards on which they differ and one
was wrong, a shadow that is no worse was wrong on half at most: the guard's test with a share of one half.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deepseek_ray.data.shadow_scores import Beside, read_beside
from deepseek_ray.serving.arm_metrics import CallCounts
from deepseek_ray.serving.guard import KEPT_SCORES, StepRecord, judge
from deepseek_ray.serving.release import Trial
from deepseek_ray.serving.traffic import Limits

LOOK_S = 5.0
"""Time between two looks: each reads some thousand scores."""
NO_CALLS = CallCounts(0, 0, ())


class ShadowTrial:
    """Looks at the shadow's scores every so often.

    Args:
        path: where they are kept.
        log_path: the prediction log.
        calls: model calls of a version as shadow, in this process.
        look_s: time between two looks.
    """

    def __init__(self, path: Path, log_path: Path, calls: Callable[[str], CallCounts], look_s: float = LOOK_S) -> None:
        self._path, self._log_path, self._calls, self._look_us = path, log_path, calls, look_s * 1e6
        self._last: tuple[tuple[str, str], int, Trial] | None = None

    def verdict(self, version: str, champion: str, limits: Limits, now_us: int) -> Trial:
        """What is known of a shadow beside a champion, at most ``look_s`` old.

        Raises:
            EnvironmentProblemError: scores or log cannot be read.
        """
        key = (version, champion)
        if self._last is None or self._last[0] != key or now_us - self._last[1] >= self._look_us:
            self._last = (key, now_us, self._judge(version, champion, limits))
        return self._last[2]

    def _judge(self, version: str, champion: str, limits: Limits) -> Trial:
        made = self._path.exists() and self._log_path.exists()
        beside = read_beside(self._path, self._log_path, version, champion, KEPT_SCORES) if made else Beside(0, [], [])
        found = judge([record_of(beside)], self._calls(version), NO_CALLS, limits)
        return Trial(beside.scored, found.cause, found.why)


def record_of(beside: Beside) -> StepRecord:
    """Scores of both sides, and the cards on which one side alone was wrong: the first such decision of a card counts.

    The cause ``latency`` is not looked for: a shadow's calls are as large as its queue is long, and nobody waits.
    """
    record = StepRecord(0.5)
    for ours, theirs, card in reversed(beside.pairs):
        for side, score in ((record.arm, ours), (record.champion, theirs)):
            side.scores.append(score)
            side.cards.add(card)
    seen: set[tuple[str, bool]] = set()
    for mistake in beside.mistakes:
        if (key := (mistake.card_id, mistake.is_fraud)) not in seen:
            seen.add(key)
            side = record.arm if mistake.shadow_wrong else record.champion
            side.bad_cards["missed_fraud" if mistake.is_fraud else "false_alarm"].add(mistake.card_id)
    return record

"""A turn that fails ends nothing, and is told once until one succeeds."""

from __future__ import annotations

import threading

import pytest

from deepseek_ray import periodic
from deepseek_ray.periodic import Periodic


class Turns(Periodic):
    """Fails on some turns."""

    def __init__(self, fails: list[bool], every_s: float = 0.001) -> None:
        super().__init__("counting", every_s, self.count)
        self.left, self.over = fails, threading.Event()

    def count(self) -> None:
        if not self.left:
            self.over.set()
        elif self.left.pop(0):
            raise KeyError("odd")


def test_the_first_failure_of_a_row_is_told_and_the_next_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(periodic.logger, "exception", lambda text, *values: told.append(text % values))
    turns = Turns([True, True, True, False, True])
    turns.start()
    assert turns.over.wait(20)
    turns.close()
    assert told == ["counting failed; trying again every 0.001 s"] * 2


@pytest.mark.parametrize("started", [True, False])
def test_with_no_time_between_turns_there_are_none(started: bool) -> None:
    turns = Turns([True], every_s=0.0)
    if started:
        turns.start()
    turns.close()
    assert turns.left == [True]

"""The updater's loop: it goes on where it was, backs off, and shows what it does."""

from __future__ import annotations

import errno
import json
import sqlite3
import threading
from pathlib import Path

import pytest

from deepseek_ray.config import UpdaterConfig
from deepseek_ray.errors import RegistryUnavailableError
from deepseek_ray.online import loop as loop_module
from deepseek_ray.online.loop import Loop
from deepseek_ray.online.triggers import Outcome
from deepseek_ray.paths import RunPaths
from serve_apps import updater

CONFIG = UpdaterConfig(min_new_labels=10, drift_labels=5, min_gap_s=1.0, retry_s=10.0, retry_max_s=20.0)


class Run:
    """A run with labels waiting, and updates that end as told."""

    def __init__(self, file: Path) -> None:
        self.file, self.now, self.labels, self.moved = file, 1_000.0, 0, 0.0
        self.champion = "1"
        self.release, self.released_s = "", 0.0
        self.ends: list[Outcome] = []
        self.begun: list[float] = []
        self.error: Exception | None = None

    def waiting(self) -> int:
        if self.error:
            raise self.error
        return self.labels

    def psi(self) -> float | None:
        return self.moved

    def basis(self) -> str:
        return self.champion

    def standing(self) -> str:
        return self.release

    def blocked(self) -> str:
        return f"a release is under way: {self.release}" if self.release else ""

    def begun_s(self) -> float:
        return self.released_s

    def attempt(self) -> tuple[Outcome, str]:
        self.begun.append(self.now)
        outcome = self.ends.pop(0)
        if outcome == "promoted":
            self.labels = 0
        if outcome == "released":
            self.release, self.released_s = "version 2 is the shadow", self.now + 0.5
        return outcome, f"it was {outcome}"

    def loop(self) -> Loop:
        return Loop(self, CONFIG, self.attempt, self.file, lambda: self.now, self)

    def shown(self) -> dict[str, object]:
        return json.loads(self.file.read_text())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "state.json")


def test_it_waits_for_labels_and_says_so(run: Run) -> None:
    run.labels = 9
    loop = run.loop()
    assert not loop.look().start
    assert (run.shown()["status"], run.shown()["message"], run.shown()["waiting"]) == ("idle", "9 new labels", 9)
    run.labels, run.ends = 10, ["promoted"]
    assert loop.look().start
    assert run.shown()["message"] == "it was promoted"
    assert run.shown()["attempts"] == {"promoted": 1, "released": 0, "refused": 0, "failed": 0}
    text = run.file.with_suffix(".prom").read_text()
    assert 'deepseek_ray_updater_attempts{outcome="promoted"} 1.0' in text
    assert "deepseek_ray_updater_failures_in_a_row 0.0" in text


def test_drift_is_asked_for_when_there_are_labels_to_learn_from(run: Run) -> None:
    run.labels, run.moved, run.ends = 5, 0.5, ["promoted"]
    assert run.loop().look().reason == "drift: 0.500 >= 0.25"


def test_failures_are_tried_again_with_growing_waits(run: Run) -> None:
    run.labels, run.ends = 10, ["failed", "failed", "failed", "promoted"]
    loop = run.loop()
    for _ in range(60):
        loop.look()
        run.now += 1.0
    assert run.begun == [1_000.0, 1_010.0, 1_030.0, 1_050.0]
    assert run.shown()["status"] == "idle"


def test_who_is_killed_during_an_update_backs_off_and_starts_it_again(run: Run) -> None:
    class KilledError(Exception):
        pass

    def killed() -> tuple[Outcome, str]:
        raise KilledError

    run.labels, run.ends = 10, ["promoted"]
    with pytest.raises(KilledError):
        Loop(run, CONFIG, killed, run.file, lambda: run.now, run).look()
    assert run.shown()["status"] == "updating"
    again = run.loop()
    assert not again.look().start
    run.now += 10.0
    assert again.look().start
    assert run.shown()["message"] == "it was promoted"


def test_an_update_cut_short_because_the_updater_stops_is_no_failure(run: Run, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()

    def stopped() -> tuple[Outcome, str] | None:
        return updater._attempt(["-S", "-c", "import time; time.sleep(60)"], paths, stop)

    paths = RunPaths(tmp_path)
    paths.updater.mkdir()
    run.labels, run.ends = 10, ["promoted"]
    Loop(run, CONFIG, stopped, run.file, lambda: run.now, run).look()
    assert (run.shown()["status"], run.shown()["last"]) == ("idle", None)
    assert run.loop().look().start


def test_a_refusal_waits_for_other_labels_also_after_a_restart(run: Run) -> None:
    run.labels, run.ends = 15, ["refused", "promoted"]
    assert run.loop().look().start
    run.now += 5.0
    assert not run.loop().look().start
    run.labels = 25
    assert run.loop().look().start


def test_another_champion_is_asked_about_labels_that_were_refused(run: Run) -> None:
    run.labels, run.ends = 15, ["refused", "promoted"]
    assert run.loop().look().start
    run.now += 5.0
    run.champion = "2"
    assert run.loop().look().start


def test_while_a_release_is_under_way_no_other_update_begins(run: Run) -> None:
    run.labels, run.ends = 10, ["released", "promoted"]
    assert run.loop().look().start
    run.now, run.labels = 5_000.0, 100
    loop = run.loop()
    assert loop.look().reason == "a release is under way: version 2 is the shadow"
    shown = run.shown()
    assert (shown["status"], shown["release"], shown["attempts"]["released"]) == ("releasing", run.release, 1)  # type: ignore[index]
    assert "deepseek_ray_updater_releasing 1.0" in run.file.with_suffix(".prom").read_text()
    run.release, run.champion, run.labels = "", "2", 10
    assert loop.look().start, "its version is champion: what waits now is new"


def test_labels_of_a_release_that_was_taken_back_wait_for_others(run: Run) -> None:
    run.labels, run.ends = 15, ["released", "released"]
    loop = run.loop()
    assert loop.look().start
    run.now, run.release = 5_000.0, ""
    assert not loop.look().start
    run.labels = 25
    assert loop.look().start


def test_who_is_killed_right_after_a_release_began_does_not_begin_it_again(run: Run) -> None:
    class KilledError(Exception):
        pass

    def killed() -> tuple[Outcome, str]:
        run.released_s = run.now + 0.5
        raise KilledError

    run.labels = 15
    with pytest.raises(KilledError):
        Loop(run, CONFIG, killed, run.file, lambda: run.now, run).look()
    run.now = 5_000.0  # it was taken back before anybody looked again
    assert not run.loop().look().start
    assert run.shown()["last"] == {"at_s": 1_000.5, "outcome": "released", "waiting": 15, "failures": 0, "basis": "1"}
    run.labels, run.ends = 25, ["released"]
    assert run.loop().look().start


@pytest.mark.parametrize(
    "error",
    [
        RegistryUnavailableError("The store does not answer.", fix="start it"),
        sqlite3.OperationalError("database or disk is full"),
        OSError(errno.ENOSPC, "no space"),
    ],
)
def test_what_is_away_or_full_is_told_and_not_the_end(run: Run, error: Exception) -> None:
    run.error = error
    loop = run.loop()
    assert not loop.look().start
    assert (run.shown()["status"], run.begun) == ("failing", [])
    run.error, run.labels, run.ends = None, 10, ["promoted"]
    assert loop.look().start


def test_an_update_that_cannot_start_is_tried_again_also_where_no_state_can_be_written(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    run.labels, run.ends = 10, ["promoted"]
    loop = Loop(run, CONFIG, full, run.file, lambda: run.now, run)  # type: ignore[arg-type]
    with monkeypatch.context() as disk:
        disk.setattr(loop_module, "replace_text", full)
        assert not loop.look().start
    assert not loop.look().start
    assert "backing off" in str(run.shown()["message"])
    monkeypatch.setattr(loop, "_attempt", run.attempt)
    run.now += 10.0
    assert loop.look().start


def test_a_torn_state_is_begun_anew(run: Run) -> None:
    run.file.write_text('{"since_s": 1')
    run.labels, run.ends = 10, ["promoted"]
    assert run.loop().look().start

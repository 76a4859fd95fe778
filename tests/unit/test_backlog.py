"""What waits for an update: labels old enough and not counted, and how far the input has moved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deepseek_ray.online.backlog import Backlog
from deepseek_ray.online.ledger import Counted, Ledger
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import InputSchema
from tests.unit.update_parts import NAMES, OLD, make_rows
from tests.update_run import late_label, make_config, serve_days

SCHEMA = InputSchema(
    columns=NAMES, sequence_len=2, sequence_channels=6, feature_service="risk_default_v1", feature_digest="d"
)


class Versions:
    """A registry whose champion can be set."""

    def __init__(self) -> None:
        self.champion, self.train_end = "1", "1970-03-05"

    def version_of(self, alias: str) -> str:
        return self.champion

    def get(self, version: str) -> Any:
        days = {"train_start": "1970-03-02", "train_end": self.train_end if self.champion != "1" else "1970-02-03"}
        number = self.champion if version == "champion" else version
        return SimpleNamespace(version=number, schema=SCHEMA, tags=days)


@pytest.fixture
def world(tmp_path: Path) -> tuple[RunPaths, Versions, Backlog]:
    paths, versions = RunPaths(tmp_path), Versions()
    OLD.save(paths.datasets / "train.safetensors")
    config = make_config(**{"updater.drift_rows": 300})
    return paths, versions, Backlog(config, paths, cast(Any, versions))


def test_without_a_log_nothing_waits(world: tuple[RunPaths, Versions, Backlog]) -> None:
    assert (world[2].waiting(), world[2].psi()) == (0, None)


def test_labels_wait_until_they_are_counted_or_set_aside(world: tuple[RunPaths, Versions, Backlog]) -> None:
    paths, versions, backlog = world
    serve_days(paths, 0, 6)  # the last two days and the one before them are not old enough, or not over
    ready = [f"p{number}" for number in range(40, 80)]  # of the second day; the third would judge
    told = backlog.waiting()
    assert 60 <= told <= 80
    ledger = Ledger(paths.updates)
    ledger.set_aside([ready[1]], "wrong")
    assert backlog.waiting() == told - 1
    ledger.write("2", "1", {name: Counted(False, True) for name in ready[1:4]}, run_id="r", root_until_us=1)
    assert backlog.waiting() == told - 1  # noted, but not champion
    versions.champion, versions.train_end = "2", "1970-03-02"
    assert backlog.waiting() == told - 3


def test_the_days_that_judged_wait_for_later_ones(world: tuple[RunPaths, Versions, Backlog]) -> None:
    paths, versions, backlog = world
    serve_days(paths, 0, 5)
    taken = {f"p{number}": Counted(False, True) for number in range(40)}
    Ledger(paths.updates).write("2", "1", taken, run_id="r", root_until_us=1)
    versions.champion, versions.train_end = "2", "1970-03-02"
    assert backlog.waiting() == 0  # an update could not split the one day that is left
    serve_days(paths, 5, 1)
    assert 30 <= backlog.waiting() <= 40


def test_labels_wait_for_as_many_rows_as_an_update_needs(world: tuple[RunPaths, Versions, Backlog]) -> None:
    paths, versions, _ = world

    def waiting(min_labels: int) -> int:
        config = make_config(**{"update.min_labels": min_labels})
        return Backlog(config, paths, cast(Any, versions)).waiting()

    serve_days(paths, 0, 6)  # two days train, the third judges
    assert 60 <= waiting(80) <= 80
    assert waiting(81) == 0  # an update would only say that its rows are too few
    taken = {f"p{number}": Counted(False, number != 5) for number in range(70)}
    Ledger(paths.updates).write("2", "1", taken, run_id="r", root_until_us=1)
    versions.champion, versions.train_end = "2", "1970-03-02"
    assert (waiting(10) > 0, waiting(11)) == (True, 0)
    late_label(paths, 5, is_fraud=True)  # taken as genuine, and told by now
    assert waiting(11) > 0


def test_setting_aside_or_a_new_champion_is_another_basis(world: tuple[RunPaths, Versions, Backlog]) -> None:
    paths, versions, backlog = world
    seen = [backlog.basis()]
    Ledger(paths.updates).set_aside(["p1"], "wrong")
    seen.append(backlog.basis())
    versions.champion = "2"
    assert len({*seen, backlog.basis()}) == 3


def test_drift_is_measured_from_the_days_that_made_the_champion(world: tuple[RunPaths, Versions, Backlog]) -> None:
    paths, versions, backlog = world
    serve_days(paths, 0, 4)
    assert backlog.psi() is None  # too few decisions
    serve_days(paths, 4, 16)
    moved = backlog.psi()
    assert moved is not None
    assert moved > 1.0  # the season is another
    Ledger(paths.updates).write("2", "1", {}, run_id="r", root_until_us=1)
    versions.champion = "2"
    settled = backlog.psi()
    assert settled is not None
    assert settled < 0.25
    serve_days(paths, 20, 10, rows=make_rows(5, 400, new=False))
    back = backlog.psi()
    assert back is not None
    assert back > 1.0

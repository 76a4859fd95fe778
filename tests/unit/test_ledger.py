"""The ledger: what a version was trained on is what stands on the way to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.online.ledger import LEDGER, Counted, Descent, Ledger

FRAUD, GENUINE, ASSUMED = Counted(True, True), Counted(False, True), Counted(False, False)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Versions 2 and 4 were made from 1 and 2; 3 was made from 2 as well, and refused."""
    ledger = Ledger(tmp_path / "updates")
    for version, base, labels in (
        ("2", "1", {"a": FRAUD, "b": ASSUMED}),
        ("3", "2", {"c": FRAUD}),
        ("4", "2", {"b": FRAUD, "c": GENUINE}),
    ):
        ledger.write(version, base, labels, run_id="r", root_until_us=7)
    return ledger


def test_only_the_way_to_a_version_counts(ledger: Ledger) -> None:
    assert ledger.counted("1") == {}
    assert ledger.counted("2") == {"a": FRAUD, "b": ASSUMED}
    assert ledger.counted("4") == {"a": FRAUD, "b": FRAUD, "c": GENUINE}
    assert ledger.descent("4") == Descent("1", 7, ("2", "4"))
    assert ledger.descent("9") == Descent("9", None, ())


def test_another_process_reads_the_same(ledger: Ledger) -> None:
    assert Ledger(ledger.path.parent).labels_of("3") == {"c": FRAUD}


def test_a_version_is_noted_once_and_whole(ledger: Ledger) -> None:
    with pytest.raises(EnvironmentProblemError, match="UNIQUE"):
        ledger.write("4", "3", {"z": FRAUD}, run_id="r", root_until_us=7)
    assert "z" not in ledger.counted("4")


def test_what_is_set_aside_stays_so(ledger: Ledger) -> None:
    assert ledger.set_aside(["a", "b"], "wrong") == 2
    assert ledger.set_aside(["b", "c"], "wrong too") == 1
    assert Ledger(ledger.path.parent).ids_set_aside() == {"a", "b", "c"}


def test_a_file_that_is_no_ledger_is_reported(tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_bytes(b"not a database, but long enough to be looked at" * 50)
    with pytest.raises(EnvironmentProblemError, match="cannot be used"):
        Ledger(tmp_path)

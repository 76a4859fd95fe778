"""The table of `make test-full`: what passed on a tree is not run again, and a changed tree runs all."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import full


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("unit/test_a.py", "e2e/test_b.py"):
        file = tmp_path / "tests" / name
        file.parent.mkdir(parents=True)
        file.write_text("def test_it() -> None:\n    pass\n")
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for arguments in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    return tmp_path


class Runner:
    """Stands in for pytest."""

    def __init__(self, **statuses: str) -> None:
        self.ran: list[str] = []
        self.statuses = statuses

    def __call__(self, step: str, root: Path) -> full.Row:
        self.ran.append(step)
        return {"status": self.statuses.get(Path(step).stem, "passed"), "seconds": "1"}


def test_a_second_run_takes_up_where_the_first_one_ended(checkout: Path) -> None:
    first, second, third = Runner(test_b="failed"), Runner(), Runner()
    assert full.main([], checkout, first) == 1
    assert first.ran == ["tests/unit/test_a.py", "tests/e2e/test_b.py"]
    assert full.main([], checkout, second) == 0
    assert second.ran == ["tests/e2e/test_b.py"]
    assert full.main([], checkout, third) == 0
    assert third.ran == []


def test_committing_the_table_changes_nothing_and_a_changed_file_all(checkout: Path) -> None:
    assert full.main([], checkout, Runner()) == 0
    subprocess.run(["git", "add", "-A"], cwd=checkout, check=True)
    same, changed = Runner(), Runner()
    full.main([], checkout, same)
    (checkout / "new.py").touch()
    full.main([], checkout, changed)
    assert (len(same.ran), len(changed.ran)) == (0, 2)


def test_an_interruption_keeps_what_is_done(checkout: Path) -> None:
    def interrupted(step: str, root: Path) -> full.Row:
        if "test_b" in step:
            raise KeyboardInterrupt
        return {"status": "passed", "seconds": "1"}

    with pytest.raises(KeyboardInterrupt):
        full.main([], checkout, interrupted)
    assert list(full.read(checkout)) == ["tests/unit/test_a.py"]


def test_words_choose_steps_and_none_is_no_success(checkout: Path) -> None:
    some = Runner()
    assert full.main(["e2e"], checkout, some) == 0
    assert some.ran == ["tests/e2e/test_b.py"]
    assert full.main(["nothing"], checkout, some) == 1


def test_a_step_is_counted_and_one_that_fails_or_hangs_is_named(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = checkout / "tests" / "unit" / "test_a.py"
    file.write_text("import pytest\n\ndef test_a(): pass\n\ndef test_b(): pytest.skip('why')\n")
    row = full.run_step("tests/unit/test_a.py", checkout)
    assert (row["status"], row["tests"], row["skipped"]) == ("passed", "2", "1")
    file.write_text("def test_a(): assert False\n")
    assert full.run_step("tests/unit/test_a.py", checkout)["status"] == "failed"
    file.write_text("import time\n\ndef test_a(): time.sleep(60)\n")
    monkeypatch.setattr(full, "MAX_STEP_S", 2)
    assert full.run_step("tests/unit/test_a.py", checkout)["status"] == "too long"

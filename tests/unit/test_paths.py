"""Where a run keeps its files."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from deepseek_ray import paths as files
from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.paths import RunPaths, exclusive, mark_latest, resolve_run, runs_root


def test_latest_moves_to_the_newest_run(tmp_path: Path) -> None:
    first, second = (RunPaths(runs_root() / name).create() for name in ("a", "b"))
    for paths in (first, second):
        mark_latest(paths)
        assert resolve_run(None).root == paths.root.resolve()
    assert sorted(path.name for path in runs_root().iterdir()) == ["a", "b", "latest"]


def test_a_first_run_without_a_name_does_not_take_the_place_of_the_link(tmp_path: Path) -> None:
    unnamed = resolve_run(None).create()
    assert (runs_root() / "latest").is_symlink()
    (unnamed.root / "file").write_text("kept")
    assert (resolve_run(None).create().root / "file").read_text() == "kept"
    mark_latest(RunPaths(runs_root() / "next").create())
    assert resolve_run(None).root == (runs_root() / "next").resolve()


def test_the_argument_beats_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_RAY_RUN", str(tmp_path / "named"))
    assert resolve_run(None).root == tmp_path / "named"
    assert resolve_run(tmp_path / "given").root == tmp_path / "given"


def test_a_folder_that_cannot_be_made_is_reported_with_a_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblemError, match=r"cannot be written: Not a directory.*Fix: free space"):
        RunPaths(tmp_path / "file" / "run").create()


def test_the_tracking_uri_is_absolute_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunPaths(Path("run")).tracking_uri == f"sqlite:///{tmp_path}/run/mlflow.db"


def test_a_submitted_job_keeps_its_runs_outside_its_working_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked = tmp_path / "runtime_resources" / "_ray_pkg_0123456789abcdef"
    unpacked.mkdir(parents=True)
    monkeypatch.delenv("DEEPSEEK_RAY_RUNS")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert runs_root() == Path("runs")
    monkeypatch.chdir(unpacked)
    assert runs_root() == tmp_path / "home" / "deepseek-ray" / "runs"


def test_a_lock_is_waited_for_as_long_as_asked(tmp_path: Path) -> None:
    held = ExitStack()
    held.enter_context(exclusive(tmp_path, "", "", name="a"))
    with exclusive(tmp_path, "", "", name="b"), pytest.raises(EnvironmentProblemError, match="held"):
        exclusive(tmp_path, "held", "wait", name="a", wait_s=0.01).__enter__()
    timer = threading.Timer(0.1, held.close)
    timer.start()
    with exclusive(tmp_path, "", "", name="a", wait_s=10):
        timer.join()


def test_a_text_is_on_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    seen: list[tuple[str, bool]] = []

    def note(path: Path) -> None:
        seen.append((path.read_text() if path.is_file() else path.name, file.exists()))

    monkeypatch.setattr(files, "sync", note)
    files.replace_text(file, "new")
    assert seen == [("new", False), (tmp_path.name, True)]

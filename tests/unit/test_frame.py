"""The Makefile and .ci/run, with stand-ins for python and make that write down how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Logs each call; `-m venv .venv` puts a copy of itself there, as the real one would.
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
[ "$*" = "-m venv .venv" ] && mkdir -p .venv/bin && cp "$0" .venv/bin/python
exit 0
"""


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "main"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("python3", "make"):
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("MAKEFLAGS", "")
    monkeypatch.delenv("ARGS", raising=False)  # of a make that runs these tests
    return folder


def run(clone: Path, *command: str) -> list[str]:
    """The calls that a command makes."""
    calls = Path(os.environ["CALLS"])
    calls.unlink(missing_ok=True)
    subprocess.run(command, cwd=clone, check=True, capture_output=True, timeout=30)
    return calls.read_text().splitlines() if calls.exists() else []


def make(clone: Path, target: str) -> list[str]:
    real = shutil.which("make")
    assert real
    return run(clone, real, target, f"PYTHON={clone.parent / 'tools' / 'python3'}")


def test_install_pins_and_is_done_once(clone: Path) -> None:
    calls = make(clone, "install")
    assert "python3 -m venv .venv" in calls
    assert "python -m pip install --quiet --constraint constraints.txt --editable .[dev]" in calls
    assert any(call.startswith("python -m compileall") for call in calls)
    assert make(clone, "install") == []


def test_a_changed_pin_installs_again(clone: Path) -> None:
    make(clone, "install")
    stamp = (clone / ".venv" / ".installed").stat().st_mtime
    os.utime(clone / "constraints.txt", (stamp + 1, stamp + 1))
    assert "python3 -m venv .venv" in make(clone, "install")


@pytest.mark.parametrize(
    ("target", "starts"),
    [
        ("demo", "python -m pipelines.risk.demo"),
        ("test-clusters", "python -m pytest -m not slow and not gpu tests/integration tests/e2e"),
        ("test-others", "python -m pytest -m not slow and not gpu tests/unit tests/kernels tests/distributed"),
        ("test-full", "python -m tests.full"),
        ("bench", "python -m tests.bench.bench_one"),
    ],
)
def test_a_target_builds_the_environment_first(clone: Path, target: str, starts: str) -> None:
    (clone / "tests" / "bench").mkdir(parents=True)
    (clone / "tests" / "bench" / "bench_one.py").touch()
    calls = make(clone, target)
    assert calls.index("python3 -m venv .venv") < len(calls) - 1
    assert calls[-1].strip().startswith(starts)


def test_all_that_is_quick_is_tested_once(clone: Path) -> None:
    started = [call.split("gpu ")[1].split() for call in make(clone, "test") if "pytest" in call]
    named = [name for names in started for name in names if not name.startswith("--ignore=")]
    folders = {path.name for path in (ROOT / "tests").iterdir() if list(path.glob("test_*.py"))}
    assert {name for name in named if (ROOT / name).is_dir()} == {f"tests/{folder}" for folder in folders - {"gpu"}}
    moved = {name for name in named if (ROOT / name).is_file()}
    assert {f"--ignore={name}" for name in moved} == {n for names in started for n in names if n.startswith("--")}


def test_clean_keeps_the_runs(clone: Path) -> None:
    make(clone, "install")
    kept = clone / "runs" / "first" / "__pycache__" / "report.html"
    for file in (kept, clone / "pipelines" / "__pycache__" / "demo.pyc"):
        file.parent.mkdir(parents=True)
        file.touch()
    make(clone, "clean")
    assert kept.is_file()
    assert sorted(path.name for path in clone.iterdir() if path.is_dir()) == [".ci", "pipelines", "runs"]
    assert list((clone / "pipelines").iterdir()) == []


def test_ci_checks_style_and_tests_and_uses_the_data_beside_the_checkout(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{clone.parent / 'tools'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("DEEPSEEK_RAY_HANDBOOK", raising=False)
    for name in ("redis-server", "psql"):  # installed: nothing to fetch
        (clone.parent / "tools" / name).write_text(STAND_IN)
        (clone.parent / "tools" / name).chmod(0o755)
    tool = clone.parent / "tools" / "make"
    tool.write_text('#!/bin/sh\necho "$* data=$DEEPSEEK_RAY_HANDBOOK" >> "$CALLS"\n')
    assert run(clone, "bash", ".ci/run") == ["lint data=", "test data="]
    data = clone.parent / "shared" / "data" / "fraud-handbook"
    data.mkdir(parents=True)
    assert run(clone, "bash", ".ci/run") == [f"lint data={data}", f"test data={data}"]


@pytest.mark.parametrize("status", [0, 1])
def test_ci_installs_servers_for_root_and_goes_on_without_them(
    clone: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    tools = clone.parent / "tools"
    stand_ins = {"make": STAND_IN, "apt-get": STAND_IN.replace("exit 0", f"exit {status}"), "id": "#!/bin/sh\necho 0\n"}
    for name, text in stand_ins.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    for name in ("bash", "sh", "dirname", "basename"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tools))
    calls = run(clone, "bash", ".ci/run")
    assert [call for call in calls if call.startswith("make")] == ["make lint", "make test"]
    installs = [call for call in calls if "install" in call]
    assert [call.split()[-1] for call in installs] == ([] if status else ["redis-server", "postgresql"])

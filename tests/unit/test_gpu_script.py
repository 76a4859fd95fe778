"""The script that checks and measures on a lent GPU, with a stand-in for python: what ends early leaves what it had."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STANDS_IN = """#!/usr/bin/env bash
case "$*" in
  *xdist*) exit 1 ;;
  "-m pytest"*) echo "1 passed" ;;
  *report*) mkdir -p "${@: -1}"; echo "goals of $4" ;;
  *bench_kernels*--goals*--tune*) exit 3 ;;
  *bench_kernels*) echo "op" >> "$4"; %s ;;
esac
"""


def ran(tmp_path: Path, slow: str = "true", **environment: str) -> tuple[int, str, Path]:
    python = tmp_path / "python"
    python.write_text(STANDS_IN % slow)
    python.chmod(0o755)
    out = tmp_path / "out"
    command = ["bash", str(ROOT / "tests/bench/gpu.sh"), str(out)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHON": str(python)} | environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, out


def test_every_part_runs_whatever_became_of_the_one_before(tmp_path: Path) -> None:
    code, printed, out = ran(tmp_path)
    assert code == 1
    lines = printed.splitlines()
    assert [line.partition(" after")[0] for line in lines[:5]] == [
        "check: exit 0", "first: exit 0", "goals: exit 3", "train: exit 0", "rest: exit 0",
    ]  # fmt: skip
    assert f"goals of {out}/kernels.csv" in printed
    assert sorted(one.name for one in out.iterdir()) == ["kernels.csv", "log.txt", "plots.tar"]


@pytest.mark.parametrize(("budget", "ended"), [("27", "exit 124"), ("22", "no time left")])
def test_a_part_that_takes_too_long_is_cut_and_its_rows_are_reported(tmp_path: Path, budget: str, ended: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kernels.csv").write_text("op\n")
    code, printed, out = ran(tmp_path, slow="sleep 60", BUDGET_S=budget, PARTS="first rest")
    assert code == 1
    assert f"first: {ended}" in printed
    assert "rest: no time left" in printed
    assert f"goals of {out}/kernels.csv" in printed


def test_without_the_tool_or_a_gpu_the_sanitizer_says_so(tmp_path: Path) -> None:
    path = os.pathsep.join(one for one in os.environ["PATH"].split(os.pathsep) if "cuda" not in one)
    script = ["bash", str(ROOT / "tests/gpu/sanitize.sh")]
    done = subprocess.run(
        script, env=os.environ | {"PATH": path, "PYTHON": "false"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith("nothing checked")

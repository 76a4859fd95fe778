"""The benchmarks of serving run and say what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]
ROOT = Path(__file__).parents[2]


def test_the_quick_figures(tmp_path: Path) -> None:
    out = tmp_path / "serving.json"
    command = [sys.executable, "-m", "tests.bench.bench_serving", "--quick", "--rounds", "2", "--json", str(out)]
    subprocess.run(command, check=True, cwd=ROOT)
    figures = json.loads(out.read_text(encoding="utf-8"))
    wanted = {"throughput_vs_floor", "throughput_vs_plain_serve", "p50_vs_floor", "swap_failed_requests"}
    assert wanted | {"swap_added_ms"} <= figures.keys()
    assert figures["swap_failed_requests"] == 0
    assert figures["throughput_vs_plain_serve"] > 5


def test_a_short_soak() -> None:
    command = [sys.executable, "-m", "tests.bench.soak", "--minutes", "0.5", "--warm-up", "0.1", "--share", "0.3"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert "failed=0" in done.stdout, done.stdout + done.stderr

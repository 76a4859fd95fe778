"""The long-running updater as a process: it updates when labels are there, and kill -9 costs nothing but time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deepseek_ray.data.served import matured
from deepseek_ray.online.ledger import Ledger
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import CHAMPION
from tests import update_run
from tests.integration.test_update_cycle import check_account

ROOT = Path(__file__).resolve().parents[2]
TRIGGERS = {"min_new_labels": 150, "poll_s": 0.2, "retry_s": 0.5, "min_gap_s": 0.1, "drift_psi": 0.0}
GIVE_UP_S = 90.0


def start(paths: RunPaths) -> subprocess.Popen[bytes]:
    """The updater as the leader of its own process group."""
    flags = [f"--set=updater.{name}={value}" for name, value in TRIGGERS.items()]
    command = [sys.executable, "-m", "serve_apps.updater", f"--run={paths.root}", *flags]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def wait_for(paths: RunPaths, process: subprocess.Popen[bytes], key: str, value: object) -> dict[str, object]:
    give_up = time.monotonic() + GIVE_UP_S
    while time.monotonic() < give_up:
        with contextlib.suppress(FileNotFoundError):
            state = json.loads((paths.updater / "state.json").read_text())
            if state[key] == value:
                return state
        assert process.poll() is None, "the updater has ended"
        time.sleep(0.05)
    raise AssertionError((paths.updater / "state.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_updater_that_is_killed_goes_on_and_counts_each_label_once(tmp_path: Path) -> None:
    paths, registry = update_run.make_run(tmp_path / "run")
    update_run.serve_days(paths, 0, 10)
    process = start(paths)
    wait_for(paths, process, "status", "updating")
    os.killpg(process.pid, signal.SIGKILL)  # the loop and its update
    process.wait()
    assert registry.version_of(CHAMPION) == "1"
    process = start(paths)
    wait_for(paths, process, "status", "updating")
    process.kill()  # the loop alone: its update goes on
    process.wait()
    process = start(paths)
    try:
        give_up = time.monotonic() + GIVE_UP_S
        while registry.version_of(CHAMPION) == "1" and time.monotonic() < give_up:
            time.sleep(0.2)
        champion, _ = check_account(paths, registry)
        served = matured(paths, registry.get(champion).schema.columns, "d", 2.0)
        known = Ledger(paths.updates).counted(champion)
        left = served.select(np.array([name not in known for name in served.prediction_ids.tolist()], dtype=bool))
        ready = left.told & (left.rows.day < left.rows.day.max())  # of the two days that judged the last will again
        wait_for(paths, process, "waiting", int(ready.sum()))
    finally:
        process.terminate()
        assert process.wait(30) == 0
    assert len(Ledger(paths.updates).descent(str(registry.version_of(CHAMPION))).steps) == 1

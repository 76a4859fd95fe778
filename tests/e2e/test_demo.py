"""The whole loop as a newcomer runs it: the demo, interrupted once, then what its run answers afterwards."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from deepseek_ray.data.prediction_archive import read_predictions
from deepseek_ray.paths import RunPaths

ROOT = Path(__file__).resolve().parents[2]
DEMO_TIMEOUT_S = 600
SETTINGS = ["--preset", "debug"]
for setting in ("data.replay_days=16", "data.num_days=50", "data.drift=new-device", "update.min_labels=20"):
    SETTINGS += ["--set", setting]
BOUND_KEYS = {
    "wall_s", "average_precision", "cp100", "lightgbm_average_precision", "lightgbm_cp100", "served_offline_max_diff",
    "feature_differences", "update_failed_requests", "http_p50_ms", "http_p99_ms", "update_gain", "update_forgetting",
}  # fmt: skip

pytestmark = pytest.mark.timeout(2 * DEMO_TIMEOUT_S)


@dataclass(frozen=True)
class Demo:
    """A finished demo."""

    paths: RunPaths
    output: str
    environment: dict[str, str]

    def ask(self, *arguments: str) -> str:
        """What ``deepseek-ray`` prints about the run; it must succeed."""
        command = [sys.executable, "-m", "deepseek_ray.cli", *arguments, "--run", str(self.paths.root)]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Killed without warning while it trains, then started again with the same run folder."""
    folder = tmp_path_factory.mktemp("demo")
    paths = RunPaths(folder / "runs" / "mine")
    environment = {**os.environ, "DEEPSEEK_RAY_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1"}
    for name in ("RAY_ADDRESS", "DEEPSEEK_RAY_RUN", "DEEPSEEK_RAY_API_KEY", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pipelines.risk.demo", *SETTINGS, "--run", str(paths.root)]
    with (folder / "first.log").open("w") as log:
        first = start(command, environment, log.fileno())
        kill_when(first, lambda: any(paths.checkpoints.rglob("*")), folder / "first.log")
    second = start(command, environment, subprocess.PIPE)
    try:
        output = second.communicate(timeout=DEMO_TIMEOUT_S)[0]
    finally:
        kill(second)
    assert second.returncode == 0, output[-6000:]
    return Demo(paths, output, environment)


def start(command: list[str], environment: dict[str, str], stdout: int) -> subprocess.Popen[str]:
    """Start a program as the leader of its own process group."""
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def kill_when(process: subprocess.Popen[str], reached: Callable[[], bool], log: Path) -> None:
    """Wait until the condition holds, then end the whole group without warning."""
    give_up = time.monotonic() + DEMO_TIMEOUT_S
    while not reached():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < give_up, log.read_text()
        time.sleep(0.05)
    kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """End a process group; one that has ended stays ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_an_interrupted_demo_finishes_when_it_is_started_again(demo: Demo) -> None:
    assert f"Report: {demo.paths.report_html}" in demo.output
    assert "Next: " in demo.output.splitlines()[-1]
    assert (demo.paths.root.parent / "latest").resolve() == demo.paths.root.resolve()
    assert demo.paths.report_html.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("program", "fix"),
    [
        ("demo", "give a new folder"),
        ("ingest --synthetic", "give a new folder"),
        ("warm", "warm before the first serve"),
    ],
)
def test_a_run_that_has_been_served_is_left_as_it_is(demo: Demo, program: str, fix: str) -> None:
    before = demo.paths.report_json.read_bytes()
    module, *flags = program.split()
    command = [sys.executable, "-m", f"pipelines.risk.{module}", *flags, *SETTINGS, "--run", str(demo.paths.root)]
    again = subprocess.run(
        command, cwd=ROOT, env=demo.environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert again.returncode == 2
    assert f"has been served already. Fix: {fix}" in again.stderr
    assert demo.paths.report_json.read_bytes() == before


def test_the_report_holds_every_figure_the_loop_is_judged_by(demo: Demo) -> None:
    flat = json.loads(demo.paths.report_json.read_text(encoding="utf-8"))
    assert {key for key in BOUND_KEYS if not isinstance(flat.get(key), int | float)} == set()
    assert {type(value) for value in flat.values()} <= {int, float, str}
    assert flat["feature_differences"] == 0
    assert flat["feature_rows"] > 4_000
    assert flat["served_offline_max_diff"] <= 1e-6
    assert flat["update_failed_requests"] == 0


def test_the_update_was_promoted_and_answered_before_the_replay_ended(demo: Demo) -> None:
    update = json.loads((demo.paths.results / "update.json").read_text(encoding="utf-8"))
    replay = json.loads((demo.paths.results / "replay.json").read_text(encoding="utf-8"))
    logged = read_predictions(demo.paths, vectors=False)
    assert replay["failed"] == 0
    assert (update["champion_version"], update["promoted"]) == (logged["model_version"][0], True)
    assert logged["model_version"][-1] == update["challenger_version"]
    assert [swap["to_version"] for swap in replay["swaps"]] == [update["challenger_version"]]


def test_any_decision_leads_back_to_its_data_and_its_commit(demo: Demo) -> None:
    name = read_predictions(demo.paths, vectors=False)["prediction_id"][-1]
    found = json.loads(demo.ask("explain", name, "--json"))
    train = json.loads((demo.paths.results / "train.json").read_text(encoding="utf-8"))
    assert found["decision"]["prediction_id"] == name
    assert found["features"] == {
        "service": train["feature_service"], "digest": train["feature_digest"], "same_as_trained": True
    }  # fmt: skip
    assert found["model"]["now"] == ["champion"]
    assert found["data"]["digest"]
    assert found["code"]["git_commit"]


def test_the_history_tells_each_promotion_with_its_numbers(demo: Demo) -> None:
    entries = json.loads(demo.ask("registry", "history", "--json"))["history"]
    assert [entry["action"] for entry in entries] == ["promote", "promote"]
    assert all(check["passed"] for entry in entries for check in entry["decision"]["checks"])


def test_what_the_page_says_to_type_works_as_it_stands(demo: Demo) -> None:
    page = html.unescape(demo.paths.report_html.read_text(encoding="utf-8"))
    typed = re.findall(r"<pre>deepseek-ray ([^<]*) --run \S+</pre>", page)
    assert {"verify features", "registry history", "report"} < set(typed)
    for verb in ("verify features", "registry history", "report"):
        demo.ask(*verb.split())


def test_the_review_needs_no_settings_of_its_own(demo: Demo) -> None:
    assert "0 differences" in demo.ask("review", "--no-retrain")


def test_the_served_features_are_verified_from_the_command_line(demo: Demo) -> None:
    assert "0 differences" in demo.ask("verify", "features")

"""Each label counts once in the version that serves, whatever ends the update; wrong labels do not get in."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.prediction_archive import read_predictions
from deepseek_ray.data.served import matured
from deepseek_ray.errors import DataError, EnvironmentProblemError
from deepseek_ray.online import cycle, intake
from deepseek_ray.online.ledger import Ledger
from deepseek_ray.online.replay import Reservoir
from deepseek_ray.paths import RunPaths, exclusive
from deepseek_ray.registry import CHAMPION, Registry
from tests import update_run
from tests.unit.update_parts import one_thread  # noqa: F401 - a fixture
from tests.update_run import late_label, make_config, serve_days

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunPaths, Registry]:
    """Version 1, and ten served days of a season it does not know."""
    paths, registry = update_run.make_run(tmp_path / "run")
    serve_days(paths, 0, 10)
    return paths, registry


class Behind:
    """A client of a service that keeps its version."""

    def __init__(self, url: str) -> None:
        pass

    async def __aenter__(self) -> Behind:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def model(self) -> dict[str, str]:
        return {"model_version": "1"}


def check_account(paths: RunPaths, registry: Registry) -> tuple[str, int]:
    """The champion's memory and ledger agree with each other and with the log; returns champion and labels counted."""
    champion, ledger = registry.version_of(CHAMPION), Ledger(paths.updates)
    assert champion is not None
    steps = ledger.descent(champion).steps
    counts = Counter(name for step in steps for name, one in ledger.labels_of(step).items() if one.told)
    assert [name for name, times in counts.items() if times > 1] == []
    counted = ledger.counted(champion)
    sent = read_predictions(paths).filter(read_predictions(paths)["is_fraud"].is_not_null())
    truth = dict(zip(sent["prediction_id"], sent["is_fraud"], strict=True))
    assert all(truth[name] == one.is_fraud for name, one in counted.items() if one.told)
    schema = registry.get(champion).schema
    served = matured(paths, schema.columns, schema.feature_digest, 2.0)
    root = intake.Root(make_config(), paths, intake.root_until(champion, ledger, registry))
    memory = intake.memory_of(champion, served, ledger, root)
    trained = RiskDataset.load(paths.datasets / "train.safetensors")
    assert sum(memory.seen.values()) == len(trained) + len(counted)
    assert memory.seen[1] == int(trained.label.sum()) + sum(one.is_fraud for one in counted.values())
    return champion, sum(counts.values())


def test_an_update_counts_each_label_once_and_the_next_one_goes_on(run: tuple[RunPaths, Registry]) -> None:
    paths, registry = run
    first = cycle.update(make_config(), paths, registry)
    assert first["promoted"], first["refusal"]
    champion, counted = check_account(paths, registry)
    assert (champion, first["rows_corrected"]) == ("2", 0)
    with pytest.raises(DataError, match="40 new labels are fewer"):  # of the two days that judged
        cycle.update(make_config(**{"update.min_labels": 50}), paths, registry)
    serve_days(paths, 10, 8)
    late = next(name for name, one in Ledger(paths.updates).counted("2").items() if not one.told)
    late_label(paths, int(late[1:]), is_fraud=True)
    kept = Reservoir.load(intake.memory_file(paths, "2"))
    costs = {"threshold_policy": "cost", "review_cost": 3.0, "missed_fraud_cost": 60.0}
    by_cost = make_config(**{f"serving.{name}": value for name, value in costs.items()})
    second = cycle.update(by_cost, paths, registry)
    assert second["promoted"], second["refusal"]
    assert (second["threshold"], registry.get("3").tags["threshold"]) == (0.05, "0.05")
    assert second["rows_corrected"] == 1
    champion, again = check_account(paths, registry)
    assert champion == "3"
    assert again > counted
    assert Ledger(paths.updates).counted("3")[late].is_fraud
    assert Reservoir.load(intake.memory_file(paths, "2")).seen == kept.seen  # a rollback would need it
    registry.rollback()
    assert check_account(paths, registry) == ("2", counted)


def test_a_service_that_does_not_swap_is_a_note_and_no_failure(
    run: tuple[RunPaths, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, registry = run
    monkeypatch.setattr(cycle, "RiskClient", Behind)
    monkeypatch.setattr(cycle, "SWAP_TIMEOUT_S", -1.0)
    stage = cycle.update(make_config(), paths, registry, "http://it")
    assert (stage["promoted"], registry.version_of(CHAMPION)) == (True, "2")
    assert "still answers with version 1" in stage["note"]
    assert json.loads((paths.results / "update.json").read_text())["note"] == stage["note"]


def test_a_memory_that_is_lost_is_made_again(run: tuple[RunPaths, Registry]) -> None:
    paths, registry = run
    assert cycle.update(make_config(), paths, registry)["promoted"]
    file = intake.memory_file(paths, "2")
    before = Reservoir.load(file).rows()
    file.write_bytes(b"torn")
    served = matured(paths, registry.get("2").schema.columns, "d", 2.0)
    root = intake.Root(make_config(), paths, intake.root_until("2", Ledger(paths.updates), registry))
    after = intake.memory_of("2", served, Ledger(paths.updates), root).rows()
    for name, column in before.items():
        np.testing.assert_array_equal(column, after[name], err_msg=name)


def test_two_updates_of_one_run_do_not_mix(run: tuple[RunPaths, Registry]) -> None:
    paths, registry = run
    paths.updates.mkdir(exist_ok=True)
    with exclusive(paths.updates, "held", "wait"), pytest.raises(EnvironmentProblemError, match="under way"):
        cycle.update(make_config(), paths, registry)


def test_scores_and_decisions_teach_nothing(run: tuple[RunPaths, Registry], tmp_path: Path) -> None:
    """The same labels with other answers of the model give the same challenger, to the last bit."""
    paths, registry = run
    made = []
    for probability, decision in ((0.01, "approve"), (0.99, "review")):
        with sqlite3.connect(paths.prediction_log) as db:
            db.execute("UPDATE predictions SET probability = ?, decision = ?", (probability, decision))
        db.close()
        champion = registry.get(CHAMPION)
        served = matured(paths, champion.schema.columns, "d", 2.0)
        rows = intake.take_in("1", served, registry, Ledger(paths.updates), make_config(), paths)
        unlabelled = set(served.prediction_ids[~served.told].tolist())
        assert not any(one.is_fraud for name, one in rows.labels.items() if name in unlabelled)
        cycle.train(champion, rows, make_config(), paths)
        made.append((paths.root / "challenger" / "model.safetensors").read_bytes())
    assert made[0] == made[1]
    last = read_predictions(paths)["order_us"].max()
    assert rows.held_out.order_us.max() <= last - 2 * 86_400_000_000  # younger ones may still get their label


def test_wrong_labels_are_refused_and_leave_no_trace(run: tuple[RunPaths, Registry]) -> None:
    paths, registry = run
    assert cycle.update(make_config(), paths, registry)["promoted"]
    before = check_account(paths, registry)
    serve_days(paths, 10, 8, wrong=lambda number: number % 4 != 0)
    poisoned = cycle.update(make_config(), paths, registry)
    assert "label_shift" in poisoned["refusal"]
    assert registry.version_of(CHAMPION) == "2"
    assert check_account(paths, registry) == before
    assert not intake.memory_file(paths, poisoned["challenger_version"]).exists()
    ids = [f"p{number}" for number in range(400, 720)]
    assert Ledger(paths.updates).set_aside(ids, "poisoned") == 320
    serve_days(paths, 18, 8)
    healed = cycle.update(make_config(), paths, registry)
    assert healed["promoted"], healed["refusal"]
    assert not set(ids) & set(Ledger(paths.updates).counted(check_account(paths, registry)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("step", update_run.STEPS)
def test_an_update_that_is_killed_neither_loses_nor_repeats_a_label(run: tuple[RunPaths, Registry], step: str) -> None:
    paths, registry = run
    command = [sys.executable, "-m", "tests.update_run", str(paths.root), step]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=100, check=False)
    assert killed.returncode == -signal.SIGKILL
    promoted = step in ("crowned", "promoted", "kept")
    champion, counted = check_account(paths, registry)
    assert (champion != "1", counted > 0) == (promoted, promoted)
    serve_days(paths, 10, 8)
    after = cycle.update(make_config(), paths, registry)
    assert after["promoted"], after["refusal"]
    champion, total = check_account(paths, registry)
    served = matured(paths, registry.get(champion).schema.columns, "d", 2.0)
    judging = np.arange(len(served.rows)) >= len(served.rows) - after["rows_holdout"]
    assert total == int((served.told & ~judging).sum())
    missing = set(served.prediction_ids.tolist()) - set(Ledger(paths.updates).counted(champion))
    assert missing == set(served.prediction_ids[judging].tolist())

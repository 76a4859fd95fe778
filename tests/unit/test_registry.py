"""The registry against a real SQLite MLflow store, with a small linear model in place of the backbone."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import threading
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

import deepseek_ray.models as models
from deepseek_ray.config import StoreConfig
from deepseek_ray.data.evidence import GATES, Check, GateDecision
from deepseek_ray.errors import (
    DataError,
    GateRefusedError,
    ModelFormatError,
    ProtectedVersionError,
    RegistryError,
    RegistryUnavailableError,
)
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import (
    InputSchema,
    Lineage,
    Probes,
    Registry,
    Tracking,
    TrafficBook,
    VersionInfo,
    git_commit,
    load_package,
)
from deepseek_ray.registry.audit import Audit, AuditEntry
from deepseek_ray.registry.package import Floats
from deepseek_ray.registry.tracking import _sqlite_problem
from deepseek_ray.registry.traffic import Words

SCHEMA = InputSchema(
    columns=("amount", "count_1d"),
    sequence_len=3,
    sequence_channels=2,
    feature_service="risk_default_v1",
    feature_digest="f" * 64,
)
LINEAGE = Lineage(data_digest="d" * 64, git_commit="c" * 40, train_start="2026-01-01", train_end="2026-02-28")


class Linear:
    """sigmoid(features @ w + mean of the sequence)."""

    def __init__(self, weight: Floats) -> None:
        self.weight = weight

    def predict_proba(self, features: Floats, sequence: Floats) -> Floats:
        return np.asarray(1 / (1 + np.exp(-(features @ self.weight + sequence.mean(axis=(1, 2))))))


def load_linear(path: Path) -> Linear:
    return Linear(load_file(path / "model.safetensors")["weight"])


@pytest.fixture(autouse=True)
def linear_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", load_linear, raising=False)


@pytest.fixture
def paths(tmp_path: Path, mlflow_template: Path) -> RunPaths:
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    return RunPaths(tmp_path)


@pytest.fixture
def registry(paths: RunPaths) -> Registry:
    return Registry.open(paths)


def save_linear(folder: Path, *weight: float) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "linear"}))
    save_file({"weight": np.array(weight)}, folder / "model.safetensors")
    return folder


def make_probes(weight: Floats) -> Probes:
    features, sequence = np.arange(8.0).reshape(4, 2) / 8, np.ones((4, 3, 2))
    return Probes(features=features, sequence=sequence, expected=Linear(weight).predict_proba(features, sequence))


def add_version(registry: Registry, folder: Path, *weight: float) -> VersionInfo:
    model_dir = save_linear(folder, *weight)
    with registry.tracking.start_run("train") as run:
        return registry.register(model_dir, run.run_id, SCHEMA, LINEAGE, probes=make_probes(np.array(weight)))


def decision(version: str, champion: str | None, *failing: str) -> GateDecision:
    checks = tuple(Check(name, name not in failing, 0.5, 0.4, "test") for name in GATES)
    return GateDecision(name="risk", version=version, champion_version=champion, checks=checks)


@pytest.fixture
def two(registry: Registry, tmp_path: Path) -> Registry:
    """Version 1 is champion, version 2 is challenger."""
    add_version(registry, tmp_path / "a", 1.0, 2.0)
    registry.promote("1", decision("1", None))
    add_version(registry, tmp_path / "b", 3.0, 4.0)
    return registry


def test_run_keeps_params_metrics_tags_and_files(registry: Registry) -> None:
    with registry.tracking.start_run("train", tags={"k": "v"}) as run:
        run.log_params({"train": {"lr": 0.1}, "seed": 3})
        run.log_metrics({"average_precision": 0.7}, step=2)
        run.log_dict({"a": 1}, "facts.json")
    again = registry.tracking.run(run.run_id)
    assert again.params == {"train.lr": "0.1", "seed": "3"}
    assert again.metrics == {"average_precision": 0.7}
    assert (again.tags["k"], again.tags["git_commit"]) == ("v", git_commit())
    assert Path(again.artifact_uri.removeprefix("file://"), "facts.json").exists()


def test_run_that_raises_is_marked_failed(registry: Registry) -> None:
    with pytest.raises(KeyError), registry.tracking.start_run("train") as run:
        raise KeyError("x")
    with registry.tracking.guard() as client:
        assert client.get_run(run.run_id).info.status == "FAILED"


def test_a_store_that_fails_does_not_hide_the_first_error(registry: Registry) -> None:
    def train() -> None:
        with registry.tracking.start_run("train"):
            os.remove(registry.tracking.paths.root / "mlflow.db")
            raise KeyError("the real fault")

    with pytest.raises(KeyError, match="the real fault"):
        train()


def test_figures_are_kept(registry: Registry) -> None:
    figure = Figure()
    figure.add_subplot().plot([0, 1], [1, 0])
    with registry.tracking.start_run("train") as run:
        run.log_figure(figure, "curves/pr.png")
    assert Path(run.artifact_uri.removeprefix("file://"), "curves", "pr.png").read_bytes()[:4] == b"\x89PNG"


def test_a_version_in_a_remote_store_is_fetched_once(registry: Registry, tmp_path: Path) -> None:
    info = add_version(registry, tmp_path / "a", 1.0, 2.0)
    target = tmp_path / "cache" / "risk" / "1"
    for _ in range(2):
        registry._download(info.path.parents[1].as_uri(), target)
    assert load_package(target / "data" / "version").schema == SCHEMA
    assert list(target.parent.iterdir()) == [target]


def test_register_points_challenger_and_keeps_lineage(registry: Registry, tmp_path: Path) -> None:
    info = add_version(registry, tmp_path / "a", 1.0, 2.0)
    assert (info.version, info.aliases, info.schema) == ("1", ("challenger",), SCHEMA)
    lineage = registry.lineage("challenger")
    assert (lineage.data_digest, lineage.git_commit, lineage.run_id) == ("d" * 64, "c" * 40, info.run_id)
    assert (lineage.feature_service, lineage.feature_digest) == ("risk_default_v1", "f" * 64)
    assert (lineage.train_start, lineage.train_end) == ("2026-01-01", "2026-02-28")


def test_register_refuses_a_pickle(registry: Registry, tmp_path: Path) -> None:
    folder = save_linear(tmp_path / "a", 1.0, 2.0)
    (folder / "extra.pkl").write_bytes(b"x")
    with pytest.raises(ModelFormatError, match=r"extra\.pkl"):
        registry.register(folder, "none", SCHEMA, LINEAGE)


def test_register_refuses_wrong_probes(registry: Registry, tmp_path: Path) -> None:
    folder = save_linear(tmp_path / "a", 1.0, 2.0)
    with pytest.raises(ModelFormatError, match="away from the stored probability"):
        registry.register(folder, "none", SCHEMA, LINEAGE, probes=make_probes(np.array([1.0, 2.1])))


def test_promote_moves_champion_to_previous(two: Registry) -> None:
    info = two.promote("challenger", decision("2", "1"))
    assert info.aliases == ("champion",)
    assert two.aliases() == {"champion": "2", "previous": "1"}
    assert info.tags["validated"] == "true"
    assert json.loads(info.tags["gate.decision"])["promote"] is True
    assert info.tags["gate.average_precision"].startswith("passed")


def test_a_refused_offer_is_kept_with_its_numbers(registry: Registry, tmp_path: Path) -> None:
    info = add_version(registry, tmp_path / "m1", 1.0, -1.0)
    checks = (Check("p99_scoring_ms", False, 40.0, 20.0, "must be at most the bound"),)
    decision = GateDecision(name="risk", version=info.version, champion_version=None, checks=checks)
    assert "p99_scoring_ms = 40 (bound 20)" in registry.offer(info.version, decision)
    (entry,) = registry.history()
    assert (entry.action, entry.champion_after) == ("refuse", None)
    assert registry.get(info.version).tags["gate.decision"] == decision.to_json()


def test_a_password_in_a_setting_is_not_logged(paths: RunPaths) -> None:
    tracking = Tracking.open(paths)
    with tracking.start_run("train") as run:
        run.log_params({"stores": {"tracking_uri": "postgresql+psycopg://me:secret@db:5432/mlflow"}})
    assert run.params == {"stores.tracking_uri": "postgresql+psycopg://db:5432/mlflow"}
    assert tracking.shown_uri == tracking.uri


def test_promote_takes_only_gate_decisions(two: Registry) -> None:
    with pytest.raises(TypeError, match="GateDecision"):
        two.promote("2", True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (decision("2", "1", "forgetting", "schema"), "schema.*forgetting"),
        (decision("1", "1"), "about version 1"),
        (replace(decision("2", "1"), name="other"), "of 'other'"),
        (decision("2", None), "the champion is 1"),
        (replace(decision("2", "1"), checks=()), "not checked"),
    ],
)
def test_promote_refuses(two: Registry, verdict: GateDecision, reason: str) -> None:
    with pytest.raises(GateRefusedError, match=reason):
        two.promote("2", verdict)
    assert two.aliases() == {"champion": "1", "challenger": "2"}
    last = two.history()[-1]
    assert (last.action, last.version, last.champion_after) == ("refuse", "2", "1")


def test_champion_is_not_promoted_again(two: Registry) -> None:
    with pytest.raises(GateRefusedError, match="champion already"):
        two.promote("1", decision("1", "1"))


def test_altered_weights_are_not_promoted(two: Registry) -> None:
    save_file({"weight": np.array([9.0, 9.0])}, two.get("2").path / "model.safetensors")
    with pytest.raises(ModelFormatError, match="SHA-256"):
        two.promote("2", decision("2", "1"))
    assert two.version_of("champion") == "1"


def test_rollback_restores_previous_then_the_one_before(two: Registry, tmp_path: Path) -> None:
    two.promote("2", decision("2", "1"))
    add_version(two, tmp_path / "c", 5.0, 6.0)
    two.promote("3", decision("3", "2"))
    assert two.rollback("alarm").version == "2"
    assert two.aliases() == {"champion": "2", "previous": "1"}
    assert two.rollback().version == "1"
    assert two.aliases() == {"champion": "1"}
    with pytest.raises(RegistryError, match="no previous version"):
        two.rollback()
    assert [entry.action for entry in two.history()] == ["promote"] * 3 + ["rollback"] * 2
    assert two.history()[3].note == "alarm"


def test_rollback_loads_before_it_moves(two: Registry) -> None:
    two.promote("2", decision("2", "1"))
    (two.get("1").path / "model.safetensors").unlink()
    with pytest.raises(ModelFormatError, match="is missing"):
        two.rollback()
    assert two.aliases() == {"champion": "2", "previous": "1"}
    assert two.history()[-1].action == "promote"


def test_version_behind_an_alias_cannot_be_deleted(two: Registry, tmp_path: Path) -> None:
    for version, alias in (("1", "champion"), ("challenger", "challenger")):
        with pytest.raises(ProtectedVersionError, match=alias):
            two.delete_version(version)
    add_version(two, tmp_path / "c", 5.0, 6.0)
    two.delete_version("2")
    assert two.versions() == ["1", "3"]
    assert two.history()[-1].action == "delete"


def test_unknown_version_and_alias(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="no version or alias 'champion'"):
        registry.get("champion")
    for number in ("7", "99999999999999999999"):
        with pytest.raises(RegistryError, match=f"'risk' has no version {number}; it has none") as caught:
            registry.get(number)
        assert "RESOURCE_DOES_NOT_EXIST" not in str(caught.value)


def test_an_unknown_version_is_told_which_there_are(two: Registry) -> None:
    with pytest.raises(RegistryError, match=r"it has 1, 2\. Fix: name one of these"):
        two.get("9")


def test_pyfunc_scores_like_the_model(two: Registry) -> None:
    import mlflow

    mlflow.set_tracking_uri(two.tracking.uri)
    loaded = mlflow.pyfunc.load_model("models:/risk@champion")
    probes = make_probes(np.array([1.0, 2.0]))
    frame = pd.DataFrame(probes.features, columns=list(SCHEMA.columns))
    frame["sequence"] = list(probes.sequence.tolist())
    np.testing.assert_allclose(loaded.predict(frame), probes.expected, atol=1e-12)


def test_pyfunc_pads_short_sequences_and_refuses_nan(two: Registry) -> None:
    import mlflow

    mlflow.set_tracking_uri(two.tracking.uri)
    loaded = mlflow.pyfunc.load_model("models:/risk/1")
    frame = pd.DataFrame([[0.0, 0.0], [0.0, 0.0]], columns=list(SCHEMA.columns))
    empty = loaded.predict(frame)
    np.testing.assert_allclose(empty, 1 / (1 + np.exp(0.5)))
    frame["sequence"] = [[[6.0, 5.0]], []]
    np.testing.assert_allclose(loaded.predict(frame), [1 / (1 + np.exp(-1.5)), empty[1]])
    frame.loc[0, "amount"] = np.nan
    with pytest.raises(DataError, match="NaN"):
        loaded.predict(frame)


def test_missing_database_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(RegistryUnavailableError, match=r"does not exist.*train a model first"):
        Registry.open(RunPaths(tmp_path / "nothing"), create=False)


def test_database_removed_while_open(two: Registry) -> None:
    os.remove(two.tracking.paths.root / "mlflow.db")
    with pytest.raises(RegistryUnavailableError, match="does not exist"):
        two.get("champion")


def test_corrupt_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(RegistryUnavailableError, match="cannot be read"):
        Registry.open(RunPaths(tmp_path))


def test_locked_database_is_reported_in_bounded_time(two: Registry) -> None:
    two.tracking.timeout_s = 0.2
    holder = sqlite3.connect(two.tracking.paths.root / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(RegistryUnavailableError, match=r"locked for 0\.2 s.*Fix: end the process"):
            two.tracking.create_run("train")
        assert two.version_of("champion") == "1"  # readers are not held up
    finally:
        holder.close()


def test_locked_audit_table_stops_a_promotion(two: Registry) -> None:
    two.audit.timeout_s = 0.2
    holder = sqlite3.connect(two.audit.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(RegistryUnavailableError, match="audit table"):
            two.promote("2", decision("2", "1"))
    finally:
        holder.close()
    assert two.version_of("champion") == "1"


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        ("attempt to write a readonly database", r"cannot be written.*make its folder writable"),
        ("database is locked", r"stayed locked for 3 s.*end the process"),
        ("database disk image is malformed", r"cannot be read.*restore it"),
    ],
)
def test_sqlite_problems_name_their_fix(cause: str, told: str) -> None:
    assert re.search(told, str(_sqlite_problem(Path("mlflow.db"), 3, sqlite3.OperationalError(cause))))


def test_unwritable_folder() -> None:
    with pytest.raises(RegistryUnavailableError, match="cannot be written"):
        Registry.open(RunPaths(Path("/proc/deepseek-ray-test")))


def test_server_that_does_not_answer(tmp_path: Path) -> None:
    stores = StoreConfig(tracking_uri="http://user:secret@127.0.0.1:9")
    with pytest.raises(RegistryUnavailableError, match="does not answer") as caught:
        Tracking.open(RunPaths(tmp_path), stores, timeout_s=0.5)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["mlruns", "sqlite:///mlflow.db"])
def test_uris_that_depend_on_the_working_folder_are_refused(tmp_path: Path, uri: str) -> None:
    with pytest.raises(RegistryUnavailableError, match=r"stores\.tracking_uri"):
        Tracking.open(RunPaths(tmp_path), StoreConfig(tracking_uri=uri))


def test_first_touch_by_several_threads(tmp_path: Path, paths: RunPaths) -> None:
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.append(Tracking.open(paths, experiment="new").experiment_id))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert ids == ids[:1] * 3


def test_audit_table_is_append_only(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.db", timeout_s=1)
    with audit.transaction() as table:
        table.append(AuditEntry(name="risk", action="promote", version="1", champion_before=None, champion_after="1"))
    with sqlite3.connect(tmp_path / "audit.db") as connection:
        for statement in ("DELETE FROM audit", "UPDATE audit SET version = '2'"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                connection.execute(statement)
    connection.close()
    assert audit.entries("risk")[0].version == "1"
    assert audit.entries("other") == []


def test_audit_row_is_dropped_when_the_move_fails(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.db", timeout_s=1)
    entry = AuditEntry(name="risk", action="promote", version="1", champion_before=None, champion_after="1")

    def move() -> None:
        with audit.transaction() as table:
            table.append(entry)
            raise RuntimeError("alias did not move")

    with pytest.raises(RuntimeError):
        move()
    assert audit.entries("risk") == []


def move(book: TrafficBook, before: str, after: str, action: str = "set") -> None:
    book.move(
        before, after, action=action, who="ann", why="to try it", summary=f"{before or 'none'} -> {after or 'none'}"
    )


def test_traffic_moves_one_at_a_time_and_each_leaves_a_line(two: Registry) -> None:
    book = TrafficBook(two)
    assert (book.read(), book.moves()) == ("", [])
    move(book, "", "a")
    with pytest.raises(RegistryError, match="moved by somebody else"):
        move(book, "", "b")
    assert two.standing().traffic == "a"
    move(book, "a", "", "clear")
    assert (book.read(), [m.summary for m in book.moves()]) == ("", ["none -> a", "a -> none"])
    assert [(m.who, m.why, m.action) for m in book.moves()] == [("ann", "to try it", a) for a in ("set", "clear")]
    with pytest.raises(RegistryError, match="5001 characters"):
        move(book, "", "x" * 5_001)
    with two.audit.transaction() as audit, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        audit.connection.execute("UPDATE traffic SET who = 'nobody'")


def test_a_champion_whose_line_was_lost_gets_it_later_and_rollback_knows_it(
    two: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book, words = TrafficBook(two), Words("promote", "the service", "", "canary -> champion")
    move(book, "", "a")
    with monkeypatch.context() as patch:
        patch.setattr(book, "_write", Mock(side_effect=RegistryUnavailableError("MLflow is locked.", fix="wait")))
        with pytest.raises(RegistryUnavailableError):
            book.crown("a", "b", "2", decision("2", "1"), words)
    assert (two.version_of("champion"), [entry.version for entry in two.history()]) == ("2", ["1"])
    assert book.crown("a", "b", "2", decision("2", "1"), words) == ""
    assert [(entry.version, entry.champion_before) for entry in two.history()] == [("1", None), ("2", "1")]
    add_version(two, tmp_path / "third", 3.0, 1.0)
    two.promote("3", decision("3", "2"))
    assert [two.rollback().version for _ in range(2)] == ["2", "1"]


def test_the_canary_alias_is_set_only_to_a_version_that_loads(two: Registry) -> None:
    book = TrafficBook(two)
    assert "canary" in book.point("canary", "2", who="ann", why="").aliases
    book.point("canary", "2", who="ann", why="")
    (two.get("1").path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelFormatError, match="SHA-256"):
        book.point("canary", "1", who="ann", why="")
    with pytest.raises(RegistryError, match="'champion' is not set by hand"):
        book.point("champion", "2", who="ann", why="")
    assert [m.summary for m in book.moves()] == ["canary: version - -> 2"]
    with pytest.raises(ProtectedVersionError, match="canary"):
        two.delete_version("2")

"""The settings of a run: kept when it is made, used by every later program, contradicted by none."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from deepseek_ray import cli, commands, settings
from deepseek_ray.config import build_config, known_keys
from deepseek_ray.errors import ConfigError, DataError, EnvironmentProblemError, IngestError
from deepseek_ray.paths import RunPaths
from deepseek_ray.presets import load_preset
from deepseek_ray.settings import resolve, store, stored

PROGRAMS = [f"pipelines.risk.{name}" for name in ("train", "tune", "warm", "replay", "update", "review", "report")]
VERBS = [["explain", "p1"], ["verify", "features"], ["registry", "history"], ["registry", "rollback"], ["compact"]]


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run that was made with the debug preset and a short label delay."""
    paths = RunPaths(tmp_path / "runs" / "mine").create()
    store(paths, load_preset("debug", overrides=["data.label_delay_days=2", "model_name=cards", "seed=4"]))
    return paths


def serve(paths: RunPaths) -> None:
    paths.prediction_log.touch()


def warm(paths: RunPaths) -> None:
    paths.warmed.mkdir(parents=True)


def ingest(*arguments: str) -> int:
    status: int = importlib.import_module("pipelines.risk.ingest").main(list(arguments))
    return status


def test_settings_come_back_as_they_were_stored(paths: RunPaths) -> None:
    config = load_preset("handbook", overrides=["train.lr=1e-5", "data.drift_start_day=3", "features.vector=wide"])
    store(paths, config)
    assert stored(paths) == config
    assert [file.name for file in paths.root.iterdir()] == ["settings.yaml"]


def test_a_run_without_settings_starts_from_the_demo(tmp_path: Path) -> None:
    assert resolve(RunPaths(tmp_path), "use") == load_preset("demo")


def test_a_later_program_starts_from_the_settings_of_its_run(paths: RunPaths) -> None:
    config = resolve(paths, "use", overrides=["train.lr=0.5"])
    assert (config.data.train_days, config.data.label_delay_days, config.model_name) == (14, 2.0, "cards")
    assert (config.model.d_model, config.train.lr) == (16, 0.5)


def test_a_preset_or_a_file_begins_afresh_but_for_the_table(paths: RunPaths, tmp_path: Path) -> None:
    file = tmp_path / "more.yaml"
    file.write_text("train: {lr: 0.25}\n")
    config = resolve(paths, "use", preset="debug", file=file)
    assert (config.model_name, config.train.lr, config.data.label_delay_days) == ("risk", 0.25, 2.0)


@pytest.mark.parametrize(
    ("name", "value", "before"),
    [
        ("data.label_delay_days", 7.0, 2.0),
        ("data.replay_days", 6, 5),
        ("data.drift", "new-device", "none"),
        ("features.vector", "wide", "default"),
        ("features.sequence_len", 8, 16),
    ],
)
def test_what_data_and_features_were_made_with_is_not_contradicted(
    paths: RunPaths, name: str, value: Any, before: Any
) -> None:
    with pytest.raises(ConfigError, match=rf"'{name}' = {value!r}.*made with {before!r}.*Fix: leave it out, or "):
        resolve(paths, "use", overrides=[f"{name}={value}"])


def test_a_preset_of_other_days_is_refused(paths: RunPaths) -> None:
    with pytest.raises(ConfigError, match=r"'data.train_days' = 60.*made with 14.*train again with it"):
        resolve(paths, "use", preset="demo")


def test_training_may_set_days_and_features_anew_but_not_the_table(paths: RunPaths) -> None:
    changed = resolve(paths, "train", overrides=["data.train_days=10", "features.vector=wide"])
    assert (changed.data.train_days, changed.features.vector) == (10, "wide")
    with pytest.raises(ConfigError, match=r"'data.label_delay_days' = 3.0.*ingest into a new --run"):
        resolve(paths, "train", overrides=["data.label_delay_days=3"])


@pytest.mark.parametrize("use", [warm, serve])
@pytest.mark.parametrize("change", ["data.train_days=10", "features.vector=wide"])
def test_a_run_in_use_keeps_them_in_training_too(paths: RunPaths, use: Any, change: str) -> None:
    use(paths)
    with pytest.raises(ConfigError, match="ingest into a new --run"):
        resolve(paths, "train", overrides=[change])


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "it lacks"), ("seed: 3\n", "it lacks"), ("seed: [", "cannot be read"), ("- 1\n", "holds a list")],
)
def test_a_broken_file_is_an_error_whatever_is_asked(paths: RunPaths, content: str, says: str) -> None:
    paths.settings.write_text(content)
    with pytest.raises(ConfigError, match=f"settings.yaml.*{says}"):
        resolve(paths, "use", preset="debug")


def test_a_run_made_before_a_setting_existed_has_its_default(paths: RunPaths) -> None:
    lines = paths.settings.read_text().splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if line.startswith("  max_batch_size:"))
    count = int(lines[-1].split()[3])
    older = [*lines[:at], *lines[at + 1 : -1]]
    paths.settings.write_text("".join([*older, f"# end of {count - 1} settings\n"]))
    assert resolve(paths, "use").serving.max_batch_size == build_config().serving.max_batch_size
    paths.settings.write_text("".join([*older, lines[-1]]))
    with pytest.raises(ConfigError, match=r"it lacks serving\.max_batch_size"):
        resolve(paths, "use")


def test_a_file_cut_short_is_an_error(paths: RunPaths) -> None:
    lines = paths.settings.read_text().splitlines(keepends=True)
    assert len(lines) > len(known_keys())
    for kept in range(len(lines) - 1):  # the last line only says that this is all
        paths.settings.write_text("".join(lines[:kept]))
        with pytest.raises(ConfigError, match="cannot be used"):
            stored(paths)


def test_an_unknown_or_wrong_setting_in_the_file_is_an_error(paths: RunPaths) -> None:
    good = paths.settings.read_text()
    for bad in (good.replace("seed:", "sead:"), good.replace("train_days: 14", "train_days: -1")):
        paths.settings.write_text(bad)
        with pytest.raises(ConfigError, match=r"settings.yaml"):
            stored(paths)


def test_no_password_is_stored(paths: RunPaths) -> None:
    store(paths, load_preset("debug", overrides=["stores.tracking_uri=postgresql+psycopg://me:secret@db:5432/mlflow"]))
    assert "secret" not in paths.settings.read_text()
    assert resolve(paths, "use").stores.tracking_uri == "postgresql+psycopg://me@db:5432/mlflow"


def test_the_arguments_for_another_program_hold_only_what_was_said(tmp_path: Path) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    cli.add_settings(parser)
    assert cli.settings_arguments(parser.parse_args(["--run", str(tmp_path)])) == []
    said = ["--preset=debug", f"--config={tmp_path}", "--set=seed=3"]
    assert cli.settings_arguments(parser.parse_args(said)) == said


def near(tmp_path: Path) -> Path:
    """A mistyped name beside two runs."""
    for name in ("mine", "yesterday"):
        RunPaths(tmp_path / "runs" / name).create().transactions.touch()
    return tmp_path / "runs" / "mien"


@pytest.mark.parametrize("module", [*PROGRAMS, "serve_apps.risk"])
def test_no_program_makes_a_run_out_of_a_mistyped_name(module: str, tmp_path: Path) -> None:
    wrong = near(tmp_path)
    with pytest.raises(EnvironmentProblemError, match=rf"mien.*does not exist.*mine, yest.*ingest .*--run {wrong}"):
        importlib.import_module(module).main(["--run", str(wrong)])
    assert not wrong.exists()


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_makes_a_run_out_of_a_mistyped_name(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = near(tmp_path)
    assert cli.main([*verb, "--run", str(wrong)]) == 2
    assert "mien' does not exist. Runs with a near name: mine, yesterday." in capsys.readouterr().err
    assert not wrong.exists()


def test_training_without_transactions_says_how_to_bring_them(paths: RunPaths) -> None:
    train = importlib.import_module("pipelines.risk.train")
    with pytest.raises(DataError, match=rf"no transactions table.*deepseek-ray ingest --synthetic --run {paths.root}"):
        train.main(["--run", str(paths.root)])
    assert [file.name for file in paths.root.iterdir()] == ["settings.yaml"]


def test_ingest_keeps_the_settings_of_what_it_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = RunPaths(tmp_path / "run")
    assert ingest("--synthetic", "--preset", "debug", "--set", "seed=3", "--run", str(paths.root)) == 0
    assert stored(paths) == load_preset("debug", overrides=["seed=3"])
    assert capsys.readouterr().out.splitlines()[-1] == f"Next: deepseek-ray train --run {paths.root}"
    file = tmp_path / "payments.csv"
    file.write_text("transaction_id,event_time,card_id,terminal_id,amount\nt1,2026-01-01T10:00:00Z,c1,s1,3.50\n")
    assert ingest(str(file), "--set", "data.label_delay_days=1", "--run", str(paths.root)) == 0
    again = stored(paths)
    assert again is not None
    assert (again.seed, again.data.source, again.data.label_delay_days) == (3, str(file), 1.0)
    assert (paths.results / "data.json").exists()


@pytest.mark.parametrize(("use", "how"), [(warm, "warmed"), (serve, "served")])
def test_ingest_leaves_a_run_in_use_as_it_is(paths: RunPaths, use: Any, how: str) -> None:
    use(paths)
    with pytest.raises(IngestError, match=rf"has been {how} already.*give a new folder, --run"):
        ingest("--synthetic", "--preset", "debug", "--run", str(paths.root))
    assert not paths.transactions.exists()


def test_the_verbs_ask_with_the_settings_of_the_run(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Found:
        num_differences, rows, features, other_vectors = 0, 1, 2, 0

    monkeypatch.setattr("deepseek_ray.data.verify.verify_run", lambda *args, **more: asked.update(more) or Found)
    assert cli.main(["verify", "features", "--run", str(paths.root)]) == 0
    assert (asked["label_delay_days"], asked["sequence_len"]) == (2.0, 16)
    monkeypatch.setattr(commands.Registry, "open", lambda *args, **more: asked.update(more))
    with pytest.raises(AttributeError):
        cli.main(["registry", "history", "--run", str(paths.root)])
    assert asked["name"] == "cards"


def test_settings_may_be_changed_only_where_they_are_named() -> None:
    named = {*settings.TABLE, *settings.DAYS, *settings.FEATURES}
    assert named == {name for name in known_keys() if name.startswith(("data.", "features."))}


@pytest.mark.parametrize("warmed", [False, True])
def test_a_demo_that_was_interrupted_after_warming_keeps_its_table(
    paths: RunPaths, warmed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = importlib.import_module("pipelines.risk.demo")
    started: list[str] = []

    def note(stages: Any, module: str, *arguments: str) -> None:
        started.append(module.rpartition(".")[2])
        if started[-1] == "train":
            raise InterruptedError

    monkeypatch.setattr(demo.Stages, "run", note)
    if warmed:
        warm(paths)
        with pytest.raises(ConfigError, match="'seed' = 5, but the run"):
            demo.main(["--run", str(paths.root), "--seed", "5"])
    with pytest.raises(InterruptedError):
        demo.main(["--run", str(paths.root), "--seed", "4"])
    assert started == (["train"] if warmed else ["ingest", "train"])

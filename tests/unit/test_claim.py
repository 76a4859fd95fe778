"""A folder of checkpoints belongs to one training at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek_ray.errors import ConfigError, EnvironmentProblemError
from deepseek_ray.train.claim import SETTINGS, claimed
from deepseek_ray.train.pretrain_trainer import read_progress

BEFORE = {"seed": 0, "step": {"lr": 0.1, "steps": 3}}


def test_the_same_settings_come_back_in_and_others_are_named(tmp_path: Path) -> None:
    for _ in range(2):
        with claimed(tmp_path, BEFORE):
            pass
    with (
        pytest.raises(ConfigError, match=r"step\.lr = 0\.1, not 0\.2.*another --run"),
        claimed(tmp_path, {"seed": 0, "step": {"lr": 0.2, "steps": 3}}),
    ):
        pass
    assert json.loads((tmp_path / SETTINGS).read_text()) == BEFORE


def test_two_programs_do_not_share_it(tmp_path: Path) -> None:
    refused = pytest.raises(EnvironmentProblemError, match="Another program trains")
    with claimed(tmp_path, BEFORE), refused, claimed(tmp_path, BEFORE):
        pass
    with claimed(tmp_path, BEFORE):
        pass


def test_broken_settings_are_no_settings(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text('{"seed":')
    with pytest.raises(ConfigError, match="is broken"), claimed(tmp_path, BEFORE):
        pass


def test_half_a_line_of_progress_is_none(tmp_path: Path) -> None:
    file = tmp_path / "progress.jsonl"
    file.write_text('{"step": 0, "loss": 3.0}\n{"step": 1, "lo\n{"step": 1, "loss": 2.0}\n{"step": 2, "loss"')
    assert {step: line["loss"] for step, line in read_progress(file).items()} == {0: 3.0, 1: 2.0}

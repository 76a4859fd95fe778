"""Preparing the states of another vector: which contracts may take turns, one at a time, ended on demand."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from deepseek_ray.data import windows
from deepseek_ray.errors import EnvironmentProblemError, FeatureError, ServingError
from deepseek_ray.paths import RunPaths, exclusive
from deepseek_ray.serving.champion import InputContract
from deepseek_ray.serving.handover import Wanted, check, prepare, prepare_aside

DECLARATION = windows.load()
WANTED = Wanted(vector="wide", sequence_len=4, label_delay_days=1.0, before="risk_default_v1", online_store="")


def contract(vector: str, sequence_len: int = 4, label_delay_days: float = 1.0) -> InputContract:
    return InputContract(DECLARATION.vector(vector), sequence_len, label_delay_days)


def test_other_vectors_and_sequences_may_take_over_but_not_another_delay_on_the_same_states() -> None:
    before = contract("default")
    check(before, contract("wide", label_delay_days=7.0))
    check(before, contract("default", sequence_len=9))
    with pytest.raises(FeatureError, match="after 1 days, not 7"):
        check(before, contract("default", label_delay_days=7.0))


def test_one_process_prepares_at_a_time(tmp_path: Path) -> None:
    folder = RunPaths(tmp_path).last_good.parent
    folder.mkdir()
    with exclusive(folder, "held", "wait"), pytest.raises(EnvironmentProblemError, match="by another process"):
        prepare(RunPaths(tmp_path), WANTED)


def test_a_preparation_that_fails_or_is_ended_says_so(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    start = time.perf_counter()
    with pytest.raises(ServingError, match=r"'wide' could not be prepared \(status -15\)"):
        prepare_aside(RunPaths(tmp_path), WANTED, stop)
    assert time.perf_counter() - start < 20

"""When the updater starts an update: facts in, a decision out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deepseek_ray.config import UpdaterConfig, build_config
from deepseek_ray.errors import ConfigError
from deepseek_ray.online.triggers import Attempt, Facts, Outcome, decide, not_before

CONFIG = UpdaterConfig(
    min_new_labels=100, drift_psi=0.25, drift_labels=10, every_s=1_000.0, min_gap_s=50.0, retry_s=10.0, retry_max_s=60.0
)


def facts(waiting: int, now_s: float = 500.0, psi: float | None = None, last: Attempt | None = None) -> Facts:
    settled = last is not None and last.outcome != "failed"
    return Facts(now_s=now_s, since_s=400.0 if settled else 0.0, waiting=waiting, psi=psi, last=last)


def after(outcome: Outcome, waiting: int = 0, failures: int = 0) -> Attempt:
    return Attempt(at_s=400.0, outcome=outcome, waiting=waiting, failures=failures)


@pytest.mark.parametrize(
    ("given", "start", "reason"),
    [
        (facts(99), False, "99 new labels"),
        (facts(100), True, "labels: 100 >= 100"),
        (facts(10, psi=0.3), True, "drift: 0.300 >= 0.25"),
        (facts(9, psi=0.3), False, "9 new labels"),
        (facts(1, psi=0.2), False, "1 new labels"),
        (facts(0, psi=0.9), False, "no new label"),
        (facts(1, now_s=1_000.0), True, "schedule: 1000 s >= 1000"),
        (facts(0, now_s=9_000.0), False, "no new label"),
        (facts(500, now_s=449.0, last=after("promoted")), False, "too soon for 1 s more"),
        (facts(500, now_s=450.0, last=after("promoted")), True, "labels: 500 >= 100"),
        (facts(1, now_s=1_399.0, last=after("promoted")), False, "1 new labels"),
        (facts(1, now_s=1_400.0, last=after("promoted")), True, "schedule: 1000 s >= 1000"),
        (facts(100, now_s=409.0, last=after("failed", failures=1)), False, "backing off for 1 s more"),
        (facts(100, now_s=410.0, last=after("failed", failures=1)), True, "labels: 100 >= 100"),
        (facts(1, now_s=1_000.0, last=after("failed", failures=1)), True, "schedule: 1000 s >= 1000"),
    ],
)
def test_each_trigger_starts_an_update_by_itself(given: Facts, start: bool, reason: str) -> None:
    decision = decide(given, CONFIG)
    assert (decision.start, decision.reason) == (start, reason)


def test_labels_that_the_gate_refused_do_not_start_the_same_update_again() -> None:
    refused = after("refused", waiting=150)
    assert not decide(facts(150, last=refused), CONFIG).start
    assert not decide(facts(249, last=refused), CONFIG).start
    again = decide(facts(250, last=refused), CONFIG)
    assert (again.start, again.fresh) == (True, 100)


def test_labels_set_aside_or_another_champion_lift_a_refusal() -> None:
    refused = replace(after("refused", waiting=5_000), basis="version 1, 0 set aside")
    for basis, waiting in (("version 1, 4000 set aside", 1_000 + 2_500), ("version 2, 0 set aside", 5_000)):
        again = decide(replace(facts(waiting, last=refused), basis=basis), CONFIG)
        assert (again.start, again.fresh) == (True, waiting)


def test_the_wait_after_failures_doubles_up_to_its_bound() -> None:
    waits = [not_before(after("failed", failures=count), CONFIG) - 400.0 for count in (1, 2, 3, 4, 2_000)]
    assert waits == [10.0, 20.0, 40.0, 60.0, 60.0]


def test_triggers_at_zero_are_off() -> None:
    off = CONFIG.model_copy(update={"min_new_labels": 0, "drift_psi": 0.0, "every_s": 0.0})
    assert not decide(facts(10**6, now_s=10**9, psi=99.0), off).start


def test_a_bound_below_the_first_wait_is_refused() -> None:
    with pytest.raises(ConfigError, match="retry_max_s"):
        build_config(overrides={"updater.retry_s": 100.0, "updater.retry_max_s": 10.0})

"""deepseek-ray traffic: what it moves, and what it refuses by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepseek_ray import cli, commands, traffic_commands
from deepseek_ray.config import ReleaseConfig
from deepseek_ray.registry import InputSchema
from deepseek_ray.serving.release import start
from deepseek_ray.serving.traffic import TrafficPolicy
from tests.unit.registry_parts import FakeRegistry, model

SCHEMA = InputSchema(columns=("a", "b"), sequence_len=2, sequence_channels=6, feature_service="s", feature_digest="d")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRegistry:
    """Champion 1, challenger 3; 2 to 4 fit, 5 reads another vector."""
    made = FakeRegistry(aliases={"champion": "1", "challenger": "3"})
    net = model(SCHEMA.columns, 2)
    for version in "1234":
        made.add(version, net, SCHEMA)
    made.add("5", net, replace(SCHEMA, feature_digest="e" * 64))
    monkeypatch.setattr(traffic_commands, "open_registry", lambda options: made)
    monkeypatch.setattr(traffic_commands, "TrafficBook", lambda registry: registry)
    monkeypatch.setattr(traffic_commands, "settings_of", commands.settings_of)
    monkeypatch.setenv("DEEPSEEK_RAY_RUN", str(tmp_path))
    return made


def run(*arguments: str) -> int:
    return cli.main(["traffic", *arguments])


def policy(registry: FakeRegistry) -> TrafficPolicy:
    return TrafficPolicy.parse(registry.traffic)


def arms(registry: FakeRegistry) -> list[tuple[str, str, float]]:
    return [(arm.alias, arm.version, arm.percent) for arm in policy(registry).arms]


def test_an_arm_gets_a_share_and_the_history_says_who_and_why(
    registry: FakeRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("set", "canary@2=5", "--note", "first try") == 0
    assert (arms(registry), registry.aliases["canary"]) == ([("canary", "2", 5.0)], "2")
    assert "champion 100 % -> champion 95 %, canary (version 2) 5 %" in capsys.readouterr().out
    [move] = registry.moved
    assert (move.action, move.why, bool(move.who)) == ("set", "first try", True)


def test_only_the_named_arm_changes_and_zero_ends_it(registry: FakeRegistry) -> None:
    run("set", "canary@2=5")
    salt = policy(registry).salt
    run("set", "canary=25%")
    assert policy(registry).salt == salt
    run("set", "challenger=10")
    assert arms(registry) == [("canary", "2", 25.0), ("challenger", "3", 10.0)]
    run("set", "canary=0")
    assert arms(registry) == [("challenger", "3", 10.0)]
    assert policy(registry).revision == 4


def test_a_schedule_gives_the_first_step_and_limits_are_kept(registry: FakeRegistry) -> None:
    run("set", "canary@2", "--schedule", "2,50", "--dwell", "60", "--limit", "max_psi=0.5", "--shadow", "4")
    run("set", "canary=2", "--min-decisions", "10")
    made = policy(registry)
    assert made.schedule is not None
    assert (arms(registry), made.schedule.steps, made.schedule.dwell_s) == ([("canary", "2", 2.0)], (2, 50), 60)
    assert (made.schedule.min_decisions, made.limits.max_psi) == (10, 0.5)
    assert made.shadow is not None
    assert made.shadow.version == registry.aliases["shadow"] == "4"
    run("set", "--shadow", "off")
    assert policy(registry).shadow is None


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "nothing to set"),
        (["canary@2=5", "canary@3=5"], "canary is given twice: 'canary@2=5', 'canary@3=5'"),
        (["canary@2=60", "challenger=50"], "canary=60 and challenger=50 are more than 100 % of the traffic"),
        (["canary@2=101"], "'canary@2=101' gives 101 % of the traffic"),
        (["champion=50"], "'champion=50' names no arm"),
        (["canary@x=5"], "names no arm"),
        (["canary@2"], "gives no percentage"),
        (["canary@2=1.2.3"], "gives no percentage"),
        (["canary=5"], "No version is named 'canary'"),
        (["canary@9=5"], "no version or alias '9'"),
        (["canary@1=5"], "Version 1 is the champion"),
        (["canary@5=5"], "no service computes both"),
        (["challenger@2=5"], "challenger names version 3, not 2"),
        (["canary@2=5", "--dwell", "5"], "belong to a schedule"),
        (["canary@2", "--schedule", "a,b"], "no list of percentages"),
        (["canary@2", "challenger=5", "--schedule", "1,5"], "exactly one arm, not 2"),
        (["canary@2=5", "--limit", "max_psi", "--limit", "alpha=0.1"], "'max_psi' has no value"),
        (["canary@2=5", "--limit", "colour=1"], "'limits.colour' = '1': unknown field"),
        (["canary@2=5", "--limit", "max_psi=high"], "'limits.max_psi' = 'high': not a number"),
        (["canary@2", "--schedule", "5,1"], ": steps must rise, above 0"),
        (["canary@2", "--schedule", "1,5", "--dwell", "-1"], "'schedule.dwell_s' = -1.0: should be greater"),
        (["canary@2=5", "--shadow", "latest"], "'latest' is no version"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_moves(
    registry: FakeRegistry, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    assert run("set", *arguments) == 2
    error = capsys.readouterr().err
    assert why in error
    assert "Value error" not in error
    assert "Fix:" in error or "no version or alias" in error
    assert (registry.traffic, registry.moved, set(registry.aliases)) == ("", [], {"champion", "challenger"})


def test_rollback_gives_all_to_the_champion_and_keeps_the_shadow(registry: FakeRegistry) -> None:
    run("set", "canary@2=5", "challenger=10", "--shadow", "4")
    assert run("rollback", "--note", "complaints") == 0
    assert (arms(registry), registry.moved[-1].action, registry.moved[-1].why) == ([], "rollback", "complaints")
    assert policy(registry).shadow is not None
    assert run("rollback") == 0
    assert len(registry.moved) == 2


def released(registry: FakeRegistry, *, canary: bool = False) -> None:
    made = start(policy(registry), "2", "1", ReleaseConfig())
    registry.traffic = (made.begun() if canary else made).model_dump_json()
    registry.aliases |= {"canary": "2", "shadow": "2"}


def test_a_release_is_shown_and_ended_as_a_whole(registry: FakeRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    released(registry)
    assert run("show") == 0
    assert "release     version 2 is the shadow since" in capsys.readouterr().out
    assert run("rollback", "--note", "complaints") == 0
    assert (policy(registry).release, policy(registry).shadow) == (None, None)
    assert registry.moved[-1].summary == "champion 100 %, shadow (version 2) -> champion 100 %"


def test_by_hand_a_release_is_given_more_or_ended(registry: FakeRegistry) -> None:
    released(registry, canary=True)
    run("set", "canary=25", "--limit", "max_psi=0.5", "--dwell", "60")
    now = policy(registry)
    assert now.release is not None
    assert now.schedule is not None
    assert (now.arms[0].percent, now.limits.max_psi, now.schedule.dwell_s, now.next_percent) == (25.0, 0.5, 60.0, 100.0)
    run("set", "canary@4=25")
    assert policy(registry).release is None
    registry.traffic = ""
    released(registry)
    run("set", "--shadow", "4")
    assert policy(registry).release is None


def test_promote_asks_the_gate_and_then_ends_the_arm(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(traffic_commands, "promote_version", lambda *given: asked.append(given[1]))
    assert run("promote") == 2
    run("set", "canary@2=100")
    assert run("promote", "--note", "healthy at 100 %") == 0
    assert (asked, arms(registry), registry.moved[-1].action) == (["2"], [], "promote")


def test_show_tells_arms_schedule_shadow_and_moves(registry: FakeRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    run("set", "challenger", "--schedule", "5,25", "--shadow", "4", "--note", "why not")
    registry.aliases["challenger"] = "4"
    capsys.readouterr()
    assert run("show") == 0
    shown = capsys.readouterr().out
    for part in (
        "version 1     95 %",
        "no traffic: challenger names version 4 now",
        "5 -> 25 %",
        "0 scored",
        "why not",
    ):
        assert part in shown
    assert run("show", "--json") == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["policy"]["arms"][0]["version"], tree["shadow"]["scored"], len(tree["moves"])) == ("3", 0, 1)

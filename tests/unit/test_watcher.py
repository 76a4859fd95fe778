"""The registry's champion and arms are taken over only if they are whole, fit, and are what the policy names."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepseek_ray.errors import FeatureError, ModelFormatError, ServingError
from deepseek_ray.models import RiskModel
from deepseek_ray.registry import InputSchema, VersionInfo
from deepseek_ray.serving.arm_metrics import ArmMetrics
from deepseek_ray.serving.arms import ArmPlan
from deepseek_ray.serving.champion import InputContract
from deepseek_ray.serving.commands import LiveModel
from deepseek_ray.serving.traffic import Arm, Shadow, TrafficPolicy
from deepseek_ray.serving.watcher import Hooks, RegistryWatcher
from tests.unit.registry_parts import FakeRegistry, model
from tests.unit.serving_parts import Rig, body, event

NAMES = ("amount", "count")
SCHEMA = InputSchema(columns=NAMES, sequence_len=2, sequence_channels=6, feature_service="risk_v1", feature_digest="d1")


class Watched(Rig):
    """A service over stand-ins that follows a stand-in of the registry, with real models."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.registry = FakeRegistry()
        self.made: list[weakref.ref[RiskModel]] = []
        self.gone: frozenset[str] = frozenset()
        self.served: list[str] = []
        self.metrics = ArmMetrics(self.monitor.registry)
        vector: Any = SimpleNamespace(service="risk_v1", digest="d1")
        self.watcher = RegistryWatcher(
            lambda: self.registry,  # type: ignore[arg-type,return-value]
            InputContract(vector, 2, model(NAMES, 2).config.label_delay_days),
            self.predictor,
            Hooks({"3": 0.25}.get, lambda text: self.gone, self._note, lambda *given: self.take_in(*given)),
            monitor=self.monitor,
            metrics=self.metrics,
            poll_s=0.01,
        )

    def take_in(self, info: VersionInfo, net: RiskModel, live: LiveModel) -> InputContract:
        if info.schema.feature_digest != "d2":
            raise FeatureError(f"cannot compute digest {info.schema.feature_digest}", fix="another commit")
        vector: Any = SimpleNamespace(service="risk_v1", digest="d2")
        self.predictor.reroute(lambda plan: ArmPlan(live))
        return InputContract(vector, info.schema.sequence_len, net.config.label_delay_days)

    def _note(self, info: VersionInfo) -> None:
        self.served.append(info.version)

    def add(self, version: str, alias: str = "champion", **changes: Any) -> None:
        schema = replace(SCHEMA, **changes.pop("schema", {}))
        self.registry.add(version, changes.pop("content", lambda: self._make(int(version))), schema, **changes)
        self.registry.aliases[alias] = version

    def _make(self, seed: int) -> RiskModel:
        made = model(NAMES, 2, seed)
        self.made.append(weakref.ref(made))
        return made

    def follow(self, *arms: tuple[str, str, float], shadow: str = "") -> None:
        parts = tuple(Arm(alias=alias, version=version, percent=p) for alias, version, p in arms)  # type: ignore[arg-type]
        policy = TrafficPolicy(arms=parts, shadow=Shadow(version=shadow) if shadow else None, salt="a1")
        self.registry.traffic = policy.model_dump_json()
        self.watcher.check()

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.made)

    @property
    def arms(self) -> dict[str, tuple[str, float]]:
        return {arm.alias: (arm.live.version, arm.percent) for arm in self.predictor.plan.arms}


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    made = Watched(tmp_path)
    made.add("2")
    made.watcher.check()
    yield made
    made.watcher.close()
    made.close()


def test_a_new_champion_is_swapped_in_with_its_threshold(watched: Watched) -> None:
    assert (watched.predictor.live.version, watched.predictor.live.threshold) == ("2", 0.5)
    watched.add("4", threshold="0.125")
    watched.watcher.check()
    assert (watched.predictor.live.version, watched.predictor.live.threshold) == ("4", 0.125)
    watched.add("3", threshold="0.125")
    watched.watcher.check()
    watched.watcher.check()
    assert (watched.predictor.live.threshold, watched.watcher.refused, watched.served) == (0.25, "", ["2", "4", "3"])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"content": ModelFormatError("weights are torn")}, "weights are torn"),
        ({"content": object()}, "holds a object"),
        ({"schema": {"feature_digest": "0" * 64}}, "cannot compute digest 000"),
        ({"threshold": "high"}, "threshold = 'high'"),
    ],
)
def test_a_champion_that_does_not_fit_is_refused_and_the_old_one_serves(
    watched: Watched, changes: dict[str, Any], why: str
) -> None:
    watched.add("5", **changes)
    watched.watcher.check()
    watched.watcher.check()
    assert watched.predictor.live.version == "2"
    assert why in watched.watcher.refused
    shown = watched.monitor.render()
    assert b'model_swaps_total{outcome="refused"} 1.0' in shown
    assert b"deepseek_ray_champion_refused 1.0" in shown
    watched.registry.aliases["champion"] = "2"
    watched.watcher.check()
    assert watched.watcher.refused == ""
    assert b"deepseek_ray_champion_refused 0.0" in watched.monitor.render()


def test_a_champion_of_another_contract_is_handed_over_and_arms_must_follow_it(watched: Watched) -> None:
    watched.add("4", "canary")
    watched.follow(("canary", "4", 50))
    watched.add("5", schema={"feature_digest": "d2", "sequence_len": 2})
    watched.watcher.check()
    assert (watched.predictor.live.version, watched.arms, watched.watcher.refused) == ("5", {}, "")
    assert (
        "reads other features than the champion: feature_digest d1 is not d2" in watched.watcher.arm_refusals["canary"]
    )
    watched.add("6", schema={"feature_digest": "d2"})
    watched.watcher.check()
    assert (watched.predictor.live.version, watched.served) == ("6", ["2", "5", "6"])


def test_a_registry_outage_does_not_stop_the_watcher(watched: Watched) -> None:
    watched.registry.away = True
    watched.add("4")
    watched.watcher.start()
    _wait(lambda: b'model_swaps_total{outcome="failed"}' in watched.monitor.render())
    watched.registry.away = False
    _wait(lambda: watched.predictor.live.version == "4")


def _wait(done: Any) -> None:
    for _ in range(1_000):
        if done():
            return
        asyncio.run(asyncio.sleep(0.01))
    raise AssertionError("not in ten seconds")


def test_an_arm_is_taken_back_while_a_champion_cannot_be_taken_over_yet(watched: Watched, monkeypatch: Any) -> None:
    def away(*_: Any) -> Any:
        raise ServingError("The feature store is away.", fix="it is tried again")

    watched.add("4", "canary")
    watched.follow(("canary", "4", 50))
    watched.add("5", schema={"feature_digest": "d2"})
    monkeypatch.setattr(watched, "take_in", away)
    watched.registry.traffic = ""
    with pytest.raises(ServingError):
        watched.watcher.check()
    assert (watched.predictor.live.version, watched.arms) == ("2", {})


def test_arms_and_shadow_come_and_go_with_the_policy(watched: Watched) -> None:
    watched.add("4", "canary")
    watched.add("5", "challenger")
    watched.add("6", "shadow")
    watched.follow(("canary", "4", 5), ("challenger", "5", 20), shadow="6")
    plan = watched.predictor.plan
    assert watched.arms == {"canary": ("4", 5), "challenger": ("5", 20)}
    assert plan.shadow is not None
    assert b'arm_percent{arm="champion",version="2"} 75.0' in watched.monitor.render()
    watched.follow()
    assert (watched.arms, watched.predictor.plan.shadow, watched.predictor.plan.split) == ({}, None, None)
    del plan
    assert watched.alive == 1


def test_an_alias_that_moved_on_takes_no_traffic(watched: Watched) -> None:
    watched.add("4", "challenger")
    watched.follow(("challenger", "4", 50))
    watched.add("5", "challenger")
    watched.watcher.check()
    assert watched.arms == {}
    assert "challenger names version 5 now, the policy 4" in watched.watcher.arm_refusals["challenger"]
    assert b'arm_refused{arm="challenger",version="4"} 1.0' in watched.monitor.render()


@pytest.mark.parametrize("changes", [{"content": ModelFormatError("torn")}, {"schema": {"sequence_len": 9}}])
def test_an_arm_that_cannot_serve_leaves_its_cards_to_the_champion(watched: Watched, changes: dict[str, Any]) -> None:
    watched.add("4", "canary", **changes)
    watched.follow(("canary", "4", 50))
    watched.watcher.check()
    assert watched.arms == {}
    assert set(watched.watcher.arm_refusals) == {"canary"}


def test_a_policy_that_cannot_be_read_changes_nothing(watched: Watched) -> None:
    watched.add("4", "canary")
    watched.follow(("canary", "4", 50))
    watched.registry.traffic = '{"arms": 3}'
    watched.watcher.check()
    assert watched.arms == {"canary": ("4", 50)}
    assert "arms" in watched.watcher.arm_refusals["policy"]


def test_a_withdrawn_arm_is_not_taken_up_again(watched: Watched) -> None:
    watched.add("4", "canary")
    watched.follow(("canary", "4", 50))
    watched.gone = frozenset({"canary"})
    watched.watcher.check()
    assert watched.arms == {}


def test_an_arm_that_is_withdrawn_while_another_loads_does_not_serve_again(watched: Watched) -> None:
    def withdrawn_meanwhile() -> RiskModel:
        watched.gone = frozenset({"canary"})
        watched.predictor.reroute(lambda plan: plan.without({"canary"}))
        return watched._make(5)

    watched.add("4", "canary")
    watched.follow(("canary", "4", 20))
    watched.add("5", "challenger", content=withdrawn_meanwhile)
    watched.follow(("canary", "4", 20), ("challenger", "5", 20))
    assert watched.arms == {"challenger": ("5", 20)}
    watched.watcher.check()
    assert watched.arms == {"challenger": ("5", 20)}


def test_the_canary_that_becomes_champion_is_not_loaded_again(watched: Watched) -> None:
    watched.add("4", "canary")
    watched.follow(("canary", "4", 100))
    loaded = len(watched.made)
    watched.registry.aliases["champion"] = "4"
    watched.watcher.check()
    assert (watched.predictor.live.version, watched.arms, len(watched.made)) == ("4", {}, loaded)
    assert watched.alive == 1


def test_calls_of_the_last_champion_do_not_count_for_the_next(watched: Watched) -> None:
    watched.add("4", "canary")
    watched.follow(("canary", "4", 50))
    first = watched.predictor.plan.tally
    assert first is not None
    first.failed()
    watched.add("5")
    watched.watcher.check()
    second = watched.predictor.plan.tally
    assert second is not None
    assert (second.version, second.counts().calls) == ("5", 0)


def test_a_threshold_moved_while_the_canary_becomes_champion_is_kept(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.add("4", "canary")
    watched.follow(("canary", "4", 50))
    reroute = watched.predictor.reroute

    def late(change: Callable[[ArmPlan], ArmPlan]) -> None:
        monkeypatch.setattr(watched.predictor, "reroute", reroute)  # once, before the champion changes
        reroute(lambda plan: plan.with_threshold("4", 0.01))
        reroute(change)

    monkeypatch.setattr(watched.predictor, "reroute", late)
    watched.registry.aliases["champion"] = "4"
    watched.watcher.check()
    assert (watched.predictor.live.version, watched.predictor.live.threshold) == ("4", 0.01)


def test_a_threshold_moved_while_the_policy_changes_is_kept(watched: Watched) -> None:
    watched.add("4", "canary")
    watched.follow(("canary", "4", 5))
    watched.predictor.reroute(lambda plan: plan.with_threshold("4", 0.01))
    watched.follow(("canary", "4", 25))
    assert watched.predictor.plan.arms[0].live.threshold == 0.01


def test_twenty_swaps_under_load_fail_no_request_and_leave_one_model(watched: Watched) -> None:
    answered: list[tuple[int, str]] = []

    async def one_client(client: Any, number: int, done: asyncio.Event) -> None:
        count = 0
        while not done.is_set():
            content = body(event(1, transaction_id=f"t{number}-{count}", card=f"c{number}"))
            answer = await client.post("/v1/risk/score", json=content)
            answered.append((answer.status_code, answer.json().get("model_version", "")))
            count += 1

    async def story() -> None:
        done = asyncio.Event()
        async with watched.client() as client:
            clients = [asyncio.create_task(one_client(client, number, done)) for number in range(8)]
            for version in range(10, 30):
                watched.add(str(version))
                await asyncio.to_thread(watched.watcher.check)
                await asyncio.sleep(0.01)
            done.set()
            await asyncio.gather(*clients)

    asyncio.run(story())
    assert {status for status, _ in answered} == {200}
    assert len({version for _, version in answered}) > 10
    assert (answered[-1][1], watched.alive) == ("29", 1)


def test_a_service_that_starts_takes_up_the_arms_before_it_answers(watched: Watched) -> None:
    watched.watcher.every_s = 3_600.0
    watched.add("4", "canary")
    policy = TrafficPolicy(arms=(Arm(alias="canary", version="4", percent=50),), salt="a1")
    watched.registry.traffic = policy.model_dump_json()
    watched.watcher.start()
    assert watched.arms == {"canary": ("4", 50)}


def test_a_registry_that_does_not_answer_delays_a_start_and_does_not_prevent_it(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(watched.watcher, "_turn", answers.wait)
    watched.watcher.start(wait_s=0.05)
    answers.set()
    assert "not read within 0.05 s: the champion answers all" in caplog.text

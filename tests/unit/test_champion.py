"""A new champion is taken over only if it is whole and reads what the service computes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deepseek_ray.config import ModelConfig
from deepseek_ray.data import windows
from deepseek_ray.errors import FeatureError, ModelFormatError, RegistryError
from deepseek_ray.models import RiskModel, RiskModelConfig
from deepseek_ray.registry import InputSchema, VersionInfo
from deepseek_ray.serving.champion import ChampionWatcher, contract_of, load_champion, to_live
from deepseek_ray.serving.commands import LiveModel
from deepseek_ray.serving.monitor import Monitor

DECLARATION = windows.load()
SPEC = DECLARATION.vector("handbook")
SCHEMA = InputSchema(
    columns=SPEC.names, sequence_len=4, sequence_channels=6, feature_service=SPEC.service, feature_digest=SPEC.digest
)


def model() -> RiskModel:
    shape = ModelConfig(d_model=8, num_layers=1, num_heads=1, d_expert=8, num_bins=3)
    net = RiskModel(RiskModelConfig(feature_names=SPEC.names, sequence_len=4, shape=shape)).double().eval()
    rng = np.random.default_rng(0)
    net.prepare(rng.normal(size=(200, len(SPEC.names))).astype(np.float32), (np.arange(200) % 9 == 0).astype(np.int8))
    return net.double()


@dataclass(frozen=True)
class Info(VersionInfo):
    """A version whose files are a model in memory, or an error."""

    content: Any = None

    def load(self) -> Any:
        if isinstance(self.content, Exception):
            raise self.content
        return SimpleNamespace(model=self.content)


@dataclass
class FakeRegistry:
    """Versions by number; ``champion`` is the alias."""

    infos: dict[str, Info] = field(default_factory=dict)
    champion: str | None = None
    name: str = "risk"

    def add(self, version: str, content: Any, schema: InputSchema = SCHEMA, **tags: str) -> None:
        self.infos[version] = Info(
            name="risk", version=version, run_id="r", tags=tags, aliases=(), path=Path(), schema=schema, content=content
        )
        self.champion = version

    def version_of(self, alias: str) -> str | None:
        return self.champion

    def get(self, version: str) -> Info:
        return self.infos[version]


class Rig:
    def __init__(self) -> None:
        self.registry = FakeRegistry()
        self.registry.add("1", model())
        info, loaded = load_champion(self.registry)  # type: ignore[arg-type]
        self.live = to_live(info, loaded, None)
        self.monitor = Monitor()
        self.watcher = ChampionWatcher(
            self.registry,  # type: ignore[arg-type]
            contract_of(info, loaded, DECLARATION),
            live=lambda: self.live,
            swap=self.swap,
            threshold={"3": 0.25}.get,
            monitor=self.monitor,
            poll_s=0.01,
        )

    def swap(self, live: LiveModel) -> None:
        self.live = live


def test_a_new_champion_is_swapped_in_with_its_threshold() -> None:
    rig = Rig()
    assert rig.live.threshold == 0.5
    rig.registry.add("2", model(), threshold="0.125")
    rig.watcher.check()
    assert (rig.live.version, rig.live.threshold) == ("2", 0.125)
    rig.registry.add("3", model(), threshold="0.125")
    rig.watcher.check()
    assert (rig.live.version, rig.live.threshold, rig.watcher.refused) == ("3", 0.25, "")


@pytest.mark.parametrize(
    ("content", "schema", "tags", "why"),
    [
        (ModelFormatError("weights are torn"), SCHEMA, {}, "weights are torn"),
        (object(), SCHEMA, {}, "holds a object"),
        (model(), replace(SCHEMA, feature_digest="0" * 64), {}, "feature_digest"),
        (model(), replace(SCHEMA, sequence_len=9), {}, "sequence_len 9 is not 4"),
        (model(), SCHEMA, {"threshold": "high"}, "threshold = 'high'"),
    ],
)
def test_a_champion_that_does_not_fit_is_refused_and_the_old_one_serves(
    content: Any, schema: InputSchema, tags: dict[str, str], why: str
) -> None:
    rig = Rig()
    rig.registry.add("2", content, schema, **tags)
    rig.watcher.check()
    rig.watcher.check()
    assert rig.live.version == "1"
    assert why in rig.watcher.refused
    assert b'model_swaps_total{outcome="refused"} 1.0' in rig.monitor.render()
    rig.registry.champion = "1"
    rig.watcher.check()
    assert rig.watcher.refused == ""


def test_a_registry_outage_does_not_stop_the_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    answers = iter([RegistryError("away"), RegistryError("away")])

    def flaky(alias: str) -> str | None:
        error = next(answers, None)
        if error is not None:
            raise error
        return rig.registry.champion

    monkeypatch.setattr(rig.registry, "version_of", flaky)
    rig.registry.add("2", model())
    rig.watcher.start()
    for _ in range(500):
        if rig.live.version == "2":
            break
        rig.watcher._stop.wait(0.01)
    rig.watcher.close()
    assert rig.live.version == "2"


def test_no_champion_no_service() -> None:
    with pytest.raises(RegistryError, match="promote"):
        load_champion(FakeRegistry())  # type: ignore[arg-type]


def test_a_model_of_another_declaration_cannot_be_served() -> None:
    rig = Rig()
    info = replace(rig.registry.infos["1"], schema=replace(SCHEMA, feature_digest="0" * 64))
    with pytest.raises(FeatureError, match="check out the commit") as caught:
        contract_of(info, model(), DECLARATION)
    assert SPEC.service in str(caught.value)

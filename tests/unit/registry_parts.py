"""A stand-in of the registry: versions in memory, aliases, a traffic policy; it can be away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from deepseek_ray.config import ModelConfig
from deepseek_ray.data.evidence import GateDecision
from deepseek_ray.errors import RegistryError, RegistryUnavailableError
from deepseek_ray.models import RiskModel, RiskModelConfig
from deepseek_ray.registry import InputSchema, Standing, TrafficMove, VersionInfo, Words


def model(names: Sequence[str], sequence_len: int, seed: int = 0) -> RiskModel:
    """A small model that scores, fitted to nothing."""
    shape = ModelConfig(d_model=8, num_layers=1, num_heads=1, d_expert=8, num_bins=3)
    net = RiskModel(RiskModelConfig(feature_names=tuple(names), sequence_len=sequence_len, shape=shape))
    rng = np.random.default_rng(seed)
    net.prepare(rng.normal(size=(200, len(names))).astype(np.float32), (np.arange(200) % 9 == 0).astype(np.int8))
    return net.double().eval()


@dataclass(frozen=True)
class Info(VersionInfo):
    """A version whose files are a model in memory (or what makes one), or an error."""

    content: Any = None

    def load(self) -> Any:
        if isinstance(self.content, Exception):
            raise self.content
        made = self.content if isinstance(self.content, RiskModel) or not callable(self.content) else self.content()
        return SimpleNamespace(model=made)


@dataclass
class FakeRegistry:
    """What the watcher, the rollout and the service's start ask of a registry."""

    infos: dict[str, Info] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    traffic: str = ""
    moved: list[TrafficMove] = field(default_factory=list)
    away: bool = False
    name: str = "risk"

    def add(self, version: str, content: Any, schema: InputSchema, path: Path = Path(), **tags: str) -> None:
        self.infos[version] = Info(
            name="risk", version=version, run_id="r", tags=tags, aliases=(), path=path, schema=schema, content=content
        )

    def standing(self) -> Standing:
        self._answer()
        return Standing(dict(self.aliases), self.traffic)

    def version_of(self, alias: str) -> str | None:
        return self.standing().aliases.get(alias)

    def get(self, version: str) -> Info:
        self._answer()
        number = self.aliases.get(version, version)
        if number not in self.infos:
            raise RegistryError(f"no version or alias {version!r}")
        return self.infos[number]

    def read(self) -> str:
        return self.standing().traffic

    def move(self, before: str, after: str, *, action: str, who: str, why: str, summary: str) -> None:
        if self.read() != before:
            raise RegistryError("moved by somebody else")
        self.traffic = after
        self.moved.append(
            TrafficMove(name="risk", action=action, who=who, why=why, summary=summary, before=before, after=after)
        )

    def crown(self, before: str, after: str, version: str, decision: GateDecision, words: Words) -> str:
        reason = "; ".join(check.name for check in decision.failed)
        if not reason:
            self.move(before, after, **words._asdict())
            self.aliases["champion"] = version
        return reason

    def moves(self) -> list[TrafficMove]:
        return self.moved

    def point(self, alias: str, version: str, *, who: str, why: str) -> Info:
        self.aliases[alias] = version
        return self.get(version)

    def _answer(self) -> None:
        if self.away:
            raise RegistryUnavailableError("away")

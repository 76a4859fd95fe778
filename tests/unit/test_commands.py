"""The registry verbs: what was decided, deciding again, going back."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deepseek_ray import cli, commands
from deepseek_ray.config import GateConfig
from deepseek_ray.data.evidence import Evidence, GateDecision, VectorContract
from deepseek_ray.data.verify import Difference, Verification
from deepseek_ray.errors import GateRefusedError, RegistryError
from deepseek_ray.online import gate
from deepseek_ray.registry import AuditEntry

CONTRACT = VectorContract(schema="s" * 64, feature_service="risk_default_v1", feature_digest="f" * 64)


def evidence(version: str, average_precision: float) -> Evidence:
    return Evidence(
        name="risk",
        version=version,
        average_precision=average_precision,
        cp100=0.3,
        calibration_error=0.01,
        p99_ms=5.0,
        prevalence=0.01,
        heldout_digest="h" * 64,
        contract=CONTRACT,
        old_average_precision=0.5,
    )


@dataclass
class Version:
    version: str
    tags: dict[str, str]
    name: str = "risk"


@dataclass
class FakeRegistry:
    """Versions with the evidence in their tags; promotes what the gate lets through."""

    champion: str | None
    versions: dict[str, Version]
    entries: list[AuditEntry] = field(default_factory=list)
    audit: Any = field(default_factory=lambda: SimpleNamespace(reading=lambda: nullcontext(None)))

    def get(self, version: str) -> Version:
        return self.versions[version]

    def version_of(self, alias: str) -> str | None:
        return self.champion

    def aliases(self) -> dict[str, str]:
        return {"champion": self.champion} if self.champion else {}

    def history(self) -> list[AuditEntry]:
        return self.entries

    def promote(self, version: str, decision: GateDecision) -> Version:
        if not decision.promote:
            raise GateRefusedError(f"Version {version} was not promoted.", fix="train a better one")
        self.champion = version
        return self.versions[version]

    def rollback(self, note: str) -> Version:
        raise RegistryError("'risk' has no previous version.", fix="promote a version instead")


def version(number: str, average_precision: float) -> Version:
    decision = gate.decide(None, evidence(number, average_precision), GateConfig())
    return Version(number, {"gate.decision": decision.to_json()})


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeRegistry:
    monkeypatch.setenv("DEEPSEEK_RAY_RUN", str(tmp_path))
    known = {"1": version("1", 0.6), "2": version("2", 0.58), "3": version("3", 0.7), "4": Version("4", {})}
    registry = FakeRegistry("1", known)
    monkeypatch.setattr(commands.Registry, "open", lambda *args, **options: registry)
    return registry


def test_promotion_by_hand_asks_the_gate_again(registry: FakeRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["registry", "promote", "3"]) == 0
    assert capsys.readouterr().out == "champion: version 3 (before: 1)\n"
    assert registry.champion == "3"


def test_a_worse_version_stays_out_unless_the_bounds_allow_it(registry: FakeRegistry) -> None:
    assert cli.main(["registry", "promote", "2"]) == 2
    assert registry.champion == "1"
    assert cli.main(["registry", "promote", "2", "--set", "gate.max_average_precision_drop=0.05"]) == 0
    assert registry.champion == "2"


def test_a_refused_version_is_compared_on_the_rows_it_was_measured_on(registry: FakeRegistry) -> None:
    fresh = {"heldout_digest": "n" * 64}
    champion, challenger = (replace(evidence(number, 0.5), **cast(Any, fresh)) for number in ("1", "5"))
    refused = gate.decide(champion, replace(challenger, p99_ms=40.0), GateConfig())
    registry.versions["5"] = Version("5", {"gate.decision": refused.to_json()})
    assert cli.main(["registry", "promote", "5", "--set", "gate.max_p99_ms=30"]) == 2
    assert cli.main(["registry", "promote", "5", "--set", "gate.max_p99_ms=50"]) == 0
    assert registry.champion == "5"


def test_a_version_without_evidence_is_not_promoted(registry: FakeRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["registry", "promote", "4"]) == 2
    assert "Version 4 of 'risk' was never measured for the gate." in capsys.readouterr().err


def test_a_rollback_without_a_previous_version_is_one_clear_line(
    registry: FakeRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["registry", "rollback", "--note", "alerts doubled"]) == 2
    assert capsys.readouterr().err == "error: 'risk' has no previous version. Fix: promote a version instead\n"


def test_history_shows_each_move_with_its_numbers(registry: FakeRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    made: dict[str, Any] = {"name": "risk", "action": "promote", "version": "1", "at": "2026-01-31T12:00:00Z"}
    tags = registry.versions["1"].tags
    registry.entries = [AuditEntry(**made, champion_before=None, champion_after="1", decision=tags["gate.decision"])]
    assert cli.main(["registry", "history"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("champion: version 1\n2026-01-31T12:00:00Z  promote  version 1    champion - -> 1\n")
    assert "    pass  average_precision        0.6 (bound 0.01)\n" in text
    assert cli.main(["registry", "history", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["history"][0]["decision"]["promote"] is True


def verification(**changes: Any) -> Verification:
    fields = {"rows": 3, "other_vectors": 0, "features": 160, "num_differences": 0, "max_difference": 0.0}
    return Verification(**cast(Any, {**fields, "differences": ()} | changes))


DIFFERENCE = Difference("p1", "t1", 5, "card_sum_1d", 100.0, 101.0)


@pytest.mark.parametrize(
    ("found", "status", "says"),
    [
        (verification(), 0, "0 differences in 3 predictions of 160 numbers each\n"),
        (verification(num_differences=1, max_difference=1.0, differences=(DIFFERENCE,)), 1, "recomputed 101.0"),
        (verification(rows=0), 1, "0 differences in 0 predictions"),
        (verification(other_vectors=2), 0, "2 predictions of another vector or declaration were not compared"),
    ],
)
def test_verification_tells_how_much_was_compared(
    found: Verification,
    status: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setenv("DEEPSEEK_RAY_RUN", str(tmp_path))
    monkeypatch.setattr("deepseek_ray.data.verify.verify_run", lambda *args, **options: asked.update(options) or found)
    assert cli.main(["verify", "features", "--limit", "5", "--set", "data.label_delay_days=3"]) == status
    assert says in capsys.readouterr().out
    assert (asked["limit"], asked["label_delay_days"]) == (5, 3.0)

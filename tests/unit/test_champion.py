"""A version is served only if it is whole and reads what the service computes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deepseek_ray.data import windows
from deepseek_ray.errors import FeatureError, ModelFormatError, RegistryError
from deepseek_ray.registry import InputSchema
from deepseek_ray.serving.champion import champion_version, contract_of, load_version, to_live, warm_up
from tests.unit.registry_parts import FakeRegistry, model

DECLARATION = windows.load()
SPEC = DECLARATION.vector("handbook")
SCHEMA = InputSchema(
    columns=SPEC.names, sequence_len=4, sequence_channels=6, feature_service=SPEC.service, feature_digest=SPEC.digest
)


def registry(*, schema: InputSchema = SCHEMA, **tags: str) -> FakeRegistry:
    made = FakeRegistry()
    made.add("1", model(SPEC.names, sequence_len=4), schema, **tags)
    made.aliases["champion"] = "1"
    return made


def test_a_version_serves_with_the_threshold_set_for_it_else_with_its_tag() -> None:
    info, loaded = load_version(registry(threshold="0.125"), "1")  # type: ignore[arg-type]
    assert to_live(info, loaded, None).threshold == 0.125
    assert to_live(info, loaded, 0.25).threshold == 0.25
    assert to_live(replace(info, tags={}), loaded, None).threshold == 0.5
    with pytest.raises(ModelFormatError, match="threshold = 'high'"):
        to_live(replace(info, tags={"threshold": "high"}), loaded, None)


def test_every_size_that_batches_are_padded_to_is_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    _, loaded = load_version(registry(), "1")  # type: ignore[arg-type]
    seen: set[tuple[str, int]] = set()
    for name in ("predict_proba", "attribute"):
        real = getattr(loaded, name)
        monkeypatch.setattr(
            loaded, name, lambda *rows, _real=real, _of=name: seen.add((_of, len(rows[0]))) or _real(*rows)
        )
    warm_up(loaded, [1, 8, 32])
    assert seen == {(name, rows) for name in ("predict_proba", "attribute") for rows in (1, 8, 32)}
    seen.clear()
    warm_up(loaded)
    assert {name for name, _ in seen} == {"predict_proba", "attribute"}


def test_no_champion_no_service() -> None:
    with pytest.raises(RegistryError, match="promote"):
        champion_version(FakeRegistry())  # type: ignore[arg-type]


def test_a_model_of_another_declaration_cannot_be_served() -> None:
    info, loaded = load_version(registry(schema=replace(SCHEMA, feature_digest="0" * 64)), "1")  # type: ignore[arg-type]
    with pytest.raises(FeatureError, match="check out the commit") as caught:
        contract_of(info, loaded, DECLARATION)
    assert SPEC.service in str(caught.value)

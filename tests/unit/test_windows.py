"""The declaration names every feature once, and says what is wrong with a bad entry."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deepseek_ray.data import windows
from deepseek_ray.data.events import DAY_US
from deepseek_ray.errors import FeatureError


def test_the_shipped_vectors_have_their_promised_sizes() -> None:
    declaration = windows.load()
    assert len(declaration.vector("handbook").names) == 15
    assert len(declaration.vector("default").names) == 128
    assert len(declaration.vector("wide").names) >= 300


def test_names_are_unique_and_services_carry_a_version() -> None:
    for spec in windows.load().vectors.values():
        assert len(set(spec.names)) == len(spec.names)
        assert spec.service.endswith("_v1")


def test_the_digest_follows_the_declaration(tmp_path: Path) -> None:
    tree = yaml.safe_load(windows.DECLARATION.read_text())
    tree["vectors"]["handbook"]["events"][0]["windows"][0] = "2d"
    changed = tmp_path / "windows.yaml"
    changed.write_text(yaml.safe_dump(tree))
    before, after = windows.load(), windows.load(changed)
    assert before.vector("handbook").digest != after.vector("handbook").digest
    assert before.vector("default").digest == after.vector("default").digest


def test_the_horizon_covers_the_longest_window_and_the_delay() -> None:
    spec = windows.load().vector("handbook")
    assert spec.horizon_us("terminal", 7 * DAY_US) == 37 * DAY_US
    assert spec.horizon_us("card", 7 * DAY_US) == 37 * DAY_US  # late labels find their event


def test_an_unknown_vector_is_named() -> None:
    with pytest.raises(FeatureError, match=r"'narrow'.*handbook"):
        windows.load().vector("narrow")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"key": "card", "aggregations": ["median"], "windows": ["1d"]}, "median"),
        ({"key": "shop", "aggregations": ["count"], "windows": ["1d"]}, "shop"),
        ({"key": "card", "aggregations": ["count"], "windows": ["1 day"]}, "1 day"),
        ({"key": "card", "aggregations": ["count"], "windows": ["1d", "1d"]}, "'vector'|count"),
        ({"key": "card", "aggregations": ["fraud_count"], "windows": ["1d"]}, "fraud_count"),
        ({"key": "terminal", "aggregations": ["distinct_terminals"], "windows": ["1d"]}, "not kept"),
        ({"aggregations": ["count"], "windows": ["1d"]}, "malformed"),
    ],
)
def test_a_bad_entry_is_named(tmp_path: Path, block: dict[str, object], message: str) -> None:
    tree = {
        "version": 1,
        "keys": {"card": ["card_id"], "terminal": ["terminal_id"]},
        "vectors": {"vector": {"service": "s_v1", "request": ["amount_cents"], "events": [block, block]}},
    }
    source = tmp_path / "windows.yaml"
    source.write_text(yaml.safe_dump(tree))
    with pytest.raises(FeatureError, match=message):
        windows.load(source)


def test_a_declaration_of_other_formulas_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "windows.yaml"
    source.write_text("version: 99")
    with pytest.raises(FeatureError, match="version 99"):
        windows.load(source)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match="checkout"):
        windows.load(tmp_path / "none.yaml")

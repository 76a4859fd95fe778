"""One settings tree for presets, YAML files and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ray.config import build_config, known_keys
from deepseek_ray.errors import ConfigError
from deepseek_ray.presets import PRESETS, load_preset


def test_an_override_beats_the_file_and_the_file_beats_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  epochs: 3\n  batch_size: 64\n")
    config = load_preset("debug", file=file, overrides=["train.epochs=5"])
    assert (config.train.epochs, config.train.batch_size, config.model.d_model) == (5, 64, 16)


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_valid(name: str) -> None:
    assert load_preset(name).seed == 0


def test_an_unknown_key_names_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"Unknown setting 'train.epoch' .*did you mean 'train.epochs'"):
        build_config(overrides=["train.epoch=3"])


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="choose one of debug, demo"):
        load_preset("prod")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.lr=-1", "'train.lr' = -1"),
        ("model.top_k=9", "model.top_k=9 must be <= model.num_experts=8"),
        ("model.num_heads=5", "must be a multiple of model.num_heads=5"),
        ("features.vector=huge", "'features.vector' = 'huge'"),
        ("model_name=Risk Model", "'model_name'"),
        ("train.epochs", "has no '='"),
    ],
)
def test_a_bad_value_is_named(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_config(overrides=[override])


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "3"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        build_config(file=file)


def test_a_missing_or_misencoded_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes("model_name: ri\xe9".encode("latin-1"))
    for path in (file, tmp_path / "none.yaml"):
        with pytest.raises(ConfigError, match="cannot be read"):
            build_config(file=path)


@given(st.floats(min_value=1e-9, max_value=10, allow_subnormal=False))
def test_any_number_reads_the_same_from_the_command_line(lr: float) -> None:
    assert build_config(overrides=[f"train.lr={lr!r}"]).train.lr == lr


def test_a_config_rebuilds_from_its_own_dump() -> None:
    config = build_config(overrides={"train.epochs": 9, "data": {"drift": "none"}})
    assert build_config(config.model_dump()) == config
    assert "train.epochs" in known_keys()

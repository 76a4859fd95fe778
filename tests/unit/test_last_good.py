"""The version that served last starts the service when the registry cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek_ray.config import Config
from deepseek_ray.errors import ModelFormatError, RegistryError, RegistryUnavailableError
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import InputSchema
from deepseek_ray.registry.package import Probes, write_package
from deepseek_ray.serving import kept_folder as module
from deepseek_ray.serving.kept_folder import CURRENT
from deepseek_ray.serving.last_good import LastGood, start_version
from serve_apps import risk
from tests.unit.registry_parts import FakeRegistry, model

SCHEMA = InputSchema(columns=("a", "b"), sequence_len=2, sequence_channels=6, feature_service="s", feature_digest="d")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    net = model(SCHEMA.columns, 2)
    net.save_pretrained(folder / "model")
    empty = SCHEMA.empty_sequence(2)
    probes = Probes.of(type(net).from_pretrained(folder / "model"), empty[:, 0, :2], empty)
    write_package(folder / "model", folder / "version", SCHEMA, probes)
    return folder / "version"


def test_half_a_copy_does_not_stay(tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "sync", full)
    with pytest.raises(OSError, match="No space"):
        module.KeptFolder(tmp_path / "kept").put(package, "7", {})
    assert [entry for entry in (tmp_path / "kept").iterdir() if entry.is_dir()] == []


@pytest.fixture
def kept(tmp_path: Path, package: Path) -> tuple[LastGood, FakeRegistry]:
    registry = FakeRegistry()
    registry.add("7", model(SCHEMA.columns, 2), SCHEMA, package, threshold="0.2", secret="x")
    registry.aliases["champion"] = "7"
    last_good = LastGood(tmp_path / "last_good")
    last_good.keep(registry.get("7"))
    return last_good, registry


def test_the_registry_away_or_its_champion_torn_the_copy_serves(kept: tuple[LastGood, FakeRegistry]) -> None:
    last_good, registry = kept
    assert start_version(lambda: registry, last_good)[2] == ""  # type: ignore[arg-type,return-value]
    registry.add("8", ModelFormatError("weights are torn"), SCHEMA)
    registry.aliases["champion"] = "8"
    info, net, why = start_version(lambda: registry, last_good)  # type: ignore[arg-type,return-value]
    assert (info.version, info.tags, why) == ("7", {"threshold": "0.2"}, "weights are torn")
    assert net.config.feature_names == SCHEMA.columns
    registry.away = True
    assert start_version(lambda: registry, last_good)[2] == "away"  # type: ignore[arg-type,return-value]


def test_without_a_copy_the_first_error_is_the_answer(tmp_path: Path) -> None:
    registry = FakeRegistry(away=True)
    with pytest.raises(RegistryUnavailableError, match="away"):
        start_version(lambda: registry, LastGood(tmp_path))  # type: ignore[arg-type,return-value]


def test_an_answering_registry_without_a_champion_is_obeyed(kept: tuple[LastGood, FakeRegistry]) -> None:
    last_good, registry = kept
    del registry.aliases["champion"]
    with pytest.raises(RegistryError, match="no champion"):
        start_version(lambda: registry, last_good)  # type: ignore[arg-type,return-value]


def test_the_program_starts_without_a_registry_only_where_a_copy_is(
    tmp_path: Path, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = RunPaths(tmp_path)
    with pytest.raises(RegistryUnavailableError, match="does not exist"):
        risk._check_champion(paths, Config())
    registry = FakeRegistry()
    registry.add("7", None, SCHEMA, package)
    LastGood(paths.last_good).keep(registry.get("7"))
    risk._check_champion(paths, Config())
    assert "the version that served last is served again" in capsys.readouterr().err


def test_a_torn_copy_is_never_served(kept: tuple[LastGood, FakeRegistry]) -> None:
    last_good, registry = kept
    registry.away = True
    weights = next(last_good._kept._folder.glob("7-*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ModelFormatError, match="SHA-256"):
        start_version(lambda: registry, last_good)  # type: ignore[arg-type,return-value]
    (last_good._kept._folder / CURRENT).write_text("{")
    with pytest.raises(ModelFormatError, match="No last good version"):
        last_good.load()


def test_one_copy_is_kept_and_only_a_new_version_is_copied(kept: tuple[LastGood, FakeRegistry], package: Path) -> None:
    last_good, registry = kept
    copies = sorted(last_good._kept._folder.glob("*-*"))
    last_good.keep(registry.get("7"))
    assert sorted(last_good._kept._folder.glob("*-*")) == copies
    registry.add("8", None, SCHEMA, package)
    last_good.keep(registry.get("8"))
    assert [path.name.split("-")[0] for path in last_good._kept._folder.glob("*-*")] == ["8"]
    assert json.loads((last_good._kept._folder / CURRENT).read_text())["version"] == "8"


def test_a_copy_is_on_disk_before_it_is_pointed_at(
    tmp_path: Path, kept: tuple[LastGood, FakeRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(module, "sync", synced.append)
    monkeypatch.setattr(module, "replace_text", lambda file, text: synced.append(file))
    folder = tmp_path / "other"
    LastGood(folder).keep(kept[1].get("7"))
    copy = next(one for one in folder.iterdir() if one.is_dir())
    assert synced[-1] == folder / CURRENT
    assert set(synced[:-1]) == {copy, *copy.rglob("*")}

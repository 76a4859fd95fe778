"""A manifest vouches for its files, and for itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek_ray.errors import CheckpointError
from deepseek_ray.train import manifest


def committed(folder: Path, step: int, fingerprint: str = "job") -> Path:
    target = folder / f"step-{step:06d}"
    target.mkdir()
    (target / "weights").write_text(str(step))
    manifest.commit(target, {"step": step, "notes": {"fingerprint": fingerprint}})
    return target


@pytest.mark.parametrize("change", [{"step": 3}, {"notes": None}, {"files": {}}, {"digest": "0"}])
def test_a_changed_manifest_is_named_and_the_older_one_wins(change: dict[str, object], tmp_path: Path) -> None:
    committed(tmp_path, 2)
    newest = committed(tmp_path, 6)
    content = json.loads((newest / manifest.MANIFEST).read_text())
    (newest / manifest.MANIFEST).write_text(json.dumps(content | change))
    with pytest.raises(CheckpointError, match=r"step-000006.*changed manifest"):
        manifest.read(newest)
    found = manifest.newest(tmp_path, "step", "job")
    assert found is not None
    assert found[1]["step"] == 2


def test_the_millionth_step_is_newer_than_those_before(tmp_path: Path) -> None:
    for step in (999_950, 1_000_000, 1_000_050):
        committed(tmp_path, step)
    found = manifest.newest(tmp_path, "step", "job")
    assert found is not None
    assert found[1]["step"] == 1_000_050
    manifest.prune(tmp_path, "step", keep=2)
    assert [path.name for path in manifest.folders(tmp_path, "step")] == ["step-1000050", "step-1000000"]


def test_what_is_named_otherwise_is_left_alone(tmp_path: Path) -> None:
    committed(tmp_path, 1)
    for name in ("step-1", "step-000002.old", "other-000003"):
        (tmp_path / name).mkdir()
    assert [path.name for path in manifest.folders(tmp_path, "step")] == ["step-000001"]

"""What is torn, changed or foreign is never loaded; the last complete checkpoint stays in force."""

from __future__ import annotations

import errno
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.data.samples import RandomSamples
from deepseek_ray.errors import CheckpointError
from deepseek_ray.models.pretrained import from_pretrained
from deepseek_ray.parallel.launch import run_processes
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train import manifest, mesh_checkpoint
from deepseek_ray.train.export import export_newest
from deepseek_ray.train.mesh_checkpoint import CheckpointWriter, load_newest, tensors_of
from deepseek_ray.train.parity import whole
from deepseek_ray.train.pretrain_step import Stepper
from deepseek_ray.train.pretrain_trainer import PretrainResult
from deepseek_ray.train.pretraining import make_stepper, pretrain
from tests.distributed.meshes import overrides

JOB = "job"


def config_of(mesh: str = "", **settings: object) -> MoEConfig:
    return load_moe_preset("debug_moe", overrides=overrides(mesh, **settings))


def stepper_of(config: MoEConfig) -> Stepper:
    samples = RandomSamples(config.backbone, config.corpus.seq_len, config.seed)
    return make_stepper(config, samples, torch.device("cpu"))


def state(stepper: Stepper) -> dict[str, torch.Tensor]:
    return {name: whole(tensor).clone() for name, tensor in tensors_of(stepper).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, torch.Tensor]]]:
    """Checkpoints after one and two steps of two processes, and what they hold."""
    folder = tmp_path_factory.mktemp("original")
    return folder, run_processes(2, two_steps, folder)[0]


def two_steps(folder: Path, background: bool = False) -> dict[int, dict[str, torch.Tensor]]:
    stepper = stepper_of(config_of("dp_shard=2"))
    writer = CheckpointWriter(folder, JOB, background=background)
    states = {}
    for number in range(2):
        stepper.step(number)
        writer.save(number + 1, stepper)
        states[number + 1] = state(stepper)
    writer.close()
    return states


@pytest.fixture
def copy(original: tuple[Path, object], tmp_path: Path) -> Path:
    return Path(shutil.copytree(original[0], tmp_path / "copy"))


def loaded(folder: Path, job: str = JOB) -> tuple[int, dict[str, torch.Tensor]]:
    stepper = stepper_of(config_of())
    return load_newest(folder, job, stepper), state(stepper)


def newest(folder: Path) -> Path:
    return folder / "step-000002"


def shard_of(folder: Path) -> Path:
    return sorted(newest(folder).glob("*.safetensors"))[0]


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def rename_in_manifest(file: Path) -> None:
    content = json.loads(file.read_text())
    content["files"] = {f"x{name}": digest for name, digest in content["files"].items()}
    file.write_text(json.dumps(content))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda folder: (newest(folder) / manifest.MANIFEST).unlink(),
    "half a manifest": lambda folder: (newest(folder) / manifest.MANIFEST).write_text('{"step": 2, "fi'),
    "a manifest of other files": lambda folder: rename_in_manifest(newest(folder) / manifest.MANIFEST),
    "a flipped byte": lambda folder: flip_a_byte(shard_of(folder)),
    "a truncated shard": lambda folder: os.truncate(shard_of(folder), shard_of(folder).stat().st_size - 1),
    "a missing shard": lambda folder: shard_of(folder).unlink(),
    "an extra file": lambda folder: (newest(folder) / "shard-00009.safetensors").write_bytes(b"x"),
}


def test_the_newest_complete_one_wins(original: tuple[Path, dict[int, dict[str, torch.Tensor]]]) -> None:
    done, found = loaded(original[0])
    assert done == 2
    assert same(found, original[1][2])
    assert not same(found, original[1][1])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_skipped_aloud(
    damage: str, copy: Path, original: tuple[Path, dict[int, dict[str, torch.Tensor]]],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(logging.getLogger("deepseek_ray"), "propagate", True)
    DAMAGE[damage](copy)
    with pytest.raises(CheckpointError, match="Fix: use an older one"):
        manifest.read(newest(copy))
    done, found = loaded(copy)
    assert done == 1
    assert same(found, original[1][1])
    assert "skipped a checkpoint" in caplog.text
    assert "step-000002" in caplog.text


def test_another_jobs_checkpoints_are_left_alone(copy: Path) -> None:
    fresh = state(stepper_of(config_of()))
    done, found = loaded(copy, "other settings")
    assert done == 0
    assert same(found, fresh)


def test_another_model_is_refused(copy: Path) -> None:
    stepper = stepper_of(config_of(backbone__d_dense=64))
    with pytest.raises(CheckpointError, match=r"does not hold this model.*use the settings it was made with"):
        load_newest(copy, JOB, stepper)


def test_only_as_many_are_kept_as_asked(tmp_path: Path) -> None:
    stepper = stepper_of(config_of())
    writer = CheckpointWriter(tmp_path, JOB, keep=2)
    for done in range(1, 5):
        writer.save(done, stepper)
    (tmp_path / "step-000003" / manifest.MANIFEST).unlink()  # torn: it goes, and does not count
    writer.save(5, stepper)
    assert [path.name for path in manifest.folders(tmp_path, "step")] == ["step-000005", "step-000004"]


def test_background_writes_are_those_of_the_foreground(
    tmp_path: Path, original: tuple[Path, dict[int, dict[str, torch.Tensor]]]
) -> None:
    run_processes(2, two_steps, tmp_path, True)
    for done in (1, 2):
        folders = [folder / f"step-{done:06d}" for folder in (tmp_path, original[0])]
        assert manifest.read(folders[0])["files"].keys() == manifest.read(folders[1])["files"].keys()
        for file in folders[0].glob("*.safetensors"):
            assert same(load_file(file), load_file(folders[1] / file.name))


def test_a_step_does_not_change_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = mesh_checkpoint.save_shards

    def slow(*arguments: object, **options: object) -> None:
        time.sleep(0.5)
        honest(*arguments, **options)

    monkeypatch.setattr(mesh_checkpoint, "save_shards", slow)
    stepper = stepper_of(config_of())
    writer = CheckpointWriter(tmp_path, JOB, background=True)
    stepper.step(0)
    wanted = state(stepper)
    writer.save(1, stepper)
    stepper.step(1)
    assert not (tmp_path / "step-000001" / manifest.MANIFEST).exists(), "the step was meant to overtake the write"
    writer.close()
    assert same(loaded(tmp_path)[1], wanted)


@pytest.mark.parametrize("moment", ["save_shards", "commit"])
def test_sigkill_in_the_middle_of_a_write_leaves_the_older_one(copy: Path, moment: str) -> None:
    context = multiprocessing.get_context("fork")
    reached = context.Event()
    child = context.Process(target=write_and_hang, args=(copy, moment, reached))
    child.start()
    assert reached.wait(60)
    assert child.pid
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert any((copy / "step-000003").iterdir())
    assert loaded(copy)[0] == 2
    stepper = stepper_of(config_of())
    CheckpointWriter(copy, JOB).save(3, stepper)  # the torn folder is in nobody's way
    assert loaded(copy)[0] == 3


def write_and_hang(folder: Path, moment: str, reached: multiprocessing.synchronize.Event) -> None:  # type: ignore[name-defined]
    torch.set_num_threads(1)
    stepper = stepper_of(config_of())
    owner = manifest if moment == "commit" else mesh_checkpoint
    honest = getattr(owner, moment)

    def hang(*arguments: object, **options: object) -> None:
        if moment == "save_shards":
            honest(*arguments, **options)  # shards are there, the manifest is not
        else:
            Path(str(arguments[0]), f".{manifest.MANIFEST}").write_text('{"files":')
        reached.set()
        time.sleep(60)

    setattr(owner, moment, hang)
    CheckpointWriter(folder, JOB).save(3, stepper)


@pytest.mark.parametrize("background", [False, True])
def test_no_space_left_is_an_error_with_a_fix(copy: Path, background: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stepper = stepper_of(config_of())
    writer = CheckpointWriter(copy, JOB, background=background)
    with monkeypatch.context() as patch:
        patch.setattr(mesh_checkpoint, "save_shards", full)
        with pytest.raises(CheckpointError, match=r"No space left.*free space.*last complete one is still there"):
            save_and_wait(writer, 3, stepper)
    assert loaded(copy)[0] == 2
    save_and_wait(writer, 4, stepper)
    assert loaded(copy)[0] == 4


def save_and_wait(writer: CheckpointWriter, done: int, stepper: Stepper) -> None:
    writer.save(done, stepper)
    writer.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a tiny disk takes root and mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_good_one(small_disk: Path) -> None:
    stepper = stepper_of(config_of())
    writer = CheckpointWriter(small_disk, JOB)
    writer.save(1, stepper)
    size = sum(file.stat().st_size for file in small_disk.rglob("*") if file.is_file())
    (small_disk / "ballast").write_bytes(bytes((8 << 20) - size - size // 2))
    with pytest.raises(CheckpointError, match="free space or change permissions"):
        writer.save(2, stepper)
    assert [path.name for path in manifest.folders(small_disk, "step")] == ["step-000001"]  # the torn one gave way
    assert loaded(small_disk)[0] == 1
    (small_disk / "ballast").unlink()
    writer.save(3, stepper)
    assert loaded(small_disk)[0] == 3


@pytest.mark.parametrize(("rank", "moment"), [(1, "shards"), (0, "folder"), (0, "manifest")])
def test_one_process_that_cannot_write_fails_all(rank: int, moment: str, tmp_path: Path) -> None:
    assert run_processes(2, fail_on_one, tmp_path, rank, moment, timeout_s=30) == [True, True]
    assert loaded(tmp_path)[0] == 1


def fail_on_one(folder: Path, rank: int, moment: str) -> bool:
    """Whether this process learned that the second checkpoint, which one of them could not write, is none."""
    stepper = stepper_of(config_of("dp_shard=2"))
    writer = CheckpointWriter(folder, JOB)
    writer.save(1, stepper)
    if torch.distributed.get_rank() == rank:
        if moment == "shards":
            mesh_checkpoint.HuggingFaceStorageWriter.write_data = refuse  # type: ignore[method-assign]
        elif moment == "folder":
            mesh_checkpoint.Path.mkdir = refuse  # type: ignore[assignment]
        else:
            manifest.sync = refuse  # type: ignore[assignment]
    try:
        writer.save(2, stepper)
    except CheckpointError as error:
        return "No space left" in str(error)
    return False


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_overflow_is_remembered_across_a_restart(tmp_path: Path) -> None:
    config = config_of(step__precision="float16")
    stepper = stepper_of(config)
    assert stepper.scale is not None
    stepper.scale.value = stepper.model.loss_scale = 2.0**40
    assert stepper.step(0).grad_norm == math.inf  # and half the scale from now on
    stepper.scale.value = stepper.model.loss_scale = 2.0**12
    stepper.step(1)
    CheckpointWriter(tmp_path, JOB).save(2, stepper)
    other = stepper_of(config)
    assert load_newest(tmp_path, JOB, other) == 2
    assert other.scale == stepper.scale
    assert {float(value["step"]) for value in other.optimiser.state.values()} == {1.0}
    assert other.step(2) == stepper.step(2)
    assert same(state(other), state(stepper))


def test_the_export_holds_the_trained_weights(tmp_path: Path) -> None:
    config = config_of("dp_shard=2,tp=2,ep=2", step__steps=3, step__checkpoint_every=2)
    wanted = run_processes(4, pretrain_whole, config, tmp_path / "run")[0]
    result = PretrainResult(tmp_path / "run", "digest", 0.0, 0.0, 0.0)
    model = from_pretrained(export_newest(config, result, tmp_path / "model"))
    assert same(dict(model.state_dict()), wanted)
    with pytest.raises(CheckpointError, match="train first"):
        export_newest(config.model_copy(update={"seed": 1}), result, tmp_path / "other")


def pretrain_whole(config: MoEConfig, folder: Path) -> dict[str, torch.Tensor]:
    """Whole weights that the same steps end with, without a checkpoint."""
    samples = RandomSamples(config.backbone, config.corpus.seq_len, config.seed)
    device = torch.device("cpu")
    pretrain(config, samples, folder, data_digest="digest", device=device)
    again = make_stepper(config, samples, device)
    for number in range(config.step.steps):
        again.step(number)
    return {name.removeprefix("model."): t for name, t in state(again).items() if name.startswith("model.")}

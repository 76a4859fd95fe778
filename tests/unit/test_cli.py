"""The command: instant help, one clear line for an error, programs by name."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek_ray import cli
from deepseek_ray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
MAX_HELP_S = 0.3


def run_cli(*arguments: str, folder: Path = ROOT, code: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "deepseek_ray.cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


def test_help_is_instant_and_names_every_verb() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        result = run_cli("--help")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < MAX_HELP_S, f"median {statistics.median(seconds):.2f} s"
    assert result.returncode == 0
    assert [verb for verb in (*cli.PROGRAMS, "doctor") if verb not in result.stdout] == []


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys; from deepseek_ray.cli import build_parser; build_parser().format_help();"
        "print(sorted({'ray', 'torch', 'mlflow', 'feast', 'pydantic', 'numpy', 'rich'} & set(sys.modules)))"
    )
    assert run_cli(code=code).stdout == "[]\n"


def test_an_error_raised_on_purpose_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def program() -> int:
        raise ConfigError("train.lr = -1:\n must be above 0.", fix="give a positive number")

    assert cli.guarded(program) == 2
    assert capsys.readouterr().err == "error: train.lr = -1: must be above 0. Fix: give a positive number\n"


def test_a_full_or_read_only_disk_is_an_error_not_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def program() -> int:
        raise OSError(28, "No space left on device", "/data/run/model.safetensors")

    assert cli.guarded(program) == 2
    assert "error: /data/run/model.safetensors: No space left on device." in capsys.readouterr().err


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.guarded(lambda: 1 // 0)


def test_a_bad_setting_is_refused_before_anything_runs() -> None:
    result = run_cli("doctor", "--set", "train.epoch=3")
    assert result.returncode == 2
    assert result.stderr == "error: Unknown setting 'train.epoch' (value 3). Fix: did you mean 'train.epochs'?\n"


def test_a_closed_pipe_is_not_an_error() -> None:
    result = subprocess.run(
        f"{sys.executable} -m deepseek_ray.cli --help | head -c 1", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert (result.stdout, result.stderr) == ("u", "")


def checkout(folder: Path, verb: str, body: str) -> Path:
    """A small checkout with one program behind the verb."""
    (folder / "deepseek_ray").mkdir(parents=True)
    (folder / "pipelines" / "risk").mkdir(parents=True)
    (folder / "pipelines" / "risk" / f"{verb}.py").write_text(body)
    (folder / "deep" / "inside").mkdir(parents=True)
    return folder


def test_a_program_gets_its_arguments_and_gives_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    body = "import os, sys\nprint(sys.argv[1:], os.environ['DEEPSEEK_RAY_RUNS'])\nsys.exit(5)\n"
    root = checkout(tmp_path / "repo", "train", body)
    monkeypatch.delenv("DEEPSEEK_RAY_RUNS")
    monkeypatch.chdir(root / "deep" / "inside")
    assert cli.main(["train", "--help", "--set", "a.b=1"]) == 5
    assert capfd.readouterr().out == f"['--help', '--set', 'a.b=1'] {root}/runs\n"


def test_outside_a_checkout_a_program_says_so(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "deepseek_ray", tmp_path / "site" / "deepseek_ray", ignore=shutil.ignore_patterns("kernels"))
    code = f"import sys; sys.path[0] = {str(tmp_path / 'site')!r}; from deepseek_ray.cli import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, "train"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: 'deepseek-ray train' starts the program 'pipelines.risk.train'")
    assert "change into a checkout" in result.stderr


def test_a_stop_of_the_command_stops_its_program(tmp_path: Path) -> None:
    body = "import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(60)\n"
    root = checkout(tmp_path / "repo", "demo", body)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = subprocess.Popen([sys.executable, "-m", "deepseek_ray.cli", "demo"], cwd=root, env=environment)
    deadline = time.monotonic() + 30
    while not (root / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    command.send_signal(signal.SIGTERM)
    assert command.wait(timeout=10) == -signal.SIGTERM % 256

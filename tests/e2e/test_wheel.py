"""The wheel holds the library with its kernels and the feature declaration, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deepseek_ray.data import windows

ROOT = Path(__file__).resolve().parents[2]


pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # builds in an isolated environment, which pip fetches


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns(".venv", ".git", "runs", "build", "tests", "*.egg-info", "__pycache__", ".*_cache")
    source = shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=skip)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, timeout=280)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_is_the_library(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"deepseek_ray"}
    kernels = {f"deepseek_ray/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels <= set(names)


USE = """
import sys
from pathlib import Path
import deepseek_ray
from deepseek_ray.config import DataConfig
from deepseek_ray.data import batch_engine, transactions, windows
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.paths import RunPaths

assert Path(deepseek_ray.__file__).is_relative_to(sys.argv[1]), deepseek_ray.__file__
history = transactions.generate(DataConfig(num_customers=10, num_terminals=20, num_days=20), seed=0)
spec = windows.load().vector("default")
table = batch_engine.compute(history, spec, label_delay_days=7, sequence_len=4)
client = FeatureClient(RunPaths(Path("run")))
client.apply()
client.write_offline(table)
print(client.historical(history, spec.service).values.shape == table.values.shape, table.values.shape[1], spec.digest)
"""


def test_features_are_computed_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, timeout=200)
    done = subprocess.run(
        [sys.executable, "-c", USE, str(target)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "128", windows.load().vector("default").digest]

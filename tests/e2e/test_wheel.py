"""The wheel holds the library with its kernels and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # builds in an isolated environment, which pip fetches
@pytest.mark.timeout(300)
def test_the_wheel_is_the_library(tmp_path: Path) -> None:
    skip = shutil.ignore_patterns(".venv", ".git", "runs", "build", "tests", "*.egg-info", "__pycache__", ".*_cache")
    source = shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=skip)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, timeout=280)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"deepseek_ray"}
    kernels = {f"deepseek_ray/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels <= set(names)

"""Shared fixtures: tests are marked by folder, write below tmp_path only, and unit tests start no cluster."""

from __future__ import annotations

import os
from pathlib import Path

import prometheus_client  # noqa: F401 - before any test module imports feast, which would switch it to shared files
import pytest

from deepseek_ray.logs import QUIET_ENVIRONMENT

os.environ.update(QUIET_ENVIRONMENT)
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")  # a loaded machine starts slowly
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the future behaviour; else Ray warns
if not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton: kernels run without a GPU
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on a loaded machine spinning threads starve the one they wait for
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # Ray workers start fast only with .pyc files

HERE = Path(__file__).parent
FOLDERS = ("unit", "kernels", "distributed", "integration", "e2e", "gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder."""
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        if folder in FOLDERS:
            item.add_marker(folder)


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated MLflow database; making one takes seconds."""
    from deepseek_ray.paths import RunPaths
    from deepseek_ray.registry import Tracking

    paths = RunPaths(tmp_path_factory.mktemp("template"))
    Tracking.open(paths, experiment="template")
    return Path(paths.tracking_uri.removeprefix("sqlite:///"))


@pytest.fixture(autouse=True)
def isolated_environment(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run folders go to tmp_path; nothing of the caller's set-up leaks in."""
    monkeypatch.setenv("DEEPSEEK_RAY_RUNS", str(tmp_path / "runs"))
    leaks = ("DEEPSEEK_RAY_RUN", "DEEPSEEK_RAY_API_KEY", "RAY_ADDRESS", "MLFLOW_TRACKING_URI")
    for name in (*leaks, "PROMETHEUS_MULTIPROC_DIR", "PROMETHEUS_MULTIPROCESS_DIR"):
        monkeypatch.delenv(name, raising=False)
    if request.node.get_closest_marker("unit"):
        import ray

        def refuse(*args: object, **kwargs: object) -> None:
            raise RuntimeError("unit tests start no cluster: move this test to tests/integration")

        monkeypatch.setattr(ray, "init", refuse)

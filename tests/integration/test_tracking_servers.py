"""PostgreSQL, MLflow's own server and S3 as the stores of a run: the same life of a version as with SQLite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_ray.cli import main
from deepseek_ray.config import DataConfig, ModelConfig, StoreConfig
from deepseek_ray.data import windows
from deepseek_ray.data.batch_engine import compute
from deepseek_ray.data.transactions import generate
from deepseek_ray.errors import RegistryError, RegistryUnavailableError
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import Registry, Tracking
from tests.served_run import ServedRun, add_version
from tests.stores import Store, free_port, mlflow_server, postgres_server, s3_server

ROOT = Path(__file__).resolve().parents[2]
SPEC = windows.load().vector("handbook")
SHAPE = ModelConfig(d_model=8, num_layers=1, num_heads=2, num_experts=4, d_expert=8, num_bins=4)
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Store]:
    with postgres_server() as store:
        yield store


@pytest.fixture
def password(postgres: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", postgres.password)


def live_through(folder: Path, stores: StoreConfig) -> str:
    """Register, promote twice, roll back; then the champion as another machine gets it. Returns where its files are."""
    paths = RunPaths(folder / "run").create()
    registry = Registry.open(paths, stores)
    table = generate(DataConfig(num_customers=20, num_terminals=40, num_days=20), 0)
    features = compute(table, SPEC, label_delay_days=1, sequence_len=16)
    run = ServedRun(paths, registry, table, table.clear())
    one, two = (add_version(run, SPEC, features, SHAPE, seed) for seed in (0, 1))
    assert registry.aliases() == {"champion": two, "previous": one}
    assert registry.rollback("false alarms").version == one
    assert registry.aliases() == {"champion": one}
    elsewhere = Registry.open(RunPaths(folder / "elsewhere").create(), stores, create=False)
    champion = elsewhere.get("champion")
    champion.load()
    assert champion.version == one
    assert [entry.action for entry in registry.history()] == ["promote", "promote", "rollback"]
    return registry.tracking.run(champion.run_id).artifact_uri


@pytest.mark.usefixtures("password")
def test_a_version_lives_in_postgres(postgres: Store, tmp_path: Path) -> None:
    stores = StoreConfig(tracking_uri=postgres.url, artifact_root=str(tmp_path / "artifacts"))
    where = live_through(tmp_path, stores)
    assert where.startswith((tmp_path / "artifacts").as_uri())


@pytest.mark.usefixtures("password")
def test_a_version_lives_in_postgres_and_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with postgres_server() as postgres, s3_server(monkeypatch) as bucket:
        monkeypatch.setenv("PGPASSWORD", postgres.password)
        where = live_through(tmp_path, StoreConfig(tracking_uri=postgres.url, artifact_root=f"{bucket}/risk-team"))
        assert where.startswith("s3://models/risk-team/risk/")
        assert not (tmp_path / "run" / "artifacts").exists() or not any((tmp_path / "run" / "artifacts").iterdir())


@pytest.mark.slow
def test_a_version_lives_on_an_mlflow_server(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as server:
        where = live_through(tmp_path, StoreConfig(tracking_uri=server.url))
        assert where.startswith("mlflow-artifacts:/")


OPEN = """
import sys
from pathlib import Path
from deepseek_ray.config import StoreConfig
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import Tracking
folder = Path(sys.argv[1])
stores = StoreConfig(tracking_uri=sys.argv[2], artifact_root=str(folder.parent / "artifacts"))
print(Tracking.open(RunPaths(folder), stores).experiment_id)
"""


def test_several_machines_may_be_the_first_to_open_the_store(tmp_path: Path) -> None:
    with postgres_server() as fresh:
        started = []
        for number in range(3):  # own run folders and own temporary folders, as on machines of their own
            folder = tmp_path / str(number)
            folder.mkdir()
            environment = os.environ | {"PGPASSWORD": fresh.password, "TMPDIR": str(folder)}
            command = [sys.executable, "-c", OPEN, str(folder), fresh.url]
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True))
        results = [process.communicate(timeout=250) for process in started]
        assert [process.returncode for process in started] == [0, 0, 0], results
        assert len({out for out, _ in results}) == 1


@pytest.mark.usefixtures("password")
def test_a_database_without_a_place_for_files_says_so(postgres: Store, tmp_path: Path) -> None:
    stores = StoreConfig(tracking_uri=postgres.url)
    with pytest.raises(RegistryError, match=r"stores\.artifact_root"):
        Tracking.open(RunPaths(tmp_path), stores, experiment="homeless")


def test_a_wrong_password_and_a_silent_server_are_named_without_it(
    postgres: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "not-the-word")
    away = Store(postgres.url.replace(str(postgres.port), str(port := free_port())), port)
    for store in (postgres, away):
        with pytest.raises(RegistryUnavailableError, match=str(store.port)) as refused:
            Tracking.open(RunPaths(tmp_path), StoreConfig(tracking_uri=store.url, artifact_root=str(tmp_path)))
        assert "not-the-word" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.usefixtures("password")
def test_the_programs_train_promote_and_roll_back_in_postgres_and_s3(
    postgres: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with s3_server(monkeypatch) as bucket:
        stores = (f"stores.tracking_uri={postgres.url}", f"stores.artifact_root={bucket}/programs")
        settings = ["--preset", "debug", "--run", str(tmp_path)]
        for setting in ("train.num_workers=0", "model_name=pg", *stores):
            settings += ["--set", setting]
        for seed in range(2):
            train = [sys.executable, "-m", "pipelines.risk.train", *settings, "--set", f"seed={seed}"]
            done = subprocess.run(train, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
            assert done.returncode == 0, done.stderr
            assert postgres.password not in done.stdout + done.stderr
        loose = ("max_average_precision_drop=1", "max_cp100_drop=1", "max_forgetting=1", "max_p99_ms=1000")
        bounds = [part for bound in loose for part in ("--set", f"gate.{bound}")]
        assert main(["registry", "promote", "2", *bounds, *settings]) == 0
        assert main(["registry", "rollback", *settings]) == 0
        assert main(["registry", "history", *settings]) == 0
    assert "champion: version 1" in capsys.readouterr().out
    assert not (tmp_path / "mlflow.db").exists()

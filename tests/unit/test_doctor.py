"""The doctor: every broken thing is seen, and comes with its fix."""

from __future__ import annotations

import json
import socket
import sqlite3
from pathlib import Path

import pytest

from deepseek_ray import cli, doctor
from deepseek_ray.config import build_config
from deepseek_ray.doctor import Check
from deepseek_ray.paths import RunPaths


def test_a_healthy_machine_has_nothing_broken(tmp_path: Path) -> None:
    checks = doctor.examine(build_config(), RunPaths(tmp_path / "run"))
    assert [check for check in checks if check.state == "broken"] == []
    assert {"ray", "mlflow", "memory", "disk", "serving port", "API key"} <= {check.name for check in checks}
    assert not (tmp_path / "run").exists()


def test_everything_that_is_wrong_has_a_fix(tmp_path: Path) -> None:
    config = build_config(overrides=["stores.tracking_uri=postgresql://u:hidden-word@127.0.0.1:1/db"])
    checks = doctor.examine(config, RunPaths(tmp_path))
    assert [check for check in checks if check.state != "ok" and not check.fix] == []
    assert "hidden-word" not in doctor.to_json(checks)


def test_a_package_that_is_missing_is_broken() -> None:
    (check,) = doctor.check_versions(["no-such-package"])
    assert (check.state, check.fix) == ("broken", "make install")


def test_a_port_in_use_is_seen() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        check = doctor.check_port("127.0.0.1", port, "serving port")
        assert (check.state, check.value) == ("warning", f"127.0.0.1:{port} Address already in use")
    assert doctor.check_port("127.0.0.1", port, "serving port").state == "ok"


def make_store(run: Path) -> sqlite3.Connection:
    run.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(run / "mlflow.db", isolation_level=None)
    connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
    return connection


def test_a_tracking_store_is_fine_locked_empty_or_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOCK_TIMEOUT_S", 0.05)
    config, paths = build_config(), RunPaths(tmp_path)
    assert doctor.check_tracking(config, paths).value.endswith("not made yet")
    with make_store(tmp_path) as connection:
        assert doctor.check_tracking(config, paths).state == "ok"
        connection.execute("BEGIN EXCLUSIVE")
        locked = doctor.check_tracking(config, paths)
        assert locked.state == "broken"
        assert locked.value.endswith("is locked")
        connection.execute("ROLLBACK")
    connection.close()
    (tmp_path / "mlflow.db").write_bytes(b"")
    assert doctor.check_tracking(config, paths).value.endswith("has no tables")
    (tmp_path / "mlflow.db").write_bytes(b"not a database at all, but long enough to have a header" * 40)
    assert "not a database" in doctor.check_tracking(config, paths).value


def test_a_store_that_listens_is_reached_and_its_password_stays_hidden(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = build_config(overrides=[f"stores.tracking_uri=http://user:hidden@127.0.0.1:{port}"])
        check = doctor.check_tracking(config, RunPaths(tmp_path))
    assert (check.state, check.value) == ("ok", f"http://127.0.0.1:{port} answers")


def test_a_store_that_does_not_listen_is_broken(tmp_path: Path) -> None:
    config = build_config(overrides=["stores.tracking_uri=http://127.0.0.1:1"])
    check = doctor.check_tracking(config, RunPaths(tmp_path))
    assert check.state == "broken"
    assert "Connection refused" in check.value


def test_the_extra_that_a_store_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    config = build_config(overrides=["stores.online_store=redis://127.0.0.1:1", "stores.artifact_root=s3://bucket/x"])
    assert doctor.check_online_store(config, RunPaths(tmp_path)).fix == "pip install 'deepseek-ray[redis]'"
    assert doctor.check_artifacts(config, RunPaths(tmp_path)).fix == "pip install 'deepseek-ray[s3]'"


def test_a_read_only_disk_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    assert doctor.check_disk(tmp_path / "runs").state == "broken"


def test_a_short_or_missing_api_key_is_a_warning_and_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_api_key("SOME_KEY").state == "warning"
    monkeypatch.setenv("SOME_KEY", "short")
    assert "short" not in doctor.check_api_key("SOME_KEY").value
    monkeypatch.setenv("SOME_KEY", "long-enough-for-everyone")
    assert doctor.check_api_key("SOME_KEY") == Check("API key", "ok", "SOME_KEY is set")


def test_the_status_is_1_when_something_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Check("disk", "broken", "/ is full", "pip install 'x[s3]'"), Check("ray", "ok", "2.60.0")]
    monkeypatch.setattr(doctor, "examine", lambda config, paths: checks)
    assert cli.main(["doctor", "--json"]) == 1
    assert [entry["state"] for entry in json.loads(capsys.readouterr().out)] == ["broken", "ok"]
    assert cli.main(["doctor"]) == 1
    table = capsys.readouterr().out
    assert "1 broken, 0 to look at, 1 fine" in table
    assert "x[s3]" in table

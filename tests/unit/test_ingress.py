"""The thin shell around Ray Serve checks what it can before it starts anything."""

from __future__ import annotations

import socket
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from deepseek_ray.config import build_config
from deepseek_ray.errors import ConfigError, EnvironmentProblemError, ModelFormatError, RegistryUnavailableError
from deepseek_ray.paths import RunPaths
from deepseek_ray.serving.auth import Keyring
from deepseek_ray.serving.keys import add_key
from serve_apps import ingress, model, risk, serve, terminal
from serve_apps.listener import bound
from tests.certificate import make_certificate


def test_a_taken_port_is_refused_with_a_fix() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EnvironmentProblemError, match="--port"):
            ingress.check_port("127.0.0.1", taken.getsockname()[1])


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(EnvironmentProblemError, match="cannot be listened on"):
        ingress.check_port("203.0.113.9", 80)


def test_a_port_just_given_back_can_be_taken_again() -> None:
    port = ingress.free_port()
    with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(("127.0.0.1", port)):
        server.accept()[0].close()  # leaves the port in TIME_WAIT
    ingress.check_port("127.0.0.1", port)


def test_a_held_port_is_given_to_no_one_else_and_the_replica_listens_there() -> None:
    with ExitStack() as opened:
        port = ingress.free_port()
        opened.enter_context(ingress.held("127.0.0.1", port))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        with pytest.raises(OSError, match="in use"):
            opened.enter_context(closing(socket.socket())).bind(("127.0.0.1", port))
        listening = opened.enter_context(bound("127.0.0.1", port))
        listening.listen()
        opened.enter_context(socket.create_connection(("127.0.0.1", port)))
        with pytest.raises(EnvironmentProblemError, match="--rpc-port"):
            ingress.held("127.0.0.1", port)


def test_serving_without_a_key_stops_before_anything_starts(tmp_path: object) -> None:
    with pytest.raises(EnvironmentProblemError, match="DEEPSEEK_RAY_API_KEY"):
        risk.main(["--run", str(tmp_path), "--port", "0"])


def test_settings_come_from_preset_file_and_command_line(tmp_path: Path) -> None:
    arguments = ["--port", "81", "--set", "serving.max_batch_size=3", "--preset", "debug", "--run", str(tmp_path)]
    options = risk._parser().parse_args(arguments)
    config, _ = terminal.settings_of(options)
    assert (config.serving.port, config.serving.max_batch_size) == (81, 3)


def test_serve_without_a_model_is_the_risk_service_and_with_one_a_model_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in (risk, model):
        monkeypatch.setattr(program, "main", lambda given, name=program.__name__: [name, given])
    assert serve.main(["--port", "81"]) == ["serve_apps.risk", ["--port", "81"]]
    given = ["--port", "81", "models:/risk@champion", "--device", "cpu"]
    assert serve.main(given) == ["serve_apps.model", given]


def test_a_model_that_is_not_there_stops_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_RAY_API_KEY", "a key that is long enough")
    monkeypatch.setattr(ingress, "prepare", lambda *address: None)
    with pytest.raises(ModelFormatError, match="There is no folder"):
        model.main([str(tmp_path / "nowhere"), "--port", "0"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/absent.db")
    with pytest.raises(RegistryUnavailableError, match=r"absent\.db"):
        model.main(["models:/risk@champion", "--port", "0"])
    with pytest.raises(EnvironmentProblemError, match="does not exist"):
        model.main(["models:/risk@champion", "--run", str(tmp_path / "nowhere"), "--port", "0"])


def test_free_ports_are_chosen_once_and_differ() -> None:
    chosen = terminal.with_ports(build_config({"serving": {"port": 0, "rpc_port": 0}})).serving
    assert 0 < chosen.port != chosen.rpc_port > 0
    fixed = build_config({"serving": {"port": 81, "rpc_port": -1}})
    assert terminal.with_ports(fixed) == fixed


def test_a_certificate_is_looked_at_before_anything_starts(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    ingress.check_certificate(cert, key)
    other = tmp_path / "other"
    other.mkdir()
    _, foreign = make_certificate(other)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(_pem(key, password=b"secret"))
    for wrong in (foreign, locked, tmp_path / "none.pem", cert):
        with pytest.raises(EnvironmentProblemError, match=r"serving\.tls_keyfile"):
            ingress.check_certificate(cert, wrong)


def test_tls_takes_both_files_seen_from_the_run(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    with pytest.raises(ConfigError, match="tls_certfile"):
        build_config(overrides=["serving.tls_certfile=cert.pem"])
    with pytest.raises(ConfigError, match=r"batch_buckets=\[8, 16\] must be <= serving.max_batch_size=4"):
        build_config(overrides=["serving.max_batch_size=4", "serving.batch_buckets=[8,16]"])
    named = build_config(overrides=["serving.tls_certfile=cert.pem", "serving.tls_keyfile=key.pem"])
    serving = terminal.with_certificate(named, RunPaths(tmp_path)).serving
    wanted = {"keep_alive_timeout_s": 60, "ssl_certfile": str(cert), "ssl_keyfile": str(key)}
    assert terminal.http_options(serving) == wanted
    assert terminal.http_options(build_config().serving) == {"keep_alive_timeout_s": 60}


def test_a_file_of_keys_replaces_the_variable(tmp_path: Path) -> None:
    add_key(tmp_path / "api_keys.json", "gateway")
    assert terminal.api_key(build_config().serving, RunPaths(tmp_path), generate=False) == ""


@pytest.mark.parametrize("generate", [False, True])
def test_what_ray_is_told_of_the_key_is_its_digest(
    generate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEEPSEEK_RAY_API_KEY", "a-key-for-the-tests-only")
    told = terminal.api_key(build_config().serving, RunPaths(tmp_path), generate=generate)
    key = capsys.readouterr().out.removeprefix("API key: ").strip() or "a-key-for-the-tests-only"
    assert key not in told
    Keyring(told).check([(b"x-api-key", key.encode())], "admin")


def _pem(key: Path, password: bytes) -> bytes:
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    locked = serialization.BestAvailableEncryption(password)
    return loaded.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_a_free_port_of_an_address_of_the_sixth_version() -> None:
    assert ingress.free_port("::1") > 0

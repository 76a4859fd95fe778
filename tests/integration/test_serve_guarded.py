"""The guards of docs/serving.md as a real Ray Serve replica keeps them: TLS, slow clients, keys without a restart."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deepseek_ray.client import Client
from serve_apps.ingress import free_port
from tests.certificate import make_certificate
from tests.integration.risk_process import KEY, Server, event
from tests.served_run import make_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    run = make_run(tmp_path_factory.mktemp("guarded"))
    cert, _ = make_certificate(run.paths.root)
    limits = ["serving.header_timeout_s=1", "serving.body_timeout_s=1", "serving.slo_p99_ms=2000"]
    tls = ["serving.tls_certfile=cert.pem", "serving.tls_keyfile=key.pem"]
    made = Server(run, free_port(), *limits, *tls)
    made.client.close()
    trusted = ssl.create_default_context(cafile=str(cert))
    base, headers = f"https://127.0.0.1:{made.port}", {"X-API-Key": KEY}
    made.client = httpx.Client(base_url=base, headers=headers, verify=trusted, timeout=30)
    yield made
    assert made.stop() == 0


def test_requests_are_answered_over_tls_and_only_so(server: Server) -> None:
    assert f"at https://127.0.0.1:{server.port}" in "".join(server.output)
    assert server.client.post("/v1/risk/score", json=event()).status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{server.port}/healthz")
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://127.0.0.1:{server.port}/healthz")


def test_the_client_is_encrypted_over_grpc_too(server: Server) -> None:
    address, cert = f"127.0.0.1:{server.port}", server.run.paths.root / "cert.pem"
    with Client(address, api_key=KEY, timeout_s=10, ca_file=cert) as caller:
        assert caller.transport == "grpc"
        assert caller.call("risk.score", event())["prediction_id"]


@pytest.mark.parametrize(
    ("sent", "kind"), [("GET /healthz HTT", "slow-headers"), ("", "slow-headers"), (..., "slow-body")]
)
def test_who_sends_slowly_is_cut_off(server: Server, sent: str, kind: str) -> None:
    if sent is ...:
        sent = f"POST /v1/risk/score HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\ncontent-length: 999\r\n\r\n{{"
    context = ssl.create_default_context(cafile=str(server.run.paths.root / "cert.pem"))
    start = time.monotonic()
    with (
        socket.create_connection(("127.0.0.1", server.port)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as line,
    ):
        line.sendall(sent.encode())
        answer = b""
        while part := line.recv(4_096):
            answer += part
    assert answer.startswith(b"HTTP/1.1 408")
    assert kind.encode() in answer
    assert time.monotonic() - start < 10
    assert f'deepseek_ray_shed_requests_total{{reason="{kind}"}}' in server.client.get("/metrics").text


def test_the_commands_for_keys_work_on_a_running_service(server: Server) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "deepseek-ray keys" in block]
    assert len(blocks) == 1
    add, listed, revoke = blocks[0].replace("runs/latest", str(server.run.paths.root)).strip().splitlines()
    key = _shell(add).partition("API key: ")[2].split()[0]
    assert "gateway" in _shell(listed)
    _wait_for(server, key, 200)
    assert (
        server.client.post("/v1/risk/threshold", json={"threshold": 0.5}, headers={"X-API-Key": key}).status_code == 403
    )
    _shell(revoke)
    _wait_for(server, key, 401)
    assert server.client.get("/v1/risk/model").status_code == 200  # the environment's key goes on


def test_a_tight_deadline_is_kept_and_an_easy_one_answered(server: Server) -> None:
    easy = server.client.post("/v1/risk/score", json=event(), headers={"X-Request-Timeout-Ms": "20000"})
    assert easy.status_code == 200
    tight = server.client.post("/v1/risk/score", json=event(), headers={"X-Request-Timeout-Ms": "0.001"})
    assert tight.status_code == 503
    assert tight.headers["retry-after"]
    assert json.loads(tight.content)["type"].endswith(("expired", "deadline"))


def _shell(command: str) -> str:
    root, scripts = Path(__file__).parents[2], Path(sys.executable).parent  # this checkout, this environment
    environment = os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    done = subprocess.run(
        ["bash", "-ec", command], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _wait_for(server: Server, key: str, status: int) -> None:
    end = time.monotonic() + 10
    while (seen := server.client.get("/v1/risk/model", headers={"X-API-Key": key}).status_code) != status:
        assert time.monotonic() < end, f"still {seen}"
        time.sleep(0.2)

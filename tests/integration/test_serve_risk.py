"""The service as its users meet it: a real Ray Serve replica behind a port, a real store, log and registry."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from deepseek_ray.config import ModelConfig
from deepseek_ray.data.batch_engine import compute
from deepseek_ray.data.prediction_archive import compact, read_predictions, stack_sequences, stack_values
from deepseek_ray.data.windows import load
from deepseek_ray.models import load as load_model
from tests.integration.risk_process import KEY, Server, event, score
from tests.served_run import DELAY_DAYS, SEQUENCE_LEN, ServedRun, add_version

SHAPE = ModelConfig(d_model=16, num_layers=1, num_heads=2, d_expert=16, num_bins=4)
pytestmark = pytest.mark.timeout(400)


def test_a_known_card_is_scored_and_a_new_one_is_scored_cold(server: Server) -> None:
    last = server.run.history.row(-1, named=True)
    known = score(server, event(card_id=last["card_id"], terminal_id=last["terminal_id"]))
    assert known.status_code == 200, known.text
    assert known.json()["cold"] == []
    cold = score(server, event(card_id="never-seen", terminal_id="nor-this"))
    assert cold.json()["cold"] == ["card", "terminal"]
    assert 0 <= cold.json()["probability"] <= 1


@pytest.mark.parametrize(
    ("content", "status", "field"),
    [
        (b"{not json", 400, None),
        (event(amount_cents="12"), 422, "amount_cents"),
        (event(amount_cents=-1), 422, "amount_cents"),
        (event(amount_cents=float("nan")), 422, "amount_cents"),
        (event(amount_cents=float("inf")), 422, "amount_cents"),
        (event(card_id=...), 422, "card_id"),
        (event(colour="red"), 422, "colour"),
        (event(event_time="yesterday"), 422, "event_time"),
        (event(event_time=(datetime.now(UTC) + timedelta(hours=1)).isoformat()), 422, "event_time"),
        ({"transactions": [event() for _ in range(51)]}, 413, "transactions"),
        (b" " * (5 << 20), 413, None),
    ],
)
def test_bad_input_is_refused_and_named(server: Server, content: Any, status: int, field: str | None) -> None:
    answer = score(server, content)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json().get("field") == field
    assert answer.json()["fix"]


def test_an_event_older_than_the_cards_last_is_stale(server: Server) -> None:
    assert score(server, event(card_id="punctual")).status_code == 200
    late = event(card_id="punctual", event_time=(datetime.now(UTC) - timedelta(hours=1)).isoformat())
    answer = score(server, {"transactions": [event(card_id="other"), late]})
    assert (answer.status_code, answer.json()["field"]) == (409, "event_time")
    assert "card" in score(server, event(card_id="other")).json()["cold"], "the refused request left a trace"


def test_repeats_conflicts_keys_and_feedback(server: Server) -> None:
    transaction = event(card_id="loyal")
    first, again = score(server, transaction), score(server, transaction)
    assert again.content == first.content
    assert score(server, transaction | {"amount_cents": 9}).status_code == 409
    for headers in ({"X-API-Key": ""}, {"X-API-Key": "wrong-key-wrong-key"}):
        assert score(server, transaction, **headers).status_code == 401
    label = {
        "prediction_id": first.json()["prediction_id"],
        "is_fraud": True,
        "observed_at": datetime.now(UTC).isoformat(),
    }
    for _ in range(2):
        assert server.client.post("/v1/risk/feedback", json=label).status_code == 200
    assert server.client.post("/v1/risk/feedback", json=label | {"is_fraud": False}).status_code == 409
    assert server.client.post("/v1/risk/feedback", json=label | {"prediction_id": "p0"}).status_code == 404


def test_a_start_says_where_it_is_and_nothing_listens_beyond_this_machine(server: Server) -> None:
    said, started = server.output[0], server.run.paths.replica_log.read_text()
    assert said.startswith("serving "), server.output
    assert " version 1 serves; " in started
    family = psutil.Process(server.process.pid)
    ports = {
        (process.name(), connection.laddr)
        for process in [family, *family.children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(ports) > 3  # Ray's among them
    assert {(name, at.ip) for name, at in ports if at.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")} == set()


def test_health_needs_no_key_and_metrics_do(server: Server) -> None:
    base = f"http://127.0.0.1:{server.port}"
    assert httpx.get(f"{base}/healthz").status_code == 200
    assert httpx.get(f"{base}/readyz").status_code == 200
    assert httpx.get(f"{base}/metrics").status_code == 401
    assert "deepseek_ray_stage_seconds_bucket" in server.client.get("/metrics").text
    assert server.client.get("/openapi.json").json()["openapi"] == "3.1.0"


def test_the_commands_of_the_api_page_work(server: Server) -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "curl" in block]
    assert len(blocks) == 3
    known = score(server, event()).json()["prediction_id"]
    environment = os.environ | {
        "DEEPSEEK_RAY_API_KEY": KEY,
        "DEEPSEEK_RAY_URL": f"http://127.0.0.1:{server.port}",
        "PREDICTION_ID": known,
    }
    for block in blocks:
        done = subprocess.run(
            ["bash", "-ec", block], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_promotion_is_swapped_in_under_traffic_without_a_failed_request(server: Server) -> None:
    failures: list[str] = []
    versions: list[str] = []
    done = threading.Event()

    def traffic() -> None:
        with httpx.Client(base_url=server.client.base_url, headers={"X-API-Key": KEY}, timeout=30) as client:
            while not done.is_set():
                answer = client.post("/v1/risk/score", json=event(card_id="busy"))
                versions.append(answer.json().get("model_version", ""))
                if answer.status_code != 200:
                    failures.append(answer.text)

    thread = threading.Thread(target=traffic)
    thread.start()
    spec = load().vector("default")
    features = compute(server.run.history, spec, label_delay_days=DELAY_DAYS, sequence_len=SEQUENCE_LEN)
    version = add_version(server.run, spec, features, SHAPE, seed=1)
    end = time.monotonic() + 60
    while server.client.get("/v1/risk/model").json()["model_version"] != version and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(0.3)
    done.set()
    thread.join()
    assert failures == []
    assert versions[-1] == version
    assert versions == sorted(versions)


def test_a_killed_replica_comes_back_with_all_it_had_answered(server: Server) -> None:
    answered = [score(server, event(card_id="witness")).json() for _ in range(5)]
    killed = server.replica()
    killed.kill()
    killed.wait(20)
    server.wait_ready()
    assert score(server, event(card_id="witness")).json()["cold"] == []
    frame = read_predictions(server.run.paths)
    assert {item["prediction_id"] for item in answered} <= set(frame["prediction_id"])


def test_a_port_in_use_and_a_missing_key_are_said_plainly(run: ServedRun) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "serve_apps.risk", "--run", str(run.paths.root), "--port", str(port)]
        keyless = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        keyed = os.environ | {"DEEPSEEK_RAY_API_KEY": KEY}
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=keyed)
    assert (keyless.returncode, refused.returncode) == (2, 2)
    assert "--generate-key" in keyless.stderr
    assert f"127.0.0.1:{port} cannot be listened on" in refused.stderr
    assert "--port" in refused.stderr


def test_after_the_stop_every_answer_can_be_recomputed(server: Server) -> None:
    """Runs last: stops the server, then scores the logged inputs again, and compacts the log."""
    assert server.stop() == 0
    shown = "".join(server.output)
    assert "serving 'risk'" in shown
    assert "graceful_shutdown failed" not in shown
    run = server.run
    frame = read_predictions(run.paths)
    assert len(frame) > 20
    assert frame["prediction_id"].n_unique() == frame["transaction_id"].n_unique() == len(frame)
    values, sequences = stack_values(frame), stack_sequences(frame)
    for version in frame["model_version"].unique():
        rows = (frame["model_version"] == version).to_numpy()
        model = load_model(run.registry.get(version).path)
        again = model.predict_proba(values[rows], sequences[rows])
        np.testing.assert_allclose(again, frame["probability"].to_numpy()[rows], rtol=0, atol=1e-9)
    compact(run.paths, prune=True)
    assert read_predictions(run.paths).equals(frame)

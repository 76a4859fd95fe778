"""One server for every kind of model: routes, answers and description follow from the model's own columns."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
import torch

from deepseek_ray.client import Client
from deepseek_ray.data.corpus import START
from deepseek_ray.errors import ConfigError, EnvironmentProblemError, ModelFormatError, RequestError
from deepseek_ray.models import load
from deepseek_ray.registry import InputSchema, Probes
from deepseek_ray.registry.package import write_package
from deepseek_ray.serving.model_kinds import choose
from tests.unit import rpc_parts
from tests.unit.model_parts import KEY, NAMES, backbone, client, predict, risk_model, served, settings

RECORD = {"amount": 1.5, "count 1d": 2}
HISTORY = [[0.1, 1.0, 0.2, 0.3, 0.4, 0.5], [0.2, 2.0, 0.2, 0.3, 0.4, 0.5]]


@pytest.fixture
def risk_folder(tmp_path: Path) -> Path:
    return risk_model().save_pretrained(tmp_path / "fraud")


def ask(target: Path, body: Any, **options: Any) -> httpx.Response:
    with served(target, **options) as app:
        return asyncio.run(predict(app, body))


def test_a_saved_risk_model_gives_its_own_probabilities(risk_folder: Path) -> None:
    records = [RECORD, RECORD | {"sequence": HISTORY}, RECORD | {"sequence": None}]
    answer = ask(risk_folder, {"records": records})
    assert answer.status_code == 200, answer.text
    model = load(risk_folder)
    sequence = InputSchema.of(model.config).empty_sequence(3)
    sequence[1, :2] = HISTORY
    wanted = model.predict_proba(np.array([[1.5, 2.0]] * 3), sequence)
    assert [row["probability"] for row in answer.json()["predictions"]] == pytest.approx(wanted.tolist(), abs=1e-12)
    assert answer.json()["model"] == "m"


def test_columns_are_the_same_as_records(risk_folder: Path) -> None:
    with served(risk_folder) as app:
        by_row = asyncio.run(predict(app, {"records": [RECORD, {"amount": -1, "count 1d": 0.5}]})).json()
        by_column = asyncio.run(predict(app, {"columns": {"amount": [1.5, -1], "count 1d": [2, 0.5]}})).json()
    assert by_row == by_column


def test_a_version_of_the_registry_is_served_with_its_files_checked(risk_folder: Path, tmp_path: Path) -> None:
    model = load(risk_folder)
    schema = InputSchema.of(model.config)
    probes = Probes.of(model, np.ones((2, 2)), schema.empty_sequence(2))
    package = tmp_path / "version"
    write_package(risk_folder, package, schema, probes)
    assert ask(package, {"records": [RECORD]}).status_code == 200
    weights = package / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelFormatError, match="SHA-256"), served(package):
        pass


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ([], 422, ""),
        ({"records": {}}, 422, "records"),
        ({"records": []}, 422, "records"),
        ({"records": [RECORD], "columns": {}}, 422, ""),
        ({"rows": [RECORD]}, 422, "rows"),
        ({"records": [1]}, 422, "records.0"),
        ({"records": [{"amount": 1}]}, 422, "records.0.count 1d"),
        ({"records": [RECORD | {"more": 1}]}, 422, "records.0.more"),
        ({"records": [RECORD | {"amount": "1"}]}, 422, "records.0.amount"),
        ({"records": [RECORD | {"amount": True}]}, 422, "records.0.amount"),
        ({"records": [RECORD | {"amount": None}]}, 422, "records.0.amount"),
        ({"records": [RECORD | {"sequence": [HISTORY[0][:5]]}]}, 422, "records.0.sequence.0"),
        ({"records": [RECORD | {"sequence": HISTORY * 2}]}, 422, "records.0.sequence"),
        ({"columns": {"amount": [1, 2], "count 1d": [1]}}, 422, "columns.count 1d"),
        ({"columns": {"amount": 1}}, 422, "columns.amount"),
        ({"columns": []}, 422, "columns"),
        ({"columns": {}}, 422, "columns"),
        ({"records": [RECORD] * 4}, 413, "records"),
    ],
)
def test_what_does_not_fit_the_signature_is_named(risk_folder: Path, body: Any, status: int, field: str) -> None:
    answer = ask(risk_folder, body, config=settings(max_transactions=3))
    assert (answer.status_code, answer.json().get("field", "")) == (status, field), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["fix"]


def test_numbers_that_are_none_are_refused(risk_folder: Path) -> None:
    async def story(app: Any) -> None:
        async with client(app) as talk:
            for value in ("NaN", "Infinity", "1e999"):
                content = '{"records": [{"amount": %s, "count 1d": 1}]}' % value  # noqa: UP031  braces of JSON
                answer = await talk.post("/v1/models/m/predict", content=content)
                assert answer.status_code == 422, answer.text

    with served(risk_folder) as app:
        asyncio.run(story(app))


def test_the_description_follows_from_the_signature(risk_folder: Path) -> None:
    async def story(app: Any) -> tuple[Any, ...]:
        async with client(app) as talk:
            routes = ("/v1/models/m", "/openapi.json", "/docs", "/metrics", "/readyz", "/healthz")
            return tuple([await talk.get(route) for route in routes])

    with served(risk_folder) as app:
        answer = asyncio.run(predict(app, {"records": [RECORD]})).json()
        about, described, page, metrics, ready, alive = asyncio.run(story(app))
    assert [column["name"] for column in about.json()["inputs"]] == [*NAMES, "sequence"]
    assert (about.json()["kind"], about.json()["device"]) == ("risk", "cpu")
    document = described.json()
    assert set(document["paths"]) == {"/v1/models/m/predict", "/v1/models/m", "/healthz", "/readyz", "/metrics"}
    operation = document["paths"]["/v1/models/m/predict"]["post"]
    resolve = {"components": document["components"]}
    shape = operation["requestBody"]["content"]["application/json"]["schema"] | resolve
    jsonschema.validate({"records": [RECORD]}, shape)
    jsonschema.validate({"columns": {"amount": [1.0], "count 1d": [2]}}, shape)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"records": [{"amount": 1}]}, shape)
    jsonschema.validate(answer, operation["responses"]["200"]["content"]["application/json"]["schema"] | resolve)
    assert "count 1d" in page.text
    assert 'deepseek_ray_model_info{name="m"' in metrics.text
    assert "deepseek_ray_batch_records" in metrics.text
    assert (ready.status_code, alive.json()["rpc_port"]) == (200, 0)


def test_every_route_but_health_asks_for_the_key(risk_folder: Path) -> None:
    async def story(app: Any) -> list[int]:
        async with client(app, key="some other key of length") as talk:
            routes = ("/v1/models/m", "/openapi.json", "/metrics", "/healthz", "/readyz")
            return [(await talk.get(route)).status_code for route in routes]

    with served(risk_folder) as app:
        assert asyncio.run(story(app)) == [401, 401, 401, 200, 200]


def test_a_request_that_breaks_the_model_breaks_no_other(risk_folder: Path) -> None:
    async def story(app: Any) -> list[int]:
        bodies = [{"records": [RECORD | {"amount": amount}]} for amount in (1.0, 666.0, 2.0)]
        return [answer.status_code for answer in await asyncio.gather(*(predict(app, body) for body in bodies))]

    with served(risk_folder) as app:
        model = app._slot.live.model
        work = model.predict

        def picky(batch: Any) -> Any:
            if 666.0 in batch.columns["amount"]:
                raise RuntimeError("no")
            return work(batch)

        model.predict = picky  # type: ignore[method-assign]
        assert asyncio.run(story(app)) == [200, 500, 200]


def test_bytes_are_completed_as_the_backbone_alone_would(tmp_path: Path) -> None:
    model = backbone(tmp_path / "lm")
    rows = [{"text": "def f(", "max_new_tokens": 5}, {"text": "x", "candidates": 2}, {"tokens": [START, 97, 98, 99]}]
    answers = ask(tmp_path / "lm", {"records": rows}).json()["predictions"]
    tokens = [START, *b"def f("]
    for _ in range(5):
        with torch.inference_mode():
            scores = torch.log_softmax(model(torch.tensor([tokens]))[0, -1], -1)
        tokens.append(int(scores[:257].argmax()))
    assert answers[0]["tokens"] == tokens[7:]
    assert answers[0]["completion"] == bytes(tokens[7:]).decode("utf-8", "replace")
    with torch.inference_mode():
        wanted = torch.log_softmax(model(torch.tensor([[START, ord("x")]]))[0, -1], -1)[:257].topk(2)
    assert [item["token"] for item in answers[1]["next"]] == wanted.indices.tolist()
    assert [item["log_probability"] for item in answers[1]["next"]] == pytest.approx(wanted.values.tolist(), abs=1e-4)
    assert (len(answers[2]["next"]), answers[2]["tokens"]) == (5, [])


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({}, "records.0.text"),
        ({"text": "a", "tokens": [1]}, "records.0.text"),
        ({"text": "é" * 16}, "records.0.text"),
        ({"tokens": [320]}, "records.0.tokens.0"),
        ({"tokens": []}, "records.0.tokens"),
        ({"tokens": [1] * 33}, "records.0.tokens"),
        ({"text": "a", "max_new_tokens": -1}, "records.0.max_new_tokens"),
        ({"text": "a", "candidates": 1000}, "records.0.candidates"),
    ],
)
def test_prompts_that_cannot_be_answered_are_named(tmp_path: Path, record: Any, field: str) -> None:
    backbone(tmp_path / "lm")
    answer = ask(tmp_path / "lm", {"records": [record]})
    assert (answer.status_code, answer.json()["field"]) == (422, field), answer.text


def test_a_completion_ends_where_the_context_does(tmp_path: Path) -> None:
    backbone(tmp_path / "lm")
    answer = ask(tmp_path / "lm", {"records": [{"text": "a" * 29, "max_new_tokens": 20}]}).json()
    assert len(answer["predictions"][0]["tokens"]) <= 2


@pytest.mark.parametrize("adapter", ["tokens", "events", "patches"])
def test_classes_have_the_probabilities_of_the_backbone(tmp_path: Path, adapter: str) -> None:
    shape = {"adapter": adapter, "head": "classification", "num_classes": 3, "causal": False, "patch_size": 2}
    model = backbone(tmp_path / "classes", **shape, num_channels=1, vocab_size=50)
    generator = np.random.default_rng(0)
    inputs: dict[str, list[Any]] = {
        "tokens": [[1, 2, 3], [4, 5], [6, 7, 8]],
        "events": [generator.normal(size=(size, 1)).tolist() for size in (4, 2, 4)],
        "patches": [generator.normal(size=(1, 4, 2, size)).tolist() for size in (2, 4, 2)],
    }
    name = {"tokens": "tokens", "events": "events", "patches": "volume"}[adapter]
    answers = ask(tmp_path / "classes", {"records": [{name: values} for values in inputs[adapter]]}).json()
    for values, found in zip(inputs[adapter], answers["predictions"], strict=True):
        x = torch.tensor([values], dtype=torch.int64 if adapter == "tokens" else torch.float32)
        with torch.inference_mode():
            wanted = torch.softmax(model(x)[0], -1)
        assert found["probabilities"] == pytest.approx(wanted.tolist(), abs=1e-5)
        assert found["class"] == int(wanted.argmax())


@pytest.mark.parametrize("volume", [[[[[1.0, 2.0, 3.0]] * 2] * 2], [[[[1.0, 2.0], [1.0]], [[1.0, 2.0]] * 2]]])
def test_volumes_without_whole_patches_are_refused(tmp_path: Path, volume: Any) -> None:
    backbone(tmp_path / "volumes", adapter="patches", head="classification", patch_size=2)
    answer = ask(tmp_path / "volumes", {"records": [{"volume": volume}]})
    assert answer.status_code == 422, answer.text
    assert answer.json()["field"].startswith("records.0.volume")


def test_a_model_answers_over_grpc_too(risk_folder: Path) -> None:
    with (
        served(risk_folder) as app,
        rpc_parts.served(app) as running,
        Client(running.http_address, api_key=KEY, timeout_s=5) as caller,
    ):
        assert caller.transport == "grpc"
        (found,) = caller.call("models.m.predict", {"records": [RECORD]})["predictions"]
        assert 0 <= found["probability"] <= 1
        assert caller.call("models.m")["kind"] == "risk"
        with pytest.raises(RequestError, match="amount"):
            caller.call("models.m.predict", {"records": [{"count 1d": 1}]})


def test_a_gpu_that_is_not_there_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (choose("auto").type, choose("cpu").type) == ("cpu", "cpu")
    with pytest.raises(EnvironmentProblemError, match="no GPU"):
        choose("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (choose("auto").type, choose("cpu").type, choose("cuda").type) == ("cuda", "cpu", "cuda")


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    for text in (None, "{", "[]", json.dumps({"format": "other/1"})):
        folder = tmp_path / "empty"
        folder.mkdir(exist_ok=True)
        if text is not None:
            (folder / "config.json").write_text(text)
        with pytest.raises(ModelFormatError, match="no model that can be served"), served(folder):
            pass
    with pytest.raises(ModelFormatError, match="There is no folder"), served(tmp_path / "nowhere"):
        pass


def test_a_name_must_fit_a_route(risk_folder: Path) -> None:
    with pytest.raises(ConfigError, match="--name"), served(risk_folder, name="a/b"):
        pass


def test_a_language_head_over_events_cannot_be_served(tmp_path: Path) -> None:
    backbone(tmp_path / "odd", adapter="events")
    with pytest.raises(ModelFormatError, match="no completion"), served(tmp_path / "odd"):
        pass

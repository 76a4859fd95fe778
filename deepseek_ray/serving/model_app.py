"""The HTTP face of a model server: one model, its routes and its description, made from its own signature."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from deepseek_ray.serving import openapi
from deepseek_ray.serving.asgi import AsgiApp, Receive, Response, Routes, Scope, json_response, read_body
from deepseek_ray.serving.auth import Keyring
from deepseek_ray.serving.batching import Batcher
from deepseek_ray.serving.deadline import NO_HURRY, Patience
from deepseek_ray.serving.model_records import Batch, Records
from deepseek_ray.serving.model_slot import Answers, ModelSlot
from deepseek_ray.serving.monitor import HttpMonitor


class ModelApp(AsgiApp):
    """ASGI application of one model.

    Args:
        slot: the version that serves; each takes the records that the first one takes.
        batcher: in front of a :class:`ModelWork` of the slot.
        max_rows: records a request.
        max_body_bytes: of a request.
        patience: deadlines of requests that name none.
        shutdown: called once when the server stops.
        standing: how this replica came to its version, for its description.
    """

    def __init__(
        self,
        slot: ModelSlot,
        batcher: Batcher[Batch, Answers],
        keys: Keyring,
        monitor: HttpMonitor,
        *,
        max_rows: int,
        max_body_bytes: int,
        shutdown: Callable[[], None],
        patience: Patience = NO_HURRY,
        standing: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._slot, self._batcher, self._standing = slot, batcher, standing
        self._records = Records(slot.live.model.columns, max_rows)
        self._max_body_bytes, self._patience = max_body_bytes, patience
        self._path = f"/v1/models/{slot.live.identity.name}"
        routes: Routes = {
            f"{self._path}/predict": {"POST": self._predict},
            self._path: {"GET": self._metadata},
            "/readyz": {"GET": self._readyz},
        }
        super().__init__(routes, keys, monitor, document=self._describe, shutdown=shutdown)

    async def _predict(self, scope: Scope, receive: Receive) -> Response:
        received_s = time.perf_counter()
        batch = self._records.parse(await read_body(scope, receive, self._max_body_bytes))
        self._slot.live.model.check(batch)
        scope["grant"].bucket.charge(batch.num_rows - 1)
        answers = await self._batcher.submit(
            batch,
            weight=batch.num_rows,
            arrived_s=received_s,
            deadline_s=self._patience.deadline_s(scope["headers"], received_s, batch.num_rows),
        )
        return Response(200, answers.body())

    async def _metadata(self, scope: Scope, receive: Receive) -> Response:
        live = self._slot.live
        inputs = [asdict(column) for column in live.model.columns]
        standing = self.without_folders(dict(self._standing()))
        about = {**asdict(live.identity), **live.model.facts, "since": live.since, **standing}
        return json_response({**about, "inputs": inputs, "answer": dict(live.model.answer)})

    async def _readyz(self, scope: Scope, receive: Receive) -> Response:
        return json_response({"status": "ready", "model_version": self._slot.live.identity.version})

    def _describe(self) -> dict[str, Any]:
        live = self._slot.live
        return describe(live.identity.name, self._path, self._records.json_schema(), live.model.answer)


def describe(name: str, path: str, record: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAPI 3.1 document of a model.

    Args:
        name: of the model.
        path: of its routes.
        record: JSON schema of one record.
        answer: JSON schema of one answer.
    """
    columns = {name: {"type": "array", "minItems": 1, "items": one} for name, one in record["properties"].items()}
    needed = {"required": record["required"]} if "required" in record else {}
    schemas = {
        "Record": record,
        "Columns": {"type": "object", "additionalProperties": False, "properties": columns, **needed},
        "Answer": answer,
        "Predictions": {
            "type": "object",
            "required": ["model", "version", "predictions"],
            "properties": {
                "model": {"type": "string"},
                "version": {"type": "string"},
                "predictions": {"type": "array", "items": openapi.ref("Answer")},
            },
        },
    }
    records = {"type": "array", "minItems": 1, "items": openapi.ref("Record")}
    body = {"oneOf": [_only("records", records), _only("columns", openapi.ref("Columns"))]}
    problems = tuple(code for code in openapi.BODY_PROBLEMS if code != "409")
    make = openapi.operation
    predict = f"{path}/predict"
    paths = {
        predict: {"post": make(predict, "Predict", problems, body=body, answer=openapi.ref("Predictions"))},
        path: {"get": make(path, "What is served, and what it takes", ("401",))},
        "/healthz": {"get": make("/healthz", "The process is alive", ())},
        "/readyz": {"get": make("/readyz", "The service takes traffic", ("503",))},
        "/metrics": {"get": make("/metrics", "Prometheus metrics", ("401",))},
    }
    return openapi.assemble(f"deepseek_ray model {name}", paths, schemas)


def _only(key: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": [key], "additionalProperties": False, "properties": {key: schema}}

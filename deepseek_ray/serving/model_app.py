"""The HTTP face of a model server: one model, its routes and its description, made from its own signature."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from deepseek_ray.logs import get_logger
from deepseek_ray.serving import openapi
from deepseek_ray.serving.asgi import AsgiApp, Receive, Response, Routes, Scope, json_response, read_body
from deepseek_ray.serving.auth import Keyring
from deepseek_ray.serving.batching import Batcher
from deepseek_ray.serving.deadline import NO_HURRY, Patience
from deepseek_ray.serving.model_kinds import ServedModel
from deepseek_ray.serving.model_records import Batch, Records
from deepseek_ray.serving.monitor import HttpMonitor

logger = get_logger(__name__)


@dataclass(frozen=True)
class ModelIdentity:
    """What is served, in words.

    Args:
        name: in the routes.
        version: number in the registry, or "".
        run_id: the run that made it, or "".
        source: URI or folder, as it was named.
    """

    name: str
    version: str
    run_id: str
    source: str


class ModelWork:
    """Runs batches on the model; a batch that fails is run request by request, so that one cannot fail another."""

    def __init__(self, model: ServedModel, monitor: HttpMonitor) -> None:
        self._model, self._monitor = model, monitor

    def run(self, requests: Sequence[Batch]) -> list[Sequence[Any] | Exception]:
        """Each request's answers, or what went wrong with it."""
        try:
            return self._together(requests)
        except Exception as error:
            if len(requests) == 1:
                return [error]
            logger.warning("a batch of %d requests failed (%s); they run one by one", len(requests), error)
            return [result for request in requests for result in self.run([request])]

    def _together(self, requests: Sequence[Batch]) -> list[Sequence[Any] | Exception]:
        batch = Batch.joined(requests)
        with self._monitor.timed("model"):
            answers = self._model.predict(batch)
        assert len(answers) == batch.num_rows, f"{len(answers)} answers for {batch.num_rows} rows"
        self._monitor.batch_size.observe(batch.num_rows)
        parts: list[Sequence[Any] | Exception] = []
        start = 0
        for request in requests:
            parts.append(answers[start : start + request.num_rows])
            start += request.num_rows
        return parts


class ModelApp(AsgiApp):
    """ASGI application of one model.

    Args:
        model: loaded.
        identity: what it is.
        batcher: in front of a :class:`ModelWork` of the model.
        max_rows: records a request.
        max_body_bytes: of a request.
        patience: deadlines of requests that name none.
        shutdown: called once when the server stops.
    """

    def __init__(
        self,
        model: ServedModel,
        identity: ModelIdentity,
        batcher: Batcher[Batch, Sequence[Any]],
        keys: Keyring,
        monitor: HttpMonitor,
        *,
        max_rows: int,
        max_body_bytes: int,
        shutdown: Callable[[], None],
        patience: Patience = NO_HURRY,
    ) -> None:
        self._model, self._identity, self._batcher = model, identity, batcher
        self._records = Records(model.columns, max_rows)
        self._max_body_bytes, self._patience = max_body_bytes, patience
        self._head = b'{"model":%b,"version":%b,"predictions":' % (
            orjson.dumps(identity.name),
            orjson.dumps(identity.version),
        )
        self._path = f"/v1/models/{identity.name}"
        self._since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        routes: Routes = {
            f"{self._path}/predict": {"POST": self._predict},
            self._path: {"GET": self._metadata},
            "/readyz": {"GET": self._readyz},
        }
        super().__init__(routes, keys, monitor, document=self._describe, shutdown=shutdown)

    async def _predict(self, scope: Scope, receive: Receive) -> Response:
        received_s = time.perf_counter()
        batch = self._records.parse(await read_body(scope, receive, self._max_body_bytes))
        self._model.check(batch)
        scope["grant"].bucket.charge(batch.num_rows - 1)
        answers = await self._batcher.submit(
            batch,
            weight=batch.num_rows,
            arrived_s=received_s,
            deadline_s=self._patience.deadline_s(scope["headers"], received_s, batch.num_rows),
        )
        return Response(200, self._head + orjson.dumps(list(answers)) + b"}")

    async def _metadata(self, scope: Scope, receive: Receive) -> Response:
        inputs = [asdict(column) for column in self._model.columns]
        about = {**asdict(self._identity), **self._model.facts, "since": self._since}
        return json_response({**about, "inputs": inputs, "answer": dict(self._model.answer)})

    async def _readyz(self, scope: Scope, receive: Receive) -> Response:
        return json_response({"status": "ready", "model_version": self._identity.version})

    def _describe(self) -> dict[str, Any]:
        return describe(self._identity.name, self._path, self._records.json_schema(), self._model.answer)


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

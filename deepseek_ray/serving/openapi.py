"""The API's description, generated from the pydantic records, and a page that shows it without any other host."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from deepseek_ray.data.events import Feedback, Prediction, Transaction
from deepseek_ray.serving.deadline import MAX_TIMEOUT_MS
from deepseek_ray.serving.wire import ThresholdChange

OPEN_ROUTES = frozenset({"/healthz", "/readyz"})
"""Routes that ask for no key."""

_PROBLEMS = {
    "400": "The body is not JSON, or names a field twice.",
    "401": "The API key is missing, wrong or expired.",
    "403": "The API key's scope is too small.",
    "404": "The prediction is unknown.",
    "408": "The body did not arrive in time.",
    "409": "A stale event, a transaction id with another content, or a label that contradicts an earlier one.",
    "413": "Too many records or bytes.",
    "415": "The body is compressed.",
    "422": "A field is missing, unknown, of the wrong type or out of range.",
    "429": "The queue is full, or the key's rate is used up; Retry-After says when to come back.",
    "503": "Too late for the request's deadline, or a store is not usable; Retry-After says when to come back.",
}
BODY_PROBLEMS = ("400", "401", "403", "408", "409", "413", "415", "422", "429", "503")
_ROUTES: tuple[tuple[str, str, str, str, tuple[str, ...]], ...] = (
    ("/v1/risk/score", "post", "Score one transaction, or many in order.", "score", BODY_PROBLEMS),
    ("/v1/risk/feedback", "post", "Send labels, any time later; idempotent.", "feedback", ("404", *BODY_PROBLEMS)),
    ("/v1/risk/threshold", "post", "Change the live version's decision threshold.", "threshold", BODY_PROBLEMS),
    ("/v1/risk/model", "get", "The version that serves, and since when", "", ("401", "429")),
    ("/healthz", "get", "The process is alive", "", ()),
    ("/readyz", "get", "The service takes traffic", "", ("503",)),
    ("/metrics", "get", "Prometheus metrics", "", ("401", "429")),
)


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1 document of the service."""
    models = (Transaction, Prediction, Feedback, ThresholdChange)
    template = "#/components/schemas/{model}"
    _, definitions = models_json_schema([(m, "validation") for m in models], ref_template=template)
    return assemble(
        "deepseek_ray risk service",
        {path: {method: _operation(*rest, path=path)} for path, method, *rest in _ROUTES},
        {**definitions["$defs"], **_wrappers()},
    )


def assemble(title: str, paths: Mapping[str, Any], schemas: Mapping[str, Any]) -> dict[str, Any]:
    """A document of a service that takes the API key, with the schema ``Problem`` among the others."""
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": "1"},
        "security": [{"key": []}, {"bearer": []}],
        "paths": dict(paths),
        "components": {
            "schemas": {**schemas, "Problem": _PROBLEM},
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _operation(summary: Any, body: Any, problems: Any, *, path: str) -> dict[str, Any]:
    return operation(path, summary, problems, body=_BODIES.get(body), answer=_ANSWERS.get(body))


def operation(
    path: str, summary: str, problems: Sequence[str], *, body: Any = None, answer: Any = None
) -> dict[str, Any]:
    """One method of one path.

    Args:
        path: decides whether the key is asked for.
        summary: one line.
        problems: status codes of refusals.
        body: JSON schema of the request's body, None for none.
        answer: JSON schema of the answer.
    """
    done = {"200": {"description": "Done.", **_content(answer)}}
    operation: dict[str, Any] = {"summary": summary, "responses": done | {code: _problem(code) for code in problems}}
    if body:
        operation["description"] = _TIMEOUT
        operation["requestBody"] = {"required": True, **_content(body)}
    if path in OPEN_ROUTES:
        operation["security"] = []
    return operation


def ref(name: str) -> dict[str, str]:
    """The schema of that name."""
    return {"$ref": f"#/components/schemas/{name}"}


def _list(key: str, name: str) -> dict[str, Any]:
    items = {"type": "array", "minItems": 1, "items": ref(name)}
    return {"type": "object", "required": [key], "additionalProperties": False, "properties": {key: items}}


_TIMEOUT = (
    "The header X-Request-Timeout-Ms says how long the answer is worth having, in milliseconds from arrival (above 0, "
    f"at most {MAX_TIMEOUT_MS}). What would be later is answered with 503 and Retry-After, and no work is done."
)
"""In words and not as a parameter: a made-up time would make 503 a usual answer."""
_BODIES: dict[str, Any] = {
    "score": {"oneOf": [ref("Transaction"), _list("transactions", "Transaction")]},
    "feedback": {"oneOf": [ref("Feedback"), _list("feedback", "Feedback")]},
    "threshold": ref("ThresholdChange"),
}
_ANSWERS: dict[str, Any] = {
    "score": {"oneOf": [ref("Prediction"), _list("predictions", "Prediction")]},
    "feedback": ref("FeedbackAnswer"),
}


def _wrappers() -> dict[str, Any]:
    count = {"type": "integer", "minimum": 0}
    return {
        "FeedbackAnswer": {"type": "object", "properties": {"accepted": count, "repeated": count}},
    }


_PROBLEM: dict[str, Any] = {
    "type": "object",
    "description": "RFC 9457 problem details",
    "properties": {name: {"type": "string"} for name in ("type", "title", "detail", "field", "fix")}
    | {name: {"type": "integer"} for name in ("status", "error_count")}
    | {"errors": {"type": "array", "items": {"type": "object"}}},
}


def _content(schema: Any) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}} if schema else {}


def _problem(code: str) -> dict[str, Any]:
    return {"description": _PROBLEMS[code], "content": {"application/problem+json": {"schema": ref("Problem")}}}


def page(described: Mapping[str, Any]) -> str:
    """An OpenAPI document as one HTML page without scripts or foreign resources."""
    title = html.escape(described["info"]["title"])
    routes = [_route_html(path, *entry) for path, item in described["paths"].items() for entry in item.items()]
    schemas = [_folded(name, schema) for name, schema in described["components"]["schemas"].items()]
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title><style>"
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "pre{background:#f4f4f4;padding:.7rem;overflow:auto}code{background:#f4f4f4}td{padding:.1rem .8rem .1rem 0}"
        f"</style></head><body><h1>{title}</h1><p>Send the API key as <code>X-API-Key</code> or "
        "<code>Authorization: Bearer</code>. The same as data: <a href='/openapi.json'>openapi.json</a>.</p>"
        f"{''.join(routes)}<h2>Records</h2>{''.join(schemas)}</body></html>"
    )


def _route_html(path: str, method: str, operation: dict[str, Any]) -> str:
    answers = operation["responses"].items()
    rows = "".join(f"<tr><td>{code}</td><td>{html.escape(answer['description'])}</td></tr>" for code, answer in answers)
    body = operation.get("requestBody")
    shown = _folded("Body", body["content"]["application/json"]["schema"]) if body else ""
    text = " ".join(operation[part] for part in ("summary", "description") if part in operation)
    title = f"<h2><code>{method.upper()} {path}</code></h2><p>{html.escape(text)}</p>"
    return f"{title}{shown}<table>{rows}</table>"


def _folded(title: str, schema: Any) -> str:
    text = html.escape(json.dumps(schema, indent=2, ensure_ascii=False))
    return f"<details><summary>{html.escape(title)}</summary><pre>{text}</pre></details>"

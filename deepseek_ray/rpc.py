"""The wire of remote calls, for client and server: names, messages, status codes. ``rpc.proto`` tells other languages.

The messages are built from their descriptors here: generated code would tie the package to the protobuf release that
generated it.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from deepseek_ray.errors import RequestError

PACKAGE = "deepseek_ray.v1"
SERVICE = f"{PACKAGE}.Rpc"
CALL = f"/{SERVICE}/Call"
STATUS_KEY = "http-status"
PROBLEM_KEY = "problem-bin"
TIMEOUT_HEADER = "x-request-timeout-ms"
"""Milliseconds from a request's arrival after which its sender does not want the answer any more. HTTP says them by
this header, gRPC in its own way; the routes read the header."""
MAX_TIMEOUT_S = 600.0
"""The longest time that a call may be allowed."""
MAX_PROBLEM_BYTES = 6_000
"""Of the problem body in the trailing metadata: gRPC allows 8 KiB for all of it."""

MESSAGES: dict[str, dict[str, str]] = {
    "CallRequest": {"method": "string", "payload": "bytes"},
    "CallReply": {"payload": "bytes"},
}
"""Message -> field -> type; fields are numbered from 1 in their order."""

_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    409: "FAILED_PRECONDITION",
    413: "INVALID_ARGUMENT",
    422: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def grpc_code(status: int) -> str:
    """Name of the gRPC status code that says the same as an HTTP status."""
    return _CODES.get(status, "INVALID_ARGUMENT" if 400 <= status < 500 else "INTERNAL")


def path_of(method: str) -> str:
    """The HTTP path behind a call's name: ``risk.score`` -> ``/v1/risk/score``.

    Raises:
        RequestError: the name has an empty part.
    """
    parts = method.split("/" if "/" in method else ".")
    if not all(parts):
        raise RequestError(
            f"{method[:80]!r} names no call.", status=404, kind="unknown-route", fix="write it as 'risk.score'"
        )
    return "/v1/" + "/".join(parts)


def _classes() -> tuple[Any, ...]:
    file = descriptor_pb2.FileDescriptorProto(name="deepseek_ray/rpc.proto", package=PACKAGE, syntax="proto3")
    for message, fields in MESSAGES.items():
        made = file.message_type.add(name=message)
        for number, (name, kind) in enumerate(fields.items(), 1):
            type_number = descriptor_pb2.FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
            label = descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL
            made.field.add(name=name, number=number, type=type_number, label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return tuple(message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in MESSAGES)


CallRequest, CallReply = _classes()

"""Every error that deepseek_ray raises on purpose.

    DeepseekRayError
    ├── ConfigError            a setting is unknown or out of range
    ├── DataError              input data cannot be used
    │   ├── SchemaError        a column is missing or has the wrong type
    │   └── IngestError        a file is empty, unreadable or wholly invalid, or the run takes no more
    ├── FeatureError           features cannot be computed, stored or served
    │   └── StaleEventError    an event is older than its card's last event
    ├── CheckpointError        a checkpoint is torn, tampered with or missing
    ├── DivergedError          training left the numbers
    ├── ModelFormatError       a saved model does not match its own description
    ├── RegistryError          the registry refused or is unavailable
    │   ├── RegistryUnavailableError
    │   ├── GateRefusedError   a version did not pass the promotion gate
    │   └── ProtectedVersionError  the version stands behind an alias
    ├── ServingError           a request cannot be served
    │   ├── RequestError       the request is wrong (HTTP 4xx)
    │   ├── OverloadedError    no room now: the queue is full, or a rate is used up (HTTP 429)
    │   │   └── LateError      it would be answered after its deadline: not done (HTTP 503)
    │   ├── UnreachableError   no connection to the service, or it broke
    │   │   └── WrongAddressError  what answers there is not the service, or cannot prove that it is
    │   ├── ClosedError        a client was used after its end
    │   └── DeadlineError      the caller's deadline passed before the answer
    └── EnvironmentProblemError  a port, disk, tool or credential is not usable

Each message names the field, its present value and the fix. All of them pickle, because Ray
moves exceptions between processes.
"""

from __future__ import annotations

from typing import Any


class DeepseekRayError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what went wrong, with the field and its value.
        fix: what the reader can do about it, one sentence.
    """

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} Fix: {self.fix}" if self.fix else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.__dict__)


def first_line(error: BaseException) -> str:
    """The first line that a foreign error says, else its name: messages of ours have one line."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__


def _rebuild(cls: type[DeepseekRayError], message: str, state: dict[str, Any]) -> DeepseekRayError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class ConfigError(DeepseekRayError):
    """A setting is unknown or out of range."""


class DataError(DeepseekRayError):
    """Input data cannot be used."""


class SchemaError(DataError):
    """A column is missing or has the wrong type."""


class IngestError(DataError):
    """A file is empty, unreadable or wholly invalid, or the run takes no more data."""


class FeatureError(DeepseekRayError):
    """Features cannot be computed, stored or served."""


class StaleEventError(FeatureError):
    """An event is older than its card's last event."""


class CheckpointError(DeepseekRayError):
    """A checkpoint is torn, tampered with or missing."""


class DivergedError(DeepseekRayError):
    """Training left the numbers: a loss or a gradient is not finite."""


class ModelFormatError(DeepseekRayError):
    """A saved model does not match its own description."""


class RegistryError(DeepseekRayError):
    """The model registry refused, or is unavailable."""


class RegistryUnavailableError(RegistryError):
    """The tracking store is missing, locked or not answering."""


class GateRefusedError(RegistryError):
    """A model version did not pass the promotion gate."""


class ProtectedVersionError(RegistryError):
    """A model version stands behind an alias and may not be deleted."""


class ServingError(DeepseekRayError):
    """A request cannot be served."""


class RequestError(ServingError):
    """The request is wrong; carries what an HTTP problem body (RFC 9457) needs.

    Args:
        message: human-readable detail.
        status: HTTP status code, 400-499.
        kind: short machine-readable problem type, e.g. ``"invalid-field"``.
        field: dotted path of the offending field, or "".
        fix: what the client can do about it.
    """

    def __init__(
        self, message: str, *, status: int = 422, kind: str = "invalid-request", field: str = "", fix: str = ""
    ) -> None:
        super().__init__(message, fix=fix)
        self.status = status
        self.kind = kind
        self.field = field


class OverloadedError(ServingError):
    """No room now: the request queue is full, or a key's rate is used up; retry later.

    Args:
        message: what is full.
        fix: what the client can do about it.
        kind: short machine-readable problem type.
        retry_after_s: when to come back; rounded up to whole seconds, at least one.
    """

    def __init__(self, message: str, *, fix: str = "", kind: str = "overloaded", retry_after_s: float = 1.0) -> None:
        super().__init__(message, fix=fix)
        self.kind = kind
        self.retry_after_s = retry_after_s


class LateError(OverloadedError):
    """The answer would come after the request's deadline, so the work was not done; retry later."""


class UnreachableError(ServingError):
    """There is no connection to the service, or it broke before the answer."""


class WrongAddressError(UnreachableError):
    """What answers at the address is not the service, or has no certificate that is trusted."""


class ClosedError(ServingError):
    """A client was used after it had been closed."""


class DeadlineError(ServingError):
    """The caller's deadline passed before the answer; the service may still have done what was asked."""


class EnvironmentProblemError(DeepseekRayError):
    """A port, disk, tool or credential is not usable."""

"""Requests to a model server: records or columns in, checked against the model's columns, columns out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from deepseek_ray.registry.columns import Column
from deepseek_ray.serving.duplicate_keys import check_quotes
from deepseek_ray.serving.problem import FieldErrors, field_error, field_errors
from deepseek_ray.serving.wire import check_count, load_json
from deepseek_ray.serving.wording import json_type

MAX_TEXT_CHARS = 1 << 20
_WHOLE = {"long": 2**63, "integer": 2**31}


@dataclass(frozen=True)
class Batch:
    """Rows as columns, each of ``num_rows`` values; None where an optional value is absent."""

    columns: Mapping[str, list[Any]]
    num_rows: int

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch:
        """The rows of several batches, in their order."""
        if len(batches) == 1:
            return batches[0]
        parts = zip(*(batch.columns.values() for batch in batches), strict=True)
        values = (list(chain.from_iterable(of_a_column)) for of_a_column in parts)
        return cls(dict(zip(batches[0].columns, values, strict=True)), sum(batch.num_rows for batch in batches))

    def resized(self, size: int) -> Batch:
        """The first ``size`` rows, the last one repeated where there are fewer; rows do not see each other."""
        if size == self.num_rows:
            return self
        more = max(0, size - self.num_rows)
        return Batch({name: values[:size] + values[-1:] * more for name, values in self.columns.items()}, size)


class Records:
    """What a model's records must look like.

    Args:
        columns: the model's input.
        max_rows: records a request.
    """

    def __init__(self, columns: Sequence[Column], max_rows: int) -> None:
        self._names = [column.name for column in columns]
        self._max_rows = max_rows
        fields: dict[str, Any] = {f"c{number}": _field(column) for number, column in enumerate(columns)}
        settings = ConfigDict(extra="forbid", strict=True, title="Record")
        self._record = create_model("Record", __config__=settings, **fields)
        self._many = TypeAdapter(list[self._record])  # type: ignore[name-defined]

    def parse(self, body: bytes) -> Batch:
        """The rows of ``{"records": [{...}, ...]}`` or ``{"columns": {name: [...], ...}}``.

        Raises:
            RequestError: 400 malformed, 413 too many rows, 422 wrong fields.
        """
        key, value = _one_of(load_json(body))
        rows = value if key == "records" else self._rows(value)
        if not rows:
            raise FieldErrors([field_error(key, value, "no row", "send at least one")])
        check_count(len(rows), self._max_rows, key)
        batch = self._checked(rows)
        names = sum(map(len, rows)) if key == "records" else len(value)
        check_quotes(body, 2 + 2 * names)  # strings among the values cost a second look
        return batch

    def json_schema(self) -> dict[str, Any]:
        """JSON schema of one record."""
        return self._record.model_json_schema()

    def _checked(self, rows: list[Any]) -> Batch:
        try:
            records: list[BaseModel] = self._many.validate_python(rows)
        except ValidationError as error:
            raise FieldErrors(field_errors(error, "records")) from None
        values = zip(*(record.__dict__.values() for record in records), strict=True)  # in the order of the fields
        return Batch(dict(zip(self._names, map(list, values), strict=True)), len(records))

    def _rows(self, columns: Any) -> list[dict[str, Any]]:
        lists = _lists(columns)
        sizes = {name: len(values) for name, values in lists.items()}
        if len(set(sizes.values())) > 1:
            shortest, longest = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
            detail = f"{sizes[shortest]} values, but {longest!r} has {sizes[longest]}"
            raise FieldErrors([field_error(f"columns.{shortest}", lists[shortest], detail, "send as many for each")])
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _one_of(loaded: Any) -> tuple[str, Any]:
    fix = 'send {"records": [{...}]} or {"columns": {"name": [...]}}'
    if not isinstance(loaded, dict):
        raise FieldErrors([field_error("", loaded, f"{json_type(loaded)}, not an object", fix)])
    if len(loaded) != 1 or not loaded.keys() <= {"records", "columns"}:
        odd = next((key for key in loaded if key not in ("records", "columns")), "")
        raise FieldErrors([field_error(odd, loaded.get(odd), "not one of records and columns", fix)])
    key, value = next(iter(loaded.items()))
    if key == "records" and not isinstance(value, list):
        raise FieldErrors([field_error(key, value, f"{json_type(value)}, not an array", fix)])
    return key, value


def _lists(columns: Any) -> dict[str, list[Any]]:
    if not isinstance(columns, dict):
        detail = f"{json_type(columns)}, not an object"
        raise FieldErrors([field_error("columns", columns, detail, "send a list of values for each column's name")])
    for name, values in columns.items():
        if not isinstance(values, list):
            detail = f"{json_type(values)}, not an array"
            raise FieldErrors([field_error(f"columns.{name}", values, detail, "send a list, one value a row")])
    return columns


def _field(column: Column) -> tuple[Any, Any]:
    kind: Any = _value(column)
    for fewest, most in reversed(column.sizes):
        kind = Annotated[list[kind], Field(min_length=fewest, max_length=most)]
    text = column.text or None
    if column.required:
        return kind, Field(alias=column.name, title=column.name, description=text)
    return kind | None, Field(None, alias=column.name, title=column.name, description=text)


def _value(column: Column) -> Any:
    low, high = column.minimum, column.maximum
    if column.type in ("double", "float"):
        return Annotated[float, Field(ge=low, le=high, allow_inf_nan=False)]
    if column.type in _WHOLE:
        end = _WHOLE[column.type]
        return Annotated[int, Field(ge=-end if low is None else int(low), le=end - 1 if high is None else int(high))]
    return bool if column.type == "boolean" else Annotated[str, Field(max_length=MAX_TEXT_CHARS)]

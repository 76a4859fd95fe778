"""What a model takes, in plain terms: named columns with types, whoever wrote the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

ColumnType = Literal["double", "float", "long", "integer", "boolean", "string"]
COLUMN_TYPES: tuple[str, ...] = get_args(ColumnType)


@dataclass(frozen=True)
class Column:
    """One named input.

    Args:
        name: as the model knows it.
        type: of one value, in MLflow's words.
        required: whether each record must have it.
        sizes: (fewest, most) items of each level of a nested list, outermost first, None for any number; () for a
            single value.
        minimum: smallest number allowed, None for any; maximum likewise.
        text: what it is, one line.
    """

    name: str
    type: ColumnType
    required: bool = True
    sizes: tuple[tuple[int, int | None], ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    text: str = ""

"""What a loaded model must show before it serves: answers to its own example, in every batch size that it will meet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deepseek_ray.errors import ModelFormatError
from deepseek_ray.logs import get_logger
from deepseek_ray.serving.model_records import Batch

logger = get_logger(__name__)

TIMES = 3
"""Without buckets: the first calls of a library find out more than the first one."""


@dataclass(frozen=True)
class Example:
    """Rows to rehearse with.

    Args:
        rows: at least one.
        made_up: from the signature alone, so that a sound model of another library may refuse them.
    """

    rows: Batch
    made_up: bool = False


class Rehearsed(Protocol):
    """What is asked of a model."""

    def check(self, batch: Batch) -> None: ...
    def predict(self, batch: Batch) -> Sequence[Any]: ...
    def example(self) -> Example: ...


def rehearse(model: Rehearsed, buckets: Sequence[int] = ()) -> None:
    """Let a model answer its example, so that it is checked and no request pays for a first time.

    Args:
        model: loaded; stored probabilities of a version of ours were compared when it was.
        buckets: sizes of batches that it will be given.

    Raises:
        ModelFormatError: it fails, answers too many or too few rows, or something that is no finite number.
    """
    example = model.example()
    sizes = [example.rows.num_rows, *(buckets or [1] * (TIMES - 1))]
    try:
        problem = next(filter(None, (_problem(model, example.rows.resized(size)) for size in sizes)), "")
    except Exception as error:  # whatever a library raises about its own example: it is not to serve
        problem = f"fails with {type(error).__name__}: {str(error)[:500]}"
    if problem and not example.made_up:
        raise ModelFormatError(f"On its own example the model {problem}.", fix="register a version that answers it")
    if problem:
        logger.warning("on a row made up from its signature the model %s; log it with an input_example", problem)


def _problem(model: Rehearsed, rows: Batch) -> str:
    model.check(rows)
    answers = model.predict(rows)
    if len(answers) != rows.num_rows:
        return f"gives {len(answers)} answers for {rows.num_rows} rows"
    return "" if _is_finite(list(answers)) else f"answers what is no finite number: {str(list(answers))[:200]}"


def _is_finite(tree: Any) -> bool:
    if isinstance(tree, Mapping):
        return all(map(_is_finite, tree.values()))
    if isinstance(tree, list | tuple):
        return all(map(_is_finite, tree))
    return not isinstance(tree, float) or math.isfinite(tree)

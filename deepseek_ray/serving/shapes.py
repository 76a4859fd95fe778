"""Batches in few shapes: a compiled model compiles once a shape, not once a size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from deepseek_ray.serving.batch_control import pad_to
from deepseek_ray.serving.commands import FloatArray


def padded(
    compute: Callable[[FloatArray, FloatArray], FloatArray],
    values: FloatArray,
    sequence: FloatArray,
    buckets: Sequence[int],
) -> FloatArray:
    """What ``compute`` gives for the rows, run with as many rows as the nearest bucket has.

    The last row is repeated to fill up: rows do not see each other, so what is added changes nothing but the shape.

    Args:
        compute: float64[n, ...] of values and sequence.
        values: float64[n, F], n > 0.
        sequence: float64[n, N, C].
        buckets: ascending; none to leave the size as it is.
    """
    rows = len(values)
    more = pad_to(rows, buckets) - rows
    if not more:
        return compute(values, sequence)
    filled = [np.concatenate([part, np.repeat(part[-1:], more, axis=0)]) for part in (values, sequence)]
    return compute(filled[0], filled[1])[:rows]

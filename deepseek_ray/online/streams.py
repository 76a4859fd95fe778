"""Did a stream change, and when? ADWIN over scores, errors and labels in the order of events.

ADWIN (Bifet and Gavalda 2007, "Learning from time-changing data with adaptive windowing") keeps a window that it cuts
wherever two parts of it have means that differ by more than chance; River's implementation. It needs no size of window
and no guess of how fast a change is, and its chance of a false alarm is bounded by ``delta``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class StreamResult:
    """What became of one stream.

    Args:
        name: "score", "error" or "label".
        num_values: live values looked at.
        changes: how often the mean changed within them.
        since_us: event time from which on the newest mean holds, to within one of ADWIN's buckets (an eighth of what it
            has seen, or so); None without a change.
        before: mean before that change, the beginning of the stream included; the mean of all without one.
        after: mean since.
    """

    name: str
    num_values: int
    changes: int
    since_us: int | None
    before: float
    after: float

    @property
    def rose(self) -> bool:
        """There was a change, and the mean went up."""
        return self.since_us is not None and self.after > self.before


def follow(
    name: str, history: npt.ArrayLike, live: npt.ArrayLike, order_us: npt.ArrayLike, *, delta: float
) -> StreamResult:
    """Let ADWIN run over known values and then over live ones; only changes that it finds among the live ones count.

    Args:
        name: of the stream.
        history: (h,) values in [0, 1] from before, oldest first, so that a change at the very start is seen.
        live: (n,) values in [0, 1], oldest first, n >= 1.
        order_us: (n,) their event times.
        delta: bound on the chance of a false alarm.
    """
    from river.drift import ADWIN  # only who follows a stream needs it

    known, new = (np.asarray(values, dtype=np.float64) for values in (history, live))
    values, detector = np.concatenate([known, new]), ADWIN(delta=delta)
    starts: list[int] = []
    begin = 0
    for index, value in enumerate(values.tolist()):
        detector.update(value)
        if detector.drift_detected and index >= known.size:
            begin = starts[-1] if starts else 0
            starts.append(index + 1 - int(detector.width))
    if not starts:
        return StreamResult(name, new.size, 0, None, float(values.mean()), float(values.mean()))
    # a cut may lie so early that all live values belong to the new mean
    start = starts[-1]
    since_us = int(np.asarray(order_us)[max(0, start - known.size)])
    before = values[begin:start] if start > begin else values[:start]
    return StreamResult(name, new.size, len(starts), since_us, float(before.mean()), float(values[start:].mean()))

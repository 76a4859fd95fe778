"""Compaction on a schedule: every so often the prediction log is moved into parquet, by a process of its own.

It only reads the log; what it has moved is dropped by the log's one writer, so that no request waits for a lock. As a
program it is ``python -m deepseek_ray.serving.compaction RUN``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from deepseek_ray.data.prediction_archive import compact, read_manifest
from deepseek_ray.errors import DeepseekRayError
from deepseek_ray.logs import get_logger
from deepseek_ray.paths import RunPaths
from deepseek_ray.serving.background import BackgroundProgram

logger = get_logger(__name__)

_NICENESS = 10


class Compactor(BackgroundProgram):
    """Compacts a run's log in the background; one that is cut short is taken up by the next.

    Args:
        paths: the run.
        every_s: see ``BackgroundProgram``.
        archived: told the last row number that the archive holds, after each.
        program: what to run, for tests.
    """

    def __init__(
        self,
        paths: RunPaths,
        every_s: float,
        archived: Callable[[int], None],
        *,
        program: Sequence[str] = ("-m", __name__),
    ) -> None:
        super().__init__("compaction", every_s, logger)
        self._paths = paths
        self._archived = archived
        self._program = program

    def arguments(self) -> Sequence[str]:
        """The program and the run folder."""
        return [*self._program, str(self._paths.root)]

    def done(self, said: str) -> None:
        """Tell how far the archive reaches now."""
        self._archived(read_manifest(self._paths.prediction_archive).last("predictions"))


def main(argv: Sequence[str]) -> int:
    """Compact one run at a low priority; status 2 with one line when it cannot be done."""
    os.nice(_NICENESS)
    try:
        compact(RunPaths(Path(argv[0])))
    except DeepseekRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

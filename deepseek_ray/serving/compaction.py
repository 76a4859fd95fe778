"""Compaction on a schedule: every so often the prediction log is moved into parquet, by a process of its own.

A process and not a thread: turning rows into parquet holds the interpreter for longer than a request may take. It only
reads the log; what it has moved is dropped by the log's one writer, so that no request waits for a lock. As a program
it is ``python -m deepseek_ray.serving.compaction RUN``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from deepseek_ray.data.prediction_archive import compact, read_manifest
from deepseek_ray.errors import DeepseekRayError
from deepseek_ray.logs import get_logger
from deepseek_ray.paths import RunPaths

logger = get_logger(__name__)

_NICENESS = 10
_POLL_S = 0.2


class Compactor:
    """Compacts a run's log in the background; one that fails is told in the log and tried again the next time.

    Args:
        paths: the run.
        every_s: seconds between the end of one compaction and the start of the next; 0 never starts any.
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
        self._paths = paths
        self._archived = archived
        self._command = [sys.executable, *program, str(paths.root)]
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="compactor", daemon=True)

    def start(self) -> None:
        """Begin to wait for the first one."""
        if self._every_s > 0:
            self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop; a compaction under way is cut short, and the next one takes up what it left."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self._compact()
            except (OSError, DeepseekRayError):
                logger.exception("compaction failed, trying again in %g s", self._every_s)

    def _compact(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with subprocess.Popen(self._command, env=environment, stderr=subprocess.PIPE, text=True) as child:
            while True:
                try:
                    said = child.communicate(timeout=_POLL_S)[1]
                    break
                except subprocess.TimeoutExpired:
                    if self._stop.is_set():
                        child.terminate()
        if not child.returncode:
            self._archived(read_manifest(self._paths.prediction_archive).last("predictions"))
        elif not self._stop.is_set():
            last = said.strip().splitlines()[-1:] or [f"status {child.returncode}"]
            logger.error("compaction failed, trying again in %g s: %s", self._every_s, last[0])


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

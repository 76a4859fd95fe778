"""From one feature vector to another while the service answers.

Each vector has states of its own in the store. A process beside the service fills those of the new vector: with the
history that the old ones were warmed with, and with every event and label of the prediction log. The service's worker
then takes in the few that came meanwhile, and goes on with the new vector from one batch to the next. As a program it
is ``python -m deepseek_ray.serving.handover RUN`` with the rest on its standard input, where no one else can read it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from deepseek_ray.child import run_python
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.prediction_log import PredictionLog
from deepseek_ray.data.state import AnyStore
from deepseek_ray.data.stream_engine import StreamEngine
from deepseek_ray.data.windows import Declaration
from deepseek_ray.errors import FeatureError, ServingError
from deepseek_ray.logs import get_logger
from deepseek_ray.paths import RunPaths, exclusive
from deepseek_ray.serving.champion import InputContract
from deepseek_ray.serving.live_features import LiveFeatures

logger = get_logger(__name__)

_NICENESS = 10


@dataclass(frozen=True)
class Wanted:
    """The states that are wanted.

    Attributes:
        vector: name in the declaration.
        sequence_len: of the card's recent events.
        label_delay_days: after which a label counts.
        before: feature service whose history the new one takes over.
        online_store: address of the store, "" for the run's own.
    """

    vector: str
    sequence_len: int
    label_delay_days: float
    before: str
    online_store: str


def engine_maker(declaration: Declaration, contract: InputContract) -> Callable[[AnyStore], StreamEngine]:
    """Makes engines of a contract over a store."""

    def make(store: AnyStore) -> StreamEngine:
        return StreamEngine(
            declaration,
            contract.vector,
            store,
            label_delay_days=contract.label_delay_days,
            sequence_len=contract.sequence_len,
        )

    return make


def check(before: InputContract, after: InputContract) -> None:
    """Make sure that two contracts can take turns without a restart.

    Raises:
        FeatureError: they share their states and keep them for other spans of time.
    """
    if before.vector.service == after.vector.service and before.label_delay_days != after.label_delay_days:
        raise FeatureError(
            f"The states of {after.vector.service!r} are kept for labels after {before.label_delay_days:g} days, "
            f"not {after.label_delay_days:g}.",
            fix="serve it from a new run folder, see docs/serving.md",
        )


def prepare(paths: RunPaths, wanted: Wanted) -> tuple[int, int]:
    """Fill the states of a vector from history and log; may be repeated, and may be cut short.

    Returns:
        Row numbers of the last event and the last label that are in the states.

    Raises:
        FeatureError: the run has no feature store.
        EnvironmentProblemError: the log cannot be read, or another process prepares the run's states.
    """
    paths.last_good.parent.mkdir(parents=True, exist_ok=True)
    problem = f"The states of {str(paths.root)!r} are being prepared by another process."
    with exclusive(paths.last_good.parent, problem, "wait until it has ended"):  # two would undo each other's writes
        return _prepare(paths, wanted)


def _prepare(paths: RunPaths, wanted: Wanted) -> tuple[int, int]:
    client = FeatureClient(paths, wanted.online_store)
    declaration = client.declaration()
    contract = InputContract(declaration.vector(wanted.vector), wanted.sequence_len, wanted.label_delay_days)
    make = engine_maker(declaration, contract)
    history = client.warmed(wanted.before)
    if history is not None and client.warmed(contract.vector.service) is None:
        client.warm(make(client), history)
    log = PredictionLog(paths.prediction_log, read_only=True)
    try:
        return LiveFeatures(make, client).replay(log, (0, 0)).last
    finally:
        log.close()
        client.close()


def prepare_aside(paths: RunPaths, wanted: Wanted, stop: threading.Event) -> tuple[int, int]:
    """Like :func:`prepare`, in a process of its own: it would hold this one's interpreter for too long.

    Args:
        stop: ends it when it is set.

    Raises:
        ServingError: it failed, or was ended; it may be tried again.
    """
    ended = run_python(["-m", __name__, str(paths.root)], stop, told=json.dumps(asdict(wanted)))
    if ended.status:
        logger.error("the states of %r were not prepared: %s", wanted.vector, ended.errors[-2_000:])
        raise ServingError(
            f"The states of vector {wanted.vector!r} could not be prepared (status {ended.status}).",
            fix="see the service's log",
        )
    last = json.loads(ended.said.splitlines()[-1])
    return int(last[0]), int(last[1])


def main(arguments: list[str]) -> None:
    """Prepare a run's states, and print how far the log was taken in."""
    os.nice(_NICENESS)
    print(json.dumps(prepare(RunPaths(Path(arguments[0])), Wanted(**json.load(sys.stdin)))))


if __name__ == "__main__":
    main(sys.argv[1:])

"""The long-running updater: looks, decides, lets an update run, backs off after failures, and says what it does.

All that matters is on disk: labels in the log, what was counted in the ledger (ledger.py), the last attempt in
``updater/state.json``. It may be killed at any moment and goes on where it was.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from deepseek_ray.config import UpdaterConfig
from deepseek_ray.errors import DeepseekRayError
from deepseek_ray.logs import get_logger
from deepseek_ray.online.triggers import Attempt, Decision, Facts, Outcome, decide, noticed
from deepseek_ray.paths import finite, replace_text

log = get_logger(__name__)


class Waiting(Protocol):
    """What the loop asks of a run; see backlog.py."""

    def waiting(self) -> int: ...
    def psi(self) -> float | None: ...
    def basis(self) -> str: ...


class Releases(Protocol):
    """What the loop asks about releases; see serving/release_desk.py."""

    def standing(self) -> str: ...
    def blocked(self) -> str: ...
    def begun_s(self) -> float: ...


@dataclass(frozen=True)
class State:
    """What the loop knows between two looks.

    Attributes:
        since_s: see ``triggers.Facts``.
        status: "idle", "updating", "releasing" or "failing".
        message: the last decision, or what went wrong.
        basis: see ``triggers.Facts``.
        attempts: how many updates ended in each way.
        release: where a release stands, "" without one.
    """

    since_s: float
    looked_s: float = 0.0
    status: str = "idle"
    message: str = ""
    waiting: int = 0
    psi: float | None = None
    basis: str = ""
    last: Attempt | None = None
    attempts: Mapping[str, int] = field(
        default_factory=lambda: {"promoted": 0, "released": 0, "refused": 0, "failed": 0}
    )
    release: str = ""


class Loop:
    """Decides about one run.

    Args:
        backlog: of the run.
        config: triggers and waits.
        attempt: runs one update to its end; returns how it ended and what it said last, or None when it was cut
            short because the updater stops.
        file: where the state is kept; ``.prom`` beside it holds the same as Prometheus text.
        clock: seconds since 1970.
        releases: of the model; while one is under way no update begins.
    """

    def __init__(
        self,
        backlog: Waiting,
        config: UpdaterConfig,
        attempt: Callable[[], tuple[Outcome, str] | None],
        file: Path,
        clock: Callable[[], float],
        releases: Releases,
    ) -> None:
        self._backlog, self._config, self._attempt, self._releases = backlog, config, attempt, releases
        self._file, self._clock = file, clock
        self.state = read_state(file) or State(since_s=clock())

    def look(self) -> Decision:
        """Look once, and update if it is time; a problem is told in the state, and the next look tries again."""
        try:
            decision = self._decide()
            if decision.start:
                self._update(decision)
        except (DeepseekRayError, OSError, sqlite3.Error) as error:  # a full disk, a log that is locked: they pass
            log.error("%s", error)
            self._keep(replace(self.state, status="failing", message=str(error), looked_s=self._clock()))
            return Decision(False, str(error))
        return decision

    def _decide(self) -> Decision:
        self._follow_release()
        blocked = self._releases.blocked()
        basis = self._backlog.basis()  # before the labels: what is set aside in between shows at the next look
        waiting = self._backlog.waiting()
        psi = self._backlog.psi() if waiting >= self._config.drift_labels and self._config.drift_psi else None
        now_s = self._clock()
        facts = Facts(now_s, self.state.since_s, waiting, psi, self.state.last, basis, blocked)
        decision = decide(facts, self._config)
        status = "failing" if self.state.last and self.state.last.outcome == "failed" else "idle"
        looked = replace(self.state, waiting=waiting, psi=psi, basis=basis, looked_s=now_s)
        status = "releasing" if self.state.release else status
        self._keep(replace(looked, status=status, message=decision.reason))
        return decision

    def _follow_release(self) -> None:
        state, release = self.state, self._releases.standing()
        if release != state.release:
            log.info("release: %s", release or "none is under way any more, see deepseek-ray traffic show")
        last = noticed(state.last, self._releases.begun_s(), state.waiting, state.basis)
        self.state = replace(state, release=release, last=last)

    def _update(self, decision: Decision) -> None:
        log.info("updating: %s", decision.reason)
        begun_s, before = self._clock(), self.state.last
        failures = before.failures + 1 if before is not None and before.outcome == "failed" else 1
        # written down as failed until it has ended: who is killed now backs off like any other
        pending = Attempt(begun_s, "failed", self.state.waiting, failures, self.state.basis)
        self._keep(replace(self.state, status="updating", last=pending))
        ended = self._attempt()
        if ended is None:  # nobody's failure: the next updater neither waits nor counts it
            self._keep(replace(self.state, status="idle", message="stopped during an update", last=before))
            return
        outcome, message = ended
        counts = {**self.state.attempts, outcome: self.state.attempts.get(outcome, 0) + 1}
        last = pending if outcome == "failed" else replace(pending, outcome=outcome, failures=0)
        since_s = self.state.since_s if outcome == "failed" else begun_s
        status = "failing" if outcome == "failed" else "idle"
        log.info("%s: %s", outcome, message)
        self._keep(replace(self.state, status=status, message=message, last=last, attempts=counts, since_s=since_s))

    def _keep(self, state: State) -> None:
        """Waits hold in memory too: a state that cannot be written is told and not the end."""
        self.state = state
        try:
            replace_text(self._file, json.dumps(finite(asdict(state)), indent=2) + "\n")
            write_to_textfile(str(self._file.with_suffix(".prom")), _metrics(state))
        except OSError as error:
            log.error("%s cannot be written: %s", self._file, error)


def read_state(file: Path) -> State | None:
    """The state that an earlier loop kept; None where there is none or it is torn: only the waits start anew then."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        last = tree.pop("last")
        return State(**tree, last=None if last is None else Attempt(**last))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s cannot be read and is begun anew: %s", file, error)
        return None


def _metrics(state: State) -> CollectorRegistry:
    registry = CollectorRegistry()

    def gauge(name: str, text: str, value: float) -> None:
        Gauge(f"deepseek_ray_updater_{name}", text, registry=registry).set(value)

    gauge("waiting_labels", "Usable labels that the champion has not been trained on.", state.waiting)
    gauge("looked_timestamp_seconds", "When the updater last looked.", state.looked_s)
    gauge("failures_in_a_row", "Failed updates since the last that ended.", state.last.failures if state.last else 0)
    gauge("updating", "1 while an update runs.", state.status == "updating")
    gauge("releasing", "1 while a release is under way.", bool(state.release))
    if state.psi is not None:
        gauge("psi", "Largest population stability index of a feature.", state.psi)
    ended = Gauge("deepseek_ray_updater_attempts", "Updates by how they ended.", ["outcome"], registry=registry)
    for outcome, count in state.attempts.items():
        ended.labels(outcome).set(count)
    return registry

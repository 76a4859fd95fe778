"""The traffic policy of a model, kept with its registered model, and the history of its moves.

The policy is a text that serving/traffic.py writes and reads; here it is moved from one text to the next, one move at a
time, and each move leaves a line in a table beside the promotions: what, who, why.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from deepseek_ray.data.evidence import GateDecision
from deepseek_ray.errors import RegistryError
from deepseek_ray.registry.audit import AuditTransaction
from deepseek_ray.registry.versions import TRAFFIC_TAG, Registry, VersionInfo

CANARY = "canary"
SHADOW = "shadow"
MAX_CHARS = 5_000
"""Longest value that MLflow keeps with a registered model."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS traffic (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at TEXT NOT NULL,
    name TEXT NOT NULL,
    action TEXT NOT NULL,
    who TEXT NOT NULL,
    why TEXT NOT NULL,
    summary TEXT NOT NULL,
    before TEXT NOT NULL,
    after TEXT NOT NULL)
"""
_TRIGGERS = tuple(
    f"CREATE TRIGGER IF NOT EXISTS traffic_keeps_{what} BEFORE {verb} ON traffic "
    "BEGIN SELECT RAISE(ABORT, 'the traffic table is append-only'); END"
    for what, verb in (("rows", "DELETE"), ("values", "UPDATE"))
)
_COLUMNS = ("at", "name", "action", "who", "why", "summary", "before", "after")


@dataclass(frozen=True, kw_only=True)
class TrafficMove:
    """One line of the history of traffic.

    Args:
        name: registered model.
        action: set, release, advance, rollback, promote, clear or point.
        who: person or program.
        why: in words.
        summary: the move in words, for example "canary 1 % -> 5 %".
        before: policy until then, as text.
        after: policy from then on.
        at: UTC time in ISO 8601, given by the table.
    """

    name: str
    action: str
    who: str
    why: str
    summary: str
    before: str = ""
    after: str = ""
    at: str = ""


class Words(NamedTuple):
    """What the history says of a move; see :class:`TrafficMove`."""

    action: str
    who: str
    why: str
    summary: str


class TrafficBook:
    """Reads and moves the traffic of one registered model."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def read(self) -> str:
        """The policy's text, "" for none.

        Raises:
            RegistryUnavailableError: the store does not answer.
        """
        return self._registry.standing().traffic

    def move(self, before: str, after: str, *, action: str, who: str, why: str, summary: str) -> None:
        """Replace one policy by the next, unless somebody else has moved it meanwhile.

        Args:
            before: the text that was read; the move is refused when it is not there any more.
            after: the new text, "" for none.

        Raises:
            RegistryError: another move came first, or the text is too long.
            RegistryUnavailableError: a store cannot be written; nothing has moved.
        """
        with self._moving(before, after) as audit:
            self._write(audit, Words(action, who, why, summary), before, after)

    def admit(self, before: str, after: str, version: str, decision: GateDecision, words: Words) -> str:
        """Send a version that the gate passed on its way, as ``move`` would, with canary and shadow naming it.

        Returns:
            Why the gate's decision does not hold, kept in the history; nothing has moved then. "" where it does.

        Raises:
            ModelFormatError: the version does not load.
            RegistryError: like :meth:`move`.
        """
        info = self._registry.validate(version)
        with self._moving(before, after) as audit:
            if reason := self._registry.settle(audit, info, decision, crown=False):
                return reason
            with self._registry.tracking.guard(write=True) as client:
                for alias in (SHADOW, CANARY):
                    client.set_registered_model_alias(self._registry.name, alias, info.version)
            self._write(audit, words, before, after)
        return ""

    def crown(self, before: str, after: str, version: str, decision: GateDecision, words: Words) -> str:
        """Make a version champion and move the traffic, one as little without the other as two stores allow.

        A version that is champion already, because a crash came between the two, gets the line that the history lacks.

        Returns:
            Like :meth:`admit`; raises like it.
        """
        info = self._registry.validate(version)
        with self._moving(before, after) as audit:
            crowned = self._registry.make_good(audit) == info.version
            if not crowned and (reason := self._registry.settle(audit, info, decision)):
                return reason
            self._write(audit, words, before, after)
        return ""

    @contextmanager
    def _moving(self, before: str, after: str) -> Iterator[AuditTransaction]:
        """Hold the lock of moves, with the traffic as it was read."""
        if len(after) > MAX_CHARS:
            raise RegistryError(f"A traffic policy of {len(after)} characters is too long.", fix="shorten its schedule")
        with self._registry.audit.transaction() as audit:
            if self.read() != before:
                raise RegistryError(
                    f"The traffic of {self._registry.name!r} was moved by somebody else meanwhile.",
                    fix="look at deepseek-ray traffic show, and decide again",
                )
            yield audit

    def _write(self, audit: AuditTransaction, words: Words, before: str, after: str) -> None:
        self._append(audit.connection, *words, before, after)
        with self._registry.tracking.guard(write=True) as client:
            if after:
                client.set_registered_model_tag(self._registry.name, TRAFFIC_TAG, after)
            elif before:
                client.delete_registered_model_tag(self._registry.name, TRAFFIC_TAG)

    def point(self, alias: str, version: str, *, who: str, why: str) -> VersionInfo:
        """Let ``canary`` or ``shadow`` name a version, once it has loaded and scored its probes.

        Raises:
            RegistryError: there is no such version, or the alias is moved by other means.
            ModelFormatError: the version does not load.
        """
        if alias not in (CANARY, SHADOW):
            raise RegistryError(
                f"The alias {alias!r} is not set by hand.",
                fix="challenger is the version registered last, champion the one that the gate promoted",
            )
        info = self._registry.get(version)
        if alias in info.aliases:
            return info
        info.load()
        with self._registry.audit.transaction() as audit:
            earlier = self._registry.version_of(alias) or "-"
            self._append(audit.connection, "point", who, why, f"{alias}: version {earlier} -> {info.version}", "", "")
            with self._registry.tracking.guard(write=True) as client:
                client.set_registered_model_alias(self._registry.name, alias, info.version)
        return self._registry.get(info.version)

    def moves(self) -> list[TrafficMove]:
        """All moves, oldest first."""
        with self._registry.audit.reading() as connection:
            if connection is None or not _is_made(connection):
                return []
            query = f"SELECT {', '.join(_COLUMNS)} FROM traffic WHERE name = ? ORDER BY id"
            rows = connection.execute(query, (self._registry.name,)).fetchall()
        return [TrafficMove(**dict(zip(_COLUMNS, row, strict=True))) for row in rows]

    def _append(
        self, connection: sqlite3.Connection, action: str, who: str, why: str, summary: str, *texts: str
    ) -> None:
        for statement in (_SCHEMA, *_TRIGGERS):  # part of the open transaction: DDL of SQLite is
            connection.execute(statement)
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        known = {"name": self._registry.name, "at": at, "before": texts[0], "after": texts[1]}
        row = asdict(TrafficMove(action=action, who=who, why=why, summary=summary, **known))
        marks = ", ".join("?" * len(_COLUMNS))
        statement = f"INSERT INTO traffic ({', '.join(_COLUMNS)}) VALUES ({marks})"
        connection.execute(statement, [row[name] for name in _COLUMNS])


def _is_made(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'traffic'").fetchone() is not None

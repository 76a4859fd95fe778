"""A copy of the files that served last, on disk before it is pointed at.

current.json     what the copy is, in plain values
<version>-<n>/   the files: whoever loads them checks them like any others
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_ray.errors import ModelFormatError
from deepseek_ray.paths import exclusive, replace_text, sync

CURRENT = "current.json"
_WAIT_S = 60.0


class KeptFolder:
    """The copy in one folder.

    Args:
        folder: of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def exists(self) -> bool:
        """True when something was kept."""
        return (self._folder / CURRENT).is_file()

    def put(self, files: Path, version: str, note: Mapping[str, Any]) -> None:
        """Copy a folder, unless it is the one that is kept; the older copy stays until the new one is whole.

        Args:
            files: the folder to copy.
            version: named in the copy's name.
            note: what it is; plain values, ``folder`` is not among them.

        Raises:
            OSError: the disk is full or read-only.
            EnvironmentProblemError: another process has been copying for a minute.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        problem = f"Another process keeps a copy in {str(self._folder)!r}."
        with exclusive(self._folder, problem, "wait until it has ended", wait_s=_WAIT_S):
            if not self._holds(files, note):
                self._copy(files, version, note)

    def _copy(self, files: Path, version: str, note: Mapping[str, Any]) -> None:
        copy = self._folder / f"{version}-{time.time_ns():x}-{os.getpid()}"
        try:
            shutil.copytree(files, copy)
            for one in [copy, *copy.rglob("*")]:
                sync(one)  # before it is pointed at: the older copy goes
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)  # half a copy makes a full disk fuller
            raise
        replace_text(self._folder / CURRENT, json.dumps({**note, "folder": copy.name}))
        for old in self._folder.iterdir():
            if old.is_dir() and old != copy:
                shutil.rmtree(old, ignore_errors=True)

    def _holds(self, files: Path, note: Mapping[str, Any]) -> bool:
        try:
            kept, copy = self.read()
            return kept == dict(note) and _same(files, copy)
        except (OSError, ModelFormatError):
            return False

    def read(self) -> tuple[dict[str, Any], Path]:
        """The note, and the copy's folder.

        Raises:
            ModelFormatError: nothing was kept, or the note is torn.
        """
        file = self._folder / CURRENT
        try:
            note = dict(json.loads(file.read_text(encoding="utf-8")))
            return note, self._folder / str(note.pop("folder"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelFormatError(f"No last good version can be read from {str(file)!r}: {error}.") from error


def _same(one: Path, other: Path) -> bool:
    names = sorted(str(file.relative_to(one)) for file in one.rglob("*") if file.is_file())
    if names != sorted(str(file.relative_to(other)) for file in other.rglob("*") if file.is_file()):
        return False
    return all(filecmp.cmp(one / name, other / name) for name in names)  # bytes are read where size and time differ

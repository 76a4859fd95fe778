"""The copy of the version that a model server served last, and what a replica is told about following its alias.

Like finding a model, this needs neither torch nor a model: the program that starts the server uses it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepseek_ray.errors import ModelFormatError
from deepseek_ray.serving.kept_folder import KeptFolder
from deepseek_ray.serving.model_target import Target


@dataclass(frozen=True)
class Following:
    """What a replica needs to follow its alias; plain values.

    Args:
        root: run folder whose store knows the alias.
        kept: folder of the copy.
        seen: name of the copy that was there when the server started: another one is of a version that served since.
        fallback: why the server starts with the copy, or "".
    """

    root: str
    kept: str
    seen: str = ""
    fallback: str = ""


class KeptModel:
    """The copy of the version that served last.

    Args:
        folder: of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._kept = KeptFolder(folder)

    def keep(self, target: Target) -> None:
        """Copy a version that serves; raises like :meth:`KeptFolder.put`."""
        note = {"kind": target.kind, "version": target.version, "run_id": target.run_id, "source": target.source}
        self._kept.put(Path(target.path), target.version, note)

    def target(self, name: str) -> Target | None:
        """The copy under a name in the routes; None when nothing was kept, or what was kept cannot be read."""
        try:
            note, path = self._kept.read()
            return Target(**note, path=str(path), name=name)
        except (ModelFormatError, TypeError):
            return None

    @property
    def seen(self) -> str:
        """Name of the copy that is there now, or ""."""
        kept = self.target("")
        return Path(kept.path).name if kept else ""

"""A copy of the version that served last: what is served when the registry is away or its champion torn.

last_good/current.json     which version, its run and threshold
last_good/<version>-<n>/   its package, as in the registry: checksums and probes are checked when it is loaded
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from deepseek_ray.errors import ModelFormatError, RegistryError, RegistryUnavailableError
from deepseek_ray.logs import get_logger
from deepseek_ray.models.risk import RiskModel
from deepseek_ray.paths import replace_text, sync
from deepseek_ray.registry import Registry, VersionInfo, load_package
from deepseek_ray.registry.package import MANIFEST
from deepseek_ray.serving.champion import champion_version, load_version

logger = get_logger(__name__)

CURRENT = "current.json"


class LastGood:
    """The copy in one folder.

    Args:
        folder: of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def exists(self) -> bool:
        """True when a version was kept."""
        return (self._folder / CURRENT).is_file()

    def keep(self, info: VersionInfo) -> None:
        """Copy a version that has loaded and serves; the older copy stays until the new one is whole.

        Raises:
            OSError: the disk is full or read-only.
        """
        if self._holds(info):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        copy = self._folder / f"{info.version}-{time.time_ns():x}-{os.getpid()}"
        shutil.copytree(info.path, copy)
        for one in [copy, *copy.rglob("*")]:
            sync(one)  # before it is pointed at: the older copy goes
        note = {"name": info.name, "version": info.version, "run_id": info.run_id, "folder": copy.name}
        text = json.dumps({**note, "tags": {key: info.tags[key] for key in ("threshold",) if key in info.tags}})
        replace_text(self._folder / CURRENT, text)
        for old in self._folder.iterdir():
            if old.is_dir() and old != copy:
                shutil.rmtree(old, ignore_errors=True)

    def _holds(self, info: VersionInfo) -> bool:
        try:
            note = json.loads((self._folder / CURRENT).read_text(encoding="utf-8"))
            same = (self._folder / note["folder"] / MANIFEST).read_bytes() == (info.path / MANIFEST).read_bytes()
        except (OSError, ValueError, KeyError):
            return False
        return same and note["version"] == info.version

    def load(self) -> tuple[VersionInfo, RiskModel]:
        """The kept version, verified like one of the registry.

        Raises:
            ModelFormatError: nothing was kept, or the copy is torn.
        """
        file = self._folder / CURRENT
        try:
            note = json.loads(file.read_text(encoding="utf-8"))
            path = self._folder / str(note.pop("folder"))
        except (OSError, ValueError, KeyError) as error:
            raise ModelFormatError(f"No last good version can be read from {str(file)!r}: {error}.") from error
        package = load_package(path)
        if not isinstance(package.model, RiskModel):
            raise ModelFormatError(f"The last good version is a {type(package.model).__name__}.")
        return VersionInfo(**note, aliases=(), path=path, schema=package.schema), package.model


def start_version(find: Callable[[], Registry], last_good: LastGood) -> tuple[VersionInfo, RiskModel, str]:
    """The version to start with: the champion, else the last good one; the text says why it is not the champion.

    Raises:
        RegistryError: there is no champion; or the registry does not answer, and nothing was kept.
        ModelFormatError: the champion is torn, and nothing whole was kept.
    """
    try:
        registry = find()
        version = champion_version(registry)
    except RegistryUnavailableError as error:
        return _fall_back(last_good, error)
    try:
        return (*load_version(registry, version), "")
    except (RegistryError, ModelFormatError) as error:
        return _fall_back(last_good, error)


def _fall_back(last_good: LastGood, error: RegistryError | ModelFormatError) -> tuple[VersionInfo, RiskModel, str]:
    if not last_good.exists():
        raise error
    info, model = last_good.load()
    logger.error("version %s, the last good one, is served from its copy: %s", info.version, error)
    return info, model, str(error)

"""A copy of the version that served last: what is served when the registry is away or its champion torn.

The package is copied as it is in the registry: checksums and probes are checked when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deepseek_ray.errors import ModelFormatError, RegistryError, RegistryUnavailableError
from deepseek_ray.logs import get_logger
from deepseek_ray.models.risk import RiskModel
from deepseek_ray.registry import Registry, VersionInfo, load_package
from deepseek_ray.serving.champion import champion_version, load_version
from deepseek_ray.serving.kept_folder import KeptFolder

logger = get_logger(__name__)


class LastGood:
    """The copy in one folder.

    Args:
        folder: of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._kept = KeptFolder(folder)

    def exists(self) -> bool:
        """True when a version was kept."""
        return self._kept.exists()

    def keep(self, info: VersionInfo) -> None:
        """Copy a version that has loaded and serves; raises like :meth:`KeptFolder.put`."""
        tags = {key: info.tags[key] for key in ("threshold",) if key in info.tags}
        note = {"name": info.name, "version": info.version, "run_id": info.run_id, "tags": tags}
        self._kept.put(info.path, info.version, note)

    def load(self) -> tuple[VersionInfo, RiskModel]:
        """The kept version, verified like one of the registry.

        Raises:
            ModelFormatError: nothing was kept, or the copy is torn.
        """
        note, path = self._kept.read()
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

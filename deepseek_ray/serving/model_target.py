"""Which model a server is to serve: its files on this machine, found by URI or path; nothing is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from deepseek_ray.config import StoreConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.paths import RunPaths
from deepseek_ray.serving.model_folder import Kind, ModelFolder, look_into

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ALIAS = re.compile(r"models:/(?P<name>[^/@]+)@(?P<alias>[^/@]+)")


@dataclass(frozen=True)
class ModelIdentity:
    """What is served, in words.

    Args:
        name: in the routes.
        version: number in the registry, or "".
        run_id: the run that made it, or "".
        source: URI or folder, as it was named.
    """

    name: str
    version: str
    run_id: str
    source: str


@dataclass(frozen=True)
class Target:
    """A model whose files are on this machine; plain values, so that a replica can be told.

    Args:
        path: its files.
        kind: what they are.
        name: in the routes.
        version: number in the registry, or "".
        run_id: the run that made it, or "".
        source: how the user named it.
    """

    path: str
    kind: Kind
    name: str
    version: str
    run_id: str
    source: str

    @property
    def folder(self) -> ModelFolder:
        """Its files and what they are."""
        return ModelFolder(Path(self.path), self.kind)

    @property
    def identity(self) -> ModelIdentity:
        """What it is, in words."""
        return ModelIdentity(self.name, self.version, self.run_id, self.source)


def find(target: str, *, paths: RunPaths, stores: StoreConfig, cache: Path, name: str = "", source: str = "") -> Target:
    """Find a model and look into its folder.

    Args:
        target: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, another MLflow URI, or a folder.
        paths: run whose store knows the URI.
        stores: settings of the stores.
        cache: folder for what has to be downloaded.
        name: in the routes; by default the registered name, or the folder's.
        source: how the user named it, if not as ``target``.

    Raises:
        ModelFormatError: there is no model, or none that may be loaded.
        RegistryError: the store does not know it.
        ConfigError: the name cannot stand in a route.
    """
    if not is_uri(target):
        folder = look_into(Path(target))
        return _checked(folder, name or Path(target).resolve().name, "", "", target)
    from deepseek_ray.registry import Tracking  # brings MLflow, whose import takes seconds
    from deepseek_ray.registry.located import locate

    tracking = Tracking.open(paths, stores, experiment="Default", create=False)
    located = locate(target, tracking, cache)
    folder = look_into(located.folder)
    return _checked(folder, name or located.name, located.version, located.run_id, source or target)


def is_uri(target: str) -> bool:
    """Whether a model is named by an MLflow URI and not by a folder."""
    return target.startswith(("models:/", "runs:/"))


def alias_of(target: str) -> tuple[str, str] | None:
    """Registered name and alias of ``models:/NAME@ALIAS``; None for what names one model for ever."""
    found = _ALIAS.fullmatch(target)
    return (found["name"], found["alias"]) if found else None


def _checked(folder: ModelFolder, name: str, version: str, run_id: str, source: str) -> Target:
    if folder.kind == "mlflow":
        from deepseek_ray.registry.foreign import check_safe

        check_safe(folder.path)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot stand in a route.", fix="choose a name with --name: letters, digits, . _ -")
    return Target(str(folder.path), folder.kind, name, version, run_id, source)

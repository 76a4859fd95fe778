"""The files of a model that a URI names: ``models:/risk@champion``, ``models:/risk/3``, ``runs:/<run>/model``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion

from deepseek_ray.errors import RegistryError
from deepseek_ray.registry.tracking import Tracking

_VERSION = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<number>\d+))")
_LOGGED = re.compile(r"(models:/m-[^/@]+|runs:/[^/]+/.+)")


@dataclass(frozen=True)
class Located:
    """A model's files on this machine.

    Args:
        folder: an MLflow model folder.
        name: registered name, or the last part of the URI.
        version: number, "" for a model that is not registered.
        run_id: the run that made it, or "".
    """

    folder: Path
    name: str
    version: str = ""
    run_id: str = ""


def locate(uri: str, tracking: Tracking, cache: Path) -> Located:
    """Make the files that a URI names local.

    Args:
        uri: see above.
        tracking: the store that knows it.
        cache: folder for what has to be downloaded.

    Raises:
        RegistryError: there is no such model, version or alias.
    """
    if found := _VERSION.fullmatch(uri):
        return _registered(uri, found, tracking, cache)
    if _LOGGED.fullmatch(uri):
        return Located(_download(uri, tracking, cache), uri.rpartition("/")[2])
    raise RegistryError(
        f"{uri!r} names no model.",
        fix="write models:/NAME@ALIAS, models:/NAME/VERSION, models:/m-ID, runs:/RUN/PATH or a folder",
    )


def _registered(uri: str, found: re.Match[str], tracking: Tracking, cache: Path) -> Located:
    with tracking.guard() as client:
        if alias := found["alias"]:
            version: ModelVersion = client.get_model_version_by_alias(found["name"], alias)
        else:
            version = client.get_model_version(found["name"], found["number"])
    source = str(version.source)
    parts = urlsplit(source)
    local = parts.scheme in ("", "file")
    folder = Path(unquote(parts.path)) if local else _download(source, tracking, cache)
    return Located(folder, found["name"], str(version.version), str(version.run_id or ""))


def _download(source: str, tracking: Tracking, cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    with tracking.guard():
        return Path(download_artifacts(artifact_uri=source, dst_path=str(cache), tracking_uri=tracking.uri))

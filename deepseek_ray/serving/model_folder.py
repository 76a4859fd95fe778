"""What a folder holds that someone wants served: told by its own description, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepseek_ray.errors import ModelFormatError

Kind = Literal["package", "risk", "backbone", "mlflow"]
_FORMATS: dict[str, Kind] = {"deepseek_ray.risk": "risk", "deepseek_ray.backbone": "backbone"}


@dataclass(frozen=True)
class ModelFolder:
    """A folder and what it is.

    Args:
        path: the files.
        kind: a version of our registry, a saved RiskModel, a saved backbone, or another MLflow model.
    """

    path: Path
    kind: Kind


def look_into(folder: Path) -> ModelFolder:
    """Tell what a folder holds.

    Raises:
        ModelFormatError: nothing that can be served.
    """
    path = folder.resolve()
    if (path / "MLmodel").is_file():
        own = path / "data" / "version"  # where the registry puts a version's files
        return ModelFolder(own, "package") if (own / "version.json").is_file() else ModelFolder(path, "mlflow")
    if (path / "version.json").is_file():
        return ModelFolder(path, "package")
    return ModelFolder(path, _saved(path))


def _saved(path: Path) -> Kind:
    try:
        written = str(json.loads((path / "config.json").read_text(encoding="utf-8"))["format"])
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise _nothing(path, f"no config.json with a format ({type(error).__name__})") from error
    kind = _FORMATS.get(written.partition("/")[0])
    if kind is None:
        raise _nothing(path, f"a config.json of the format {written!r}")
    return kind


def _nothing(path: Path, found: str) -> ModelFormatError:
    if not path.is_dir():
        return ModelFormatError(f"There is no folder {str(path)!r}.", fix="name a folder, or models:/NAME@ALIAS")
    return ModelFormatError(
        f"{str(path)!r} holds no model that can be served: {found}.",
        fix="name a folder written by save_pretrained, a version of the registry, or an MLflow model folder",
    )

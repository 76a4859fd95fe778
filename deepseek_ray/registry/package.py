"""What a registered version consists of, and how it is read back without running foreign code.

    config.json         the model's settings        (written by models.save_pretrained)
    model.safetensors   its weights
    probes.safetensors  inputs and the probabilities they must give (optional)
    version.json        input schema, feature service, SHA-256 of each file above

Legend: B rows, F features, N events of the sequence, C channels an event, P probes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import deepseek_ray.models as models
from deepseek_ray.data.evidence import VectorContract, schema_digest
from deepseek_ray.errors import ModelFormatError
from deepseek_ray.models import RiskModelConfig
from deepseek_ray.models.events import SEQUENCE_CHANNELS
from deepseek_ray.models.files import sha256_of

Floats = npt.NDArray[np.float64]

MANIFEST = "version.json"
PROBES = "probes.safetensors"
PROBE_TOLERANCE = 1e-6
"""Largest difference between a stored and a recomputed probability; processors round differently."""

_PADDING_AGE_S = -1.0
_AGE_CHANNEL = SEQUENCE_CHANNELS.index("age_s")
_ALLOWED = {".json", ".safetensors"}


class Scorer(Protocol):
    """What the registry needs of a model."""

    def predict_proba(self, features: Floats, sequence: Floats, /) -> Floats:
        """Probabilities [B] of features [B, F] and sequence [B, N, C]."""


@dataclass(frozen=True, kw_only=True)
class InputSchema:
    """What one row of input looks like, and which service delivers it.

    Args:
        columns: feature names in order, F of them.
        sequence_len: N, the card's recent events.
        sequence_channels: C, numbers an event.
        feature_service: name of the service with its version.
        feature_digest: SHA-256 of the feature declaration.
    """

    columns: tuple[str, ...]
    sequence_len: int
    sequence_channels: int
    feature_service: str
    feature_digest: str

    @classmethod
    def of(cls, config: RiskModelConfig) -> InputSchema:
        """The schema that a model's own settings name."""
        return cls(
            columns=config.feature_names,
            sequence_len=config.sequence_len,
            sequence_channels=len(SEQUENCE_CHANNELS),
            feature_service=config.feature_service,
            feature_digest=config.feature_digest,
        )

    @property
    def contract(self) -> VectorContract:
        """The schema as the gate compares it."""
        digest = schema_digest(self.columns, self.sequence_len, self.sequence_channels)
        return VectorContract(schema=digest, feature_service=self.feature_service, feature_digest=self.feature_digest)

    def empty_sequence(self, num_rows: int) -> Floats:
        """Sequence [num_rows, N, C] of padding: a card without history."""
        sequence = np.zeros((num_rows, self.sequence_len, self.sequence_channels), dtype=np.float64)
        if self.sequence_channels > _AGE_CHANNEL:
            sequence[:, :, _AGE_CHANNEL] = _PADDING_AGE_S
        return sequence


@dataclass(frozen=True, kw_only=True, eq=False)
class Probes:
    """Inputs with the probabilities the model gave when it was trained.

    Args:
        features: [P, F].
        sequence: [P, N, C].
        expected: [P], 0-1.
    """

    features: Floats
    sequence: Floats
    expected: Floats

    @classmethod
    def of(cls, model: Scorer, features: npt.NDArray[Any], sequence: npt.NDArray[Any], num_rows: int = 8) -> Probes:
        """The first rows of a dataset with what the model gives for them."""
        x, s = features[:num_rows].astype(np.float64), sequence[:num_rows].astype(np.float64)
        return cls(features=x, sequence=s, expected=model.predict_proba(x, s))


@dataclass(frozen=True, eq=False)
class Package:
    """A version's files, verified, and its model, loaded."""

    path: Path
    schema: InputSchema
    model: Scorer


def write_package(model_dir: Path, target: Path, schema: InputSchema, probes: Probes | None = None) -> str:
    """Copy a model folder into a version folder with its manifest.

    Returns:
        SHA-256 of the manifest: the identity of all its files.

    Raises:
        ModelFormatError: a file is missing, or one is neither JSON nor safetensors.
    """
    _check_source(model_dir)
    target.mkdir(parents=True)
    for file in sorted(model_dir.iterdir()):
        shutil.copyfile(file, target / file.name)
    if probes is not None:
        arrays = {name: np.ascontiguousarray(value, dtype=np.float64) for name, value in vars(probes).items()}
        save_file(arrays, target / PROBES)
    files = {file.name: sha256_of(file) for file in sorted(target.iterdir())}
    manifest = {"format": 1, **asdict(schema), "files": files}
    text = json.dumps(manifest, indent=1, sort_keys=True)
    (target / MANIFEST).write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def read_schema(path: Path) -> InputSchema:
    """The input schema of a version folder.

    Raises:
        ModelFormatError: the manifest is missing or unreadable.
    """
    tree = _manifest(path)
    names = InputSchema.__dataclass_fields__
    try:
        fields = {name: tree[name] for name in names}
        fields["columns"] = tuple(fields["columns"])
        return InputSchema(**fields)
    except (KeyError, TypeError) as error:
        raise _broken(path / MANIFEST, f"lacks {error}") from error


def load_package(path: Path) -> Package:
    """Verify every file, load the model and score its probes.

    Raises:
        ModelFormatError: a file is missing or altered, or a probe gives another probability.
    """
    _verify_files(path)
    package = Package(path, read_schema(path), models.load(path))
    _verify_probes(package)
    return package


def _check_source(model_dir: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        if not (model_dir / name).is_file():
            raise ModelFormatError(
                f"The model folder {str(model_dir)!r} lacks {name!r}.", fix="write it with models.save_pretrained"
            )
    for file in model_dir.iterdir():
        if file.suffix not in _ALLOWED or file.name in (MANIFEST, PROBES):
            raise ModelFormatError(
                f"The model folder holds {file.name!r}, which no version may carry.",
                fix="keep only config.json and *.safetensors",
            )


def _verify_files(path: Path) -> None:
    for name, digest in _manifest(path).get("files", {}).items():
        file = path / name
        if not file.is_file():
            raise _broken(file, "is missing")
        if sha256_of(file) != digest:
            raise _broken(file, "does not match its SHA-256")


def _verify_probes(package: Package) -> None:
    probes = _read_probes(package)
    try:
        scores = np.asarray(package.model.predict_proba(probes.features, probes.sequence), dtype=np.float64)
    except (ValueError, RuntimeError, IndexError) as error:
        raise _broken(package.path, f"cannot score its own input schema: {error}") from error
    if scores.shape != probes.expected.shape or not np.all((scores >= 0) & (scores <= 1)):
        raise _broken(package.path, "gives no probabilities between 0 and 1")
    worst = float(np.max(np.abs(scores - probes.expected), initial=0.0, where=np.isfinite(probes.expected)))
    if worst > PROBE_TOLERANCE:
        raise _broken(package.path, f"scores a stored probe {worst:.3g} away from the stored probability")


def _read_probes(package: Package) -> Probes:
    file, schema = package.path / PROBES, package.schema
    if file.is_file():
        try:
            return Probes(**load_file(file))
        except (SafetensorError, TypeError) as error:
            raise _broken(file, f"is unreadable: {error}") from error
    # without stored probes a cold card must at least get some probability
    return Probes(
        features=np.zeros((1, len(schema.columns))), sequence=schema.empty_sequence(1), expected=np.full(1, np.nan)
    )


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(file, f"is unreadable: {error}") from error
    if not isinstance(tree, dict):
        raise _broken(file, f"holds a {type(tree).__name__}")
    return tree


def _broken(file: Path, what: str) -> ModelFormatError:
    return ModelFormatError(
        f"The version's {file.name!r} {what} ({str(file)!r}).", fix="register the model again, or roll back"
    )

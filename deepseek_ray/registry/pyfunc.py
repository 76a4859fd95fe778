"""The loader that MLflow calls: ``mlflow.pyfunc.load_model("models:/risk@champion")``.

Weights are safetensors and settings JSON; nothing is unpickled. The process needs the tracking URI
and deepseek_ray on its path.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.pyfunc import save_model
from mlflow.types.schema import Array, ColSpec, DataType, Schema

from deepseek_ray.errors import DataError
from deepseek_ray.registry.package import Floats, InputSchema, Package, load_package

SEQUENCE_COLUMN = "sequence"
_REQUIREMENTS = ("mlflow", "torch", "safetensors", "numpy", "pandas")


class RiskFlavour:
    """Scores a DataFrame: one column a feature, and ``sequence`` (rows of C numbers, newest first) if there is one."""

    def __init__(self, package: Package) -> None:
        self.package = package

    def predict(self, data: pd.DataFrame) -> Floats:
        """Fraud probability [B] of each row.

        Raises:
            DataError: a column is missing, or a number is not finite.
        """
        features = self._features(data)
        sequence = self._sequence(data)
        return np.asarray(self.package.model.predict_proba(features, sequence), dtype=np.float64)

    def _features(self, data: pd.DataFrame) -> Floats:
        columns = self.package.schema.columns
        missing = [name for name in columns if name not in data.columns]
        if missing:
            raise DataError(
                f"The input lacks {len(missing)} feature columns, first {missing[0]!r}.", fix="give every column"
            )
        features = data[list(columns)].to_numpy(dtype=np.float64)
        return _finite(features, "a feature")

    def _sequence(self, data: pd.DataFrame) -> Floats:
        schema = self.package.schema
        if SEQUENCE_COLUMN not in data.columns:
            return schema.empty_sequence(len(data))
        return _finite(stack_sequences(list(data[SEQUENCE_COLUMN]), schema), SEQUENCE_COLUMN)


def stack_sequences(column: Sequence[Any], schema: InputSchema) -> Floats:
    """Each row's events (None or empty: no history), newest first, padded to [B, N, C].

    Raises:
        DataError: a row has too many events, or other channels.
    """
    sequence = schema.empty_sequence(len(column))
    for row, events in enumerate(column):
        if events is None or len(events) == 0:
            continue
        rows = _events(events, schema)
        sequence[row, : len(rows)] = rows
    return sequence


def _events(events: Any, schema: InputSchema) -> Floats:
    rows = np.array([list(event) for event in events], dtype=np.float64)
    if rows.ndim != 2 or rows.shape[0] > schema.sequence_len or rows.shape[1] != schema.sequence_channels:
        raise DataError(
            f"A sequence has shape {rows.shape}.",
            fix=f"give at most {schema.sequence_len} events of {schema.sequence_channels} numbers",
        )
    return rows


def _finite(values: Floats, what: str) -> Floats:
    if not np.isfinite(values).all():
        raise DataError(f"The input holds NaN or infinity in {what}.", fix="fill or drop the row before scoring")
    return values


def _load_pyfunc(path: str) -> RiskFlavour:
    """Called by MLflow with the version folder."""
    return RiskFlavour(load_package(Path(path)))


def signature(schema: InputSchema) -> ModelSignature:
    """MLflow signature: one double a feature, an optional nested ``sequence``, one probability."""
    columns = [ColSpec(DataType.double, name) for name in schema.columns]
    if schema.sequence_len:
        columns.append(ColSpec(Array(Array(DataType.double)), SEQUENCE_COLUMN, required=False))
    return ModelSignature(inputs=Schema(columns), outputs=Schema([ColSpec(DataType.double)]))


def requirements() -> list[str]:
    """Packages a version needs, at the versions installed now; never resolved over the network."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _REQUIREMENTS]


def save_flavour(package_dir: Path, target: Path, schema: InputSchema) -> None:
    """Write a version folder as an MLflow model folder."""
    with warnings.catch_warnings():
        # the stored probes do the work of an input example
        warnings.filterwarnings("ignore", message=".*input example was not provided.*")
        save_model(
            target,
            loader_module="deepseek_ray.registry.pyfunc",
            data_path=str(package_dir),
            pip_requirements=requirements(),
            signature=signature(schema),
        )

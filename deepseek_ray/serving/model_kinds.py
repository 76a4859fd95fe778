"""Each kind of model as a server sees it: columns in, one JSON answer a row out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch

from deepseek_ray.errors import EnvironmentProblemError, ModelFormatError
from deepseek_ray.models import RiskModel
from deepseek_ray.models.pretrained import from_pretrained
from deepseek_ray.registry import InputSchema, load_package
from deepseek_ray.registry.columns import Column
from deepseek_ray.registry.foreign import ForeignModel
from deepseek_ray.registry.pyfunc import SEQUENCE_COLUMN, stack_sequences
from deepseek_ray.serving.backbone_models import serve_backbone
from deepseek_ray.serving.model_folder import ModelFolder
from deepseek_ray.serving.model_records import Batch
from deepseek_ray.serving.model_rehearsal import Example

Device = Literal["auto", "cpu", "cuda"]
_NUMBER = {"type": "number"}
_MADE_UP: dict[str, Any] = {
    "double": 0.0, "float": 0.0, "long": 0, "integer": 0, "boolean": False, "string": ""
}  # fmt: skip


class ServedModel(Protocol):
    """A loaded model.

    Attributes:
        columns: its input.
        answer: JSON schema of one row's answer.
        facts: what its description adds to name and version.
    """

    columns: tuple[Column, ...]
    answer: Mapping[str, Any]
    facts: Mapping[str, Any]

    def check(self, batch: Batch) -> None:
        """Raise a RequestError for rows that fit the columns and cannot be answered all the same."""

    def predict(self, batch: Batch) -> Sequence[Any]:
        """One answer a row."""

    def example(self) -> Example:
        """Rows to rehearse with."""


def load(folder: ModelFolder, device: Device) -> ServedModel:
    """Load what a folder holds.

    Raises:
        ModelFormatError: a file is missing, altered or unsafe.
        EnvironmentProblemError: there is no GPU, and the device is ``cuda``.
    """
    place = choose(device)
    if folder.kind == "mlflow":
        return OtherModel(ForeignModel(folder.path))
    if folder.kind == "backbone":
        torch.set_num_threads(os.cpu_count() or 1)  # Ray gives a replica one; nobody else computes here
        return serve_backbone(from_pretrained(folder.path).to(place))
    torch.set_num_threads(1)  # rows are few: more threads only wait for each other
    if folder.kind == "risk":
        model = RiskModel.from_pretrained(folder.path)
        return RiskRows(model.to(place), InputSchema.of(model.config))
    package = load_package(folder.path)
    if not isinstance(package.model, RiskModel):
        raise ModelFormatError(f"The version holds a {type(package.model).__name__}.", fix="register a RiskModel")
    return RiskRows(package.model.to(place), package.schema)


def choose(device: Device) -> torch.device:
    """The device; ``auto`` takes a GPU where there is one.

    Raises:
        EnvironmentProblemError: there is no GPU, and it was asked for.
    """
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise EnvironmentProblemError("--device cuda: torch finds no GPU.", fix="use --device auto, or see doctor")
    return torch.device("cuda" if found and device != "cpu" else "cpu")


class RiskRows:
    """The risk model on ready feature vectors."""

    def __init__(self, model: RiskModel, schema: InputSchema) -> None:
        self._model, self._schema = model, schema
        sizes = ((0, schema.sequence_len), (schema.sequence_channels, schema.sequence_channels))
        events = Column(SEQUENCE_COLUMN, "double", required=False, sizes=sizes, text="recent events, newest first")
        self.columns: tuple[Column, ...] = tuple(Column(name, "double") for name in schema.columns)
        self.columns += (events,) if schema.sequence_len else ()
        self.answer: Mapping[str, Any] = {
            "type": "object",
            "required": ["probability"],
            "properties": {"probability": _NUMBER | {"minimum": 0, "maximum": 1, "description": "of fraud"}},
        }
        self.facts: Mapping[str, Any] = {
            "kind": "risk",
            "feature_service": schema.feature_service,
            "feature_digest": schema.feature_digest,
            "device": next(model.parameters()).device.type,
        }

    def check(self, batch: Batch) -> None:
        """Every row that fits the columns can be answered."""

    def predict(self, batch: Batch) -> Sequence[Any]:
        names = self._schema.columns
        features = np.array([batch.columns[name] for name in names], dtype=np.float64).T
        events = batch.columns.get(SEQUENCE_COLUMN, [None] * batch.num_rows)
        probability = self._model.predict_proba(features, stack_sequences(events, self._schema))
        return [{"probability": value} for value in probability.tolist()]

    def example(self) -> Example:
        columns: dict[str, list[Any]] = {column.name: [0.0] for column in self.columns}
        if SEQUENCE_COLUMN in columns:
            columns[SEQUENCE_COLUMN] = [None]
        return Example(Batch(columns, 1))


class OtherModel:
    """An MLflow model of another library."""

    def __init__(self, model: ForeignModel) -> None:
        self._model, self.columns = model, model.columns
        returned = f": {model.outputs}" if model.outputs else ""
        self.answer: Mapping[str, Any] = {"description": f"what the model returns for a row{returned}"}
        self.facts: Mapping[str, Any] = {"kind": model.loader, "device": "cpu"}

    def check(self, batch: Batch) -> None:
        """Every row that fits the columns can be answered."""

    def predict(self, batch: Batch) -> Sequence[Any]:
        return self._model.predict(batch.columns)

    def example(self) -> Example:
        if (stored := self._model.example()) is not None:
            return Example(Batch(stored, len(next(iter(stored.values())))))
        made = {column.name: [_MADE_UP[column.type]] for column in self.columns}
        return Example(Batch(made, 1), made_up=True)

"""Models that others wrote with MLflow, loaded only where loading runs no code of the model's own.

A pickle runs whatever its author put into it, and so do Python files that travel with a model. Only flavours whose
weights are data are taken, and no file of the folder may be a pickle, whatever its name is.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.types.schema import ColSpec, Schema

from deepseek_ray.errors import ModelFormatError, RegistryError
from deepseek_ray.registry.columns import COLUMN_TYPES, Column

DESCRIPTION = "MLmodel"
MAX_EXAMPLE_ROWS = 8
OWN_LOADER = "deepseek_ray.registry.pyfunc"
SAFE_LOADERS: dict[str, re.Pattern[str]] = {
    "mlflow.lightgbm": re.compile(r"lightgbm\.basic\.Booster"),
    "mlflow.xgboost": re.compile(r"xgboost\.\w+\.\w+"),
    "mlflow.catboost": re.compile(r""),
    "mlflow.onnx": re.compile(r""),
}
"""Loaders that read a data format of their library's own, and the classes for which they do (the flavour's
``model_class``): for LightGBM's scikit-learn wrappers the same loader unpickles."""

_PICKLE_ENDINGS = {".pkl", ".pickle", ".joblib", ".dill", ".pt", ".pth", ".py", ".so"}
_SWITCH = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"


class ForeignModel:
    """An MLflow model folder, checked and loaded.

    Args:
        folder: it holds the file MLmodel.

    Attributes:
        columns: its input.
        outputs: its signature's output in MLflow's words, "" where it names none.

    Raises:
        ModelFormatError: it is none, its loader is not in SAFE_LOADERS, it holds a pickle or code, or names no columns.
        RegistryError: MLflow cannot load it.
    """

    def __init__(self, folder: Path) -> None:
        self.loader = check_safe(folder)
        self.columns = _columns(folder)
        self._folder, self.outputs = folder, _outputs(folder)
        self._types = {column.name: _dtype(column) for column in self.columns}
        with _no_pickles():
            try:
                self._model = mlflow.pyfunc.load_model(str(folder))
            except (MlflowException, ImportError, OSError, ValueError) as error:
                raise RegistryError(
                    f"MLflow cannot load {str(folder)!r} with {self.loader!r}: {error}.",
                    fix="install the packages of its requirements.txt",
                ) from error

    def predict(self, columns: Mapping[str, Sequence[Any]]) -> list[Any]:
        """One answer a row: a number, a list of numbers, or a mapping."""
        frame = pd.DataFrame({name: pd.Series(columns[name], dtype=kind) for name, kind in self._types.items()})
        found = self._model.predict(frame)
        if isinstance(found, pd.DataFrame):
            return [dict(row) for row in found.to_dict(orient="records")]
        return list(np.asarray(found).tolist())

    def example(self) -> dict[str, list[Any]] | None:
        """Columns of the input example that was logged with the model; None where there is none of named columns.

        Raises:
            ModelFormatError: it cannot be read, or lacks a column of the signature.
        """
        try:
            found = Model.load(str(self._folder)).load_input_example(str(self._folder))
        except (MlflowException, OSError, ValueError, KeyError) as error:
            raise _no_example(self._folder, f"cannot be read: {error}") from error
        if not isinstance(found, pd.DataFrame) or found.empty:
            return None
        lacking = [column.name for column in self.columns if column.required and column.name not in found]
        if lacking:
            raise _no_example(self._folder, f"lacks column {lacking[0]!r}")
        rows = found.head(MAX_EXAMPLE_ROWS).reindex(columns=[column.name for column in self.columns])
        return {str(name): values.astype(object).where(values.notna(), None).tolist() for name, values in rows.items()}


def check_safe(folder: Path) -> str:
    """The loader of an MLflow model folder that may be loaded.

    Raises:
        ModelFormatError: see :class:`ForeignModel`.
    """
    flavours = _flavours(folder)
    flavour = flavours["python_function"]
    loader = str(flavour.get("loader_module", ""))
    if loader not in (*SAFE_LOADERS, OWN_LOADER):
        raise _refused(folder, f"its loader is {loader!r}, which unpickles or runs code that came with the model")
    made = str(flavours.get(loader.removeprefix("mlflow."), {}).get("model_class", ""))
    if made and loader in SAFE_LOADERS and not SAFE_LOADERS[loader].fullmatch(made):
        raise _refused(folder, f"{loader!r} unpickles a {made!r}")
    if flavour.get("code"):
        raise _refused(folder, f"it brings Python code ({flavour['code']!r})")
    for file in sorted(folder.rglob("*")):
        if file.is_file() and _is_pickle(file):
            raise _refused(folder, f"{str(file.relative_to(folder))!r} is a pickle or code")
    return loader


def _flavours(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        tree = yaml.safe_load((folder / DESCRIPTION).read_text(encoding="utf-8"))
        found = {str(name): dict(flavour) for name, flavour in tree["flavors"].items()}
        found["python_function"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelFormatError(
            f"{str(folder)!r} is no MLflow model with a python_function flavour: {error!r}.", fix="log the model again"
        ) from error
    return found


def _is_pickle(file: Path) -> bool:
    if file.suffix in _PICKLE_ENDINGS:
        return True
    with file.open("rb") as stream:
        head = stream.read(2)
    if head[:1] == b"\x80" and head[1:] in (b"\x02", b"\x03", b"\x04", b"\x05"):  # the opcode PROTO and its number
        return True
    if head != b"PK":
        return False
    if not zipfile.is_zipfile(file):
        return True
    with zipfile.ZipFile(file) as archive:
        return any(Path(name).suffix in _PICKLE_ENDINGS for name in archive.namelist())


@contextmanager
def _no_pickles() -> Iterator[None]:
    """MLflow's own switch, as a second lock on the same door."""
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before


def _columns(folder: Path) -> tuple[Column, ...]:
    schema = _input_schema(folder)
    if schema is None or not schema.has_input_names() or schema.is_tensor_spec():
        raise ModelFormatError(
            f"The model in {str(folder)!r} has no signature with named columns.",
            fix="log it with signature=mlflow.models.infer_signature(a DataFrame of its input)",
        )
    return tuple(_column(folder, item) for item in schema.inputs)


def _input_schema(folder: Path) -> Schema | None:
    try:
        signature = Model.load(str(folder)).signature
    except (MlflowException, ValueError, TypeError, KeyError) as error:
        raise ModelFormatError(f"The MLmodel of {str(folder)!r} is broken: {error}.", fix="log it again") from error
    return signature.inputs if signature is not None else None


def _outputs(folder: Path) -> str:
    signature = Model.load(str(folder)).signature
    return str(signature.outputs) if signature is not None and signature.outputs is not None else ""


def _no_example(folder: Path, why: str) -> ModelFormatError:
    return ModelFormatError(
        f"The input example of the model in {str(folder)!r} {why}.", fix="log the model again with an input_example"
    )


def _column(folder: Path, item: ColSpec) -> Column:
    kind = str(getattr(item.type, "name", item.type))
    if kind not in COLUMN_TYPES:
        raise ModelFormatError(
            f"Column {item.name!r} of the model in {str(folder)!r} has the type {kind!r}.",
            fix=f"give the model columns of the types {', '.join(COLUMN_TYPES)}",
        )
    return Column(item.name, kind, required=bool(item.required))  # type: ignore[arg-type]


def _dtype(column: Column) -> str:
    exact = {"double": "float64", "float": "float32", "boolean": "bool", "string": "object"}
    whole = {"long": "int64", "integer": "int32"}
    return (exact | whole)[column.type] if column.required or column.type in ("double", "float") else "object"


def _refused(folder: Path, why: str) -> ModelFormatError:
    known = ", ".join(loader.removeprefix("mlflow.") for loader in SAFE_LOADERS)
    return ModelFormatError(
        f"The model in {str(folder)!r} is not loaded: {why}.",
        fix=f"save it as data: deepseek_ray's own safetensors, or MLflow's {known} with the library's own format",
    )

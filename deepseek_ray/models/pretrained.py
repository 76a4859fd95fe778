"""A backbone as files that anyone can read: config.json and safetensors, one file a layer.

The config holds the sha256 of every file. Names are those of the whole model, whatever mesh trained it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek_ray.config_moe import BackboneConfig
from deepseek_ray.errors import ModelFormatError
from deepseek_ray.models.backbone import Backbone
from deepseek_ray.models.files import sha256_of

FORMAT = "deepseek_ray.backbone/1"
CONFIG_FILE = "config.json"
_OF_TRAINING = {"dropout", "bias_rate", "balance_loss", "z_loss", "max_seq_len"}


def save_pretrained(model: Backbone, folder: str | Path) -> Path:
    """Write a whole backbone; the config last."""
    state = model.state_dict()
    pieces = ((piece, {n: t for n, t in state.items() if piece_of(n) == piece}) for piece in pieces_of(model.config))
    return write(model.config, pieces, folder)


def write(config: BackboneConfig, pieces: Iterable[tuple[str, dict[str, Tensor]]], folder: str | Path) -> Path:
    """Write a model piece by piece, so that no more than one has to be in memory.

    Args:
        config: its shape.
        pieces: name of a piece and its tensors, all of :func:`pieces_of`.
        folder: where to.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    digests = {}
    for piece, tensors in pieces:
        file = target / f"{piece}.safetensors"
        draft = target / f".{file.name}.{os.getpid()}"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, draft)
        os.replace(draft, file)
        digests[file.name] = sha256_of(file)
    description = {"format": FORMAT, "config": config.model_dump(), "files": digests}
    draft = target / f".{CONFIG_FILE}.{os.getpid()}"
    draft.write_text(json.dumps(description, indent=2, sort_keys=True), encoding="utf-8")
    os.replace(draft, target / CONFIG_FILE)
    return target


def from_pretrained(folder: str | Path, dtype: torch.dtype | None = None) -> Backbone:
    """Read a whole backbone, in evaluation mode, in the type it was saved in unless told.

    Raises:
        ModelFormatError: a file is missing, changed or does not fit the config.
    """
    source = Path(folder)
    config, files = _read_config(source)
    with torch.device("meta"):
        model = Backbone(config)
    state: dict[str, Tensor] = {}
    for name, digest in files.items():
        state |= _read_piece(source, name, digest)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise _bad(source, f"its tensors do not fit its config: {error}") from error
    for router in model.routers().values():  # the counters of tokens are not saved
        router.count_E = torch.zeros(config.num_experts, dtype=torch.int64)
    return (model if dtype is None else model.to(dtype)).eval()


def check(folder: str | Path, shape: BackboneConfig) -> None:
    """Make sure that a saved model is whole and has a shape; how it was trained does not matter.

    Raises:
        ModelFormatError: a file is missing, changed or too many, or the shape is another.
    """
    source = Path(folder)
    config, files = _read_config(source)
    for name, wanted in shape.model_dump(exclude=_OF_TRAINING).items():
        if (was := getattr(config, name)) != wanted:
            raise ModelFormatError(
                f"The model in {str(source)!r} has backbone.{name} = {was!r}, not {wanted!r}.",
                fix=f"set backbone.{name}={was}",
            )
    if foreign := {file.name for file in source.glob("*.safetensors")} - files.keys():
        raise _bad(source, f"it holds files that {CONFIG_FILE} does not name: {sorted(foreign)}")
    for name, digest in files.items():
        if not (source / name).is_file() or sha256_of(source / name) != digest:
            raise _bad(source, f"{name} is missing or its checksum is not the one in {CONFIG_FILE}")


def pieces_of(config: BackboneConfig) -> Iterator[str]:
    """Names of the files without their ending."""
    yield "adapter"
    yield from (f"layer-{number:04d}" for number in range(config.num_layers))
    yield "head"


def piece_of(name: str) -> str:
    """The piece that a tensor of the model belongs to."""
    first, _, rest = name.partition(".")
    return f"layer-{int(rest.partition('.')[0]):04d}" if first == "layers" else first


def _read_config(folder: Path) -> tuple[BackboneConfig, dict[str, str]]:
    try:
        description = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise _bad(folder, f"format {description['format']!r} is not {FORMAT!r}")
        config, files = BackboneConfig.model_validate(description["config"]), dict(description["files"])
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise _bad(folder, f"{CONFIG_FILE} is missing or broken ({error})") from error
    missing = {f"{piece}.safetensors" for piece in pieces_of(config)} ^ files.keys()
    if missing:
        raise _bad(folder, f"{CONFIG_FILE} names other files than its shape has: {sorted(missing)}")
    return config, files


def _read_piece(folder: Path, name: str, digest: str) -> dict[str, Tensor]:
    file = folder / name
    if not file.is_file() or sha256_of(file) != digest:
        raise _bad(folder, f"{name} is missing or its checksum is not the one in {CONFIG_FILE}")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise _bad(folder, f"{name} is broken ({error})") from error


def _bad(folder: Path, problem: str) -> ModelFormatError:
    return ModelFormatError(f"The model in {str(folder)!r} cannot be used: {problem}.", fix="fetch or train it again")

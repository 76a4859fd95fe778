"""From a checkpoint of any mesh to a model that one process can read, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.errors import CheckpointError
from deepseek_ray.models.backbone import Backbone
from deepseek_ray.models.pretrained import piece_of, pieces_of, write
from deepseek_ray.train import manifest
from deepseek_ray.train.mesh_checkpoint import PREFIX, read_shards
from deepseek_ray.train.pretrain_trainer import PretrainResult
from deepseek_ray.train.pretraining import fingerprint


def export_newest(config: MoEConfig, result: PretrainResult, target: Path) -> Path:
    """Write the weights of the newest complete checkpoint as a pretrained model (models/pretrained.py).

    Raises:
        CheckpointError: there is none of these settings.
    """
    found = manifest.newest(result.folder, PREFIX, fingerprint(config, result.data_digest))
    if found is None:
        raise CheckpointError(f"No complete checkpoint in {str(result.folder)!r}.", fix="train first")
    return write(config.backbone, _pieces(config, found[0]), target)


def _pieces(config: MoEConfig, checkpoint: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    with torch.device("meta"):
        shapes = Backbone(config.backbone).state_dict()
    dtype = torch.float64 if config.step.precision == "float64" else torch.float32
    for piece in pieces_of(config.backbone):
        wanted = {
            f"model.{name}": torch.empty(t.shape, dtype=dtype) for name, t in shapes.items() if piece_of(name) == piece
        }
        read_shards(wanted, checkpoint, alone=True)
        yield piece, {name.removeprefix("model."): tensor for name, tensor in wanted.items()}

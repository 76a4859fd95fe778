"""The card-fraud model: event adapter, temporal attention over the card's recent events, experts, head, calibration.

Legend: B rows, F features, N recent events, C channels of one, D model width, L layers, E experts, Q bins.
A saved model is a folder with config.json and model.safetensors; the first holds the checksum of the second.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deepseek_ray.config import ModelConfig
from deepseek_ray.errors import ModelFormatError
from deepseek_ray.models.attention import TemporalAttention
from deepseek_ray.models.events import SEQUENCE_CHANNELS, FeatureAdapter, SequenceAdapter
from deepseek_ray.models.files import sha256_of
from deepseek_ray.models.heads.calibration import PlattScaling
from deepseek_ray.models.layers import RMSNorm, SwiGLU
from deepseek_ray.models.moe import MoE
from deepseek_ray.models.router import Router

FORMAT = "deepseek_ray.risk/2"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_CHUNK = 4096


class RiskModelConfig(BaseModel):
    """All that is needed to rebuild the model, and what it expects as input."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    feature_names: tuple[str, ...] = Field(min_length=1)
    sequence_len: int = Field(ge=0)
    shape: ModelConfig = Field(default_factory=ModelConfig)
    dense: bool = Field(False, description="ablation: one feed-forward layer of the experts' active size instead")
    feature_service: str = ""
    feature_digest: str = ""
    label_delay_days: float = 7.0


class RiskModel(nn.Module):
    """Log-odds of fraud for one card payment, given its features and the card's recent events.

    Args:
        config: shape and input contract.
    """

    def __init__(self, config: RiskModelConfig) -> None:
        super().__init__()
        shape = config.shape
        self.config = config
        self.features = FeatureAdapter(len(config.feature_names), shape.num_bins)
        self.embed = nn.Linear(self.features.width, shape.d_model)
        self.linear = nn.Linear(self.features.width, 1)  # each feature's own curve, straight to the answer
        self.events = SequenceAdapter(shape.d_model) if config.sequence_len else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.d_model)
        self.dropout = nn.Dropout(shape.dropout)
        self.head = nn.Linear(shape.d_model, 1, bias=False)
        self.calibration = PlattScaling()
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.head.weight)

    def forward(self, x_BF: Tensor, s_BNC: Tensor) -> Tensor:
        """Uncalibrated log-odds.

        Args:
            x_BF: features, in the order of ``config.feature_names``.
            s_BNC: recent events, newest first (SEQUENCE_CHANNELS).

        Returns:
            (B,)
        """
        return self.score_code(self.features(x_BF), s_BNC)

    def score_code(self, code_BW: Tensor, s_BNC: Tensor) -> Tensor:
        """Uncalibrated log-odds from the encoded features, W = F * Q."""
        h_BD = self.embed(code_BW)
        memory = self.events(s_BNC) if self.events is not None else None
        for layer in self.layers:
            h_BD = layer(h_BD, memory)
        deep_B1 = self.head(self.dropout(self.norm(h_BD)))
        logit_B: Tensor = (deep_B1 + self.linear(code_BW)).squeeze(-1)
        return logit_B

    def prepare(self, x_BF: NDArray[np.float32], label_B: NDArray[np.int8]) -> None:
        """Fit what is not learned by gradients, from training rows: feature bins and the base rate."""
        self.features.fit(x_BF, label_B)
        rate = (float(label_B.sum()) + 1.0) / (len(label_B) + 2.0)
        with torch.no_grad():
            self.linear.bias.fill_(math.log(rate / (1 - rate)))

    @torch.inference_mode()
    def predict_logits(self, features: NDArray[Any], sequence: NDArray[Any]) -> NDArray[np.float64]:
        """Uncalibrated log-odds (n,) of rows in numpy, in the model's own precision and in evaluation mode."""
        was_training = self.training
        if was_training:  # a switch goes through all modules: with the way back a tenth of a millisecond a served batch
            self.eval()
        try:
            parts = [self(*self._tensors(features[at], sequence[at])).double() for at in _chunks(len(features))]
        finally:
            if was_training:
                self.train()
        return np.concatenate([part.cpu().numpy() for part in parts]) if parts else np.empty(0)

    @torch.no_grad()
    def predict_proba(self, features: NDArray[Any], sequence: NDArray[Any]) -> NDArray[np.float64]:
        """Calibrated probability of fraud.

        A model from :func:`load` computes in float64: a row's score then does not depend on its batch (to 1e-9).

        Args:
            features: (n, F).
            sequence: (n, N, C).

        Returns:
            (n,) in [0, 1].
        """
        logits = torch.from_numpy(self.predict_logits(features, sequence))
        return torch.sigmoid(self.calibration(logits.to(self.calibration.scale.device))).cpu().numpy()

    def attribute(self, features: NDArray[Any], sequence: NDArray[Any]) -> NDArray[np.float64]:
        """Each feature's share of the calibrated log-odds, against the training median of that feature.

        First-order in the piecewise-linear code: gradient times (code - code of the median), summed over a feature's
        bins; exact for the model's additive part.

        Returns:
            (n, F); above 0 speaks for fraud.
        """
        x_BF, s_BNC = self._tensors(features, sequence)
        with torch.enable_grad():
            code_BW = self.features(x_BF).detach().requires_grad_()
            total = self.score_code(code_BW, s_BNC).sum() * self.calibration.scale
            (slope_BW,) = torch.autograd.grad(total, code_BW)
        change_BW = code_BW.detach() - self.features(self.features.median_F.unsqueeze(0))
        share_BF = (slope_BW * change_BW).unflatten(1, (len(self.config.feature_names), -1)).sum(-1)
        return share_BF.double().cpu().numpy()

    @property
    def experts(self) -> list[MoE]:
        """The routed layers; empty in the dense ablation."""
        return [module for module in self.layers.modules() if isinstance(module, MoE)]

    @torch.no_grad()
    def expert_load(self, features: NDArray[Any], sequence: NDArray[Any]) -> NDArray[np.float64]:
        """Share of the rows' routed choices that falls on each expert: (L, E), each line sums to 1."""
        was_training = self.training
        self.eval()
        routers = [moe.router for moe in self.experts]
        try:
            for router in routers:
                router.count_E.zero_()
                router.training = True  # counts; dropout sits elsewhere and stays off
            for at in _chunks(len(features)):
                self(*self._tensors(features[at], sequence[at]))
            counts = np.array([router.count_E.cpu().numpy() for router in routers], dtype=np.float64)
        finally:
            for router in routers:
                router.count_E.zero_()
            self.train(was_training)
        return counts / np.maximum(counts.sum(-1, keepdims=True), 1) if len(counts) else counts

    def save_pretrained(self, path: str | Path) -> Path:
        """Write config.json and model.safetensors (float32) into a folder; the config last, each file atomically."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.model_dump(mode="json")
        tensors = {
            name: (tensor.float() if tensor.is_floating_point() else tensor).contiguous().cpu()
            for name, tensor in self.state_dict().items()
        }
        weights = folder / f".{WEIGHTS_FILE}.{os.getpid()}"
        save_file(tensors, weights, metadata={"config_sha256": _digest(config)})
        description = {"format": FORMAT, "config": config, "weights_sha256": sha256_of(weights)}
        os.replace(weights, folder / WEIGHTS_FILE)
        draft = folder / f".{CONFIG_FILE}.{os.getpid()}"
        draft.write_text(json.dumps(description, indent=2, sort_keys=True), encoding="utf-8")
        os.replace(draft, folder / CONFIG_FILE)
        return folder

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float64) -> RiskModel:
        """Read a saved folder; evaluation mode, float64 unless told (train further in float32).

        Raises:
            ModelFormatError: a file is missing, unreadable, changed or does not fit its description.
        """
        folder = Path(path)
        config = _read_config(folder)
        state = _read_weights(folder, _digest(config.model_dump(mode="json")))
        model = cls(config)
        try:
            model.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise _bad(folder, f"its tensors do not fit its config: {error}") from error
        return model.to(dtype).eval()

    def _tensors(self, features: NDArray[Any], sequence: NDArray[Any]) -> tuple[Tensor, Tensor]:
        like = self.embed.weight
        x_BF = torch.as_tensor(np.ascontiguousarray(features)).to(like)
        s_BNC = torch.as_tensor(np.ascontiguousarray(sequence)).to(like)
        wanted = (len(self.config.feature_names), self.config.sequence_len, len(SEQUENCE_CHANNELS))
        if x_BF.shape[1:] != wanted[:1] or (self.events is not None and s_BNC.shape[1:] != wanted[1:]):
            raise ModelFormatError(
                f"Rows of shape features {tuple(x_BF.shape[1:])}, sequence {tuple(s_BNC.shape[1:])} do not fit a model "
                f"made for features ({wanted[0]},), sequence {wanted[1:]}.",
                fix=f"ask the feature service {self.config.feature_service!r} for the vector",
            )
        return x_BF, s_BNC


class Layer(nn.Module):
    """One block on the current event: attend to the recent events, then pass the experts."""

    def __init__(self, config: RiskModelConfig) -> None:
        super().__init__()
        shape = config.shape
        if config.sequence_len:  # else their parameters would never see a gradient, which data parallelism refuses
            self.attention_norm = RMSNorm(shape.d_model)
            self.attention = TemporalAttention(shape.d_model, shape.num_heads)
        self.feed_norm = RMSNorm(shape.d_model)
        self.feed = _feed_forward(shape, dense=config.dense)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, h_BD: Tensor, memory: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, D) -> (B, D); memory is the embedded recent events and their mask."""
        if memory is not None:
            h_BD = h_BD + self.dropout(self.attention(self.attention_norm(h_BD), *memory))
        y_BD: Tensor = h_BD + self.dropout(self.feed(self.feed_norm(h_BD)))
        return y_BD


def _feed_forward(shape: ModelConfig, *, dense: bool) -> MoE | SwiGLU:
    if dense:
        return SwiGLU(shape.d_model, (shape.top_k + shape.num_shared_experts) * shape.d_expert)
    router = Router(shape.d_model, shape.num_experts, shape.top_k)
    return MoE(shape.d_model, shape.d_expert, router, shape.num_shared_experts)


def _chunks(num_rows: int) -> list[slice]:
    return [slice(start, start + _CHUNK) for start in range(0, num_rows, _CHUNK)]


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _bad(folder: Path, problem: str) -> ModelFormatError:
    return ModelFormatError(f"The model in {str(folder)!r} cannot be used: {problem}.", fix="fetch or train it again")


def _read_config(folder: Path) -> RiskModelConfig:
    try:
        description = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        found, weights = description["format"], description["weights_sha256"]
        config = RiskModelConfig.model_validate(description["config"])
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise _bad(folder, f"{CONFIG_FILE} is missing or broken ({error})") from error
    if found != FORMAT:
        raise _bad(folder, f"format {found!r} is not {FORMAT!r}")
    file = folder / WEIGHTS_FILE
    if not file.is_file() or sha256_of(file) != weights:
        raise _bad(folder, f"{WEIGHTS_FILE} is missing or its checksum is not the one in {CONFIG_FILE}")
    return config


def _read_weights(folder: Path, config_digest: str) -> dict[str, Tensor]:
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as stored:
            if (stored.metadata() or {}).get("config_sha256") != config_digest:
                raise _bad(folder, f"{CONFIG_FILE} was changed after the weights were saved")
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  not a mapping
    except SafetensorError as error:
        raise _bad(folder, f"{WEIGHTS_FILE} is broken ({error})") from error

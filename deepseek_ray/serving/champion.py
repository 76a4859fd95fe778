"""How a version becomes one that serves: verified, loaded, warmed up, and with what contract and threshold."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_ray.data.windows import Declaration, VectorSpec
from deepseek_ray.errors import FeatureError, ModelFormatError, RegistryError
from deepseek_ray.models.risk import RiskModel
from deepseek_ray.online.threshold import THRESHOLD_TAG
from deepseek_ray.registry import CHAMPION, Registry, VersionInfo
from deepseek_ray.serving.commands import LiveModel, Scorer

DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class InputContract:
    """What a version must read to be served without a restart."""

    vector: VectorSpec
    sequence_len: int
    label_delay_days: float

    def refusal(self, info: VersionInfo, delay_days: float) -> str:
        """Why a version does not fit, or ""."""
        pairs = {
            "feature_service": (info.schema.feature_service, self.vector.service),
            "feature_digest": (info.schema.feature_digest, self.vector.digest),
            "sequence_len": (info.schema.sequence_len, self.sequence_len),
            "label_delay_days": (delay_days, self.label_delay_days),
        }
        wrong = [f"{name} {theirs} is not {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours]
        return "; ".join(wrong)


def champion_version(registry: Registry) -> str:
    """Number of the champion.

    Raises:
        RegistryError: there is none.
    """
    version = registry.version_of(CHAMPION)
    if version is None:
        raise RegistryError(f"{registry.name!r} has no champion.", fix="train a version and promote it first")
    return version


def load_version(registry: Registry, version: str) -> tuple[VersionInfo, RiskModel]:
    """A version by number or alias, its files verified and its probes scored.

    Raises:
        RegistryError: there is no such version.
        ModelFormatError: a file is altered or a probe gives another probability.
    """
    info = registry.get(version)
    model = info.load().model
    if not isinstance(model, RiskModel):
        raise ModelFormatError(f"Version {info.version} holds a {type(model).__name__}.", fix="register a RiskModel")
    return info, model


def contract_of(info: VersionInfo, model: RiskModel, declaration: Declaration) -> InputContract:
    """The inputs a version was trained on, as this code computes them.

    Raises:
        FeatureError: no vector of the declaration is the one that it was trained on.
    """
    service, digest = info.schema.feature_service, info.schema.feature_digest
    for vector in declaration.vectors.values():
        if (vector.service, vector.digest) == (service, digest):
            return InputContract(vector, info.schema.sequence_len, model.config.label_delay_days)
    raise FeatureError(
        f"Version {info.version} reads feature service {service!r} with digest {digest[:12]}; "
        "no vector of features/windows.yaml is that one.",
        fix="check out the commit that trained it, or train and promote a version on today's declaration",
    )


def to_live(info: VersionInfo, model: Scorer, threshold: float | None) -> LiveModel:
    """A loaded version with its threshold: the one set for it, else its tag, else one half.

    Raises:
        ModelFormatError: the tag is no probability.
    """
    chosen = threshold if threshold is not None else _tagged_threshold(info)
    return LiveModel(
        scorer=model,
        name=info.name,
        version=info.version,
        run_id=info.run_id,
        feature_service=info.schema.feature_service,
        feature_digest=info.schema.feature_digest,
        feature_names=tuple(info.schema.columns),
        threshold=chosen,
        since_us=time.time_ns() // 1_000,
    )


def _tagged_threshold(info: VersionInfo) -> float:
    text = info.tags.get(THRESHOLD_TAG, str(DEFAULT_THRESHOLD))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ModelFormatError(
            f"Version {info.version} has the tag {THRESHOLD_TAG} = {text!r}.", fix="set it to a probability from 0 to 1"
        )
    return value


def warm_up(model: RiskModel, buckets: Sequence[int] = ()) -> None:
    """Score and explain batches of each size that will come, so that no request pays for a shape's first time.

    Args:
        model: is to serve.
        buckets: sizes that batches are padded to; without them any size will come, and one stands for all.
    """
    config = model.config
    for rows in buckets or (2,):
        values = np.zeros((rows, len(config.feature_names)))
        sequence = np.zeros((rows, config.sequence_len, 6))
        sequence[:, :, 1] = -1.0
        for _ in range(3):
            model.predict_proba(values, sequence)
            model.attribute(values, sequence)

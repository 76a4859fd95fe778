"""Which version serves: the registry's champion, loaded aside and swapped in by its reference."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from deepseek_ray.data.windows import Declaration, VectorSpec
from deepseek_ray.errors import FeatureError, ModelFormatError, RegistryError
from deepseek_ray.logs import get_logger
from deepseek_ray.models.risk import RiskModel
from deepseek_ray.registry import CHAMPION, Registry, VersionInfo
from deepseek_ray.serving.commands import LiveModel, Scorer
from deepseek_ray.serving.monitor import Monitor

logger = get_logger(__name__)

THRESHOLD_TAG = "threshold"
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


def load_champion(registry: Registry) -> tuple[VersionInfo, RiskModel]:
    """The champion, its files verified and its probes scored.

    Raises:
        RegistryError: there is no champion.
        ModelFormatError: a file is altered or a probe gives another probability.
    """
    return load_version(registry, champion_version(registry))


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
    """A version by number or alias; raises like ``load_champion``."""
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


def warm_up(model: RiskModel) -> None:
    """Score and explain once, so that the first request does not pay for it."""
    config = model.config
    values = np.zeros((2, len(config.feature_names)))
    sequence = np.zeros((2, config.sequence_len, 6))
    sequence[:, :, 1] = -1.0
    for _ in range(3):
        model.predict_proba(values, sequence)
        model.attribute(values, sequence)


class ChampionWatcher:
    """Polls the champion alias in the background and swaps a new version in; requests never wait.

    A version that does not load or does not fit keeps the present one serving, and ``refused`` says why.

    Args:
        registry: where the alias is.
        contract: what a version must read.
        live: the version that serves now.
        swap: takes a loaded version.
        threshold: threshold recorded for a version, or None.
    """

    def __init__(
        self,
        registry: Registry,
        contract: InputContract,
        *,
        live: Callable[[], LiveModel],
        swap: Callable[[LiveModel], None],
        threshold: Callable[[str], float | None],
        monitor: Monitor,
        poll_s: float,
    ) -> None:
        self._registry = registry
        self._contract = contract
        self._live = live
        self._swap = swap
        self._threshold = threshold
        self._monitor = monitor
        self._poll_s = poll_s
        self._refused: tuple[str, str] = ("", "")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="champion-watcher", daemon=True)

    @property
    def refused(self) -> str:
        """Why the present champion is not the version that serves, or ""."""
        return self._refused[1]

    def start(self) -> None:
        """Begin to poll."""
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop polling."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def check(self) -> None:
        """Look once, and swap if there is a new champion that fits."""
        version = self._registry.version_of(CHAMPION)
        if version is None or version == self._live().version:
            self._refused = ("", "")
            return
        if version == self._refused[0]:
            return
        try:
            info, model = load_version(self._registry, version)
            refusal = self._contract.refusal(info, model.config.label_delay_days)
            if refusal:
                self._refuse(version, f"version {version} needs a restart of the service: {refusal}")
                return
            live = to_live(info, model, self._threshold(version))
        except ModelFormatError as error:
            self._refuse(version, str(error))
            return
        warm_up(model)
        self._swap(live)
        self._refused = ("", "")
        self._monitor.swaps.labels("swapped").inc()
        logger.info("version %s serves now", version)

    def _run(self) -> None:
        torch.set_num_threads(1)
        failing = False
        while not self._stop.wait(self._poll_s):
            try:
                self.check()
                failing = False
            except Exception:  # the registry is away: what serves goes on serving
                self._monitor.swaps.labels("failed").inc()
                if not failing:
                    logger.exception("the registry cannot be polled; trying again every %g s", self._poll_s)
                failing = True

    def _refuse(self, version: str, why: str) -> None:
        self._refused = (version, why)
        self._monitor.swaps.labels("refused").inc()
        logger.error("%s", why)

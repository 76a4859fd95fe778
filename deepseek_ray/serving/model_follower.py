"""Lets a model server follow its alias: another version is found, loaded, rehearsed and swapped in under traffic.

A version must take the records and give the answers that the first one does, for clients were told so. The one that
serves is copied aside: a replica that comes back starts from the copy, and so does a server without a registry.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_ray.errors import EnvironmentProblemError, ModelFormatError, RegistryError, RegistryUnavailableError
from deepseek_ray.logs import get_logger
from deepseek_ray.registry import Registry
from deepseek_ray.registry.columns import Column
from deepseek_ray.serving.follower import AliasFollower, RefusedError
from deepseek_ray.serving.model_kept import Following, KeptModel
from deepseek_ray.serving.model_kinds import Device, ServedModel, load
from deepseek_ray.serving.model_rehearsal import rehearse
from deepseek_ray.serving.model_slot import ModelSlot
from deepseek_ray.serving.model_target import Target
from deepseek_ray.serving.monitor import ModelMonitor

logger = get_logger(__name__)


@dataclass(frozen=True)
class Loader:
    """How this replica loads models.

    Args:
        device: where they compute.
        buckets: sizes of batches that they will be given.
    """

    device: Device
    buckets: Sequence[int] = ()

    def ready(self, target: Target, beside: ServedModel | None = None) -> ServedModel:
        """A model that may serve: its files verified, its example answered.

        Args:
            target: its files.
            beside: a model whose place it is to take.

        Raises:
            ModelFormatError: a file is altered or missing, or the model fails on its example.
            RegistryError: MLflow cannot load it.
            RefusedError: it cannot take that place.
        """
        model = load(target.folder, self.device)
        if beside is not None and (why := difference(beside, model)):
            raise RefusedError(f"its description is another, so only a restart of the server may serve it: {why}")
        rehearse(model, self.buckets)
        return model


def start_version(
    target: Target, following: Following | None, ready: Callable[[Target], ServedModel]
) -> tuple[Target, ServedModel, str]:
    """The version to start with; the text says why it is not the one that was found.

    A copy that was kept since the server started comes first: it is what the last replica served. The copy from before
    comes last, for a version that cannot serve.

    Args:
        target: found when the server started.
        following: None for a model that is not followed.
        ready: loads and rehearses.

    Raises:
        ModelFormatError, RegistryError: it cannot serve, and there is no copy of one that can.
    """
    kept = KeptModel(Path(following.kept)).target(target.name) if following else None
    if following is None or kept is None:
        return target, ready(target), ""
    newer = Path(kept.path).name != following.seen
    first, second = (kept, target) if newer else (target, kept)
    try:
        return first, ready(first), following.fallback
    except (ModelFormatError, RegistryError) as error:
        if second == first:
            raise
        logger.error("version %s cannot serve, version %s is served instead: %s", first.version, second.version, error)
        return second, ready(second), str(error)


class ModelFollower(AliasFollower):
    """Follows one alias of one model.

    Args:
        slot: what serves.
        target: what that is.
        registry: opens the registry of the model, or gives the open one.
        alias: that is followed.
        find: the files of a version by number, given a folder for what has to be downloaded.
        loader: makes a version ready.
        kept: the copy of what serves.
        fallback: why the server did not start with what the alias names, or "".
        monitor: the server's metrics.
        poll_s: time between two looks.
    """

    def __init__(
        self,
        slot: ModelSlot,
        target: Target,
        registry: Callable[[], Registry],
        alias: str,
        find: Callable[[str, Path], Target],
        loader: Loader,
        kept: KeptModel,
        *,
        fallback: str,
        monitor: ModelMonitor,
        poll_s: float,
    ) -> None:
        super().__init__(monitor.swaps, poll_s)
        self._slot, self._target, self._registry, self._alias = slot, target, registry, alias
        self._find, self._loader, self._kept, self._monitor = find, loader, kept, monitor
        self._confirmed = ""
        self._fallback = fallback
        monitor.fallback.set(bool(fallback))

    def check(self) -> None:
        """Look once, and take over what is new and fits.

        Raises:
            RegistryError: the registry is away.
        """
        version = self._registry().version_of(self._alias)
        self.follow(version, self._slot.live.identity.version)
        self._monitor.refused.set(bool(self.refused))
        if version is not None and version == self._slot.live.identity.version != self._confirmed:
            self._confirm(self._target)

    def take_over(self, version: str) -> None:
        """Let a version answer from the next batch on."""
        with tempfile.TemporaryDirectory(prefix="deepseek-ray-version-") as cache:
            try:
                target = self._find(version, Path(cache))
                model = self._loader.ready(target, self._slot.live.model)
            except RegistryUnavailableError:
                raise
            except RegistryError as error:  # it would not be loaded the next time either
                raise RefusedError(str(error)) from error
            self._slot.swap(model, target.identity)
            self._confirm(target)

    def standing(self) -> dict[str, Any]:
        """What is followed, and what could not be taken over."""
        return {"follows": self._alias, "refused": self.refused, "fallback": self._fallback}

    def _confirm(self, target: Target) -> None:
        """Keep a copy of the version that serves, and that the alias names."""
        self._target, self._confirmed, self._fallback = target, target.version, ""
        self._monitor.fallback.set(0)
        try:
            self._kept.keep(target)
        except (OSError, EnvironmentProblemError) as error:
            logger.error("version %s serves, but no copy of it could be kept: %s", target.version, error)


def difference(before: ServedModel, after: ServedModel) -> str:
    """Why a model cannot take the place of another under the same description, or ""."""
    was, now = _described(before), _described(after)
    names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    return "; ".join(f"{name} is {now.get(name, 'absent')}, not {was.get(name, 'absent')}" for name in names)


def _described(model: ServedModel) -> dict[str, Any]:
    columns = {f"column {column.name!r}": _words(column) for column in model.columns}
    return {**columns, **model.facts, "answer": dict(model.answer)}


def _words(column: Column) -> str:
    parts = [column.type, "required" if column.required else "optional"]
    limits = {"sizes": column.sizes or None, "minimum": column.minimum, "maximum": column.maximum}
    parts += [f"{name} {value}" for name, value in limits.items() if value is not None]
    return ", ".join(parts)

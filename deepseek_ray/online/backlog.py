"""What waits for an update: usable labels that the champion has not seen, and how far its input has moved."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import polars as pl

from deepseek_ray.config import Config
from deepseek_ray.data.datasets import RiskDataset, tail_start
from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.prediction_archive import read_newest, stack_values
from deepseek_ray.data.prediction_log import PredictionLog
from deepseek_ray.data.served import mature_before, matured_rows
from deepseek_ray.online.drift import Reference, compare_all
from deepseek_ray.online.intake import end_of_day, root_until
from deepseek_ray.online.ledger import Ledger
from deepseek_ray.online.watch import varying
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import CHAMPION, Registry, VersionInfo


class Backlog:
    """Looks at one run again and again; what depends on the champion alone is read once a champion.

    Args:
        config: ``data.label_delay_days``, ``updater.drift_rows``, and of ``update`` what decides who trains.
        paths: the run.
        registry: of its model.
    """

    def __init__(self, config: Config, paths: RunPaths, registry: Registry) -> None:
        self._config, self._paths, self._registry = config, paths, registry
        self._ledger = Ledger(paths.updates)
        self._champion: _Champion | None = None

    def waiting(self) -> int:
        """Labels that an update would train on now.

        They came in, are old enough, and are neither counted in the champion nor set aside. Those of the newest days
        judge and do not train: they wait for later days, and an update for their sake could only fail. So would one
        with fewer rows to train on than ``update.min_labels``: then none waits.
        """
        if not self._paths.prediction_log.exists():
            return 0
        champion = self._present()
        with closing(PredictionLog(self._paths.prediction_log, read_only=True)) as log:
            before_us = mature_before(log.horizon()[0], self._config.data.label_delay_days)
            digest = champion.info.schema.feature_digest
            told = log.labels_of(digest, champion.until_us, before_us)
            times = log.times_of(digest, champion.trained_us, before_us)
        aside = self._ledger.ids_set_aside()
        days = {name: at // DAY_US for name, at in times.items() if name not in champion.counted and name not in aside}
        if len(distinct := sorted(set(days.values()))) < 2:
            return 0
        judging = tail_start(distinct, self._config.update.holdout_fraction)
        late = {name for name in champion.counted.keys() - champion.told - aside if told.get(name)}  # frauds after all
        if sum(day < judging for day in days.values()) + len(late) < self._config.update.min_labels:
            return 0
        return len(told.keys() - champion.told - aside - {name for name, day in days.items() if day >= judging})

    def basis(self) -> str:
        """What an update would start from: where this is another one, what the gate refused may be asked again."""
        return f"version {self._registry.version_of(CHAMPION)}, {len(self._ledger.ids_set_aside())} set aside"

    def psi(self) -> float | None:
        """Largest population stability index over the features, newest decisions against the champion's training days.

        None while there are fewer than ``updater.drift_rows`` decisions to compare.
        """
        champion, wanted = self._present(), self._config.updater.drift_rows
        newest = read_newest(self._paths, wanted)
        newest = newest.filter(pl.col("feature_digest") == champion.info.schema.feature_digest)
        if newest.height < wanted:
            return None
        values = stack_values(newest)
        columns = {one.name: values[:, champion.columns[one.name]] for one in champion.references}
        return compare_all(champion.references, columns)[0].psi if columns else None

    def _present(self) -> _Champion:
        version = self._registry.version_of(CHAMPION)
        if self._champion is None or self._champion.info.version != version:
            info = self._registry.get(CHAMPION)
            self._champion = _Champion(info, self._ledger, self._registry, self._training_rows(info))
        return self._champion

    def _training_rows(self, info: VersionInfo) -> RiskDataset:
        """Rows of the days that made the version: served ones for an update, else those of the training."""
        if not self._ledger.descent(info.version).steps:
            return RiskDataset.load(self._paths.datasets / "train.safetensors")
        delay = self._config.data.label_delay_days
        served = matured_rows(self._paths, info.schema.columns, info.schema.feature_digest, delay)
        first, last = (
            int(np.datetime64(info.tags[name], "D").astype(np.int64)) for name in ("train_start", "train_end")
        )
        return served.select((served.day >= first) & (served.day <= last))


class _Champion:
    """What is known of one version."""

    def __init__(self, info: VersionInfo, ledger: Ledger, registry: Registry, rows: RiskDataset) -> None:
        self.info = info
        self.until_us = root_until(info.version, ledger, registry)
        self.trained_us = max(self.until_us, end_of_day(info.tags["train_end"]))
        self.counted = ledger.counted(info.version)
        self.told = {name for name, one in self.counted.items() if one.told}
        self.columns = varying(rows)
        self.references = [Reference.fit(name, rows.features[:, at]) for name, at in self.columns.items()]

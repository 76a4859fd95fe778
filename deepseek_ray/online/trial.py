"""A challenger's trial: champion and challenger are measured on the same rows, and the gate decides."""

from __future__ import annotations

from deepseek_ray.config import DataConfig, GateConfig
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.evidence import Evidence, GateDecision
from deepseek_ray.data.served import newest_rows
from deepseek_ray.online.gate import decide
from deepseek_ray.online.measure import measure
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import InputSchema, VersionInfo


def judging_rows(
    paths: RunPaths,
    champion: VersionInfo | None,
    schema: InputSchema,
    train_end: str,
    holdout: RiskDataset,
    data: DataConfig,
) -> RiskDataset:
    """Rows to judge a version on that was trained from scratch.

    The newest served days whose labels have matured, as many as are held out, where neither side was trained on them:
    the days that were held out before the service began say nothing about what came since. Without such days, or
    without a fraud in them, the held-out days.

    Args:
        paths: the run with the log.
        champion: the version that serves; None for the first one.
        schema: the challenger's input.
        train_end: last day that the challenger was trained on, ISO 8601.
        holdout: labelled rows of the held-out days.
        data: ``label_delay_days`` and ``holdout_days``.
    """
    if champion is None:
        return holdout
    served = newest_rows(
        paths,
        schema.columns,
        schema.feature_digest,
        data.label_delay_days,
        after=max(train_end, champion.tags["train_end"]),
        num_days=data.holdout_days,
    )
    return holdout if served is None else served


def judge(
    champion: VersionInfo | None, challenger: VersionInfo, rows: RiskDataset, old: RiskDataset, bounds: GateConfig
) -> GateDecision:
    """Measure both sides and let the gate decide.

    Args:
        champion: the version that serves; None for the first one.
        challenger: the version on trial.
        rows: labelled rows that neither side was trained on.
        old: labelled rows of older patterns, for the bound on forgetting.
        bounds: what is tolerated.

    Raises:
        DataError: the rows hold no fraud.
        ModelFormatError: a version does not load.
    """
    before = None if champion is None else _measured(champion, rows, old)
    return decide(before, _measured(challenger, rows, old), bounds)


def _measured(info: VersionInfo, rows: RiskDataset, old: RiskDataset) -> Evidence:
    model, contract = info.load().model, info.schema.contract
    return measure(model, rows, name=info.name, version=info.version, contract=contract, old=old)

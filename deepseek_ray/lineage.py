"""Where one decision came from: prediction -> version -> run -> data, feature definitions, code."""

from __future__ import annotations

from typing import Any

from deepseek_ray.data.prediction_log import LoggedPrediction, PredictionLog
from deepseek_ray.errors import DataError
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import Registry, VersionLineage


def trace(prediction_id: str, paths: RunPaths, registry: Registry) -> dict[str, Any]:
    """Follow a prediction id to everything that produced the decision.

    Returns:
        Sections ``decision``, ``transaction``, ``reasons``, ``label``, ``model``, ``data``, ``features``, ``code``.

    Raises:
        DataError: the run has no prediction log, or the id is not in it.
        RegistryError: the version is no longer registered.
    """
    if not paths.prediction_log.exists():
        raise DataError(
            f"The run {str(paths.root)!r} has served no prediction.", fix="name another run folder with --run"
        )
    log = PredictionLog(paths.prediction_log, read_only=True)
    try:
        found = log.get(prediction_id)
        target = log.label_targets([prediction_id]).get(prediction_id)
    finally:
        log.close()
    if found is None:
        raise DataError(
            f"Prediction {prediction_id!r} is not in {str(paths.prediction_log)!r}.",
            fix="copy the whole prediction_id, or name another run folder with --run",
        )
    lineage = registry.lineage(found.model_version)
    label = None if target is None else target.is_fraud
    return {**_decision(found), "label": {"is_fraud": label}, **_origin(found, lineage, registry)}


def _decision(found: LoggedPrediction) -> dict[str, Any]:
    return {
        "decision": {
            "prediction_id": found.prediction_id,
            "decision": found.decision,
            "probability": found.probability,
            "threshold": found.threshold,
            "cold": list(found.cold),
            "latency_ms": found.latency_ms,
        },
        "transaction": found.transaction.model_dump(mode="json"),
        "reasons": [reason.model_dump() for reason in found.reasons],
    }


def _origin(found: LoggedPrediction, lineage: VersionLineage, registry: Registry) -> dict[str, Any]:
    aliases = [alias for alias, number in registry.aliases().items() if number == lineage.version]
    return {
        "model": {
            "name": lineage.name,
            "version": lineage.version,
            "now": sorted(aliases),
            "run_id": lineage.run_id,
            "package_digest": lineage.package_digest,
        },
        "data": {"digest": lineage.data_digest, "train_start": lineage.train_start, "train_end": lineage.train_end},
        "features": {
            "service": found.feature_service,
            "digest": found.feature_digest,
            "same_as_trained": found.feature_digest == lineage.feature_digest,
        },
        "code": {"git_commit": lineage.git_commit},
    }

"""Runs, versions and promotions: the only door to MLflow."""

import logging
import os
import warnings

from deepseek_ray.logs import silence_telemetry

silence_telemetry()
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow warns about type hints of its own classes
    import mlflow.pyfunc  # noqa: F401

# what its database layer has to say reaches the user as one of our errors
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

# ruff: noqa: E402  the environment above must be set before MLflow is imported
from deepseek_ray.registry.audit import AuditEntry
from deepseek_ray.registry.package import InputSchema, Package, Probes, load_package
from deepseek_ray.registry.tracking import Run, Tracking, check_store, git_commit
from deepseek_ray.registry.traffic import CANARY, SHADOW, TrafficBook, TrafficMove, Words
from deepseek_ray.registry.versions import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    Lineage,
    Registry,
    Standing,
    VersionInfo,
    VersionLineage,
)

__all__ = [
    "CANARY",
    "CHALLENGER",
    "CHAMPION",
    "PREVIOUS",
    "SHADOW",
    "AuditEntry",
    "InputSchema",
    "Lineage",
    "Package",
    "Probes",
    "Registry",
    "Run",
    "Standing",
    "Tracking",
    "TrafficBook",
    "TrafficMove",
    "VersionInfo",
    "VersionLineage",
    "Words",
    "check_store",
    "git_commit",
    "load_package",
]

"""One update from the log to the live version: take in, train, register, note, ask the gate, promote or release.

It may be killed anywhere. What it trained on is noted before the promotion and counts from the promotion on
(ledger.py); a promotion is one move of an alias, made here or at the end of a release; everything after it can be made
again.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from deepseek_ray import models
from deepseek_ray.client import RiskClient
from deepseek_ray.config import Config
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.evidence import GateDecision
from deepseek_ray.data.served import matured
from deepseek_ray.errors import DeepseekRayError
from deepseek_ray.online.intake import Intake, keep_memory, take_in
from deepseek_ray.online.ledger import Ledger
from deepseek_ray.online.threshold import THRESHOLD_TAG, policy_threshold
from deepseek_ray.online.trial import judge
from deepseek_ray.online.updater import UpdateResult, remember, warm_start
from deepseek_ray.paths import RunPaths, exclusive, write_stage
from deepseek_ray.registry import CHAMPION, PREVIOUS, InputSchema, Lineage, Probes, Registry, Run, VersionInfo
from deepseek_ray.registry import git_commit as present_commit

SWAP_TIMEOUT_S = 60.0


class Route(Protocol):
    """The way of a version from the gate to champion.

    Attributes:
        champion_at_once: the version is champion when ``offer`` returns.
    """

    champion_at_once: bool

    def ready(self) -> None:
        """Raise where no version could be taken now."""

    def offer(self, version: str, decision: GateDecision) -> str:
        """Take a version if the decision holds; returns why not, or ""."""


class Direct:
    """A version that the gate passes is champion at once."""

    champion_at_once = True

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def ready(self) -> None:
        """At any time."""

    def offer(self, version: str, decision: GateDecision) -> str:
        """See ``Registry.offer``."""
        return self._registry.offer(version, decision)


def update(
    config: Config, paths: RunPaths, registry: Registry, url: str | None = None, route: Route | None = None
) -> dict[str, Any]:
    """The whole cycle as one MLflow run; writes results/update.json and returns it.

    Args:
        config: its ``update`` and ``gate`` sections.
        paths: the run.
        registry: of the run's model; it must have a champion.
        url: wait until the service at this address answers with the new version; not where the route takes longer.
        route: how what the gate passes goes live; None: ``Direct``.

    Raises:
        DataError: too few labels.
        EnvironmentProblemError: another update of this run, or a release, is under way.
    """
    route = route or Direct(registry)
    paths.updates.mkdir(parents=True, exist_ok=True)
    busy = f"Another update of {str(paths.root)!r} is under way."
    with exclusive(paths.updates, busy, "wait for its end"):
        route.ready()
        tags = {"stage": "update", "strategy": config.update.strategy}
        with registry.tracking.start_run("update", tags=tags) as run:
            return _update(config, paths, registry, run, url, route)


def _update(
    config: Config, paths: RunPaths, registry: Registry, run: Run, url: str | None, route: Route
) -> dict[str, Any]:
    start = time.perf_counter()
    champion, ledger = registry.get(CHAMPION), Ledger(paths.updates)
    schema = champion.schema
    served = matured(paths, schema.columns, schema.feature_digest, config.data.label_delay_days)
    intake = take_in(champion.version, served, registry, ledger, config, paths)
    made = train(champion, intake, config, paths)
    info = register(registry, run, made, intake, config)
    ledger.write(info.version, champion.version, intake.labels, run_id=run.run_id, root_until_us=intake.root_until_us)
    old = RiskDataset.load(paths.datasets / "holdout.safetensors")
    decision = judge(champion, info, intake.held_out, old, config.gate)
    refusal = route.offer(info.version, decision)
    promoted = route.champion_at_once and not refusal
    if not refusal:
        keep(registry, info, intake, config, paths)
    stage = {
        "champion_version": champion.version, "challenger_version": info.version, "promoted": promoted,
        "released": not refusal and not promoted,
        "refusal": refusal, "strategy": config.update.strategy, "threshold": float(info.tags[THRESHOLD_TAG]),
        "checks": [asdict(check) for check in decision.checks], "mlflow_run_id": run.run_id,
        "tracking_uri": registry.tracking.shown_uri, "seconds_label_to_live": None,  # a release goes live later
        "rows_new": made.num_new, "rows_replayed": made.num_replayed, "rows_holdout": len(intake.held_out),
        "rows_corrected": intake.num_late, "trained_until_us": int(intake.held_out.order_us.max()), "note": "",
    }  # fmt: skip
    write_stage(paths, "update", stage)  # before the wait: the promotion stands, whatever the service does
    if url and promoted:
        stage["note"] = asyncio.run(_await_swap(url, info.version))
    seconds = time.perf_counter() - start
    if not stage["released"]:
        stage["seconds_label_to_live"] = seconds
    _log(paths, run, stage, made, seconds)
    return stage


def train(champion: VersionInfo, intake: Intake, config: Config, paths: RunPaths) -> UpdateResult:
    """Train the challenger by ``update.strategy``."""
    target = paths.root / "challenger"
    return warm_start(champion.path, intake.train, intake.memory, target, config.update, config.train, seed=config.seed)


def register(registry: Registry, run: Run, made: UpdateResult, intake: Intake, config: Config) -> VersionInfo:
    """Upload the challenger with its descent, its probes and the threshold that the policy asks for."""
    model, held_out = models.load(made.model_dir), intake.held_out
    probes = Probes.of(model, held_out.features, held_out.sequence)
    scores = model.predict_proba(held_out.features, held_out.sequence)
    tags = {THRESHOLD_TAG: str(policy_threshold(scores, config.serving))}
    days = [str(np.datetime64(int(day), "D")) for day in (intake.train.day.min(), intake.train.day.max())]
    lineage = Lineage(
        data_digest=intake.train.digest, git_commit=present_commit(), train_start=days[0], train_end=days[1]
    )
    schema = InputSchema.of(model.config)
    return registry.register(made.model_dir, run.run_id, schema, lineage, probes=probes, tags=tags)


def keep(registry: Registry, info: VersionInfo, intake: Intake, config: Config, paths: RunPaths) -> None:
    """Keep the memory of the new version, of the champion, and of the one that a rollback would bring back."""
    logit = None
    if config.update.strategy == "derpp":
        logit = models.load(info.path).predict_logits(intake.train.features, intake.train.sequence)
    remember(intake.memory, intake.train, logit)
    aliases = registry.aliases()
    keep_memory(intake.memory, info.version, paths, {aliases[name] for name in (CHAMPION, PREVIOUS) if name in aliases})


async def _await_swap(url: str, version: str) -> str:
    """Wait until the service answers with the version; a note where it does not, because the promotion stands."""
    try:
        async with RiskClient(url) as client:
            give_up = time.monotonic() + SWAP_TIMEOUT_S
            while (live := (await client.model())["model_version"]) != version:
                if time.monotonic() > give_up:
                    return f"{url} still answers with version {live}, see the service's log"
                await asyncio.sleep(0.2)
    except DeepseekRayError as error:
        return f"it is not known whether {url} answers with version {version}: {error}"
    return ""


def _log(paths: RunPaths, run: Run, stage: dict[str, Any], made: UpdateResult, seconds: float) -> None:
    for record in made.history:
        run.log_metrics(record.numbers(), step=record.epoch)
    run.log_metrics({check["name"]: check["value"] for check in stage["checks"]})
    run.log_dict(stage, "update.json")
    write_stage(paths, "update", stage)
    verdict = "promoted" if stage["promoted"] else "released" if stage["released"] else "refused"
    note = f"; {stage['note']}" if stage["note"] else ""
    print(f"version {stage['challenger_version']} {verdict} after {seconds:.1f} s{note}")

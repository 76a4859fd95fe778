"""Follows the registry: its champion and its traffic policy, loaded aside and swapped in by reference.

Requests never wait. A version is verified, loaded and warmed up aside. What leaves the policy is let go before what
comes is loaded, so that in memory there is what serves, and one model more while the champion changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from deepseek_ray.errors import ConfigError, ModelFormatError, RegistryError, RegistryUnavailableError
from deepseek_ray.logs import get_logger
from deepseek_ray.models.risk import RiskModel
from deepseek_ray.registry import CHAMPION, Registry, Standing, VersionInfo
from deepseek_ray.serving.arm_metrics import ArmMetrics, ArmTally
from deepseek_ray.serving.arms import ArmPlan, LiveArm
from deepseek_ray.serving.champion import InputContract, load_version, to_live, warm_up
from deepseek_ray.serving.commands import LiveModel
from deepseek_ray.serving.follower import AliasFollower, RefusedError
from deepseek_ray.serving.monitor import Monitor
from deepseek_ray.serving.predictor import Predictor
from deepseek_ray.serving.traffic import NO_TRAFFIC, Arm, Shadow, TrafficPolicy

logger = get_logger(__name__)

FIRST_LOOK_S = 30.0
"""A registry that does not answer holds a start up for so long at most."""


@dataclass(frozen=True)
class Hooks:
    """What the watcher asks of its neighbours.

    Attributes:
        threshold: threshold recorded for a version, or None.
        withdrawn: arms that lost their traffic under the policy of a text.
        served: told each champion that serves, once, in the watcher's thread.
        hand_over: makes a champion serve that reads other features than the present one, and returns its contract;
            raises when this service cannot compute them.
    """

    threshold: Callable[[str], float | None]
    withdrawn: Callable[[str], frozenset[str]] = lambda text: frozenset()
    served: Callable[[VersionInfo], None] = lambda info: None
    hand_over: Callable[[VersionInfo, RiskModel, LiveModel], InputContract] | None = None


class RegistryWatcher(AliasFollower):
    """Polls the registry in the background.

    A version that does not load or does not fit keeps the present one serving, and ``refused`` says why.

    Args:
        registry: opens the registry, or gives the open one.
        contract: what a version must read.
        predictor: where versions serve.
        hooks: thresholds, withdrawn arms, and who is told of a new champion.
        monitor: the service's metrics.
        metrics: the arms'.
        poll_s: time between two looks.
    """

    def __init__(
        self,
        registry: Callable[[], Registry],
        contract: InputContract,
        predictor: Predictor,
        hooks: Hooks,
        *,
        monitor: Monitor,
        metrics: ArmMetrics,
        poll_s: float,
    ) -> None:
        super().__init__(monitor.swaps, poll_s)
        self._registry = registry
        self._contract = contract
        self._predictor = predictor
        self._hooks = hooks
        self._monitor = monitor
        self._metrics = metrics
        self._confirmed = ""
        self._followed: tuple[object, ...] = ()
        self._torn: dict[str, str] = {}
        self.arm_refusals: dict[str, str] = {}

    def start(self, wait_s: float = FIRST_LOOK_S) -> None:
        """Look once, wait for that, and go on polling: the first request meets the arms that the policy names."""
        super().start()
        if not self._looked.wait(wait_s):
            logger.error("the registry was not read within %g s: the champion answers all until it is", wait_s)

    def check(self) -> None:
        """Look once, and take over what is new and fits.

        Raises:
            RegistryError: the registry is away.
        """
        standing = self._registry().standing()
        version = standing.aliases.get(CHAMPION)
        try:
            self.follow(version, self._predictor.live.version)
            if version is not None and version == self._predictor.live.version and version != self._confirmed:
                self._confirm(self._registry().get(version))
        finally:  # a champion that cannot be taken over yet must not keep arms that somebody takes back
            self._metrics.champion_refused.set(bool(self.refused))
            self._follow_traffic(standing)

    def take_over(self, version: str) -> None:
        """Let a version serve as champion; one that reads other features by way of a handover."""
        self._confirm(self._crown(version))

    def _crown(self, version: str) -> VersionInfo:
        if self._predictor.crown(version):  # the canary that became champion is here already
            return self._registry().get(version)
        info, model = load_version(self._registry(), version)
        refusal = self._contract.refusal(info, model.config.label_delay_days)
        if refusal and self._hooks.hand_over is None:
            raise RefusedError(f"version {version} needs a restart of the service: {refusal}")
        live = self._live(info, model)
        if refusal and self._hooks.hand_over is not None:
            self._contract = self._hooks.hand_over(info, model, live)
        else:
            self._predictor.swap(live)
        return info

    def _confirm(self, info: VersionInfo) -> None:
        self._hooks.served(info)
        self._confirmed = info.version

    def _follow_traffic(self, standing: Standing) -> None:
        gone = self._hooks.withdrawn(standing.traffic)
        seen = (standing.traffic, tuple(sorted(standing.aliases.items())), gone, self._predictor.live.version)
        if seen == self._followed:
            return
        if standing.traffic != self._predictor.plan.text:
            self._torn = {}
        try:
            policy = TrafficPolicy.parse(standing.traffic)
        except ConfigError as error:
            logger.error("the registry's traffic policy is refused: %s", error)
            self.arm_refusals, self._followed = {"policy": str(error)}, seen
            return
        self.arm_refusals = {}
        self._drop_others(policy, gone)
        arms = [arm for arm in policy.arms if arm.alias not in gone]
        loaded = self._predictor.plan.versions
        models = {arm.version: live for arm in arms if (live := self._model(arm, standing, loaded)) is not None}
        shadow = self._model(policy.shadow, standing, loaded | models) if policy.shadow else None
        self._predictor.reroute(lambda plan: self._plan(plan, policy, standing.traffic, models, shadow))
        self._show(policy)
        self._followed = seen

    def _drop_others(self, policy: TrafficPolicy, gone: frozenset[str]) -> None:
        """Let go of versions that will not serve any more before others are loaded."""
        pinned = {arm.version for arm in policy.arms if arm.alias not in gone}

        def dropped(plan: ArmPlan) -> ArmPlan:
            others = {arm.alias for arm in plan.arms if arm.live.version not in pinned}
            keep = (
                plan.shadow is not None and policy.shadow is not None and plan.shadow.version == policy.shadow.version
            )
            return replace(plan.without(others), shadow=plan.shadow if keep else None)

        self._predictor.reroute(dropped)

    def _model(self, part: Arm | Shadow, standing: Standing, loaded: Mapping[str, LiveModel]) -> LiveModel | None:
        """An arm's version, loaded; None, and a refusal, when it cannot serve."""
        version, named = part.version, standing.aliases.get(part.alias)
        if version == self._predictor.live.version:
            return None  # it is the champion by now: nothing to split
        name = "shadow" if isinstance(part, Shadow) else part.alias
        if named != version:
            self.arm_refusals[name] = f"{part.alias} names version {named or 'none'} now, the policy {version}"
            return None
        if version in self._torn:
            self.arm_refusals[name] = self._torn[version]
            return None
        try:
            return loaded.get(version) or self._load_arm(version)
        except RegistryUnavailableError:
            raise
        except (RefusedError, ModelFormatError, RegistryError) as error:
            self._torn[version] = self.arm_refusals[name] = str(error)
            self._monitor.swaps.labels("refused").inc()
            logger.error("the %s cannot serve: %s", name, error)
            return None

    def _plan(
        self,
        plan: ArmPlan,
        policy: TrafficPolicy,
        text: str,
        models: dict[str, LiveModel],
        shadow: LiveModel | None,
    ) -> ArmPlan:
        def newest(live: LiveModel) -> LiveModel:
            return plan.versions.get(live.version, live)  # its threshold may have moved meanwhile

        kept = {arm.alias: arm for arm in plan.arms} if text == plan.text else {}
        arms = []
        gone = self._hooks.withdrawn(
            text
        )  # asked again: loading takes long, and an arm may have been withdrawn meanwhile
        for arm in policy.arms:
            if arm.alias not in gone and (live := models.get(arm.version)) is not None:
                old = kept.get(arm.alias)
                tally = old.tally if old else ArmTally(arm.alias, arm.version, self._metrics)
                arms.append(LiveArm(arm.alias, arm.percent, newest(live), tally))
        beside = plan.tally if kept else None
        if (
            beside is None or beside.version != plan.champion.version
        ):  # another champion's calls say nothing of this one
            beside = ArmTally(CHAMPION, plan.champion.version, self._metrics)
        next_plan = replace(plan, policy=policy, text=text, shadow=newest(shadow) if shadow else None)
        return replace(next_plan.with_arms(tuple(arms)), tally=beside if arms else None)

    def _load_arm(self, version: str) -> LiveModel:
        info, model = load_version(self._registry(), version)
        refusal = self._contract.refusal(info, model.config.label_delay_days)
        if refusal:
            raise RefusedError(f"version {version} reads other features than the champion: {refusal}")
        return self._live(info, model)

    def _live(self, info: VersionInfo, model: RiskModel) -> LiveModel:
        live = to_live(info, model, self._hooks.threshold(info.version))
        warm_up(model, self._predictor.buckets)
        return live

    def _show(self, policy: TrafficPolicy) -> None:
        plan = self._predictor.plan
        self._metrics.percent.clear()
        rest = 100.0 - sum(arm.percent for arm in plan.arms)
        self._metrics.percent.labels(CHAMPION, plan.champion.version).set(rest)
        for arm in plan.arms:
            self._metrics.percent.labels(arm.alias, arm.live.version).set(arm.percent)
        self._metrics.refused.clear()
        versions = {arm.alias: arm.version for arm in policy.arms} | (
            {"shadow": policy.shadow.version} if policy.shadow else {}
        )
        for alias in self.arm_refusals:
            self._metrics.refused.labels(alias, versions[alias]).set(1)
        if policy != NO_TRAFFIC:
            shown = ", ".join(f"{arm.alias} (version {arm.live.version}) {arm.percent:g} %" for arm in plan.arms)
            logger.info("traffic: %s; champion %g %%", shown or "no arm", rest)

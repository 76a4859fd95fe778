"""``deepseek-ray traffic``: who answers which share of the cards. A running service follows within its poll."""

from __future__ import annotations

import argparse
import getpass
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from deepseek_ray.cli import settings_of
from deepseek_ray.commands import open_registry, promote_version, told
from deepseek_ray.errors import ConfigError, RegistryError
from deepseek_ray.registry import CHAMPION, SHADOW, Registry, TrafficBook, VersionInfo
from deepseek_ray.serving.release import stands
from deepseek_ray.serving.shadow import ShadowReport, compare
from deepseek_ray.serving.traffic import TrafficPolicy

_ARM = re.compile(r"(?P<alias>canary|challenger)(?:@(?P<version>[0-9]{1,9}))?(?:=(?P<percent>[0-9.]+)%?)?")
SHOWN_MOVES = 10


def show(options: argparse.Namespace) -> int:
    """Print the policy, the shadow's comparison, and the last moves."""
    _, paths = settings_of(options)
    registry = open_registry(options)
    book, standing = TrafficBook(registry), registry.standing()
    policy = TrafficPolicy.parse(standing.traffic)
    beside = compare(paths.shadow_scores, paths.prediction_log, policy.shadow.version) if policy.shadow else None
    if options.json:
        shown = {"policy": policy.model_dump(mode="json"), "shadow": beside.plain() if beside else None}
        print(json.dumps({**shown, "moves": [asdict(move) for move in book.moves()]}, indent=2))
        return 0
    print(f"champion    version {standing.aliases.get(CHAMPION, '-'):<5} {policy.champion_percent:g} %")
    for arm in policy.arms:
        named = standing.aliases.get(arm.alias)
        stray = "" if named == arm.version else f"  no traffic: {arm.alias} names version {named or 'none'} now"
        print(f"{arm.alias:<11} version {arm.version:<5} {arm.percent:g} %{stray}")
    if policy.schedule is not None:
        steps = " -> ".join(f"{step:g}" for step in policy.schedule.steps)
        print(
            f"schedule    {steps} %, each {policy.schedule.dwell_s:g} s and {policy.schedule.min_decisions} decisions"
        )
        if policy.next_percent is None and policy.release is None:
            print("            the last step: deepseek-ray traffic promote asks the gate")
    if policy.release is not None:
        print(f"release     {stands(policy)}")
    if beside is not None:
        print(_shadow_line(beside))
    print("\n".join(told(move) for move in book.moves()[-SHOWN_MOVES:]))
    return 0


def set_traffic(options: argparse.Namespace) -> int:
    """Give arms a share, set the shadow, the schedule or the limits."""
    _check_given(options)
    registry = open_registry(options)
    book, text = TrafficBook(registry), TrafficBook(registry).read()
    before = TrafficPolicy.parse(text)
    schedule = _schedule(options, before)
    fields: dict[str, Any] = {
        "arms": _arms(options, registry, before, schedule),
        "shadow": _shadow(options, registry, before),
        "limits": before.limits.model_dump() | _limits(options.limit),
    }
    if len(fields["arms"]) == 1 or options.schedule:
        fields["schedule"] = schedule
    after = _with_release(before, before.followed_by(TrafficPolicy.make(**fields)))
    _point(registry, after, options.note)
    book.move(
        text, after.model_dump_json(), action="set", who=_who(), why=options.note, summary=_summary(before, after)
    )
    print(_summary(before, after))
    return 0


def promote(options: argparse.Namespace) -> int:
    """Promote the arm's version if the gate agrees, and end the arm."""
    config, _ = settings_of(options)
    registry = open_registry(options)
    book, text = TrafficBook(registry), TrafficBook(registry).read()
    policy = TrafficPolicy.parse(text)
    if len(policy.arms) != 1:
        raise ConfigError(
            f"The traffic has {len(policy.arms)} arms; exactly one can be promoted.",
            fix="see deepseek-ray traffic show, or name a version: deepseek-ray registry promote",
        )
    arm = policy.arms[0]
    promote_version(registry, arm.version, config.gate)
    after, summary = policy.without(arm.alias), f"{arm.alias} (version {arm.version}) is the champion"
    book.move(text, after.model_dump_json(), action="promote", who=_who(), why=options.note, summary=summary)
    return 0


def rollback(options: argparse.Namespace) -> int:
    """Give every card back to the champion, and end a release; a shadow that was set by hand goes on."""
    book = TrafficBook(open_registry(options))
    text = book.read()
    before = TrafficPolicy.parse(text)
    after = before.ended() if before.release else before
    for arm in after.arms:
        after = after.without(arm.alias)
    if after != before:
        summary = _summary(before, after)
        book.move(text, after.model_dump_json(), action="rollback", who=_who(), why=options.note, summary=summary)
    print("champion: 100 %")
    return 0


def _check_given(options: argparse.Namespace) -> None:
    """Refuse a move that moves nothing.

    Raises:
        ConfigError: no setting is given.
    """
    values = (options.shadow, options.schedule, options.dwell, options.min_decisions)
    if not options.arms and not options.limit and all(value is None for value in values):
        raise ConfigError(
            "traffic set was given nothing to set.",
            fix="name an arm, as in canary@7=5, or --shadow, --schedule or --limit; see what is set with traffic show",
        )


def _arms(
    options: argparse.Namespace, registry: Registry, before: TrafficPolicy, schedule: dict[str, Any] | None
) -> list[dict[str, Any]]:
    arms = {str(arm.alias): arm.model_dump() for arm in before.arms}
    named: dict[str, str] = {}
    for text in options.arms:
        found = _ARM.fullmatch(text)
        if found is None:
            raise ConfigError(f"{text!r} names no arm.", fix="write ARM[@VERSION][=PERCENT], for example canary@7=5")
        alias, percent = found["alias"], _percent(found["percent"], text, schedule)
        if alias in named:
            raise ConfigError(f"{alias} is given twice: {named[alias]!r}, {text!r}.", fix="give each arm once")
        named[alias] = text
        arms.pop(alias, None)
        if percent:
            version = _version(registry, alias, found["version"])
            arms[alias] = {"alias": alias, "version": version, "percent": percent}
    if sum(arm["percent"] for arm in arms.values()) > 100:
        shares = " and ".join(f"{arm['alias']}={arm['percent']:g}" for arm in arms.values())
        raise ConfigError(f"{shares} are more than 100 % of the traffic.", fix="give an arm less, or 0 to end it")
    return list(arms.values())


def _with_release(before: TrafficPolicy, after: TrafficPolicy) -> TrafficPolicy:
    """The same with the release that was under way, where its version still is the shadow, or the arm on a schedule."""
    if before.release is None or not after.carries(before.release):
        return after
    return after.model_copy(update={"release": before.release})


def _percent(given: str | None, text: str, schedule: dict[str, Any] | None) -> float:
    if given is None and schedule is not None:
        return float(schedule["steps"][0]) if "steps" in schedule else 1.0
    try:
        percent = float(given or "")
    except ValueError:
        raise ConfigError(
            f"{text!r} gives no percentage.", fix="add one, as in canary=5, or a --schedule that begins with one"
        ) from None
    if percent > 100:
        raise ConfigError(f"{text!r} gives {percent:g} % of the traffic.", fix="give at most 100; 0 ends the arm")
    return percent


def _shadow(options: argparse.Namespace, registry: Registry, before: TrafficPolicy) -> dict[str, Any] | None:
    if options.shadow is None:
        return before.shadow.model_dump() if before.shadow else None
    if options.shadow == "off":
        return None
    if not str(options.shadow).isdigit():
        raise ConfigError(f"--shadow {options.shadow!r} is no version.", fix="give a number, or 'off'")
    return {"alias": SHADOW, "version": _version(registry, SHADOW, options.shadow)}


def _version(registry: Registry, alias: str, number: str | None) -> str:
    """The version of that number, else the one that the alias names; loaded and checked.

    Raises:
        RegistryError: nothing is named, ``challenger`` names another one, or it does not read what is served.
        ModelFormatError: it does not load.
    """
    named = registry.version_of(alias)
    if alias == "challenger" and number not in (None, named):
        raise RegistryError(
            f"challenger names version {named or 'none'}, not {number}.", fix=f"send it out as canary@{number}"
        )
    if number is None and named is None:
        raise RegistryError(f"No version is named {alias!r}.", fix=f"name one: {alias}@VERSION=PERCENT")
    info = registry.get(number or str(named))
    _check_contract(registry, info)
    return info.version


def _point(registry: Registry, policy: TrafficPolicy, why: str) -> None:
    """Let the aliases name what the policy pins."""
    pinned: dict[str, str] = {arm.alias: arm.version for arm in policy.arms}
    if policy.shadow is not None:
        pinned[policy.shadow.alias] = policy.shadow.version
    for alias, version in pinned.items():
        if registry.version_of(alias) != version:
            TrafficBook(registry).point(alias, version, who=_who(), why=why)


def _check_contract(registry: Registry, info: VersionInfo) -> None:
    champion = registry.get(CHAMPION)
    if info.version == champion.version:
        raise RegistryError(f"Version {info.version} is the champion.", fix="choose another version")
    delays = [getattr(getattr(one.load().model, "config", None), "label_delay_days", None) for one in (info, champion)]
    if info.schema.contract != champion.schema.contract or delays[0] != delays[1]:
        raise RegistryError(
            f"Version {info.version} reads {info.schema.feature_service!r} ({info.schema.feature_digest[:12]}, "
            f"sequence of {info.schema.sequence_len}, labels after {delays[0]} days), the champion "
            f"{champion.schema.feature_service!r} ({champion.schema.feature_digest[:12]}, sequence of "
            f"{champion.schema.sequence_len}, labels after {delays[1]} days): no service computes both.",
            fix="promote it by the gate, see docs/serving.md, or train a version on the champion's features",
        )


def _schedule(options: argparse.Namespace, before: TrafficPolicy) -> dict[str, Any] | None:
    given = {"dwell_s": options.dwell, "min_decisions": options.min_decisions}
    changes = {name: value for name, value in given.items() if value is not None}
    if options.schedule is not None:
        return {"steps": _steps(options.schedule), **changes}
    if before.schedule is None:
        if changes:
            raise ConfigError("--dwell and --min-decisions belong to a schedule.", fix="add --schedule 1,5,25,100")
        return None
    return before.schedule.model_dump() | changes


def _steps(text: str) -> list[float]:
    try:
        return [float(step) for step in text.split(",")]
    except ValueError:
        raise ConfigError(f"--schedule {text!r} is no list of percentages.", fix="write it as 1,5,25,100") from None


def _limits(given: Sequence[str]) -> dict[str, str]:
    pairs = dict(item.partition("=")[::2] for item in given)
    if empty := next((item for item in given if not item.partition("=")[2]), ""):
        raise ConfigError(f"--limit {empty!r} has no value.", fix="write NAME=VALUE, as in max_psi=0.3")
    return pairs


def _summary(before: TrafficPolicy, after: TrafficPolicy) -> str:
    def shown(policy: TrafficPolicy) -> str:
        arms = [f"{arm.alias} (version {arm.version}) {arm.percent:g} %" for arm in policy.arms]
        shadow = [f"shadow (version {policy.shadow.version})"] if policy.shadow else []
        return ", ".join(["champion " + f"{policy.champion_percent:g} %", *arms, *shadow])

    return f"{shown(before)} -> {shown(after)}"


def _shadow_line(report: ShadowReport) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    return (
        f"shadow      version {report.version:<5} {report.scored} scored, PSI {number(report.psi)}, "
        f"{number(report.differing_decisions)} of the decisions differ; {report.labels} labels: average precision "
        f"{number(report.average_precision)}, served {number(report.served_average_precision)}"
    )


def _who() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such user in this container
        return "unknown"

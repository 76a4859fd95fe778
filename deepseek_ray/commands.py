"""The verbs of ``deepseek-ray`` that ask the registry or the log. Each prints and returns an exit status."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from deepseek_ray.cli import settings_of
from deepseek_ray.config import GateConfig
from deepseek_ray.lineage import trace
from deepseek_ray.online.recorded import decide_again
from deepseek_ray.registry import CHAMPION, AuditEntry, Registry, TrafficBook, TrafficMove

EXIT_ALARM = 3
"""Exit status of ``drift`` when a bound is passed: 1 is a crash, 2 an error."""


def explain(options: argparse.Namespace) -> int:
    """Print the lineage of a prediction."""
    _, paths = settings_of(options)
    sections = trace(options.prediction_id, paths, open_registry(options))
    if options.json:
        print(json.dumps(sections, indent=2))
        return 0
    for name, section in sections.items():
        print(name)
        rows = section if isinstance(section, list) else [section]
        for row in rows:
            print("\n".join(f"  {key:<18} {_shown(value)}" for key, value in row.items()))
    return 0


def history(options: argparse.Namespace) -> int:
    """Print the audit table and the aliases."""
    registry = open_registry(options)
    entries, aliases, moves = registry.history(), registry.aliases(), TrafficBook(registry).moves()
    if options.json:
        shown = {"history": [_plain(entry) for entry in entries], "traffic": [asdict(move) for move in moves]}
        print(json.dumps({"aliases": aliases, **shown}, indent=2))
        return 0
    print(", ".join(f"{alias}: version {number}" for alias, number in sorted(aliases.items())) or "no version is named")
    lines: list[AuditEntry | TrafficMove] = [*entries, *moves]
    for entry in sorted(lines, key=lambda one: one.at):
        if isinstance(entry, TrafficMove):
            print(told(entry))
            continue
        move = f"champion {entry.champion_before or '-'} -> {entry.champion_after or '-'}"
        print(f"{entry.at}  {entry.action:<8} version {entry.version:<4} {move}  {entry.note}".rstrip())
        for check in json.loads(entry.decision).get("checks", []):
            verdict = "pass" if check["passed"] else "FAIL"
            print(f"    {verdict}  {check['name']:<24} {_number(check['value'])} (bound {_number(check['bound'])})")
    return 0


def told(move: TrafficMove) -> str:
    """A move of the traffic as one line."""
    return f"{move.at}  {move.action:<8} {move.summary}  by {move.who}: {move.why}".rstrip(": ")


def promote(options: argparse.Namespace) -> int:
    """Decide again on the recorded evidence of a version and of the champion, under the present bounds."""
    config, _ = settings_of(options)
    promote_version(open_registry(options), options.version, config.gate)
    return 0


def promote_version(registry: Registry, version: str, bounds: GateConfig) -> None:
    """Let the gate decide on the recorded evidence of a version, promote it, and say so.

    Raises:
        GateRefusedError: the gate refuses.
        RegistryError: there is no such version, or it was never measured.
    """
    champion = registry.version_of(CHAMPION)
    decision = decide_again(registry, version, bounds)
    info = registry.promote(decision.version, decision)
    print(f"champion: version {info.version} (before: {champion or 'none'})")


def rollback(options: argparse.Namespace) -> int:
    """Make the previous version champion again."""
    info = open_registry(options).rollback(options.note)
    print(f"champion: version {info.version}")
    return 0


def delete(options: argparse.Namespace) -> int:
    """Delete a version that no alias protects; its line in the history stays."""
    registry = open_registry(options)
    registry.delete_version(options.version)
    print(f"deleted: version {options.version} of {registry.name!r}")
    return 0


def verify_features(options: argparse.Namespace) -> int:
    """Recompute every served vector by the point-in-time join; status 1 when one differs or none was compared."""
    from deepseek_ray.data.verify import verify_run  # brings Feast, whose import takes seconds

    config, paths = settings_of(options)
    features = config.features
    found = verify_run(
        paths,
        features.vector,
        label_delay_days=config.data.label_delay_days,
        sequence_len=features.sequence_len,
        limit=options.limit,
    )
    print(f"{found.num_differences} differences in {found.rows} predictions of {found.features} numbers each")
    if found.num_differences:
        print(f"largest: {found.max_difference:g}; the first {len(found.differences)}:")
        print("\n".join(f"  {difference}" for difference in found.differences))
    if found.other_vectors:
        print(f"{found.other_vectors} predictions of another vector or declaration were not compared")
    return 0 if found.rows and not found.num_differences else 1


def compact(options: argparse.Namespace) -> int:
    """Move what the prediction log holds into parquet."""
    from deepseek_ray.data import prediction_archive

    _, paths = settings_of(options)
    manifest = prediction_archive.compact(paths, prune=options.prune)
    predictions, labels = (sum(part.rows for part in parts) for parts in (manifest.predictions, manifest.feedback))
    print(f"{predictions} predictions and {labels} labels in {paths.prediction_archive}")
    return 0


def drift(options: argparse.Namespace) -> int:
    """Print drift and quality of the live decisions; status 3 when a bound of the section ``drift`` is passed."""
    from deepseek_ray.online.drift_run import report_on  # statistics and plots that the other verbs do without
    from deepseek_ray.report import drift_view

    if options.days is not None:
        options.overrides.append(f"drift.window_days={options.days}")
    config, paths = settings_of(options)
    registry = open_registry(options)
    report = report_on(paths, config, registry.get(CHAMPION).version, registry.get)
    plain = report.plain()
    print(json.dumps(plain, indent=2) if options.json else "\n".join(drift_view.table(plain, options.limit)))
    if options.plot:
        drift_view.plot(plain, options.plot)
    return EXIT_ALARM if report.alarms else 0


def open_registry(options: argparse.Namespace) -> Registry:
    """The registry of the run that the options name."""
    config, paths = settings_of(options)
    return Registry.open(paths, config.stores, name=config.model_name, create=False)


def _plain(entry: AuditEntry) -> dict[str, Any]:
    return {**asdict(entry), "decision": json.loads(entry.decision)}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value in (None, "") else str(value)

"""Write the report of a run: report.html for people, report.json for programs.

python -m pipelines.risk.report --run runs/mine
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from deepseek_ray.cli import add_settings, guarded, settings_of
from deepseek_ray.config import Config
from deepseek_ray.errors import RegistryUnavailableError
from deepseek_ray.paths import RunPaths, write_stage
from deepseek_ray.registry import Registry
from deepseek_ray.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, write the report, print where it is."""
    parser = argparse.ArgumentParser(prog="deepseek-ray report", description="Write the report of a run.")
    add_settings(parser)
    config, paths = settings_of(parser.parse_args(argv))
    _keep_history(config, paths)
    print(write_report(paths))
    return 0


def _keep_history(config: Config, paths: RunPaths) -> None:
    """Bring results/history.json up to the registry; without one the page shows what was kept before."""
    try:
        registry = Registry.open(paths, config.stores, name=config.model_name, create=False)
        write_stage(paths, "history", [asdict(entry) for entry in registry.history()])
    except RegistryUnavailableError as error:
        print(f"note: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(guarded(main))

"""Write the report of a run: report.html for people, report.json for programs.

python -m pipelines.risk.report --run runs/mine
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deepseek_ray.cli import guarded
from deepseek_ray.paths import resolve_run
from deepseek_ray.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, write the report, print where it is."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.risk.report", description="Write the report of a run.")
    parser.add_argument("--run", type=Path, help="run folder (default: runs/latest)")
    arguments = parser.parse_args(argv)
    print(write_report(resolve_run(arguments.run)))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))

"""``deepseek-ray serve``: the risk service of a run, or one model where one is named."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from deepseek_ray.cli import guarded
from serve_apps import model, risk


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the program that is meant; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    program = model if model.parser().parse_args(given).model else risk
    return program.main(given)


if __name__ == "__main__":
    sys.exit(guarded(main))

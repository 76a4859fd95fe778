"""The report of a run: one self-contained page for people, one flat JSON file for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_ray.paths import RunPaths, replace_text
from deepseek_ray.report.page import render
from deepseek_ray.report.results import read_results
from deepseek_ray.report.verdict import flatten

__all__ = ["write_report"]


def write_report(paths: RunPaths, *, extra: Mapping[str, Any] | None = None) -> Path:
    """Write ``report.html`` and ``report.json`` from what the stages left in ``<run>/results``.

    Stages that have not run are named as such; both files replace older ones whole or not at all.

    Args:
        paths: the run.
        extra: figures only the caller knows, by their key in report.json, e.g. ``{"wall_s": 583.0}``; they are kept
            in ``results/run.json``, so that a report written again still has them.

    Returns:
        The page.

    Raises:
        SchemaError: a result file is malformed; the message names the file and the field.
        EnvironmentProblemError: the run folder does not exist or cannot be written.
    """
    paths.existing()
    results = read_results(paths.results, extra)
    flat = flatten(results)
    page = render(paths, results, flat)
    paths.create()
    if extra:
        paths.results.mkdir(exist_ok=True)
        replace_text(paths.results / "run.json", json.dumps(results.run, indent=2) + "\n")
    replace_text(paths.report_json, json.dumps(flat, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    replace_text(paths.report_html, page)
    return paths.report_html

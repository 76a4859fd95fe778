"""What makes a checkpoint folder complete: a manifest, written last, with the sha256 of every file and of itself.

The newest folder whose files all match wins; a torn or changed one is skipped with a warning, and an older one is used.
This is our own commit: a report to Ray Train is none, because a crash right after it loses the report.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deepseek_ray.errors import CheckpointError
from deepseek_ray.logs import get_logger
from deepseek_ray.models.files import sha256_of
from deepseek_ray.paths import replace_text, sync

MANIFEST = "manifest.json"
_log = get_logger(__name__)


def commit(target: Path, content: Mapping[str, Any]) -> None:
    """Declare a folder complete; ``content`` is plain data to keep with it."""
    names = sorted(path.name for path in target.iterdir() if path.name != MANIFEST)
    for name in names:
        sync(target / name)
    whole = {**content, "files": _digests(target, names)}
    replace_text(target / MANIFEST, json.dumps({**whole, "digest": _digest(whole)}, indent=2, sort_keys=True))


def read(path: Path) -> dict[str, Any]:
    """The content of a complete folder; ``files`` maps names to digests.

    Raises:
        CheckpointError: the manifest is missing or broken, or a file is missing, changed or not in it.
    """
    try:
        content: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if content.pop("digest") != _digest(content):
            raise CheckpointError(f"Checkpoint {str(path)!r} has a changed manifest.", fix="use an older one")
        found = _digests(path, list(content["files"]))
        changed = [name for name, digest in content["files"].items() if found[name] != digest]
        changed += sorted({file.name for file in path.iterdir()} - {MANIFEST, *content["files"]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"Checkpoint {str(path)!r} is torn: {error}.", fix="use an older one") from error
    if changed:
        raise CheckpointError(f"Checkpoint {str(path)!r} has changed files: {changed}.", fix="use an older one")
    return content


def newest(folder: Path, prefix: str, fingerprint: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete folder ``prefix-NNNNNN`` that carries the fingerprint, and its manifest; None without one.

    Args:
        folder: checkpoints of one job.
        prefix: of their names.
        fingerprint: ``content["notes"]["fingerprint"]`` of those that may be used.
    """
    for path in folders(folder, prefix):
        try:
            content = read(path)
        except CheckpointError as error:
            _log.warning("skipped a checkpoint: %s", error)
            continue
        if content["notes"].get("fingerprint") == fingerprint:
            return path, content
        _log.info("skipped %s: it belongs to other data or settings", path)
    return None


def folders(folder: Path, prefix: str) -> list[Path]:
    """Folders ``prefix-NNNNNN``, newest first, complete or not."""
    numbered = re.compile(re.escape(prefix) + r"-(\d{6,})")
    matches = [match for path in folder.glob(f"{prefix}-*") if (match := numbered.fullmatch(path.name))]
    return [folder / match[0] for match in sorted(matches, key=lambda match: int(match[1]), reverse=True)]


def prune(folder: Path, prefix: str, keep: int) -> None:
    """Drop all but the ``keep`` newest that were committed; torn ones too, nobody writes any more."""
    found = folders(folder, prefix)
    kept = [path for path in found if (path / MANIFEST).is_file()][:keep]
    for old in found:
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """File -> sha256; several at once, for large models are hundreds of files."""
    with ThreadPoolExecutor(max_workers=min(16, max(1, len(names)))) as pool:
        return dict(zip(names, pool.map(lambda name: sha256_of(folder / name), names), strict=True))

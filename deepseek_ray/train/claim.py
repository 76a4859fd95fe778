"""A folder of checkpoints belongs to one training: one program at a time, one set of settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepseek_ray.errors import ConfigError
from deepseek_ray.paths import exclusive, replace_text

SETTINGS = "settings.json"


@contextmanager
def claimed(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold a folder for the time being.

    Args:
        folder: made where it is missing.
        settings: plain; what may not change between two runs in it, values or one level of sections.

    Raises:
        ConfigError: the folder holds a training with other settings.
        EnvironmentProblemError: another program trains in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = f"Another program trains in {str(folder)!r}."
    with exclusive(folder, taken, "wait for its end, or take another --run"):
        _compare(folder, json.loads(json.dumps(settings)))
        yield


def _compare(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / SETTINGS
    if not file.is_file():
        replace_text(file, json.dumps(settings, indent=2, sort_keys=True))
        return
    try:
        before = _flat(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{str(file)!r} is broken: {error}.", fix="delete it to vouch for the settings") from error
    now = _flat(settings)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"{str(folder)!r} holds a training with {name} = {before.get(name)!r}, not {now.get(name)!r}.",
                fix="set it back, or take another --run; init_from=RUN/model starts from what was trained",
            )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat

"""The settings that a run was made with: kept in its folder, read by every later program, contradicted by none.

``ingest`` writes them, ``train`` writes them again. What describes the table of transactions is set by ``ingest``
alone. ``train`` may set the days anew until live state is warmed, and the features until a version is promoted too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from deepseek_ray.config import Config, DataConfig, FeatureConfig, build_config, given_keys, known_keys
from deepseek_ray.errors import ConfigError
from deepseek_ray.logs import drop_password, get_logger
from deepseek_ray.paths import RunPaths, replace_text
from deepseek_ray.presets import load_preset

logger = get_logger(__name__)

Purpose = Literal["make", "train", "use"]
"""``make``: the run need not exist, all may be set. ``train``: days and features may be. ``use``: neither."""

DEFAULT_PRESET = "demo"
DAYS = ("data.train_days", "data.holdout_days", "data.replay_days")
TABLE = tuple(name for name in (f"data.{field}" for field in DataConfig.model_fields) if name not in DAYS)
FEATURES = tuple(f"features.{field}" for field in FeatureConfig.model_fields)


def resolve(
    paths: RunPaths,
    purpose: Purpose,
    *,
    preset: str | None = None,
    file: Path | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """The settings for a program: the run's own, unless a preset or a file is named; then the overrides.

    Raises:
        ConfigError: a key or a value is not valid, the run's own settings are broken, or one that its data or
            features were made with would change.
        EnvironmentProblemError: the run does not exist, and the purpose is not to make it.
    """
    if purpose != "make":
        paths.existing()
    known = stored(paths)
    if known is None:
        return load_preset(preset or DEFAULT_PRESET, file=file, overrides=overrides)
    if preset is None and file is None:
        config = build_config(known.model_dump(), overrides=overrides)
    else:
        table = {} if purpose == "make" else {name: _value(known, name) for name in TABLE}
        config = load_preset(preset or DEFAULT_PRESET, fixed=table, file=file, overrides=overrides)
    if purpose != "make":
        refuse_changes(paths, config, TABLE if purpose == "train" and not paths.used else (*TABLE, *DAYS, *FEATURES))
    return config


def stored(paths: RunPaths) -> Config | None:
    """The settings that the run was made with, None where none were kept; later settings have their defaults.

    Raises:
        ConfigError: the file is broken or incomplete.
    """
    if not paths.settings.exists():
        return None
    try:
        config = build_config(file=paths.settings)
    except ConfigError as error:
        raise _broken(paths, error.message) from error
    given = set(given_keys(config))
    if lacking := sorted(set(known_keys()) - given):
        if not paths.settings.read_text(encoding="utf-8").endswith(_end(len(given))):
            raise _broken(paths, f"it lacks {', '.join(lacking)}.")
        logger.debug("%s was made before these settings, which have their defaults: %s", paths.root, lacking)
    return config


def store(paths: RunPaths, config: Config) -> None:
    """Keep the settings as the run's own, whole or not at all; passwords in addresses are left out."""
    tree = config.model_dump()
    tree["stores"] = {name: drop_password(value) for name, value in tree["stores"].items()}
    replace_text(paths.settings, yaml.safe_dump(tree, sort_keys=False) + _end(len(known_keys())))


def _end(num_settings: int) -> str:
    """The last line: a file that has it is whole, though later settings are not in it."""
    return f"# end of {num_settings} settings\n"


def refuse_changes(paths: RunPaths, config: Config, names: Sequence[str]) -> None:
    """Make sure that settings (dotted names) are those that the run was made with.

    Raises:
        ConfigError: one is not; the message names it, both values and what to do.
    """
    known = stored(paths)
    if known is None:
        return
    for name in names:
        before, now = _value(known, name), _value(config, name)
        if now != before:
            again = name in DAYS and not paths.used
            raise ConfigError(
                f"Setting {name!r} = {now!r}, but the run {str(paths.root)!r} was made with {before!r}.",
                fix=f"leave it out, or {'train again' if again else 'ingest into a new --run'} with it",
            )


def _value(config: Config, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


def _broken(paths: RunPaths, problem: str) -> ConfigError:
    return ConfigError(
        f"The settings of the run, {str(paths.settings)!r}, cannot be used: {problem}",
        fix="restore the file, or ingest into a new --run",
    )

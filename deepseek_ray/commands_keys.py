"""The verbs of ``deepseek-ray keys``. Each prints and returns an exit status."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

from deepseek_ray.cli import settings_of
from deepseek_ray.serving.keys import KeyRecord, add_key, file_of, read_keys, revoke_key


def add(options: argparse.Namespace) -> int:
    """Make a key and print it, this once."""
    file = _file(options)
    record, key = add_key(file, options.name, options.scope, days=options.days, rate_per_s=options.rate)
    print(f"API key: {key}\nid {record.id}, {_described(record)}; only its digest is kept, in {file}")
    return 0


def show(options: argparse.Namespace) -> int:
    """Print what is known of each key."""
    keys = read_keys(_file(options))
    if options.json:
        print(json.dumps([key.model_dump(mode="json", exclude={"sha256"}) for key in keys], indent=2))
        return 0
    for key in keys:
        print(f"{key.id}  {key.name:<20} {_described(key)}")
    print(f"keys: {len(keys)}")
    return 0


def revoke(options: argparse.Namespace) -> int:
    """Take a key back."""
    key = revoke_key(_file(options), options.key)
    print(f"revoked: {key.id} ({key.name})")
    return 0


def _file(options: argparse.Namespace) -> Path:
    config, paths = settings_of(options)
    return file_of(paths.existing().root, config.serving.api_keys_file)


def _described(key: KeyRecord) -> str:
    rate = "the service's rate" if key.rate_per_s is None else f"{key.rate_per_s:g} records/s"
    rate = "any rate" if key.rate_per_s == 0 else rate
    end = "does not expire" if key.expires is None else f"until {key.expires:%Y-%m-%d %H:%M} UTC"
    return f"{key.scope}, {rate}, {'expired' if key.expired(datetime.now(UTC)) else end}"

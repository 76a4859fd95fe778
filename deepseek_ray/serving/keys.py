"""The file of API keys: names, scopes, rates and digests of the keys, never the keys themselves.

A key is 192 random bits, so its SHA-256 is enough at rest: there is no word list to try and no two keys are equal,
which is what slow hashes and salts are for (NIST SP 800-63B, 5.1.1.2, asks for them where secrets are memorised). A
slow hash would cost every request what it costs an attacker.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, get_args

from filelock import FileLock, Timeout
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from deepseek_ray.errors import ConfigError, EnvironmentProblemError
from deepseek_ray.paths import RunPaths, replace_text
from deepseek_ray.serving.wording import detail_of

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""What a key may do, each with all before it: look; send records and labels; change what the service does."""


MAX_DAYS = 36_500


class KeyRecord(BaseModel):
    """One key of the file.

    Attributes:
        id: names the key in lists and for revocation; no part of it is secret.
        sha256: hexadecimal digest of the key.
        rate_per_s: records a second; null for the service's default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-f0-9]{8}$")
    name: str = Field(min_length=1, max_length=64)
    sha256: str = Field(pattern=r"^[a-f0-9]{64}$")
    scope: Scope = "write"
    rate_per_s: float | None = Field(None, ge=0, allow_inf_nan=False)
    created: AwareDatetime
    expires: AwareDatetime | None = None

    def expired(self, now: datetime) -> bool:
        """Whether it counts no more."""
        return self.expires is not None and now >= self.expires


class KeyFile(BaseModel):
    """Contents of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    keys: list[KeyRecord] = []


def generate_key() -> str:
    """A fresh random key of 192 bits."""
    return secrets.token_urlsafe(24)


def digest(key: bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key).digest()


_HASHED = re.compile(r"sha256:([a-f0-9]{64})")


def hashed(key: str) -> str:
    """A key's digest in words, for whoever passes a key on: what Ray is told, it keeps and copies. "" for no key."""
    return f"sha256:{digest(key.encode()).hex()}" if key else ""


def digest_of(key: str) -> bytes:
    """The digest of a key, or the one that :func:`hashed` has made of it."""
    found = _HASHED.fullmatch(key)
    return bytes.fromhex(found[1]) if found else digest(key.encode())


def file_of(run: Path, named: str) -> Path:
    """The file of keys of a run folder: the one named by serving.api_keys_file, seen from there, or its own."""
    return run / named if named else RunPaths(run).api_keys


def read_keys(file: Path) -> list[KeyRecord]:
    """The keys of a file; none where there is no file.

    Raises:
        EnvironmentProblemError: it cannot be read, is not what ``deepseek-ray keys`` writes, or others may write it.
    """
    try:
        with file.open(encoding="utf-8") as handle:
            mode = stat.S_IMODE(file.stat().st_mode)
            if mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise EnvironmentProblemError(
                    f"The key file {str(file)!r} may be written by others (mode {mode:o}): they could add a key.",
                    fix=f"chmod 600 {file}",
                )
            return KeyFile.model_validate_json(handle.read()).keys
    except FileNotFoundError:
        return []
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise EnvironmentProblemError(
            f"The key file {str(file)!r} is damaged: {where}: {detail_of(first)}.",
            fix="restore it from a copy, or delete it and add the keys again with: deepseek-ray keys add",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise EnvironmentProblemError(
            f"The key file {str(file)!r} cannot be read: {error}.", fix="give the service's user the right to read it"
        ) from error


def add_key(
    file: Path, name: str, scope: Scope = "write", *, days: float | None = None, rate_per_s: float | None = None
) -> tuple[KeyRecord, str]:
    """Make a key and note it in the file; the key itself is returned this once and kept nowhere.

    Raises:
        ConfigError: the name, the rate or the days are out of range.
        EnvironmentProblemError: the file is damaged or cannot be written.
    """
    key, now = generate_key(), datetime.now(UTC).replace(microsecond=0)
    if days is not None and not 0 < days <= MAX_DAYS:
        raise ConfigError(f"--days = {days}: out of range.", fix=f"give days above 0, at most {MAX_DAYS}, or none")
    try:
        record = KeyRecord(
            id=secrets.token_hex(4),
            name=name,
            sha256=digest(key.encode()).hex(),
            scope=scope,
            rate_per_s=rate_per_s,
            created=now,
            expires=None if days is None else now + timedelta(days=days),
        )
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise ConfigError(
            f"The key cannot be made: {first['loc'][0]}: {detail_of(first)}.", fix="see: deepseek-ray keys add --help"
        ) from None
    with _locked(file):
        _write(file, [*read_keys(file), record])
    return record, key


def revoke_key(file: Path, wanted: str) -> KeyRecord:
    """Take the key with an id, or the only one of a name, out of the file; returns it.

    Raises:
        ConfigError: there is none, or several have the name: one of them may be the successor of another.
        EnvironmentProblemError: the file is damaged or cannot be written.
    """
    with _locked(file):
        keys = read_keys(file)
        gone = [key for key in keys if wanted in (key.id, key.name)]
        if len(gone) != 1:
            known = ", ".join(f"{key.id} ({key.name}, of {key.created:%Y-%m-%d %H:%M:%S})" for key in gone or keys)
            problem = f"{len(gone)} keys have" if gone else "No key has"
            raise ConfigError(f"{problem} the id or name {wanted!r}.", fix=f"choose one by its id: {known or 'none'}")
        _write(file, [key for key in keys if key not in gone])
    return gone[0]


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Two commands at a time must not lose each other's keys; readers need no lock, the file is replaced whole."""
    try:
        with FileLock(f"{file}.lock", timeout=10):
            yield
    except (OSError, Timeout) as error:
        raise EnvironmentProblemError(
            f"The key file {str(file)!r} cannot be changed: {error}.", fix="check the folder's rights and free space"
        ) from error


def _write(file: Path, keys: Sequence[KeyRecord]) -> None:
    replace_text(file, KeyFile(keys=list(keys)).model_dump_json(indent=2) + "\n", mode=0o600)

"""Launch settings of kernels, by shape class: measured on demand, kept in a file, the same on every rank.

Nothing is ever tuned inside a step. ``tune`` measures and writes the file, as the benchmark of the kernels does with
``--tune``; every other process reads it once. Without an entry an op uses its own default, so a run without the file
is slower and never different in kind. DEEPSEEK_RAY_KERNEL_TUNING = a path, or ``off`` for the defaults alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

try:
    import triton
except ImportError:  # not on every platform; nothing is tuned there
    triton = None

VARIABLE = "DEEPSEEK_RAY_KERNEL_TUNING"
Settings = dict[str, int]
_TRIED: dict[str, Settings] = {}  # by ``tune_op`` while it measures


def settings_for(op: str, shape: tuple[object, ...], default: Settings) -> Settings:
    """What to launch a kernel with.

    Args:
        op: name of the kernel.
        shape: its class, for example (dtype, H, I, bucket(T)).
        default: used where nothing was measured.
    """
    key = _key(op, shape)
    return _TRIED.get(key) or _table().get(key, default)


def bucket(size: int) -> int:
    """The power of two at or above a size: sizes of one bucket share their settings."""
    return 1 << max(0, size - 1).bit_length()


def tune(
    op: str, shape: tuple[object, ...], candidates: Sequence[Settings], measure: Callable[[Settings], float]
) -> Settings:
    """Measure candidates, keep the fastest in the file and return it.

    Args:
        op: name of the kernel.
        shape: its class.
        candidates: settings; one that cannot run is left out by measuring ``inf``.
        measure: seconds with these settings, lower is better.

    Raises:
        ValueError: no candidate runs, or the file is switched off.
    """
    path = file()
    if path is None:
        raise ValueError(f"{VARIABLE} = 'off': set a path, or unset it, to tune")
    seconds = [measure(candidate) for candidate in candidates]
    if not seconds or min(seconds) == float("inf"):
        raise ValueError(f"no settings of {op} run for {shape}")
    best = candidates[seconds.index(min(seconds))]
    table = {**_read(path), _key(op, shape): best}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(table, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(draft, path)
    _table.cache_clear()
    return best


def tune_op(
    op: str, shape: tuple[object, ...], candidates: Sequence[Settings], launch: Callable[[], object]
) -> Settings:
    """``tune`` by running an op on this GPU that looks its settings up.

    Args:
        op: name of the kernel.
        shape: its class.
        candidates: settings; one that asks for more than the GPU has is left out.
        launch: runs the op.
    """
    key = _key(op, shape)

    def seconds(settings: Settings) -> float:
        _TRIED[key] = settings
        try:
            return float(triton.testing.do_bench(launch, return_mode="median")) / 1e3
        except triton.runtime.errors.OutOfResources:
            return float("inf")
        finally:
            del _TRIED[key]

    return tune(op, shape, candidates, seconds)


def digest() -> str:
    """Of what this process uses: ranks of one mesh must agree on it."""
    return hashlib.sha256(json.dumps(_table(), sort_keys=True).encode()).hexdigest()[:16]


def count() -> int:
    """How many shapes were measured."""
    return len(_table())


def file() -> Path | None:
    """Where the settings of this GPU and these versions are kept; None when switched off."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off":
        return None
    if wanted:
        return Path(wanted)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{device}-torch-{torch.__version__}").strip("-").lower()
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache_home / "deepseek_ray" / "kernels" / f"{name}.json"


def _key(op: str, shape: tuple[object, ...]) -> str:
    return "/".join([op, *(str(part).removeprefix("torch.") for part in shape)])


@cache
def _table() -> dict[str, Settings]:
    path = file()
    return _read(path) if path is not None else {}


def _read(path: Path) -> dict[str, Settings]:
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(v, int) for settings in table.values() for v in settings.values()):
            raise ValueError("settings must be whole numbers")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is no table of kernel settings ({error}): delete it and tune again") from error
    return table

"""Where a run keeps its files. One folder a run; everything embedded lives below it."""

from __future__ import annotations

import difflib
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from deepseek_ray.errors import EnvironmentProblemError

LATEST = "latest"
_LOCK_POLL_S = 0.05


@dataclass(frozen=True)
class RunPaths:
    """Locations below one run folder."""

    root: Path

    @property
    def tracking_uri(self) -> str:
        """Absolute SQLite URI of the embedded MLflow store."""
        return f"sqlite:///{self.root.resolve() / 'mlflow.db'}"

    @property
    def artifacts(self) -> Path:
        """Embedded MLflow artifact root."""
        return self.root / "artifacts"

    @property
    def settings(self) -> Path:
        """The settings that the run was made with; see settings.py."""
        return self.root / "settings.yaml"

    @property
    def transactions(self) -> Path:
        """Parquet table of ingested transactions."""
        return self.root / "transactions.parquet"

    @property
    def quarantine(self) -> Path:
        """Rejected input rows with their reasons."""
        return self.root / "quarantine.parquet"

    @property
    def feature_store(self) -> Path:
        """Feast repository of the run: registry, offline parquet, online SQLite."""
        return self.root / "feature_store"

    @property
    def warmed(self) -> Path:
        """The transactions that live feature states were filled with."""
        return self.feature_store / "warmed"

    @property
    def prediction_log(self) -> Path:
        """SQLite (WAL) log of predictions and feedback."""
        return self.root / "predictions.db"

    @property
    def prediction_archive(self) -> Path:
        """Compacted parquet of the prediction log."""
        return self.root / "predictions"

    @property
    def last_good(self) -> Path:
        """Copy of the version that served last."""
        return self.root / "serving" / "last_good"

    @property
    def kept_models(self) -> Path:
        """Copies of the versions that model servers served last, a folder each."""
        return self.root / "serving" / "models"

    @property
    def shadow_scores(self) -> Path:
        """SQLite table of what the shadow scored."""
        return self.root / "serving" / "shadow.db"

    @property
    def replica_log(self) -> Path:
        """What the service that serves this run says; three older ones stand beside it."""
        return self.root / "serving" / "replica.log"

    @property
    def api_keys(self) -> Path:
        """Digests of API keys; see serving/keys.py."""
        return self.root / "api_keys.json"

    @property
    def checkpoints(self) -> Path:
        """Training checkpoints."""
        return self.root / "checkpoints"

    @property
    def datasets(self) -> Path:
        """Rows with features and labels that were trained on or held out."""
        return self.root / "datasets"

    @property
    def updates(self) -> Path:
        """Ledger of the labels that updates have trained on, and the replay memory of each version."""
        return self.root / "updates"

    @property
    def updater(self) -> Path:
        """State of the long-running updater."""
        return self.root / "updater"

    @property
    def baselines(self) -> Path:
        """What each version knew before it served: one file a version, which drift is measured against."""
        return self.root / "baselines"

    @property
    def results(self) -> Path:
        """Results of the stages, one JSON file each, read by the report."""
        return self.root / "results"

    @property
    def report_html(self) -> Path:
        """Self-contained report."""
        return self.root / "report.html"

    @property
    def report_json(self) -> Path:
        """Every number of the report."""
        return self.root / "report.json"

    @property
    def used(self) -> str:
        """``"served"``, or ``"warmed"``; "" as long as no live state or decision depends on the run's table."""
        if self.prediction_log.exists() or self.prediction_archive.exists():
            return "served"
        return "warmed" if self.warmed.exists() else ""

    def existing(self) -> RunPaths:
        """The run itself, whose folder must be there.

        Raises:
            EnvironmentProblemError: it is not; the message names the runs with the nearest names.
        """
        if self.root.is_dir():
            return self
        near = difflib.get_close_matches(self.root.name, _runs_beside(self.root), n=3, cutoff=0.0)
        raise EnvironmentProblemError(
            f"The run folder {str(self.root)!r} does not exist. Runs with a near name: {', '.join(near) or 'none'}.",
            fix=f"correct --run, or make it: deepseek-ray ingest --synthetic --run {self.root}",
        )

    def create(self) -> RunPaths:
        """Make the folder and check that it can be written; ``runs/latest`` becomes a link to a new run.

        Raises:
            EnvironmentProblemError: the disk is read-only or full.
        """
        try:
            if self.root == runs_root().resolve() / LATEST and not self.root.exists():
                mark_latest(RunPaths(runs_root() / f"{time.strftime('%Y%m%d-%H%M%S')}-run").create())
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / ".write-probe"
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise EnvironmentProblemError(
                f"The run folder {str(self.root)!r} cannot be written: {error.strerror}.",
                fix="free space, change permissions or choose another --run folder",
            ) from error
        return self


def runs_root() -> Path:
    """Folder that holds all runs: DEEPSEEK_RAY_RUNS, else ./runs; ~/deepseek-ray/runs in a submitted Ray job.

    Ray unpacks a job's working_dir into its temporary folder and removes it later: results must not live there.
    """
    if named := os.environ.get("DEEPSEEK_RAY_RUNS"):
        return Path(named)
    if any(part.startswith("_ray_pkg_") for part in Path.cwd().parts):
        return Path.home() / "deepseek-ray" / "runs"
    return Path("runs")


def resolve_run(run: str | Path | None) -> RunPaths:
    """The run named by the argument, else DEEPSEEK_RAY_RUN, else runs/latest."""
    chosen = run or os.environ.get("DEEPSEEK_RAY_RUN") or runs_root() / LATEST
    return RunPaths(Path(chosen).resolve())


def _runs_beside(folder: Path) -> list[str]:
    if not folder.parent.is_dir():
        return []
    return [one.name for one in folder.parent.iterdir() if RunPaths(one).transactions.exists()]


def mark_latest(paths: RunPaths) -> None:
    """Point runs/latest at the run, atomically."""
    link = runs_root() / LATEST
    link.parent.mkdir(parents=True, exist_ok=True)
    fresh = link.with_name(f".latest-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(paths.root.resolve(), link.parent.resolve()))
    os.replace(fresh, link)


def write_stage(paths: RunPaths, stage: str, results: Mapping[str, Any] | Sequence[Any]) -> Path:
    """Write one stage's results for the report, whole or not at all; NaN and infinity become null."""
    paths.results.mkdir(parents=True, exist_ok=True)
    target = paths.results / f"{stage}.json"
    replace_text(target, json.dumps(finite(results), indent=2, allow_nan=False) + "\n")
    return target


def replace_text(file: Path, text: str, mode: int = 0o666) -> None:
    """Write a text file, whole or not at all, also when the power goes; an older one stays until then.

    The umask narrows its mode.
    """
    draft = file.with_name(f".{file.name}-{os.getpid()}")
    draft.touch(mode)
    draft.write_text(text, encoding="utf-8")
    sync(draft)  # else the name may reach the disk before the words
    os.replace(draft, file)
    sync(file.parent)


def finite(tree: Any) -> Any:
    """Plain data fit for JSON: NaN and infinities become null, tuples lists, keys strings."""
    if isinstance(tree, Mapping):
        return {str(key): finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


@contextmanager
def exclusive(folder: Path, problem: str, fix: str, *, name: str = ".lock", wait_s: float = 0.0) -> Iterator[None]:
    """Hold a folder's lock for the time being.

    Args:
        name: the lock's file; a folder may have several.
        wait_s: how long a holder is given to let go.

    Raises:
        EnvironmentProblemError: another process holds it; with the texts given.
    """
    end = time.monotonic() + wait_s
    with (folder / name).open("w") as lock:
        while (error := _flock(lock)) is not None:
            if time.monotonic() >= end:
                raise EnvironmentProblemError(problem, fix=fix) from error
            time.sleep(_LOCK_POLL_S)
        yield


def _flock(lock: IO[str]) -> OSError | None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error
    return None


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

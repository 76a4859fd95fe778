"""All tests of this machine, a file at a time, with a table that is kept: what passed on this tree is not run again.

python -m tests.full            what has not passed yet
python -m tests.full e2e unit/test_docs.py      only steps whose path holds one of these words

The table is tests/full.csv, one line a file: status, seconds, how many tests and how many of them were skipped, the
git tree that was tested (without the table itself, with what is not committed) and the commit below it. Commit it.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path("tests/full.csv")
COLUMNS = ("step", "status", "seconds", "tests", "skipped", "tree", "commit")
FOLDERS = ("unit", "kernels", "distributed", "integration", "e2e", "gpu")
MAX_STEP_S = 90 * 60

Row = dict[str, str]


def main(words: Sequence[str], root: Path = ROOT, run: Callable[[str, Path], Row] | None = None) -> int:
    """Run the steps that are left; 0 when every chosen step has passed on this tree."""
    tree, commit = tree_of(root), git(root, "rev-parse", "HEAD")
    chosen = [step for step in steps(root) if not words or any(word in step for word in words)]
    for step in chosen:
        if passed(read(root).get(step), tree):
            print(f"{step}: passed before", flush=True)
            continue
        print(f"{step}: running", flush=True)
        row = (run or run_step)(step, root) | {"step": step, "tree": tree, "commit": commit}
        write(root, row)
        print(f"{step}: {row['status']} in {row['seconds']} s", flush=True)
    left = [step for step in chosen if not passed(read(root).get(step), tree)]
    print(f"{len(chosen) - len(left)} of {len(chosen)} steps have passed on tree {tree[:12]}", *left, sep="\n  ")
    return 1 if left or not chosen else 0


def steps(root: Path) -> list[str]:
    """Every file of tests, the quick folders first."""
    found = [path for folder in FOLDERS for path in sorted((root / "tests" / folder).rglob("test_*.py"))]
    return [path.relative_to(root).as_posix() for path in found]


def run_step(step: str, root: Path) -> Row:
    """Run one file with pytest; ended after MAX_STEP_S with all that it started."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", step, f"--junitxml={report}"]
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=root, start_new_session=True)
        try:
            status = {0: "passed"}.get(process.wait(MAX_STEP_S), "failed")
        except subprocess.TimeoutExpired:
            status = "too long"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        suite = ElementTree.parse(report).find("testsuite") if report.exists() else None
        counts = {"tests": suite.get("tests", ""), "skipped": suite.get("skipped", "")} if suite is not None else {}
        return {"status": status, "seconds": f"{time.monotonic() - start:.0f}", **counts}


def tree_of(root: Path) -> str:
    """Hash of the files as they are now, committed or not, without the table."""
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        shutil.copyfile(root / git(root, "rev-parse", "--git-path", "index"), index)
        environment = {"GIT_INDEX_FILE": str(index)}
        git(root, "add", "--all", **environment)
        git(root, "rm", "--cached", "--quiet", "--ignore-unmatch", TABLE.as_posix(), **environment)
        return git(root, "write-tree", **environment)


def git(root: Path, *arguments: str, **environment: str) -> str:
    """What git prints."""
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, env=os.environ | environment, check=True, stdout=-1, text=True).stdout.strip()


def read(root: Path) -> dict[str, Row]:
    """Step -> its line of the table."""
    if not (root / TABLE).exists():
        return {}
    with (root / TABLE).open(encoding="utf-8", newline="") as file:
        return {row["step"]: row for row in csv.DictReader(file)}


def write(root: Path, row: Row) -> None:
    """Put a line into the table at once, so that an interruption loses one step; lines of files that are gone go."""
    rows = read(root) | {row["step"]: row}
    temporary = (root / TABLE).with_suffix(".writing")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[step] for step in steps(root) if step in rows)
    temporary.replace(root / TABLE)


def passed(row: Row | None, tree: str) -> bool:
    """The line says that the step has passed on this tree."""
    return row is not None and (row["status"], row["tree"]) == ("passed", tree)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

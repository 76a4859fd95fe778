"""Each page's commands, run in order in one terminal session, as a reader would type them."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.test_docs import BLOCK, PAGES, ROOT

SERVICE = ("127.0.0.1", 8000)
PAGE_TIMEOUT_S = 900

PREAMBLE = r"""
set -euo pipefail
set -m  # a background block gets a process group of its own
background=()
trap 'for group in "${background[@]}"; do kill -- "-$group" 2>/dev/null || true; done; wait' EXIT
wait_until_ready() {
    for _ in $(seq 600); do
        python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)" \
            2>/dev/null && return
        kill -0 -- "-$1" 2>/dev/null || { echo "the service ended before it was ready"; return 1; }
        sleep 0.2
    done
    echo "the service was not ready in time"
    return 1
}
"""


def session(page: Path) -> str:
    """The page's blocks as one bash script that says where it stands."""
    text = page.read_text(encoding="utf-8")
    parts = [PREAMBLE]
    for block in BLOCK.finditer(text):
        line = text[: block.start("text")].count("\n") + 1
        if block["how"] == "run":
            parts.append(f"echo '--- {page.name}:{line}'\n{block['text']}")
        elif block["how"] == "background":
            parts.append(f"echo '--- {page.name}:{line}'\n{{\n{block['text']}}} &\nbackground+=($!)\n")
            parts.append("wait_until_ready $!\n")
    return "\n".join(parts)


def commands_of(page: Path) -> list[str]:
    return [block["text"] for block in BLOCK.finditer(page.read_text(encoding="utf-8")) if block["how"] == "run"]


def checkout(folder: Path) -> Path:
    """A working folder that looks like the checkout, so that what a page writes does not land in ours."""
    folder.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", ".pytest_cache", ".mypy_cache", ".ruff_cache"):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The working folder and environment of a reader who has done the quickstart's first command, at debug size."""
    folder = checkout(tmp_path_factory.mktemp("docs") / "checkout")
    environment = {
        **os.environ,
        "DEEPSEEK_RAY_RUNS": str(folder / "runs"),
        "DEEPSEEK_RAY_API_KEY": secrets.token_hex(16),
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment.pop("RAY_ADDRESS", None)
    demo = [sys.executable, "-m", "pipelines.risk.demo", "--preset", "debug"]
    run_in(folder, environment, demo)
    return folder, environment


def run_in(folder: Path, environment: dict[str, str], command: list[str]) -> str:
    """Run to the end; on a timeout everything that it started is stopped."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=PAGE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"not done after {PAGE_TIMEOUT_S} s:\n{output[-6000:]}")
    assert process.returncode == 0, output[-6000:]
    return output


@pytest.mark.slow
@pytest.mark.timeout(2 * PAGE_TIMEOUT_S)
@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_work_in_order(page: Path, reader: tuple[Path, dict[str, str]]) -> None:
    folder, environment = reader
    with socket.socket() as probe:
        if probe.connect_ex(SERVICE) == 0:
            pytest.skip("something else listens on port 8000, which the pages use")
    output = run_in(folder, environment, ["bash", "-c", session(page)])
    assert len(re.findall(rf"^--- {re.escape(page.name)}:", output, re.MULTILINE)) >= len(commands_of(page))


def test_a_page_becomes_one_session(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- test: run -->\n```bash\nname=ray\n```\n\n<!-- test: see tests/x.py::y -->\n```bash\nfalse\n```\n"
        "<!-- test: run -->\n```bash\necho hello $name\n```\n"
    )
    output = run_in(tmp_path, dict(os.environ), ["bash", "-c", session(page)])
    assert output == "--- page.md:3\n--- page.md:12\nhello ray\n"


def test_a_failing_command_fails_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- test: run -->\n```bash\nfalse\necho not reached\n```\n")
    with pytest.raises(AssertionError, match=r"--- page\.md:3"):
        run_in(tmp_path, dict(os.environ), ["bash", "-c", session(page)])


def gone(group: int, timeout_s: float = 5.0) -> bool:
    """Whether a process group ends; one that was ended stays visible until somebody has noticed its end."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_service_of_a_page_is_stopped_with_it(tmp_path: Path) -> None:
    script = PREAMBLE + "{\nsleep 300\n} &\nbackground+=($!)\necho $!\n"
    group = int(run_in(tmp_path, dict(os.environ), ["bash", "-c", script]).split()[0])
    assert gone(group)

"""The pages stay true: the README's tree is the folder, links lead somewhere, and each command has its test.

Before each fenced ``bash`` block of the README and docs/ stands a comment that says how it is tested:

    <!-- test: run -->              tests/e2e/test_docs.py runs it, in a terminal session a page
    <!-- test: background -->       the same, left running until the page ends (a service)
    <!-- test: see FILE::NAME -->   the named test runs the command
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- test: (?P<how>[^\n]*?) -->\n)?^```bash\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
SEE = re.compile(r"see (?P<file>tests/[\w/]+\.py)::(?P<name>\w+)")
PROGRAM_FOLDERS = ("kernels", "deepseek_ray", "features", "tune_spaces", "pipelines", "serve_apps", "docs", "deploy")
IGNORED = {"__init__.py", "__pycache__"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_command_of_a_page_says_how_it_is_tested(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "```sh" not in text, "write ```bash, so that the block is tested"
    for block in BLOCK.finditer(text):
        how = block["how"] or ""
        if how in ("run", "background"):
            continue
        see = SEE.fullmatch(how)
        assert see, f"no test comment above:\n{block['text']}"
        assert f"def {see['name']}(" in (ROOT / see["file"]).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_tree_in_the_readme_is_the_folder() -> None:
    shown = set(tree_of_readme())
    assert shown == {*files_of(ROOT, *PROGRAM_FOLDERS), *root_files(), *folders_of_tests()}


def test_each_line_of_the_tree_says_what_it_is() -> None:
    assert [path for path, words in tree_of_readme().items() if len(words.split()) < 2] == []


def tree_of_readme() -> dict[str, str]:
    """Path -> its half line, from the text block below the heading "The tree"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The tree")[2]
    block = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert block, "README.md has no tree"
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in block[1].splitlines():
        name, _, words = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        path = "/".join([*folders[:depth], name.rstrip("/")])
        found[path] = words.strip()
        folders[depth:] = [name.rstrip("/")]
    return found


def files_of(root: Path, *folders: str) -> set[str]:
    """Files and sub-folders below the folders, without caches, and kernels/ only once."""
    found = set()
    for folder in folders:
        paths = [root / folder, *(root / folder).rglob("*")] if (root / folder).exists() else []
        kept = [path for path in paths if not path.name.startswith(".") and not IGNORED & set(path.parts)]
        found |= {path.relative_to(root).as_posix() for path in kept if path.is_file() or has_files(path)}
    return found


def has_files(folder: Path) -> bool:
    return any(path.is_file() and not IGNORED & set(path.parts) for path in folder.rglob("*"))


def root_files() -> set[str]:
    ignored = {"README.md", *re.findall(r"^/?(\S+)$", (ROOT / ".gitignore").read_text(), re.MULTILINE)}
    return {path.name for path in ROOT.iterdir() if path.is_file() and path.name[0] != "."} - ignored


def folders_of_tests() -> set[str]:
    folders = [path for path in (ROOT / "tests").iterdir() if path.is_dir() and has_files(path)]
    return {"tests", *(path.relative_to(ROOT).as_posix() for path in folders)}

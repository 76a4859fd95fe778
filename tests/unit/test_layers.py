"""The layers of the house, read from the imports of every file: who may use what, and one door to each vendor."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "deepseek_ray"
FOLDERS = ("kernels", LIBRARY, "features", "tune_spaces", "pipelines", "serve_apps")
MAX_PIPELINE_LINES = 150

# Which of our modules each folder may import: prefixes, besides itself.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "kernels": (f"{LIBRARY}.kernels",),  # itself, by its import name
    LIBRARY: (),
    "features": (),
    "tune_spaces": (f"{LIBRARY}.config", f"{LIBRARY}.presets"),
    "pipelines": (LIBRARY, "features.definitions", "tune_spaces"),
    "serve_apps": (LIBRARY,),
}

# Inside the library: what each part may import, besides itself. Parts are sub-packages or modules of the root.
BASE = {"errors", "logs", "paths", "config", "config_moe", "presets", "settings", "sqlite", "periodic"}
LIBRARY_ORDER: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "logs": set(),
    "config": {"errors"},
    "config_moe": {"config"},
    "paths": {"errors"},
    "cluster": {"errors"},
    "presets": {"config", "errors"},
    "presets_moe": {"config", "config_moe", "errors"},
    "periodic": {"logs"},
    "child": set(),
    "sqlite": {"periodic"},
    "settings": {"presets", "config", "paths", "logs", "errors"},
    "metrics": {"errors"},
    "kernels": set(),
    "data": {"cluster", "metrics", *BASE},
    "registry": {"models", "data.evidence", "data.events", "metrics", *BASE},
    "models": {"kernels", "errors", "logs", "config", "config_moe", "data.events"},
    "parallel": {"kernels", "models", "errors", "logs", "config", "config_moe"},
    "train": {"cluster", "kernels", "parallel", "models", "data", "registry", "metrics", *BASE},
    "online": {"models", "train.step", "train.optimiser", "client", "data", "registry", "metrics", *BASE},
    "rpc": {"errors"},
    "address": {"errors"},
    "answers": {"errors"},
    "caller": {"rpc", "errors"},
    "http_session": {"address", "answers", "rpc", "errors"},
    "channels": {"address", "answers", "http_session", "rpc", "errors"},
    "serving": {"child", "models", "data", "registry", "online", "metrics", "rpc", *BASE},
    "client": {"address", "answers", "caller", "channels", "http_session", "data.events", *BASE},
    "lineage": {"data", "registry", *BASE},
    "report": {"data", "registry", "metrics", *BASE},
    "cli": BASE,
    "doctor": {"cli", "kernels", *BASE},
    "verify": {"presets_moe", "parallel", "train", *BASE},
    "traffic_commands": {"cli", "commands", "registry", "serving.traffic", "serving.release", "serving.shadow", *BASE},
    "commands_keys": {"cli", "serving.keys", *BASE},
    "commands": {"cli", "lineage", "report", "registry", "data", "online", "metrics", *BASE},
}

# Vendor module -> files that may import it.
DOORS: dict[str, str] = {
    "mlflow": rf"{LIBRARY}/(registry\.py|registry/.*)",
    "feast": rf"({LIBRARY}/data/feature_client\.py|features/.*)",
    "ray.data": rf"{LIBRARY}/data/ray_engine\.py",
    "ray.train": rf"{LIBRARY}/train/(pretrain_)?(worker|trainer)\.py",
    "ray.serve": r"serve_apps/.*",
    "ray.tune": r"(tune_spaces/.*|pipelines/[^/]+/tune\.py)",
    "triton": r"kernels/.*",
}

# Modules that come with a package of another name and are documented by it.
PART_OF = {"pydantic_core": {"pydantic"}, "markupsafe": {"jinja2"}}

# Modules of an extra: imported inside a function only, which says what to install.
EXTRAS = {"peft"}

CLUSTER_FREE = ("models", "parallel", "online", "serving")
LAZY_IN_CLI = ("ray", "mlflow", "feast", "torch")


class Import:
    """One import: the file and line, the module named, and whether it runs when the file is imported."""

    def __init__(self, path: Path, line: int, module: str, *, at_import: bool, typing_only: bool) -> None:
        self.path, self.line, self.module = path, line, module
        self.at_import, self.typing_only = at_import, typing_only

    def __repr__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


def _files(folder: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py"))


def _module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _exists(module: str) -> bool:
    file = ROOT / Path(*module.split("."))
    return file.with_suffix(".py").is_file() or file.is_dir()


@functools.cache
def imports_of(path: Path) -> tuple[Import, ...]:
    """Every import in the file; ``from a import b`` names ``a.b`` where that is one of our modules."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return tuple(_walk(path, tree, at_import=True, typing_only=False))


def _walk(path: Path, node: ast.AST, *, at_import: bool, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        flags = {"at_import": at_import and not inner, "typing_only": typing_only or typing}
        for module in _named(path, child):
            yield Import(path, child.lineno, module, **flags)  # type: ignore[attr-defined]
        yield from _walk(path, child, **flags)


def _named(path: Path, node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = _module_name(path).split(".")[: -node.level or None]
            base = ".".join([*package, base]).rstrip(".")
        for alias in node.names:
            full = f"{base}.{alias.name}"
            vendor = base.split(".")[0] not in FOLDERS
            yield full if vendor or _exists(full) else base


def all_imports(*folders: str) -> list[Import]:
    """Imports of every file in the folders."""
    return [found for folder in folders for path in _files(folder) for found in imports_of(path)]


def _below(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def _part(module: str) -> str:
    """``deepseek_ray.train.step`` -> ``train``; the library's own top level is ``__init__``."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_its_row_of_the_table_allows(folder: str) -> None:
    allowed = (folder, *MAY_IMPORT[folder])
    ours = [found for found in all_imports(folder) if found.module.split(".")[0] in FOLDERS]
    assert [found for found in ours if not any(_below(found.module, prefix) for prefix in allowed)] == []


def test_features_use_nothing_but_feast_and_the_standard_library() -> None:
    allowed = {*sys.stdlib_module_names, "feast", "features", "yaml"}  # yaml reads the declaration
    assert [found for found in all_imports("features") if found.module.split(".")[0] not in allowed] == []


def test_kernels_use_nothing_but_torch_and_triton() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    others = [found for found in all_imports("kernels") if not _below(found.module, f"{LIBRARY}.kernels")]
    assert [found for found in others if found.module.split(".")[0] not in allowed] == []


def test_parts_of_the_library_keep_their_order() -> None:
    wrong = []
    for found in all_imports(LIBRARY):
        user, used = _part(_module_name(found.path)), found.module.removeprefix(f"{LIBRARY}.")
        if found.module.split(".")[0] != LIBRARY or found.module == LIBRARY or _part(found.module) == user:
            continue
        if not any(_below(used, allowed) for allowed in LIBRARY_ORDER[user]):
            wrong.append(found)
    assert wrong == []


def test_every_part_of_the_library_has_a_place_in_the_order() -> None:
    parts = {_part(_module_name(path)) for path in _files(LIBRARY)}
    assert parts - LIBRARY_ORDER.keys() == set()


@pytest.mark.parametrize("vendor", DOORS)
def test_a_vendor_has_one_door(vendor: str) -> None:
    used = [found for found in all_imports(*FOLDERS) if _below(found.module, vendor)]
    assert [found for found in used if not re.fullmatch(DOORS[vendor], found.path.as_posix())] == []


@pytest.mark.parametrize("part", CLUSTER_FREE)
def test_a_cluster_free_part_does_not_import_ray(part: str) -> None:
    found = all_imports(f"{LIBRARY}/{part}")
    assert [one for one in found if _below(one.module, "ray")] == []


def test_nobody_imports_the_bare_kernels_folder() -> None:
    found = [one for one in all_imports(*FOLDERS, "tests") if _below(one.module, "kernels")]
    assert found == []
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / LIBRARY / "kernels").readlink() == Path("../kernels")


def test_the_cli_imports_heavy_libraries_only_when_a_verb_needs_them() -> None:
    heavy = [f"{LIBRARY}.{part}" for part in LIBRARY_ORDER if part not in ("__init__", "errors")]
    eager = [found for found in imports_of(Path(LIBRARY, "cli.py")) if found.at_import and not found.typing_only]
    assert [one for one in eager if any(_below(one.module, name) for name in (*LAZY_IN_CLI, *heavy))] == []


def test_there_are_no_import_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for folder in FOLDERS:
        for path in _files(folder):
            used = {one.module for one in imports_of(path) if one.at_import and not one.typing_only}
            graph[_module_name(path)] = {module for module in used if _exists(module)} - {_module_name(path)}
    assert _cycle(graph) == []


def _cycle(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of the graph as a list of nodes, or nothing."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for used in sorted(graph.get(node, ())):
            if found := visit(used, [*trail, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_the_cycle_finder_finds_one() -> None:
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert _cycle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_pipelines_stay_short() -> None:
    lengths = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in _files("pipelines")}
    assert {path: count for path, count in lengths.items() if count > MAX_PIPELINE_LINES} == {}


def test_every_package_that_is_imported_is_declared() -> None:
    declared, optional = _declared("dependencies"), _declared("optional-dependencies")
    providers = importlib.metadata.packages_distributions()
    missing = []
    for found in all_imports(*FOLDERS):
        top = found.module.split(".")[0]
        if top not in sys.stdlib_module_names and top not in FOLDERS:
            names = {_normal(name) for name in providers.get(top, [top])} | PART_OF.get(top, set())
            extra = top in EXTRAS and not found.at_import
            missing += [] if names & (optional if extra else declared) else [found]
    assert missing == []


def test_every_declared_package_is_pinned() -> None:
    pins = {_normal(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()}
    assert _declared("dependencies", "optional-dependencies") - pins == set()


def _declared(*tables: str) -> set[str]:
    """Names of the packages in the tables of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project[table].values() if isinstance(project[table], dict) else [project[table]] for table in tables]
    lines = [line for group in groups for block in group for line in block]
    return {_normal(re.split(r"[\[<>=;! ]", line)[0]) for line in lines} - {_normal(LIBRARY)}  # dev has our own extras


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

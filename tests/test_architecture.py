"""The import order of docs/architecture.md, and its tree of files compared with the disk."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the top down: a module imports from its own package and from lower levels.
LEVELS = [
    {"__main__", "cli", "api", "demo"},
    {"segmentation", "training"},
    {"results"},
    {"runs", "models", "plots"},
    {"data"},
    {"config"},
    {"runtime", "storage"},
    {"schema", "metrics", "progress", "errors"},
]
USE_RAY = {"segmentation", "training", "runtime"}
MODULES = sorted((ROOT / "segray").rglob("*.py"))


def get_module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def find_imports(path: Path, *, at_import_time: bool = False) -> set[str]:
    """Return the modules a file imports, also inside functions unless only those at import time are asked for."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if at_import_time else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def get_level(part: str) -> int:
    return next(index for index, parts in enumerate(LEVELS) if part in parts)


@pytest.mark.parametrize("path", MODULES, ids=get_module_name)
def test_imports_run_downward(path: Path) -> None:
    name = get_module_name(path)
    if name == "segray":
        return
    part = name.split(".")[1]
    for imported in find_imports(path):
        library = imported.split(".")[0]
        if imported.startswith("segray.") and (other := imported.split(".")[1]) != "__version__":
            assert get_level(other) >= get_level(part), f"{part} imports {other}, which is above it"
            assert {part, other} != {"segmentation", "training"}, "training and segmentation never import each other"
            assert (part, other) != ("results", "models"), "results needs no model"
        assert library != "ray" or part in USE_RAY, f"{part} imports ray"
        assert library != "pickle"


def test_no_import_cycles() -> None:
    names = {get_module_name(path) for path in MODULES}
    graph = {get_module_name(path): find_imports(path) & names - {get_module_name(path)} for path in MODULES}
    del graph["segray"]  # its public names are imported on first use
    TopologicalSorter({name: others - {"segray"} for name, others in graph.items()}).prepare()


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("segray", {"torch", "ray", "pyarrow", "numpy"}),
        ("segray.cli", {"torch", "ray"}),
        ("segray.results", {"torch", "ray"}),
        ("segray.results.report", {"torch", "ray"}),
        ("segray.results.status", {"torch", "ray"}),
        ("segray.results.summary", {"torch", "ray"}),
    ],
)
def test_light_modules_stay_light(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not unwanted & set(loaded)


def read_tree() -> dict[str, str]:
    """Return the paths of the tree in docs/architecture.md, each with its description."""
    block = re.search(r"## The tree\n.*?```\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)
    assert block
    paths, folders = {}, [""]
    for line in block.group(1).splitlines():
        name, _, description = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[: depth + 1]
        paths[folders[-1] + name] = description.strip()
        if name.endswith("/"):
            folders.append(folders[-1] + name)
    return paths


def test_the_tree_equals_the_disk() -> None:
    drawn = read_tree()
    assert all(drawn.values()), "a line says what each file is for"
    on_disk = {
        str(path.relative_to(ROOT))
        for folder in ("segray", "jobs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != "__init__.py"
    }
    assert {path for path in drawn if path.startswith(("segray/", "jobs/")) and not path.endswith("/")} == on_disk
    assert all((ROOT / path).exists() for path in drawn)


def test_no_module_has_a_catch_all_name() -> None:
    assert not {path.stem for path in MODULES} & {"utils", "util", "helpers", "common", "misc"}


def test_ray_is_pinned_to_one_version() -> None:
    (pinned,) = re.findall(r"ray\[[a-z,]+\]==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert f"\nray=={pinned}" in (ROOT / "requirements.txt").read_text()


def test_requirements_name_no_index() -> None:
    assert not re.search(r"https?://|--index|--find-links|--extra", (ROOT / "requirements.txt").read_text())

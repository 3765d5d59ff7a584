"""The house keeps its floors: who may import whom, and a README that draws what is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = {"errors", "storage", "config", "schema", "progress"}
WALLS = {
    "classes",
    "images",
    "image_files",
    "samples",
    "augmentation",
    "label_faults",
    "manifest",
    "metrics",
    "losses",
    "transforms",
    "models",
    "pictures",
    "shapes",
}
HALL = {"autoscaling", "bundle", "capacity", "cluster", "export"}
ROOMS = {"train", "segment"}
ROOF = {"cli", "demo"}
FLOORS = [GROUND, WALLS, HALL, ROOMS, ROOF]
MODULES = sorted((ROOT / "segray").rglob("*.py"))


def get_part(path: Path) -> str:
    return path.relative_to(ROOT / "segray").parts[0].removesuffix(".py")


def find_imports(path: Path) -> set[str]:
    """Return the modules a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path: Path) -> None:
    part = get_part(path)
    if part == "__init__":
        return
    floor = next(index for index, parts in enumerate(FLOORS) if part in parts)
    for name in find_imports(path):
        if name.startswith("segray."):
            other = name.split(".")[1]
            other_floor = next(index for index, parts in enumerate(FLOORS) if other in parts)
            assert other_floor <= floor, f"{part} imports {other}, which is above it"
            assert not (part in ROOMS and other in ROOMS - {part}), "the two rooms never import each other"
        library = name.split(".")[0]
        assert library != "ray" or part in ROOMS or part in {"cluster", "autoscaling"}, f"{part} imports ray"
        assert library not in {"torch", "torchvision", "segmentation_models_pytorch"} or floor > 0, f"{part}: torch"
        assert library != "pickle"


def read_tree() -> dict[str, str]:
    """Return the paths of the README's tree with what is said of each."""
    block = re.search(r"## The tree\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
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


def test_the_readmes_tree_equals_the_disk() -> None:
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


def test_no_module_is_a_drawer_for_everything() -> None:
    assert not {path.stem for path in MODULES} & {"utils", "util", "helpers", "common", "misc"}


def test_ray_is_pinned_to_one_version() -> None:
    (pinned,) = re.findall(r"ray\[[a-z,]+\]==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert f"\nray=={pinned}" in (ROOT / "requirements.txt").read_text()


def test_requirements_name_no_index() -> None:
    assert not re.search(r"https?://|--index|--find-links|--extra", (ROOT / "requirements.txt").read_text())

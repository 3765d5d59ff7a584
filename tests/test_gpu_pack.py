"""The list of packages in ``benchmarks/pack_gpu.sh`` compared with the dependencies of segray and its GPU tests."""

import re
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
OF_THE_MACHINE = {"torch", "torchvision", "numpy", "pillow", "pyarrow", "pandas", "matplotlib"}
REPACKED = {"ray", "botocore"}
UNUSED = {"hf-xet"}  # Downloads from the model hub, which a machine without a network does not do.
PYTHON = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}


def add_dependencies(name: str, found: set[str]) -> None:
    """Add the dependencies of a distribution to ``found``, without extras and without those of the machine."""
    for line in requires(name) or []:
        requirement = Requirement(line)
        dependency = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate(PYTHON):
            continue
        if dependency not in found | OF_THE_MACHINE | UNUSED:
            found.add(dependency)
            add_dependencies(dependency, found)


def test_the_pack_holds_the_dependencies_of_segray_and_its_gpu_tests() -> None:
    found = re.search(r"^small=\((.*?)^\)", (ROOT / "benchmarks/pack_gpu.sh").read_text(), re.DOTALL | re.MULTILINE)
    assert found
    expected: set[str] = {"pytest", "psutil"}
    for name in ("segray", "pytest"):
        add_dependencies(name, expected)
    assert found.group(1).split() == sorted(expected - REPACKED)


def test_the_pack_names_no_index_and_git_ignores_its_folder() -> None:
    script = (ROOT / "benchmarks/pack_gpu.sh").read_text()
    assert not re.search(r"https?://|--index|--find-links", script)
    assert "/gpu-pack/" in (ROOT / ".gitignore").read_text().splitlines()

"""Unpack what this Python lacks from the folder of `make gpu-pack`. Uses the standard library alone."""

import re
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

_ROOT = Path(__file__).parents[1]


def stop(reason: str) -> NoReturn:
    """Print one line and end with exit code 2."""
    print(reason, file=sys.stderr)
    sys.exit(2)


def prepare_site(pack: Path, site: Path) -> list[str]:
    """Unpack the distributions that this Python lacks; return their names and versions.

    Raises:
        SystemExit: Code 2 and one line, if the pack is incomplete or for another version of Python.
    """
    site.mkdir()
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    write_metadata(site, project)
    if not pack.is_dir():  # Everything may be installed; if not, the tests say what is missing.
        return []
    marker = pack / "python-version"  # Written last.
    if not marker.exists():
        stop(f"{pack} is incomplete; run: make gpu-pack")
    expected, found = marker.read_text().strip(), f"{sys.version_info[0]}.{sys.version_info[1]}"
    if expected != found:
        stop(f"{pack} is for Python {expected}, {sys.executable} is {found}; run: GPU_PYTHON={found} make gpu-pack")
    requirements = dict(split_requirement(line) for line in project["dependencies"])
    unpacked = []
    for path in sorted(pack.iterdir()):
        match = re.match(r"(.+?)-(\d[^-]*?)(-.*\.whl|\.tar\.xz)$", path.name)
        if match is None or is_installed(match[1], requirements.get(normalize(match[1]), "")):
            continue
        if path.suffix == ".whl":
            zipfile.ZipFile(path).extractall(site)
        else:
            with tarfile.open(path) as archive:
                archive.extractall(site, filter="data")
        unpacked.append(f"{match[1]} {match[2]}")
    return unpacked


def write_metadata(site: Path, project: dict[str, Any]) -> None:
    """Describe segray as if it were installed: it asks for its own version."""
    folder = site / f"{project['name']}-{project['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")


def normalize(name: str) -> str:
    """Return the name of a distribution as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def split_requirement(line: str) -> tuple[str, str]:
    """Split a requirement such as ``ray[data]==2.60.0`` into its normalised name and its version specifier."""
    match = re.match(r"([A-Za-z0-9._-]+?)(\[[^]]*\])?\s*([<>=!~].*)?$", line)
    assert match, line
    return normalize(match[1]), match[3] or ""


def is_installed(name: str, specifier: str) -> bool:
    """Return whether this Python has a distribution of a version that ``specifier`` allows."""
    try:
        found = parse_version(version(name))
    except PackageNotFoundError:
        return False
    compare = {
        ">=": lambda wanted: found >= wanted,
        "==": lambda wanted: found == wanted,
        "<": lambda wanted: found < wanted,
    }
    clauses = [re.match(r"\s*(>=|==|<)\s*([\d.]+)", clause) for clause in specifier.split(",") if clause]
    return all(compare[clause[1]](parse_version(clause[2])) for clause in clauses if clause)


def parse_version(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, without zeros at their end: ``2.60.0+cu130`` is (2, 60)."""
    numbers = [int(part) for part in re.match(r"[\d.]*", text)[0].split(".") if part]  # type: ignore[index]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)

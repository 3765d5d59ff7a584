"""The control experiment: naive Ray Data on the same images loses and duplicates rows, so the invariant can fail."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.scene import NUM_GOOD, ROOT, build_environment, build_files, pick_poison

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write the images of the fault tests to a local folder and return it."""
    for key, content in build_files(with_empty_names=False).items():
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "images"


def start(images: Path, output: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.faults.naive", str(images), str(output), *arguments]
    return subprocess.Popen(
        command, env=build_environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def finish(process: "subprocess.Popen[str]") -> dict[str, Any]:
    counts: dict[str, Any] = json.loads(process.communicate(timeout=200)[0].splitlines()[-1])
    print(f"naive: {counts}")  # For docs/guides/faults.md; pytest -s shows it.
    return counts


def test_the_naive_pipeline_loses_good_images_if_one_is_broken(folder: Path, tmp_path: Path) -> None:
    strict = finish(start(folder, tmp_path / "strict"))
    assert strict["error"]
    assert strict["distinct"] < NUM_GOOD
    lenient = finish(start(folder, tmp_path / "lenient", "-1"))
    assert lenient["distinct"] < NUM_GOOD


def test_the_naive_pipeline_duplicates_rows_if_submitted_twice(folder: Path, tmp_path: Path) -> None:
    for name in pick_poison():
        (folder / name).unlink()
    both = [start(folder, tmp_path / "rows") for _ in range(2)]
    counts = [finish(process) for process in both]
    last = max(counts, key=lambda count: int(count["rows"]))
    assert last["rows"] == 2 * last["distinct"]
    assert 0 < last["distinct"] < NUM_GOOD  # It silently skips .dot, _under and g?h.

"""The decode stage without Ray: reduced JPEG decoding, reading ahead, and memory."""

import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from segray.config import SegmentSettings
from segray.data.samples import fetch_image
from segray.runs import plan
from segray.runs.plan import ListedImage
from segray.runtime.connect import MEMORY_VARIABLES
from segray.segmentation.job import PipelineJob
from segray.segmentation.stages import decode as decoding
from segray.segmentation.stages.decode import FragmentDecoder
from segray.segmentation.stages.ledger import DECODE
from tests.conftest import PET_CLASSES
from tests.segmentation.local_ledger import LocalLedger


def decode(folder: Path, settings: SegmentSettings) -> pa.Table:
    """Decode the images of a folder as one fragment, with their masks."""
    spool = folder / "spool"
    spool.mkdir(exist_ok=True)
    images = [ListedImage(str(path), mask_uri=str(path.with_suffix(".png"))) for path in sorted(folder.glob("*.jpg"))]
    frozen = plan.spool_plan(plan.cut_fragments(images, settings), spool)
    plan.save_plan(str(folder / "run"), frozen, spool)
    job = PipelineJob(str(folder / "run"), frozen.cut_sha256, "", "", PET_CLASSES, (32, 48), settings, has_truth=True)
    return FragmentDecoder(job, LocalLedger(DECODE))(pa.table({"fragment": [0]}))


def test_a_reduced_jpeg_keeps_its_size_and_ground_truth_and_nearly_its_pixels(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:600, :880]
    pixels = np.stack([rows // 3, columns // 4, (rows + columns) // 6], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray((rows % 3 + 1).astype(np.uint8)).save(tmp_path / "a.png")
    whole = decode(tmp_path, SegmentSettings())
    reduced = decode(tmp_path, SegmentSettings(reduce_jpeg=True))
    (row,) = reduced["rows"][0].as_py()
    assert (row["error_kind"], row["height"], row["width"]) == (None, 600, 880)
    assert reduced["truths"].equals(whole["truths"])
    images = [np.frombuffer(table["images"][0].as_py(), np.uint8).astype(int) for table in (whole, reduced)]
    difference = np.abs(images[0] - images[1])
    assert 0 < difference.mean() < 1  # the decoding did differ


class SlowStore:
    """Fetches images with a delay, and records the maximum number of concurrent fetches."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock, self._num_now, self.max_concurrent = Lock(), 0, 0

    def fetch(self, *arguments: Any) -> bytes:
        with self._lock:
            self._num_now += 1
            self.max_concurrent = max(self.max_concurrent, self._num_now)
        time.sleep(self._seconds)
        try:
            return fetch_image(*arguments)
        finally:
            with self._lock:
                self._num_now -= 1


@pytest.fixture
def twelve_images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{number:02d}.jpg")
        Image.fromarray(np.full((8, 8), 1, np.uint8)).save(tmp_path / f"{number:02d}.png")
    return tmp_path


def test_fetch_time_is_the_time_that_decoding_waits(twelve_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowStore(0.05)
    monkeypatch.setattr(decoding, "fetch_image", slow.fetch)
    table = decode(twelve_images, SegmentSettings(num_fetch_threads=12))
    wall_s = {step["step"]: step["wall_s"] for step in table["steps"][0].as_py()}
    assert slow.max_concurrent > 4  # after the first file, whose size was unknown
    assert 0.05 <= wall_s["fetch"] < 6 * 0.05


def test_reading_ahead_is_limited_by_bytes(twelve_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = decode(twelve_images, SegmentSettings())
    slow = SlowStore(0.01)
    monkeypatch.setattr(decoding, "fetch_image", slow.fetch)
    largest_bytes = max(path.stat().st_size for path in twelve_images.glob("*.jpg"))
    monkeypatch.setattr(decoding, "_MAX_AHEAD_BYTES", 3 * largest_bytes)
    monkeypatch.setattr(decoding, "_GUESSED_BYTES", 2**30)
    table = decode(twelve_images, SegmentSettings())
    assert slow.max_concurrent <= 3
    assert table["images"].equals(expected["images"])
    assert table["rows"].equals(expected["rows"])


def test_memory_is_returned_to_the_system_after_a_huge_image(tmp_path: Path) -> None:
    Image.new("RGB", (6000, 6000)).save(tmp_path / "a.jpg")
    Image.new("L", (6000, 6000), 1).save(tmp_path / "a.png")
    script = """
import sys, psutil
from pathlib import Path
from segray.config import SegmentSettings
from tests.segmentation.stages.test_decode import decode
before = psutil.Process().memory_info().rss
decode(Path(sys.argv[1]), SegmentSettings())
print((psutil.Process().memory_info().rss - before) / 2**20)
"""
    environment = {**os.environ, **MEMORY_VARIABLES}
    command = [sys.executable, "-c", script, str(tmp_path)]
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert float(printed) < 250  # MiB; 560 if everything were kept

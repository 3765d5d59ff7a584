"""The decode stage without Ray: error rows, reduced JPEG decoding, reading ahead, time limit and memory."""

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
from segray.data import samples
from segray.data.samples import fetch_image
from segray.errors import ClusterError, ForbiddenFileError
from segray.runtime.connect import MEMORY_VARIABLES
from segray.segmentation.stages import decode as decoding
from segray.segmentation.stages.compression import decompress
from segray.segmentation.stages.ledger import DECODE, MAX_DEATHS_PER_IMAGE
from segray.storage import read_bytes
from tests.segmentation.local_ledger import LocalLedger
from tests.segmentation.stages.planned import decode_rows, planned_decoder

ROOT = Path(__file__).parents[3]


def decode(folder: Path, settings: SegmentSettings) -> pa.Table:
    """Decode the images of a folder as one fragment, with their masks."""
    images = [{"uri": str(path), "mask_uri": str(path.with_suffix(".png"))} for path in sorted(folder.glob("*.jpg"))]
    with planned_decoder(images, settings, (32, 48)) as decoder:
        return decoder(pa.table({"fragment": [0]}))


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
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
    assert float(printed) < 250  # MiB; 560 if everything were kept


def test_ground_truth_waits_compressed(tmp_path: Path) -> None:
    Image.new("RGB", (1500, 1500)).save(tmp_path / "a.jpg")
    Image.new("L", (1500, 1500), 2).save(tmp_path / "a.png")
    table = decode(tmp_path, SegmentSettings())
    (truth,) = table["truths"][0]
    assert table["truths"].nbytes < 1500**2 / 50
    assert decompress(truth.as_buffer(), 1500**2) == bytes([1]) * 1500**2  # The value 2 is class 1.


@pytest.fixture
def five_images(tmp_path: Path) -> list[dict[str, Any]]:
    """Rows of a plan with five images of different sizes."""
    images = []
    for index in range(5):
        Image.fromarray(np.full((9, 8 + index, 3), index, np.uint8)).save(tmp_path / f"{index}.png")
        images.append({"uri": str(tmp_path / f"{index}.png")})
    return images


@pytest.mark.parametrize("num_deaths", [1, 2])
def test_one_by_one_every_image_is_recorded_and_decoded_to_the_same_row(
    five_images: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, num_deaths: int
) -> None:
    ledger = LocalLedger(DECODE)
    recorded: list[int | None] = []
    record_image = ledger.record_image

    def record(fragment: int, attempt_plan: Any, index: int | None) -> None:
        recorded.append(index)
        record_image(fragment, attempt_plan, index)

    monkeypatch.setattr(ledger, "record_image", record)
    with planned_decoder(five_images, ledger=ledger) as decoder:
        fast = decoder(pa.table({"fragment": [0]})).drop_columns("steps")
        for _ in range(num_deaths):
            ledger.begin(0)
        assert decoder(pa.table({"fragment": [0]})).drop_columns("steps").equals(fast)
    assert recorded == [0, 1, 2, 3, 4, None]
    assert [row["uri"] for row in fast["rows"][0].as_py()] == [image["uri"] for image in five_images]


def test_a_failed_image_is_not_read_again(five_images: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = LocalLedger(DECODE)
    ledger.begin(0)
    for _ in range(MAX_DEATHS_PER_IMAGE):
        ledger.record_image(0, ledger.begin(0), 2)
    read: list[str] = []

    def fetch(uri: str, *rest: Any) -> Any:
        read.append(Path(uri).name)
        return fetch_image(uri, *rest)

    monkeypatch.setattr(decoding, "fetch_image", fetch)
    with planned_decoder(five_images, ledger=ledger) as decoder:
        rows = decode_rows(decoder)
    assert read == ["0.png", "1.png", "3.png", "4.png"]
    assert [row["error_kind"] for row in rows] == [None, None, "failed", None, None]
    assert rows[2]["error_message"] == "the worker process died 3 times while decoding this image"


@pytest.mark.parametrize("always_fails", [False, True])
def test_an_image_that_exhausts_memory_is_retried_alone(
    five_images: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, always_fails: bool
) -> None:
    tries: list[str] = []

    def read(uri: str, *rest: Any) -> Any:
        if uri.endswith("3.png"):
            tries.append(uri)
            if always_fails or len(tries) == 1:
                raise MemoryError
        return fetch_image(uri, *rest)

    monkeypatch.setattr(decoding, "fetch_image", read)
    with planned_decoder(five_images) as decoder:
        kinds = [row["error_kind"] for row in decode_rows(decoder)]
    assert kinds == [None, None, None, "failed" if always_fails else None, None]
    assert len(tries) == 2


@pytest.mark.parametrize("is_beside_readable", [True, False])
@pytest.mark.parametrize("forbidden", ["image", "mask"])
def test_a_forbidden_file_is_an_error_row_if_others_of_its_folder_can_be_read(
    five_images: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, is_beside_readable: bool, forbidden: str
) -> None:
    uri = five_images[1]["uri"]
    if forbidden == "mask":
        five_images[1] |= {"uri": five_images[0]["uri"], "mask_uri": uri}

    def read(read_uri: str, *rest: Any) -> bytes:
        if read_uri == uri:
            raise ForbiddenFileError(f"cannot read {read_uri}: permission denied")
        return read_bytes(read_uri, *rest)

    monkeypatch.setattr(samples, "read_bytes", read)
    monkeypatch.setattr(samples, "can_read_beside", lambda _: is_beside_readable)
    with planned_decoder(five_images) as decoder:
        if is_beside_readable:
            row = decode_rows(decoder)[1]
            subject = "file" if forbidden == "image" else "mask"
            message = f"the {subject} cannot be read: cannot read {uri}: permission denied"
            assert (row["error_kind"], row["error_message"]) == ("forbidden", message)
        else:
            with pytest.raises(ForbiddenFileError):
                decode_rows(decoder)


def test_an_unexpected_exception_names_the_image(
    five_images: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("odd")

    monkeypatch.setattr(decoding, "resize_image", fail)
    expected = f"^decoding {five_images[0]['uri']} of fragment 3 failed: KeyError: 'odd'; rerun with SEGRAY_WORKER"
    with planned_decoder(five_images) as decoder, pytest.raises(ClusterError, match=expected):
        decode_rows(decoder, fragment=3)
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(decoding, "pack_decoded", fail)
    with (
        planned_decoder(five_images) as decoder,
        pytest.raises(ClusterError, match=r"^decoding fragment 3 failed: Key"),
    ):
        decode_rows(decoder, fragment=3)


def run_in_child(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_an_image_that_hangs_ends_its_process_even_if_it_holds_the_lock_of_python(
    five_images: list[dict[str, Any]],
) -> None:
    """The wait in C, like a decoder that hangs, keeps Python's lock."""
    script = """
import ctypes, sys, time
from segray.config import SegmentSettings
from segray.segmentation.stages import decode
from tests.segmentation.stages.planned import decode_rows, planned_decoder
with planned_decoder([{"uri": uri} for uri in sys.argv[1:]], SegmentSettings(image_timeout_s=2)) as decoder:
    assert len(decode_rows(decoder)) == 5
    time.sleep(2.5)  # The limit concerns only decoding.
    print("all decoded", flush=True)
    decode.resize_image = lambda *_: ctypes.PyDLL(None).sleep(60)
    decode_rows(decoder)
"""
    started_s = time.monotonic()
    ended = run_in_child(script, *(image["uri"] for image in five_images))
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "all decoded\n", "")
    assert time.monotonic() - started_s < 30


def test_fetching_is_not_limited(five_images: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "fetch_image", SlowStore(0.5).fetch)
    with planned_decoder(five_images, SegmentSettings(image_timeout_s=0.4)) as decoder:
        assert [row["error_kind"] for row in decode_rows(decoder)] == [None] * 5

"""The write stage without Ray: row groups, schema metadata, and identical bytes."""

import io
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from segray.config import SegmentSettings
from segray.data.classes import ClassMap
from segray.errors import ClusterError
from segray.results.masks import load_mask
from segray.runs.plan import get_fragment_uri
from segray.schema import IMAGES_SCHEMA
from segray.segmentation.job import PipelineJob
from segray.segmentation.stages import writer as writing
from segray.segmentation.stages.compression import compress
from segray.segmentation.stages.predictor import PREDICTED_SCHEMA
from segray.segmentation.stages.writer import FragmentWriter
from tests.conftest import PET_CLASSES

SETTINGS = SegmentSettings(batch_size=3, precision="fp32")
GROUP_BYTES = 1000
ROOT = Path(__file__).parents[3]


def make_row(number: int, mask: np.ndarray[Any, Any] | None, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return a row of ``IMAGES_SCHEMA`` with a compressed mask; without one, an error row."""
    row = dict.fromkeys(IMAGES_SCHEMA.names) | {"uri": f"{number:03d}"}
    if mask is None:
        return row | {"status": "error", "error_kind": "truncated", "height": 10**4, "width": 10**4}
    height, width = size or mask.shape
    return row | {
        "status": "ok",
        "height": height,
        "width": width,
        "mask": compress(mask),
        "mask_encoding": "raw",
        "pixel_count": [height * width, 0, 0],
    }


def write(
    folder: Path, rows: list[dict[str, Any]], settings: SegmentSettings = SETTINGS, classes: ClassMap = PET_CLASSES
) -> Path:
    """Write a fragment and return its file."""
    job = PipelineJob(str(folder), "", "", "ab" * 32, classes, (16, 16), settings, has_truth=False)
    predicted = pa.Table.from_pylist([{"fragment": 5, "rows": rows, "steps": []}], PREDICTED_SCHEMA)
    (written,) = FragmentWriter(job, frozenset())(predicted).to_pylist()
    path = Path(get_fragment_uri(str(folder), 5))
    assert written["size_bytes"] == path.stat().st_size
    assert written["num_ok"] == sum(row["status"] == "ok" for row in rows)
    return path


def make_masks(heights: list[int | None], dtype: type = np.uint8) -> list[np.ndarray[Any, Any] | None]:
    """Return masks of 10 columns with the given heights; None for an image without one."""
    rng = np.random.default_rng(1)
    return [None if height is None else rng.integers(0, 3, (height, 10), dtype) for height in heights]


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([10, 20, 30], [3]),
        ([50, 50, 1], [2, 1]),  # 1000 bytes fit exactly.
        ([200, 1, 300, None, 100, 1], [1, 1, 1, 2, 1]),  # A mask above the limit has a group of its own.
        ([None, None], [2]),
    ],
)
@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_row_groups_are_limited_by_their_raw_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heights: list[int | None], expected: list[int], encoding: str
) -> None:
    monkeypatch.setattr(writing, "_MAX_GROUP_BYTES", GROUP_BYTES)
    masks = make_masks(heights)
    settings = SETTINGS.model_copy(update={"mask_encoding": encoding})
    path = write(tmp_path, [make_row(number, mask) for number, mask in enumerate(masks)], settings)
    file = pq.ParquetFile(path)
    assert [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)] == expected
    rows = file.read().to_pylist()
    assert [row["uri"] for row in rows] == [f"{number:03d}" for number in range(len(masks))]
    for row, mask in zip(rows, masks, strict=True):
        if mask is None:
            assert (row["mask"], row["mask_encoding"]) == (None, None)
        else:
            assert row["mask_encoding"] == encoding
            assert np.array_equal(load_mask(row), mask)


def test_masks_of_many_classes_are_written_with_two_bytes_per_pixel(tmp_path: Path) -> None:
    names = tuple(map(str, range(300)))
    classes = ClassMap(names, tuple(range(300)))
    rows = [make_row(number, mask) for number, mask in enumerate(make_masks([7, 9], np.uint16))]
    for row in rows:
        row["pixel_count"] = [row["height"] * row["width"]] + 299 * [0]
    stored = pq.read_table(write(tmp_path, rows, classes=classes)).to_pylist()
    assert [len(row["mask"]) for row in stored] == [140, 180]


@pytest.mark.integration
def test_more_than_2_gib_of_masks_can_be_written_in_less_memory(tmp_path: Path) -> None:
    """With all rows in one page, as Parquet does by default, this failed: "page size overflows INT32_MAX"."""
    size = (10_000, 10_000)
    mask = compress(np.zeros(size, np.uint8))
    rows = [make_row(number, np.zeros((1, 1), np.uint8), size) | {"mask": mask} for number in range(22)]
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = write(tmp_path, rows)
    # MiB. The masks have 2098; Arrow's writer takes 8 times the size of a single value.
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 2**10 < 1200
    file = pq.ParquetFile(path)
    assert file.metadata.num_row_groups == 22
    assert file.read_row_group(21, ["mask"])["mask"][0].as_buffer().size == 10**8


def test_a_page_has_about_a_mib_so_that_writing_takes_little_memory() -> None:
    """The memory of Arrow while a row group of 48 MiB is written: 71 MiB, and 204 MiB if it were one page."""
    script = """
import tempfile
from pathlib import Path
import numpy as np, pyarrow as pa
from tests.segmentation.stages.test_writer import make_row, write
rng = np.random.default_rng(0)
masks = [rng.integers(0, 4, (64, 64), np.uint8).repeat(16, 0).repeat(16, 1) for _ in range(48)]
with tempfile.TemporaryDirectory() as folder:
    write(Path(folder), [make_row(number, mask) for number, mask in enumerate(masks)])
print(pa.default_memory_pool().max_memory() / 2**20)
"""
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
    assert float(printed) < 130


def test_the_schema_says_what_the_rows_mean_and_how_they_were_computed(tmp_path: Path) -> None:
    metadata = pq.read_schema(write(tmp_path, [make_row(0, np.zeros((2, 2), np.uint8))])).metadata
    decoded = {key.decode(): value.decode() for key, value in metadata.items()}
    assert json.loads(decoded["segray.class_names"]) == ["pet", "background", "border"]
    assert json.loads(decoded["segray.class_values"]) == [1, 2, 3]
    assert decoded["segray.bundle_sha256"] == "ab" * 32
    assert decoded["segray.format_version"] == "2"
    expected = {"batch_size": 3, "precision": "fp32", "compile": False, "num_threads_per_predictor": 1, "device": "cpu"}
    assert json.loads(decoded["segray.computed_with"]) == expected


def test_the_same_rows_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_MAX_GROUP_BYTES", GROUP_BYTES)
    rows = [make_row(number, mask) for number, mask in enumerate(make_masks([40, 60, None, 5]))]
    contents = {write(tmp_path / str(number), rows).read_bytes() for number in range(2)}
    assert len(contents) == 1
    assert pq.read_schema(io.BytesIO(contents.pop())).remove_metadata().equals(IMAGES_SCHEMA)


def test_an_unexpected_exception_names_the_fragment_and_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("odd")

    monkeypatch.setattr(writing, "count_rows_of_fragment", fail)
    expected = rf"^writing fragment 5 to {tmp_path}/images/part-00000005.parquet failed: KeyError: 'odd'; rerun with"
    with pytest.raises(ClusterError, match=expected):
        write(tmp_path, [make_row(0, np.zeros((2, 2), np.uint8))])

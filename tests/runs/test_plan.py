"""The plan of a run: hashes and storage."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from segray.runs import plan as plan_module
from segray.runs.listing import LISTING_SCHEMA, ListedImage, tabulate
from segray.runs.plan import (
    Plan,
    count_images,
    find_lost_files,
    iterate_plan,
    load_fragment,
    remove_other_plans,
    save_plan,
    spool_plan,
)
from segray.schema import PLAN_SCHEMA
from segray.storage.files import _RangeReader

SIZES_BYTES = {"a": 30, "b": 30, "c": 40, "d": 1, "e": 500, "f": 1, "g": 1, "h": 1}
IMAGES = [ListedImage(name, size, f"tag {name}", f"mask {name}", None) for name, size in SIZES_BYTES.items()]


def number(images: list[ListedImage], size: int) -> Iterator[pa.RecordBatch]:
    """Yield images with their fragments, ``size`` images in each."""
    for start, image in enumerate(images):
        for batch in tabulate([image]):
            yield batch.append_column("fragment", pa.array([start // size]))


def spool(images: list[ListedImage], folder: Path, size: int = 3, batch_rows: int = 1) -> Plan:
    folder.mkdir()
    whole = pa.Table.from_batches(number(images, size)).combine_chunks()
    return spool_plan(whole.to_batches(max_chunksize=batch_rows), folder)


def get_images(table: pa.Table) -> list[ListedImage]:
    return [ListedImage(**{name: row[name] for name in ListedImage._fields}) for row in table.to_pylist()]


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "_FRAGMENTS_PER_FILE", 2)


@pytest.fixture(autouse=True)
def empty_caches() -> Iterator[None]:
    yield
    plan_module._open_plan_file.cache_clear()
    plan_module._load_row_group.cache_clear()


def test_the_hashes_of_existing_folders_stay_the_same(tmp_path: Path) -> None:
    images = [
        ListedImage('/d/"q\\.png'),
        ListedImage("/d/a.png", 1, "t"),
        ListedImage("/d/b.png", 0, "", "/m/b.png"),
        ListedImage("/d/ü😀.png", 3, "\x7f", "/m/ü.png", "x"),
        ListedImage("s3://b/ \t.png", 2**40, "é"),
    ]
    assert spool(images, tmp_path / "spool", 2) == Plan(
        sha256="072e7550fcbe93b91bbdf58034aa10b423e202ecc9cf67a0d457b6b7113e8113",
        cut_sha256="184268fdf400af69ec960c1aa2978c6f024402f3390275522100526f22844c12",
        num_images=5,
        num_fragments=3,
    )


@pytest.mark.parametrize("batch_rows", [1, 2, 8])
@pytest.mark.usefixtures("small_files")
def test_a_saved_plan_returns_every_fragment(tmp_path: Path, batch_rows: int) -> None:
    plan = spool(IMAGES, tmp_path / "spool", batch_rows=batch_rows)
    output = tmp_path / "run"
    (output / "plan").mkdir(parents=True)
    (output / "plan" / "plan-0123456789abcdef-00000.parquet").write_bytes(b"another plan")
    in_flight = output / "plan" / ".plan-0123456789abcdef-00000.parquet.x.tmp"  # being written by another driver
    in_flight.touch()
    assert find_lost_files(str(output), plan) == [0, 1]
    save_plan(str(output), plan, tmp_path / "spool")
    remove_other_plans(str(output), plan)
    assert sorted(path.name for path in (output / "plan").iterdir()) == [
        in_flight.name,
        *(f"plan-{plan.cut_sha256[:16]}-{number:05d}.parquet" for number in range(2)),
    ]
    assert find_lost_files(str(output), plan) == []
    assert (plan.num_images, plan.num_fragments) == (8, 3)
    assert count_images(str(output), plan).tolist() == [3, 3, 2]
    fragments = [load_fragment(str(output), plan.cut_sha256, fragment) for fragment in range(3)]
    assert [len(fragment) for fragment in fragments] == [3, 3, 2]
    whole = pa.concat_tables(fragments)
    assert whole.schema.equals(PLAN_SCHEMA)
    assert get_images(whole) == IMAGES
    frozen = pa.Table.from_batches(iterate_plan(str(output), plan))
    assert get_images(frozen) == IMAGES
    assert frozen["fragment"].to_pylist() == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.usefixtures("small_files")
def test_images_are_counted_in_time_proportional_to_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = spool([ListedImage(f"{n:04}") for n in range(400)], tmp_path / "spool", 1, batch_rows=400)
    save_plan(str(tmp_path), plan, tmp_path / "spool")
    lengths: list[int] = []
    bincount = np.bincount

    def count(values: Any, minlength: int) -> Any:
        lengths.append(minlength)
        return bincount(values, minlength=minlength)

    monkeypatch.setattr(np, "bincount", count)
    assert count_images(str(tmp_path), plan).tolist() == [1] * 400
    assert lengths == [2] * 200


def test_a_fragment_is_loaded_with_the_row_groups_that_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [ListedImage(f"{n:06}", n, f"tag {n}") for n in range(100_000)]
    whole = pa.concat_batches(tabulate(images))
    planned = whole.append_column("fragment", pa.array(np.arange(100_000) // 1000))
    (tmp_path / "spool").mkdir()
    batches = [planned.slice(start, 1300) for start in range(0, 100_000, 1300)]
    plan = spool_plan(batches, tmp_path / "spool")
    save_plan(str(tmp_path), plan, tmp_path / "spool")
    requests: list[int] = []
    read = _RangeReader.readinto

    def count(reader: _RangeReader, buffer: memoryview) -> int:
        requests.append(len(buffer))
        return read(reader, buffer)

    monkeypatch.setattr(_RangeReader, "readinto", count)
    assert get_images(load_fragment(str(tmp_path), plan.cut_sha256, 50)) == images[50_000:51_000]
    file_bytes = next((tmp_path / "plan").iterdir()).stat().st_size
    assert sum(requests) < file_bytes / 2
    assert len(requests) <= 4  # the footer, and two row groups
    requests.clear()
    assert get_images(load_fragment(str(tmp_path), plan.cut_sha256, 51)) == images[51_000:52_000]
    assert len(requests) <= 2


def test_a_plan_in_a_single_row_group_is_read_too(tmp_path: Path) -> None:
    plan = spool(IMAGES, tmp_path / "spool")
    pq.write_table(pq.read_table(tmp_path / "spool" / "0"), tmp_path / "spool" / "0", write_page_checksum=True)
    assert pq.read_metadata(tmp_path / "spool" / "0").num_row_groups == 1
    save_plan(str(tmp_path), plan, tmp_path / "spool")
    assert get_images(load_fragment(str(tmp_path), plan.cut_sha256, 1)) == IMAGES[3:6]


def test_existing_plan_files_are_not_written_again(tmp_path: Path) -> None:
    plan = spool(IMAGES, tmp_path / "spool")
    save_plan(str(tmp_path), plan, tmp_path / "spool")
    (path,) = (tmp_path / "plan").iterdir()
    before = path.stat().st_mtime_ns
    save_plan(str(tmp_path), plan, tmp_path / "spool")
    assert path.stat().st_mtime_ns == before


def test_the_plan_hash_covers_all_columns_but_not_the_fragments(tmp_path: Path) -> None:
    def compute(name: str, images: list[ListedImage], size: int = 3) -> str:
        return spool(images, tmp_path / name, size).sha256

    first = compute("first", IMAGES)
    assert compute("same", IMAGES, 2) == first
    cuts = [spool(IMAGES, tmp_path / f"cut {size}", size).cut_sha256 for size in (3, 2)]
    assert cuts[0] != cuts[1]
    assert compute("shorter", IMAGES[:-1]) != first
    for number, name in enumerate(ListedImage._fields):
        value: Any = 2 if name == "size_bytes" else "other"
        changed = IMAGES[3]._replace(**{name: value})
        assert compute(f"changed {number}", [*IMAGES[:3], changed, *IMAGES[4:]]) != first


@pytest.mark.usefixtures("small_files")
def test_spooling_keeps_one_batch_in_memory_at_a_time(tmp_path: Path) -> None:
    def generate() -> Iterator[pa.RecordBatch]:
        for position, batch in enumerate(number([ListedImage(f"{n:02d}") for n in range(20)], 2)):
            yield batch
            if position >= 8:  # a file holds two fragments of two images
                assert (tmp_path / "0").exists()

    plan = spool_plan(generate(), tmp_path)
    assert plan.num_files == 5
    assert [len(pq.read_table(tmp_path / str(number))) for number in range(5)] == [4] * 5
    assert LISTING_SCHEMA.names == list(ListedImage._fields)

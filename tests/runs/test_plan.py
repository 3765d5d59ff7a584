"""The plan of a run: division into fragments, hashes, and storage."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from segray.config import SegmentSettings
from segray.runs.plan import (
    ListedImage,
    Plan,
    count_images,
    cut_fragments,
    iterate_plan,
    iterate_spooled,
    load_fragment,
    remove_other_plans,
    save_plan,
    spool_plan,
)
from segray.schema import PLAN_SCHEMA

SIZES_BYTES = {"a": 30, "b": 30, "c": 40, "d": 1, "e": 500, "f": 1, "g": 1, "h": 1}
IMAGES = [ListedImage(name, size, f"tag {name}", f"mask {name}", None) for name, size in SIZES_BYTES.items()]


@pytest.mark.parametrize(
    ("fragment_size", "fragment_bytes", "expected"),
    [
        (3, 10**6, ["abc", "def", "gh"]),
        (8, 100, ["abc", "d", "e", "fgh"]),  # exactly 100 bytes fit; a larger image has its own fragment
        (2, 60, ["ab", "cd", "e", "fg", "h"]),
        (8, 1, list("abcdefgh")),
    ],
)
def test_fragments_keep_both_limits(fragment_size: int, fragment_bytes: int, expected: list[str]) -> None:
    settings = SegmentSettings(fragment_size=fragment_size, fragment_bytes=fragment_bytes)
    fragments: dict[int, str] = {}
    for image, fragment in cut_fragments(IMAGES, settings):
        fragments[fragment] = fragments.get(fragment, "") + image.uri
    assert list(fragments.items()) == list(enumerate(expected))


def test_images_of_unknown_size_are_divided_by_count() -> None:
    images = [ListedImage(str(number)) for number in range(5)]
    assert [fragment for _, fragment in cut_fragments(images, SegmentSettings(fragment_size=2))] == [0, 0, 1, 1, 2]


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.runs.plan._FRAGMENTS_PER_FILE", 2)


def spool(images: list[ListedImage], folder: Path, size: int = 3) -> Plan:
    folder.mkdir()
    return spool_plan(cut_fragments(images, SegmentSettings(fragment_size=size)), folder)


@pytest.mark.usefixtures("small_files")
def test_a_saved_plan_returns_every_fragment(tmp_path: Path) -> None:
    plan = spool(IMAGES, tmp_path / "spool")
    output = tmp_path / "run"
    (output / "plan").mkdir(parents=True)
    (output / "plan" / "plan-0123456789abcdef-00000.parquet").write_bytes(b"another plan")
    in_flight = output / "plan" / ".plan-0123456789abcdef-00000.parquet.x.tmp"  # being written by another driver
    in_flight.touch()
    save_plan(str(output), plan, tmp_path / "spool")
    remove_other_plans(str(output), plan)
    assert sorted(path.name for path in (output / "plan").iterdir()) == [
        in_flight.name,
        *(f"plan-{plan.cut_sha256[:16]}-{number:05d}.parquet" for number in range(2)),
    ]
    assert (plan.num_images, plan.num_fragments) == (8, 3)
    assert count_images(str(output), plan).tolist() == [3, 3, 2]
    fragments = [load_fragment(str(output), plan.cut_sha256, fragment) for fragment in range(3)]
    assert [len(fragment) for fragment in fragments] == [3, 3, 2]
    whole = pa.concat_tables(fragments)
    assert whole.schema.equals(PLAN_SCHEMA)
    assert [ListedImage(**{n: row[n] for n in ListedImage._fields}) for row in whole.to_pylist()] == IMAGES
    for stream in (iterate_plan(str(output), plan), iterate_spooled(tmp_path / "spool", plan)):
        assert list(stream) == list(zip(IMAGES, [0, 0, 0, 1, 1, 1, 2, 2], strict=True))


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
def test_spooling_keeps_one_file_in_memory_at_a_time(tmp_path: Path) -> None:
    def generate() -> Iterator[ListedImage]:
        for number in range(20):
            yield ListedImage(f"{number:02d}")
            if number >= 8:  # a file holds two fragments of two images
                assert (tmp_path / "0").exists()

    plan = spool_plan(cut_fragments(generate(), SegmentSettings(fragment_size=2)), tmp_path)
    assert plan.num_files == 5
    assert [len(pq.read_table(tmp_path / str(number))) for number in range(5)] == [4] * 5

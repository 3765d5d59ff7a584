"""The record of a label check: used for the same files and classes only, and unless it is damaged."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from segray.data.classes import ClassMap
from segray.errors import FaultKind
from segray.training.labels.heuristics import NO_DIGEST
from segray.training.labels.inspect import ReportBuilder, compute_chunk_size
from segray.training.labels.near_duplicates import NO_THUMBPRINT
from segray.training.labels.record import LabelRecord, find_record, remove_record
from segray.training.labels.split_report import LabelFault, SplitReport, WarningKind

CLASSES = ClassMap(("a", "b"), (0, 200), (255,))


def make_report(seed: int, num_samples: int = 3) -> SplitReport:
    rng = np.random.default_rng(seed)
    pixel_count, image_count, image_px = rng.integers(0, 10**12, (3, 2))
    return SplitReport(
        num_samples,
        [LabelFault(f"{seed}-{n}", FaultKind.MASK_MISMATCH, "bad", "") for n in range(seed % 2)],
        [LabelFault(f"{seed}-{n}", WarningKind.ALL_IGNORED, "void", "label it") for n in range(seed % 3)],
        pixel_count,
        image_count,
        image_px,
        int(rng.integers(100)),
        frozenset([seed]),
        rng.bytes(num_samples * len(NO_DIGEST)),
        rng.bytes(num_samples * len(NO_THUMBPRINT)),
        rng.bytes(num_samples),
    )


def assert_same(one: SplitReport, other: SplitReport) -> None:
    for name, value in vars(one).items():
        np.testing.assert_equal(vars(other)[name], value, name)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_reports_of_chunks_that_end_in_any_order_add_up(order: Sequence[int]) -> None:
    chunks = [make_report(seed, num_samples) for seed, num_samples in enumerate((3, 3, 3, 2))]
    builder = ReportBuilder(11, 2, with_presence=True)
    for index in order:
        builder.add(3 * index, chunks[index])
    assert (builder.num_samples, builder.num_faults) == (11, 2)
    expected = SplitReport.empty(2)
    for chunk in chunks:
        expected += chunk
    assert_same(builder.build(), expected)
    builder = ReportBuilder(11, 2)
    for index in order:
        builder.add(3 * index, chunks[index])
    assert_same(builder.build(), replace(expected, presence=b""))


@pytest.mark.parametrize(("num_samples", "num_cpus"), [(0, 1), (1, 8), (100, 8), (10**4, 2), (10**7, 704), (10**7, 1)])
def test_chunks_keep_all_cpus_busy_without_many_tasks(num_samples: int, num_cpus: int) -> None:
    size = compute_chunk_size(num_samples, num_cpus)
    assert 32 <= size <= 1024
    assert num_samples // size >= 16 * num_cpus or size == 32
    assert num_samples // size < 10**4 + 16 * num_cpus


@pytest.fixture
def record(tmp_path: Path) -> LabelRecord:
    report = replace(make_report(4), faults=[])
    record = LabelRecord.of({"train": report, "val": make_report(2)}, "abc", CLASSES)
    record.write(str(tmp_path))
    return record


def test_a_record_of_the_same_files_and_classes_is_found_with_its_counts(record: LabelRecord, tmp_path: Path) -> None:
    renamed = ClassMap(("road", "sky"), CLASSES.values, CLASSES.ignore_values)
    found = find_record(str(tmp_path), "abc", renamed, with_presence=True)
    assert found == record
    assert "6 images and masks, no faults, 3 warnings" in str(found)
    expected = replace(make_report(4), faults=[], warnings=[], values=frozenset(), digests=b"", thumbprints=b"")
    assert_same(record.splits["train"].build_report(), expected)


@pytest.mark.parametrize(
    ("listing", "classes"),
    [
        ("abd", CLASSES),
        ("abc", ClassMap(("a", "b"), (0, 100), (255,))),
        ("abc", ClassMap(("a", "b"), (0, 200))),
        ("abc", ClassMap(("a", "b"), (200, 0), (255,))),
    ],
)
@pytest.mark.usefixtures("record")
def test_a_record_of_other_files_or_classes_is_not_used(listing: str, classes: ClassMap, tmp_path: Path) -> None:
    assert find_record(str(tmp_path), listing, classes) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 99}', '{"format_version": 1}'])
def test_a_damaged_record_or_a_newer_one_is_not_used(content: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(content)
    assert find_record(str(tmp_path), "abc", CLASSES) is None


def test_a_record_without_the_classes_of_images_is_used_where_they_are_not_needed(tmp_path: Path) -> None:
    record = LabelRecord.of({"train": replace(make_report(4), presence=b"")}, "abc", CLASSES)
    record.write(str(tmp_path))
    assert find_record(str(tmp_path), "abc", CLASSES) == record
    assert find_record(str(tmp_path), "abc", CLASSES, with_presence=True) is None


@pytest.mark.parametrize("cut", [1, 3, 4, 12])
def test_a_record_with_damaged_classes_of_images_is_not_used(record: LabelRecord, tmp_path: Path, cut: int) -> None:
    split = record.splits["train"]
    damaged = split.model_copy(update={"presence": split.presence[:-cut]})
    record.model_copy(update={"splits": {"train": damaged}}).write(str(tmp_path))
    assert find_record(str(tmp_path), "abc", CLASSES) is None
    of_fewer_images = split.model_copy(update={"num_samples": 2})
    record.model_copy(update={"splits": {"train": of_fewer_images}}).write(str(tmp_path))
    assert find_record(str(tmp_path), "abc", CLASSES) is None


def test_a_removed_record_is_not_used(record: LabelRecord, tmp_path: Path) -> None:
    remove_record(str(tmp_path))
    remove_record(str(tmp_path))
    assert find_record(str(tmp_path), "abc", CLASSES) is None

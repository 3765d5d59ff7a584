"""External merge sort of listings."""

import random
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest

from segray.errors import StorageError
from segray.runs.listing import ListedImage, rebatch, tabulate
from segray.segmentation.planning import sorting
from segray.segmentation.planning.sorting import SortedStream, merge_sorted, sort_by_uri


def read(batches: list[pa.RecordBatch]) -> list[tuple[str, int]]:
    return [(row["uri"], row["size_bytes"]) for batch in batches for row in batch.to_pylist()]


@pytest.mark.parametrize("run_bytes", [1, 1000, 10**9])
def test_rows_are_sorted_and_equal_uris_keep_their_order_in_one_batch(
    run_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorting, "_RUN_BYTES", run_bytes)
    monkeypatch.setattr(sorting, "_RUN_BATCH_ROWS", 5)
    choose = random.Random(0)
    names = ["é", "z", "😀", "\uffff", "A", *map(str, range(100))]  # UTF-8 sorts as Python does, UTF-16 would not
    images = [ListedImage(choose.choice(names), number) for number in range(2000)]
    batches = list(sort_by_uri(rebatch(tabulate(images), 20)))
    assert read(batches) == sorted((image.uri, image.size_bytes or 0) for image in images)
    ends = [(before["uri"][-1].as_py(), after["uri"][0].as_py()) for before, after in pairwise(batches)]
    assert all(before < after for before, after in ends)


def test_memory_does_not_grow_with_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "_RUN_BYTES", 2**18)
    monkeypatch.setattr(sorting, "_RUN_BATCH_ROWS", 64)

    def measure_peak(num_rows: int) -> int:
        before, peak = pa.total_allocated_bytes(), 0

        def watch(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            nonlocal peak
            for batch in batches:
                peak = max(peak, pa.total_allocated_bytes() - before)
                yield batch

        images = (ListedImage(f"s3://bucket/{number * 7919 % num_rows:050}") for number in range(num_rows))
        batches = watch(sort_by_uri(watch(rebatch(tabulate(images), 1000))))
        assert sum(batch.num_rows for batch in batches) == num_rows
        return peak

    monkeypatch.setattr("segray.runs.listing.BATCH_ROWS", 1000)
    small, large = measure_peak(10_000), measure_peak(100_000)
    assert large < 1.5 * small  # The rows themselves are 10 times as many.


def test_nothing_is_sorted_to_nothing() -> None:
    assert list(sort_by_uri([])) == []
    assert list(sort_by_uri([pa.RecordBatch.from_pylist([], schema=pa.schema([("uri", pa.large_string())]))])) == []
    assert list(merge_sorted([])) == []


def test_merging_holds_one_batch_of_each_stream() -> None:
    taken = [0, 0]

    def generate(stream: int) -> Iterator[pa.RecordBatch]:
        for number in range(100):
            taken[stream] += 1
            yield from tabulate([ListedImage(f"{2 * number + stream:03}")])

    for count, _ in enumerate(merge_sorted([generate(0), generate(1)]), start=1):
        assert sum(taken) <= count + 2


def test_a_stream_is_taken_up_to_a_uri() -> None:
    stream = SortedStream(rebatch(tabulate([ListedImage(name) for name in "aabbbcde"]), 3))
    assert [batch["uri"].to_pylist() for batch in stream.take_until("0")] == []
    assert [batch["uri"].to_pylist() for batch in stream.take_until("b")] == [["a", "a", "b"], ["b", "b"]]
    assert stream.last == "c"
    assert [batch["uri"].to_pylist() for batch in stream.take_until("z")] == [["c"], ["d", "e"]]
    assert stream.last is None


def test_the_temporary_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    batches = sort_by_uri(tabulate([ListedImage("a")]))
    assert len(list(batches)) == 1
    unfinished = sort_by_uri(tabulate([ListedImage("a")]))
    next(unfinished)
    assert list(tmp_path.iterdir())
    del unfinished
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_reported_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/full")
    with pytest.raises(StorageError, match=r"cannot write the plan to the temporary folder /dev/full: .*set TMPDIR"):
        list(sort_by_uri(tabulate([ListedImage("a")])))

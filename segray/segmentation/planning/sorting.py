"""Sorts and merges listings of any size in bounded memory: an external merge sort on the driver's disk.

Everything is done on record batches. Comparing rows one by one in Python, as ``heapq.merge`` does, takes ten times as
long.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from segray.segmentation.planning.spool import make_spool

_RUN_BYTES = 2**27  # Size of a sorted run. 100 million URIs make about 100 runs.
_RUN_BATCH_ROWS = 2**13  # One such batch of each run is in memory while the runs are merged.


def sort_by_uri(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the same rows sorted by URI; rows with equal URIs keep their order, and are in the same batch.

    Args:
        batches: Batches of one schema, with a column ``uri``.

    Raises:
        StorageError: The temporary folder cannot be written, for example because the disk is full.
    """
    with make_spool() as folder:
        yield from merge_sorted([_read_run(path) for path in _write_runs(batches, folder)])


def _write_runs(batches: Iterable[pa.RecordBatch], folder: Path) -> list[Path]:
    """Write runs: rows of about ``_RUN_BYTES``, sorted."""
    paths: list[Path] = []
    waiting: list[pa.RecordBatch] = []
    num_bytes = 0
    for batch in batches:
        waiting.append(batch)
        num_bytes += batch.nbytes
        if num_bytes >= _RUN_BYTES:
            paths.append(_write_run(waiting, folder / str(len(paths))))
            num_bytes = 0
    if waiting:
        paths.append(_write_run(waiting, folder / str(len(paths))))
    return paths


def _write_run(waiting: list[pa.RecordBatch], path: Path) -> Path:
    """Write the rows of ``waiting`` sorted, and empty it, so that no more than two copies are in memory."""
    run = pa.concat_batches(waiting)
    waiting.clear()
    run = _sort(run)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, run.schema, options=options) as writer:
        for start in range(0, run.num_rows, _RUN_BATCH_ROWS):
            writer.write_batch(run.slice(start, _RUN_BATCH_ROWS))
    return path


def _sort(batch: pa.RecordBatch) -> pa.RecordBatch:
    uris = batch["uri"]
    is_sorted = pc.all(pc.less_equal(uris[:-1], uris[1:])).as_py() is not False
    return batch if is_sorted else batch.sort_by("uri")


def _read_run(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        yield from reader


def merge_sorted(streams: Iterable[Iterator[pa.RecordBatch]]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of several sorted streams, sorted by URI.

    Rows with equal URIs keep the order of the streams, and are in the same batch.
    """
    heads = [SortedStream(stream) for stream in streams]
    while live := [head for head in heads if head.last is not None]:
        bound = min(head.last for head in live if head.last is not None)
        parts = [part for head in live for part in head.take_until(bound)]
        yield _sort(pa.concat_batches(parts)) if len(parts) > 1 else parts[0]


class SortedStream:
    """A stream of batches sorted by URI, which is consumed from its front.

    Attributes:
        last: Last URI of the batch that is in memory; None at the end of the stream.
    """

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self._advance()

    def _advance(self) -> None:
        self._head = next((batch for batch in self._batches if batch.num_rows), None)
        self._first: str = "" if self._head is None else self._head["uri"][0].as_py()
        self.last: str | None = None if self._head is None else self._head["uri"][-1].as_py()

    def take_until(self, bound: str) -> Iterator[pa.RecordBatch]:
        """Remove and yield all rows whose URI is at most ``bound``."""
        while self._head is not None and self._first <= bound:
            if self.last is not None and self.last <= bound:
                yield self._head
                self._advance()
            else:
                uris = self._head["uri"]
                end = bisect_right(range(len(uris)), bound, key=lambda index: uris[index].as_py())
                yield self._head.slice(0, end)
                self._head = self._head.slice(end)
                self._first = self._head["uri"][0].as_py()

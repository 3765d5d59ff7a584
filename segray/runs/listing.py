"""The listing of a run: its images as a stream of record batches, sorted by URI, and their hash.

A listing of 100 million images does not fit in memory, so it is never held whole: it passes through as batches of
``LISTING_SCHEMA``, and is spooled to the driver's disk.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from segray.data.json_rows import format_rows
from segray.schema import PLAN_SCHEMA

BATCH_ROWS = 2**16
# Offsets of 64 bits, because the strings of a batch of unbounded text can exceed 2 GiB.
LISTING_SCHEMA = pa.schema(
    [
        (field.name, pa.large_string() if field.type == pa.string() else field.type)
        for field in PLAN_SCHEMA
        if field.name != "fragment"
    ]
)


class ListedImage(NamedTuple):
    """An input image of a run: one row of a listing.

    Attributes:
        size_bytes: Size of the encoded file. None if neither a listing nor a manifest gives it.
        etag: Entity tag that the file must have when it is read; None accepts any content.
        mask_uri: Its ground truth, or None.
        mask_etag: Entity tag of the mask, used as ``etag`` is.
    """

    uri: str
    size_bytes: int | None = None
    etag: str | None = None
    mask_uri: str | None = None
    mask_etag: str | None = None


@dataclass(frozen=True)
class Listing:
    """A listing that was spooled to a local file.

    Attributes:
        path: An Arrow stream with batches of ``LISTING_SCHEMA``.
        sha256: Hash of the images in order.
        num_images: Number of images.
    """

    path: Path
    sha256: str
    num_images: int

    def read(self) -> Iterator[pa.RecordBatch]:
        """Yield the batches of the listing."""
        with pa.OSFile(str(self.path)) as file, pa.ipc.open_stream(file) as reader:
            yield from reader


def spool_listing(batches: Iterable[pa.RecordBatch], path: Path) -> Listing:
    """Write a listing to a local file, in batches of ``BATCH_ROWS`` rows."""
    digest, num_images = hashlib.sha256(), 0
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, LISTING_SCHEMA, options=options) as writer:
        for batch in rebatch(batches):
            writer.write_batch(batch)
            digest.update(format_rows(batch.columns))
            num_images += batch.num_rows
    return Listing(path, digest.hexdigest(), num_images)


def tabulate(images: Iterable[ListedImage]) -> Iterator[pa.RecordBatch]:
    """Yield images as batches of ``LISTING_SCHEMA``."""
    rows = iter(images)
    while chunk := list(islice(rows, BATCH_ROWS)):
        columns = zip(*chunk, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, LISTING_SCHEMA, strict=True)]
        yield pa.record_batch(arrays, schema=LISTING_SCHEMA)


def rebatch(batches: Iterable[pa.RecordBatch], num_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """Yield the same rows in batches of ``num_rows``; only the last one may have fewer."""
    waiting: list[pa.RecordBatch] = []
    num_waiting = 0
    for batch in batches:
        waiting.append(batch)
        num_waiting += batch.num_rows
        if num_waiting >= num_rows:
            whole = pa.concat_batches(waiting)
            num_whole = num_waiting - num_waiting % num_rows
            yield from (whole.slice(start, num_rows) for start in range(0, num_whole, num_rows))
            waiting, num_waiting = [whole.slice(num_whole)], num_waiting - num_whole
    if num_waiting:
        yield pa.concat_batches(waiting)

"""CPU stage: writes the rows of a fragment as one Parquet file, atomically."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq

from segray.data.images import encode_mask_png
from segray.results.counts import COUNTS_SCHEMA, count_rows_of_fragment
from segray.runs.fragment_metadata import build_fragment_metadata
from segray.runs.plan import get_fragment_uri
from segray.runtime.failures import named_failure
from segray.schema import IMAGES_SCHEMA
from segray.segmentation.job import PipelineJob
from segray.segmentation.profile import STEPS_TYPE, Step, Stopwatch
from segray.segmentation.stages.compression import decompress
from segray.storage import create_bytes, write_bytes

# Raw masks of a row group, so that reading a mask decompresses few others, and writing takes little memory. A larger
# mask has a row group of its own.
_MAX_GROUP_BYTES = 64 * 2**20
_DICTIONARY_COLUMNS = ["status", "error_kind", "mask_encoding"]
# is_stored: whether the file holds the rows that were counted; false if another process had written it before.
WRITTEN_SCHEMA = pa.schema([*COUNTS_SCHEMA, ("is_stored", pa.bool_()), ("steps", STEPS_TYPE)])


class FragmentWriter:
    """Writes rows of ``PREDICTED_SCHEMA`` to files, and maps them to rows of ``WRITTEN_SCHEMA``.

    Args:
        job: What the stages share.
        replaced: Fragments whose existing file is to be overwritten.
    """

    def __init__(self, job: PipelineJob, replaced: frozenset[int]) -> None:
        self._job = job
        self._replaced = replaced
        metadata = build_fragment_metadata(job.classes, job.bundle_sha256, job.settings.bit_settings)
        self._schema = IMAGES_SCHEMA.with_metadata(metadata)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write one fragment. Repeating this, on any worker, produces the same bytes and changes nothing.

        Raises:
            StorageError: The store refused the request or failed; the file is then complete or absent.
            ClusterError: An unexpected exception was raised.
        """
        predicted = batch.to_batches()[0]
        fragment = predicted["fragment"][0].as_py()
        watch = Stopwatch()
        with named_failure(f"writing fragment {fragment} to {get_fragment_uri(self._job.output_uri, fragment)}"):
            table = pa.table(predicted["rows"].flatten().flatten(), schema=IMAGES_SCHEMA)
            with watch.measure(Step.ENCODE):
                content = self._encode(table)
            with watch.measure(Step.WRITE):
                is_stored = self._store(fragment, content)
            written = {
                **count_rows_of_fragment(fragment, table, self._job.classes.num_classes),
                "size_bytes": content.getbuffer().nbytes,
                "is_stored": is_stored,
                "steps": predicted["steps"][0].as_py() + watch.to_rows(),
            }
            return pa.Table.from_pylist([written], WRITTEN_SCHEMA)

    def _store(self, fragment: int, content: io.BytesIO) -> bool:
        """Write the file, and return False if another process had written it before."""
        uri = get_fragment_uri(self._job.output_uri, fragment)
        if fragment in self._replaced:
            write_bytes(uri, content.getbuffer())
            return True
        # An existing file is kept, so that a fragment does not change even if its images have changed meanwhile.
        return create_bytes(uri, content.getvalue())

    def _encode(self, table: pa.Table) -> io.BytesIO:
        """Return rows with compressed masks as a Parquet file; the raw masks of one row group are in memory at a time.

        A page ends as soon as it has a MiB. By default it has 1024 rows, which can exceed its limit of 2 GiB.
        """
        buffer = io.BytesIO()
        # Masks do not repeat, so a dictionary would only cost time and space.
        with pq.ParquetWriter(
            buffer,
            self._schema,
            compression="zstd",
            use_dictionary=_DICTIONARY_COLUMNS,
            write_page_checksum=True,
            write_batch_size=1,
        ) as writer:
            for group in self._iterate_groups(table):
                writer.write_table(self._restore_masks(group), row_group_size=len(group))
        return buffer

    def _iterate_groups(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield the rows of each row group."""
        start, group_bytes = 0, 0
        for stop, num_bytes in enumerate(self._count_mask_bytes(table)):
            if stop > start and group_bytes + num_bytes > _MAX_GROUP_BYTES:
                yield table[start:stop]
                start, group_bytes = stop, 0
            group_bytes += num_bytes
        yield table[start:]

    def _count_mask_bytes(self, table: pa.Table) -> list[int]:
        """Return the size of each row's raw mask; 0 without a mask."""
        item_bytes = np.dtype(self._job.classes.mask_dtype).itemsize
        sizes = zip(*(table[name].to_pylist() for name in ("status", "height", "width")), strict=True)
        return [height * width * item_bytes if status == "ok" else 0 for status, height, width in sizes]

    def _restore_masks(self, table: pa.Table) -> pa.Table:
        """Return rows with their masks in the encoding in which they are stored."""
        is_png = self._job.settings.mask_encoding == "png"
        masks: list[bytes | None] = []
        for row in zip(table["mask"], self._count_mask_bytes(table), table["height"], table["width"], strict=True):
            compressed, num_bytes, height, width = row
            mask = decompress(compressed.as_buffer(), num_bytes) if compressed.is_valid else None
            masks.append(self._encode_png(mask, height.as_py(), width.as_py()) if mask and is_png else mask)
        columns: dict[str, list[Any]] = {"mask": masks}
        if is_png:
            columns["mask_encoding"] = [None if mask is None else "png" for mask in masks]
        for name, values in columns.items():
            field = IMAGES_SCHEMA.field(name)
            table = table.set_column(IMAGES_SCHEMA.get_field_index(name), field, pa.array(values, field.type))
        return table

    def _encode_png(self, mask: bytes, height: int, width: int) -> bytes:
        classes = self._job.classes
        return encode_mask_png(np.frombuffer(mask, classes.mask_dtype).reshape(height, width), classes.num_classes)

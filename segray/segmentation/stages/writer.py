"""CPU stage: writes the rows of a fragment as one Parquet file, atomically."""

import io

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq

from segray.data.images import encode_mask_png
from segray.runs.plan import get_fragment_uri
from segray.schema import IMAGES_SCHEMA
from segray.segmentation.job import PipelineJob
from segray.segmentation.profile import STEPS_TYPE, Step, Stopwatch
from segray.storage import create_bytes, write_bytes

_DICTIONARY_COLUMNS = ["status", "error_kind", "mask_encoding"]
WRITTEN_SCHEMA = pa.schema(
    [("fragment", pa.int64()), ("num_ok", pa.int64()), ("num_errors", pa.int64()), ("steps", STEPS_TYPE)]
)


class FragmentWriter:
    """Writes rows of ``PREDICTED_SCHEMA`` to files, and maps them to rows of ``WRITTEN_SCHEMA``.

    Args:
        job: What the stages share.
        replaced: Fragments whose existing file is to be overwritten.
    """

    def __init__(self, job: PipelineJob, replaced: frozenset[int]) -> None:
        self._job = job
        self._replaced = replaced

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write one fragment. Repeating this, on any worker, produces the same bytes and changes nothing.

        Raises:
            StorageError: The store refused the request or failed; the file is then complete or absent.
        """
        predicted = batch.to_batches()[0]
        fragment = predicted["fragment"][0].as_py()
        watch = Stopwatch()
        with watch.measure(Step.ENCODE):
            table = pa.table(predicted["rows"].flatten().flatten(), schema=IMAGES_SCHEMA)
            if self._job.settings.mask_encoding == "png":
                table = self._encode_masks(table)
            buffer = io.BytesIO()
            # Masks do not repeat, so a dictionary would only cost time and space.
            pq.write_table(
                table, buffer, compression="zstd", use_dictionary=_DICTIONARY_COLUMNS, write_page_checksum=True
            )
        with watch.measure(Step.WRITE):
            self._store(fragment, buffer)
        num_errors = table["error_kind"].length() - table["error_kind"].null_count
        written = {
            "fragment": fragment,
            "num_ok": len(table) - num_errors,
            "num_errors": num_errors,
            "steps": predicted["steps"][0].as_py() + watch.to_rows(),
        }
        return pa.Table.from_pylist([written], WRITTEN_SCHEMA)

    def _store(self, fragment: int, content: io.BytesIO) -> None:
        uri = get_fragment_uri(self._job.output_uri, fragment)
        if fragment in self._replaced:
            write_bytes(uri, content.getbuffer())
        else:  # An existing file is kept, so that a fragment does not change even if its images have changed meanwhile.
            create_bytes(uri, content.getvalue())

    def _encode_masks(self, table: pa.Table) -> pa.Table:
        columns = ("mask", "height", "width")
        masks = [
            None if mask is None else self._encode_mask(mask, height, width)
            for mask, height, width in zip(*(table[name].to_pylist() for name in columns), strict=True)
        ]
        encodings = [None if mask is None else "png" for mask in masks]
        for name, values in (("mask", masks), ("mask_encoding", encodings)):
            field = IMAGES_SCHEMA.field(name)
            table = table.set_column(IMAGES_SCHEMA.get_field_index(name), field, pa.array(values, field.type))
        return table

    def _encode_mask(self, mask: bytes, height: int, width: int) -> bytes:
        classes = self._job.classes
        return encode_mask_png(np.frombuffer(mask, classes.mask_dtype).reshape(height, width), classes.num_classes)

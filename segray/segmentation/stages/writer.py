"""CPU stage: finished rows to one Parquet file, which appears whole or not at all."""

import io

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq

from segray.data.classes import ClassMap
from segray.data.images import encode_mask_png
from segray.runs.plan import get_fragment_uri
from segray.schema import IMAGES_SCHEMA
from segray.segmentation.profile import STEPS_TYPE, Step, Stopwatch
from segray.storage import create_bytes, write_bytes

_REPEATED = ["status", "error_kind", "mask_encoding"]
WRITTEN_SCHEMA = pa.schema(
    [("fragment", pa.int64()), ("num_ok", pa.int64()), ("num_errors", pa.int64()), ("steps", STEPS_TYPE)]
)


class FragmentWriter:
    """Writes rows of ``PREDICTED_SCHEMA``, and maps them to rows of ``WRITTEN_SCHEMA``."""

    def __init__(self, output_uri: str, classes: ClassMap, mask_encoding: str, replaced: frozenset[int]) -> None:
        """``replaced`` are the fragments that are there, and are to be made again."""
        self._output_uri = output_uri
        self._classes = classes
        self._mask_encoding = mask_encoding
        self._replaced = replaced

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write one fragment. Making it again, here or elsewhere, gives the same bytes, and changes nothing.

        Raises:
            StorageError: The store refused or failed; the file is there whole, or not at all.
        """
        predicted = batch.to_batches()[0]
        fragment = predicted["fragment"][0].as_py()
        watch = Stopwatch()
        with watch.measure(Step.ENCODE):
            table = pa.table(predicted["rows"].flatten().flatten(), schema=IMAGES_SCHEMA)
            if self._mask_encoding == "png":
                table = self._encode_masks(table)
            buffer = io.BytesIO()
            # masks do not repeat: a dictionary of them would only cost
            pq.write_table(table, buffer, compression="zstd", use_dictionary=_REPEATED, write_page_checksum=True)
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
        uri = get_fragment_uri(self._output_uri, fragment)
        if fragment in self._replaced:
            write_bytes(uri, content.getbuffer())
        else:  # whoever comes second leaves what is there: should the world have changed, one state of it is told
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
        indices = np.frombuffer(mask, self._classes.mask_dtype).reshape(height, width)
        return encode_mask_png(indices, self._classes.num_classes)

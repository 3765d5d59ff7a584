"""Parquet files with page checksums: some columns without reading the others, or all of it by one request."""

import io
from collections.abc import Sequence

import pyarrow as pa
from pyarrow import parquet as pq

from segray.errors import StorageError, flatten_message
from segray.storage.files import open_for_reading, read_bytes

_NUM_ATTEMPTS = 3


def read_columns(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns of a file that was written with page checksums; None reads all.

    Parts of an object have no checksum of their own, so a byte flipped on the way shows only here: it is read again.

    Raises:
        MissingFileError: Nothing is there.
        StorageError: It is no Parquet file with these columns, or the store refused or failed.
    """
    for attempt in range(1, _NUM_ATTEMPTS + 1):
        try:
            with io.BytesIO(read_bytes(uri)) if columns is None else open_for_reading(uri) as file:
                return pq.ParquetFile(file, page_checksum_verification=True).read(columns=columns)
        except (pa.ArrowException, OSError) as error:
            if attempt == _NUM_ATTEMPTS:
                raise StorageError(
                    f"{uri}: damaged, or not a Parquet file of segray: {flatten_message(error)}; if it is so in the "
                    "store too, remove it, and the same call makes it again"
                ) from error
    raise AssertionError("unreachable")

"""Read Parquet files with page checksums: selected columns only, or the whole file in one request."""

import io
from collections.abc import Sequence

import pyarrow as pa
from pyarrow import parquet as pq

from segray.errors import StorageError, flatten_message
from segray.storage.files import open_for_reading, read_bytes

_NUM_ATTEMPTS = 3


def read_columns(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns of a Parquet file that was written with page checksums.

    Range requests have no checksum of their own, so corruption in transit is detected only by the page checksums.
    The file is then read again, up to 3 times in all.

    Args:
        uri: The file.
        columns: Columns to read; None reads all of them with a single request.

    Raises:
        MissingFileError: The file does not exist.
        StorageError: It is not a Parquet file with these columns, or the store refused or failed.
    """
    for attempt in range(1, _NUM_ATTEMPTS + 1):
        try:
            with io.BytesIO(read_bytes(uri)) if columns is None else open_for_reading(uri) as file:
                parquet = pq.ParquetFile(file, page_checksum_verification=True)
                if missing := set(columns or ()) - set(parquet.schema_arrow.names):  # pyarrow ignores unknown names.
                    raise pa.ArrowInvalid(f"no column {', '.join(sorted(missing))}")
                return parquet.read(columns=columns)
        except (pa.ArrowException, OSError) as error:
            if attempt == _NUM_ATTEMPTS:
                raise StorageError(
                    f"{uri}: damaged, or not a Parquet file of segray: {flatten_message(error)}; if the stored file is "
                    "damaged, remove it and rerun the same command to write it again"
                ) from error
    raise AssertionError("unreachable")

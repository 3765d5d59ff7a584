"""Read Parquet files with page checksums: columns, row groups, or the whole file in one request.

Range requests have no checksum of their own, so corruption in transit is detected only by the page checksums. What was
read is then read again, up to 3 times in all.
"""

import io
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import parquet as pq

from segray.errors import StorageError, flatten_message
from segray.storage.files import open_for_reading, read_bytes

ResultT = TypeVar("ResultT")

_NUM_ATTEMPTS = 3


def read_columns(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns of a Parquet file that was written with page checksums.

    Args:
        uri: The file.
        columns: Columns to read; None reads all of them with a single request.

    Raises:
        MissingFileError: The file does not exist.
        StorageError: It is not a Parquet file with these columns, or the store refused or failed.
    """

    def read() -> pa.Table:
        with io.BytesIO(read_bytes(uri)) if columns is None else open_for_reading(uri) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            if missing := set(columns or ()) - set(parquet.schema_arrow.names):  # pyarrow ignores unknown names.
                raise pa.ArrowInvalid(f"no column {', '.join(sorted(missing))}")
            return parquet.read(columns=columns)

    return _read_again_if_damaged(uri, read)


class ParquetReader:
    """A Parquet file that was written with page checksums, of which single row groups are read.

    Attributes:
        num_row_groups: Number of row groups.
    """

    def __init__(self, uri: str) -> None:
        """Read the footer of a file.

        Raises:
            MissingFileError: The file does not exist.
            StorageError: It is not a Parquet file, or the store refused or failed.
        """
        self._uri = uri
        self._file = open_for_reading(uri)
        self._footer = _read_again_if_damaged(uri, lambda: pq.read_metadata(self._file))
        self.num_row_groups: int = self._footer.num_row_groups

    def get_spans(self, column: str) -> list[tuple[int, int]]:
        """Return the smallest and the largest value of an integer column without nulls, for each row group."""
        index = self._footer.schema.names.index(column)
        groups = [self._footer.row_group(number).column(index).statistics for number in range(self.num_row_groups)]
        return [(statistics.min, statistics.max) for statistics in groups]

    def read_row_groups(self, numbers: Sequence[int]) -> pa.Table:
        """Read row groups with all columns, each with a single request.

        Raises:
            StorageError: The file is damaged, or the store refused or failed.
        """

        def read() -> pa.Table:
            options = {"metadata": self._footer, "pre_buffer": True, "page_checksum_verification": True}
            return pq.ParquetFile(self._file, **options).read_row_groups(list(numbers))

        return _read_again_if_damaged(self._uri, read)

    def read_row(self, index: int) -> dict[str, Any]:
        """Return one row with all columns; only its row group is read.

        Args:
            index: Number of the row in the file.

        Raises:
            StorageError: The file is damaged, or the store refused or failed.
        """
        sizes = [self._footer.row_group(number).num_rows for number in range(self.num_row_groups)]
        ends = list(accumulate(sizes))
        number = bisect_right(ends, index)
        row: dict[str, Any] = (
            self.read_row_groups([number]).slice(index - ends[number] + sizes[number], 1).to_pylist()[0]
        )
        return row


def _read_again_if_damaged(uri: str, read: Callable[[], ResultT]) -> ResultT:
    for attempt in range(1, _NUM_ATTEMPTS + 1):
        try:
            return read()
        except (pa.ArrowException, OSError) as error:
            if attempt == _NUM_ATTEMPTS:
                raise StorageError(
                    f"{uri}: damaged, or not a Parquet file of segray: {flatten_message(error)}; if the stored file is "
                    "damaged, remove it and rerun the same command to write it again"
                ) from error
    raise AssertionError("unreachable")

"""Read Parquet and CSV tables, and lines of text, from files of any size, in bounded memory."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
from pyarrow import csv
from pyarrow import parquet as pq

from segray.errors import ChangedFileError, DataError, flatten_message
from segray.storage import find_file, open_for_reading, read_bytes

_READ_BYTES = 2**24  # Bytes per request, where a file is read piece by piece.
_WHOLE_FILE_BYTES = 2**26  # Up to this size a file is read with one request, whose content is checked.
_MAX_LINE_BYTES = 2**20
_BATCH_ROWS = 2**16


@contextmanager
def _open_unchanged(uri: str) -> Iterator[Any]:
    """Open a binary file of any size for reading, and check at the end that it was not replaced while it was read."""
    found = find_file(uri)
    if found is None or found.size_bytes <= _WHOLE_FILE_BYTES:
        yield io.BytesIO(read_bytes(uri))
        return
    yield open_for_reading(uri)
    if find_file(uri) != found:
        raise ChangedFileError(f"{uri} has changed while it was read; rerun the same command once it is complete")


def read_whole_lines(uri: str) -> Iterator[bytes]:
    """Yield the content of a text file in pieces that end with a whole line; the last line may lack its line end.

    Raises:
        DataError: A line is longer than 1 MiB.
        MissingFileError: The file does not exist.
        ChangedFileError: The file was replaced while it was read.
        StorageError: The store refused the request or failed.
    """
    rest = b""
    with _open_unchanged(uri) as file:
        while block := file.read(_READ_BYTES):
            whole, line_end, tail = block.rpartition(b"\n")
            if line_end:
                yield rest + whole + line_end
            rest = tail if line_end else rest + tail
            if len(rest) > _MAX_LINE_BYTES:
                raise DataError(f"{uri}: expected a text file, got a line of more than {_MAX_LINE_BYTES:,} bytes")
    if rest:
        yield rest


@dataclass(frozen=True)
class TableFile:
    """A Parquet or CSV file with a header.

    Attributes:
        uri: The file.
        column_names: Names of its columns, in order.
    """

    uri: str
    column_names: list[str]

    def read(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of some columns, in the order of the file.

        The columns of a CSV file are strings, those of a Parquet file have their own types.

        Raises:
            DataError: The file is damaged, or has a column more than once.
            StorageError: The file cannot be read, or was replaced while it was read.
        """
        if twice := [name for name in columns if self.column_names.count(name) > 1]:
            raise DataError(f"{self.uri}: cannot be read as a table, because column {twice[0]} occurs twice")
        try:
            yield from _read_parquet(self.uri, columns) if _is_parquet(self.uri) else self._read_csv(columns)
        except (pa.ArrowException, OSError) as error:  # OSError: damaged Parquet.
            raise _build_damaged_error(self.uri, error) from error

    def _read_csv(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Parse the file in pieces of whole rows.

        ``pyarrow.csv.open_csv`` reads ahead in a thread, which crashed the process in 3 of 50 runs in which the reader
        was not used up.
        """
        pieces = read_whole_lines(self.uri)
        _, _, rest = next(pieces, b"").partition(b"\n")  # The first line is the header.
        number = 0
        for text in chain([rest], pieces):
            if text.strip():
                rows = _parse_csv(text, self.column_names, columns, number)
                number += rows.num_rows
                yield from rows.to_batches()


def _is_parquet(uri: str) -> bool:
    return uri.lower().endswith((".parquet", ".pq"))


def _read_parquet(uri: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    # With buffer_size, a row group is decoded page by page, however large it is. pre_buffer would keep everything that
    # was read in memory until the end.
    options = {"buffer_size": _READ_BYTES, "pre_buffer": False, "page_checksum_verification": True}
    with _open_unchanged(uri) as file:
        parquet = pq.ParquetFile(file, **options)
        yield from parquet.iter_batches(_BATCH_ROWS, columns=list(columns), use_threads=False)


def _parse_csv(text: bytes, names: Sequence[str], columns: Sequence[str], num_before: int) -> pa.Table:
    """Return columns of rows without a header as strings; ``num_before`` rows precede them in the file."""
    bad_rows: list[csv.InvalidRow] = []

    def handle(row: csv.InvalidRow) -> str:
        bad_rows.append(row)
        return "skip"

    rows = csv.read_csv(
        pa.BufferReader(text),
        csv.ReadOptions(use_threads=False, column_names=names),
        csv.ParseOptions(invalid_row_handler=handle),
        csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), include_columns=columns),
    )
    if bad_rows:
        number, row = num_before + bad_rows[0].number, bad_rows[0]
        raise pa.ArrowInvalid(f"row {number} has {row.actual_columns} values, but there are {len(names)} columns")
    return rows


def open_table_file(uri: str) -> TableFile:
    """Read the column names of a Parquet or CSV file.

    Raises:
        DataError: The file is not Parquet or CSV.
        StorageError: The file cannot be read.
    """
    try:
        if _is_parquet(uri):
            with _open_unchanged(uri) as file:
                return TableFile(uri, list(pq.read_schema(file).names))
        header, _, _ = next(read_whole_lines(uri), b"").partition(b"\n")
        return TableFile(uri, csv.read_csv(pa.BufferReader(header + b"\n")).column_names)
    except (pa.ArrowException, OSError) as error:
        raise _build_damaged_error(uri, error) from error


def _build_damaged_error(uri: str, error: Exception) -> DataError:
    return DataError(f"{uri}: expected Parquet or CSV with a header: {flatten_message(error)}")

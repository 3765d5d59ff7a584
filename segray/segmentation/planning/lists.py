"""Reads text lists and manifests of any size as batches of a listing, in the order of their rows."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from segray.data.table_files import TableFile, read_whole_lines
from segray.data.uri_columns import normalize_uris
from segray.errors import DataError, flatten_message
from segray.runs.listing import LISTING_SCHEMA

_BYTE_ORDER_MARK = "\ufeff"
_NULLS = pa.array(["", "NA", "N/A", "NaN", "nan", "NULL", "null", "None"], pa.large_string())


def read_text_list(uri: str) -> Iterator[pa.RecordBatch]:
    """Yield the images of a file with one URI per line as batches of ``LISTING_SCHEMA``; blank lines are skipped.

    Only the line end is stripped, because keys may start and end with spaces.

    Raises:
        DataError: The file is not UTF-8, or a line is longer than 1 MiB.
        StorageError: The file cannot be read, or was replaced while it was read.
    """
    number = 1
    for piece in read_whole_lines(uri):
        text = _decode(piece.removesuffix(b"\n"), uri)
        lines = (text.removeprefix(_BYTE_ORDER_MARK) if number == 1 else text).split("\n")
        uris = pa.array((line.removesuffix("\r") for line in lines) if "\r" in text else lines, pa.large_string())
        is_blank = pc.equal(pc.utf8_trim_whitespace(uris), "")
        numbers = np.arange(number, number + len(lines))
        if pc.any(is_blank).as_py():
            uris, numbers = uris.filter(pc.invert(is_blank)), numbers[~is_blank.to_numpy(zero_copy_only=False)]
        yield _build_batch({"uri": _normalize(uris, numbers, uri)})
        number += len(lines)


def _decode(content: bytes, uri: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{uri}: expected UTF-8 text with one image URI per line, got {content[error.start : error.end]!r} "
            f"({error.reason}); save the list as UTF-8"
        ) from error


def read_manifest(table: TableFile, uri_column: str, split: str | None) -> Iterator[pa.RecordBatch]:
    """Yield the images of a manifest as batches of ``LISTING_SCHEMA``.

    Args:
        table: The file.
        uri_column: Its column with the images' URIs. ``mask_uri``, ``size_bytes`` and ``etag`` are used if present.
        split: Yield only the rows whose column ``split`` has this value; None yields all.

    Raises:
        DataError: The file is damaged, a row has no URI, or a column has another type.
        StorageError: The file cannot be read, or was replaced while it was read.
    """
    others = [name for name in _CONVERSIONS if name in table.column_names]
    columns = [uri_column, *others, *([] if split is None else ["split"])]
    number = 1
    for batch in table.read(columns):
        numbers = np.arange(number, number + batch.num_rows)
        number += batch.num_rows
        if split is not None:
            is_wanted = pc.equal(_to_strings(batch["split"], table.uri, "split"), split).fill_null(False)
            batch, numbers = batch.filter(is_wanted), numbers[is_wanted.to_numpy(zero_copy_only=False)]
        arrays = {"uri": _normalize(_to_strings(batch[uri_column], table.uri, uri_column), numbers, table.uri)}
        for name in others:
            arrays[name] = _CONVERSIONS[name](batch[name], numbers, table.uri)
        yield _build_batch(arrays)


def _build_batch(arrays: dict[str, pa.Array]) -> pa.RecordBatch:
    num_rows = len(arrays["uri"])
    columns = [
        arrays[field.name] if field.name in arrays else pa.nulls(num_rows, field.type) for field in LISTING_SCHEMA
    ]
    return pa.record_batch(columns, schema=LISTING_SCHEMA)


def _to_strings(column: pa.Array, where: str, name: str) -> pa.LargeStringArray:
    try:
        return column.cast(pa.large_string())
    except pa.ArrowException as error:
        raise DataError(f"{where}: column {name}: {flatten_message(error)}") from error


def _convert_mask_uris(column: pa.Array, numbers: np.ndarray[Any, Any], where: str) -> pa.Array:
    return normalize_uris(_empty_to_null(_to_strings(column, where, "mask_uri")), numbers, where)


def _convert_etags(column: pa.Array, numbers: np.ndarray[Any, Any], where: str) -> pa.Array:
    # HTTP writes entity tags in quotes.
    return _empty_to_null(pc.utf8_trim(_to_strings(column, where, "etag"), '"'))


def _convert_sizes(column: pa.Array, numbers: np.ndarray[Any, Any], where: str) -> pa.Array:
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            values = column.cast(pa.large_string())
            values = pc.if_else(pc.is_in(values, value_set=_NULLS), pa.scalar(None, values.type), values)
            column = values.cast(pa.float64())  # pandas writes integers as 20.0 if some are missing.
        return column.cast(pa.int64())
    except pa.ArrowException as error:
        raise DataError(f"{where}: column size_bytes: {flatten_message(error)}") from error


_CONVERSIONS: dict[str, Callable[[pa.Array, np.ndarray[Any, Any], str], pa.Array]] = {
    "mask_uri": _convert_mask_uris,
    "size_bytes": _convert_sizes,
    "etag": _convert_etags,
}


def _empty_to_null(column: pa.LargeStringArray) -> pa.LargeStringArray:
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)


def _normalize(uris: pa.LargeStringArray, numbers: np.ndarray[Any, Any], where: str) -> pa.LargeStringArray:
    """Return image URIs as ``normalize_uri`` spells them; ``numbers`` are the numbers of their rows."""
    is_missing = pc.equal(uris, "").fill_null(True)
    if pc.any(is_missing).as_py():
        row = numbers[pc.index(is_missing, True).as_py()]
        raise DataError(f"{where}: row {row} has no image URI; fill it in or remove the row")
    return normalize_uris(uris, numbers, where)

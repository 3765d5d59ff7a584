"""Keeps the counts of fragments in ``counts/*.parquet``, so that the rows need not be read again to count them.

The driver adds a file every few hundred fragments; each file has a name derived from its content. Saved counts are only
a cache: counts are used if the fragment's file still has the size that it had when it was counted. A fragment without
usable counts, because a driver was killed before it saved them, is counted from its file.
"""

import hashlib
import io
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet as pq

from segray.errors import MissingFileError
from segray.results.counts import (
    COUNTED_COLUMNS,
    COUNTS_SCHEMA,
    OUTCOME_COLUMNS,
    count_outcomes,
    count_rows_of_fragment,
)
from segray.runs.plan import get_fragment_uri
from segray.runs.written import WrittenFragment
from segray.storage import create_bytes, join_uri, list_names, read_columns, remove_file

_FILE_NAME = re.compile(r"counts-[0-9a-f]{16}\.parquet")
_NUM_READERS = 32  # A process has no more connections to a store.
_READ_AHEAD = 256  # maximum number of fragments whose columns are in memory at a time
_NUM_ATTEMPTS = 3
_FRAGMENTS_PER_FILE = 200
_SAVE_INTERVAL_S = 30
_FILES_PER_MERGE = 32

Written = Mapping[int, WrittenFragment]


def load_counts(output_uri: str, written: Written, num_classes: int) -> pa.Table:
    """Return the counts of fragments: saved ones, and for the others those of their rows.

    Args:
        output_uri: The run folder.
        written: The fragments, as ``list_written_fragments`` returns them.
        num_classes: Number of classes C.

    Returns:
        A table of ``COUNTS_SCHEMA``, one row per fragment, ascending.

    Raises:
        StorageError: A file is missing or damaged, or the store refused the request or failed.
    """

    def count(fragment: int, rows: pa.Table) -> dict[str, Any]:
        return count_rows_of_fragment(fragment, rows, num_classes)

    return _load(output_uri, written, COUNTS_SCHEMA, COUNTED_COLUMNS, count)


def load_outcomes(output_uri: str, written: Written) -> pa.Table:
    """Return the columns ``OUTCOME_COLUMNS`` of ``load_counts``, for which the number of classes is not needed."""
    schema = pa.schema([COUNTS_SCHEMA.field(name) for name in OUTCOME_COLUMNS])
    return _load(output_uri, written, schema, ["error_kind"], count_outcomes)


def _load(
    output_uri: str,
    written: Written,
    schema: pa.Schema,
    columns: list[str],
    count: Callable[[int, pa.Table], dict[str, Any]],
) -> pa.Table:
    saved = _select_usable(_read_saved(output_uri, schema), written)
    missing = sorted(written.keys() - set(saved["fragment"].to_pylist()))
    counted = (
        {**count(fragment, rows), "size_bytes": written[fragment].size_bytes}
        for fragment, rows in zip(missing, read_fragments(output_uri, missing, columns), strict=True)
    )
    tables = [saved]
    while group := list(islice(counted, _READ_AHEAD)):
        tables.append(pa.Table.from_pylist(group, schema))
    return pa.concat_tables(tables).sort_by("fragment") if missing else saved


def read_fragments(output_uri: str, fragments: Iterable[int], columns: list[str]) -> Iterator[pa.Table]:
    """Yield the given columns of each fragment, in order; several fragments are read at a time."""

    def read(fragment: int) -> pa.Table:
        return read_columns(get_fragment_uri(output_uri, fragment), columns)

    numbers = iter(fragments)
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        while group := list(islice(numbers, _READ_AHEAD)):
            yield from pool.map(read, group)


def _read_saved(output_uri: str, schema: pa.Schema) -> pa.Table:
    """Return the given columns of all files with counts; a fragment may occur several times."""
    for _ in range(_NUM_ATTEMPTS):
        names = _list_files(output_uri)
        try:
            with ThreadPoolExecutor(_NUM_READERS) as pool:
                tables = list(pool.map(lambda name: _read_file(output_uri, name, schema), names))
        except MissingFileError:  # A driver has just merged this file with others.
            continue
        return pa.concat_tables([schema.empty_table(), *tables])
    return schema.empty_table()


def _list_files(output_uri: str) -> list[str]:
    return sorted(name for name in list_names(join_uri(output_uri, "counts")) if _FILE_NAME.fullmatch(name))


def _read_file(output_uri: str, name: str, schema: pa.Schema) -> pa.Table:
    columns = None if schema.equals(COUNTS_SCHEMA) else schema.names  # None needs a single request.
    return read_columns(join_uri(output_uri, "counts", name), columns).select(schema.names).cast(schema)


def _select_usable(saved: pa.Table, written: Written) -> pa.Table:
    """Return each fragment's counts once, ascending, without those of files that were replaced or are unplanned."""
    fragments, sizes = saved["fragment"].to_pylist(), saved["size_bytes"].to_pylist()
    is_current = [
        fragment in written and written[fragment].size_bytes == size
        for fragment, size in zip(fragments, sizes, strict=True)
    ]
    saved = saved.filter(pa.array(is_current, pa.bool_())).sort_by("fragment")
    numbers = saved["fragment"].to_numpy()
    is_repeated = np.append(False, numbers[1:] == numbers[:-1]) if len(numbers) else np.zeros(0, bool)
    if not is_repeated.any():
        return saved
    repeated = pa.array(np.unique(numbers[is_repeated]))
    different = _find_different(saved.filter(pc.is_in(saved["fragment"], repeated)))
    return saved.filter(pa.array(~is_repeated & ~np.isin(numbers, different)))


def _find_different(counts: pa.Table) -> list[int]:
    """Return the fragments that have different counts, of which only the rows can tell which are right."""
    first: dict[int, dict[str, Any]] = {}
    return sorted({row["fragment"] for row in counts.to_pylist() if first.setdefault(row["fragment"], row) != row})


def save_counts(output_uri: str, counts: pa.Table) -> str:
    """Write counts to a file of their own, and return its name, which is derived from the content.

    Args:
        output_uri: The run folder.
        counts: A table of ``COUNTS_SCHEMA``.
    """
    buffer = io.BytesIO()
    pq.write_table(counts.sort_by("fragment"), buffer, compression="zstd", write_page_checksum=True)
    name = f"counts-{hashlib.sha256(buffer.getbuffer()).hexdigest()[:16]}.parquet"
    create_bytes(join_uri(output_uri, "counts", name), buffer.getvalue())
    return name


def compact_counts(output_uri: str, counts: pa.Table) -> None:
    """Replace all files with counts by a single one.

    A driver that is killed in between leaves counts twice, which does no harm.

    Args:
        output_uri: The run folder.
        counts: What ``load_counts`` returned for all fragments of the run.
    """
    names = set(_list_files(output_uri))
    kept = save_counts(output_uri, counts)
    _remove_files(output_uri, names - {kept})


def drop_counts(output_uri: str, fragments: Collection[int]) -> None:
    """Remove the saved counts of fragments that are about to be replaced."""
    names = _list_files(output_uri)
    if fragments and names:
        counts = _read_saved(output_uri, COUNTS_SCHEMA)
        kept = counts.filter(pc.invert(pc.is_in(counts["fragment"], pa.array(sorted(fragments), pa.int64()))))
        saved = {save_counts(output_uri, kept)} if len(kept) else set()
        _remove_files(output_uri, {*names} - saved)


def _remove_files(output_uri: str, names: Iterable[str]) -> None:
    for name in names:
        remove_file(join_uri(output_uri, "counts", name))


class CountsLog:
    """Saves counts while fragments are being written: every few hundred fragments, and every half minute.

    Args:
        output_uri: The run folder.
    """

    def __init__(self, output_uri: str) -> None:
        self._output_uri = output_uri
        self._waiting: list[Mapping[str, Any]] = []
        self._names: list[str] = []
        self._saved_s = time.monotonic()

    def add(self, counts: Mapping[str, Any]) -> None:
        """Add the counts of one fragment: the columns of ``COUNTS_SCHEMA``; others are ignored."""
        self._waiting.append(counts)
        if len(self._waiting) >= _FRAGMENTS_PER_FILE or time.monotonic() - self._saved_s >= _SAVE_INTERVAL_S:
            self.save()

    def save(self) -> None:
        """Save the counts that are not saved yet."""
        if self._waiting:
            self._names.append(save_counts(self._output_uri, pa.Table.from_pylist(self._waiting, COUNTS_SCHEMA)))
        self._waiting, self._saved_s = [], time.monotonic()
        if len(self._names) >= _FILES_PER_MERGE:
            self._merge()

    def _merge(self) -> None:
        """Replace the files of this driver by a single one, so that their number stays small in a long run."""
        tables = []
        for name in self._names:
            with suppress(MissingFileError):  # Another driver has compacted it.
                tables.append(_read_file(self._output_uri, name, COUNTS_SCHEMA))
        if tables:
            _remove_files(self._output_uri, {*self._names} - {save_counts(self._output_uri, pa.concat_tables(tables))})
        self._names = []

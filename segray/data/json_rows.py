"""Write rows of Arrow arrays as JSON, to hash them; ``json.dumps`` for each row takes several times as long."""

import json
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def format_rows(columns: list[pa.Array], before: str = "") -> memoryview:
    """Return each row as ``json.dumps`` writes the list of its values, one after the other, each after ``before``."""
    rows = _format_rows(columns, before)
    offsets = np.frombuffer(rows.buffers()[1], np.int64)[rows.offset : rows.offset + len(rows) + 1]
    return memoryview(rows.buffers()[2] or b"")[offsets[0] : offsets[-1]]


def _format_rows(columns: list[pa.Array], start: str) -> pa.LargeStringArray:
    parts: list[str | pa.Array] = [f"{start}["]
    for number, column in enumerate(columns):
        before = ", " if number else ""
        if column.null_count == len(column):
            parts += [f"{before}null"]
        elif pa.types.is_integer(column.type):
            parts += [before, column.cast(pa.large_string()).fill_null("null")]
        elif column.null_count or not _is_plain(column):
            values = [json.dumps(value) for value in column.to_pylist()]
            parts += [before, pa.array(values, pa.large_string())]
        else:
            parts += [f'{before}"', column, '"']
    parts.append("]")
    return pc.binary_join_element_wise(*_merge_constants(parts), pa.scalar("", pa.large_string()))


def _merge_constants(parts: Iterable[str | pa.Array]) -> Iterator[pa.Scalar | pa.Array]:
    constant = ""
    for part in parts:
        if isinstance(part, str):
            constant += part
        else:
            yield pa.scalar(constant, pa.large_string())
            yield part
            constant = ""
    yield pa.scalar(constant, pa.large_string())


def _is_plain(column: pa.LargeStringArray) -> bool:
    """Return whether JSON writes these strings without escapes: printable ASCII, no quotes, no backslashes."""
    offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
    text = np.frombuffer(column.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    if not len(text):
        return True
    is_escaped = (text == ord('"')).any() or (text == ord("\\")).any()
    return bool(text.min() >= ord(" ") and text.max() <= ord("~") and not is_escaped)

"""Rows written as JSON, compared with ``json.dumps``."""

import json

import pyarrow as pa
import pytest

from segray.data.json_rows import format_rows


@pytest.mark.parametrize("before", ["", ", "])
def test_only_the_rows_of_a_slice_are_written(before: str) -> None:
    rows = [(f"/é {number}", number if number % 3 else None, f'"{number}\\', None) for number in range(100)]
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), _TYPES, strict=True)]
    expected = "".join(before + json.dumps(row) for row in rows[13:63])
    assert bytes(format_rows([column.slice(13, 50) for column in columns], before)) == expected.encode()


_TYPES = (pa.large_string(), pa.int64(), pa.large_string(), pa.large_string())

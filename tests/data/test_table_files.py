"""Reading Parquet and CSV tables as batches of rows."""

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv
from pyarrow import parquet as pq

from segray.data import table_files
from segray.data.table_files import open_table_file
from segray.errors import ChangedFileError, DataError, MissingFileError

NUM_ROWS = 50_000


@pytest.fixture
def table() -> pa.Table:
    letters = np.random.default_rng(0).integers(97, 123, (NUM_ROWS, 100), np.uint8)  # does not compress well
    return pa.table({"uri": [bytes(row).decode() for row in letters], "n": range(NUM_ROWS), "other": ["x"] * NUM_ROWS})


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "_READ_BYTES", 2**16)
    monkeypatch.setattr(table_files, "_WHOLE_FILE_BYTES", 0)
    monkeypatch.setattr(table_files, "_BATCH_ROWS", 500)


@pytest.mark.parametrize("name", ["t.csv", "many.parquet", "one.PQ"])
@pytest.mark.usefixtures("small_reads")
def test_a_large_file_is_never_in_memory_as_a_whole(table: pa.Table, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("csv"):
        csv.write_csv(table, path)
    else:
        pq.write_table(table, path, row_group_size=NUM_ROWS if name.startswith("one") else 1000)
    file = open_table_file(str(path))
    assert file.column_names == ["uri", "n", "other"]
    num_rows, peak_bytes, allocated_bytes = 0, 0, pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        for batch in file.read(["uri"]):
            assert batch["uri"].to_pylist() == table["uri"].slice(num_rows, len(batch)).to_pylist()
            num_rows += len(batch)
            python_bytes = tracemalloc.get_traced_memory()[0]
            peak_bytes = max(peak_bytes, pa.total_allocated_bytes() - allocated_bytes + python_bytes)
    finally:
        tracemalloc.stop()
    assert num_rows == NUM_ROWS
    assert peak_bytes < path.stat().st_size / 2


def test_csv_columns_are_strings_and_others_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b,c\n007,1,x\n08,y,2\n")
    (batch,) = open_table_file(str(tmp_path / "t.csv")).read(["b", "a"])
    assert batch.to_pydict() == {"b": ["1", "y"], "a": ["007", "08"]}


@pytest.mark.parametrize("read_bytes", [1, 7, 30, 1000])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_csv_file_is_the_same_however_it_is_divided(
    tmp_path: Path, read_bytes: int, newline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_files, "_READ_BYTES", read_bytes)
    monkeypatch.setattr(table_files, "_WHOLE_FILE_BYTES", 0)
    lines = ['a,"b, or c",n', '"1, x",,y', "", '"""q""",ü,', "NA, z ,null", "", ""]
    (tmp_path / "t.csv").write_bytes(newline.join(lines).encode("utf-8-sig"))
    file = open_table_file(str(tmp_path / "t.csv"))
    assert file.column_names == ["a", "b, or c", "n"]
    rows = [row for batch in file.read(["n", "b, or c", "a"]) for row in batch.to_pylist()]
    assert [tuple(row.values()) for row in rows] == [("y", "", "1, x"), ("", "ü", '"q"'), ("null", " z ", "NA")]


@pytest.mark.usefixtures("small_reads")
def test_a_row_with_too_few_values_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n" + "1,2\n" * 100_000 + "3\n")
    with pytest.raises(DataError, match="row 100001 has 1 values, but there are 2 columns"):
        list(open_table_file(str(tmp_path / "t.csv")).read(["a"]))


@pytest.mark.usefixtures("small_reads")
def test_unusable_files_are_refused(table: pa.Table, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"none\.csv"):
        open_table_file(str(tmp_path / "none.csv"))
    (tmp_path / "empty.csv").touch()
    with pytest.raises(DataError, match=r"empty\.csv: expected Parquet or CSV with a header"):
        open_table_file(str(tmp_path / "empty.csv"))
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match="cannot be read as a table, because column a occurs twice"):
        list(open_table_file(str(tmp_path / "twice.csv")).read(["a"]))
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(DataError, match=r"ragged\.csv: expected .*row 2 has 1 values, but there are 2 columns"):
        list(open_table_file(str(tmp_path / "ragged.csv")).read(["a"]))
    path = tmp_path / "damaged.parquet"
    pq.write_table(table, path, row_group_size=1000, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = bytes(4000)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged\.parquet: expected Parquet"):
        list(open_table_file(str(path)).read(["uri"]))


@pytest.mark.usefixtures("small_reads")
def test_a_file_that_is_replaced_while_it_is_read_is_refused(table: pa.Table, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    csv.write_csv(table, path)
    batches = open_table_file(str(path)).read(["uri"])
    next(batches)
    csv.write_csv(table.slice(0, NUM_ROWS - 1), path)
    with pytest.raises((ChangedFileError, DataError)):
        list(batches)

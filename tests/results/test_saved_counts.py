"""Saved counts, whatever happens to drivers, give what the rows give; compared with an independent computation."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from segray.data.classes import ClassMap
from segray.errors import MissingFileError
from segray.results import saved_counts
from segray.results.counts import COUNTS_SCHEMA, OUTCOME_COLUMNS, count_rows_of_fragment
from segray.results.saved_counts import (
    CountsLog,
    compact_counts,
    drop_counts,
    load_counts,
    load_outcomes,
    save_counts,
)
from segray.results.summary import summarize_run
from segray.runs.plan import Plan
from segray.runs.written import list_written_fragments
from segray.schema import IMAGES_SCHEMA
from segray.storage import read_columns
from tests.results.rows import NUM_CLASSES, make_error_row, make_random_rows, save_fragment

NUM_FRAGMENTS = 40
CLASSES = ClassMap(("a", "b", "c"), (0, 1, 2))
PLAN = Plan("a" * 64, "b" * 64, 1, NUM_FRAGMENTS)


def count(fragment: int, rows: list[dict[str, Any]], size_bytes: int) -> dict[str, Any]:
    table = pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA)
    return {**count_rows_of_fragment(fragment, table, NUM_CLASSES), "size_bytes": size_bytes}


@pytest.fixture
def counts(tmp_path: Path) -> list[dict[str, Any]]:
    """The files of all fragments, and the counts that their writers return."""
    return [write(tmp_path, fragment) for fragment in range(NUM_FRAGMENTS)]


def write(output: Path, fragment: int, seed: int = 0) -> dict[str, Any]:
    rows = make_random_rows(fragment, seed)
    return count(fragment, rows, save_fragment(output, fragment, rows))


def load(output: Path) -> pa.Table:
    return load_counts(str(output), list_written_fragments(str(output)), NUM_CLASSES)


def count_from_rows(output: Path, monkeypatch: pytest.MonkeyPatch) -> pa.Table:
    """Return the counts without any saved ones."""
    with monkeypatch.context() as context:
        context.setattr(saved_counts, "_list_files", lambda _: [])
        return load(output)


def list_names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "counts").iterdir()) if (output / "counts").exists() else []


def list_read_fragments(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the numbers of fragments are added whose rows are read."""
    found: list[int] = []

    def record(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
        if "/images/part-" in uri:
            found.append(int(uri[-16:-8]))
        return read_columns(uri, columns)

    monkeypatch.setattr(saved_counts, "read_columns", record)
    return found


def test_the_summary_of_counts_equals_one_computed_row_by_row(tmp_path: Path, counts: list[dict[str, Any]]) -> None:
    save_counts(str(tmp_path), pa.Table.from_pylist(counts[:25], COUNTS_SCHEMA))
    run = summarize_run(str(tmp_path), PLAN, CLASSES)
    tables = [pq.read_table(path).to_pylist() for path in sorted((tmp_path / "images").iterdir())]
    rows = [row for table in tables for row in table]
    assert run.tally.num_ok == sum(row["status"] == "ok" for row in rows)
    assert run.tally.errors == Counter(row["error_kind"] for row in rows if row["error_kind"])
    for index, row in enumerate(run.summary.to_pylist()):
        for name in ("pixel_count", "tp_px", "fp_px", "fn_px"):
            assert row[name] == sum(one[name][index] for one in rows if one[name])
        assert row["image_count"] == sum(one["pixel_count"][index] > 0 for one in rows if one["pixel_count"])
        for name in ("iou", "dice"):
            scores = [[one[name][index] for one in table if one[name]] for table in tables]
            sums = [float(np.sum([0.0 if score is None else score for score in part], initial=0.0)) for part in scores]
            num_scores = sum(score is not None for part in scores for score in part)
            assert row[f"mean_image_{name}"] == math.fsum(sums) / num_scores  # exactly


def test_a_fragment_without_scores_has_null_scores() -> None:
    rows = [{"uri": "1", "status": "ok", "pixel_count": [4, 0, 5]}, make_error_row("2")]
    assert {name: value for name, value in count(7, rows, 99).items() if value is not None} == {
        "fragment": 7,
        "size_bytes": 99,
        "num_ok": 1,
        "errors": [{"kind": "truncated", "count": 1}],
        "image_count": [1, 0, 1],
        "pixel_count": [4, 0, 5],
    }


def test_only_fragments_without_saved_counts_are_read(
    tmp_path: Path, counts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = count_from_rows(tmp_path, monkeypatch)
    assert expected.to_pylist() == counts
    save_counts(str(tmp_path), pa.Table.from_pylist(counts[5:20][::-1], COUNTS_SCHEMA))
    save_counts(str(tmp_path), pa.Table.from_pylist(counts[20:38], COUNTS_SCHEMA))
    read = list_read_fragments(monkeypatch)
    assert load(tmp_path).equals(expected)
    assert sorted(read) == [0, 1, 2, 3, 4, 38, 39]
    assert load_outcomes(str(tmp_path), list_written_fragments(str(tmp_path))).equals(expected.select(OUTCOME_COLUMNS))


def test_counts_of_replaced_removed_and_unplanned_fragments_are_not_used(
    tmp_path: Path, counts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    unplanned = {**counts[0], "fragment": NUM_FRAGMENTS + 5}
    save_counts(str(tmp_path), pa.Table.from_pylist([*counts, unplanned], COUNTS_SCHEMA))
    write(tmp_path, 3, seed=1)
    (tmp_path / "images" / "part-00000004.parquet").unlink()
    loaded = load(tmp_path)
    assert loaded.equals(count_from_rows(tmp_path, monkeypatch))
    assert loaded["fragment"].to_pylist() == [number for number in range(NUM_FRAGMENTS) if number != 4]


def test_conflicting_counts_of_one_fragment_are_decided_by_its_rows(
    tmp_path: Path, counts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two drivers may both replace a fragment; the sizes of their files may be equal by chance."""
    wrong = {**counts[6], "num_ok": 1000}
    save_counts(str(tmp_path), pa.Table.from_pylist(counts, COUNTS_SCHEMA))
    save_counts(str(tmp_path), pa.Table.from_pylist([*counts[:3], wrong], COUNTS_SCHEMA))
    read = list_read_fragments(monkeypatch)
    assert load(tmp_path).to_pylist() == counts
    assert read == [6]


def test_a_log_saves_regularly_and_merges_its_files(
    tmp_path: Path, counts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_counts, "_FRAGMENTS_PER_FILE", 2)
    monkeypatch.setattr(saved_counts, "_FILES_PER_MERGE", 3)
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    log = CountsLog(str(tmp_path))
    num_files = []
    for row in counts[:7]:
        log.add({**row, "steps": []})
        num_files.append(len(list_names(tmp_path)))
    assert num_files == [0, 1, 1, 2, 2, 1, 1]
    clock[0] = 30.0
    log.add(counts[7])
    assert len(list_names(tmp_path)) == 2
    log.add(counts[8])
    log.save()
    log.save()
    assert len(list_names(tmp_path)) == 3
    read = list_read_fragments(monkeypatch)
    assert load(tmp_path).to_pylist() == counts
    assert sorted(read) == list(range(9, NUM_FRAGMENTS))


def test_counts_survive_two_drivers_and_kills(
    tmp_path: Path, counts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_counts, "_FRAGMENTS_PER_FILE", 3)
    monkeypatch.setattr(saved_counts, "_FILES_PER_MERGE", 2)
    rng = np.random.default_rng(0)
    for _ in range(5):
        logs = [CountsLog(str(tmp_path)) for _ in range(2)]
        for fragment in rng.permutation(NUM_FRAGMENTS)[: rng.integers(NUM_FRAGMENTS)]:
            for log in logs[: rng.integers(1, 3)]:
                log.add(counts[fragment])
        # Neither saves the rest: both were killed. One more was killed while it replaced the files by a single one.
        expected = count_from_rows(tmp_path, monkeypatch)
        assert load(tmp_path).equals(expected)
        save_counts(str(tmp_path), load(tmp_path))
        assert load(tmp_path).equals(expected)
        replaced = [int(number) for number in rng.choice(NUM_FRAGMENTS, 3, replace=False)]
        if rng.random() < 0.5:
            drop_counts(str(tmp_path), replaced)
        for fragment in replaced:
            counts[fragment] = write(tmp_path, fragment, seed=int(rng.integers(1000)))
        if rng.random() < 0.3:
            compact_counts(str(tmp_path), load(tmp_path))
            assert len(list_names(tmp_path)) == 1
    assert load(tmp_path).equals(count_from_rows(tmp_path, monkeypatch))


def test_compacting_the_same_counts_again_changes_nothing(tmp_path: Path, counts: list[dict[str, Any]]) -> None:
    for start in range(0, NUM_FRAGMENTS, 7):
        save_counts(str(tmp_path), pa.Table.from_pylist(counts[start : start + 7], COUNTS_SCHEMA))
    compact_counts(str(tmp_path), load(tmp_path))
    names = list_names(tmp_path)
    assert len(names) == 1
    written_ns = (tmp_path / "counts" / names[0]).stat().st_mtime_ns
    save_counts(str(tmp_path), pa.Table.from_pylist(counts[3:5], COUNTS_SCHEMA))
    compact_counts(str(tmp_path), load(tmp_path))
    assert list_names(tmp_path) == names
    assert (tmp_path / "counts" / names[0]).stat().st_mtime_ns == written_ns


def test_counts_of_replaced_fragments_are_dropped(tmp_path: Path, counts: list[dict[str, Any]]) -> None:
    drop_counts(str(tmp_path), [1])  # A folder without counts stays without.
    assert list_names(tmp_path) == []
    for start in range(0, NUM_FRAGMENTS, 10):
        save_counts(str(tmp_path), pa.Table.from_pylist(counts[start : start + 10], COUNTS_SCHEMA))
    before = list_names(tmp_path)
    drop_counts(str(tmp_path), [])
    assert list_names(tmp_path) == before
    drop_counts(str(tmp_path), [3, 17])
    kept = [pq.read_table(path)["fragment"].to_pylist() for path in (tmp_path / "counts").iterdir()]
    assert kept == [[number for number in range(NUM_FRAGMENTS) if number not in (3, 17)]]
    drop_counts(str(tmp_path), range(NUM_FRAGMENTS))
    assert list_names(tmp_path) == []


def test_files_that_another_driver_merges_meanwhile_are_listed_again(
    tmp_path: Path, counts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_counts(str(tmp_path), pa.Table.from_pylist(counts, COUNTS_SCHEMA))
    list_files, num_early = saved_counts._list_files, [2]

    def list_too_early(output_uri: str) -> list[str]:
        num_early[0] -= 1
        gone = ["counts-0123456789abcdef.parquet"] if num_early[0] >= 0 else []
        return [*list_files(output_uri), *gone]

    monkeypatch.setattr(saved_counts, "_list_files", list_too_early)
    read = list_read_fragments(monkeypatch)
    assert load(tmp_path).to_pylist() == counts
    assert read == []
    num_early[0] = 9  # If it never settles, the rows are read.
    assert load(tmp_path).to_pylist() == counts
    assert len(read) == NUM_FRAGMENTS


def test_a_missing_fragment_is_an_error(tmp_path: Path, counts: list[dict[str, Any]]) -> None:
    written = list_written_fragments(str(tmp_path))
    (tmp_path / "images" / "part-00000004.parquet").unlink()
    with pytest.raises(MissingFileError, match=r"part-00000004\.parquet"):
        load_counts(str(tmp_path), written, NUM_CLASSES)

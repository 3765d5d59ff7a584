"""The summary of hand-made rows, compared with scores computed by hand: absent classes, error rows, no ground truth."""

from pathlib import Path

import pytest

from segray.data.classes import ClassMap
from segray.errors import MissingFileError
from segray.results.counts import Tally, tally_counts
from segray.results.saved_counts import load_counts
from segray.results.summary import build_summary, find_error_rows, summarize_run
from segray.runs.plan import Plan
from segray.runs.written import list_written_fragments
from tests.results.rows import NUM_CLASSES, make_error_row, make_row, save_fragment

CLASSES = ClassMap(("a", "b", "c"), (0, 1, 2))


def tally_all(output: Path) -> Tally:
    return tally_counts(load_counts(str(output), list_written_fragments(str(output)), NUM_CLASSES), NUM_CLASSES)


def test_dataset_scores_pool_counts_and_undefined_scores_are_excluded(tmp_path: Path) -> None:
    error = {"uri": "x", "status": "error", "error_kind": "truncated", "error_message": "short"}
    save_fragment(tmp_path, 0, [make_row("1", [6, 0, 0], [0, 2, 0], [2, 0, 0]), error])
    save_fragment(tmp_path, 1, [error])
    save_fragment(tmp_path, 2, [make_row("2", [1, 3, 0], [4, 0, 0], [0, 4, 0])])
    tally = tally_all(tmp_path)
    assert (tally.num_ok, tally.errors) == (2, {"truncated": 2})
    a, b, c = build_summary(tally, CLASSES).to_pylist()
    assert (a["image_count"], a["pixel_count"], a["tp_px"], a["fp_px"], a["fn_px"]) == (2, 11, 7, 4, 2)
    assert (a["dataset_iou"], a["dataset_dice"]) == pytest.approx((7 / 13, 14 / 20), abs=1e-12)
    assert (a["precision"], a["recall"]) == pytest.approx((7 / 11, 7 / 9), abs=1e-12)
    assert (a["mean_image_iou"], a["mean_image_dice"]) == pytest.approx(((6 / 8 + 1 / 5) / 2, (12 / 14 + 2 / 6) / 2))
    assert (b["image_count"], b["pixel_count"]) == (2, 5)
    assert (b["mean_image_iou"], b["dataset_iou"]) == pytest.approx(((0 + 3 / 7) / 2, 3 / 9), abs=1e-12)
    assert (c["class_id"], c["class_name"], c["image_count"], c["pixel_count"]) == (2, "c", 0, 0)
    assert {c[name] for name in ("dataset_iou", "dataset_dice", "precision", "recall", "mean_image_iou")} == {None}


def test_without_ground_truth_pixels_are_counted_and_scores_are_null(tmp_path: Path) -> None:
    save_fragment(tmp_path, 0, [{"uri": "1", "status": "ok", "pixel_count": [4, 0, 5]}])
    tally = tally_all(tmp_path)
    rows = build_summary(tally, CLASSES).to_pylist()
    assert [row["image_count"] for row in rows] == [1, 0, 1]
    assert [row["pixel_count"] for row in rows] == [4, 0, 5]
    assert {row[name] for row in rows for name in ("tp_px", "fn_px", "dataset_iou", "mean_image_dice")} == {None}


def test_a_run_with_error_rows_only_has_a_summary(tmp_path: Path) -> None:
    save_fragment(tmp_path, 0, [{"uri": "x", "status": "error", "error_kind": "missing"}])
    rows = build_summary(tally_all(tmp_path), CLASSES).to_pylist()
    assert [(row["class_name"], row["image_count"], row["dataset_iou"]) for row in rows] == [
        ("a", 0, None),
        ("b", 0, None),
        ("c", 0, None),
    ]


def test_error_rows_are_found_by_fragment(tmp_path: Path) -> None:
    save_fragment(tmp_path, 0, [make_row("1", [1, 0, 0], [0, 0, 0], [0, 0, 0]), make_error_row("2")])
    save_fragment(tmp_path, 1, [make_row("3", [1, 0, 0], [0, 0, 0], [0, 0, 0])])
    save_fragment(tmp_path, 2, [make_error_row("4"), make_error_row("5", "missing")])
    assert find_error_rows(str(tmp_path), list_written_fragments(str(tmp_path))) == {0: ["2"], 2: ["4", "5"]}


def test_a_fragment_that_was_removed_meanwhile_is_named(tmp_path: Path) -> None:
    save_fragment(tmp_path, 0, [make_error_row("1")])
    with pytest.raises(MissingFileError, match=r"part-00000001\.parquet was removed during the run; .*rerun the same"):
        summarize_run(str(tmp_path), Plan("a" * 64, "b" * 64, 2, 2), CLASSES)

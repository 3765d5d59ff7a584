"""The report: every error row is counted, the first ones are listed, and only the masks of its pictures are read."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

from segray.data.classes import ClassMap
from segray.plots import Panel
from segray.results import report
from segray.results.report import build_report
from segray.results.summary import FinishedRun, summarize_run
from segray.runs.plan import Plan
from segray.schema import IMAGES_SCHEMA, PLAN_SCHEMA
from segray.storage import ParquetReader
from tests.results.rows import make_error_row, make_row, save_fragment

CLASSES = ClassMap(("a", "b", "c"), (0, 1, 2))


def summarize(output: Path, num_fragments: int) -> FinishedRun:
    return summarize_run(str(output), Plan("a" * 64, "b" * 64, 1, num_fragments), CLASSES)


def test_all_errors_are_counted_and_the_first_ones_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fragment in range(12):
        errors = [make_error_row(f"{fragment:02d}-0"), make_error_row(f"{fragment:02d}-1", "missing")]
        rows = [make_row("ok", [1] * 3, [0] * 3, [0] * 3), *(errors if fragment > 8 else [])]
        save_fragment(tmp_path, fragment, rows)
    run = summarize(tmp_path, 12)
    for fragment in range(9):  # Fragments without errors are not read.
        (tmp_path / "images" / f"part-{fragment:08d}.parquet").unlink()
    html = build_report(run, 0).decode()
    assert "12 images segmented, 6 error rows" in html
    assert "missing: 3, truncated: 3</p>" in html
    assert re.findall(r"<td>(\d\d-\d)</td>", html) == [f"{n:02d}-{m}" for n in (9, 10, 11) for m in (0, 1)]
    monkeypatch.setattr(report, "_MAX_ERRORS", 5)
    html = build_report(run, 0).decode()
    assert "missing: 3, truncated: 3. The first 5 of them are listed;" in html
    assert re.findall(r"<td>(\d\d-\d)</td>", html)[-1] == "11-0"


def test_a_picture_reads_only_the_row_group_of_its_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, planned = [], []
    for number in range(8):
        uri = tmp_path / f"{number}.png"
        Image.new("RGB", (4, 2 + number)).save(uri)
        size = {"height": 2 + number, "width": 4, "mask": bytes(4 * (2 + number)), "mask_encoding": "raw"}
        row = {**make_row(str(uri), [1] * 3, [0] * 3, [0] * 3), **size}
        rows.append(make_error_row(str(uri)) if number == 0 else row)
        planned.append({"uri": str(uri), "fragment": 0})
    path = tmp_path / "images" / "part-00000000.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, IMAGES_SCHEMA), path, row_group_size=2, write_page_checksum=True)
    monkeypatch.setattr(report, "load_fragment", lambda *_: pa.Table.from_pylist(planned, PLAN_SCHEMA))
    read: list[int] = []
    read_row_groups = ParquetReader.read_row_groups

    def record(reader: ParquetReader, numbers: Sequence[int]) -> pa.Table:
        read.extend(numbers)
        return read_row_groups(reader, numbers)

    monkeypatch.setattr(ParquetReader, "read_row_groups", record)
    drawn: list[Panel] = []

    def draw(panels: Sequence[Panel], classes: ClassMap) -> bytes:
        drawn.extend(panels)
        return b"picture"

    monkeypatch.setattr(report, "draw_comparison", draw)
    html = build_report(summarize(tmp_path, 1), 3).decode()
    assert html.count("data:image/png;base64,") == 3  # two plots and one comparison picture
    assert [panel.title for panel in drawn] == ["1.png", "3.png", "5.png"]
    assert [np.asarray(panel.mask).shape for panel in drawn] == [(3, 4), (5, 4), (7, 4)]
    assert read == [0, 1, 2]

"""Progress of a run that is complete, in progress, just started, or missing."""

import io
import os
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq
from rich.console import Console

from segray.config import SegmentSettings
from segray.errors import MissingFileError, RunMismatchError, StorageError
from segray.results.counts import COUNTS_SCHEMA
from segray.results.saved_counts import load_counts, save_counts
from segray.results.status import print_status, read_status
from segray.runs.plan import Plan
from segray.runs.run_file import RunFile, RunFingerprint
from segray.runs.written import list_written_fragments
from tests.results.rows import NUM_CLASSES, make_row, save_fragment

NUM_IMAGES = 10


def show(output: Path) -> str:
    printed = io.StringIO()
    print_status(read_status(str(output)), Console(file=printed, width=200))
    return printed.getvalue()


@pytest.fixture(params=[True, False], ids=["with counts", "without counts"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A complete run: fragments of 4, 4 and 2 images, written 10 s apart."""
    folder = tmp_path / "run"
    folder.mkdir()
    for fragment, size in enumerate((4, 4, 2)):
        save_fragment(folder, fragment, [make_row(f"{fragment}-{n}", [1] * 3, [0] * 3, [0] * 3) for n in range(size)])
        at = time.time() - 100 + 10 * fragment
        os.utime(folder / "images" / f"part-{fragment:08d}.parquet", (at, at))
    plan = Plan("a" * 64, "b" * 64, NUM_IMAGES, 3)
    record = RunFile.start(RunFingerprint(bundle_sha256="c" * 64, config={}), plan, {}, SegmentSettings())
    (folder / "run.json").write_bytes(record.complete(NUM_IMAGES, {}).format())
    if request.param:
        save_counts(str(folder), load_counts(str(folder), list_written_fragments(str(folder)), NUM_CLASSES))
    return folder


def test_a_complete_run(run: Path) -> None:
    status = read_status(str(run))
    assert (status.num_planned, status.num_done, status.num_remaining) == (NUM_IMAGES, NUM_IMAGES, 0)
    assert dict(status.rows) == {"ok": NUM_IMAGES}
    assert status.images_per_s == pytest.approx((4 + 2) / 20, rel=0.01)  # after the first fragment, in 20 s
    text = show(run)
    assert f"{run} (complete)" in text
    assert "10 images in 3 fragments" in text
    assert "10 images (100.0%) in 3 fragments" in text
    assert "last written" not in text


def test_a_run_in_progress(run: Path) -> None:
    (run / "images" / "part-00000000.parquet").unlink()
    (run / "images" / "part-99999999.parquet").write_bytes(b"not in the plan")
    path = run / "images" / "part-00000001.parquet"
    rows = pq.read_table(path).to_pylist()
    for row, kind in zip(rows, ("truncated", "truncated", "missing"), strict=False):
        row |= {"status": "error", "error_kind": kind}
    at = path.stat().st_mtime
    pq.write_table(pq.read_table(path).from_pylist(rows, schema=pq.read_schema(path)), path)
    os.utime(path, (at, at))
    (run / "run.json").write_text((run / "run.json").read_text().replace('"complete"', '"running"'))
    status = read_status(str(run))
    assert (status.num_done, status.num_remaining, status.num_fragments_done) == (6, 4, 2)
    assert dict(status.rows) == {"ok": 3, "truncated": 2, "missing": 1}
    assert status.images_per_s == pytest.approx(2 / 10, rel=0.01)
    text = show(run)
    assert "(not complete)" in text
    assert "6 images (60.0%) in 2 fragments" in text
    assert "3 (1 missing, 2 truncated)" in text
    assert "4 images" in text
    assert "80 s ago" in text
    assert "0.2 images/s, 0.3 min remaining at this rate" in text


def test_a_run_without_any_fragment(run: Path) -> None:
    shutil.rmtree(run / "images")
    status = read_status(str(run))
    assert (status.num_done, status.images_per_s, status.idle_s) == (0, None, None)
    assert "0 images (0.0%) in 0 fragments" in show(run)


def test_a_missing_or_invalid_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no run at .*: there is no run\.json; give the --output"):
        read_status(str(tmp_path / "none"))
    for content in ("{", "[]", '{"fingerprint": {}, "counts": {}}'):
        (run / "run.json").write_text(content)
        with pytest.raises(RunMismatchError, match=r"run\.json: not written by this version of segray"):
            read_status(str(run))


def test_a_damaged_fragment_is_named_with_the_remedy(run: Path) -> None:
    path = run / "images" / "part-00000001.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StorageError, match=r"part-00000001\.parquet: damaged, or not a Parquet file.*remove it"):
        read_status(str(run))


def test_rows_whose_counts_are_saved_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "part-00000001.parquet").write_bytes(bytes(7))
    record = RunFile.start(
        RunFingerprint(bundle_sha256="c" * 64, config={}), Plan("a" * 64, "b" * 64, 9, 3), {}, SegmentSettings()
    )
    (folder / "run.json").write_bytes(record.format())
    counts = {"fragment": 1, "size_bytes": 7, "num_ok": 2, "errors": [{"kind": "missing", "count": 1}]}
    save_counts(str(folder), pa.Table.from_pylist([counts], COUNTS_SCHEMA))
    status = read_status(str(folder))
    assert (status.num_done, status.num_fragments_done, dict(status.rows)) == (3, 1, {"ok": 2, "missing": 1})

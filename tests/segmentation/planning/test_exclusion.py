"""Leaving out the images that earlier runs have segmented, and binding a folder to the listing that remains."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq
from rich.console import Console

from segray.config import SegmentSettings
from segray.errors import ConfigError, DataError, MissingFileError, RunMismatchError, StorageError
from segray.runs.listing import ListedImage, tabulate
from segray.runs.plan import iterate_plan, spool_plan
from segray.runs.run_file import get_run_uri, read_run, write_if_changed
from segray.schema import IMAGES_SCHEMA
from segray.segmentation.job import SegmentJob
from segray.segmentation.planning import sorting
from segray.segmentation.planning.binding import BoundRun, bind_run
from segray.segmentation.planning.cut import FragmentLimits, cut_fragments
from segray.segmentation.planning.exclusion import leave_out, open_earlier_runs
from segray.segmentation.planning.freeze import open_inputs
from segray.segmentation.planning.inputs import merge_sources, open_sources

SHA256 = "c" * 64


class Bucket:
    """A folder of images, and runs over it whose rows are written without a model."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.printed = ""
        (root / "images").mkdir()

    def write(self, *names: str, content: str = "x") -> None:
        for name in names:
            (self.root / "images" / name).write_text(content)

    def bind(self, output: str, *exclude: str, sha256: str = SHA256, **settings: Any) -> BoundRun:
        resolved = SegmentSettings.model_validate({"fragment_size": 2, **settings})
        excluded = tuple(str(self.root / name) for name in exclude)
        job = SegmentJob(
            "/b", (str(self.root / "images"),), str(self.root / output), (), resolved, excluded
        ).normalize()
        printed = io.StringIO()
        console = Console(file=printed, width=500)
        try:
            return bind_run(job, open_inputs(job, (8, 8), sha256, console), sha256, lambda: None, console)
        finally:
            self.printed = printed.getvalue()

    def segment(
        self, output: str, *exclude: str, errors: str = "", only: int | None = None, sha256: str = SHA256
    ) -> None:
        """Write the rows of all fragments, or of the first ones; the named images are error rows."""
        run = self.bind(output, *exclude, sha256=sha256)
        images = pa.Table.from_batches(iterate_plan(str(self.root / output), run.plan)).to_pylist()
        for fragment in run.pending[:only]:
            rows = []
            for image in images:
                is_error = Path(image["uri"]).stem in errors.split()
                row = {"uri": image["uri"], "error_kind": "missing" if is_error else None}
                rows += [row] if image["fragment"] == fragment else []
            path = self.root / output / "images" / f"part-{fragment:08d}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA), path, write_page_checksum=True)
        if only is None:
            write_if_changed(get_run_uri(str(self.root / output)), run.record.complete(0, {}).format())

    def list_planned(self, output: str) -> list[str]:
        run = read_run(str(self.root / output))
        assert run is not None
        table = pa.Table.from_batches(iterate_plan(str(self.root / output), run.plan))
        return [Path(uri).stem for uri in table["uri"].to_pylist()]


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    bucket = Bucket(tmp_path)
    bucket.write("a.png", "b.png", "c.png", "d.png", "e.png")
    return bucket


def test_only_new_changed_and_failed_images_are_planned(bucket: Bucket) -> None:
    bucket.segment("monday", errors="b e")
    bucket.write("f.png", "0.png")
    bucket.write("c.png", content="changed")
    bucket.segment("tuesday", "monday", errors="f")
    assert bucket.list_planned("tuesday") == ["0", "b", "c", "e", "f"]
    assert f"left out 2 of 7 images, which are ok rows of {bucket.root}/monday (--exclude)" in bucket.printed
    assert "warning" not in bucket.printed
    recorded = json.loads((bucket.root / "tuesday" / "run.json").read_text())
    assert recorded["inputs"]["exclude"] == [f"{bucket.root}/monday"]
    bucket.bind("wednesday", "monday", "tuesday")
    assert bucket.list_planned("wednesday") == ["f"]


def test_a_run_without_exclusion_records_none(bucket: Bucket) -> None:
    bucket.segment("monday")
    assert "exclude" not in json.loads((bucket.root / "monday" / "run.json").read_text())["inputs"]


def test_a_run_in_progress_excludes_the_rows_written_so_far(bucket: Bucket) -> None:
    bucket.segment("monday", only=1)
    bucket.bind("tuesday", "monday")
    assert bucket.list_planned("tuesday") == ["c", "d", "e"]
    assert "monday is not complete, so only the images that it has segmented so far are left out" in bucket.printed


def test_another_bundle_is_warned_of(bucket: Bucket) -> None:
    bucket.segment("monday", sha256="d" * 64)
    bucket.write("f.png")
    bucket.bind("tuesday", "monday")
    assert f"warning: --exclude {bucket.root}/monday was made with another bundle\n" in bucket.printed


def test_a_rerun_with_the_same_exclusion_has_the_same_plan(bucket: Bucket) -> None:
    bucket.segment("monday", only=1)
    first = bucket.bind("tuesday", "monday")
    assert bucket.bind("tuesday", "monday").plan == first.plan
    bucket.segment("monday")
    with pytest.raises(RunMismatchError, match=r"3 removed.*if a run with --exclude has segmented more images since"):
        bucket.bind("tuesday", "monday", fragment_size=1)
    with pytest.raises(RunMismatchError, match=r"2 added; .*a\.png was added; other runs with --exclude"):
        bucket.bind("tuesday")
    assert bucket.bind("tuesday", "monday", relist=False).plan == first.plan


def test_images_without_an_entity_tag_are_never_left_out(bucket: Bucket) -> None:
    path = bucket.root / "list.txt"
    path.write_text("".join(f"{bucket.root}/images/{name}.png\n" for name in "abc"))
    runs: list[str] = []
    for output in ("monday", "tuesday"):
        job = SegmentJob("/b", (str(path),), str(bucket.root / output), (), SegmentSettings(), tuple(runs))
        console = Console(file=io.StringIO())
        run = bind_run(job, open_inputs(job, (8, 8), SHA256, console), SHA256, lambda: None, console)
        runs.append(str(bucket.root / output))
        assert run.plan.num_images == 3
        rows = [{"uri": f"{bucket.root}/images/{name}.png"} for name in "abc"]
        (bucket.root / output / "images").mkdir()
        pq.write_table(
            pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA),
            bucket.root / output / "images" / "part-00000000.parquet",
            write_page_checksum=True,
        )


def test_unusable_exclusions_are_refused(bucket: Bucket) -> None:
    with pytest.raises(ConfigError, match="is the --output of this run"):
        bucket.bind("monday", "monday")
    with pytest.raises(MissingFileError, match=r"no run at .*sunday"):
        bucket.bind("monday", "sunday")
    bucket.segment("monday")
    with pytest.raises(DataError, match=r"nothing to segment: all images are ok rows of .*monday"):
        bucket.bind("tuesday", "monday")
    assert not (bucket.root / "tuesday").exists()


@pytest.mark.parametrize("batch_rows", [1, 3, 2**16])
def test_streams_of_any_batch_size_are_compared(
    bucket: Bucket, batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{n:03}" for n in range(100)]
    bucket.write(*(f"{name}.png" for name in names))
    errors = " ".join(names[::7])
    bucket.segment("monday", errors=errors)
    bucket.write(*(f"x{name}.png" for name in names))
    monkeypatch.setattr("segray.runs.listing.BATCH_ROWS", batch_rows)
    monkeypatch.setattr("segray.runs.plan.BATCH_ROWS", batch_rows)
    monkeypatch.setattr(sorting, "_RUN_BYTES", 1000)
    monkeypatch.setattr(sorting, "_RUN_BATCH_ROWS", batch_rows)
    (source,) = open_sources([str(bucket.root / "images")], [], SegmentSettings())
    runs = open_earlier_runs([str(bucket.root / "monday")], "")
    left = [Path(uri).stem for batch in leave_out(merge_sources([source]), runs) for uri in batch["uri"].to_pylist()]
    assert left == [*names[::7], *(f"x{name}" for name in names)]


def test_lost_plan_files_are_written_again_only_with_the_same_fragments(bucket: Bucket) -> None:
    run = bucket.bind("monday")
    (path,) = (bucket.root / "monday" / "plan").iterdir()
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(StorageError, match=r"1 files of the plan are missing.* segment\.fragment_size"):
        bucket.bind("monday", fragment_size=3)
    assert bucket.bind("monday").plan == run.plan
    assert path.read_bytes() == content
    assert bucket.bind("monday", fragment_size=3).plan == run.plan


def test_other_fragment_settings_keep_the_existing_fragments(bucket: Bucket, tmp_path: Path) -> None:
    run = bucket.bind("monday")
    for settings in ({"fragment_size": "auto"}, {"fragment_bytes": 1}, {"fragment_px": 1}):
        assert bucket.bind("monday", **settings).plan == run.plan
    (tmp_path / "spool").mkdir()
    images = [ListedImage(str(number)) for number in range(3)]
    assert spool_plan(cut_fragments(tabulate(images), FragmentLimits(1, 1)), tmp_path / "spool").num_fragments == 3

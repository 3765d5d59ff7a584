"""Binding a folder to a run: which settings may change between calls, and folders of older formats."""

import io
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq
from rich.console import Console

from segray.config import SegmentSettings
from segray.errors import RunMismatchError
from segray.runs.plan import iterate_plan
from segray.schema import IMAGES_SCHEMA
from segray.segmentation.job import SegmentJob
from segray.segmentation.planning.binding import BoundRun, bind_run
from segray.segmentation.planning.freeze import open_inputs

NUM_IMAGES = 5
SHA256 = "c" * 64
DEFAULTS = SegmentSettings()


@dataclass
class Folder:
    """An output folder and its images, which are never opened."""

    root: Path
    printed: str = ""
    settings: dict[str, Any] = field(default_factory=lambda: {"fragment_size": 2})

    @property
    def output(self) -> Path:
        return self.root / "run"

    def bind(self, **settings: object) -> BoundRun:
        printed = io.StringIO()
        console = Console(file=printed, width=500)
        resolved = SegmentSettings.model_validate({**self.settings, **settings})
        job = SegmentJob("/bundle", (str(self.root / "images"),), str(self.output), (), resolved).normalize()
        try:
            return bind_run(job, open_inputs(job, (8, 8), SHA256, console), SHA256, lambda: None, console)
        finally:
            self.printed = printed.getvalue()

    def write_rows(self, run: BoundRun, errors: Collection[int] = (), complete: bool = True) -> None:
        """Write the rows of the pending fragments; the images with these numbers are error rows."""
        images = pa.Table.from_batches(iterate_plan(str(self.output), run.plan)).to_pylist()
        for fragment in run.pending:
            rows = [
                {
                    "uri": image["uri"],
                    "status": "error" if number in errors else "ok",
                    "error_kind": "too_large" if number in errors else None,
                }
                for number, image in enumerate(images)
                if image["fragment"] == fragment
            ]
            path = self.output / "images" / f"part-{fragment:08d}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA), path, write_page_checksum=True)
        if complete:
            self.write_json(json.loads(run.record.complete(NUM_IMAGES - len(errors), {}).format()))

    def read_json(self) -> Any:
        return json.loads((self.output / "run.json").read_text())

    def write_json(self, content: object) -> None:
        (self.output / "run.json").write_text(json.dumps(content))

    def read_files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.output.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "images").mkdir()
    for number in range(NUM_IMAGES):
        (tmp_path / "images" / f"{number}.png").write_bytes(bytes(number))
    return Folder(tmp_path)


BIT_CHANGES = [
    ({"batch_size": 4}, "segment.batch_size: the run has 8, got 4"),
    ({"precision": "fp32"}, "segment.precision: the run has 'bf16', got 'fp32'"),
    ({"compile": True}, "segment.compile: the run has False, got True"),
    ({"num_gpus_per_predictor": 0.5}, "segment.device: the run has 'cpu', got 'gpu'"),
]


@pytest.mark.parametrize(("change", "named"), BIT_CHANGES)
@pytest.mark.parametrize("complete", [False, True])
def test_a_setting_that_changes_the_last_bits_needs_allow_mixed(
    folder: Folder, change: dict[str, Any], named: str, complete: bool
) -> None:
    folder.write_rows(folder.bind(), complete=complete)
    (folder.output / "images" / "part-00000001.parquet").unlink()
    before = folder.read_files()
    with pytest.raises(RunMismatchError) as caught:
        folder.bind(**change)
    message = str(caught.value)
    assert named in message
    assert "rerun with --set segment.allow_mixed=true" in message
    assert folder.read_files() == before
    run = folder.bind(**change, allow_mixed=True)
    assert run.pending == [1]
    assert folder.printed.count("\n") == 1
    assert f"warning: {named}; rows written now may differ" in folder.printed
    changed = SegmentSettings.model_validate(change).bit_settings
    assert folder.read_json()["computed_with"] == [DEFAULTS.bit_settings, changed]
    # The run was computed with both by now, and allow_mixed itself is not recorded.
    assert folder.bind(**change).record == folder.bind().record == run.record
    assert "warning" not in folder.printed


def test_all_settings_that_a_run_was_computed_with_are_listed_in_order(folder: Folder) -> None:
    folder.bind()
    for batch_size in (4, 2, 4, 8):
        folder.bind(batch_size=batch_size, allow_mixed=True)
    assert [bits["batch_size"] for bits in folder.read_json()["computed_with"]] == [8, 4, 2]


def test_nothing_is_recorded_or_printed_if_nothing_is_left_to_compute(folder: Folder) -> None:
    folder.write_rows(folder.bind())
    before = folder.read_files()
    run = folder.bind(batch_size=2, allow_mixed=True)
    assert run.is_complete
    assert folder.read_files() == before
    assert folder.printed == ""


def test_limits_grow_only_with_retry_errors(folder: Folder) -> None:
    folder.write_rows(folder.bind(max_image_px=1000), errors={3})
    before = folder.read_files()
    remedy = r"segment\.max_image_px: the run has 1000, got 2000; to process the error rows again .*retry_errors=true"
    with pytest.raises(RunMismatchError, match=remedy):
        folder.bind(max_image_px=2000)
    assert folder.read_files() == before
    run = folder.bind(max_image_px=2000, image_timeout_s=301, retry_errors=True)
    assert (run.pending, run.replaced) == ([1], frozenset({1}))
    assert folder.read_json()["limits"] == {"max_image_px": 2000, "image_timeout_s": 301}
    assert folder.read_json()["status"] == "running"
    folder.write_rows(run)
    assert folder.bind(max_image_px=2000, image_timeout_s=301).is_complete
    for retry_errors in (False, True):
        lowered = r"max_image_px: the run has 2000, got 1999; limits can be raised but not lowered; otherwise restore"
        with pytest.raises(RunMismatchError, match=lowered):
            folder.bind(max_image_px=1999, image_timeout_s=301, retry_errors=retry_errors)


def test_a_limit_that_no_row_exceeds_can_be_raised_in_a_complete_run(folder: Folder) -> None:
    folder.write_rows(folder.bind(max_image_px=1000))
    before = folder.read_json()
    assert folder.bind(max_image_px=2000, retry_errors=True).is_complete
    assert folder.read_json() == {**before, "limits": {**before["limits"], "max_image_px": 2000}}
    assert folder.bind(max_image_px=2000).is_complete


@pytest.mark.parametrize("change", [{"fragment_size": 3}, {"fragment_bytes": 1}, {"fragment_px": 1}])
def test_a_plan_keeps_its_fragments_if_the_settings_that_cut_it_change(folder: Folder, change: dict[str, Any]) -> None:
    run = folder.bind()
    folder.write_rows(run, complete=False)
    (folder.output / "images" / "part-00000002.parquet").unlink()
    before = folder.read_files()
    again = folder.bind(**change)
    assert (again.plan, again.pending) == (run.plan, [2])
    assert folder.read_files() == before


def test_a_driver_that_starts_at_the_same_time_joins_with_the_fragments_of_the_first(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = folder.bind()
    record = (folder.output / "run.json").read_bytes()
    (folder.output / "run.json").unlink()

    def create_late(uri: str, content: bytes) -> bool:  # The other driver creates run.json just before.
        Path(uri).write_bytes(record)
        return False

    monkeypatch.setattr("segray.segmentation.planning.binding.create_bytes", create_late)
    assert folder.bind(fragment_size=1).plan == first.plan
    (folder.output / "run.json").unlink()
    with pytest.raises(RunMismatchError, match=r"segment\.batch_size: the run has 8, got 1.*allow_mixed"):
        folder.bind(batch_size=1)


@pytest.mark.parametrize("change", [{"mask_encoding": "png"}, {"reduce_jpeg": True}])
def test_a_setting_that_changes_rows_is_refused_whatever_is_allowed(folder: Folder, change: dict[str, Any]) -> None:
    folder.bind()
    message = rf"belongs to another run \(segment\.{next(iter(change))}: the run has .*\); choose another --output"
    with pytest.raises(RunMismatchError, match=message):
        folder.bind(**change, allow_mixed=True, retry_errors=True)


def downgrade(content: dict[str, Any]) -> dict[str, Any]:
    """Return a ``run.json`` as segray wrote it before it recorded limits and bit settings by themselves."""
    config = {
        "fragment_size": 2,
        "fragment_bytes": 2**26,
        "batch_size": 8,
        "precision": "bf16",
        "compile": False,
        "mask_encoding": "raw",
        "reduce_jpeg": False,
        "max_image_px": DEFAULTS.max_image_px,
        "ground_truth": False,
        "device": "cpu",
    }
    older = {name: value for name, value in content.items() if name not in ("computed_with", "limits")}
    return {**older, "format_version": 1, "fingerprint": {**content["fingerprint"], "config": config}}


def test_a_folder_of_format_1_is_resumed(folder: Folder) -> None:
    run = folder.bind()
    folder.write_rows(run)
    newer = folder.read_json()
    folder.write_json(downgrade(newer))
    before = folder.read_files()
    assert folder.bind().is_complete
    assert folder.bind(fragment_size=4, fragment_px=100).is_complete
    assert folder.read_files() == before
    with pytest.raises(RunMismatchError, match=r"segment\.batch_size: the run has 8, got 9.*allow_mixed"):
        folder.bind(batch_size=9)
    with pytest.raises(RunMismatchError, match=r"segment\.mask_encoding: the run has 'raw', got 'png'"):
        folder.bind(mask_encoding="png")
    with pytest.raises(RunMismatchError, match=r"segment\.max_image_px: .*retry_errors=true"):
        folder.bind(max_image_px=DEFAULTS.max_image_px + 1)
    (folder.output / "images" / "part-00000000.parquet").unlink()
    folder.write_rows(folder.bind(batch_size=9, allow_mixed=True))
    recorded = folder.read_json()
    assert recorded["format_version"] == 2
    assert recorded["fingerprint"] == newer["fingerprint"]
    assert [bits["batch_size"] for bits in recorded["computed_with"]] == [8, 9]
    assert recorded["limits"] == DEFAULTS.limits


def test_a_setting_that_a_folder_does_not_record_counts_as_its_default(folder: Folder) -> None:
    folder.write_rows(folder.bind())
    content = folder.read_json()
    del content["fingerprint"]["config"]["reduce_jpeg"]
    del content["computed_with"][0]["compile"]
    del content["limits"]["image_timeout_s"]
    folder.write_json(content)
    assert folder.bind().is_complete
    for change in ({"reduce_jpeg": True}, {"compile": True}, {"image_timeout_s": 1000}):
        with pytest.raises(RunMismatchError, match=rf"segment\.{next(iter(change))}: the run has .*, got"):
            folder.bind(**change)


@pytest.mark.parametrize("place", ["config", "computed_with", "limits"])
def test_a_recorded_setting_of_a_later_version_is_refused(folder: Folder, place: str) -> None:
    folder.bind()
    content = folder.read_json()
    recorded = {"config": content["fingerprint"]["config"], "computed_with": content["computed_with"][0]}
    recorded.get(place, content["limits"])["overlap"] = 0.5
    folder.write_json(content)
    message = r"this version of segray has no setting segment\.overlap: 0\.5\); upgrade segray, or choose another"
    with pytest.raises(RunMismatchError, match=message):
        folder.bind()

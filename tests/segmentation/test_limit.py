"""A trial of the first images (``--limit``), and the run that continues from it."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import segray
from segray import cli
from segray.errors import ConfigError, RunMismatchError
from segray.progress import build_quiet_console
from segray.segmentation.driver import print_outcome, run_segmentation
from segray.segmentation.job import SegmentJob, SegmentResult
from tests.segmented import NUM_IMAGES, read_rows

pytestmark = pytest.mark.usefixtures("without_ray")


def run(job: SegmentJob, limit: int | None) -> SegmentResult:
    settings = job.settings.model_copy(update={"num_report_images": 0})
    return run_segmentation(replace(job, limit=limit, settings=settings), build_quiet_console())


def read_fragments(job: SegmentJob) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(job.output_uri, "images").iterdir()}


def test_a_run_that_goes_on_from_a_trial_has_the_files_of_one_without(job: SegmentJob, tmp_path: Path) -> None:
    trial = run(job, 5)
    assert (trial.num_ok, trial.errors, trial.trial_of) == (8, {}, NUM_IMAGES)  # two fragments of 4 images
    assert len(trial.summary) == 3
    assert trial.rows(["uri"]).num_rows == 8
    folder = Path(job.output_uri)
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    assert not (folder / "summary.parquet").exists()
    assert not (folder / "report.html").exists()
    written = read_fragments(job)
    assert sorted(written) == ["part-00000000.parquet", "part-00000001.parquet"]
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}
    complete = run(job, None)
    assert (complete.num_ok, complete.trial_of) == (NUM_IMAGES, None)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    other = replace(job, output_uri=str(tmp_path / "other"))
    assert run(other, None).summary == complete.summary
    assert read_fragments(other) == read_fragments(job)
    assert len(read_rows(folder)) == NUM_IMAGES


def test_a_trial_is_rounded_up_to_whole_fragments_and_may_grow(job: SegmentJob) -> None:
    for limit, num_rows in ((1, 4), (4, 4), (5, 8), (2, 4)):
        assert run(job, limit).num_ok == num_rows
    assert sorted(read_fragments(job)) == ["part-00000000.parquet", "part-00000001.parquet"]


def test_a_limit_that_leaves_nothing_out_completes_the_run(job: SegmentJob) -> None:
    assert run(job, 9).trial_of is None
    assert json.loads(Path(job.output_uri, "run.json").read_text())["status"] == "complete"
    assert run(job, 1).trial_of is None  # A complete run stays complete.
    assert json.loads(Path(job.output_uri, "run.json").read_text())["status"] == "complete"


def test_a_trial_completes_a_run_that_lacks_only_its_first_images(job: SegmentJob) -> None:
    run(job, None)
    Path(job.output_uri, "images", "part-00000000.parquet").unlink()
    assert run(job, 1).trial_of is None
    assert len(read_fragments(job)) == 3


def test_a_trial_keeps_the_error_rows_of_other_fragments(job: SegmentJob, bucket: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    good = [str(path) for path in sorted((bucket / "images").rglob("*.png"))]
    listed.write_text("\n".join([*good[:3], f"{bucket}/images/gone", *good[3:], f"{bucket}/z gone.png"]))
    job = replace(job, image_uris=(str(listed),), mask_uris=())
    assert run(job, None).errors == {"missing": 2}
    before = read_fragments(job)
    retried = replace(job, settings=job.settings.model_copy(update={"retry_errors": True}))
    assert run(retried, 1).trial_of == NUM_IMAGES + 2
    assert read_fragments(job) == before
    assert run(job, None).errors == {"missing": 2}


def test_the_command_and_the_function_take_a_limit(job: SegmentJob, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--bundle", job.bundle_uri, "--images", job.image_uris[0], "--output", job.output_uri, "--limit", "3"]
    for name, value in (("fragment_size", "4"), ("precision", "fp32")):
        arguments += ["--set", f"segment.{name}={value}"]
    cli.app(["segment", *arguments], standalone_mode=False)
    assert "this was a trial of the first 4 of 10 images" in capsys.readouterr().out
    options = {"bundle": job.bundle_uri, "images": job.image_uris, "output": job.output_uri, "settings": job.settings}
    with pytest.raises(ConfigError, match="limit: expected at least 1 image, got 0"):
        segray.segment(**options, limit=0)  # type: ignore[arg-type]
    with pytest.raises(RunMismatchError, match=r"segment\.batch_size"):  # The run belongs to its settings.
        segray.segment(**options, limit=3)  # type: ignore[arg-type]


def test_the_outcome_of_a_trial_says_how_to_go_on(job: SegmentJob) -> None:
    text = io.StringIO()
    print_outcome(run(job, 5), Console(file=text, width=200))
    assert "8 images segmented, 0 error rows" in text.getvalue()
    assert "report.html" not in text.getvalue()
    assert text.getvalue().endswith(
        "this was a trial of the first 8 of 10 images (--limit); to segment the others too, rerun the same command "
        "without it\n"
    )
    text = io.StringIO()
    print_outcome(run(job, None), Console(file=text, width=200))
    assert [line.split()[0] for line in text.getvalue().splitlines()[-3:]] == [
        "images/",
        "summary.parquet",
        "report.html",
    ]

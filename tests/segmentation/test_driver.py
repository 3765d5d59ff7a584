"""The driver without Ray: its stages run in the test process, one fragment after another."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from segray.errors import StoppedByErrorRows, TooManyErrorRows
from segray.progress import build_quiet_console
from segray.results.saved_counts import load_counts
from segray.results.status import read_status
from segray.runs.written import list_written_fragments
from segray.segmentation.driver import print_outcome, run_segmentation
from segray.segmentation.error_limits import require_few_errors
from segray.segmentation.job import SegmentJob, SegmentResult
from tests.segmented import NUM_IMAGES, SETTINGS, read_rows


def run_quietly(job: SegmentJob, **settings: object) -> SegmentResult:
    return run_segmentation(replace(job, settings=job.settings.model_copy(update=settings)), build_quiet_console())


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.usefixtures("without_ray")
def test_a_quiet_console_prints_nothing(job: SegmentJob, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = run_segmentation(job, build_quiet_console(), with_profile=True)
    assert (outcome.num_ok, outcome.errors) == (NUM_IMAGES, {})
    assert run_segmentation(job, Console(quiet=True, force_terminal=True)).summary.equals(outcome.summary)
    assert capfd.readouterr() == ("", "")
    assert len(read_rows(Path(job.output_uri))) == NUM_IMAGES
    status = read_status(job.output_uri)
    assert (status.state, status.num_done, status.num_fragments_done) == ("complete", NUM_IMAGES, 3)
    assert json.loads((Path(job.output_uri) / "run.json").read_text())["counts"]["ok"] == NUM_IMAGES


@pytest.mark.usefixtures("without_ray")
def test_a_run_folder_of_format_1_is_resumed(job: SegmentJob) -> None:
    outcome = run_quietly(job)
    path = Path(job.output_uri) / "run.json"
    content = json.loads(path.read_text())
    (bits,) = content.pop("computed_with")
    config = {**content["fingerprint"]["config"], **bits, **content.pop("limits")}
    del config["image_timeout_s"]  # was added later
    older = {**content, "fingerprint": {**content["fingerprint"], "config": {**config, "fragment_size": 4}}}
    del older["format_version"]
    path.write_text(json.dumps(older))
    assert run_quietly(job).summary.equals(outcome.summary)
    assert json.loads(path.read_text()) == older  # A complete run is not written again.
    (path.parent / "images" / "part-00000001.parquet").unlink()
    assert run_quietly(job).summary.equals(outcome.summary)
    assert json.loads(path.read_text()) == {
        **content,
        "format_version": 2,
        "computed_with": [bits],
        "limits": SETTINGS.limits,
    }


@pytest.mark.usefixtures("without_ray")
def test_counts_are_saved_in_one_file_and_a_repeated_run_reads_no_rows(
    job: SegmentJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segray.results.saved_counts._FRAGMENTS_PER_FILE", 1)
    output = Path(job.output_uri)
    outcome = run_quietly(job)
    (saved,) = (output / "counts").iterdir()
    before = read_files(output)
    written = list_written_fragments(str(output))
    from_files = load_counts(str(output), written, 3)
    saved.unlink()
    assert load_counts(str(output), written, 3).equals(from_files)
    saved.write_bytes(before[f"counts/{saved.name}"])
    for path in (output / "images").iterdir():  # Their sizes are those of the listing, but they cannot be read.
        path.write_bytes(bytes(path.stat().st_size))
    assert run_quietly(job).summary.equals(outcome.summary)
    assert run_quietly(job, retry_errors=True).summary.equals(outcome.summary)
    assert read_status(str(output)).rows == {"ok": NUM_IMAGES}
    (output / "summary.parquet").unlink()
    assert run_quietly(job, num_report_images=0).summary.equals(outcome.summary)
    after = read_files(output)
    changed = {"report.html"}  # without pictures
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == changed | {
        name for name in before if name.startswith("images/")
    }


@pytest.mark.usefixtures("without_ray")
def test_a_batch_size_changed_with_allow_mixed_is_recorded_and_its_other_results_are_kept(job: SegmentJob) -> None:
    run_quietly(job)
    output = Path(job.output_uri)
    before = read_files(output)
    (output / "images" / "part-00000001.parquet").unlink()
    run_quietly(job, batch_size=1, allow_mixed=True)
    record = json.loads((output / "run.json").read_text())
    assert [bits["batch_size"] for bits in record["computed_with"]] == [3, 1]
    assert record["status"] == "complete"
    kept = [name for name in before if name.startswith("images/") and "part-00000001" not in name]
    assert [read_files(output)[name] for name in kept] == [before[name] for name in kept]
    assert run_quietly(job).num_ok == run_quietly(job, batch_size=1).num_ok == NUM_IMAGES


@pytest.mark.usefixtures("without_ray")
def test_an_image_above_a_limit_is_segmented_once_the_limit_is_raised(job: SegmentJob) -> None:
    limit = {"max_image_px": 6000}
    outcome = run_quietly(job, **limit)
    assert outcome.errors["too_large"] > 2
    assert run_quietly(job, retry_errors=True).errors == {}
    output = Path(job.output_uri)
    assert json.loads((output / "run.json").read_text())["limits"] == SETTINGS.limits
    raised = read_files(output)
    fresh = replace(job, output_uri=f"{output} again")
    run_quietly(fresh)
    expected = read_files(Path(fresh.output_uri))
    compared = [name for name in expected if name.startswith(("images/", "summary", "counts/"))]
    assert [name for name in compared if raised[name] != expected[name]] == []
    assert read_status(str(output)).rows == {"ok": NUM_IMAGES}


@pytest.mark.usefixtures("without_ray")
def test_a_run_of_mostly_error_rows_stops_and_can_be_resumed(
    job: SegmentJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segray.segmentation.error_limits._MIN_ROWS", 4)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(8):
        (images / f"{number}.png").touch()
    settings = SETTINGS.model_copy(update={"fragment_size": 2})
    job = replace(job, image_uris=(str(images),), mask_uris=(), settings=settings)
    message = (
        r"stopped because 4 of the first 4 images are error rows \(4 unreadable\), the limit is 50\.0% "
        r"\(segment\.stop_error_fraction\); .* rerun with --set segment\.stop_error_fraction=1$"
    )
    with pytest.raises(StoppedByErrorRows, match=message) as caught:
        run_quietly(job)
    assert caught.value.exit_code == 5
    status = read_status(job.output_uri)
    assert (status.state, status.num_done, status.rows) == ("running", 4, {"unreadable": 4})
    assert len(list((tmp_path / "run" / "counts").iterdir())) == 1  # The counts of the rows so far are saved.
    assert run_quietly(job, stop_error_fraction=1).errors == {"unreadable": 8}
    # The rows of the last fragment stop nothing, because nothing is left to do.
    monkeypatch.setattr("segray.segmentation.error_limits._MIN_ROWS", 8)
    assert run_quietly(replace(job, output_uri=str(tmp_path / "other"))).errors == {"unreadable": 8}


@pytest.mark.usefixtures("without_ray")
def test_the_outcome_is_printed_and_too_many_error_rows_are_an_error(
    job: SegmentJob, bucket: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "good.png").write_bytes((bucket / "images" / "image 0#.png").read_bytes())
    (tmp_path / "images" / "empty.png").touch()
    job = SegmentJob(job.bundle_uri, (str(tmp_path / "images"),), job.output_uri, (), SETTINGS)
    outcome = run_segmentation(job, build_quiet_console())
    printed = io.StringIO()
    print_outcome(outcome, Console(file=printed, width=200))
    assert "1 images segmented, 1 error rows (1 unreadable)" in printed.getvalue()
    with pytest.raises(TooManyErrorRows, match=r"1 of 2 images are error rows \(50\.0%\), the limit is 1\.0%"):
        require_few_errors(outcome, SETTINGS)
    require_few_errors(outcome, SETTINGS.model_copy(update={"max_error_fraction": 0.6}))

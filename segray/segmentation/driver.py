"""Runs a segmentation job from bundle and images to a complete run folder; rerunning the same job resumes it."""

import importlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from segray.config import SegmentSettings
from segray.models.bundle import BundleManifest, load_manifest, read_weights
from segray.progress import build_bar
from segray.results.saved_counts import CountsLog, compact_counts, drop_counts
from segray.results.summary import FinishedRun, format_cell, format_summary_parquet, load_summary, summarize_run
from segray.runs.plan import count_images, remove_other_plans
from segray.runs.run_file import get_run_uri, read_same_run, write_if_changed
from segray.runtime.autoscaling import find_capacity, reported_shortage
from segray.runtime.capacity import Capacity, describe_wait
from segray.runtime.connect import connect_ray, count_cores
from segray.segmentation.error_limits import ErrorRowMonitor
from segray.segmentation.job import PipelineJob, SegmentJob, SegmentResult
from segray.segmentation.limit import count_trial_fragments, restrict_run, summarize_trial
from segray.segmentation.planning.binding import BoundRun, bind_run
from segray.segmentation.planning.freeze import open_inputs
from segray.segmentation.profile import Profile, print_profile
from segray.segmentation.stages.placement import Placement, place_stages
from segray.storage import join_uri, list_names, sweep_folder

# Columns of summary.parquet that are printed, and their headers.
_TABLE_COLUMNS = {
    "image_count": "images",
    "pixel_count": "pixels",
    "dataset_iou": "IoU",
    "dataset_dice": "Dice",
    "precision": "precision",
    "recall": "recall",
    "mean_image_iou": "mean image IoU",
}
_RESULTS = {"summary.parquet", "report.html"}  # files that are computed from the rows


def run_segmentation(job: SegmentJob, console: Console, with_profile: bool = False) -> SegmentResult:
    """Segment every image and write rows, summary and report; Ray is used only if any rows are missing.

    Args:
        job: What to segment, and where to write.
        console: For progress and warnings; a quiet console prints nothing.
        with_profile: Print how much time each step took.

    Raises:
        SegrayError: The input cannot be used, the output belongs to another run, or there is an environment error
            (permissions, network, disk). Fragments that are already written stay; to resume, call again.
        StoppedByErrorRows: Too many of the rows that this call wrote are error rows.
    """
    started_s = time.monotonic()
    job = job.normalize()
    manifest, bundle_sha256 = load_manifest(job.bundle_uri)
    inputs = open_inputs(job, manifest.image_size, bundle_sha256, console)
    # bind_run reads the weights before it writes anything, so damaged weights are reported before Ray starts.
    run = bind_run(job, inputs, bundle_sha256, lambda: read_weights(job.bundle_uri, manifest), console)
    num_trial_fragments = count_trial_fragments(job, run)
    if num_trial_fragments is not None:
        run = restrict_run(run, num_trial_fragments)
    if run.pending:
        profile = _process_pending(job, manifest, run, console, started_s)
        if with_profile:
            print_profile(profile, console)
    elif with_profile:
        console.print("all images are already segmented; there is nothing to profile", highlight=False)
    if num_trial_fragments is not None:
        return summarize_trial(job.output_uri, run, num_trial_fragments, manifest.classes)
    return _finish_run(job, run, manifest, console)


def _finish_run(job: SegmentJob, run: BoundRun, manifest: BundleManifest, console: Console) -> SegmentResult:
    """Return the result of a run whose rows are all written; for a complete run, as it was saved."""
    if run.is_complete and list_names(job.output_uri) >= _RESULTS:
        counts = run.record.counts
        return SegmentResult(job.output_uri, counts.ok or 0, counts.errors or {}, load_summary(job.output_uri))
    with console.status("computing the summary"):
        finished = summarize_run(job.output_uri, run.plan, manifest.classes)
        tally = finished.tally
        outcome = SegmentResult(job.output_uri, tally.num_ok, dict(sorted(tally.errors.items())), finished.summary)
        _write_results(finished, run, outcome, job.settings.num_report_images)
    return outcome


def _write_results(finished: FinishedRun, run: BoundRun, outcome: SegmentResult, num_report_images: int) -> None:
    """Write summary and report, mark the run as complete, and remove temporary files."""
    output = finished.output_uri
    recorded = read_same_run(output, run.plan)
    write_if_changed(join_uri(output, "summary.parquet"), format_summary_parquet(finished.summary))
    from segray.results.report import build_report  # Importing matplotlib takes 1 s, so it is done after segmenting.

    write_if_changed(join_uri(output, "report.html"), build_report(finished, num_report_images))
    compact_counts(output, finished.counts)
    record = run.record.add_computed_with(recorded).complete(outcome.num_ok, outcome.errors)
    write_if_changed(get_run_uri(output), record.format())
    sweep_folder(output)
    remove_other_plans(output, run.plan)


def _process_pending(
    job: SegmentJob, manifest: BundleManifest, run: BoundRun, console: Console, started_s: float
) -> Profile:
    """Process the pending fragments on Ray, and return the profile of the run."""
    num_pending = int(count_images(job.output_uri, run.plan)[run.pending].sum())
    with build_bar(console, "images") as bar:
        task = bar.add_task("segment", total=num_pending, note="starting")

        importlib.import_module("ray")  # Import it completely before two threads import parts of it.
        # Importing Ray Data takes 2 s; it is imported while Ray starts its processes, which takes longer.
        threading.Thread(
            target=importlib.import_module, args=["segray.segmentation.stages.pipeline"], daemon=True
        ).start()
        with connect_ray(*_count_resources(job.settings)), reported_shortage(console):
            capacity = find_capacity()
            placement = place_stages(job.settings, len(run.pending), capacity)
            console.print(_describe_run(job.settings, placement, manifest, run, num_pending), highlight=False)
            if line := _describe_shortage(placement, job.settings, capacity):
                console.print(line, highlight=False)
            from segray.segmentation.stages.pipeline import run_pipeline

            profile = Profile(placement.num_predictors, started_s)
            drop_counts(job.output_uri, run.replaced)
            rows = run_pipeline(run.pending, _build_pipeline_job(job, manifest, run), placement, run.replaced)
            for num_images, num_errors, steps in _record_written(rows, job, len(run.pending)):
                profile.add(num_images, steps)
                bar.update(task, advance=num_images, note=f"{num_errors} errors")
    return profile


def _record_written(
    rows: Iterable[Mapping[str, Any]], job: SegmentJob, num_pending: int
) -> Iterator[tuple[int, int, list[dict[str, Any]]]]:
    """Save the counts of fragments as they are written.

    Args:
        rows: A row of ``WRITTEN_SCHEMA`` for each fragment.
        job: The job.
        num_pending: Number of fragments that will be written.

    Yields:
        The fragment's number of images, the number of error rows so far, and the fragment's steps.

    Raises:
        StoppedByErrorRows: Too many rows are error rows, and there are more fragments to process.
    """
    log, monitor = CountsLog(job.output_uri), ErrorRowMonitor(job.settings)
    for number, written in enumerate(rows, start=1):
        num_images = monitor.add(written)
        if written["is_stored"]:
            log.add(written)
        yield num_images, monitor.errors.total(), written["steps"]
        if number < num_pending and monitor.is_exceeded:
            log.save()
            raise monitor.build_error()
    log.save()


def _build_pipeline_job(job: SegmentJob, manifest: BundleManifest, run: BoundRun) -> PipelineJob:
    return PipelineJob(
        output_uri=job.output_uri,
        cut_sha256=run.plan.cut_sha256,
        bundle_uri=job.bundle_uri,
        bundle_sha256=run.record.fingerprint.bundle_sha256,
        classes=manifest.classes,
        image_size=manifest.image_size,
        settings=job.settings,
        has_truth=run.has_truth,
    )


def _describe_run(
    settings: SegmentSettings, placement: Placement, manifest: BundleManifest, run: BoundRun, num_pending: int
) -> str:
    return (
        f"segmenting {num_pending} of {run.plan.num_images} images in {len(run.pending)} fragments, "
        f"{placement.num_predictors} predictor{'s' if placement.num_predictors > 1 else ''} "
        f"on {'GPU' if settings.num_gpus_per_predictor else 'CPU'} ({settings.precision}), "
        f"{manifest.model.title}, {len(manifest.class_names)} classes"
    )


def _describe_shortage(placement: Placement, settings: SegmentSettings, capacity: Capacity) -> str | None:
    """Return a line if there are fewer predictors than requested, or if they have to wait for nodes."""
    if settings.num_predictors and placement.num_predictors < settings.num_predictors:
        return (
            f"segment.num_predictors: {settings.num_predictors} requested, but only {placement.num_predictors} can be "
            f"placed: {capacity.describe()}"
        )
    return describe_wait(capacity, "predictor", placement.needs, placement.num_predictors)


def _count_resources(settings: SegmentSettings) -> tuple[float, float]:
    """Return the minimum CPUs and GPUs of a run: those of the predictors, plus two CPUs to decode and write."""
    if share := settings.num_gpus_per_predictor:
        num_predictors = settings.num_predictors or 1
        return num_predictors + 2, num_predictors * share
    num_threads = settings.num_threads_per_predictor
    return (settings.num_predictors or max(1, count_cores() // num_threads)) * num_threads + 2, 0


def print_outcome(outcome: SegmentResult, console: Console) -> None:
    """Print the summary as a table, the number of error rows by kind, and the paths of the results."""
    rows = outcome.summary.to_pylist()
    table = Table("class")
    for name, header in _TABLE_COLUMNS.items():
        if any(row[name] is not None for row in rows):
            table.add_column(header, justify="right")
    for row in rows:
        cells = [format_cell(row[name]) for name in _TABLE_COLUMNS if any(other[name] is not None for other in rows)]
        table.add_row(row["class_name"], *cells)
    console.print(table)
    scores = [row["dataset_iou"] for row in rows if row["dataset_iou"] is not None]
    if scores:
        console.print(f"mean IoU over {len(scores)} classes: {sum(scores) / len(scores):.4f}", highlight=False)
    kinds = ", ".join(f"{count} {kind}" for kind, count in outcome.errors.items())
    num_errors = sum(outcome.errors.values())
    console.print(
        f"{outcome.num_ok} images segmented, {num_errors} error rows{kinds and f' ({kinds})'}", highlight=False
    )
    for name in ("images/", *(() if outcome.trial_of else sorted(_RESULTS, reverse=True))):
        console.print(f"{name:<24}{join_uri(outcome.output, name)}", highlight=False)
    if outcome.trial_of:
        console.print(
            f"this was a trial of the first {outcome.num_ok + num_errors} of {outcome.trial_of} images (--limit); to "
            "segment the others too, rerun the same command without it",
            highlight=False,
        )

"""Runs a segmentation job from bundle and images to a complete run folder; rerunning the same job resumes it."""

import importlib
import threading
import time

from rich.console import Console
from rich.table import Table

from segray.config import SegmentSettings
from segray.errors import TooManyErrorRows
from segray.models.bundle import BundleManifest, load_manifest, read_weights
from segray.progress import build_bar
from segray.results.summary import FinishedRun, format_cell, format_summary_parquet, summarize_run
from segray.runs.plan import count_images, remove_other_plans
from segray.runs.run_file import get_run_uri, require_same_plan, write_if_changed
from segray.runtime.autoscaling import find_capacity, reported_shortage
from segray.runtime.capacity import Capacity, describe_wait
from segray.runtime.connect import connect_ray, count_cores
from segray.segmentation.job import PipelineJob, SegmentJob, SegmentResult
from segray.segmentation.planning.binding import BoundRun, bind_run
from segray.segmentation.planning.inputs import open_sources
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
    """
    started_s = time.monotonic()
    job = job.normalize()
    manifest, bundle_sha256 = load_manifest(job.bundle_uri)
    sources = open_sources(job.image_uris, job.mask_uris, job.settings)
    # bind_run reads the weights before it writes anything, so damaged weights are reported before Ray starts.
    run = bind_run(job, sources, bundle_sha256, lambda: read_weights(job.bundle_uri, manifest), console)
    if run.pending:
        profile = _process_pending(job, manifest, run, console, started_s)
        if with_profile:
            print_profile(profile, console)
    elif with_profile:
        console.print("all images are already segmented; there is nothing to profile", highlight=False)
    with console.status("computing the summary"):
        finished = summarize_run(job.output_uri, run.plan, manifest.classes)
        tally = finished.tally
        outcome = SegmentResult(job.output_uri, tally.num_ok, dict(sorted(tally.errors.items())), finished.summary)
        if run.pending or not run.is_complete or not list_names(job.output_uri) >= _RESULTS:
            _write_results(finished, run, outcome, job.settings.num_report_images)
    return outcome


def _write_results(finished: FinishedRun, run: BoundRun, outcome: SegmentResult, num_report_images: int) -> None:
    """Write summary and report, mark the run as complete, and remove temporary files."""
    output = finished.output_uri
    require_same_plan(output, run.plan)
    write_if_changed(join_uri(output, "summary.parquet"), format_summary_parquet(finished.summary))
    from segray.results.report import build_report  # Importing matplotlib takes 1 s, so it is done after segmenting.

    write_if_changed(join_uri(output, "report.html"), build_report(finished, num_report_images))
    write_if_changed(get_run_uri(output), run.record.complete(outcome.num_ok, outcome.errors).format())
    sweep_folder(join_uri(output, "images"))
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

            profile, num_errors = Profile(placement.num_predictors, started_s), 0
            pipeline_job = _build_pipeline_job(job, manifest, run)
            for written in run_pipeline(run.pending, pipeline_job, placement, run.replaced):
                num_images = written["num_ok"] + written["num_errors"]
                num_errors += written["num_errors"]
                profile.add(num_images, written["steps"])
                bar.update(task, advance=num_images, note=f"{num_errors} errors")
    return profile


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
    if settings.num_gpus_per_predictor:
        num_predictors = settings.num_predictors or 1
    else:
        num_predictors = settings.num_predictors or count_cores()
    return num_predictors + 2, num_predictors * settings.num_gpus_per_predictor


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
    for name in ("images/", "summary.parquet", "report.html"):
        console.print(f"{name:<24}{join_uri(outcome.output, name)}", highlight=False)


def require_few_errors(outcome: SegmentResult, settings: SegmentSettings) -> None:
    """Raise if a complete run has too many error rows; all of its rows are written nevertheless.

    Raises:
        TooManyErrorRows: The share of error rows is at least ``max_error_fraction``.
    """
    num_errors = sum(outcome.errors.values())
    num_images = outcome.num_ok + num_errors
    if num_errors and num_errors >= settings.max_error_fraction * num_images:
        raise TooManyErrorRows(
            f"{num_errors} of {num_images} images are error rows ({num_errors / num_images:.1%}), the limit is "
            f"{settings.max_error_fraction:.1%} (segment.max_error_fraction); all rows are written. Fix the images and "
            "rerun with --set segment.retry_errors=true, or raise the limit"
        )

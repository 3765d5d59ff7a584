"""From a bundle and images to a finished run folder; calling it again goes on, or finds it finished."""

import importlib
import threading
import time

from rich.console import Console
from rich.table import Table

from segray.config import SegmentSettings
from segray.errors import TooManyErrorRows
from segray.models.bundle import BundleManifest, load_manifest, read_weights
from segray.progress import build_bar
from segray.results.summary import build_summary, format_cell, format_summary_parquet, tally_fragments
from segray.runs.plan import count_images, remove_other_plans
from segray.runs.run_file import format_run, get_run_uri, require_same_plan, write_if_changed
from segray.runtime.autoscaling import find_capacity, reported_shortage
from segray.runtime.capacity import Capacity, describe_wait
from segray.runtime.connect import connect_ray, count_cores
from segray.segmentation.job import SegmentJob, SegmentOutcome
from segray.segmentation.planning.binding import BoundRun, bind_run
from segray.segmentation.planning.inputs import open_sources
from segray.segmentation.profile import Profile, print_profile
from segray.segmentation.stages.placement import Placement, place_stages
from segray.storage import join_uri, list_names, sweep_folder

# of summary.parquet, in the terminal's words
_TABLE_COLUMNS = {
    "image_count": "images",
    "pixel_count": "pixels",
    "dataset_iou": "IoU",
    "dataset_dice": "Dice",
    "precision": "precision",
    "recall": "recall",
    "mean_image_iou": "mean image IoU",
}
_RESULTS = {"summary.parquet", "report.html"}  # made from the rows, when all are there


def run_segmentation(job: SegmentJob, console: Console, with_profile: bool = False) -> SegmentOutcome:
    """Segment every image, connecting to Ray if there is anything left to do.

    Args:
        job: What to do.
        console: For progress, and what a user has to know.
        with_profile: Print where the time went.

    Raises:
        SegrayError: The input is unusable, the output belongs to another run, or the world failed. What was finished
            stays, and the same call goes on from there.
    """
    started_s = time.monotonic()
    job = job.normalize()
    output = job.output_uri
    manifest, bundle_sha256 = load_manifest(job.bundle_uri)
    sources = open_sources(job.image_uris, job.mask_uris, job.settings)
    # one clear line for damaged weights, before anything is written or started
    run = bind_run(job, sources, bundle_sha256, lambda: read_weights(job.bundle_uri, manifest), console)
    if run.pending:
        profile = _run_pending(job, manifest, run, console, started_s)
        if with_profile:
            print_profile(profile, console)
    elif with_profile:
        console.print("nothing is left to do, and no time to profile", highlight=False)
    with console.status("summing up"):
        tally = tally_fragments(output, range(run.plan.num_fragments), manifest.classes.num_classes)
        summary = build_summary(tally, manifest.classes)
        outcome = SegmentOutcome(output, tally.num_ok, dict(sorted(tally.errors.items())), summary)
        if run.pending or not run.is_complete or not list_names(output) >= _RESULTS:
            require_same_plan(output, run.plan)
            write_if_changed(join_uri(output, "summary.parquet"), format_summary_parquet(summary))
            from segray.results.report import build_report  # 1 s of matplotlib, which no image need wait for

            num_images = job.settings.num_report_images
            report = build_report(output, run.plan, summary, tally, manifest.classes, num_images)
            write_if_changed(join_uri(output, "report.html"), report)
            counts = {"ok": outcome.num_ok, "errors": outcome.errors}
            finished = format_run(run.fingerprint, run.plan, job.inputs, "complete", **counts)
            write_if_changed(get_run_uri(output), finished)
            sweep_folder(join_uri(output, "images"))
            remove_other_plans(output, run.plan)
    return outcome


def _run_pending(
    job: SegmentJob, manifest: BundleManifest, run: BoundRun, console: Console, started_s: float
) -> Profile:
    pending = run.pending
    num_pending = int(count_images(job.output_uri, run.plan)[pending].sum())
    with build_bar(console, "images") as bar:
        task = bar.add_task("segment", total=num_pending, note="starting")

        importlib.import_module("ray")  # whole, before two threads import parts of it
        # Ray Data takes 2 s to import: while Ray starts its processes, which takes longer
        threading.Thread(
            target=importlib.import_module, args=["segray.segmentation.stages.pipeline"], daemon=True
        ).start()
        with connect_ray(*_count_resources(job.settings)), reported_shortage(console):
            capacity = find_capacity()
            placement = place_stages(job.settings, len(pending), capacity)
            _print_plan(job.settings, placement, manifest, run, num_pending, console)
            _print_wait(placement, job.settings, capacity, console)
            from segray.segmentation.stages.pipeline import run_pipeline

            profile, num_errors = Profile(placement.num_predictors, started_s), 0
            for done in run_pipeline(
                pending,
                replaced=run.replaced,
                output_uri=job.output_uri,
                bundle_uri=job.bundle_uri,
                cut_sha256=run.plan.cut_sha256,
                bundle_sha256=run.fingerprint.bundle_sha256,
                manifest=manifest,
                settings=job.settings,
                placement=placement,
                has_truth=run.has_truth,
            ):
                num_images = done["num_ok"] + done["num_errors"]
                num_errors += done["num_errors"]
                profile.add(num_images, done["steps"])
                bar.update(task, advance=num_images, note=f"{num_errors} errors")
    return profile


def _print_plan(
    settings: SegmentSettings,
    placement: Placement,
    manifest: BundleManifest,
    run: BoundRun,
    num_pending: int,
    console: Console,
) -> None:
    console.print(
        f"segmenting {num_pending} of {run.plan.num_images} images in {len(run.pending)} fragments, "
        f"{placement.num_predictors} predictor{'s' if placement.num_predictors > 1 else ''} "
        f"on {'GPU' if settings.num_gpus_per_predictor else 'CPU'} ({settings.precision}), "
        f"{manifest.model.arch}/{manifest.model.encoder_name}, {len(manifest.class_names)} classes",
        highlight=False,
    )


def _print_wait(placement: Placement, settings: SegmentSettings, capacity: Capacity, console: Console) -> None:
    line = describe_wait(capacity, "predictor", placement.needs, placement.num_predictors)
    if settings.num_predictors and placement.num_predictors < settings.num_predictors:
        line = (
            f"segment.num_predictors: {settings.num_predictors} asked for, there can be {placement.num_predictors}: "
            f"{capacity.describe()}"
        )
    if line:
        console.print(line, highlight=False)


def _count_resources(settings: SegmentSettings) -> tuple[float, float]:
    """Return the CPUs and GPUs that a run needs at least: every predictor, and beside them decoding and writing."""
    if settings.num_gpus_per_predictor:
        num_predictors = settings.num_predictors or 1
    else:
        num_predictors = settings.num_predictors or count_cores()
    return num_predictors + 2, num_predictors * settings.num_gpus_per_predictor


def print_outcome(outcome: SegmentOutcome, console: Console) -> None:
    """Print the summary as a table, the errors by kind, and where everything lies."""
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
    console.print(f"{outcome.num_ok} images segmented, {num_errors} not{kinds and f' ({kinds})'}", highlight=False)
    for name in ("images/", "summary.parquet", "report.html"):
        console.print(f"{name:<24}{join_uri(outcome.output_uri, name)}", highlight=False)


def require_few_errors(outcome: SegmentOutcome, settings: SegmentSettings) -> None:
    """Say by the exit code that a finished run has too many error rows; all rows are written all the same.

    Raises:
        TooManyErrorRows: Their share has reached ``max_error_fraction``.
    """
    num_errors = sum(outcome.errors.values())
    num_images = outcome.num_ok + num_errors
    if num_errors and num_errors >= settings.max_error_fraction * num_images:
        raise TooManyErrorRows(
            f"{num_errors} of {num_images} images are error rows ({num_errors / num_images:.1%}), the limit is "
            f"{settings.max_error_fraction:.1%} (segment.max_error_fraction); all rows are written. Mend the images, "
            "call again with --set segment.retry_errors=true, or raise the limit"
        )

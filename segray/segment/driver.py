"""From a bundle and a folder of images to a finished run folder; calling it again goes on, or finds it finished."""

from dataclasses import dataclass, replace

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from segray.bundle import BundleManifest, load_manifest, read_weights
from segray.cluster import connect_ray
from segray.config import SegmentSettings
from segray.progress import build_bar
from segray.segment.plan import (
    build_plan,
    compute_plan_sha256,
    count_fragments,
    list_finished_fragments,
    save_plan,
)
from segray.segment.report import build_report
from segray.segment.run import Fingerprint, read_run, require_same_run, save_run, write_if_changed
from segray.segment.summary import Tally, build_summary, format_cell, format_summary_parquet, tally_fragments
from segray.storage import join_uri, list_names, normalize_uri

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


@dataclass(frozen=True)
class SegmentJob:
    """What to segment, with what, and where to.

    Attributes:
        masks_uri: Ground truth, paired by path without extension; None to segment without scoring.
    """

    bundle_uri: str
    images_uri: str
    output_uri: str
    masks_uri: str | None
    settings: SegmentSettings

    @property
    def inputs(self) -> dict[str, str | None]:
        """The URIs that are read."""
        return {"bundle": self.bundle_uri, "images": self.images_uri, "masks": self.masks_uri}

    def normalize(self) -> "SegmentJob":
        """Return the job with each URI in its one spelling."""
        return replace(
            self,
            bundle_uri=normalize_uri(self.bundle_uri),
            images_uri=normalize_uri(self.images_uri),
            output_uri=normalize_uri(self.output_uri),
            masks_uri=None if self.masks_uri is None else normalize_uri(self.masks_uri),
        )


@dataclass(frozen=True)
class SegmentOutcome:
    """A finished run."""

    output_uri: str
    num_ok: int
    errors: dict[str, int]
    summary: pa.Table


def run_segmentation(job: SegmentJob, console: Console) -> SegmentOutcome:
    """Segment every image, connecting to Ray if there is anything left to do.

    Raises:
        SegrayError: The input is unusable, the output belongs to another run, or the world failed. What was finished
            stays, and the same call goes on from there.
    """
    job = job.normalize()
    manifest, bundle_sha256 = load_manifest(job.bundle_uri)
    output = job.output_uri
    with console.status("listing images"):
        plan = build_plan(job.images_uri, job.masks_uri, job.settings)
        fingerprint = Fingerprint(bundle_sha256, _describe_config(job), compute_plan_sha256(plan))
    run = read_run(output)
    finished = list_finished_fragments(output)
    require_same_run(run, fingerprint, output, has_rows=bool(finished))
    num_fragments = count_fragments(plan)
    pending = sorted(set(range(num_fragments)) - finished)
    if pending:
        read_weights(job.bundle_uri, manifest)  # here, for one clear line before anything is written or started
    if run is None:
        save_plan(output, plan)
        save_run(output, fingerprint, job.inputs, status="running", counts={"planned": len(plan)})
    if pending:
        _run_pending(job, manifest, fingerprint, plan, pending, console)
    tally = tally_fragments(output, range(num_fragments), manifest.classes.num_classes)
    summary = build_summary(tally, manifest.classes)
    is_complete = run is not None and run["status"] == "complete" and list_names(output) >= _RESULTS
    if pending or not is_complete:
        _finish(output, plan, tally, summary, manifest)
        counts = {"planned": len(plan), "ok": tally.num_ok, "errors": dict(sorted(tally.errors.items()))}
        save_run(output, fingerprint, job.inputs, status="complete", counts=counts)
    return SegmentOutcome(output, tally.num_ok, dict(sorted(tally.errors.items())), summary)


def _describe_config(job: SegmentJob) -> dict[str, object]:
    return {**job.settings.of_rows, "ground_truth": job.masks_uri is not None}


def _run_pending(
    job: SegmentJob,
    manifest: BundleManifest,
    fingerprint: Fingerprint,
    plan: pa.Table,
    pending: list[int],
    console: Console,
) -> None:
    images_of = plan["fragment"].value_counts()
    num_images = dict(zip(images_of.field("values").to_pylist(), images_of.field("counts").to_pylist(), strict=True))
    num_pending = sum(num_images[fragment] for fragment in pending)
    console.print(
        f"segmenting {num_pending} of {len(plan)} images in {len(pending)} fragments, "
        f"{job.settings.num_predictors} predictor{'s' if job.settings.num_predictors > 1 else ''} "
        f"on {'GPU' if job.settings.num_gpus_per_predictor else 'CPU'} ({job.settings.precision}), "
        f"{manifest.model.arch}/{manifest.model.encoder_name}, {len(manifest.class_names)} classes",
        highlight=False,
    )
    num_errors = 0
    with build_bar(console, "images") as bar:
        task = bar.add_task("segment", total=num_pending, note="starting")
        with connect_ray(*_count_resources(job.settings)):
            from segray.segment.pipeline import run_pipeline  # 6 s of imports: not before the input has been looked at

            for done in run_pipeline(
                pending,
                output_uri=job.output_uri,
                bundle_uri=job.bundle_uri,
                plan_sha256=fingerprint.plan_sha256,
                bundle_sha256=fingerprint.bundle_sha256,
                manifest=manifest,
                settings=job.settings,
                has_truth=job.masks_uri is not None,
            ):
                num_errors += done["num_errors"]
                bar.update(task, advance=done["num_ok"] + done["num_errors"], note=f"{num_errors} errors")


def _count_resources(settings: SegmentSettings) -> tuple[float, float]:
    """Return the CPUs and GPUs that a run needs at least: every predictor, and beside them decoding and writing."""
    return settings.num_predictors + 2, settings.num_predictors * settings.num_gpus_per_predictor


def _finish(output: str, plan: pa.Table, tally: Tally, summary: pa.Table, manifest: BundleManifest) -> None:
    write_if_changed(join_uri(output, "summary.parquet"), format_summary_parquet(summary))
    report = build_report(output, plan, summary, tally, manifest.classes)
    write_if_changed(join_uri(output, "report.html"), report)


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

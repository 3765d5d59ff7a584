"""Summarises a run: one row per class, with scores computed from summed pixel counts."""

import io
import math
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet as pq

from segray.data.classes import ClassMap
from segray.errors import MissingFileError
from segray.metrics import (
    PixelCounts,
    compute_dice,
    compute_iou,
    compute_precision,
    compute_recall,
    to_nullable,
)
from segray.results.counts import Tally, tally_counts
from segray.results.saved_counts import Written, load_counts, load_outcomes, read_fragments
from segray.runs.plan import Plan, get_fragment_uri
from segray.runs.written import list_written_fragments
from segray.schema import SUMMARY_SCHEMA
from segray.storage import join_uri, read_columns


@dataclass(frozen=True)
class FinishedRun:
    """A run whose rows are all written, with the sums over them.

    Attributes:
        output_uri: The run folder.
        plan: The plan of the run.
        classes: Classes of the model.
        counts: Counts of every fragment, a table of ``COUNTS_SCHEMA``.
        tally: Sums over the rows.
        summary: One row per class, a table of ``SUMMARY_SCHEMA``.
    """

    output_uri: str
    plan: Plan
    classes: ClassMap
    counts: pa.Table
    tally: Tally
    summary: pa.Table


def summarize_run(output_uri: str, plan: Plan, classes: ClassMap) -> FinishedRun:
    """Summarise a run whose fragments are all written, from their counts; rows without saved counts are read.

    Raises:
        StorageError: A fragment is missing or damaged, or the store refused the request or failed.
    """
    written = list_written_fragments(output_uri, plan.num_fragments)
    missing = next((fragment for fragment in range(plan.num_fragments) if fragment not in written), None)
    if missing is not None:
        raise MissingFileError(
            f"{get_fragment_uri(output_uri, missing)} was removed during the run; to write it again, rerun the same "
            "command"
        )
    counts = load_counts(output_uri, written, classes.num_classes)
    tally = tally_counts(counts, classes.num_classes)
    return FinishedRun(output_uri, plan, classes, counts, tally, build_summary(tally, classes))


def find_error_rows(output_uri: str, written: Written) -> dict[int, list[str]]:
    """Return the URIs of the error rows by fragment, for the fragments that have any."""
    fragments = list_fragments_with_errors(load_outcomes(output_uri, written))
    tables = read_fragments(output_uri, fragments, ["uri", "error_kind"])
    return {
        fragment: rows.filter(pc.is_valid(rows["error_kind"]))["uri"].to_pylist()
        for fragment, rows in zip(fragments, tables, strict=True)
    }


def list_fragments_with_errors(counts: pa.Table) -> list[int]:
    """Return the fragments that have error rows, of a table with the columns ``fragment`` and ``errors``."""
    fragments: list[int] = counts.filter(pc.greater(pc.list_value_length(counts["errors"]), 0))["fragment"].to_pylist()
    return fragments


def build_summary(tally: Tally, classes: ClassMap) -> pa.Table:
    """Return the summary of a run as a table of ``SUMMARY_SCHEMA``; scores are null without ground truth."""
    counts = PixelCounts(tally.sums["tp_px"], tally.sums["fp_px"], tally.sums["fn_px"])
    no_truth = [None] * classes.num_classes
    columns = {
        "class_id": range(classes.num_classes),
        "class_name": classes.names,
        "image_count": tally.image_count,
        "pixel_count": tally.sums["pixel_count"],
        **{name: values if tally.has_truth else no_truth for name, values in counts._asdict().items()},
        "dataset_iou": to_nullable(compute_iou(counts)),
        "dataset_dice": to_nullable(compute_dice(counts)),
        "precision": to_nullable(compute_precision(counts)),
        "recall": to_nullable(compute_recall(counts)),
        "mean_image_iou": _compute_mean_scores(tally, "iou"),
        "mean_image_dice": _compute_mean_scores(tally, "dice"),
    }
    arrays = [pa.array(columns[column.name], type=column.type) for column in SUMMARY_SCHEMA]
    return pa.table(arrays, schema=SUMMARY_SCHEMA)


def _compute_mean_scores(tally: Tally, name: str) -> list[float | None]:
    """Return the mean of ``iou`` or ``dice`` over images for each class; None if no image has one.

    The sums of fragments are added by ``math.fsum``, so the result does not depend on their order.
    """
    sums = [math.fsum(parts) for parts in tally.score_sums[name].T.tolist()]
    return [total / int(n) if n else None for total, n in zip(sums, tally.score_counts[name], strict=True)]


def load_summary(output_uri: str) -> pa.Table:
    """Return the saved summary of a run, a table of ``SUMMARY_SCHEMA``.

    Raises:
        MissingFileError: The run is not complete.
    """
    try:
        return read_columns(join_uri(output_uri, "summary.parquet"))
    except MissingFileError as error:
        raise MissingFileError(
            f"{output_uri}: the run is not complete, so it has no summary; to resume, rerun the same command"
        ) from error


def format_summary_parquet(summary: pa.Table) -> bytes:
    """Return the content of ``summary.parquet``."""
    buffer = io.BytesIO()
    pq.write_table(summary, buffer, compression="zstd")
    return buffer.getvalue()


def format_cell(value: object) -> str:
    """Return a value of the summary as text: four decimals for floats, a dash for null."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)

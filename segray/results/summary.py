"""Summarises a run: one row per class, with scores computed from summed pixel counts."""

import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet as pq

from segray.data.classes import ClassMap
from segray.metrics import (
    FloatArray,
    PixelCounts,
    compute_dice,
    compute_iou,
    compute_precision,
    compute_recall,
    to_nullable,
)
from segray.runs.plan import Plan, get_fragment_uri
from segray.schema import SUMMARY_SCHEMA
from segray.storage import read_columns

_NUM_READERS = 8
_READ_AHEAD = 256  # maximum number of fragments whose columns are in memory at a time
_COUNTS = ("pixel_count", "tp_px", "fp_px", "fn_px")
_SCORES = ("iou", "dice")
_COLUMNS = ["error_kind", *_COUNTS, *_SCORES]


@dataclass
class Tally:
    """Sums over the rows of a run. Counts are exact; scores are summed per fragment, and these sums by ``math.fsum``.

    Attributes:
        num_classes: Number of classes C.
        num_ok: Number of ``ok`` rows.
        has_truth: Whether any row has scores.
        errors: Number of error rows by kind.
        image_count: (C,) int64: images in which the class was predicted.
        sums: (C,) int64 pixel counts by column: ``pixel_count``, ``tp_px``, ``fp_px``, ``fn_px``.
        score_sums: (C,) float64 sums of ``iou`` and ``dice``, one for each fragment.
        score_counts: (C,) int64: images that have this score.
    """

    num_classes: int
    num_ok: int = 0
    has_truth: bool = False
    errors: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.image_count = np.zeros(self.num_classes, np.int64)
        self.sums = {name: np.zeros(self.num_classes, np.int64) for name in _COUNTS}
        self.score_sums: dict[str, list[FloatArray]] = {name: [] for name in _SCORES}
        self.score_counts = {name: np.zeros(self.num_classes, np.int64) for name in _SCORES}

    def add(self, rows: pa.Table) -> None:
        """Add the rows of one fragment."""
        kinds = rows["error_kind"]
        self.errors.update(kind for kind in kinds.to_pylist() if kind is not None)
        self.num_ok += kinds.null_count
        for name in _COUNTS:
            self.sums[name] += self._stack(rows[name]).astype(np.int64).sum(axis=0)
        self.image_count += (self._stack(rows["pixel_count"]) > 0).sum(axis=0)
        self.has_truth |= rows["tp_px"].null_count < len(rows)
        for name in _SCORES:
            scores = self._stack(rows[name]).astype(np.float64)
            self.score_sums[name].append(np.nansum(scores, axis=0))
            self.score_counts[name] += (~np.isnan(scores)).sum(axis=0)

    def compute_mean_scores(self, name: str) -> list[float | None]:
        """Return the mean of ``iou`` or ``dice`` over images for each class; None if no image has one."""
        sums = [math.fsum(parts) for parts in zip(*self.score_sums[name], strict=True)]
        return [total / int(n) if n else None for total, n in zip(sums, self.score_counts[name], strict=True)]

    def _stack(self, column: pa.ChunkedArray) -> np.ndarray[tuple[int, ...], np.dtype[Any]]:
        """Return the non-null lists of a list column as an array (n, C); null entries become NaN."""
        values = column.drop_null().combine_chunks().flatten().to_numpy(zero_copy_only=False)
        stacked: np.ndarray[tuple[int, ...], np.dtype[Any]] = values.reshape(-1, self.num_classes)
        return stacked


@dataclass(frozen=True)
class FinishedRun:
    """A run whose rows are all written, with the sums over them.

    Attributes:
        output_uri: The run folder.
        plan: The plan of the run.
        classes: Classes of the model.
        tally: Sums over the rows.
        summary: One row per class, a table of ``SUMMARY_SCHEMA``.
    """

    output_uri: str
    plan: Plan
    classes: ClassMap
    tally: Tally
    summary: pa.Table


def summarize_run(output_uri: str, plan: Plan, classes: ClassMap) -> FinishedRun:
    """Read the rows of a run whose fragments are all written, and summarise them.

    Raises:
        StorageError: A fragment is missing or damaged, or the store refused the request or failed.
    """
    tally = tally_fragments(output_uri, range(plan.num_fragments), classes.num_classes)
    return FinishedRun(output_uri, plan, classes, tally, build_summary(tally, classes))


def tally_fragments(output_uri: str, fragments: Iterable[int], num_classes: int) -> Tally:
    """Read the given fragments, without their masks, and return the sums over their rows."""
    tally = Tally(num_classes)
    for rows in _read_fragments(output_uri, fragments, _COLUMNS):
        tally.add(rows)
    return tally


def find_error_rows(output_uri: str, fragments: Iterable[int]) -> dict[int, list[str]]:
    """Return the URIs of the error rows by fragment, for the fragments that have any."""
    ordered = sorted(fragments)
    found = {}
    for fragment, rows in zip(ordered, _read_fragments(output_uri, ordered, ["uri", "error_kind"]), strict=True):
        uris = rows.filter(pc.is_valid(rows["error_kind"]))["uri"].to_pylist()
        if uris:
            found[fragment] = uris
    return found


def count_rows(output_uri: str, fragments: Iterable[int]) -> Counter[str]:
    """Return the number of rows by error kind; rows without an error are counted under ``ok``."""
    counts: Counter[str] = Counter()
    for rows in _read_fragments(output_uri, fragments, ["error_kind"]):
        counts.update(kind or "ok" for kind in rows["error_kind"].to_pylist())
    return counts


def _read_fragments(output_uri: str, fragments: Iterable[int], columns: list[str]) -> Iterator[pa.Table]:
    """Yield the given columns of each fragment, in order; several fragments are read at a time."""

    def read(fragment: int) -> pa.Table:
        return read_columns(get_fragment_uri(output_uri, fragment), columns)

    numbers = iter(fragments)
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        while group := list(islice(numbers, _READ_AHEAD)):
            yield from pool.map(read, group)


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
        "mean_image_iou": tally.compute_mean_scores("iou"),
        "mean_image_dice": tally.compute_mean_scores("dice"),
    }
    arrays = [pa.array(columns[column.name], type=column.type) for column in SUMMARY_SCHEMA]
    return pa.table(arrays, schema=SUMMARY_SCHEMA)


def format_summary_parquet(summary: pa.Table) -> bytes:
    """Return the content of ``summary.parquet``."""
    buffer = io.BytesIO()
    pq.write_table(summary, buffer, compression="zstd")
    return buffer.getvalue()


def read_rows(output_uri: str, fragment: int) -> pa.Table:
    """Return the rows of one fragment with all columns, as a table of ``IMAGES_SCHEMA``."""
    return read_columns(get_fragment_uri(output_uri, fragment))


def format_cell(value: object) -> str:
    """Return a value of the summary as text: four decimals for floats, a dash for null."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)

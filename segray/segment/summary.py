"""Rows to one summary row for each class. Counts are summed first, scores are computed from the sums."""

import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq

from segray.classes import ClassMap
from segray.metrics import (
    PixelCounts,
    compute_dice,
    compute_iou,
    compute_precision,
    compute_recall,
    to_nullable,
)
from segray.schema import IMAGES_SCHEMA, SUMMARY_SCHEMA
from segray.segment.plan import get_fragment_uri
from segray.storage import open_for_reading

_NUM_READERS = 8
_COUNTS = ("pixel_count", "tp_px", "fp_px", "fn_px")
_COLUMNS = ["error_kind", *_COUNTS, "iou", "dice"]


@dataclass
class Tally:
    """Sums over a run's rows, all of them exact: integers, and floats to be added by ``math.fsum``."""

    num_classes: int
    num_ok: int = 0
    has_truth: bool = False
    errors: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.image_count = np.zeros(self.num_classes, np.int64)
        self.sums = {name: np.zeros(self.num_classes, np.int64) for name in _COUNTS}
        self.scores: dict[str, list[list[float]]] = {
            name: [[] for _ in range(self.num_classes)] for name in ("iou", "dice")
        }

    def add(self, rows: pa.Table) -> None:
        """Count the rows of one fragment."""
        kinds = rows["error_kind"]
        self.errors.update(kind for kind in kinds.to_pylist() if kind is not None)
        self.num_ok += kinds.null_count
        for name in _COUNTS:
            self.sums[name] += self._stack(rows[name]).sum(axis=0, dtype=np.int64)
        self.image_count += (self._stack(rows["pixel_count"]) > 0).sum(axis=0)
        self.has_truth |= rows["tp_px"].null_count < len(rows)
        for name, per_class in self.scores.items():
            for image in rows[name].drop_null().to_pylist():
                for index, score in enumerate(image):
                    if score is not None:
                        per_class[index].append(score)

    def _stack(self, column: pa.ChunkedArray) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """Return a list column without its nulls as (n, C)."""
        values = column.drop_null().combine_chunks().flatten()
        return np.asarray(values.to_numpy(zero_copy_only=False), np.int64).reshape(-1, self.num_classes)


def tally_fragments(output_uri: str, fragments: Sequence[int], num_classes: int) -> Tally:
    """Read what was written, masks excepted, and sum it up."""
    tally = Tally(num_classes)
    for rows in _read_fragments(output_uri, fragments, _COLUMNS):
        tally.add(rows)
    return tally


def _read_fragments(output_uri: str, fragments: Sequence[int], columns: list[str]) -> Iterator[pa.Table]:
    def read(fragment: int) -> pa.Table:
        with open_for_reading(get_fragment_uri(output_uri, fragment)) as file:
            return pq.ParquetFile(file).read(columns=columns)

    with ThreadPoolExecutor(_NUM_READERS) as pool:
        yield from pool.map(read, fragments)


def build_summary(tally: Tally, classes: ClassMap) -> pa.Table:
    """Return the summary of a run, a table of ``SUMMARY_SCHEMA``; scores are null without ground truth."""
    counts = PixelCounts(tally.sums["tp_px"], tally.sums["fp_px"], tally.sums["fn_px"])
    means = {
        name: [math.fsum(scores) / len(scores) if scores else None for scores in per_class]
        for name, per_class in tally.scores.items()
    }
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
        "mean_image_iou": means["iou"],
        "mean_image_dice": means["dice"],
    }
    arrays = [pa.array(columns[column.name], type=column.type) for column in SUMMARY_SCHEMA]
    return pa.table(arrays, schema=SUMMARY_SCHEMA)


def format_summary_parquet(summary: pa.Table) -> bytes:
    """Return the content of ``summary.parquet``."""
    buffer = io.BytesIO()
    pq.write_table(summary, buffer, compression="zstd")
    return buffer.getvalue()


def read_rows(output_uri: str, fragment: int) -> pa.Table:
    """Return all columns of one fragment's rows."""
    return next(_read_fragments(output_uri, [fragment], IMAGES_SCHEMA.names))

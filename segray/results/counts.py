"""Counts of the rows of each fragment: all that summary, status and report need of the rows.

A fragment is counted when it is written, or from its file if no counts of it are saved.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from segray.metrics import FloatArray, IntArray

_PIXELS = ("pixel_count", "tp_px", "fp_px", "fn_px")
_SCORES = ("iou", "dice")
_INTEGERS, _FLOATS = pa.list_(pa.int64()), pa.list_(pa.float64())
# Lists have one element per class.
COUNTS_SCHEMA = pa.schema(
    [
        ("fragment", pa.int64()),
        ("size_bytes", pa.int64()),  # of the fragment's file; a file of another size has been replaced since.
        ("num_ok", pa.int64()),
        ("errors", pa.list_(pa.struct([("kind", pa.string()), ("count", pa.int64())]))),
        ("image_count", _INTEGERS),  # Images in which the class was predicted.
        ("pixel_count", _INTEGERS),
        # Null if no row has scores:
        *((name, _INTEGERS) for name in ("tp_px", "fp_px", "fn_px")),
        *((f"{name}_sum", _FLOATS) for name in _SCORES),
        *((f"{name}_count", _INTEGERS) for name in _SCORES),  # Images that have this score.
    ]
)
OUTCOME_COLUMNS = ["fragment", "size_bytes", "num_ok", "errors"]
COUNTED_COLUMNS = ["error_kind", *_PIXELS, *_SCORES]  # of ``IMAGES_SCHEMA``


def count_outcomes(fragment: int, rows: pa.Table) -> dict[str, Any]:
    """Return the columns of ``COUNTS_SCHEMA`` that say how many rows of a fragment are ok or errors.

    Args:
        fragment: Number of the fragment.
        rows: Its rows; the column ``error_kind`` is used.
    """
    kinds = rows["error_kind"]
    errors = Counter(kinds.drop_null().to_pylist())
    return {
        "fragment": fragment,
        "num_ok": kinds.null_count,
        "errors": [{"kind": kind, "count": count} for kind, count in sorted(errors.items())],
    }


def count_rows_of_fragment(fragment: int, rows: pa.Table, num_classes: int) -> dict[str, Any]:
    """Return the counts of a fragment: a row of ``COUNTS_SCHEMA`` without ``size_bytes``.

    Args:
        fragment: Number of the fragment.
        rows: Its rows; the columns ``COUNTED_COLUMNS`` of ``IMAGES_SCHEMA`` are used.
        num_classes: Number of classes C.
    """
    pixels = {name: _stack(rows[name], num_classes).astype(np.int64) for name in _PIXELS}
    sums = {name: counts.sum(axis=0).tolist() for name, counts in pixels.items()}
    counts = {
        **count_outcomes(fragment, rows),
        "image_count": (pixels["pixel_count"] > 0).sum(axis=0).tolist(),
        "pixel_count": sums["pixel_count"],
    }
    if rows["tp_px"].null_count == len(rows):
        return {**dict.fromkeys(COUNTS_SCHEMA.names), **counts}
    for name in _SCORES:
        scores = _stack(rows[name], num_classes).astype(np.float64)
        counts[f"{name}_sum"] = np.nansum(scores, axis=0).tolist()
        counts[f"{name}_count"] = (~np.isnan(scores)).sum(axis=0).tolist()
    return {**sums, **counts}


def _stack(column: pa.ChunkedArray, num_classes: int) -> npt.NDArray[Any]:
    """Return the non-null lists of a list column as an array (n, C); null entries become NaN."""
    values = column.drop_null().combine_chunks().flatten().to_numpy(zero_copy_only=False)
    stacked: npt.NDArray[Any] = values.reshape(-1, num_classes)
    return stacked


@dataclass(frozen=True)
class Tally:
    """Sums over the rows of a run. Counts are exact; scores are summed per fragment.

    Attributes:
        num_ok: Number of ``ok`` rows.
        errors: Number of error rows by kind.
        has_truth: Whether any row has scores.
        image_count: (C,) int64: images in which the class was predicted.
        sums: (C,) int64 pixel counts by column: ``pixel_count``, ``tp_px``, ``fp_px``, ``fn_px``.
        score_sums: (F, C) float64 sums of ``iou`` and ``dice`` over each of the F fragments that have scores.
        score_counts: (C,) int64: images that have this score.
    """

    num_ok: int
    errors: Counter[str]
    has_truth: bool
    image_count: IntArray
    sums: dict[str, IntArray]
    score_sums: dict[str, FloatArray]
    score_counts: dict[str, IntArray]


def tally_counts(counts: pa.Table, num_classes: int) -> Tally:
    """Return the sums over fragments.

    Args:
        counts: A table of ``COUNTS_SCHEMA``, each fragment once.
        num_classes: Number of classes C.
    """

    def add_up(name: str) -> IntArray:
        total: IntArray = _stack(counts[name], num_classes).astype(np.int64).sum(axis=0)
        return total

    return Tally(
        num_ok=int(counts["num_ok"].to_numpy().sum()),
        errors=add_errors(counts),
        has_truth=counts["tp_px"].null_count < len(counts),
        image_count=add_up("image_count"),
        sums={name: add_up(name) for name in _PIXELS},
        score_sums={name: _stack(counts[f"{name}_sum"], num_classes).astype(np.float64) for name in _SCORES},
        score_counts={name: add_up(f"{name}_count") for name in _SCORES},
    )


def add_errors(counts: pa.Table) -> Counter[str]:
    """Return the number of error rows by kind, over all fragments of a table with the column ``errors``."""
    total: Counter[str] = Counter()
    for error in counts["errors"].combine_chunks().flatten().to_pylist():
        total[error["kind"]] += error["count"]
    return total

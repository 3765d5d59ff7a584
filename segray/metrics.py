"""Compute scores from pixel counts. Undefined scores are NaN here and null in Parquet; means exclude them.

Counts are int64. A pixel of class c that is predicted as c is a true positive of c; predicted as d, it is a false
negative of c and a false positive of d. Pixels whose truth is ignored are not counted. IoU and Dice are computed from
counts summed over an image or a data set, never averaged over batches.

Sources of the formulas: Everingham et al., "The PASCAL Visual Object Classes Challenge", 2010 (IoU); Dice, "Measures of
the Amount of Ecologic Association Between Species", 1945.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class PixelCounts(NamedTuple):
    """Numbers of true positive, false positive and false negative pixels per class; each array is (..., C) int64."""

    tp_px: IntArray
    fp_px: IntArray
    fn_px: IntArray


def count_from_confusion(confusion: IntArray) -> PixelCounts:
    """Return the counts of a (..., C, C) confusion matrix: rows are true classes, columns are predicted classes."""
    tp_px = np.diagonal(confusion, axis1=-2, axis2=-1)
    return PixelCounts(tp_px, confusion.sum(axis=-2) - tp_px, confusion.sum(axis=-1) - tp_px)


def compute_iou(counts: PixelCounts) -> FloatArray:
    """Return tp / (tp + fp + fn) of each class, (..., C) in 0..1; NaN if a class is neither true nor predicted."""
    return divide(counts.tp_px, counts.tp_px + counts.fp_px + counts.fn_px)


def compute_dice(counts: PixelCounts) -> FloatArray:
    """Return 2 tp / (2 tp + fp + fn) of each class, (..., C) in 0..1; NaN if a class is neither true nor predicted."""
    return divide(2 * counts.tp_px, 2 * counts.tp_px + counts.fp_px + counts.fn_px)


def compute_precision(counts: PixelCounts) -> FloatArray:
    """Return tp / (tp + fp) of each class, (..., C) in 0..1; NaN if a class was never predicted."""
    return divide(counts.tp_px, counts.tp_px + counts.fp_px)


def compute_recall(counts: PixelCounts) -> FloatArray:
    """Return tp / (tp + fn) of each class, (..., C) in 0..1; NaN if a class is not in the truth."""
    return divide(counts.tp_px, counts.tp_px + counts.fn_px)


def compute_accuracy(confusion: IntArray) -> FloatArray:
    """Return the one-against-rest accuracy (tp + tn) / all of each class, (C,) in 0..1; NaN without scored pixels.

    What MMSegmentation calls accuracy is ``compute_recall`` here.

    Args:
        confusion: (C, C) confusion matrix.
    """
    counts = count_from_confusion(confusion)
    num_px = np.broadcast_to(confusion.sum(), counts.tp_px.shape)
    return divide(num_px - counts.fp_px - counts.fn_px, num_px)


def compute_defined_mean(scores: FloatArray) -> float:
    """Return the mean of the scores that are not NaN; NaN if there are none."""
    defined = scores[~np.isnan(scores)]
    return float(defined.mean()) if defined.size else float("nan")


def to_nullable(scores: FloatArray) -> list[float | None]:
    """Return scores as a list for Parquet and JSON, with None for NaN."""
    return [None if np.isnan(score) else float(score) for score in scores]


def divide(numerator: npt.NDArray[np.integer | np.floating], denominator: IntArray) -> FloatArray:
    """Return the elementwise quotient as float64; NaN where the denominator is 0."""
    result = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=result, where=denominator > 0)
    return result

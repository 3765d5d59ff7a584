"""Scores from counted pixels. Undefined is null (NaN here, null in Parquet), and means leave it out.

Counts are int64: a pixel of class c predicted as c is a true positive of c; predicted as d, it is a false negative of c
and a false positive of d. Pixels whose truth is ignored are counted nowhere. IoU and Dice are computed from counts
summed over whatever they describe (an image, a data set), never by averaging batches. Source of the formulas:
Everingham et al., "The PASCAL Visual Object Classes Challenge", 2010 (IoU); Dice, 1945.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class PixelCounts(NamedTuple):
    """True positive, false positive and false negative pixels of each class; each (..., C) int64."""

    tp_px: IntArray
    fp_px: IntArray
    fn_px: IntArray


def count_from_confusion(confusion: IntArray) -> PixelCounts:
    """Return the counts of a (..., C, C) confusion matrix: rows are the truth, columns the prediction."""
    tp_px = np.diagonal(confusion, axis1=-2, axis2=-1)
    return PixelCounts(tp_px, confusion.sum(axis=-2) - tp_px, confusion.sum(axis=-1) - tp_px)


def compute_iou(counts: PixelCounts) -> FloatArray:
    """Return tp / (tp + fp + fn) of each class, (..., C) in 0..1; NaN where the class is in neither truth nor mask."""
    return divide(counts.tp_px, counts.tp_px + counts.fp_px + counts.fn_px)


def compute_dice(counts: PixelCounts) -> FloatArray:
    """Return 2 tp / (2 tp + fp + fn) of each class, (..., C) in 0..1; NaN where the class is in neither."""
    return divide(2 * counts.tp_px, 2 * counts.tp_px + counts.fp_px + counts.fn_px)


def compute_precision(counts: PixelCounts) -> FloatArray:
    """Return tp / (tp + fp) of each class, (..., C) in 0..1; NaN where the class was never predicted."""
    return divide(counts.tp_px, counts.tp_px + counts.fp_px)


def compute_recall(counts: PixelCounts) -> FloatArray:
    """Return tp / (tp + fn) of each class, (..., C) in 0..1; NaN where the class is not in the truth."""
    return divide(counts.tp_px, counts.tp_px + counts.fn_px)


def compute_accuracy(confusion: IntArray) -> FloatArray:
    """Return (tp + tn) / all of each class against the rest, (C,) in 0..1, of a (C, C) confusion matrix.

    What MMSegmentation calls the accuracy of a class is its recall.
    """
    counts = count_from_confusion(confusion)
    num_px = np.broadcast_to(confusion.sum(), counts.tp_px.shape)
    return divide(num_px - counts.fp_px - counts.fn_px, num_px)


def compute_defined_mean(scores: FloatArray) -> float:
    """Return the mean of the scores that are defined; NaN if none is."""
    defined = scores[~np.isnan(scores)]
    return float(defined.mean()) if defined.size else float("nan")


def to_nullable(scores: FloatArray) -> list[float | None]:
    """Return scores as Parquet and JSON hold them: None for undefined."""
    return [None if np.isnan(score) else float(score) for score in scores]


def divide(numerator: npt.NDArray[np.integer | np.floating], denominator: IntArray) -> FloatArray:
    """Return the quotient, NaN where the denominator is 0."""
    result = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=result, where=denominator > 0)
    return result

"""Evaluate a validation split: each rank counts its share, counts are summed, and scores are computed from the sums.

This module needs neither Ray nor storage.
"""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import distributed, nn

from segray.data.classes import ClassMap
from segray.data.preprocessing import Preprocessing
from segray.metrics import (
    FloatArray,
    compute_accuracy,
    compute_defined_mean,
    compute_dice,
    compute_iou,
    compute_precision,
    compute_recall,
    count_from_confusion,
    divide,
    to_nullable,
)
from segray.models.confusion import compute_boundary_counts, compute_confusion
from segray.models.losses import SegmentationLoss
from segray.models.precision import autocast
from segray.models.prediction import compute_mask
from segray.training.worker.feed import EvalBatch

# Per-image scores are summed as integer multiples of 2^-36, so the sum does not depend on the order of summation. With
# int64 this is enough for 2^27 (134 million) images.
_FIXED_POINT = 2**36
# Losses are not bounded, so their whole part is summed too, and their fraction with fewer digits.
_LOSS_FRACTION = 2**32
NUM_EXTREMES = 4  # Number of best images, and of worst images, to report.


class ImageScore(NamedTuple):
    """Score of an image.

    Attributes:
        mean_iou: Mean IoU over the classes that occur in the ground truth or the predicted mask.
        number: Index of the image in its split.
    """

    mean_iou: float
    number: int


@dataclass(frozen=True)
class EvaluationCounts:
    """Counts of an evaluation; those of several ranks can be summed.

    Attributes:
        confusion: (C, C) int64 pixel counts; rows are the ground truth.
        boundary: (2, C) int64 pixel counts of the intersections and unions of boundaries.
        image_sums: (2, C) int64, sums of the defined IoU and Dice scores of images, in multiples of 2^-36.
        image_count: (C,) int64, numbers of images in which the scores are defined.
        worst: The images with the lowest scores, lowest first.
        best: The images with the highest scores, highest first.
        loss: (3, 2, T) int64, sums over images of each loss term and of the count that divides it: their whole parts,
            their fractions in multiples of 2^-32, and the number of images where they are not finite.
    """

    confusion: torch.Tensor
    boundary: torch.Tensor
    image_sums: torch.Tensor
    image_count: torch.Tensor
    worst: list[ImageScore]
    best: list[ImageScore]
    loss: torch.Tensor


class _Tally:
    """Accumulates the counts of images, on the device that computes them."""

    def __init__(self, classes: ClassMap, loss: SegmentationLoss, device: torch.device) -> None:
        self._classes, self._loss = classes, loss
        self._loss_sums = torch.zeros((3, 2, len(loss.term_weights)), dtype=torch.int64, device=device)
        zeros = torch.zeros((2, classes.num_classes), dtype=torch.int64, device=device)
        self._confusion = torch.zeros((classes.num_classes,) * 2, dtype=torch.int64, device=device)
        self._boundary, self._image_sums, self._image_count = zeros, zeros.clone(), zeros[0].clone()
        self._mean_ious: list[torch.Tensor] = []
        self._numbers: list[int] = []

    def add(self, number: int, truth: torch.Tensor, mask: torch.Tensor) -> None:
        """Add an image: its index in the split, and the ground truth and predicted mask, both (H, W) class indices."""
        num_classes, ignore_index = self._classes.num_classes, self._classes.ignore_index
        confusion = compute_confusion(truth, mask, num_classes, ignore_index)
        self._confusion += confusion
        self._boundary += compute_boundary_counts(truth, mask, num_classes, ignore_index)
        tp_px = confusion.diagonal()
        both_px = confusion.sum(0) + confusion.sum(1)  # Pixels of ground truth plus pixels of mask, so tp_px twice.
        is_defined = both_px > 0
        scores = torch.stack([tp_px / (both_px - tp_px).double(), 2 * tp_px / both_px.double()])
        self._image_sums += (scores.nan_to_num() * _FIXED_POINT).round().long()
        self._image_count += is_defined
        self._mean_ious.append(scores[0][is_defined].mean())
        self._numbers.append(number)

    def add_loss(self, logits_chw: torch.Tensor, target: torch.Tensor) -> None:
        """Add the loss of an image: its logits (C, H, W), and its ground truth (H, W) at the same size."""
        target_nhw = target.long()[None]
        sums = self._loss.sum(logits_chw[None], target_nhw).double()
        values = torch.stack([sums, self._loss.count(target_nhw)])
        whole = values.floor()
        parts = torch.stack([whole, ((values - whole) * _LOSS_FRACTION).round(), ~values.isfinite()])
        self._loss_sums += parts.nan_to_num(0, 0, 0).long()

    def finish(self) -> EvaluationCounts:
        """Return the counts of all images added."""
        pairs = zip(self._mean_ious, self._numbers, strict=True)
        scores = [ImageScore(float(score), number) for score, number in pairs]
        scores = [score for score in scores if not math.isnan(score.mean_iou)]
        return EvaluationCounts(
            self._confusion,
            self._boundary,
            self._image_sums,
            self._image_count,
            heapq.nsmallest(NUM_EXTREMES, scores),
            heapq.nlargest(NUM_EXTREMES, scores),
            self._loss_sums,
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[EvalBatch],
    *,
    classes: ClassMap,
    preprocessing: Preprocessing,
    loss: SegmentationLoss,
    precision: str,
) -> EvaluationCounts:
    """Evaluate this rank's share of a split; each mask is compared with the ground truth at the image's original size.

    Args:
        model: Maps (N, 3, H, W) to logits (N, C, H, W); it is left in evaluation mode.
        batches: The rank's batches, from ``iterate_evaluation``.
        classes: Classes, in the order of the logits' channels.
        preprocessing: Converts (N, H, W, 3) uint8 pixels to the model's input.
        loss: The training loss; it is computed at the size of the model's input, as in training.
        precision: ``bf16``, ``fp16`` or ``fp32``.
    """
    model.eval()
    device = next(model.parameters()).device
    tally = _Tally(classes, loss, device)
    for batch in batches:
        image_nchw = preprocessing.apply(batch.images.to(device, non_blocking=True))
        with autocast(device, precision):
            logits_nchw = model(image_nchw)
        targets = batch.targets.to(device, non_blocking=True)
        # Images beyond the last ground truth are padding.
        for logits_chw, target, truth, number in zip(logits_nchw, targets, batch.truths, batch.numbers, strict=False):
            tally.add_loss(logits_chw, target)
            mask = compute_mask(logits_chw, (truth.shape[0], truth.shape[1]))
            tally.add(number, torch.from_numpy(truth).to(device, non_blocking=True), mask)
    return tally.finish()


def add_over_ranks(counts: EvaluationCounts) -> EvaluationCounts:
    """Return the counts summed over all ranks; collective, and with the same result on every rank."""
    if not distributed.is_initialized():
        return counts
    for tensor in (counts.confusion, counts.boundary, counts.image_sums, counts.image_count, counts.loss):
        distributed.all_reduce(tensor)
    extremes: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(extremes, (counts.worst, counts.best))
    worst, best = ([score for pair in extremes for score in pair[side]] for side in (0, 1))
    return replace(counts, worst=heapq.nsmallest(NUM_EXTREMES, worst), best=heapq.nlargest(NUM_EXTREMES, best))


def compute_loss(counts: EvaluationCounts, loss: SegmentationLoss) -> float | None:
    """Return the loss of the whole split, computed as if it were one batch; None if it is not finite.

    The sums over images are exact, so it does not depend on the order of the images or on the rank that processed each.
    Only the sum over the pixels of an image is rounded, to float32, in an order that depends on the number of threads.
    """
    whole, fraction, num_infinite = counts.loss  # On the device of the loss.
    if num_infinite.any():
        return None
    sums, divisors = whole.double() + fraction.double() / _LOSS_FRACTION
    return float(loss.combine(sums, divisors))


def pool_scores(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the scores of several parts together, from the counts in the scores of each; no best and worst images."""
    names = ("val_confusion", "val_boundary_px", "val_image_sums", "val_image_count")
    confusion, boundary, image_sums, image_count = (
        torch.tensor([scores[name] for scores in parts], dtype=torch.int64).sum(0) for name in names
    )
    no_loss = torch.zeros((3, 2, 0), dtype=torch.int64)  # The loss of each part is not divided into its sums.
    return compute_scores(EvaluationCounts(confusion, boundary, image_sums, image_count, [], [], no_loss))


def compute_scores(counts: EvaluationCounts) -> dict[str, Any]:
    """Return validation scores by name, in the range 0 to 1.

    ``val_mean_iou``, the headline score, is the mean of ``val_dataset_iou`` over the classes where it is defined; the
    means of Dice, precision, recall, accuracy and boundary IoU are computed in the same way. ``val_image_iou`` is the
    mean over classes of ``val_mean_image_iou``. Lists have one value per class, None where undefined.
    """
    confusion = counts.confusion.cpu().numpy()
    pixels = count_from_confusion(confusion)
    boundary = counts.boundary.cpu().numpy()
    image_sums = counts.image_sums.cpu().numpy() / _FIXED_POINT
    image_count = counts.image_count.cpu().numpy()
    image_iou, image_dice = (divide(image_sums[side], image_count) for side in (0, 1))
    by_class: dict[str, tuple[str, FloatArray]] = {
        "val_mean_iou": ("val_dataset_iou", compute_iou(pixels)),
        "val_mean_dice": ("val_dataset_dice", compute_dice(pixels)),
        "val_mean_precision": ("val_precision", compute_precision(pixels)),
        "val_mean_recall": ("val_recall", compute_recall(pixels)),
        "val_mean_accuracy": ("val_accuracy", compute_accuracy(confusion)),
        "val_mean_boundary_iou": ("val_boundary_iou", divide(boundary[0], boundary[1])),
        "val_image_iou": ("val_mean_image_iou", image_iou),
        "val_image_dice": ("val_mean_image_dice", image_dice),
    }
    return {
        **{name: compute_defined_mean(values) for name, (_, values) in by_class.items()},
        "val_pixel_accuracy": float(pixels.tp_px.sum() / max(1, confusion.sum())),
        **{name: to_nullable(values) for name, values in by_class.values()},
        "val_confusion": confusion.tolist(),
        "val_boundary_px": boundary.tolist(),
        "val_image_sums": counts.image_sums.tolist(),
        "val_image_count": image_count.tolist(),
        "val_worst_images": [list(score) for score in counts.worst],
        "val_best_images": [list(score) for score in counts.best],
    }

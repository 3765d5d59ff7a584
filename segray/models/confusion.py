"""Counted pixels of a mask against its truth, on the device of both. All are integers: no order of adding matters."""

import torch
from torch.nn import functional

_BIN_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)  # the smaller, the faster
_BOUNDARY_SHARE = 0.02  # of the image's diagonal, the width of a boundary in the paper


def compute_confusion(truth: torch.Tensor, mask: torch.Tensor, num_classes: int, ignore_index: int) -> torch.Tensor:
    """Count pixels by true class (rows) and predicted class (columns).

    Args:
        truth: Class indices of any shape and integer dtype; ``ignore_index`` where not scored.
        mask: Predicted class indices, the same shape.
        num_classes: C.
        ignore_index: Truth that is counted nowhere.

    Returns:
        (C, C) int64.
    """
    num_bins = (num_classes + 1) * num_classes  # a row more, for what is not scored: to count is less than to take out
    dtype = next(dtype for dtype in _BIN_DTYPES if num_bins - 1 <= torch.iinfo(dtype).max)
    if truth.dtype == torch.uint16:  # above 255 classes; torch can do little with it
        truth = truth.to(torch.int32)
    row = truth.masked_fill(truth == ignore_index, num_classes).to(dtype)
    bins = row.mul_(num_classes).add_(mask.to(dtype))
    counts = torch.bincount(bins.flatten(), minlength=num_bins)
    return counts[: num_classes**2].reshape(num_classes, num_classes)


def compute_boundary_counts(
    truth: torch.Tensor, mask: torch.Tensor, num_classes: int, ignore_index: int
) -> torch.Tensor:
    """Count the pixels of both boundaries of each class, and of either.

    A class's boundary are its pixels no further than 2% of the image's diagonal from a pixel that is not of the class;
    outside of the image is not of any class. Pixels that are not scored are taken out of both boundaries at the end.

    Source: Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021; distances
    are of the square neighbourhood, as in its authors' code.

    Args:
        truth: (H, W) class indices of any integer dtype; ``ignore_index`` where not scored.
        mask: (H, W) predicted class indices.
        num_classes: C.
        ignore_index: Truth that is counted nowhere.

    Returns:
        (2, C) int64: intersections, unions.
    """
    truth, mask = truth.to(torch.int64), mask.to(torch.int64)
    height, width = truth.shape
    distance = max(1, round(_BOUNDARY_SHARE * (height**2 + width**2) ** 0.5))
    scored = truth != ignore_index
    counts = torch.zeros(2, num_classes, dtype=torch.int64, device=truth.device)
    there = torch.bincount(torch.cat([truth[scored], mask[scored]]), minlength=num_classes).nonzero().flatten()
    for index in there.tolist():
        of_truth, of_mask = (_find_boundary(indices == index, distance) & scored for indices in (truth, mask))
        counts[0, index] = (of_truth & of_mask).sum()
        counts[1, index] = (of_truth | of_mask).sum()
    return counts


def _find_boundary(region: torch.Tensor, distance: int) -> torch.Tensor:
    """Return the pixels of a region (H, W) that a square of side 2 * distance + 1 around them does not fit into it."""
    # the square's pixels are counted by sums over rectangles from the corner: as fast for any distance
    padded = functional.pad(region.to(torch.int32), (distance + 1, distance, distance + 1, distance))
    sums = padded.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
    side = 2 * distance + 1
    of_rows = sums[side:] - sums[:-side]
    in_square = of_rows[:, side:] - of_rows[:, :-side]
    return region & (in_square < side**2)

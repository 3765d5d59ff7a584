"""Count pixels of a predicted mask against its ground truth, on the device of the tensors.

All counts are integers, so they do not depend on the order of additions.
"""

import torch
from torch.nn import functional

_BIN_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)  # Smaller dtypes are faster.
_BOUNDARY_SHARE = 0.02  # The width of a boundary in the paper, as a share of the image's diagonal.


def compute_confusion(truth: torch.Tensor, mask: torch.Tensor, num_classes: int, ignore_index: int) -> torch.Tensor:
    """Count pixels by true class (rows) and predicted class (columns).

    Args:
        truth: Class indices of any shape and integer dtype; ``ignore_index`` where not scored.
        mask: Predicted class indices, of the same shape.
        num_classes: C.
        ignore_index: Truth value of pixels that are not counted.

    Returns:
        (C, C) int64.
    """
    # One more row counts the pixels that are not scored, which is faster than removing them first.
    num_bins = (num_classes + 1) * num_classes
    dtype = next(dtype for dtype in _BIN_DTYPES if num_bins - 1 <= torch.iinfo(dtype).max)
    if truth.dtype == torch.uint16:  # Masks of more than 255 classes; torch supports few operations on uint16.
        truth = truth.to(torch.int32)
    row = truth.masked_fill(truth == ignore_index, num_classes).to(dtype)
    bins = row.mul_(num_classes).add_(mask.to(dtype))
    counts = torch.bincount(bins.flatten(), minlength=num_bins)
    return counts[: num_classes**2].reshape(num_classes, num_classes)


def compute_boundary_counts(
    truth: torch.Tensor, mask: torch.Tensor, num_classes: int, ignore_index: int
) -> torch.Tensor:
    """Count, for each class, the pixels in the intersection and in the union of the two masks' boundaries.

    The boundary of a class consists of its pixels whose distance to a pixel that is not of the class, or to the outside
    of the image, is at most 2% of the image's diagonal. A pixel that is not scored belongs to no class in either mask,
    whatever is predicted there, and to no boundary: both boundaries follow its edge in the same way, so a correct mask
    has an IoU of 1.

    Source: Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021; distances
    use the square neighbourhood, as in the authors' code.

    Args:
        truth: (H, W) class indices of any integer dtype; ``ignore_index`` where not scored.
        mask: (H, W) predicted class indices.
        num_classes: C.
        ignore_index: Truth value of pixels that are not counted.

    Returns:
        (2, C) int64: intersections, then unions.
    """
    truth, mask = truth.to(torch.int64), mask.to(torch.int64)
    height, width = truth.shape
    distance = max(1, round(_BOUNDARY_SHARE * (height**2 + width**2) ** 0.5))
    scored = truth != ignore_index
    mask = mask.where(scored, ignore_index)
    counts = torch.zeros(2, num_classes, dtype=torch.int64, device=truth.device)
    present = torch.bincount(torch.cat([truth[scored], mask[scored]]), minlength=num_classes).nonzero().flatten()
    for index in present.tolist():
        in_truth, in_mask = (_find_boundary(indices == index, distance) for indices in (truth, mask))
        counts[0, index] = (in_truth & in_mask).sum()
        counts[1, index] = (in_truth | in_mask).sum()
    return counts


def _find_boundary(region: torch.Tensor, distance: int) -> torch.Tensor:
    """Return the pixels of a region (H, W) whose surrounding square of side 2 * distance + 1 exceeds the region."""
    # Pixels in the square are counted with a summed-area table, which takes the same time for any distance.
    padded = functional.pad(region.to(torch.int32), (distance + 1, distance, distance + 1, distance))
    sums = padded.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
    side = 2 * distance + 1
    row_sums = sums[side:] - sums[:-side]
    in_square = row_sums[:, side:] - row_sums[:, :-side]
    return region & (in_square < side**2)

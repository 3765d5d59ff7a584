"""Losses, each returned as a sum and a pixel count, so that the mean is over the global batch and not over a rank's."""

from typing import NamedTuple

import torch
from torch.nn import functional


class LossSum(NamedTuple):
    """Sum of a loss over scored pixels (float32 scalar, carries the gradient), and their number (int64 scalar)."""

    total: torch.Tensor
    num_scored_px: torch.Tensor


def compute_cross_entropy(logits_nchw: torch.Tensor, truth_nhw: torch.Tensor, ignore_index: int) -> LossSum:
    """Sum the cross-entropy over all pixels that are not ignored.

    A batch whose pixels are all ignored gives 0 and not NaN, as torch's own mean would.

    Args:
        logits_nchw: (N, C, H, W), any float dtype; the sum is taken in float32.
        truth_nhw: (N, H, W) int64 class indices, ``ignore_index`` where not scored.
        ignore_index: Class index that is not learned from.
    """
    total = functional.cross_entropy(logits_nchw.float(), truth_nhw, ignore_index=ignore_index, reduction="sum")
    return LossSum(total, (truth_nhw != ignore_index).sum())

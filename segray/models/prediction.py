"""Logits at the model's size to masks, statistics and counts at the image's own size, on the logits' device.

All sums are of integers, so that no order of additions, no number of threads and no GPU's atomics can change a bit.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn import functional

# Logits at an image's own size are made in bands of rows of at most this many values: 256 MiB in float32.
MAX_BAND_VALUES = 2**26
_CONFIDENCE_STEPS = 2**24  # confidences are summed as multiples of 2^-24, float32's own resolution below 1


class Prediction(NamedTuple):
    """What a model says of one image.

    Attributes:
        mask: (H, W) int64 class indices.
        pixel_count: (C,) int64.
        confidence_sum: (C,) float64: softmax probability of the predicted class, summed over its pixels.
        entropy_sum: Scalar float64: entropy of the softmax in nats, summed over all pixels.
    """

    mask: torch.Tensor
    pixel_count: torch.Tensor
    confidence_sum: torch.Tensor
    entropy_sum: torch.Tensor


def compute_mask(logits_chw: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the argmax (H, W) int64 of the logits resized (bilinear) to ``size`` (height, width)."""
    return torch.cat([band.argmax(0) for band in iterate_bands(logits_chw, size)])


def predict_image(logits_chw: torch.Tensor, size: tuple[int, int]) -> Prediction:
    """Return mask and statistics of the logits (C, h, w) resized (bilinear) to ``size`` (height, width)."""
    num_classes = logits_chw.shape[0]
    confidence = torch.zeros(num_classes, dtype=torch.int64, device=logits_chw.device)
    pixel_count = torch.zeros_like(confidence)
    entropy = torch.zeros((), dtype=torch.int64, device=logits_chw.device)
    masks = []
    for band in iterate_bands(logits_chw, size):
        log_probability = band.log_softmax(0)
        probability = log_probability.exp()
        highest, _ = probability.max(0)
        mask = band.argmax(0)
        steps = (highest * _CONFIDENCE_STEPS).round().to(torch.int64)
        confidence.scatter_add_(0, mask.flatten(), steps.flatten())
        pixel_count += torch.bincount(mask.flatten(), minlength=num_classes)
        pixel_entropy = -(probability * log_probability).sum(0)
        entropy += (pixel_entropy * _CONFIDENCE_STEPS).round().to(torch.int64).sum()
        masks.append(mask)
    return Prediction(
        torch.cat(masks), pixel_count, confidence.double() / _CONFIDENCE_STEPS, entropy.double() / _CONFIDENCE_STEPS
    )


def iterate_bands(logits_chw: torch.Tensor, size: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Yield float32 logits (C, rows, W), resized bilinearly to ``size``, from top to bottom."""
    num_classes, in_height, _ = logits_chw.shape
    height, width = size
    logits_chw = logits_chw.float()
    band_rows = max(1, MAX_BAND_VALUES // (num_classes * width))
    if band_rows >= height:
        yield _resize(logits_chw, size)
        return
    # Bilinear resizing is separable: mix the two source rows of each target row, then stretch the band to its width.
    source = ((torch.arange(height, device=logits_chw.device) + 0.5) * (in_height / height) - 0.5).clamp(min=0)
    above = source.long().clamp(max=in_height - 1)
    below = (above + 1).clamp(max=in_height - 1)
    weight = (source - above).clamp(0, 1)[:, None]
    for top in range(0, height, band_rows):
        rows = slice(top, top + band_rows)
        mixed = logits_chw[:, above[rows]] * (1 - weight[rows]) + logits_chw[:, below[rows]] * weight[rows]
        yield _resize(mixed, (mixed.shape[1], width))


def _resize(logits_chw: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return functional.interpolate(logits_chw[None], size=size, mode="bilinear", align_corners=False)[0]

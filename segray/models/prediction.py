"""Logits at the model's size to masks, statistics and counts at the image's own size, on the logits' device.

All sums are exact, so that no order of additions, no number of threads and no GPU's atomics can change a bit.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn import functional

# Logits at an image's own size are made in bands of rows of at most this many values: on a processor half a MiB in
# float32, which its cache holds from one operation to the next, elsewhere 256 MiB, so that calls are few.
MAX_BAND_VALUES = {"cpu": 2**17}
_MAX_BAND_VALUES_ELSEWHERE = 2**26
# Confidence and entropy are summed as multiples of 2^-24, float32's own resolution below 1: in float64 that is exact up
# to 2^29 pixels, in whatever order they are added.
_STEPS = 2**24


class Prediction(NamedTuple):
    """What a model says of one image.

    Attributes:
        mask: (H, W) class indices, uint8, or int32 above 256 classes.
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
    num_classes, device = logits_chw.shape[0], logits_chw.device
    pixel_count = torch.zeros(num_classes, dtype=torch.int64, device=device)
    confidence = torch.zeros(num_classes, dtype=torch.float64, device=device)
    entropy = torch.zeros((), dtype=torch.int64, device=device)
    masks = []
    for band in iterate_bands(logits_chw, size):
        highest, mask = band.max(0)
        # softmax(z) = exp(z - highest) / total, of which the highest is 1 / total; the entropy is
        # -sum(p log p) = log(total) - sum(exp(z - highest) (z - highest)) / total
        below = band.sub_(highest)
        exponential = below.exp()
        total = exponential.sum(0)
        steps = total.reciprocal().mul_(_STEPS).round_()
        flat = mask.flatten()
        pixel_count += torch.bincount(flat, minlength=num_classes)
        confidence += torch.bincount(flat, steps.flatten().double(), minlength=num_classes)
        pixel_entropy = total.log().sub_(exponential.mul_(below).sum(0).div_(total))
        entropy += pixel_entropy.mul_(_STEPS).round_().to(torch.int64).sum()
        masks.append(mask.to(torch.uint8 if num_classes <= 256 else torch.int32))
    return Prediction(torch.cat(masks), pixel_count, confidence / _STEPS, entropy.double() / _STEPS)


def iterate_bands(logits_chw: torch.Tensor, size: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Yield float32 logits (C, rows, W), resized bilinearly to ``size``, from top to bottom; they may be written to."""
    num_classes, in_height, in_width = logits_chw.shape
    height, width = size
    logits_chw = logits_chw.float().contiguous()
    max_values = MAX_BAND_VALUES.get(logits_chw.device.type, _MAX_BAND_VALUES_ELSEWHERE)
    band_rows = max(1, max_values // (num_classes * width))
    # Bilinear resizing is separable: mix the two source rows of each target row, then stretch the band to its width.
    source = ((torch.arange(height, device=logits_chw.device) + 0.5) * (in_height / height) - 0.5).clamp(min=0)
    above = source.long().clamp(max=in_height - 1)
    below = (above + 1).clamp(max=in_height - 1)
    weight = (source - above).clamp(0, 1)[:, None]
    for top in range(0, height, band_rows):
        rows = slice(top, top + band_rows)
        mixed = torch.lerp(logits_chw[:, above[rows]], logits_chw[:, below[rows]], weight[rows])
        yield mixed if width == in_width else _stretch(mixed, width)


def _stretch(logits_chw: torch.Tensor, width: int) -> torch.Tensor:
    size = (logits_chw.shape[1], width)
    return functional.interpolate(logits_chw[None], size=size, mode="bilinear", align_corners=False)[0]

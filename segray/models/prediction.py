"""Logits at the model's size to masks, statistics and counts at the image's own size, on the logits' device.

All sums are exact, so that no order of additions, no number of threads and no GPU's atomics can change a bit.
"""

import math
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
_BITS_PER_NAT = 1 / math.log(2)


class Prediction(NamedTuple):
    """What a model says of one image.

    Attributes:
        mask: (H, W) class indices, uint8, or int32 above 256 classes.
        pixel_count: (C,) int64.
        confidence_sum: (C,) float64: softmax probability of the predicted class, summed over its pixels.
        entropy_sum: Scalar float64: entropy of the softmax in nats, summed over all pixels. Like confidence not a
            number where a logit is not finite.
    """

    mask: torch.Tensor
    pixel_count: torch.Tensor
    confidence_sum: torch.Tensor
    entropy_sum: torch.Tensor


def compute_mask(logits_chw: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the argmax (H, W) int64 of the logits resized (bilinear) to ``size`` (height, width)."""
    return torch.cat([_find_highest(band.sub_(band.amax(0))).long() for band in iterate_bands(logits_chw, size)])


def predict_image(logits_chw: torch.Tensor, size: tuple[int, int]) -> Prediction:
    """Return mask and statistics of the logits (C, h, w) resized (bilinear) to ``size`` (height, width).

    On a GPU it is queued: nothing here waits for a result. Image by image, as no bit may depend on its neighbours.
    """
    num_classes, device = logits_chw.shape[0], logits_chw.device
    pixel_count = torch.zeros(num_classes, dtype=torch.int64, device=device)
    confidence = torch.zeros(num_classes, dtype=torch.float64, device=device)
    entropy = torch.zeros((), dtype=torch.float64, device=device)
    masks = []
    for band in iterate_bands(logits_chw, size):
        below = band.sub_(band.amax(0))
        mask = _find_highest(below)
        # softmax(z) = exp(z - highest) / total, of which the highest is 1 / total; the entropy is
        # -sum(p log p) = log(total) - sum(exp(z - highest) (z - highest)) / total. In powers of 2, which take a
        # quarter of the time.
        bits = below.mul_(_BITS_PER_NAT)
        exponential = bits.exp2()
        total = exponential.sum(0)
        steps = total.reciprocal().mul_(_STEPS).round_()
        count, steps_sum = (sum_by_bin if device.type == "cpu" else sum_by_comparing)(mask, steps, num_classes)
        pixel_count += count
        confidence += steps_sum
        pixel_entropy = total.log2().sub_(exponential.mul_(bits).sum(0).div_(total))
        entropy += pixel_entropy.mul_(_STEPS / _BITS_PER_NAT).round_().sum(dtype=torch.float64)
        masks.append(mask.to(torch.uint8 if num_classes <= 256 else torch.int32))
    return Prediction(torch.cat(masks), pixel_count, confidence / _STEPS, entropy / _STEPS)


def sum_by_bin(mask: torch.Tensor, values: torch.Tensor, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the pixels (H, W) of each class, (C,) int64, and add up their values, (C,) float64."""
    flat = mask.flatten()
    count = torch.bincount(flat, minlength=num_classes)
    return count, torch.bincount(flat, values.flatten().double(), minlength=num_classes)


def sum_by_comparing(mask: torch.Tensor, values: torch.Tensor, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Do as ``sum_by_bin`` on a GPU, where that would wait for all that is queued, to learn how many bins there are."""
    is_class = mask == torch.arange(num_classes, device=mask.device)[:, None, None]
    return is_class.sum((1, 2)), torch.where(is_class, values, 0).sum((1, 2), dtype=torch.float64)


def _find_highest(below_chw: torch.Tensor) -> torch.Tensor:
    """Return the lowest index (H, W) of those that are 0, given logits less the highest of their pixel.

    A fortieth of the time of torch's argmax over the first dimension. Where nothing is 0, for a logit is not finite, it
    is the last index.
    """
    num_classes = below_chw.shape[0]
    dtype = torch.uint8 if num_classes <= 128 else torch.int32
    indices = torch.arange(num_classes, dtype=dtype, device=below_chw.device)[:, None, None]
    # all others, which are true, come after the last index
    is_other = below_chw.bool().view(torch.uint8).to(dtype)
    return is_other.mul_(num_classes).add_(indices).amin(0).clamp_(max=num_classes - 1)


def iterate_bands(logits_chw: torch.Tensor, size: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Yield float32 logits (C, rows, W), resized bilinearly to ``size``, from top to bottom; they may be written to."""
    num_classes, in_height, in_width = logits_chw.shape
    height, width = size
    device = logits_chw.device
    max_values = MAX_BAND_VALUES.get(device.type, _MAX_BAND_VALUES_ELSEWHERE)
    band_rows = max(1, max_values // (num_classes * width))
    # Bilinear resizing is separable: mix the two source rows of each target row, then stretch the band to its width.
    source = ((torch.arange(height) + 0.5) * (in_height / height) - 0.5).clamp(min=0)
    above = source.long().clamp(max=in_height - 1)
    below = (above + 1).clamp(max=in_height - 1)
    weight = (source - above).clamp(0, 1)[:, None]
    for top in range(0, height, band_rows):
        rows = slice(top, min(top + band_rows, height))
        first, last = int(above[top]), int(below[rows.stop - 1])
        part = logits_chw[:, first : last + 1].to(torch.float32, memory_format=torch.contiguous_format)
        parts = (above[rows] - first, below[rows] - first, weight[rows])
        upper, lower, share = (values.to(device, non_blocking=True) for values in parts)
        mixed = part.index_select(1, upper).lerp_(part.index_select(1, lower), share)
        yield mixed if width == in_width else _stretch(mixed, width)


def _stretch(logits_chw: torch.Tensor, width: int) -> torch.Tensor:
    size = (logits_chw.shape[1], width)
    return functional.interpolate(logits_chw[None], size=size, mode="bilinear", align_corners=False)[0]

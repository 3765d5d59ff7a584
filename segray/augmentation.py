"""Random changes of training samples, image and mask together.

Every change is drawn from the generator that is given, never from torch's own, which all threads of a process share:
a sample of a step comes out the same on any worker, in any thread, and again after a restart.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from segray.config import AugmentationSettings
from segray.images import resize_image, resize_mask

FILL_RGB = (124, 116, 104)  # the mean of ImageNet: about 0 once normalised
_BLUR_KERNEL_PX = 5
_BLUR_SIGMA_PX = (0.3, 1.5)
_CUTOUT_SIDE = (0.1, 0.4)  # of the sample's sides

_Image = npt.NDArray[np.uint8]
_Truth = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for a training sample.

    Attributes:
        settings: The changes, and how strong they are.
        image_size: Height and width that whole images are fed to the model at; what a scale of 1 means.
        ignore_index: Truth of pixels that the image does not reach to, or that were blanked.
    """

    settings: AugmentationSettings
    image_size: tuple[int, int]
    ignore_index: int

    def apply(self, image: _Image, truth: _Truth, generator: np.random.Generator) -> tuple[_Image, _Truth]:
        """Return a random sample of an image.

        Args:
            image: (H, W, 3) uint8.
            truth: (H, W) class indices. They are moved by nearest neighbour alone, so that no value is ever mixed.
            generator: What all draws are made from.

        Returns:
            Image and truth of ``settings.crop_size`` (or ``image_size``), of the dtypes given.
        """
        image, truth = self._cut_window(image, truth, generator)
        if self.settings.rotation_deg:
            image, truth = self._rotate(image, truth, generator)
        if generator.random() < self.settings.horizontal_flip:
            image, truth = image[:, ::-1], truth[:, ::-1]
        if generator.random() < self.settings.vertical_flip:
            image, truth = image[::-1], truth[::-1]
        if self.settings.colour_jitter or self.settings.blur:
            image = self._change_colours(image, generator)
        if generator.random() < self.settings.cutout:
            image, truth = self._blank(image, truth, generator)
        return np.ascontiguousarray(image), np.ascontiguousarray(truth)

    def _cut_window(self, image: _Image, truth: _Truth, generator: np.random.Generator) -> tuple[_Image, _Truth]:
        """Cut a window of random scale, shape and place, which may reach past the image, and resize it."""
        size = self.settings.crop_size or self.image_size
        scale, aspect = (_draw_log_uniform(generator, ends) for ends in (self.settings.scale, self.settings.aspect))
        spans = []
        for side, full, of_window, stretch in zip(image.shape, self.image_size, size, (-0.5, 0.5), strict=False):
            # pixels of the image that a window of this size shows
            length = max(1, round(side * of_window / full / (scale * aspect**stretch)))
            start = int(generator.integers(min(0, side - length), max(0, side - length), endpoint=True))
            spans.append((start, length))
        return _cut(image, spans, size, FILL_RGB), _cut(truth, spans, size, self.ignore_index)

    def _rotate(self, image: _Image, truth: _Truth, generator: np.random.Generator) -> tuple[_Image, _Truth]:
        angle = float(generator.uniform(-self.settings.rotation_deg, self.settings.rotation_deg))
        turned = transforms.rotate(_to_chw(image), angle, InterpolationMode.BILINEAR, fill=list(map(float, FILL_RGB)))
        truth_chw = torch.from_numpy(truth.astype(np.int32))[None]
        turned_truth = transforms.rotate(truth_chw, angle, InterpolationMode.NEAREST, fill=[float(self.ignore_index)])
        return _to_hwc(turned), turned_truth[0].numpy().astype(truth.dtype)

    def _change_colours(self, image: _Image, generator: np.random.Generator) -> _Image:
        image_chw = _to_chw(image)
        strength = self.settings.colour_jitter
        if strength:
            changes = [transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation]
            factors = generator.uniform(1 - strength, 1 + strength, len(changes))
            for number in generator.permutation(len(changes)):
                image_chw = changes[number](image_chw, float(factors[number]))
        if generator.random() < self.settings.blur:
            sigma = float(generator.uniform(*_BLUR_SIGMA_PX))
            image_chw = transforms.gaussian_blur(image_chw, [_BLUR_KERNEL_PX] * 2, [sigma] * 2)
        return _to_hwc(image_chw)

    def _blank(self, image: _Image, truth: _Truth, generator: np.random.Generator) -> tuple[_Image, _Truth]:
        """Blank a rectangle; what cannot be seen is not learned from."""
        lengths = [max(1, round(side * generator.uniform(*_CUTOUT_SIDE))) for side in truth.shape]
        starts = [
            int(generator.integers(0, side - length, endpoint=True))
            for side, length in zip(truth.shape, lengths, strict=True)
        ]
        box = tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))
        image, truth = image.copy(), truth.copy()
        image[box] = FILL_RGB
        truth[box] = self.ignore_index
        return image, truth


def _draw_log_uniform(generator: np.random.Generator, ends: tuple[float, float]) -> float:
    """Draw a factor: doubling is as likely as halving."""
    return float(np.exp(generator.uniform(*np.log(ends))))


def _cut(
    pixels: npt.NDArray[np.integer], spans: list[tuple[int, int]], size: tuple[int, int], fill: int | tuple[int, ...]
) -> npt.NDArray[np.integer]:
    """Resize a window, given as (start, length) in rows and columns, to ``size``; ``fill`` is past the edges."""
    inside, places = [], []
    for side, (start, length), target in zip(pixels.shape, spans, size, strict=False):
        first, last = max(0, start), min(side, start + length)
        inside.append(slice(first, last))
        begin = min(round((first - start) * target / length), target - 1)
        places.append(slice(begin, max(begin + 1, round((last - start) * target / length))))
    part = pixels[tuple(inside)]
    part_size = (places[0].stop - places[0].start, places[1].stop - places[1].start)
    resized = resize_image(part, part_size) if pixels.ndim == 3 else resize_mask(part, part_size)
    if part_size == size:
        return resized
    canvas = np.empty((*size, *pixels.shape[2:]), pixels.dtype)
    canvas[:] = fill
    canvas[tuple(places)] = resized
    return canvas


def _to_chw(image: _Image) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)  # of a decoded image that is kept, not to be written to


def _to_hwc(image_chw: torch.Tensor) -> _Image:
    pixels: _Image = image_chw.permute(1, 2, 0).numpy()
    return pixels

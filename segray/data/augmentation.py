"""Random changes of training samples, image and mask together.

Every change is drawn from the generator that is given, never from one that all threads of a process share, and made of
Pillow's images, not of tensors, for torch's sums depend on its number of threads: a sample of a step comes out the same
on any worker, in any thread, and again after a restart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from segray.config import AugmentationSettings
from segray.data.images import resize_image, resize_mask

FILL_RGB = (124, 116, 104)  # the mean of ImageNet: about 0 once normalised
_COLOUR_CHANGES = (transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation)
_BLUR_SIGMA_PX = (0.3, 1.5)
_CUTOUT_SIDE = (0.1, 0.4)  # of the sample's sides

_Image = npt.NDArray[np.uint8]
_Truth = npt.NDArray[np.integer]
_PixelT = TypeVar("_PixelT", bound=np.integer)


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
        return (
            _cut(image, spans, size, resize_image, FILL_RGB),
            _cut(truth, spans, size, resize_mask, self.ignore_index),
        )

    def _rotate(self, image: _Image, truth: _Truth, generator: np.random.Generator) -> tuple[_Image, _Truth]:
        angle = float(generator.uniform(-self.settings.rotation_deg, self.settings.rotation_deg))
        turned = transforms.rotate(Image.fromarray(image), angle, InterpolationMode.BILINEAR, fill=FILL_RGB)
        turned_truth = transforms.rotate(
            Image.fromarray(truth), angle, InterpolationMode.NEAREST, fill=self.ignore_index
        )
        return np.asarray(turned), np.asarray(turned_truth)

    def _change_colours(self, image: _Image, generator: np.random.Generator) -> _Image:
        picture = Image.fromarray(image)
        strength = self.settings.colour_jitter
        if strength:
            for number in generator.permutation(len(_COLOUR_CHANGES)):
                picture = _COLOUR_CHANGES[number](picture, float(generator.uniform(1 - strength, 1 + strength)))
        if generator.random() < self.settings.blur:  # Pillow's own: torchvision makes a tensor of it
            picture = picture.filter(ImageFilter.GaussianBlur(float(generator.uniform(*_BLUR_SIGMA_PX))))
        return np.asarray(picture)

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
    pixels: npt.NDArray[_PixelT],
    spans: list[tuple[int, int]],
    size: tuple[int, int],
    resize: Callable[[npt.NDArray[_PixelT], tuple[int, int]], npt.NDArray[_PixelT]],
    fill: int | tuple[int, ...],
) -> npt.NDArray[_PixelT]:
    """Resize a window, given as (start, length) in rows and columns, to ``size``; ``fill`` is past the edges."""
    inside, places = [], []
    for side, (start, length), target in zip(pixels.shape, spans, size, strict=False):
        first, last = max(0, start), min(side, start + length)
        inside.append(slice(first, last))
        begin = min(round((first - start) * target / length), target - 1)
        places.append(slice(begin, max(begin + 1, round((last - start) * target / length))))
    resized = resize(pixels[tuple(inside)], (places[0].stop - places[0].start, places[1].stop - places[1].start))
    if resized.shape[:2] == size:
        return resized
    canvas = np.empty((*size, *pixels.shape[2:]), pixels.dtype)
    canvas[:] = fill
    canvas[tuple(places)] = resized
    return canvas

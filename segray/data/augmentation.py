"""Random augmentation of training samples, image and mask together.

All random numbers come from the generator that the caller passes, never from one shared by the threads of a process.
The changes are computed by Pillow, not by torchvision on tensors, because torch's sums depend on its number of threads.
So a sample is identical on any worker, in any thread, and after a restart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageFilter

from segray.config import AugmentationSettings
from segray.data.images import resize_image, resize_mask

FILL_RGB = (124, 116, 104)  # The mean of ImageNet, which is about 0 after normalisation.
_COLOUR_CHANGES = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
_BLUR_SIGMA_PX = (0.3, 1.5)
_CUTOUT_SIDE = (0.1, 0.4)  # Share of the sample's height and of its width.

_Image = npt.NDArray[np.uint8]
_Truth = npt.NDArray[np.integer]
_PixelT = TypeVar("_PixelT", bound=np.integer)


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of training samples.

    Attributes:
        settings: Which changes are made, and their strength.
        image_size: Height and width in pixels that whole images are resized to before they enter the model. A scale of
            1 refers to this size.
        ignore_index: Class index of pixels outside the image and of blanked pixels.
    """

    settings: AugmentationSettings
    image_size: tuple[int, int]
    ignore_index: int

    @property
    def takes_whole_images(self) -> bool:
        """Whether each sample is a whole image, so that no bit changes if images are resized to ``image_size`` before.

        Otherwise windows are cut out of images of the original size, which has more detail.
        """
        settings = self.settings
        return settings.scale == settings.aspect == (1, 1) and settings.crop_size in (None, self.image_size)

    def apply(self, image: _Image, truth: _Truth, generator: np.random.Generator) -> tuple[_Image, _Truth]:
        """Return a randomly augmented sample of an image.

        Args:
            image: (H, W, 3) uint8.
            truth: (H, W) class indices. They are resampled by nearest neighbour only, so values are never mixed.
            generator: Source of all random numbers.

        Returns:
            Image and truth with height and width ``settings.crop_size`` (or ``image_size``), with unchanged dtypes.
        """
        image, truth = self._cut_window(image, truth, generator)
        if self.settings.rotation_deg:
            image, truth = self._rotate(image, truth, generator)
        if generator.random() < self.settings.horizontal_flip:
            image, truth = _flip(image), truth[:, ::-1]
        if generator.random() < self.settings.vertical_flip:
            image, truth = image[::-1], truth[::-1]
        if self.settings.colour_jitter or self.settings.blur:
            image = self._change_colours(image, generator)
        if generator.random() < self.settings.cutout:
            image, truth = self._blank(image, truth, generator)
        return np.ascontiguousarray(image), np.ascontiguousarray(truth)

    def _cut_window(self, image: _Image, truth: _Truth, generator: np.random.Generator) -> tuple[_Image, _Truth]:
        """Cut out a window of random scale, aspect ratio and position, and resize it; it may extend past the image."""
        size = self.settings.crop_size or self.image_size
        scale, aspect = (_draw_log_uniform(generator, ends) for ends in (self.settings.scale, self.settings.aspect))
        spans = []
        for side, full, of_window, stretch in zip(image.shape, self.image_size, size, (-0.5, 0.5), strict=False):
            # Number of image pixels that the window covers along this axis.
            length = max(1, round(side * of_window / full / (scale * aspect**stretch)))
            start = int(generator.integers(min(0, side - length), max(0, side - length), endpoint=True))
            spans.append((start, length))
        return (
            _cut(image, spans, size, resize_image, FILL_RGB),
            _cut(truth, spans, size, resize_mask, self.ignore_index),
        )

    def _rotate(self, image: _Image, truth: _Truth, generator: np.random.Generator) -> tuple[_Image, _Truth]:
        angle = float(generator.uniform(-self.settings.rotation_deg, self.settings.rotation_deg))
        turned = Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR, fillcolor=FILL_RGB)
        turned_truth = Image.fromarray(truth).rotate(angle, Image.Resampling.NEAREST, fillcolor=self.ignore_index)
        return np.asarray(turned), np.asarray(turned_truth)

    def _change_colours(self, image: _Image, generator: np.random.Generator) -> _Image:
        picture = Image.fromarray(image)
        strength = self.settings.colour_jitter
        if strength:
            for number in generator.permutation(len(_COLOUR_CHANGES)):
                factor = float(generator.uniform(1 - strength, 1 + strength))
                picture = _COLOUR_CHANGES[number](picture).enhance(factor)
        if generator.random() < self.settings.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(float(generator.uniform(*_BLUR_SIGMA_PX))))
        return np.asarray(picture)

    def _blank(self, image: _Image, truth: _Truth, generator: np.random.Generator) -> tuple[_Image, _Truth]:
        """Blank a random rectangle of the image, and ignore its pixels in the truth."""
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


def _flip(image: _Image) -> _Image:
    """Mirror an image left to right, with Pillow, which is three times as fast as numpy."""
    return np.asarray(Image.fromarray(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def _draw_log_uniform(generator: np.random.Generator, ends: tuple[float, float]) -> float:
    """Draw a factor between two ends, uniform in its logarithm: doubling is as likely as halving."""
    return float(np.exp(generator.uniform(*np.log(ends))))


def _cut(
    pixels: npt.NDArray[_PixelT],
    spans: list[tuple[int, int]],
    size: tuple[int, int],
    resize: Callable[[npt.NDArray[_PixelT], tuple[int, int]], npt.NDArray[_PixelT]],
    fill: int | tuple[int, ...],
) -> npt.NDArray[_PixelT]:
    """Cut out a window, (start, length) in rows and in columns, and resize it; outside the image it is ``fill``."""
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
    canvas[0] = fill
    canvas[1:] = canvas[0]  # Whole rows, which numpy copies much faster than single pixels.
    canvas[tuple(places)] = resized
    return canvas

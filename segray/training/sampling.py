"""Class-balanced sampling: training images that contain a rare class are drawn more often.

Source: repeat factor sampling of Gupta, Dollár and Girshick, "LVIS: A Dataset for Large Vocabulary Instance
Segmentation", CVPR 2019, appendix B. A class that is in the share f of the images has the repeat factor
max(1, sqrt(t / f)), and an image that of its rarest class. LVIS's threshold t = 0.001 is for 1,203 classes, and would
change nothing for the usual few; here t = 1, so that every class counts by its share.

Repeating images by their factor would make epochs longer. Instead, the factors are weights, and an epoch has as many
samples as without them.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segray.config import TrainConfig
from segray.metrics import IntArray


@dataclass(frozen=True, eq=False)  # Compared and hashed by identity, so that what is computed from it can be cached.
class ImageWeights:
    """How often each training image is drawn, relative to the others.

    Attributes:
        values: (N,) float32, at least 1.
    """

    values: npt.NDArray[np.float32]

    def draw(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return N image numbers in random order; the number of times that each occurs is its share of N, rounded.

        It is rounded up or down at random, so that the expected number is exact (systematic resampling). The sums are
        computed one after the other, so that they are the same on every machine.
        """
        num_images = len(self.values)
        order = generator.permutation(num_images)
        ends = self.values[order].cumsum(dtype=np.float64)
        ends = np.minimum(ends * (num_images / ends[-1]), num_images)
        ends[-1] = num_images
        offset = generator.random()
        counts = np.diff(np.floor(ends - offset), prepend=np.floor(-offset)).astype(np.int64)
        return generator.permutation(order.repeat(counts))


def compute_image_weights(presence: bytes, image_count: IntArray) -> ImageWeights:
    """Return the weights of images: the square root of N / n of the rarest of its classes, which is in n of N images.

    Args:
        presence: The classes in each image; see ``SplitReport.presence``.
        image_count: (C,) numbers of images that contain each class.
    """
    bits = np.frombuffer(presence, np.uint8).reshape(-1, count_presence_bytes(len(image_count)))
    factors = np.sqrt(len(bits) / np.maximum(image_count, 1)).astype(np.float32)
    values = np.ones(len(bits), np.float32)
    for index, factor in enumerate(factors):
        has_class = (bits[:, index // 8] >> (7 - index % 8)) & 1
        np.maximum(values, has_class * factor, out=values)
    return ImageWeights(values)


def needs_presence(config: TrainConfig) -> bool:
    """Return whether a run, or a trial of a search, needs to know which classes each training image contains."""
    return config.train.sampling == "class_balanced" or "train.sampling" in config.tune.space


def pack_presence(is_present: npt.NDArray[np.bool_]) -> bytes:
    """Return one bit for each class, (C,), in whole bytes: the first class is the highest bit of the first byte."""
    return np.packbits(is_present).tobytes()


def count_presence_bytes(num_classes: int) -> int:
    """Return the number of bytes of ``pack_presence``."""
    return -(-num_classes // 8)

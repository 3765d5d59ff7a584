"""Cuts a listing into fragments: the unit of work, retry, resume and commit."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from segray.config import SegmentSettings

_TARGET_FRAGMENTS = 20_000  # More cost the driver and every reader of the result more time than they save.
_SMALL_IMAGES = 64
_FEW_FRAGMENTS = 32  # Fewer would leave CPUs of a workstation without work.
_FEWEST_IMAGES = 8
_NUM_SMALL = 64  # The first fragments stay small, so that a trial of the first images is small (``--limit``).


@dataclass(frozen=True)
class FragmentLimits:
    """Limits that each fragment keeps, except that a fragment has at least one image.

    Attributes:
        num_images: Maximum number of images.
        num_bytes: Maximum bytes of encoded images; images of unknown size count as 0.
        num_small: The first ``num_small`` fragments have at most 64 images.
    """

    num_images: int
    num_bytes: int
    num_small: int = 0

    @classmethod
    def resolve(cls, settings: SegmentSettings, image_size: tuple[int, int], num_images: int) -> "FragmentLimits":
        """Return the limits of a run.

        Args:
            settings: ``fragment_size``, ``fragment_bytes`` and ``fragment_px`` are used.
            image_size: Height and width of the model's input, to which every image is resized.
            num_images: Number of images of the run.
        """
        is_auto = settings.fragment_size == "auto"
        size = _choose_size(num_images) if is_auto else settings.fragment_size
        most = max(1, settings.fragment_px // (image_size[0] * image_size[1]))
        return cls(min(int(size), most), settings.fragment_bytes, _NUM_SMALL if is_auto else 0)

    def get_num_images(self, fragment: int) -> int:
        """Return the maximum number of images of a fragment."""
        return min(self.num_images, _SMALL_IMAGES) if fragment < self.num_small else self.num_images


def _choose_size(num_images: int) -> int:
    """Return the images per fragment of ``auto``."""
    small = min(_SMALL_IMAGES, max(_FEWEST_IMAGES, -(-num_images // _FEW_FRAGMENTS)))
    return max(small, -(-num_images // _TARGET_FRAGMENTS))


def cut_fragments(batches: Iterable[pa.RecordBatch], limits: FragmentLimits) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a listing with one more column, ``fragment``: the number of each image's fragment."""
    fragment, num_images, num_bytes = 0, 0, 0
    for batch in batches:
        sizes = np.maximum(batch["size_bytes"].fill_null(0).to_numpy(), 0)
        totals = np.concatenate([[0], np.cumsum(sizes)])
        fragments = np.empty(batch.num_rows, np.int64)
        start = 0
        while start < batch.num_rows:
            num_free = limits.num_bytes - num_bytes
            end = int(np.searchsorted(totals, totals[start] + num_free, "right")) - 1
            end = min(end, start + limits.get_num_images(fragment) - num_images)
            end = max(end, start if num_images else start + 1)
            fragments[start:end] = fragment
            num_images, num_bytes = num_images + end - start, num_bytes + int(totals[end] - totals[start])
            start = end
            if start < batch.num_rows:  # The next image does not fit.
                fragment, num_images, num_bytes = fragment + 1, 0, 0
        yield batch.append_column("fragment", pa.array(fragments))

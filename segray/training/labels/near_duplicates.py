"""Find images that look nearly the same, by a perceptual hash: the same picture resized or saved again, video frames.

Source of the hash: N. Krawetz, "Kind of Like That", hackerfactor.com, 2013 (dHash): the signs of the brightness
differences between neighbouring cells of a thumbnail, here along rows and along columns.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

_CELLS = 8
NUM_BITS = 2 * _CELLS**2
_NUM_BANDS = NUM_BITS // 16
# Any two hashes that differ in fewer bits than there are bands are equal in one band, so none of them is missed. Two
# different sequences of CamVid differ in at least 27 bits; its images saved as JPEG of quality 50, or at half size, in
# at most 5 bits, and with 30% more brightness in at most 13.
MAX_DISTANCE = _NUM_BANDS - 1
_MAX_COLOUR_DIFFERENCE = 8  # Of the mean of a channel, 0 to 255; simple drawings differ in little else.
_MAX_PAIRS = 4_000_000  # Pairs that are compared at once; 0.3 GB of memory.
# Images with the same bits in a band that an image is compared with. If all images have the same content in part, such
# as the frames of a fixed camera, the number of pairs would otherwise be the product of both numbers of images.
_MAX_OTHERS = 1_000
# Neighbouring bits depend on each other, and a margin of one colour makes whole rows or columns of bits equal in all
# images. So each band takes one bit from each row and column of both halves of the hash.
_ORDER = np.argsort(np.add.outer(range(_CELLS), range(_CELLS)).ravel() % _NUM_BANDS, kind="stable")

# ``bits`` are all 0 for an image of one colour, and for one that cannot be decoded; these are never compared.
THUMBPRINT = np.dtype([("bits", np.uint16, _NUM_BANDS), ("colour", np.uint8, 3)])
NO_THUMBPRINT = bytes(THUMBPRINT.itemsize)
Thumbprints = npt.NDArray[np.void]


class NearDuplicates(NamedTuple):
    """Images that look nearly like one of the others.

    Attributes:
        pairs: (image, other image, distance), one for each such image; the distance is the number of different bits of
            the two hashes, at most ``MAX_DISTANCE`` of ``NUM_BITS``.
        incomplete: Images without a pair that were compared with a part of the others only, because too many of them
            look alike in part.
    """

    pairs: list[tuple[int, int, int]]
    incomplete: npt.NDArray[np.intp]


def compute_thumbprint(image_hwc: npt.NDArray[np.uint8]) -> bytes:
    """Return the perceptual hash and the mean colour of an RGB image, as the bytes of one ``THUMBPRINT``."""
    image = Image.fromarray(image_hwc)
    side = _CELLS + 1
    cells = np.asarray(image.convert("L").resize((side, side), Image.Resampling.LANCZOS, reducing_gap=2)).astype(int)
    bits = np.stack([np.diff(cells, axis=1)[:-1] > 0, np.diff(cells, axis=0)[:, :-1] > 0])
    thumbprint = np.zeros(1, THUMBPRINT)
    thumbprint["bits"] = pack_bits(bits[None])
    thumbprint["colour"] = np.asarray(image.resize((1, 1), Image.Resampling.BOX, reducing_gap=2))[0, 0]
    return thumbprint.tobytes()


def pack_bits(bits: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint16]:
    """Return the bits of hashes, (N, 2, 8, 8) along rows and along columns, as bands, (N, 8)."""
    num_images = len(bits)
    halves = np.packbits(bits.reshape(num_images, 2, -1)[:, :, _ORDER], axis=2)  # A byte for each band and half.
    return np.ascontiguousarray(halves.transpose(0, 2, 1)).view(np.uint16).reshape(num_images, _NUM_BANDS)


def find_near_duplicates(thumbprints: bytes | memoryview, others: bytes | memoryview) -> NearDuplicates:
    """Return the images that look nearly like one of the others.

    An image is paired with a similar one, not always with the most similar one. Each is compared with the others that
    have the same bits in one of 8 bands, on average 8 in 65,536, so that the time grows with the product of both
    numbers of images divided by 8,192, and at most with 8,000 times the number of images.

    Args:
        thumbprints: Concatenated values of ``compute_thumbprint``, or ``NO_THUMBPRINT``.
        others: The same for the other images.
    """
    left, left_numbers = _read(thumbprints)
    right, right_numbers = _read(others)
    found: dict[int, tuple[int, int]] = {}
    is_open, is_incomplete = np.ones(len(left), bool), np.zeros(len(left), bool)
    for band in range(_NUM_BANDS):
        rows = np.flatnonzero(is_open)
        order = np.argsort(right["bits"][:, band], kind="stable")
        sorted_keys, keys = right["bits"][order, band], left["bits"][rows, band]
        starts = np.searchsorted(sorted_keys, keys)
        counts = np.searchsorted(sorted_keys, keys, side="right") - starts
        is_incomplete[rows] |= counts > _MAX_OTHERS
        counts = np.minimum(counts, _MAX_OTHERS)
        for row, other, distance in _compare_ranges(left[rows], right[order], starts, counts):
            number = int(left_numbers[rows[row]])
            found.setdefault(number, (int(right_numbers[order[other]]), distance))
            is_open[rows[row]] = False
    pairs = [(number, *found[number]) for number in sorted(found)]
    return NearDuplicates(pairs, left_numbers[is_incomplete & is_open])


def _read(content: bytes | memoryview) -> tuple[Thumbprints, npt.NDArray[np.intp]]:
    """Return the thumbprints that can be compared, and the numbers of their images."""
    thumbprints = np.frombuffer(content, THUMBPRINT)
    numbers = np.flatnonzero(thumbprints["bits"].any(axis=1))
    return thumbprints[numbers], numbers


def _compare_ranges(
    left: Thumbprints, right: Thumbprints, starts: npt.NDArray[np.intp], counts: npt.NDArray[np.intp]
) -> Iterator[tuple[int, int, int]]:
    """Yield the most similar pair of each of ``left``, compared with its number of ``right`` from a start on."""
    ends = np.cumsum(counts)
    first = 0
    while first < len(left):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _MAX_PAIRS, side="right")))
        part = counts[first:last]
        rows = np.repeat(np.arange(first, last), part)
        offsets = np.arange(len(rows)) - np.repeat(np.cumsum(part) - part, part)
        yield from _compare_pairs(left, right, rows, starts[rows] + offsets)
        first = last


def _compare_pairs(
    left: Thumbprints, right: Thumbprints, rows: npt.NDArray[np.intp], others: npt.NDArray[np.intp]
) -> Iterator[tuple[int, int, int]]:
    """Yield (row, other row, distance) of the most similar pair of each row, if it is similar."""
    distances = np.bitwise_count(left["bits"][rows] ^ right["bits"][others]).sum(axis=1)
    near = np.flatnonzero(distances <= MAX_DISTANCE)
    rows, others, distances = rows[near], others[near], distances[near]
    colours = left["colour"][rows].astype(int) - right["colour"][others]
    near = np.flatnonzero(np.abs(colours).max(axis=1, initial=0) <= _MAX_COLOUR_DIFFERENCE)
    rows, others, distances = rows[near], others[near], distances[near]
    order = np.lexsort((others, distances, rows))
    _, firsts = np.unique(rows[order], return_index=True)
    for index in order[firsts]:
        yield int(rows[index]), int(others[index]), int(distances[index])

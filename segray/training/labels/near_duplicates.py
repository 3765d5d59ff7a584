"""Find images that look nearly the same, by a perceptual hash: the same picture resized or saved again, video frames.

Source of the hash: N. Krawetz, "Kind of Like That", hackerfactor.com, 2013 (dHash): the signs of the brightness
differences between neighbouring cells of a thumbnail, here along rows and along columns.
"""

from collections.abc import Iterator

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

# ``bits`` are all 0 for an image of one colour, and for one that cannot be decoded; these are never compared.
THUMBPRINT = np.dtype([("bits", np.uint16, _NUM_BANDS), ("colour", np.uint8, 3)])
NO_THUMBPRINT = bytes(THUMBPRINT.itemsize)
Thumbprints = npt.NDArray[np.void]


def compute_thumbprint(image_hwc: npt.NDArray[np.uint8]) -> bytes:
    """Return the perceptual hash and the mean colour of an RGB image, as the bytes of one ``THUMBPRINT``."""
    image = Image.fromarray(image_hwc)
    side = _CELLS + 1
    cells = np.asarray(image.convert("L").resize((side, side), Image.Resampling.LANCZOS, reducing_gap=2)).astype(int)
    bits = np.stack([np.diff(cells, axis=1)[:-1] > 0, np.diff(cells, axis=0)[:, :-1] > 0])
    thumbprint = np.zeros(1, THUMBPRINT)
    # Neighbouring bits depend on each other, so each band takes every eighth bit.
    thumbprint["bits"] = np.packbits(bits.reshape(-1, _NUM_BANDS).T).view(np.uint16)
    thumbprint["colour"] = np.asarray(image.resize((1, 1), Image.Resampling.BOX, reducing_gap=2))[0, 0]
    return thumbprint.tobytes()


def find_near_duplicates(thumbprints: bytes, others: bytes) -> list[tuple[int, int, int]]:
    """Return (image, other image, distance) for each image that looks nearly like one of the others.

    The distance is the number of different bits of the two hashes, at most ``MAX_DISTANCE`` of ``NUM_BITS``. An image
    is paired with a similar one, not always with the most similar one. Time and memory grow with the number of images
    and of similar pairs, not with the product of both numbers of images.

    Args:
        thumbprints: Concatenated values of ``compute_thumbprint``, or ``NO_THUMBPRINT``.
        others: The same for the other images.
    """
    left, left_numbers = _read(thumbprints)
    right, right_numbers = _read(others)
    found: dict[int, tuple[int, int]] = {}
    is_open = np.ones(len(left), bool)
    for band in range(_NUM_BANDS):
        rows = np.flatnonzero(is_open)
        order = np.argsort(right["bits"][:, band], kind="stable")
        for row, other, distance in _compare_band(left[rows], right[order], band):
            number = int(left_numbers[rows[row]])
            found.setdefault(number, (int(right_numbers[order[other]]), distance))
            is_open[rows[row]] = False
    return [(number, *found[number]) for number in sorted(found)]


def _read(content: bytes) -> tuple[Thumbprints, npt.NDArray[np.intp]]:
    """Return the thumbprints that can be compared, and the numbers of their images."""
    thumbprints = np.frombuffer(content, THUMBPRINT)
    numbers = np.flatnonzero(thumbprints["bits"].any(axis=1))
    return thumbprints[numbers], numbers


def _compare_band(left: Thumbprints, right: Thumbprints, band: int) -> Iterator[tuple[int, int, int]]:
    """Yield the most similar pair of each of ``left``, of those with equal bits in the band that sorts ``right``."""
    keys, sorted_keys = left["bits"][:, band], right["bits"][:, band]
    starts = np.searchsorted(sorted_keys, keys)
    counts = np.searchsorted(sorted_keys, keys, side="right") - starts
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

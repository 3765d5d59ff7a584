"""Find problems in labels that decode without error: values mixed by interpolation or JPEG, images in two splits."""

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_DIGEST_BYTES = 16
NO_DIGEST = bytes(_DIGEST_BYTES)  # Stands for an image that cannot be decoded.

_MIN_EDGES = 100  # A share of fewer edges than this is not meaningful.
# Share of edges. CamVid's 468 masks have at most 0.02; shrunk to a quarter by nearest neighbour, which thins objects,
# 0.07; resized with bilinear or bicubic interpolation at least 0.33; saved as JPEG of quality 50 to 95 at least 0.27.
_MIN_MIXED_SHARE = 0.2
_BAND_ROWS = 256  # Masks are processed in bands of rows, so that a large mask does not need several times its memory.


def compute_mixed_share(raw: npt.NDArray[np.integer]) -> float:
    """Return the share of a mask's edges where a pixel's value lies between those of its two neighbours.

    At the edge between two classes, interpolation and JPEG produce values between the two, which stand for other
    classes or for none. Edges are counted along rows and columns, where the neighbours of a pixel differ by more than
    1. Such values go undetected if the mask was then enlarged by nearest neighbour, which doubles every pixel.

    Args:
        raw: (H, W) raw mask values.

    Returns:
        0..1; 0 if there are too few edges.
    """
    counts = np.zeros(2, np.int64)
    for start in range(0, raw.shape[0], _BAND_ROWS):
        # The last 2 rows belong to the next band: they are neighbours of this one.
        values = raw[start : start + _BAND_ROWS + 2].astype(np.int32)
        counts += _count_edges(values[:_BAND_ROWS])
        counts += _count_edges(values.T)
    num_edges, num_mixed = counts.tolist()
    return num_mixed / num_edges if num_edges >= _MIN_EDGES else 0.0


def _count_edges(values: npt.NDArray[np.int32]) -> tuple[int, int]:
    """Return the number of edges along rows, and how many of them are at a value between those of the neighbours."""
    before, middle, after = values[:, :-2], values[:, 1:-1], values[:, 2:]
    is_mixed = (middle > np.minimum(before, after)) & (middle < np.maximum(before, after))
    return int((np.abs(after - before) > 1).sum()), int(is_mixed.sum())


def is_mixed(raw: npt.NDArray[np.integer]) -> bool:
    """Return whether a mask looks resized with interpolation or saved as JPEG."""
    return compute_mixed_share(raw) >= _MIN_MIXED_SHARE


def compute_pixel_digest(image_hwc: npt.NDArray[np.uint8]) -> bytes:
    """Return 16 bytes that are equal for images of equal size and pixels, however they are encoded."""
    digest = hashlib.blake2b(repr(image_hwc.shape).encode(), digest_size=_DIGEST_BYTES)
    digest.update(np.ascontiguousarray(image_hwc).data)
    return digest.digest()


def find_shared_images(digests: bytes | memoryview, others: bytes | memoryview) -> list[tuple[int, int]]:
    """Return pairs of image numbers: each image that is also among the others, and the first equal image there.

    Args:
        digests: Concatenated values of ``compute_pixel_digest``, or ``NO_DIGEST``.
        others: The same for the other images.
    """
    own = _view_digests(digests)
    found = pc.index_in(own, value_set=_view_digests(others))
    numbers = np.flatnonzero(
        pc.and_(found.is_valid(), pc.not_equal(own, pa.scalar(NO_DIGEST, own.type))).to_numpy(zero_copy_only=False)
    )
    return list(zip(numbers.tolist(), found.take(pa.array(numbers)).to_pylist(), strict=True))


def _view_digests(digests: bytes | memoryview) -> pa.FixedSizeBinaryArray:
    num_digests = len(digests) // _DIGEST_BYTES
    return pa.Array.from_buffers(pa.binary(_DIGEST_BYTES), num_digests, [None, pa.py_buffer(digests)])

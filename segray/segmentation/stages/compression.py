"""Compression of masks and ground truth while they wait between the stages, so that they take little memory.

LZ4 takes half the time of zstd at level 1. Of masks with smooth regions it leaves 3 to 18% of the bytes, zstd 1 to 6%
(3000x4000 and 375x500 pixels; measured).
"""

from typing import Any

import pyarrow as pa

_CODEC = "lz4"


def compress(raw: Any) -> bytes:
    """Return the bytes of any contiguous buffer, compressed."""
    compressed: bytes = pa.compress(raw, codec=_CODEC, asbytes=True)
    return compressed


def decompress(compressed: Any, num_bytes: int) -> bytes:
    """Return the ``num_bytes`` raw bytes of what ``compress`` returned."""
    raw: bytes = pa.decompress(compressed, num_bytes, codec=_CODEC, asbytes=True)
    return raw
